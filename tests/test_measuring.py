"""iddpm_eval and iddpm_tables, on what people and accidents do: other folders, damaged files,
strange options."""
import contextlib
import io
import json
import shutil
import sys
import warnings
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

from iddpm_nb.checks import crash_at, typed
from iddpm_nb.training.files import reserved
from iddpm_nb.training.checkpoint import load_model, save_model
from iddpm_nb.measuring import features
from iddpm_nb.running.model import Model
from iddpm_nb.cli import evaluate
from iddpm_nb.cli.train import iddpm_train
from iddpm_nb.cli.sample import iddpm_sample
from iddpm_nb.cli.evaluate import EvalOptions, iddpm_eval
from iddpm_nb.reproduction import tables
from iddpm_nb.reproduction.tables import iddpm_tables

RUN = ("--grey --image-size 16 --attn-resolutions 8 --steps 2 --batch 4 --channels 8 --groups 4 "
       "--num-heads 2 --T 20 --warmup 0 --save-every 2 --device cpu")


def look(x): return x.flatten(1)[:, :5]  # five features, as module:function


LOOK = f"--fid --features {__name__}:look --device cpu"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A run on 40 colour pictures of 24x24, read as grey ones of 16x16, and 12 samples in its
    folder."""
    home, g = tmp_path_factory.mktemp("home"), np.random.default_rng(0)
    for i in range(40):
        folder = home / "pics" / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(g.integers(0, 256, (24, 24, 3), np.uint8)).save(folder / f"{i:02}.png")
    for command, line in ((iddpm_train, f"--data pics --out run {RUN}"),
                          (iddpm_sample, "run --n 12 --steps 3 --device cpu")):
        status, _, said = typed(command, line, home)
        assert status == 0, said
    return home


def ask(home, line, status=0, command=iddpm_eval):
    "What a command says; it must end as expected, and never in a traceback."
    got, out, err = typed(command, line, home)
    said = out + err
    assert got == status or status == 1 and got == 2, f"{line}: status {got}\n{said}"
    assert "Traceback" not in said
    return said


def record(home, line):
    "The figures of iddpm_eval, from its file."
    (home / "record.json").unlink(missing_ok=True)
    ask(home, f"{line} --out record.json")
    return json.loads((home / "record.json").read_text())


def test_samples_in_the_folder_of_a_run_know_their_run(home):
    r = record(home, f"run/samples_12x3.npz {LOOK}")
    assert r["samples"]["n"] == 12 and r["shape"] == [1, 16, 16] and r["reference"]["n"] < 40
    assert r["reference"]["images"].endswith("pics (train)")
    same = record(home, f"run/samples_12x3.npz {LOOK} --data pics")
    assert same["figures"] == r["figures"]
    assert "leave --image-size" in ask(home, f"run/samples_12x3.npz {LOOK} --image-size 8", 1)


def test_other_samples_say_how_their_reference_is_read(home):
    shutil.copy(home / "run" / "samples_12x3.npz", home / "drawn.npz")
    said = ask(home, f"drawn.npz {LOOK} --data pics", 1)
    assert "--image-size 16 --grey" in said
    r = record(home, f"drawn.npz {LOOK} --data pics --image-size 16 --grey")
    assert r["shape"] == [1, 16, 16] and r["reference"]["n"] == 40
    assert "name them with --data" in ask(home, f"drawn.npz {LOOK}", 1)


@pytest.mark.parametrize("name", [".npz", "...npz", "made.NPZ"])
def test_samples_of_any_name(home, name):
    shutil.copy(home / "run" / "samples_12x3.npz", home / name)
    assert "of 12 samples" in ask(home, f"{name} {LOOK} --data {name}")


def test_a_picture_is_no_set_of_samples(home):
    assert "is one picture" in ask(home, f"run/samples_12x3.png {LOOK}", 1)


def test_held_out_stays_held_out_wherever_the_files_lie(home):
    own = record(home, "run --num-t 12 --device cpu")
    shutil.copytree(home / "pics", home / "else" / "where", dirs_exist_ok=True)
    (home / "else" / "where" / "a" / "00.png").rename(home / "else" / "where" / "a" / "99.png")
    moved = record(home, "run --num-t 12 --device cpu --data else/where")
    assert (moved["n"], moved["bits_per_dim"]) == (own["n"], own["bits_per_dim"])
    (home / "pics").rename(home / "gone")
    try:
        said = ask(home, "run --device cpu", 1)
        assert "pics" in said and "--data" in said and "not at" in said
        assert record(home, "run --num-t 12 --device cpu --data gone")["n"] == own["n"]
    finally:
        (home / "gone").rename(home / "pics")
    (home / "else" / "where" / "b" / "01.png").unlink()          # another set: taken whole
    assert record(home, "run --num-t 12 --device cpu --data else/where")["n"] == 39


def test_broken_files(home):
    there = home / "broken"
    shutil.copytree(home / "pics" / "a", there)
    (there / "bad.png").write_bytes(b"no picture")
    for line in (f"run --num-t 12 --data {there} --device cpu", f"{there} --data pics {LOOK}",
                 f"run/samples_12x3.npz --data {there} {LOOK}"):
        said = ask(home, line, 1)
        assert "bad.png" in said and "--skip-broken" in said
        assert " 20 " in ask(home, line + " --skip-broken")


def test_a_set_that_has_changed_is_said(home):
    Image.fromarray(np.zeros((24, 24, 3), np.uint8)).save(home / "pics" / "a" / "new.png")
    try:
        r = record(home, "run --num-t 12 --device cpu")
    finally:
        (home / "pics" / "a" / "new.png").unlink()
    assert "has changed since the training" in r["notes"][0] and r["n"] < 20


def changed(home, name, change):
    "The model of the run, with another configuration, in a file of its own."
    weights, = (home / "run" / "checkpoints" / "0000002").glob("ema_*.safetensors")
    net, _, config = load_model(weights)
    change(net, config)
    save_model(home / name, net, config)
    return name


def test_a_checkpoint_of_before(home):
    old = changed(home, "old.safetensors", lambda net, config: config.pop("content"))
    r = record(home, f"{old} --num-t 12 --device cpu")
    assert r["n"] < 20 and "before images were known by their content" in r["notes"][0]
    assert record(home, f"{old} --num-t 12 --device cpu --data {home / 'pics'}")["n"] == r["n"]


def test_one_image_or_two(home):
    for n in (1, 2):
        np.savez(home / f"{n}.npz", images=np.zeros((n, 16, 16), np.uint8))
        assert f"on {n} images" in ask(home, f"run --device cpu --num-t 12 --data {n}.npz")
    few = changed(home, "few.safetensors",
                  lambda net, config: config["run"]["data"].update(data=str(home / "2.npz")))
    said = ask(home, f"{few} --device cpu", 1)
    assert "2 images" in said and "to hold one out" in said and "/test" not in said
    np.savez(home / "one.npz", images=np.zeros((1, 16, 16), np.uint8))
    assert "at least 2 images" in ask(home, f"one.npz --data pics {LOOK} --image-size 16 --grey", 1)


def diverge(net, config):
    for p in net.parameters():
        p.data.fill_(float("nan"))


@pytest.mark.parametrize("what", ["--num-t 12 --device cpu", LOOK + " --samples 4 --steps 2"])
def test_a_model_that_diverged(home, what):
    said = ask(home, f"{changed(home, 'nan.safetensors', diverge)} {what} --out never.json", 1)
    assert "not finite" in said and "diverged" in said and not (home / "never.json").exists()
    assert len(said.splitlines()) < 4 and "bits/dim nan" not in said


EDGES = ["--n 0", "--n -3", "--chunk 0", "--chunk -1", "--num-t 0", "--num-t 5", "--seed -1",
         f"--seed {2**64}", "--samples 1", "--samples 1e9", "--steps=", "--steps ٥", "--steps 5²",
         "--steps 21", "--steps 1", "--steps ddim999999999999", "--eta nan", "--eta 2", "--eta 0.5",
         "--method ddim --eta nan", "--method euler", "--variance none", "--device meta",
         "--device nowhere", "--out=", "--cache=", "--features=", "--data=", "--against=",
         "--out nowhere/a.json", "--image-size 8", "--grey --image-size -1", "--infinite",
         "--fid --features digits", "--data digits", "--against drawn.png", "--against pics",
         "--data run/config.json", "--weights other"]


@pytest.mark.parametrize("edge", EDGES)
def test_options_at_their_edges(home, edge):
    device = "" if "--device" in edge else "--device cpu"
    said = ask(home, f"run {edge} {device}", 1)
    assert "decoder (t = 0)" not in said, said
    assert "--image-size" in edge or "leave --image-size" not in said, said      # nobody gave it


def test_more_steps_than_there_are_means_all(home):
    few, many = (record(home, f"run --device cpu {more}") for more in ("", "--num-t 99"))
    assert few["bits_per_dim"] == many["bits_per_dim"] and many["evaluated_t"] == 20


def test_samples_that_no_memory_holds(home):
    said = ask(home, f"run {LOOK} --samples 1000000000000", 1)
    assert "MB" in said and "free" in said


def test_memory_that_runs_out_is_one_sentence(home):
    full = mock.Mock(side_effect=RuntimeError("DefaultCPUAllocator: can't allocate memory"))
    with mock.patch.object(evaluate, "bound", full):
        assert "memory" in ask(home, "run --device cpu", 1)
    with mock.patch.object(sys.modules[__name__], "look", full):
        said = ask(home, f"run/samples_12x3.npz {LOOK}", 1)
        assert "memory" in said and "cannot look" not in said


def test_the_file_is_taken_before_the_work(home):
    with reserved([home / "mine.json"]), mock.patch.object(evaluate, "load",
                                                           side_effect=AssertionError):
        assert "another process" in ask(home, "run --device cpu --out mine.json", 1)
    (home / "old.json").write_text("{}")
    with mock.patch.object(evaluate, "load", side_effect=AssertionError):
        assert "taken" in ask(home, "run --device cpu --out old.json", 1)
    assert (home / "old.json").read_text() == "{}"


def test_killed_at_any_moment(home):
    "No file that looks whole is cut, and the same command works again and clears up."
    there = home / "killed"
    there.mkdir()
    (there / ".out.json.1-0123abcd.part").write_text("left by a killed process")
    line, k = "../run --num-t 12 --device cpu --out out.json", 0
    while crash_at(k, lambda: typed(iddpm_eval, line, there)):
        if (there / "out.json").exists(): json.loads((there / "out.json").read_text())
        (there / "out.json").unlink(missing_ok=True)
        k += 1
    assert k > 0 and [p.name for p in there.iterdir()] == ["out.json"]


def test_features_that_are_kept(home):
    cache = home / "kept"
    cache.mkdir()
    (cache / ".half.safetensors.1-0123abcd.part").write_bytes(b"cut")
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(256, 5))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(net).save(home / "net.pt")
    line = f"run/samples_12x3.npz --fid --features net.pt --device cpu --cache {cache}"
    first = record(home, line)
    kept, = cache.iterdir()
    assert kept.name.endswith(".safetensors")
    kept.write_bytes(kept.read_bytes()[:100])
    assert record(home, line)["figures"] == first["figures"]


class Gone:
    "A reader that has left."
    encoding = "utf-8"
    def write(self, text=""): raise BrokenPipeError(32, "Broken pipe")
    flush = write


def test_figures_are_written_before_they_are_printed(home):
    (home / "figures.json").unlink(missing_ok=True)
    args = f"{home}/run --num-t 12 --device cpu --out {home}/figures.json".split()
    with mock.patch.object(sys, "stdout", Gone()):
        iddpm_eval(args)
    assert json.loads((home / "figures.json").read_text())["bits_per_dim"] > 0


class Full(Gone):
    "A disk without room."
    def write(self, text=""): raise OSError(28, "No space left on device")
    flush = write


def status_of(command, *args):
    with mock.patch.object(sys, "stdout", Full()), contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            command([str(a) for a in args])
        except SystemExit as e:
            return e.code, err.getvalue()
    return 0, err.getvalue()


def test_figures_that_are_lost_are_a_failure(home, tmp_path):
    line = home / "run", "--num-t", 12, "--device", "cpu"
    status, said = status_of(iddpm_eval, *line)
    assert status == 1 and "iddpm_eval: its result is words" in said and "No space left" in said
    status, said = status_of(iddpm_eval, *line, "--out", tmp_path / "kept.json")
    assert status == 0 and "its result" not in said and (tmp_path / "kept.json").exists()
    status, said = status_of(iddpm_tables, *ROW.split(), "--plan", "--out", tmp_path)
    assert status == 1 and "iddpm_tables: its result is words" in said


def test_the_other_model_is_looked_at_before_the_measurement(home):
    small = RUN.replace("16 --attn-resolutions 8", "8 --attn-resolutions 4")
    for line in f"--out eight {small}", f"--class-cond --out cond {RUN}":
        ask(home, f"--data pics {line}", command=iddpm_train)
    np.savez(home / "bare.npz", images=np.zeros((20, 16, 16), np.uint8))
    with mock.patch.object(Model, "bits_per_dim", side_effect=AssertionError("measured")):
        said = ask(home, "run --device cpu --against nope", 1)
        assert "there is no checkpoint" in said and "nope" in said
        said = ask(home, "run --device cpu --against eight", 1)
        assert "eight cannot be compared with run" in said and "(1, 8, 8)" in said
        said = ask(home, "run --device cpu --against cond --data bare.npz", 1)
        assert "--against cond: this model has 2 classes, but" in said
    r = record(home, "run --num-t 12 --device cpu --against cond")
    assert r["against"]["model"] == "cond" and r["n"] < 20


def test_figures_that_cannot_be_written_are_printed(home):
    with mock.patch.object(evaluate, "write", side_effect=OSError(28, "No space left on device")):
        said = ask(home, "run --num-t 12 --device cpu --out full.json", 1)
    assert "bits/dim" in said and "No space left" in said and not (home / "full.json").exists()


def test_names_are_shown(home):
    bad = home / "pi\x1b[2Jcs\n"
    bad.mkdir()
    for p in sorted((home / "pics" / "a").iterdir())[:3]:
        shutil.copy(p, bad)
    args = [str(home / "run"), "--num-t", "12", "--device", "cpu", "--data", str(bad)]
    with mock.patch("builtins.print") as printed, mock.patch.object(evaluate, "say") as said:
        iddpm_eval(args)
    text = " ".join(str(c.args) for c in printed.mock_calls) + said.mock_calls[0].args[0]
    assert "\x1b" not in text and "\\x1b[2Jcs\\n" in text


def test_labels_of_other_sets():
    model = mock.Mock(config={"classes": ()}, **{"net.num_classes": 3})
    model.net.parameters = lambda: iter([torch.zeros(1)])
    images = torch.zeros(3, 1, 8, 8, dtype=torch.uint8)
    four = features.Images(images, torch.tensor([0, 1, 3]), tuple("0123"), "four")
    with pytest.raises(ValueError, match="the labels of four run to 3"):
        evaluate.labels_of(model, four, 3)
    model.config["classes"] = ("dog", "cat", "cow")
    two = features.Images(images, torch.tensor([0, 1, 1]), ("cat", "dog"), "two")
    assert evaluate.labels_of(model, two, 3)["y"].tolist() == [1, 0, 0]  # no cow: nothing is amiss


ROW = "digits --rows cosine-120-hybrid --seeds 0 --device cpu"


@pytest.mark.parametrize("text", ["", "[1, 2]", '{"row":', "[" * 100_000, "\udce9",
                                  '{"seconds": 3}', '{"bits": 7, "seconds": {}, "measured": {}}'])
def test_a_damaged_record_is_named(tmp_path, text):
    path = tmp_path / "results" / "tables" / "digits" / "cosine-120-hybrid-0.json"
    path.parent.mkdir(parents=True)
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    said = ask(tmp_path, ROW, 1, iddpm_tables)
    assert "cosine-120-hybrid-0.json" in said and len(said) < 2000
    assert path.read_bytes() == text.encode("utf-8", "surrogateescape")


@pytest.mark.parametrize("name", ["config.json", "notes.txt"])
def test_a_folder_that_is_no_run(tmp_path, name):
    folder = tmp_path / "runs" / "tables" / "digits" / "cosine-120-hybrid-0"
    folder.mkdir(parents=True)
    (folder / name).write_text("[1]")
    said = ask(tmp_path, ROW, 1, iddpm_tables)
    assert "cosine-120-hybrid-0" in said and "--resume" not in said
    assert (folder / name).read_text() == "[1]"


def test_a_line_that_was_trained_on_other_images(tmp_path):
    model = mock.Mock(config={"content": "of others"})
    with mock.patch.multiple(tables, trained=mock.Mock(return_value=model),
                             get_features=mock.DEFAULT):
        said = ask(tmp_path, ROW, 1, iddpm_tables)
    assert "other images than digits" in said and "cosine-120-hybrid-0" in said


@pytest.mark.parametrize("edge", ["--seeds ٣", "--seeds=", "--seeds 4294967296", "--seeds 1,,2",
                                  "--rows=", "--rows all,all", "--studies=", "--runs=", "--out=",
                                  "--root=", "--device meta", "--data pics", "--data=",
                                  "--compile graphs", "--compile="])
def test_options_of_the_tables(tmp_path, edge):
    device = "" if "--device" in edge else "--device cpu"
    ask(tmp_path, f"digits {edge} {device}", 1, iddpm_tables)
    assert not list(tmp_path.iterdir())


def test_tables_go_on_without_a_reader(tmp_path):
    args = f"{ROW} --plan --runs {tmp_path} --out {tmp_path}".split()
    with mock.patch.object(sys, "stdout", Gone()):
        iddpm_tables(args)
