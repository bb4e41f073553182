"""A training that starts from a trained model: what is taken, what is said, killed and resumed."""
import dataclasses
import shutil

import pytest
import torch
from safetensors.torch import load_file
from test_distributed import torchrun
from iddpm_nb.checks import sentence, typed
from iddpm_nb.data import digits
from iddpm_nb.interop.openai import RELEASED, released, to_openai
from iddpm_nb.running import underway
from iddpm_nb.running.fine_tuning import init_config
from iddpm_nb.running.model import load
from iddpm_nb.running.run import train_run
from iddpm_nb.training.config import Config, DataConfig, DiffusionConfig, ModelConfig, TrainConfig
from iddpm_nb.cli.convert import iddpm_convert
from iddpm_nb.cli.train import iddpm_train

SHORT = TrainConfig(steps=6, batch=4, warmup=0, save_every=2, log_every=1, keep=9, ema=(0.5,))
STILL = dataclasses.replace(SHORT, steps=1, lr=1e-30)           # nothing moves
SMALL = ModelConfig(channels=16, groups=4, num_heads=2, mult=(1, 2), attn_resolutions=(4,))


@pytest.fixture(autouse=True)
def undrawn(monkeypatch):
    monkeypatch.setattr(underway, "curve", lambda folder: None)


def trained(c, out, **how):
    said = []
    train_run(c, out=out, device="cpu", progress=False, judged=False, say=said.append, **how)
    return "\n".join(said)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    "A run of a few steps, with classes."
    folder = tmp_path_factory.mktemp("source") / "run"
    chain = DiffusionConfig(T=20)
    trained(Config(DataConfig(class_cond=True, label_drop=0.2), SMALL, chain, SHORT), folder)
    return folder


def upon(path, data=None, train=SHORT, **diffusion):
    c = init_config(path)
    d = dataclasses.replace(c.diffusion, **diffusion)
    return dataclasses.replace(c, data=data or DataConfig(), diffusion=d, train=train)


def output(model, y=None, size=8):
    g = torch.Generator().manual_seed(0)
    x, t = torch.randn(4, 1, size, size, generator=g), torch.arange(4) * 100.0
    with torch.no_grad():
        return model.net(x, t, **({} if y is None else {"y": torch.full((4,), y)}))


def test_where_nothing_differs_the_start_is_the_source(source, tmp_path):
    same = DataConfig(class_cond=True, label_drop=0.2)
    said = trained(upon(source, same, STILL), tmp_path / "run")
    for name in "model", "ema_0.5":
        for y in 0, 10:
            mine = output(load(tmp_path / "run", name), y)
            assert torch.equal(mine, output(load(source), y)), f"{name} starts elsewhere"
    assert f"as in {source}: --channels 16 --mult 1 2" in said and "new" not in said
    assert "10 are taken by name" in said


def test_without_classes_it_is_the_source_without_a_class(source, tmp_path):
    said = trained(upon(source, train=STILL), tmp_path / "run")
    mine, its = output(load(tmp_path / "run")), output(load(source), 10)
    assert (mine - its).abs().max() < 1e-5
    assert "label_embed.weight: left out" in said


def test_the_shipped_model_gets_classes_and_a_larger_network_says_what_is_new(tmp_path):
    c = upon("digits", DataConfig(class_cond=True, label_drop=0.1), STILL)
    trained(c, tmp_path / "run")
    none, zero, seven = (output(load(tmp_path / "run"), y) for y in (10, 0, 7))
    assert torch.equal(none, output(load("digits")))
    for a, b in (zero, none), (seven, none), (zero, seven):
        assert 0.01 < (a - b).square().mean().sqrt() < 0.3     # near no class, and apart
    deeper = dataclasses.replace(c, model=ModelConfig(mult=(1, 2, 2), attn_resolutions=(4,)))
    said = trained(deeper, tmp_path / "deeper")
    assert "new, and random: down." in said and "left out: " not in said.splitlines()[0]


def test_an_upsampler_starts_as_the_base_model(tmp_path):
    trained(upon("digits", DataConfig(upsample_from=4), STILL), tmp_path / "up")
    up = load(tmp_path / "up")
    g = torch.Generator().manual_seed(0)
    x, t = torch.randn(4, 1, 8, 8, generator=g), torch.arange(4) * 100.0
    with torch.no_grad():
        mine = up.net(x, t, low=torch.randn(4, 1, 4, 4, generator=g))
    assert (mine - output(load("digits"))).abs().max() < 1e-5
    trained(upon(tmp_path / "up", train=STILL), tmp_path / "down")      # and back
    assert (output(load(tmp_path / "down")) - output(load("digits"))).abs().max() < 1e-5


def test_another_chain_is_said(tmp_path):
    said = trained(upon("digits", train=STILL, T=50), tmp_path / "a")
    assert "the chain is cosine, T = 50; it was cosine, T = 1000" in said
    said = trained(upon("digits", train=STILL, schedule="linear", loss="simple", variance="beta"),
                   tmp_path / "b")
    assert "means other noise than before" in said and "eps_hat is taken, u is left out" in said
    mine = output(load(tmp_path / "b"))
    assert (mine - output(load("digits"))[:, :1]).abs().max() < 1e-5


def test_a_killed_run_needs_no_other_file_and_ends_the_same(source, tmp_path):
    mine = shutil.copytree(source, tmp_path / "mine")
    c = upon(mine, DataConfig(class_cond=True))
    trained(c, tmp_path / "whole")
    shutil.rmtree(mine)
    half = shutil.copytree(tmp_path / "whole", tmp_path / "half")
    for step in 4, 6:
        shutil.rmtree(half / f"checkpoints/{step:07d}")
    trained(c, None, resume_from=half)
    for file in "model.safetensors", "ema_0.5.safetensors":
        a, b = (load_file(tmp_path / run / f"checkpoints/0000006/{file}")
                for run in ("half", "whole"))
        assert all(torch.equal(v, b[k]) for k, v in a.items()), f"{file} differs"


def test_an_official_file_by_its_name_or_converted(tmp_path):
    torch.save(to_openai(load("digits").net, groups=8), tmp_path / "official.pt")
    says = sentence(iddpm_train, "--init official.pt --device cpu", tmp_path)
    assert "cannot be read off tensors" in says
    by_hand = "--image-size 8 --num-heads 4 --schedule cosine --T 1000 --rescale-t True --groups 8"
    assert typed(iddpm_convert, f"official.pt {by_hand} --out ours.safetensors", tmp_path)[0] == 0
    trained(upon(tmp_path / "ours.safetensors", train=STILL), tmp_path / "run")
    assert torch.equal(output(load(tmp_path / "run")), output(load("digits")))


def test_an_official_file_that_is_known_by_its_name(tmp_path, monkeypatch):
    known = released(1000, image_size=8, in_channels=1, out_channels=2, channels=32, mult=(1, 2),
                     num_res_blocks=1, attn_resolutions=(4,), groups=8)
    monkeypatch.setitem(RELEASED, "tiny_500K", known)
    torch.save(to_openai(load("digits").net, groups=8), tmp_path / "tiny_500K.pt")
    said = trained(upon(tmp_path / "tiny_500K.pt", train=STILL), tmp_path / "run")
    assert torch.equal(output(load(tmp_path / "run")), output(load("digits"))) and "new" not in said
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    (tmp_path / "tiny_500K.pt").unlink()
    c = dataclasses.replace(upon("digits"), train=dataclasses.replace(STILL, steps=2))
    c = dataclasses.replace(c, diffusion=dataclasses.replace(
        c.diffusion, init=str(tmp_path / "tiny_500K.pt")))
    trained(c, None, resume_from=tmp_path / "again")                 # it needs no file


@pytest.mark.parametrize("line, why", [
    ("--init digits --channels 64", "no weights of the trained network fit"),
    ("--init digits --resume x", "exclude each other"),
    ("--init digits --preset cifar10", "exclude each other"),
    ("--init digits --variance-only digits", "exclude each other"),
    ("--init nowhere", "there is no checkpoint")])
def test_what_is_refused(line, why, tmp_path):
    assert why in sentence(iddpm_train, f"{line} --device cpu", tmp_path)


def test_both_in_a_configuration_are_refused(tmp_path):
    c = Config(diffusion=DiffusionConfig(init="digits", variance_only="digits"))
    with pytest.raises(ValueError, match="exclude each other"):
        trained(c, tmp_path / "run")


def test_a_configuration_leaves_the_network_open(tmp_path):
    c = Config(DataConfig(), diffusion=DiffusionConfig(init="digits"), train=STILL)
    trained(c, tmp_path / "run")
    had, has = load("digits").config["network"], load(tmp_path / "run").config["network"]
    assert all(has[k] == had[k] for k in ("channels", "mult", "attn_resolutions", "groups"))
    with pytest.raises(ValueError, match="init = digits and cannot be continued with init = None"):
        trained(Config(train=STILL), None, resume_from=tmp_path / "run")


def test_two_processes_start_as_one(site, source, tmp_path):
    line = f"--init {source} --steps 3 --batch 8 --device cpu --out"
    torchrun(site, "--no-python", "iddpm_train", *line.split(), "two", folder=tmp_path)
    assert typed(iddpm_train, f"{line} one", tmp_path)[0] == 0
    one, two = (output(load(tmp_path / name)) for name in ("one", "two"))
    assert (two - one).abs().max() < 1e-5 and len(digits())
