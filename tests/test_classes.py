"""Classes and two stages: every path from data to pictures, in small."""
import json

import numpy as np
import pytest
from conftest import TINY

COND = ["--class-cond", "--label-drop", "0.3"]
UP = ["--upsample-from", "4", "--noise-augment", "0.1", "--schedule", "linear", "--T", "30"]


def train(run, *options, status=0):
    return run("iddpm_train", *TINY, *options, status=status)


@pytest.fixture
def weights(run):
    "The weights of a run's last checkpoint, in its own folder."
    import safetensors.torch
    return lambda name, step: safetensors.torch.load_file(run.folder / name / "checkpoints"
                                                          / f"{step:07d}" / "model.safetensors")


def result(run, name):
    return json.loads((run.folder / name / "result.json").read_text())


def test_a_class_conditional_run(run):
    said = train(run, "--steps", "10", *COND, "--out", "a", "--sample-every", "10")
    assert "sees the class asked for in" in said and "given its label" in said
    r = result(run, "a")
    assert (0 <= r["samples"]["share_of_the_class_asked_for"] <= 1
            and r["held_out"]["given"] == ["label"] and r["best"]["step"] == 10)
    assert (run.folder / "a/samples/0000010.png").exists()
    assert "4 images" in run("iddpm_sample", "a", "--n", "4", "--steps", "5", "--class", "seven,3",
                             "--guidance", "2", "--device", "cpu")
    f = np.load(run.folder / "a/samples_4x5.npz")
    assert f["labels"].tolist() == [7, 7, 3, 3]
    assert "bits/dim" in run("iddpm_eval", "a", "--n", "8", "--device", "cpu")
    said = run("iddpm_sample", "a", "--class", "ten", "--device", "cpu", status=1)
    assert "Traceback" not in said and "zero, one, two" in said


def test_classes_come_from_the_data(run):
    rng = np.random.default_rng(0)
    np.savez(run.folder / "d.npz", images=rng.integers(0, 256, (40, 8, 8, 3), dtype=np.uint8),
             labels=np.arange(40) % 2, classes=np.array(["cat", "dog"]))
    from PIL import Image
    for i in range(24):
        folder = run.folder / "folder" / ("bird", "fish")[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    for data, out, name in (("d.npz", "a", "dog"), ("folder", "b", "fish")):
        train(run, "--steps", "4", "--class-cond", "--data", data, "--out", out)
        assert "2 images" in run("iddpm_sample", out, "--n", "2", "--steps", "3", "--class", name,
                                 "--device", "cpu")
        assert "bits/dim" in run("iddpm_eval", out, "--n", "2", "--device", "cpu")
    # trained without dropping
    said = run("iddpm_sample", "a", "--guidance", "2", "--steps", "3", "--device", "cpu", status=1)
    assert "Traceback" not in said and "label" in said
    np.savez(run.folder / "bare.npz", images=rng.integers(0, 256, (40, 8, 8, 3), dtype=np.uint8))
    said = train(run, "--class-cond", "--data", "bare.npz", status=1)
    assert "Traceback" not in said and "no labels" in said


def test_two_stages(run):
    from iddpm_nb.data import digits
    from iddpm_nb.conditioning.upsampler import lower
    np.savez(run.folder / "small.npz", images=lower(digits().images[:200], 4)[:, 0].numpy(),
             labels=digits().labels[:200].numpy())
    train(run, "--steps", "6", "--data", "small.npz", "--out", "base")
    said = train(run, "--steps", "6", *UP, "--out", "up", "--sample-every", "6")
    assert "given its small image" in said and "averaged back" in said
    assert (result(run, "up")["held_out"]["given"] == ["small image"]
            and (run.folder / "up/samples/0000006.png").exists())
    said = run("iddpm_sample", "up", "--base", "base", "--base-steps", "4", "--n", "6", "--steps",
               "5", "--device", "cpu")
    f = np.load(run.folder / "up/samples_6x5.npz")
    assert f["images"].shape == (6, 8, 8, 1) and f["low"].shape == (6, 4, 4, 1)
    run("iddpm_sample", "up", "--low", "small.npz", "--n", "5", "--steps", "5", "--out", "u.png",
        "--device", "cpu")
    g = np.load(run.folder / "u.npz")
    assert (g["low"][..., 0] == np.load(run.folder / "small.npz")["images"][:5]).all()
    assert "given its small image" in run("iddpm_eval", "up", "--n", "4", "--num-t", "12",
                                          "--device", "cpu")
    assert "FID, digits classifier" in run("iddpm_eval", "up", "--fid", "--samples", "40",
                                           "--steps", "3", "--device", "cpu")
    for line in (["up"], ["base", "--base", "base"], ["up", "--base", "up"],
                 ["up", "--base", "base", "--low", "small.npz"]):
        assert "Traceback" not in run("iddpm_sample", *line, "--steps", "3", "--device", "cpu",
                                      status=1)
    for wrong in ("3", "8"):
        assert "Traceback" not in train(run, "--upsample-from", wrong, status=1)


def test_both_at_once(run):
    "A class-conditional upsampler with dropped labels, over a class-conditional base."
    from iddpm_nb.data import digits
    from iddpm_nb.conditioning.upsampler import lower
    np.savez(run.folder / "small.npz", images=lower(digits().images[:200], 4)[:, 0].numpy(),
             labels=digits().labels[:200].numpy(), classes=np.array(digits().classes))
    train(run, "--steps", "4", *COND, "--data", "small.npz", "--out", "base")
    train(run, "--steps", "4", *COND, *UP, "--out", "up")
    run("iddpm_sample", "up", "--base", "base", "--n", "4", "--steps", "4", "--base-steps", "4",
        "--class", "two", "--guidance", "3", "--device", "cpu")
    assert np.load(run.folder / "up/samples_4x4.npz")["labels"].tolist() == [2] * 4
    assert "bits/dim" in run("iddpm_eval", "up", "--n", "4", "--num-t", "12", "--device", "cpu")


def test_resumed_to_the_same_bits(run, weights):
    more = [*COND, *UP, "--dropout", "0.1", "--save-every", "5"]
    train(run, "--steps", "10", *more, "--no-anneal", "--out", "whole")
    train(run, "--steps", "5", *more, "--no-anneal", "--out", "part")
    run("iddpm_train", "--resume", "part", "--steps", "10", "--device", "cpu")
    a, b = weights("whole", 10), weights("part", 10)
    assert all(a[k].equal(b[k]) for k in a), "the weights differ after resuming"
    said = run("iddpm_train", "--resume", "part", "--steps", "12", "--label-drop", "0.2",
               "--class-cond", "--device", "cpu", status=1)
    assert "Traceback" not in said


def test_official_layout(run):
    "The official class-conditional and upsampling networks, in small."
    make = ("import torch, iddpm_nb; from iddpm_nb.unet import UNet; from "
            "iddpm_nb.conditioning.upsampler import Upsampler; size = dict(out_channels=2, "
            "channels=32, mult=(1,), num_res_blocks=1, attn_resolutions=(), num_classes=3);"
            "torch.save(iddpm_nb.to_openai(UNet(1, image_size=4, **size)), 'base.pt'); "
            "torch.save(iddpm_nb.to_openai(Upsampler(4, in_channels=2, image_size=8, **size)), "
            "'up.pt')")
    run("python", make)
    known = ["--num-heads", "4", "--schedule", "linear", "--T", "30", "--rescale-t", "False"]
    run("iddpm_convert", "base.pt", "--image-size", "4", *known)
    said = run("iddpm_convert", "up.pt", "--image-size", "8", *known, status=1)
    assert "Traceback" not in said and "small images" in said
    run("iddpm_convert", "up.pt", "--image-size", "8", "--low-size", "4", *known)
    run("iddpm_sample", "up.safetensors", "--base", "base.safetensors", "--n", "3", "--steps", "4",
        "--base-steps", "4", "--class", "2", "--device", "cpu")
    assert np.load(run.folder / "samples_3x4.npz")["labels"].tolist() == [2] * 3


TEAM = '''
import sys, torch
from iddpm_nb.data import digits
from iddpm_nb.train import train
from iddpm_nb.training.distributed import join
from iddpm_nb.training.config import Config, DataConfig, DiffusionConfig, ModelConfig, TrainConfig
from iddpm_nb.running.run import begin

data = DataConfig(class_cond=True, label_drop=0.3, upsample_from=4, noise_augment=0.1)
c = Config(data, ModelConfig(mult=(1,), attn_resolutions=()), DiffusionConfig(T=30),
           TrainConfig(batch=8, precision="float32", compile="off"))
def main():  # what holds the team's threads is gone before Python ends
    with join("cpu") as team:
        run, s, _ = begin(c, digits(), torch.device("cpu"), team)
        torch.manual_seed(0)
        with torch.no_grad():
            # at 0 no gradient would reach what is before it
            run.net.net.conv_out.weight.normal_(std=0.1)
        for _ in train(run, s, 2, lr=1e-5, precision="float32"):
            pass
        if team.rank == 0:
            torch.save({k: p.grad for k, p in run.net.named_parameters()}, sys.argv[1])
main()
'''


def test_two_processes_train_as_one(run, site):
    "Labels, dropped labels, small images and their noise are cut with the batch."
    import torch
    from test_distributed import torchrun
    (run.folder / "team.py").write_text(TEAM)
    run("python", "import sys; sys.argv = ['', 'one.pt']; exec(open('team.py').read())")
    torchrun(site, "team.py", "two.pt", folder=run.folder)
    a, b = (torch.load(run.folder / f"{k}.pt", weights_only=True) for k in ("one", "two"))
    for k in ("net.label_embed.weight", "net.conv_in.weight", "net.conv_out.weight"):
        off = ((a[k] - b[k]).abs().max() / a[k].abs().max()).item()
        assert off < 1e-4, f"{k}: the gradients differ by {off:.1e}"
