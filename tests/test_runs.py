"""A run keeps what it has: one process a folder, saved first, ended by nothing that only shows."""
import dataclasses
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
import types
import warnings
from unittest.mock import patch

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import ROOT, clean_env
from PIL import Image
from iddpm_nb.train import EMA
from iddpm_nb.images.folders import open_images
from iddpm_nb.training import loading
from iddpm_nb.training.files import checksum
from iddpm_nb.training.checkpoint import best, checkpoints, read_header
from iddpm_nb.training.config import Config, DataConfig, DiffusionConfig, ModelConfig, TrainConfig
from iddpm_nb.training.log import read_log
from iddpm_nb.running import run as runs, underway
from iddpm_nb.running.folder import new_folder
from iddpm_nb.running.run import train_run
from iddpm_nb.cli.train import iddpm_train
from iddpm_nb.cli.evaluate import EvalOptions, Subject, image_sets

OPTIONS = ("--channels 8 --groups 4 --num-heads 2 --mult 1 --attn-resolutions "
           "--T 20 --warmup 0 --batch 4 --device cpu").split()
NO_MEMORY = RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate "
                         "memory: you tried to allocate 8000000000000 bytes.")


def tiny(data="digits", classes=False, **train):
    train = dict(steps=6, batch=4, warmup=0, save_every=2, log_every=1, keep=9) | train
    return Config(DataConfig(str(data), class_cond=classes),
                  ModelConfig(channels=8, groups=4, num_heads=2, mult=(1,), attn_resolutions=()),
                  DiffusionConfig(T=20), TrainConfig(**train))


@pytest.fixture(autouse=True)
def undrawn(monkeypatch):
    "Drawing curves would take most of the time."
    monkeypatch.setattr(underway, "curve", lambda folder: None)


def go(c, out=None, **how):
    "Train, and what was said on the way."
    said = []
    train_run(c, out=out, device="cpu", progress=False, say=said.append, **{"judged": False} | how)
    return "\n".join(said)


def pictures(folder, n=20, size=8, seed=0, classes=("cat", "dog")):
    "A folder of images in classes."
    g = np.random.default_rng(seed)
    for i in range(n):
        path = folder / classes[i % len(classes)] / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(g.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(path)
    return folder


def files(folder):
    return {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def refused(*args, error=(ValueError, OSError), **how):
    with pytest.raises(error) as e:
        go(*args, **how)
    assert "\n" not in str(e.value)
    return str(e.value)


# One process a folder

def make_one(folder):
    os.chdir(folder)
    return str(new_folder("digits"))


def test_new_folders_are_nobody_elses(tmp_path):
    with multiprocessing.get_context("fork").Pool(8) as pool:
        made = pool.map(make_one, [tmp_path] * 80, chunksize=1)
    assert len(set(made)) == 80, "two processes were given one folder"


def start(*args, folder, **how):
    env = clean_env(PYTHONPATH=str(ROOT)) | how.pop("env", {})
    code = "import sys; from iddpm_nb.cli.train import iddpm_train; iddpm_train(sys.argv[1:])"
    how = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) | how
    line = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.Popen(line, cwd=folder, env=env, **how)


def until(what, process, limit=120):
    end = time.time() + limit
    while not what() and process.poll() is None and time.time() < end:
        time.sleep(0.01)
    assert what(), f"it did not come so far\n{process.stdout and process.stdout.read()}"


def saved(folder): return [int(p.name) for p in checkpoints(folder / "checkpoints")]


def test_one_process_a_run(tmp_path, capsys):
    "Of two one gets the folder; nobody else may continue it; once it is killed anybody may."
    data, home = pictures(tmp_path / "data"), tmp_path / "run"
    line = ["--out", home, "--data", data, "--on-disk", "True", "--workers", "2",
            "--save-every", "2", *OPTIONS]
    both = [start(*line, "--steps", "100000", folder=tmp_path) for _ in range(2)]
    try:
        until(lambda: any(p.poll() is not None for p in both), both[0])
        loser, winner = sorted(both, key=lambda p: p.poll() is None)
        said = loser.communicate()[0]
        assert loser.returncode == 1 and "Traceback" not in said, said
        assert "another process is training in" in said or "is taken" in said, said
        until(lambda: len(saved(home)) > 1, winner)
        for other in (["--resume", home], ["--resume", "auto", "--out", home], ["--out", home]):
            with pytest.raises(SystemExit):
                iddpm_train([*map(str, other), "--device", "cpu"])
            said = capsys.readouterr().err
            assert "another process is training in" in said or "is taken" in said, said
        assert winner.poll() is None
        winner.send_signal(signal.SIGKILL)        # its workers live on for some seconds
        winner.wait()
        more = str(saved(home)[-1] + 2)
        iddpm_train(["--resume", str(home), "--steps", more, "--device", "cpu"])
    finally:
        for p in both:
            p.kill()
    rows = [(r["step"], "loss" in r) for r in read_log(home)]
    assert len(rows) == len(set(rows)), "two processes have written one log"


# Signals

@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"])
def test_what_asks_to_stop_saves_first(name, tmp_path, heard):
    number, update = getattr(signal, name), EMA.update
    def asked(ema, net):
        if ema.step == 2: signal.raise_signal(number)
        if ema.step == 2 and name == "SIGHUP": signal.raise_signal(number)  # as terminals may
        update(ema, net)
    with patch.object(EMA, "update", asked):
        with pytest.raises(KeyboardInterrupt, match="at step 3"):
            go(tiny(), tmp_path / "a b")
    assert saved(tmp_path / "a b") == [2, 3]
    go(tiny(steps=4), resume_from=tmp_path / "a b")


def test_what_is_ignored_stays_ignored(tmp_path):
    "nohup."
    before, update = signal.signal(signal.SIGHUP, signal.SIG_IGN), EMA.update
    def asked(ema, net):
        signal.raise_signal(signal.SIGHUP)
        update(ema, net)
    try:
        with patch.object(EMA, "update", asked):
            go(tiny(steps=2), tmp_path / "run")
    finally:
        signal.signal(signal.SIGHUP, before)
    assert saved(tmp_path / "run") == [2]


def test_a_system_without_these_signals(tmp_path):
    some = {k: v for k, v in vars(signal).items() if k not in ("SIGHUP", "SIGUSR1")}
    less = types.SimpleNamespace(**some)
    with patch.object(loading, "signal", less):
        assert len(loading.stopping()) == 2
    assert len(loading.stopping()) == 4


def test_processes_that_read_ahead_leave_all_signals_to_the_run():
    before = {n: signal.getsignal(n) for n in loading.stopping()}
    try:
        with warnings.catch_warnings():
            loading.undisturbed(0)
        assert all(signal.getsignal(n) == signal.SIG_IGN for n in before)
    finally:
        [signal.signal(n, handler) for n, handler in before.items()]


# What only shows

def test_a_reader_that_has_gone_a_full_disk_for_words_and_no_plots(tmp_path):
    "`| head -1`, 2>/dev/full, an unknown backend, mathematics in the name: trained to the end."
    name = "cost_$5_$10 ü"
    pipe, end = os.pipe()
    with open("/dev/full", "w") as full:
        line = ["--out", name, "--steps", "4", "--save-every", "2", "--sample-every", "2", *OPTIONS]
        p = start(*line, folder=tmp_path, env={"MPLBACKEND": "nonsense", "TQDM_DISABLE": ""},
                  stdout=end, stderr=full)
        os.close(end)
        until(lambda: os.read(pipe, 1), p)
        os.close(pipe)
        p.wait(timeout=120)
    assert saved(tmp_path / name) == [2, 4] and (tmp_path / name / "result.json").exists()
    result = json.loads((tmp_path / name / "result.json").read_text())
    assert result["steps"] == 4 and result["held_out"]["n"] == 297
    assert (tmp_path / name / "samples.png").exists()


@pytest.mark.parametrize("where", ["held_out_loss", "grid_file", "curve", "judge"])
def test_memory_that_runs_out_beside_the_training(where, tmp_path):
    module = runs if where == "judge" else underway
    with patch.object(module, where, side_effect=NO_MEMORY):
        said = go(tiny(steps=4, sample_every=2), tmp_path / "run", judged=where == "judge")
    assert "memory ran out" in said and saved(tmp_path / "run") == [2, 4]
    assert json.loads((tmp_path / "run" / "result.json").read_text())["steps"] == 4


def test_memory_that_runs_out_in_a_step_names_the_cure(tmp_path):
    def short(ema, net):
        if ema.step == 2: raise NO_MEMORY
        ema.step += 1
    with patch.object(EMA, "update", short), pytest.raises(MemoryError) as e:
        go(tiny(), tmp_path / "a b")
    for words in "--micro", f"--resume '{tmp_path}/a b'", "0000002":
        assert words in str(e.value)


# Saved first

def test_a_checkpoint_is_on_the_disk_before_it_is_measured(tmp_path):
    measure, at = underway.held_out_loss, []
    def seen(*args):
        at.append(saved(tmp_path / "run")[-1])
        return measure(*args)
    with patch.object(underway, "held_out_loss", seen):
        go(tiny(), tmp_path / "run")
    assert at == [2, 4, 6]


class Killed(BaseException): "The process ends here."


def test_killed_between_saving_and_measuring(tmp_path):
    go(tiny(), tmp_path / "whole")
    measure = underway.held_out_loss
    def dying(*args):
        if saved(tmp_path / "run")[-1] == 4: raise Killed
        return measure(*args)
    with patch.object(underway, "held_out_loss", dying):
        with pytest.raises(Killed):
            go(tiny(), tmp_path / "run")
    go(tiny(), resume_from=tmp_path / "run")
    def measured(k):
        rows = read_log(tmp_path / k)
        return [(r["step"], r["held_out"]) for r in rows if "held_out" in r]
    assert measured("run") == measured("whole") and [s for s, _ in measured("run")] == [2, 4, 6]
    assert best(tmp_path / "run" / "checkpoints") == best(tmp_path / "whole" / "checkpoints")


def test_held_out_images_are_measured_in_portions(tmp_path):
    asked = []
    class Counting(torch.nn.Module):
        def forward(self, x, t):
            asked.append(len(x))
            return torch.cat([x, x], 1)
    from iddpm_nb.running.model import Model
    from iddpm_nb.data import Images, digits
    from iddpm_nb.schedule import make_schedule
    model = Model(Counting(), make_schedule("cosine", 20), {"network": {}, "shape": [1, 8, 8]})
    held, c = Images(digits("test").images[:50]), tiny(precision="float32")
    with patch.object(underway, "images_at_a_time", lambda *a: 16):
        parts = underway.held_out_loss(model, c, held)
    assert asked == [16, 16, 16, 2]
    assert abs(parts - underway.held_out_loss(model, c, held, 50)) < 1e-6 * parts


# Nothing is lost by going on

@pytest.fixture
def six(tmp_path):
    go(tiny(), tmp_path / "run")
    return tmp_path / "run"


def test_checkpoints_that_are_not_there(six, tmp_path):
    (six / "checkpoints").rename(tmp_path / "elsewhere")
    before = files(six)
    for how in dict(resume_from=six), dict(resume_from=six, new_data=True):
        assert "was the folder moved, or is its disk not mounted?" in refused(tiny(steps=8), **how)
        assert files(six) == before, "something was lost"
    (six / "checkpoints").mkdir()                  # where a disk is not mounted is an empty folder
    assert "is its disk not mounted?" in refused(tiny(steps=8), resume_from=six)
    (six / "checkpoints").rmdir()
    (tmp_path / "elsewhere").rename(six / "checkpoints")
    go(tiny(steps=8), resume_from=six)
    assert saved(six)[-1] == 8


def test_a_run_that_never_saved_begins_anew(tmp_path):
    def dies(*args): raise Killed
    with patch.object(underway, "save_checkpoint", dies):
        with pytest.raises(Killed):
            go(tiny(), tmp_path / "run")
    assert len(read_log(tmp_path / "run")) == 2 and not saved(tmp_path / "run")
    go(tiny(), resume_from=tmp_path / "run")
    assert saved(tmp_path / "run") == [2, 4, 6]


def test_a_run_without_held_out_images_knows_that_it_has_saved(tmp_path, heard):
    few = pictures(tmp_path / "few", 6)
    update = EMA.update
    def stop(ema, net):
        if ema.step == 0: signal.raise_signal(signal.SIGINT)
        update(ema, net)
    with patch.object(EMA, "update", stop):
        with pytest.raises(KeyboardInterrupt):
            go(tiny(few, log_every=100), tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    assert "is its disk not mounted?" in refused(tiny(few), resume_from=tmp_path / "run")


def test_the_commit_is_read_before_the_training(tmp_path):
    "Of the source that trains, not of what it has become meanwhile."
    order, begins = [], runs.follow
    def known(device, machine=runs.machine):
        order.append("commit")
        return machine(device)
    def follows(*args):
        order.append("training")
        return begins(*args)
    with patch.object(runs, "machine", known), patch.object(runs, "follow", follows):
        go(tiny(steps=2), tmp_path / "run")
    assert order == ["commit", "training"]


def test_a_configuration_that_cannot_be_read(six):
    for text in ("{", "[]", "[" * 100_000):
        (six / "config.json").write_text(text)
        assert str(six / "config.json") in refused(tiny(steps=8), resume_from=six)
    assert saved(six) == [2, 4, 6]


def test_devices_that_are_none():
    for name in ("meta", "abacus", "cuda:99", "cpu:x"):
        with pytest.raises(ValueError, match="there is no device"):
            runs.pick_device(name)


# Several processes

def test_processes_that_do_not_belong_together(tmp_path):
    "Both say what differs, at the start; one without memory does not leave the other waiting."
    import socket
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    team = dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
                PYTHONPATH=f"{ROOT}{os.pathsep}{ROOT / 'tests'}")
    line = [sys.executable, ROOT / "tests" / "two_ranks.py", tmp_path]
    ranks = [subprocess.Popen(line, env=clean_env(**team, RANK=str(r)), stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, text=True) for r in (0, 1)]
    try:
        told = [p.communicate(timeout=240)[0] for p in ranks]
    finally:
        [p.kill() for p in ranks]
    assert all(p.returncode == 0 for p in ranks), "\n".join(told)
    heard = [json.loads((tmp_path / f"heard{r}.json").read_text()) for r in (0, 1)]
    for a, b in zip(*(h.values() for h in heard)):
        print(a, "|", b)
    for name in ("loss", "dropout", "sampler", "precision", "save_every", "sample_every"):
        assert all(f"process 1 has {name} = " in h[name] for h in heard), name
        assert all("start all with the same options" in h[name] for h in heard)
    for h in heard:
        assert "process 1 has content of the data = " in h["images"]
        assert "nowhere" in h["no data"] and "nowhere" in h["no folder"]
        assert "is taken" in h["taken"]
        assert "process 1 has resume = False, and the first has True" in h["resume"]
        assert "process 1 has the step to go on from = 2, and the first has 4" in h["step"]
    assert "process 1: " in heard[0]["command"] and "nowhere holds no run" in heard[0]["command"]
    assert "4 steps; training took" in heard[0]["right"] and heard[1]["right"] == ""
    assert "memory ran out" in heard[0]["memory"] and "6 steps; training took" in heard[0]["memory"]
    for name in "loss", "save_every", "images", "none", "new", "nowhere":
        assert not (tmp_path / name).exists()
    assert saved(tmp_path / "run") == [2, 4, 6]


# The data

def small(data, **train):
    return tiny(data, classes=True, **train)


@pytest.fixture
def of_pictures(tmp_path):
    data = pictures(tmp_path / "data")
    go(small(data), tmp_path / "run")
    return data, tmp_path / "run"


def images(data, split): return open_images(data, split, *runs.reading(small(data)))


def changes(run): return [c["what"] for c in runs.read_config(run).get("changes", [])]


def test_data_that_moved_are_found_by_their_content(of_pictures, tmp_path):
    data, run = of_pictures
    moved = tmp_path / "elsewhere" / "pictures"
    moved.parent.mkdir()
    data.rename(moved)
    assert "name its new place with --data" in refused(small(data, steps=8), resume_from=run)
    iddpm_train(["--resume", str(run), "--data", str(moved), "--steps", "8", "--device", "cpu"])
    assert saved(run)[-1] == 8 and changes(run) == [f"the data are in {moved}, they were in {data}"]
    go(small(moved, steps=10), resume_from=run)
    assert len(changes(run)) == 1, "noted again"


@pytest.mark.parametrize("how", ["other pixels", "one more", "one less", "held out",
                                 "renamed class", "exchanged labels"])
def test_other_data_are_refused_or_noted(how, of_pictures):
    data, run = of_pictures
    held, before = images(data, "test"), files(run)
    def is_held(p): return (held.images == torch.from_numpy(pixels(p))).flatten(1).all(1).any()
    def pixels(p): return np.array(Image.open(p)).transpose(2, 0, 1)
    def save(p, value): Image.fromarray(np.full((8, 8, 3), value, np.uint8)).save(p)
    one = next(p for p in sorted(data.rglob("*.png")) if not is_held(p))
    test = next(p for p in sorted(data.rglob("*.png")) if is_held(p))
    if how == "other pixels": save(one, 0)
    if how == "one more": save(one.with_name("new.png"), 1)
    if how == "one less": one.unlink()
    if how == "held out":                      # and what is learned from is as it was
        learned = images(data, "train").images
        for value in range(256):
            save(test, value)
            if images(data, "train").images.equal(learned): break
    if how == "renamed class": (data / "cat").rename(data / "bird")
    for a, b in (("cat", "x"), ("dog", "cat"), ("x", "dog")) if how == "exchanged labels" else ():
        (data / a).rename(data / b)
    assert "--new-data" in refused(small(data, steps=8), resume_from=run)
    assert files(run) == before, "something was written although it was refused"
    go(small(data, steps=8), resume_from=run, new_data=True)
    assert saved(run)[-1] == 8 and len(changes(run)) == 1
    go(small(data, steps=10), resume_from=run)
    assert saved(run)[-1] == 10 and len(changes(run)) == 1


def test_another_number_of_classes(of_pictures):
    data, run = of_pictures
    before = files(run)
    pictures(data, 1, classes=("bird",))
    for how in {}, {"new_data": True}:
        said = refused(small(data, steps=8), resume_from=run, **how)
        assert "the classes were cat, dog, and are bird, cat, dog now" in said, said
        assert "not with --new-data either" in said and files(run) == before


def as_by_an_older_version(run):
    "Its checkpoints do not know their images by their content."
    for folder in checkpoints(run / "checkpoints"):
        for p in folder.glob("*.safetensors"):
            about = read_header(p)[1]
            del about["content"]
            tensors = safetensors.torch.load_file(p)
            safetensors.torch.save_file(tensors, p, {"iddpm_nb": json.dumps(about)})
        sums = {p.name: checksum(p) for p in folder.iterdir() if p.name != "checksums.json"}
        (folder / "checksums.json").write_text(json.dumps(sums))


def test_what_an_older_version_may_have_learned_is_told_from_then_on(of_pictures, tmp_path):
    data, run = of_pictures
    as_by_an_older_version(run)
    words = "some of those held out now may have been trained on"
    said = go(small(data, steps=8), resume_from=run, new_data=True)
    assert said.count(words) == 1 and "up to step 6" in said
    assert words in changes(run)[0] and len(changes(run)) == 1
    assert words in go(small(data, steps=10), resume_from=run), "it is told once, and forgotten"
    latest = checkpoints(run / "checkpoints")[-1] / "ema_0.995.safetensors"
    def told(**how):
        return image_sets(EvalOptions("", **how), Subject(latest, None, about), False)[2]
    about = read_header(latest)[1]
    assert [words in note for note in told()] == [True]
    shutil.copytree(data, tmp_path / "copy")
    assert [words in note for note in told(data=str(tmp_path / "copy"))] == [True]


def test_a_file_that_breaks_during_a_long_run(tmp_path):
    "It is named, the run says how to go on without it, and does."
    data, update = pictures(tmp_path / "data"), EMA.update
    c = small(data)
    c = dataclasses.replace(c, data=dataclasses.replace(c.data, on_disk=True, workers=0))
    broken = sorted(data.rglob("*.png"))[3]
    def breaks(ema, net):
        if ema.step == 2: [p.write_bytes(b"broken") for p in data.rglob("*.png")]
        update(ema, net)
    whole = {p: p.read_bytes() for p in data.rglob("*.png")}
    with patch.object(EMA, "update", breaks):
        said = refused(c, tmp_path / "run")
    for words in "--skip-broken", "--new-data", "0000002", f"--resume {tmp_path / 'run'}":
        assert words in said, said
    for p, was in whole.items():
        p.write_bytes(b"broken" if p == broken else was)
    assert broken.name in refused(c, resume_from=tmp_path / "run")
    without = dataclasses.replace(c, data=dataclasses.replace(c.data, skip_broken=True))
    go(without, resume_from=tmp_path / "run", new_data=True)
    assert saved(tmp_path / "run")[-1] == 6 and len(changes(tmp_path / "run")) == 1
    assert json.loads((tmp_path / "run" / "config.json").read_text())["data"]["skip_broken"]


def test_a_configuration_that_was_edited(six, capsys):
    path = six / "config.json"
    text, before = path.read_text(), files(six)
    go_on = ["--resume", str(six), "--steps", "8", "--device", "cpu"]
    edited = [("batch", "4", "8"), ("T", "20", "30"), ("lr", "0.002", "0.5"), ("seed", "0", "1")]
    for k, v, other in edited:
        assert f'"{k}": {v}' in text
        path.write_text(text.replace(f'"{k}": {v}', f'"{k}": {other}'))
        with pytest.raises(SystemExit):
            iddpm_train(go_on)
        assert f"config.json says {k} = {other}" in capsys.readouterr().err
    said = json.loads(text)
    others = [("diffusion", "loss", "simple"), ("data", "grey", True), ("data", "image_size", 16),
              ("data", "upsample_from", 4), ("train", "ema", [0.5]), ("model", "mult", [1, 2])]
    for part, k, other in others:      # not by advice for new runs, nor by what the weights are
        path.write_text(json.dumps(said | {part: said[part] | {k: other}}))
        for more in [], ["--variance", "beta"], ["--loss", "hybrid"]:
            with pytest.raises(SystemExit):
                iddpm_train([*go_on, *more])
            assert f"config.json says {k} = " in capsys.readouterr().err
    path.write_text(text)
    assert files(six) == before
    iddpm_train([*go_on, "--keep", "3"])                           # what is free to change
    assert json.loads(path.read_text())["train"]["keep"] == 3
