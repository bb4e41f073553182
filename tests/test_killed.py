"""A run that is killed, at any moment, and resumed ends with the same bits as one that was left alone; one that is asked to stop says how to go on."""
import random
import resource
import signal
import subprocess
import sys
import time

import safetensors.torch
from conftest import TINY, clean_env

KILLS = 20
STEPS = ["--steps", "400", "--save-every", "10", "--loss", "vlb", "--sampler", "importance", "--dropout", "0.1", "--ema-plain", "0.9"]


def command(site, *args):
    return [sys.executable, str(site / "bin" / "iddpm_train"), *args]


def weights(folder, step):
    return {p.name: safetensors.torch.load_file(p) for p in (folder / "checkpoints" / f"{step:07d}").glob("*.safetensors")}


def newest(folder): # step of the latest checkpoint, 0 if there is none
    return max([int(p.parent.name) for p in (folder / "checkpoints").glob("[0-9]*/checksums.json")], default=0)


def wait_for(process, folder, step, limit=120):
    end = time.time() + limit
    while newest(folder) < step and process.poll() is None and time.time() < end: time.sleep(0.01)
    assert newest(folder) >= step, f"no checkpoint of step {step} within {limit} s"


def test_killed_twenty_times_and_resumed(site, tmp_path):
    env, choose = clean_env(PYTHONPATH=str(site)), random.Random(0)
    subprocess.run(command(site, "--out", "whole", *STEPS, *TINY), cwd=tmp_path, env=env, check=True, capture_output=True)
    again = command(site, "--out", "killed", "--resume", "auto", *STEPS, *TINY)           # the same command each time, as a scheduler repeats it

    killed, log = tmp_path / "killed", open(tmp_path / "log", "w")
    for _ in range(KILLS):
        process = subprocess.Popen(again, cwd=tmp_path, env=env, stdout=log, stderr=log)
        if choose.random() < 0.8: wait_for(process, killed, newest(killed) + 10)         # mostly some way on; otherwise while it starts or resumes
        time.sleep(choose.uniform(0, 0.3 if choose.random() < 0.8 else 3))
        assert process.poll() is None, f"the run ended before it could be killed: make it longer\n{(tmp_path / 'log').read_text()[-2000:]}"
        process.send_signal(signal.SIGKILL); process.wait()
    subprocess.run(again, cwd=tmp_path, env=env, check=True, stdout=log, stderr=log, timeout=300)

    ended, undisturbed = weights(killed, 400), weights(tmp_path / "whole", 400)
    assert set(ended) == {"model.safetensors", "ema_0.995.safetensors", "ema_0.9_plain.safetensors"} == set(undisturbed)
    for name, whole in undisturbed.items(): assert all(whole[k].equal(ended[name][k]) for k in whole), f"{name}: the weights differ after resuming"


def test_sigterm_and_ctrl_c_save_and_say_how_to_go_on(site, tmp_path):
    env = clean_env(PYTHONPATH=str(site))
    for name, number in ("term", signal.SIGTERM), ("int", signal.SIGINT):
        process = subprocess.Popen(command(site, "--out", name, "--steps", "100000", "--save-every", "10", "--keep", "1", *TINY), cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        wait_for(process, tmp_path / name, 10)
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
        stopped = newest(tmp_path / name)
        assert process.returncode == 130 and f"stopped at step {stopped}" in said and f"--resume {tmp_path / name}" in said and "Traceback" not in said, said


def test_a_full_disk_leaves_the_checkpoint_before(site, tmp_path):
    env = clean_env(PYTHONPATH=str(site))
    subprocess.run(command(site, "--out", "run", "--steps", "10", *TINY), cwd=tmp_path, env=env, check=True, capture_output=True)
    small = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))            # a file that cannot grow: as on a full disk, writing fails in the middle
    p = subprocess.run(command(site, "--resume", "run", "--steps", "20", "--device", "cpu"), cwd=tmp_path, env=env, capture_output=True, text=True, preexec_fn=small)
    assert p.returncode == 1 and "Traceback" not in p.stderr and str(tmp_path / "run" / "checkpoints" / "0000010") in p.stderr, p.stderr
    assert [x.name for x in sorted((tmp_path / "run" / "checkpoints").glob("*")) if x.is_dir()] == ["0000010"]
    subprocess.run(command(site, "--resume", "run", "--steps", "20", "--device", "cpu"), cwd=tmp_path, env=env, check=True, capture_output=True)
    assert newest(tmp_path / "run") == 20
