"""A frozen mean stays as it is, in whatever way its variance is trained, stopped and continued."""
import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_distributed import torchrun
from iddpm_nb.checks import sentence, typed
from iddpm_nb.data import digits
from iddpm_nb.interop.openai import to_openai
from iddpm_nb.running import underway
from iddpm_nb.running.model import load
from iddpm_nb.running.run import train_run
from iddpm_nb.running.variance_alone import variance_config
from iddpm_nb.training.config import Config, DataConfig, DiffusionConfig, ModelConfig, TrainConfig
from iddpm_nb.cli.convert import iddpm_convert
from iddpm_nb.cli.evaluate import iddpm_eval
from iddpm_nb.cli.sample import iddpm_sample
from iddpm_nb.cli.train import iddpm_train

KINDS = {"plain": {}, "classes": dict(class_cond=True, label_drop=0.2),
         "upsampler": dict(upsample_from=4, class_cond=True)}
SHORT = TrainConfig(steps=6, batch=4, warmup=0, save_every=2, log_every=1, keep=9, ema=(0.5,),
                    ema_plain=(0.9,))


@pytest.fixture(autouse=True)
def undrawn(monkeypatch):
    monkeypatch.setattr(underway, "curve", lambda folder: None)


def trained(c, out, judged=False, **how):
    return train_run(c, out=out, device="cpu", progress=False, say=lambda text: None, judged=judged,
                     **how)


@pytest.fixture(scope="module", params=KINDS)
def fixed(request, tmp_path_factory):
    "A run of a few steps with a fixed variance, and with dropout."
    folder = tmp_path_factory.mktemp(request.param) / "fixed"
    c = Config(DataConfig(**KINDS[request.param]),
               ModelConfig(channels=8, groups=4, num_heads=2, mult=(1,), attn_resolutions=(),
                           dropout=0.1),
               DiffusionConfig(T=20, loss="simple", variance="beta"), SHORT)
    trained(c, folder)
    return folder


def upon(fixed, **train):
    return dataclasses.replace(variance_config(fixed),
                               train=dataclasses.replace(SHORT, **train))


def output(model, n=3):
    g = torch.Generator().manual_seed(0)
    x, t = torch.randn(n, 1, 8, 8, generator=g), torch.arange(n) * 100.0
    cond = {"y": torch.arange(n)} if model.net.num_classes else {}
    if hasattr(model.net, "low_size"): cond["low"] = torch.randn(n, 1, 4, 4, generator=g)
    with torch.no_grad():
        return model.net(x, t, **cond)


def test_the_mean_stays_to_the_bit_and_the_variance_moves(fixed, tmp_path):
    trained(upon(fixed), tmp_path / "run")
    before = load(fixed)
    for name in "model", "ema_0.5", "ema_0.9_plain":
        after = load(tmp_path / "run", name)
        assert after.config["variance"] == "learned" and after.config["network"]["apart"]
        for n in 1, 3:
            whole = output(after, n)
            assert torch.equal(whole[:, :1], output(before, n)), f"{name}: another mean"
            assert whole[:, 1:].any(), f"{name}: u has not learned"
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert config["diffusion"]["variance_only"] == str(fixed.resolve())


def test_a_resumed_run_needs_no_other_file_and_ends_the_same(fixed, tmp_path):
    mine = shutil.copytree(fixed, tmp_path / "mine")
    c = upon(mine)
    for sampler in "uniform", "stratified", "importance":
        c = dataclasses.replace(c, diffusion=dataclasses.replace(c.diffusion, sampler=sampler))
        trained(c, tmp_path / sampler)
    shutil.rmtree(mine)
    for sampler in "uniform", "stratified", "importance":
        half = shutil.copytree(tmp_path / sampler, tmp_path / f"{sampler}-half")
        for step in 4, 6:
            shutil.rmtree(half / f"checkpoints/{step:07d}")
        c = dataclasses.replace(c, diffusion=dataclasses.replace(c.diffusion, sampler=sampler))
        trained(c, None, resume_from=half)
        for file in "model.safetensors", "ema_0.5.safetensors":
            name = f"checkpoints/0000006/{file}"
            mine, whole = (load_file(run / name) for run in (half, tmp_path / sampler))
            same = all(torch.equal(v, mine[k]) for k, v in whole.items())
            assert same, f"{sampler}: {file} differs"


def test_a_run_that_never_saved_copies_again(fixed, tmp_path):
    trained(upon(fixed), tmp_path / "run")
    without = shutil.ignore_patterns("checkpoints")
    shutil.copytree(tmp_path / "run", tmp_path / "new", ignore=without)
    (tmp_path / "new/metrics.jsonl").unlink()
    config = json.loads((tmp_path / "new/config.json").read_text())
    (tmp_path / "new/config.json").write_text(json.dumps(config | {"saved": False}))
    trained(upon(fixed), None, resume_from=tmp_path / "new")
    assert torch.equal(output(load(tmp_path / "new")), output(load(tmp_path / "run")))


def test_the_bound_before_is_that_of_the_file(fixed, tmp_path):
    result = trained(upon(fixed, steps=2), tmp_path / "run", judged=True)
    found, model = result["bits_per_dim_of_the_same_mean"], load(fixed)
    held = digits("test")
    cond = {"y": held.labels} if model.net.num_classes else None
    for kind in "beta", "beta_tilde":
        model.config["variance"] = kind
        before = model.bits_per_dim(held.images, num_t=20, cond=cond).total.mean().item()
        assert abs(found[kind] - before) < 1e-5
    assert abs(found["learned"] - result["held_out"]["bits_per_dim"]) < 1e-5
    assert json.loads((tmp_path / "run/result.json").read_text()) == result


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    "A folder with a run of fixed variance, one of learned variance, and images of other sizes."
    folder = tmp_path_factory.mktemp("typed")
    np.savez(folder / "grey.npz", images=digits().images[:40, 0].numpy())
    np.savez(folder / "colour.npz", images=np.zeros((40, 8, 8, 3), dtype=np.uint8))
    line = ("--data grey.npz --channels 8 --groups 4 --num-heads 2 --mult 1 --attn-resolutions "
            "--T 20 --steps 2 --warmup 0 --batch 4 --device cpu")
    for more in "--loss simple --variance beta_tilde --out fixed", "--out learned":
        status, _, err = typed(iddpm_train, f"{line} {more}", folder)
        assert status == 0, err
    return folder


ONE_SENTENCE = {
    "--variance-only learned": "has learned its variance already",
    "--variance-only learned/checkpoints": "is neither a run",
    "--variance-only nothing": "there is no checkpoint",
    "--variance-only fixed --data colour.npz": "knows images 1x8x8, and these are 3x8x8",
    "--variance-only fixed --class-cond --data digits": "is shown no classes",
    "--variance-only fixed --loss simple": "leave --loss out",
    "--variance_only fixed --loss=hybrid": "leave --loss out",
    "--variance-only fixed --variance beta": "leave --variance out",
    "--variance-only fixed --preset cifar10": "leave --preset out",
    "--variance-only fixed --lam 0": "leave --lam out",
    "--variance-only fixed --dropout 0.1": "would change it",
    "--variance-only fixed --weight-decay 0.1": "would change it",
    "--variance-only fixed --channels 16": "has channels = 8, and 16 is asked for",
    "--variance-only fixed --T 30": "has T = 20, and 30 is asked for",
    "--variance-only fixed --schedule linear": "has name = cosine",
    "--variance-only grey.npz": "is no file of ours",
    "--resume fixed --variance-only fixed": "--resume exclude each other",
}


@pytest.mark.parametrize("line", ONE_SENTENCE)
def test_what_does_not_fit_is_one_sentence(plain, line):
    said = sentence(iddpm_train, f"{line} --device cpu", plain)
    assert ONE_SENTENCE[line] in said and "\n" not in said, said
    assert not (plain / "runs").exists()


def test_the_model_is_an_ordinary_one(plain):
    status, out, err = typed(iddpm_train, "--variance-only fixed --steps 2 --batch 4 --device cpu "
                             "--out alone", plain)
    assert status == 0 and "with the same mean, held-out bits/dim are" in out, err
    assert typed(iddpm_sample, "alone --n 4 --steps 5 --out four.png --device cpu", plain)[0] == 0
    status, out, err = typed(iddpm_eval, "alone --n 4 --device cpu", plain)
    assert status == 0 and "bits" in out, err


def test_an_official_file_is_converted_first(plain):
    torch.save(to_openai(load(plain / "fixed").net, groups=4), plain / "official.pt")
    said = sentence(iddpm_train, "--variance-only official.pt --device cpu", plain)
    assert "make it one by iddpm_convert" in said
    by_hand = "--image-size 8 --num-heads 2 --schedule cosine --T 20 --rescale-t True --groups 4"
    status, _, err = typed(iddpm_convert, f"official.pt {by_hand} --out ours.safetensors", plain)
    assert status == 0, err
    says = sentence(iddpm_train, "--variance-only ours.safetensors --device cpu", plain)
    assert "which images?" in says
    line = "--variance-only ours.safetensors --data grey.npz --steps 2 --batch 4 --out three"
    assert typed(iddpm_train, f"{line} --device cpu", plain)[0] == 0
    assert torch.equal(output(load(plain / "three"))[:, :1], output(load(plain / "fixed")))


def test_two_processes_learn_it_as_one(site, plain):
    line = "--variance-only fixed --steps 4 --batch 8 --sampler stratified --device cpu --out"
    torchrun(site, "--no-python", "iddpm_train", *line.split(), "two", folder=plain)
    assert typed(iddpm_train, f"{line} one", plain)[0] == 0
    one, two, before = (output(load(plain / name)) for name in ("one", "two", "fixed"))
    assert torch.equal(two[:, :1], before) and (two - one).abs().max() < 1e-5
