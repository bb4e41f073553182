"""A run that is killed, at any moment, and resumed ends with the same bits as one that was left alone."""
import random
import signal
import subprocess
import sys
import time

import safetensors.torch
from conftest import TINY, clean_env

STEPS = ["--steps", "120", "--save-every", "10", "--loss", "vlb", "--sampler", "importance", "--dropout", "0.1"]


def weights(folder):
    return {name: safetensors.torch.load_file(folder / "checkpoints" / "0000120" / f"{name}.safetensors") for name in ("model", "ema_0.995")}


def test_killed_and_resumed(site, tmp_path):
    start = [sys.executable, str(site / "bin" / "iddpm_train")]
    env, choose = clean_env(PYTHONPATH=str(site)), random.Random(0)
    subprocess.run([*start, "--out", "whole", *STEPS, *TINY], cwd=tmp_path, env=env, check=True, capture_output=True)

    killed, saved = 0, tmp_path / "killed" / "checkpoints"
    process = subprocess.Popen([*start, "--out", "killed", *STEPS, *TINY], cwd=tmp_path, env=env, stdout=subprocess.DEVNULL)
    while killed < 4:
        have = lambda: len(list(saved.glob("*/checksums.json"))) and max(int(p.parent.name) for p in saved.glob("[0-9]*/checksums.json"))
        before, limit = have(), time.time() + 120
        while have() <= before and process.poll() is None and time.time() < limit: time.sleep(0.01)
        time.sleep(choose.uniform(0, 0.3))
        assert process.poll() is None, "the run ended before it could be killed: make it longer"
        process.send_signal(signal.SIGKILL); process.wait(); killed += 1
        process = subprocess.Popen([*start, "--resume", "killed", "--device", "cpu"], cwd=tmp_path, env=env, stdout=subprocess.DEVNULL)
    assert process.wait(timeout=300) == 0

    for name, whole in weights(tmp_path / "whole").items():
        other = weights(tmp_path / "killed")[name]
        assert all(whole[k].equal(other[k]) for k in whole), f"{name}: the weights differ after resuming"
