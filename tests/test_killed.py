"""A run that is killed, mostly while it saves, ends with the bits of one that was left alone."""
import json
import random
import resource
import shlex
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import safetensors.torch
from conftest import TINY, clean_env
from PIL import Image
from iddpm_nb.running import underway
from iddpm_nb.cli.train import iddpm_train

KILLS, STEPS = 4, 160
SMALL = ("--channels 8 --groups 4 --num-heads 2 --mult 1 --attn-resolutions --T 20 --batch 8 "
         "--warmup 2 --log-every 5 --save-every 5 --threads 1 --device cpu "
         f"--steps {STEPS}").split()
VARIANTS = {
    "importance and L_vlb": "--loss vlb --sampler importance --dropout 0.1 --ema-plain 0.9",
    "classes, some dropped, in portions": "--class-cond --label-drop 0.3 --micro 3",
    "an upsampler with noise": "--upsample-from 4 --noise-augment 0.1 --schedule linear --T 30",
    "from the disk, by workers": "--data pictures --on-disk True --workers 2 --flip",
}
START = """
import sys
from iddpm_nb.running import underway
from iddpm_nb.cli.train import iddpm_train
underway.curve = lambda folder: None         # most of the time would go into curves
iddpm_train(sys.argv[1:])
"""


def command(site, *args):
    return [sys.executable, str(site / "bin" / "iddpm_train"), *args]


def weights(folder, step):
    files = (folder / "checkpoints" / f"{step:07d}").glob("*.safetensors")
    return {p.name: safetensors.torch.load_file(p) for p in files}


def newest(folder): # step of the latest checkpoint, 0 if there is none
    whole = (folder / "checkpoints").glob("[0-9]*/checksums.json")
    return max([int(p.parent.name) for p in whole], default=0)


def until(what, process, limit=120):
    end = time.time() + limit
    while not what() and process.poll() is None and time.time() < end:
        time.sleep(0.001)
    return what()


def wait_for(process, folder, step, limit=120):
    came = until(lambda: newest(folder) >= step, process, limit)
    assert came, f"no checkpoint of step {step} within {limit} s"


def logged(folder): # all but the speed
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if k != "images_per_s"} for r in rows]


def kill(process, folder, choose):
    "Mostly in the middle of a save; otherwise at any moment, while it starts or resumes too."
    had, saving = newest(folder), lambda: any((folder / "checkpoints").glob(".*.part"))
    if choose.random() < 0.75:
        wait_for(process, folder, had + 5)
        until(saving, process, 10)
        time.sleep(choose.uniform(0, 0.02))
    else: time.sleep(choose.uniform(0, 6))
    assert process.poll() is None, "the run ended before it could be killed: make it longer"
    process.send_signal(signal.SIGKILL)
    process.wait()


@pytest.mark.parametrize("variant", VARIANTS)
def test_killed_and_resumed(variant, site, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(underway, "curve", lambda folder: None)
    for i in range(20 if "disk" in variant else 0):
        pixels = np.random.default_rng(i).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        (tmp_path / "pictures").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "pictures" / f"{i}.png")
    line, choose = [*SMALL, *VARIANTS[variant].split()], random.Random(variant)
    env = clean_env(PYTHONPATH=str(site))
    iddpm_train(["--out", "whole", *line])
    again = ["--out", "killed", "--resume", "auto", *line]      # as a scheduler repeats it
    start = [sys.executable, "-c", START, *again]

    killed, whole = tmp_path / "killed", tmp_path / "whole"
    with open(tmp_path / "log", "w") as log:
        for _ in range(KILLS):
            kill(subprocess.Popen(start, env=env, stdout=log, stderr=log), killed, choose)
    said = (tmp_path / "log").read_text()
    assert "iddpm_train:" not in said, said[-2000:]              # nothing was refused
    iddpm_train(again)

    ended, undisturbed = weights(killed, STEPS), weights(whole, STEPS)
    assert len(ended) >= 2 and set(ended) == set(undisturbed)
    for name, its in undisturbed.items():
        assert all(its[k].equal(ended[name][k]) for k in its), f"{name}: the weights differ"
    assert logged(killed) == logged(whole), "the log differs after resuming"
    assert not [*killed.rglob(".*.part")], "what killed processes have left is still there"


def test_sigterm_and_ctrl_c_save_and_say_how_to_go_on(site, tmp_path, heard):
    env = clean_env(PYTHONPATH=str(site))
    for name, number in ("a term", signal.SIGTERM), ("int", signal.SIGINT):
        line = command(site, "--out", name, "--steps", "100000", "--save-every", "10", *TINY)
        process = subprocess.Popen(line, cwd=tmp_path, env=env, stdout=subprocess.PIPE,
                                   stderr=subprocess.PIPE, text=True)
        try:
            wait_for(process, tmp_path / name, 10)
            process.send_signal(number)
            _, said = process.communicate(timeout=60)
        finally:
            process.kill()  # it would train for hours
        assert process.returncode == 130 and "Traceback" not in said, said
        assert f"stopped at step {newest(tmp_path / name)}" in said, said
        assert f"--resume {shlex.quote(str(tmp_path / name))}" in said, said


def test_a_full_disk_leaves_the_checkpoint_before(site, tmp_path):
    env = clean_env(PYTHONPATH=str(site))
    how, saves = dict(cwd=tmp_path, env=env, capture_output=True), tmp_path / "run" / "checkpoints"
    first = command(site, "--out", "run", "--steps", "10", *TINY)
    more = command(site, "--resume", "run", "--steps", "20", "--device", "cpu")
    subprocess.run(first, check=True, **how)
    def full(): # no file can grow: as on a full disk, writing fails in the middle
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    p = subprocess.run(more, text=True, preexec_fn=full, **how)
    assert p.returncode == 1 and "Traceback" not in p.stderr, p.stderr
    assert str(saves / "0000010") in p.stderr, p.stderr
    assert [x.name for x in sorted(saves.glob("*")) if x.is_dir()] == ["0000010"]
    subprocess.run(more, check=True, **how)
    assert newest(tmp_path / "run") == 20
