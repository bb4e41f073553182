"""What a run is told, what it decides by itself, and what it believes of files."""
import dataclasses
import json
import time
import warnings
from unittest.mock import patch

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from iddpm_nb.checks import typed
from iddpm_nb.data import Images, digits, shipped
from iddpm_nb.training import memory
from iddpm_nb.training.config import Config, DataConfig, ModelConfig, TrainConfig, describe, fit
from iddpm_nb.running.model import load
from iddpm_nb.running.folder import saved_config
from iddpm_nb.running.run import train_run
from iddpm_nb.cli.train import iddpm_train

MODEL = shipped("digits.safetensors")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    "Twelve photographs of no two sizes."
    folder = tmp_path_factory.mktemp("own") / "my pictures"
    folder.mkdir()
    for i in range(12):
        pixels = np.random.default_rng(i).integers(0, 256, (40 + i, 60 - i, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


def asked(pictures, size, model=None, **train):
    train = dict(steps=2, batch=2, save_every=1, precision="float32") | train
    return Config(DataConfig(str(pictures), size), model or ModelConfig(),
                  train=TrainConfig(**train))


def trained(c, out, **how):
    told = []
    quiet = dict(progress=False, judged=False, device="cpu", say=told.append)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train_run(c, out=out, **quiet, **how)
    return "\n".join(told)


@pytest.mark.parametrize("size", [16, 28, 32])
def test_defaults_fit_own_pictures(pictures, size, tmp_path):
    told = trained(asked(pictures, size), tmp_path / "run")
    assert told.startswith("chosen for these images: --channels")
    kept = saved_config(tmp_path / "run")
    decided = dataclasses.replace(kept.model, own="")
    assert None not in dataclasses.astuple(decided) and kept.train.steps == 2
    assert kept.model.attn_resolutions and max(kept.model.attn_resolutions) < size


def test_what_was_asked_for_is_kept_and_said_once(pictures, tmp_path):
    model = ModelConfig(channels=12, mult=(1, 2), num_res_blocks=1, num_heads=3)
    told = trained(asked(pictures, 16, model), tmp_path / "run")
    kept = saved_config(tmp_path / "run").model
    assert (kept.channels, kept.mult, kept.num_heads) == (12, (1, 2), 3)
    assert "--channels" not in told and "--groups 3" in told


EDGES = """--T 10000000 | --batch 1000000000 | --threads 1000000 | --threads 0 | --threads 4096
--workers -1 | --seed -1 | --seed 18446744073709551615 | --micro 0 | --warmup -1 | --steps 0
--lr nan | --lr inf | --lr 0 | --clip nan | --weight-decay inf | --lam nan | --dropout nan
--ema nan | --class-cond --label-drop nan | --class-cond --label-drop 1
--upsample-from 4 --noise-augment inf | --channels 100000 | --mult 1 0 | --keep 0
--num-res-blocks 1000000 | --image-size 1000000 | --save-every 0 | --log-every -5 | --num-heads 0
--groups 0"""


@pytest.mark.parametrize("line", [w.strip() for w in EDGES.replace("\n", "|").split("|")])
def test_options_at_their_edges(line, tmp_path):
    start = time.perf_counter()
    status, out, err = typed(iddpm_train, f"{line} --device cpu", tmp_path)
    assert status == 1 and len(err.strip().splitlines()) == 1 and "Traceback" not in err, err
    option = [word for word in line.split() if word.startswith("--")][-1].strip("-")
    assert option.replace("-", "_") in err, err
    assert time.perf_counter() - start < 20 and not list(tmp_path.iterdir())


def test_more_threads_than_a_machine_can_have(tmp_path):
    with patch("os.cpu_count", lambda: 2):
        status, _, err = typed(iddpm_train, "--threads 9 --device cpu", tmp_path)
    assert status == 1 and "--threads 8 is the most" in err, err
    assert len(err.strip().splitlines()) == 1 and not (tmp_path / "runs").exists()


def test_documented_meanings(tmp_path):
    tiny = ("--steps 2 --warmup 9 --batch 4 --micro 64 --T 20 --channels 8 --mult 1 --save-every 1 "
            "--device cpu --seed 4611686018427387904")
    with patch("iddpm_nb.running.run.judge", lambda *args: {}), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        status, out, err = typed(iddpm_train, tiny, tmp_path)
    assert status == 0 and saved_config(tmp_path / "runs" / "digits").train.micro == 64, err


def test_options_that_do_not_fit_the_images(pictures, tmp_path):
    for line, said in (("--image-size 25", "cannot be halved"),
                       ("--image-size 512 --attn-resolutions 512", "275 GB"),
                       ("--image-size 16 --attn-resolutions 5", "[16, 8, 4]"),
                       ("--image-size 16 --class-cond", "no labels")):
        (tmp_path / "data").unlink(missing_ok=True)
        (tmp_path / "data").symlink_to(pictures)
        status, _, err = typed(iddpm_train, f"--data data {line} --device cpu", tmp_path)
        assert status == 1 and said in err and len(err.strip().splitlines()) == 1, err
        assert not (tmp_path / "runs").exists()


def changed(how, tmp_path):
    "The shipped model, its configuration changed."
    with safe_open(MODEL, "pt") as f:
        tensors = {k: f.get_tensor(k) for k in f.keys()}
        about = json.loads(f.metadata()["iddpm_nb"])
    about = how(about)
    text = about if isinstance(about, str) else json.dumps(about)
    save_file(tensors, tmp_path / "m.safetensors", {"format": "pt", "iddpm_nb": text})
    return tmp_path / "m.safetensors"


def part(name, /, **how): return lambda about: about | {name: about[name] | how}
def without(name): return lambda about: {k: v for k, v in about.items() if k != name}
def entry(**how): return lambda about: about | how


HOSTILE = [part("network", channels=10**9), part("network", channels=40_000),
           part("network", channels=4096), part("network", num_res_blocks=10**6),
           part("network", mult=[1] * 10**5), part("network", image_size=10**6),
           part("network", channels=True), part("network", dropout="0"),
           part("network", depth=3), part("network", low_size=None),
           part("network", num_classes=10**12), part("network", attn_resolutions=[[4]]),
           part("schedule", T=10**9), part("schedule", T=-1), part("schedule", name="cubic"),
           entry(shape=[1, 10**6, 10**6]), entry(shape=[3, 8, 8]), entry(variance=3),
           entry(network=7), entry(classes=[[1]]), without("network"), without("schedule"),
           without("shape"), without("variance"), lambda about: "[" * 10**4 + "]" * 10**4,
           lambda about: "null", lambda about: '{"network": {}, "network": {}}']


@pytest.mark.parametrize("how", HOSTILE)
def test_a_checkpoint_is_not_believed(how, tmp_path):
    path, start = changed(how, tmp_path), time.perf_counter()
    with pytest.raises(ValueError) as e:
        load(path)
    assert len(str(e.value)) < 600 and "\n" not in str(e.value)
    assert time.perf_counter() - start < 5


def test_older_checkpoints_load(tmp_path):
    def older(about):
        network = {k: v for k, v in about["network"].items() if k != "scale_shift"}
        return about | {"network": network}
    x = load(changed(older, tmp_path)).sample(2, steps=2)
    assert torch.equal(x, load(MODEL).sample(2, steps=2))


def test_the_shipped_model_is_what_plain_defaults_describe():
    its, now = load(MODEL).config, json.loads(json.dumps(describe(Config(), digits())))
    machine = ("precision", "threads", "on_disk")            # decided by the machine, and kept
    for about in its, now:
        about["run"] = {part: {k: v for k, v in fields.items() if k not in machine}
                        for part, fields in about["run"].items()}
    for part, names in (("data", ["skip_broken"]), ("diffusion", ["variance_only", "init"]),
                        ("model", ["own", "arguments"]), ("train", ["log", "licence"])):
        for name in names:                                   # younger than the model
            now["run"][part].pop(name)
    keys = "network", "schedule", "averages", "variance", "shape", "classes", "run"
    assert {k: its[k] for k in keys} == {k: now[k] for k in keys}


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    "A run of two steps."
    out = tmp_path_factory.mktemp("stopped") / "run"
    model = ModelConfig(channels=8, mult=(1,), num_heads=2)
    c = Config(model=model, train=TrainConfig(steps=2, batch=4, save_every=1, warmup=0))
    trained(c, out)
    return out


@pytest.mark.parametrize("where, how", [("train", {"batch": 2}), ("train", {"lr": 0.1}),
                                        ("diffusion", {"loss": "vlb"}), ("diffusion", {"T": 50})])
def test_an_edited_config_json_is_refused(stopped, where, how):
    path = stopped / "config.json"
    before = path.read_text()
    c = json.loads(before)
    path.write_text(json.dumps(c | {where: c[where] | how}))
    try:
        with pytest.raises(ValueError, match="config.json says .* the checkpoint was trained with"):
            trained(saved_config(stopped), None, resume_from=stopped)
    finally:
        path.write_text(before)


@pytest.mark.parametrize("how", [{"steps": True}, {"lr": None, "pace": 1}, {"batch": 10**9},
                                 {"threads": "two"}, {"ema": [[0.9]]}])
def test_a_config_json_that_makes_no_sense(stopped, how):
    path = stopped / "config.json"
    before = path.read_text()
    c = json.loads(before)
    path.write_text(json.dumps(c | {"train": c["train"] | how}))
    try:
        with pytest.raises(ValueError, match="not the configuration of a run"):
            saved_config(stopped)
    finally:
        path.write_text(before)


def test_memory_that_ran_out_is_cured_on_resume(stopped):
    old = saved_config(stopped)
    free = dict(micro=2, compile="off", threads=1, steps=4, keep=5)
    told = trained(dataclasses.replace(old, train=dataclasses.replace(old.train, **free)), None,
                   resume_from=stopped)
    now = saved_config(stopped).train
    assert "steps 2 to 4" in told and (now.micro, now.compile) == (2, "off")
    told = trained(Config(train=TrainConfig(steps=5)), None, resume_from=stopped)
    assert "steps 4 to 5" in told and saved_config(stopped).model == old.model
    now = saved_config(stopped).train
    assert (now.micro, now.compile, now.threads) == (2, "off", 1), "what is left out has changed"


def test_a_batch_that_does_not_fit_goes_in_portions(tmp_path):
    c = Config(model=ModelConfig(channels=8, mult=(1,)), train=TrainConfig(steps=1, batch=512))
    with patch.object(memory, "free_memory", lambda device: 20_000_000):
        told = trained(c, tmp_path / "run")
    assert "it goes in portions, with --micro" in told
    assert 1 <= saved_config(tmp_path / "run").train.micro < 512
    wide = dataclasses.replace(c, model=ModelConfig(channels=512))
    with patch.object(memory, "free_memory", lambda device: 20_000_000):
        with pytest.raises(ValueError, match="not even one image at a time fits"):
            trained(wide, tmp_path / "wide")
    assert not (tmp_path / "wide").exists()


def test_every_even_size_gets_a_network():
    x = torch.zeros(1, 1, 1, 1, dtype=torch.uint8)
    for size in range(2, 258, 2):
        model = fit(Config(), Images(x.expand(2, 3, size, size))).model
        sizes = [size // 2**i for i in range(len(model.mult))]
        assert all(s % 2 == 0 for s in sizes[:-1]) and set(model.attn_resolutions) <= set(sizes)
        assert sizes[-1] <= 127 and max((0, *model.attn_resolutions)) <= 32
        assert model.channels % model.groups == model.channels % model.num_heads == 0
