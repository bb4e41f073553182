"""The best K steps, as a user types it: found and kept beside the weights by iddpm_eval, used by
iddpm_sample, iddpm_eval and Model.sample, and refused where they belong to something else."""
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ask

from iddpm_nb import load
from iddpm_nb.cli.evaluate import iddpm_eval
from iddpm_nb.cli.sample import iddpm_sample
from iddpm_nb.cli.train import iddpm_train
from iddpm_nb.data import digits, shipped
from iddpm_nb.measuring.best_steps import best_file, read_best
from iddpm_nb.sampling import respace, space_timesteps

RUN = ("--channels 8 --groups 4 --num-heads 2 --mult 1 --attn-resolutions --T 20 --steps 4 "
       "--batch 8 --warmup 0 --log-every 2 --save-every 2 --device cpu")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    "A run on 60 digits, one with classes, and best steps of both."
    home, d = tmp_path_factory.mktemp("best"), digits()
    np.savez(home / "few.npz", images=d.images[:60, 0].numpy(), labels=d.labels[:60].numpy())
    np.savez(home / "other.npz", images=d.images[60:90, 0].numpy())
    for name, more in ("run", ""), ("classes", " --class-cond"):
        ask(home, f"--data few.npz --out {name} {RUN}{more}", command=iddpm_train)
        ask(home, f"{name} --best-steps 3,5 --device cpu --out {name}.json")
    return home


def test_they_are_kept_beside_their_weights(home):
    model = load(home / "run")
    table = json.loads(best_file(model.file).read_text())
    assert best_file(model.file).name == "ema_0.995.best_steps.json"
    assert "2106.03802" in table["what"] and table["n"] <= 60
    assert table["held_out"] != table["images"]
    told = json.loads((home / "run.json").read_text())["best_steps"]
    assert told["steps"] == table["steps"] and list(table["steps"]) == ["3", "5"]
    for even, best in told["bits_per_dim_even_and_best"].values():
        assert best < even
    for K in 3, 5:
        assert len(read_best(model.file, 20, K)) == K


def test_the_figures_are_those_of_the_chains(home):
    told = json.loads((home / "run.json").read_text())["best_steps"]
    worth = told["bits_per_dim_even_and_best"]["5"]
    for steps, figure in zip(("5", "best5"), worth):
        ask(home, f"run --steps {steps} --device cpu --out {steps}.json")
        r = json.loads((home / f"{steps}.json").read_text())
        assert r["T"] == 5 and r["bits_per_dim"] == pytest.approx(figure, abs=1e-6)


def test_samples_of_the_best_steps(home):
    model = load(home / "run")
    kept = read_best(model.file, 20, 5)
    assert kept != space_timesteps(20, 5)
    want = replace(model, schedule=respace(model.schedule, kept)).sample(6, None, seed=2)
    assert torch.equal(model.sample(6, "best5", seed=2), want)
    assert torch.equal(model.quick("float32").sample(6, "best 5", seed=2), want)
    ask(home, "run --n 6 --steps best5 --seed 2 --device cpu", command=iddpm_sample)
    made = np.load(home / "run" / "samples_6xbest5.npz")["images"]
    shown = ((want + 1) * 127.5).round().clamp(0, 255).numpy()[:, 0]
    assert np.abs(made[..., 0] - shown).max() <= 1
    ask(home, "classes --n 2 --steps best3 --class 7 --device cpu", command=iddpm_sample)


def test_no_table_names_the_command_that_makes_it(home):
    for line, command in ("run --steps best7", iddpm_eval), ("run --steps best7", iddpm_sample):
        said = ask(home, line + " --device cpu", 1, command)
        assert "best3, best5" in said and "--best-steps 7" in said
    said = ask(home, "run --weights model --steps best3 --device cpu", 1, iddpm_sample)
    assert "iddpm_eval" in said and "model.safetensors --best-steps 3" in said
    with pytest.raises(ValueError, match="loaded from a file"):
        replace(load(home / "run"), file=None).sample(2, "best3")


def test_other_weights_are_refused_and_a_run_goes_on(home, tmp_path):
    shutil.copytree(home / "run", tmp_path / "run")
    shutil.copy(home / "few.npz", tmp_path)
    model = load(tmp_path / "run")
    shutil.copy(model.file.with_name("model.safetensors"), tmp_path / "other.safetensors")
    shutil.copy(best_file(model.file), tmp_path / "other.best_steps.json")
    said = ask(tmp_path, "other.safetensors --steps best3 --device cpu", 1, iddpm_sample)
    assert "made for other weights" in said
    ask(tmp_path, "--resume run --steps 6 --device cpu", command=iddpm_train)
    said = ask(tmp_path, "run --steps best3 --device cpu", 1, iddpm_sample)
    assert "not known" in said and "0000006" in said


@pytest.mark.parametrize("what", ["0", "1", "21", "ten", "3,", "3,,5", "-3", "٣", "3.0", "3;5"])
def test_bad_numbers(home, what):
    before = best_file(load(home / "run").file).read_bytes()
    said = ask(home, f"run --device cpu --best-steps={what}", 1)
    assert "from 2 to 20" in said and len(said.splitlines()) == 1
    assert best_file(load(home / "run").file).read_bytes() == before


@pytest.mark.parametrize("line, said", [
    ("digits --best-steps 5", "come along with it"), ("run --best-steps 3 --steps 5", "give one"),
    ("few.npz --best-steps 3", "holds images, not a model"),
    ("run --best-steps 3 --data other.npz", "images of the training"),
    ("run --steps best", "steps must be like"), ("run --steps best1", "best3, best5"),
    ("run --steps best99999999999", "steps must be like")])
def test_what_is_refused(home, line, said):
    assert said in ask(home, f"{line} --device cpu", 1)


def test_the_model_that_comes_along_has_its_own(home):
    for K in 10, 25, 50:
        assert len(read_best(shipped("digits.safetensors"), 1000, K)) == K
    assert load("digits").sample(2, "best10").shape == (2, 1, 8, 8)
