"""A trained model used for more than noise: pictures to start from, masks, guides, own samplers;
what a chapter cannot hold of it."""
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import within
from PIL import Image
from test_commands import TRAIN, ask, refused
from iddpm_nb.checks import crash_at
from iddpm_nb.data import digits, to_float, to_uint8
from iddpm_nb.sampling import Sampling, normal, respace, sample
from iddpm_nb.conditioning.upsampler import lower
from iddpm_nb.running import model as models
from iddpm_nb.running.model import load, stream
from iddpm_nb.running.using import filled, image_to_image, inpaint
from iddpm_nb.cli.sample import SampleOptions, iddpm_sample
from iddpm_nb.cli.train import iddpm_train

SMALL = (4, 2**26)           # images in a part, in place of 1,000


def save(x, name):
    "A picture of a uint8 array, (H,W) or (H,W,3)."
    Image.fromarray(np.asarray(x, dtype=np.uint8)).save(name)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    "Runs of two steps: of digits, with classes, of colours, of an upsampler; and pictures."
    with within(tmp_path_factory.mktemp("using")) as folder:
        g, d = np.random.default_rng(0), digits().images
        np.savez("colours.npz", images=g.integers(0, 256, (20, 8, 8, 3), dtype=np.uint8))
        np.savez("low.npz", images=lower(d[:20], 4)[:, 0].numpy())
        for words in ("--class-cond --out classes", "--out plain", "--upsample-from 4 --out up",
                      "--data colours.npz --out colours", "--data low.npz --out base"):
            status, _, err = ask(iddpm_train, *TRAIN, *words.split())
            assert status == 0, err
        half = np.zeros((8, 8))
        half[:4] = 255
        rgb = g.integers(0, 256, (8, 8, 3))
        for name, x in {"digit": d[7, 0], "half": half, "rgb": rgb, "grey": d[8, 0],
                        "white": half + 255 - half, "black": 0 * half, "wide": half.repeat(2, 1),
                        "small": half[:4, :4]}.items():
            save(x, f"{name}.png")
        save(np.stack([d[7, 0]] * 3, 2), "as_rgb.png")
        Path("text.png").write_text("hello")
        Path("empty").mkdir()
    return folder


@pytest.fixture(autouse=True)
def here(home, monkeypatch):
    monkeypatch.chdir(home)
    monkeypatch.setattr(models, "TOGETHER", SMALL)


def drawn(tmp_path, words, n=3, out="a"):
    "The images that a command draws, uint8 (N,H,W,C)."
    status, _, err = ask(iddpm_sample, *words.split(), "--n", n, "--steps", 5, "--seed", 3,
                         "--device", "cpu", "--precision", "float32", "--out",
                         tmp_path / f"{out}.png")
    assert status == 0, err
    return np.load(tmp_path / f"{out}.npz")["images"]


def test_init_is_image_to_image(tmp_path):
    x0 = digits().images[7:8].expand(3, -1, -1, -1)
    want = image_to_image(load("plain"), x0, 12, steps=5, seed=3)
    assert (drawn(tmp_path, "plain --init digit.png --from-step 12")
            == to_uint8(want).permute(0, 2, 3, 1).numpy()).all()
    assert (drawn(tmp_path, "plain --init as_rgb.png --from-step 12", out="b")
            == drawn(tmp_path, "plain --init digit.png --from-step 12", out="c")).all()


@pytest.mark.parametrize("more", ["", " --repeats 3", " --from-step 12", " --method ddim"])
def test_a_mask_keeps_what_is_white(tmp_path, more):
    x = drawn(tmp_path, "plain --init digit.png --mask half.png" + more)
    digit = digits().images[7, 0].numpy()
    assert (x[:, :4, :, 0] == digit[:4]).all() and (x[:, 4:, :, 0] != digit[4:]).any()
    assert len({v.tobytes() for v in x}) == len(x), "each image has noise of its own"
    if more == " --repeats 3":
        mask = torch.zeros(1, 1, 8, 8)
        mask[:, :, :4] = 1
        x0 = digits().images[7:8].expand(3, -1, -1, -1)
        want = inpaint(load("plain"), x0, mask, steps=5, seed=3, repeats=3)
        assert (x == to_uint8(want).permute(0, 2, 3, 1).numpy()).all()


def test_colours_and_classes(tmp_path):
    x = drawn(tmp_path, "colours --init rgb.png --mask half.png")
    assert (x[:, :4] == np.array(Image.open("rgb.png"))[:4]).all()
    a, b = (drawn(tmp_path, f"classes --init digit.png --from-step 12 --class {c}", out=c)
            for c in ("one", "two"))
    assert a.shape == b.shape and (np.load(tmp_path / "one.npz")["labels"] == 1).all()


MANY = ("plain --init digit.png --mask half.png --repeats 2 --from-step 12 --n 10 --steps 5 "
        "--seed 3 --device cpu").split()


def test_many_images_are_drawn_in_parts_and_gone_on_with(tmp_path):
    status, _, err = ask(iddpm_sample, *MANY, "--out", tmp_path / "whole.png")
    assert status == 0, err
    want = np.load(tmp_path / "whole.npz")["images"]
    assert len({v.tobytes() for v in want}) == 10
    status, _, err = ask(iddpm_sample, *MANY, "--png", tmp_path / "pngs")
    assert status == 0, err
    assert all((np.array(Image.open(p)) == x[..., 0]).all()
               for p, x in zip(sorted((tmp_path / "pngs").glob("*.png")), want, strict=True))
    for k in range(99):
        out = tmp_path / f"{k}.png"
        died = crash_at(k, lambda: ask(iddpm_sample, *MANY, "--out", out))
        if died and not out.exists(): assert ask(iddpm_sample, *MANY, "--out", out)[0] == 0
        assert (np.load(tmp_path / f"{k}.npz")["images"] == want).all(), k
        if not died: break
    assert 5 < k < 98


def test_another_picture_of_the_same_name_is_another_folder(tmp_path):
    save(digits().images[7, 0], tmp_path / "x.png")
    line = ["plain", "--init", tmp_path / "x.png", "--from-step", 12, "--n", 5, "--steps", 5,
            "--device", "cpu", "--png", tmp_path / "many"]
    assert ask(iddpm_sample, *line)[0] == 0 and ask(iddpm_sample, *line)[0] == 0
    save(digits().images[9, 0], tmp_path / "x.png")
    assert "other options" in refused(iddpm_sample, *line)


BAD = [
    "plain --from-step 5", "plain --mask half.png", "plain --init digit.png",
    "plain --repeats 3", "plain --init digit.png --from-step 5 --repeats 3",
    "plain --init digit.png --mask half.png --repeats 0",
    "plain --init digit.png --mask half.png --repeats -1",
    "plain --init digit.png --mask half.png --repeats 1.5",
    "plain --init digit.png --from-step 0", "plain --init digit.png --from-step 20",
    "plain --init digit.png --from-step -1", "plain --init digit.png --from-step x",
    "plain --init digit.png --from-step 2", "plain --init nowhere.png --from-step 9",
    "plain --init  --from-step 9", "plain --init empty --from-step 9",
    "plain --init text.png --from-step 9", "plain --init low.npz --from-step 9",
    "plain --init wide.png --from-step 9", "plain --init small.png --from-step 9",
    "plain --init rgb.png --from-step 9", "plain --init digit.png --mask nowhere.png",
    "plain --init digit.png --mask wide.png", "plain --init digit.png --mask small.png",
    "plain --init digit.png --mask grey.png", "plain --init digit.png --mask rgb.png",
    "plain --init digit.png --mask white.png", "plain --init digit.png --mask black.png",
    "plain --init digit.png --mask text.png", "up --init digit.png --from-step 9",
    "up --low low.npz --init digit.png --from-step 9",
    "up --base base --init digit.png --mask half.png",
    "plain --init /dev/zero --from-step 9",
]


@pytest.mark.parametrize("line", BAD)
def test_bad_pictures_are_refused_in_a_sentence(line):
    before = sorted(Path().rglob("*"))
    refused(iddpm_sample, *line.split(" "), "--n", 2, "--steps", 5, "--device", "cpu")
    assert sorted(Path().rglob("*")) == before


def test_the_help_names_them(capsys):
    status, out, _ = ask(iddpm_sample, "--help")
    assert status == 0
    assert all(f"--{name}" in out for name in ("init", "from-step", "mask", "repeats"))
    o = SampleOptions("x")
    assert (o.init, o.from_step, o.mask, o.repeats) == (None, None, None, 1)


def test_a_stream_cuts_what_is_given_to_a_guide():
    "10 images in parts of 4, and in chunks of 3: each image has the word that was meant for it."
    model, word = load("plain"), torch.linspace(-1, 1, 10)
    def guide(s, x, t, out, word):
        assert torch.is_grad_enabled() and len(word) == len(x) <= 3
        return torch.cat([0 * out[:, :1] + word.to(out).reshape(-1, 1, 1, 1), out[:, 1:]], 1)
    how = Sampling(3, "ddim", clip_x0=False, chunk=3)
    parts = list(stream(model, 10, how, 5, guide=guide, given={"word": word}))
    assert [len(p) for p in parts] == [4, 4, 2]
    alone = [model.sample(1, how, p.seed, x_T=noise[i:i + 1], guide=guide,
                          given={"word": word[p.places][i:i + 1]})
             for p in models.parts_of(10, (1, 8, 8), 5)
             for noise in [normal((p.places.stop - p.places.start, 1, 8, 8),
                                  model.random_numbers(p.seed), "cpu")]
             for i in range(len(noise))]
    x = torch.cat(parts)
    assert (x - torch.cat(alone)).abs().max() < 1e-5 * x.abs().max()


def test_an_own_sampler_gets_only_what_was_asked():
    seen = {}
    def mine(net, s, shape, how, *, generator, cond, progress):
        seen.update(net=net, s=s, shape=shape, how=how)
        return torch.zeros(shape)
    model = load("plain")
    assert model.sample(3, 5, sampler=mine).shape == (3, 1, 8, 8)
    assert seen["net"] is model.net and len(seen["s"]) == 5 and seen["shape"] == (3, 1, 8, 8)
    assert seen["how"].steps is None and seen["how"].variance == model.config["variance"]
    with pytest.raises(TypeError, match="guide"):
        model.sample(3, 5, sampler=mine, guide=lambda s, x, t, out: out)


def test_filling_leaves_a_network_as_it_was():
    model = load("digits")
    model.net.train()
    before = [p.clone() for p in model.net.parameters()]
    s = respace(model.schedule, range(0, 1000, 200))
    x = filled(model.net, s, (2, 1, 8, 8), Sampling(), x0=torch.zeros(2, 1, 8, 8),
               part=lambda x: 0 * x, progress=False, generator=torch.Generator().manual_seed(0))
    assert model.net.training and not x.requires_grad and x.dtype == torch.float32
    assert all(a.equal(b) and b.grad is None for a, b in zip(before, model.net.parameters()))


def test_uint8_and_floats_are_the_same_images():
    model, x = load("plain"), digits().images[:2]
    f = partial(image_to_image, model, from_step=12, steps=5)
    assert f(x).equal(f(to_float(x)))
    assert f(x).equal(image_to_image(model, x, 12, steps=Sampling(5, variance="learned")))
    assert not f(x).equal(sample(model.net, model.schedule, (2, 1, 8, 8), 5, progress=False))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_with_images_of_the_cpu():
    model, x, seen = load("digits", device="cuda"), to_float(digits("test").images[:5]), []
    mask = torch.zeros(1, 1, 8, 8)
    mask[:, :, :4] = 1
    y = inpaint(model, x, mask, steps=5, repeats=2, from_step=600, watch=seen.append)
    assert y.is_cuda and (y.cpu() * mask).equal(x * mask) and len(seen) == 2 * 2 + 1
    def guide(s, x, t, out, word):
        assert word.is_cuda and x.is_cuda and torch.is_grad_enabled()
        return out + 0 * word.reshape(-1, 1, 1, 1)
    how = Sampling(5, "ddim", chunk=2)
    a, b = (image_to_image(model, x, 600, steps=how, **kw)
            for kw in ({}, {"guide": guide, "given": {"word": torch.ones(5)}}))
    assert a.is_cuda and (a - b).abs().max() < 1e-4
