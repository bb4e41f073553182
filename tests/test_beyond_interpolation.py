"""The way between two images: what a chapter cannot hold of it, above all as a user types it."""
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import within
from PIL import Image
from test_commands import TRAIN, ask, refused
from iddpm_nb.data import digits, to_float, to_uint8
from iddpm_nb.conditioning.upsampler import lower
from iddpm_nb.running.between import between, read_end, slerp
from iddpm_nb.running.latents import kept_levels
from iddpm_nb.running.model import load
from iddpm_nb.cli.sample import iddpm_sample
from iddpm_nb.cli.train import iddpm_train


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    "Runs of two steps: of digits, with classes, with a fixed variance, an upsampler; pictures."
    with within(tmp_path_factory.mktemp("between")) as folder:
        d = digits().images
        np.savez("low.npz", images=lower(d[:20], 4)[:, 0].numpy())
        np.savez("own.npz", images=d[:20, 0].numpy())
        for words in ("--class-cond --out classes", "--out plain", "--upsample-from 4 --out up",
                      "--variance beta --loss simple --out fixed", "--data own.npz --out own"):
            status, _, err = ask(iddpm_train, *TRAIN, *words.split())
            assert status == 0, err
        for name, x in {"a": d[7, 0], "b": d[8, 0], "small": d[7, 0, :4], "7": d[9, 0]}.items():
            Image.fromarray(x.numpy()).save(f"{name}.png")
        Path("7.png").rename("7")
        Path("text.png").write_text("hello")
    return folder


@pytest.fixture(autouse=True)
def here(home, monkeypatch):
    monkeypatch.chdir(home)


def drawn(tmp_path, words, out="a"):
    "The images that a command draws, uint8 (N,H,W,C)."
    status, said, err = ask(iddpm_sample, *words.split(), "--device", "cpu", "--precision",
                            "float32", "--out", tmp_path / f"{out}.png")
    assert status == 0, err
    assert f"{out}.png" in said and (tmp_path / f"{out}.png").exists()
    return np.load(tmp_path / f"{out}.npz")["images"]


def plain(x): return to_uint8(x).permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize("model", ["plain", "fixed", "own"])
@pytest.mark.parametrize("step", [None, 12])
def test_the_command_is_between(tmp_path, model, step):
    more = "" if step is None else f" --from-step {step}"
    x = drawn(tmp_path, f"{model} --interpolate a.png b.png --steps 8 --seed 3{more}")
    want = between(load(model), digits().images[7:9], steps=8, seed=3, from_step=step)
    assert x.shape == (10, 8, 8, 1) and (x == plain(want)).all()


def test_without_any_option(tmp_path):
    "50 steps by default; all of a short chain, up to the last that can be followed."
    x = drawn(tmp_path, "plain --interpolate a.png b.png --between 0")
    assert x.shape == (2, 8, 8, 1)
    y = drawn(tmp_path, "plain --interpolate a.png b.png --between 0 --steps all", "b")
    assert (x == y).all()


def test_numbers_files_and_rows_of_files_are_ends(tmp_path):
    model, held = load("digits"), digits("test").images
    assert read_end(model, "3").equal(held[3:4]) and read_end(model, "296").equal(held[296:])
    assert read_end(load("plain"), "own.npz:8").equal(digits().images[8:9])
    assert read_end(model, "7").equal(digits().images[9:10])       # a file of that name comes first
    x = drawn(tmp_path, "plain --interpolate 3 own.npz:8 --between 1 --steps 8")
    want = between(load("plain"), torch.cat([held[3:4], digits().images[8:9]]), 3, steps=8)
    assert (x == plain(want)).all()


def test_the_shipped_model_finds_both_ends(tmp_path):
    x = drawn(tmp_path, "digits --interpolate 3 8 --between 1")
    ends = digits("test").images[[3, 8], 0].numpy().astype(int)
    gap = ((x[[0, -1], ..., 0].astype(int) - ends)**2).mean()**0.5
    assert gap < 13, gap            # 50 steps of DDIM: 0.033 of a scale of 2, and 4 of 255; thrice


def test_as_pictures_and_by_chunks(tmp_path):
    words = "plain --interpolate a.png b.png --between 3 --steps 8 --device cpu"
    x = drawn(tmp_path, words.replace(" --device cpu", ""))
    y = drawn(tmp_path, words.replace(" --device cpu", " --chunk 2"), "b")
    assert np.abs(x.astype(int) - y).max() <= 1
    assert ask(iddpm_sample, *words.split(), "--png", tmp_path / "many")[0] == 0
    z = [np.array(Image.open(p)) for p in sorted((tmp_path / "many").glob("*.png"))]
    assert len(z) == 5 and np.abs(np.stack(z).astype(int) - x[..., 0]).max() <= 1


SAID = {
    "plain --interpolate a.png none.png": "there is no picture none.png",
    "plain --interpolate a.png small.png": "8x8 are needed",
    "plain --interpolate a.png text.png": "not a readable image",
    "plain --interpolate a.png none.npz:1": "there is no file none.npz",
    "plain --interpolate a.png own.npz:20": "it has 20",
    "plain --interpolate a.png low.npz:1": "got (1, 4, 4)",
    "plain --interpolate 3 297": "it has 297",
    "own --interpolate 3 8": "FILE.npz:NUMBER",
    "plain --interpolate a.png": "",
    "classes --interpolate a.png b.png": "was trained with classes",
    "up --interpolate a.png b.png": "enlarges",
    "plain --interpolate a.png b.png --init a.png --from-step 9": "does not go with --init",
    "plain --interpolate a.png b.png --mask a.png": "name it with --init",
    "classes --interpolate a.png b.png --class seven": "does not go with --class",
    "classes --interpolate a.png b.png --guidance 2": "does not go with --guidance",
    "up --interpolate a.png b.png --low low.npz": "does not go with --low",
    "plain --interpolate a.png b.png --n 5": "does not go with --n",
    "plain --interpolate a.png b.png --variance beta": "does not go with --variance",
    "plain --interpolate a.png b.png --method ddim --eta 1": "does not go with --eta",
    "plain --interpolate a.png b.png --steps 4,4": "number of steps",
    "plain --interpolate a.png b.png --between -1": "between 0 and 998",
    "plain --interpolate a.png b.png --between 999": "between 0 and 998",
    "plain --interpolate a.png b.png --from-step 20": "must be 1..19",
    "plain --interpolate a.png b.png --from-step 2 --steps 5": "a chain needs 2",
    "plain --between 3": "name both with --interpolate"}


@pytest.mark.parametrize("line", SAID)
def test_bad_input_is_one_sentence(line):
    before = sorted(Path().rglob("*"))
    assert SAID[line] in refused(iddpm_sample, *line.split(), "--device", "cpu")
    assert sorted(Path().rglob("*")) == before


def test_images_so_large_that_they_are_drawn_in_parts_are_refused(monkeypatch):
    from iddpm_nb.running import model
    monkeypatch.setattr(model, "TOGETHER", (4, 2**26))
    said = refused(iddpm_sample, *"plain --interpolate a.png b.png --device cpu".split())
    assert "--between 2 at most" in said


def test_a_model_encodes_and_decodes():
    model, x = load("digits"), digits("test").images[:5]
    z = model.encode(x)
    assert z.dtype == torch.float32 and z.shape == x.shape
    assert (model.decode(z) - to_float(x)).abs().max() < 0.5
    assert model.encode(to_float(x)).equal(z) and model.encode(x, 50, "euler").equal(z)
    assert (model.encode(x, chunk=2) - z).abs().max() < 1e-3
    model.net.train()
    assert model.encode(x).equal(z) and model.net.training
    model.net.eval()
    fast = model.quick("bfloat16")
    assert (fast.decode(fast.encode(x)) - to_float(x)).square().mean().sqrt() < 0.06


@pytest.mark.parametrize("kind", ["classes", "up"])
def test_what_a_network_asks_for_must_be_said(kind):
    model, x = load(kind), digits().images[:6]
    with pytest.raises(ValueError, match="cond="):
        model.encode(x)
    cond = ({"y": digits().labels[:6]} if kind == "classes"
            else {"low": to_float(lower(x, 4))})
    z = model.encode(x, 8, cond=cond, chunk=4)
    assert (z - model.encode(x, 8, cond=cond)).abs().max() < 1e-3
    assert model.decode(z, 8, cond=cond).shape == x.shape
    with pytest.raises(ValueError, match="a row for each"):
        model.encode(x, 8, cond={k: v[:3] for k, v in cond.items()})


def test_levels_that_cannot_be_followed_are_refused():
    model, x = load("digits"), digits("test").images[:2]
    for steps in [0, 500, 999], [0, 500, 980], range(0, 1000, 3):
        with pytest.raises(ValueError, match="too far apart"):
            model.encode(x, steps)
    for steps in (2, "10,15", None, [0, 500, 979], range(0, 980, 89)):
        assert kept_levels(model.schedule, steps).alpha_bar.min() > 9e-4
    for method in ("euler", "heun", "two-step"):
        z = model.encode(x, 20, method)
        assert z.abs().max() < 10 and model.decode(z, 20, method).isfinite().all()
    for steps in (981, 1, [5], [7, 3], "ten"):
        with pytest.raises(ValueError):
            model.decode(z, steps)


def test_slerp_of_what_is_alike_opposite_or_nothing():
    a, w = torch.randn(1, 3, 4, 4), torch.tensor([0.0, 0.3, 1.0])
    assert (slerp(a, a, w) - a).abs().max() < 1e-6
    for b in (-a, 0 * a):
        with pytest.raises(ValueError, match="opposite"):
            slerp(a, b, w)
