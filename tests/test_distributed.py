"""Several processes train, sample and measure as one does: through the library, and through the
commands under torchrun.
"""
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import TINY, clean_env

LIBRARY = '''
import sys, torch
from iddpm_nb.data import Batches, digits, to_float
from iddpm_nb.schedule import make_schedule
from iddpm_nb.importance import LossSecondMomentSampler
from iddpm_nb.unet import UNet
from iddpm_nb.train import start_training, train
from iddpm_nb.sampling import sample
from iddpm_nb.likelihood import bits_per_dim
from iddpm_nb.training.distributed import check_agreement, join, spread

def twenty_steps(team):
    s = make_schedule("cosine", 20)
    torch.manual_seed(0)
    net = UNet(1, 2, 16, (1, 1), 1, (4,), image_size=8, num_heads=2, num_classes=10)
    run = start_training(net, Batches(digits(), 24, 5, flip=True, share=(team.rank, team.size)),
                         LossSecondMomentSampler(20, 2), ema_rates=(0.9,), plain_rates=(0.99,),
                         team=team)
    run.ask = team.wrap(net)
    # 12 images a process: portions of 7 and 5
    lengths = [float(m["grad_norm"]) for m in train(run, s, 20, "vlb", lr=1e-3, micro=7)]
    check_agreement(run)
    model, g, d = (spread(run.emas[0].net, team), lambda: torch.Generator().manual_seed(1),
                   digits("test"))
    images = sample(model, s, (7, 1, 8, 8), 10, generator=g(), cond={"y": torch.arange(7)},
                    progress=False, chunk=5)
    bits = bits_per_dim(model, s, to_float(d.images[:5]), num_t=12, generator=g(),
                        cond={"y": d.labels[:5]})
    return {"gradient": torch.cat([p.grad.flatten() for p in net.parameters()]),
            "history": run.sampler.history[:-1], "probs": run.sampler.probs(),
            "lengths": torch.tensor(lengths), "images": images, "bits": bits.total}

if __name__ == "__main__":
    with join("cpu") as team:
        torch.save(twenty_steps(team), f"{sys.argv[1]}/{team.rank}.pt")
'''


def torchrun(site, *args, n=2, folder, wait=True, **kw):
    "A program started by torchrun, as a user starts it."
    env = clean_env(PYTHONPATH=str(site), PATH=f"{site / 'bin'}{os.pathsep}{os.environ['PATH']}")
    p = subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone",
                          f"--nproc_per_node={n}", *map(str, args)], cwd=folder, env=env,
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **kw)
    if not wait: return p
    said, _ = p.communicate(timeout=300)
    assert p.returncode == 0, said
    return said


def close(a, b, tol, what):
    gap = ((a - b).abs().max() / b.abs().max()).item()
    assert gap <= tol, f"{what}: {gap:.2g}"


def test_two_processes_take_the_steps_of_one(site, tmp_path):
    program = tmp_path / "twenty.py"
    program.write_text(LIBRARY)
    torchrun(site, program, tmp_path, folder=tmp_path)
    two = [torch.load(tmp_path / f"{r}.pt") for r in (0, 1)]

    spec = importlib.util.spec_from_file_location("twenty", program)
    spec.loader.exec_module(twenty := importlib.util.module_from_spec(spec))
    from iddpm_nb.train import Alone
    one = twenty.twenty_steps(Alone())

    assert one["probs"].max() > 2 / 20, "the sampler was still uniform: nothing was tested"
    for k in one:
        assert two[0][k].equal(two[1][k]), f"the processes disagree about the {k}"
    for k in ("gradient", "lengths"):
        close(two[0][k], one[k], 1e-5, k)
    assert ((two[0]["history"] / one["history"] - 1).abs() <= 1e-5).all()
    close(two[0]["images"], one["images"], 1e-4, "images")
    close(two[0]["bits"], one["bits"], 1e-5, "bits/dim")


STEPS = ["--steps", "80", "--save-every", "30", "--loss", "vlb", "--sampler", "importance",
         "--dropout", "0.1"]


def newest(folder): # step of the latest checkpoint, 0 if there is none
    return max([int(p.parent.name) for p in (folder / "checkpoints").glob("[0-9]*/checksums.json")],
               default=0)


def wait_for(process, what, limit=120):
    end = time.time() + limit
    while not what() and process.poll() is None and time.time() < end:
        time.sleep(0.01)
    assert process.poll() is None, f"ended before it could be stopped:\n{process.communicate()[0]}"
    assert what(), f"did not come so far within {limit} s"


def workers(process): # the processes that torchrun has started
    with open(f"/proc/{process.pid}/task/{process.pid}/children") as f:
        return [int(pid) for pid in f.read().split()]


# the steps of the lines about the training; a held-out loss has a line of its own
def logged(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().split("\n")[:-1]]
    return [r["step"] for r in rows if "loss" in r]


@pytest.fixture(scope="module")
def whole(site, tmp_path_factory):
    "A run of two processes that nobody disturbed."
    folder = tmp_path_factory.mktemp("whole")
    said = torchrun(site, "--no-python", "iddpm_train", "--out", "run", *STEPS, *TINY,
                    folder=folder)
    assert said.count("writing to") == 1 and said.count("held-out bits/dim") == 1, (
        f"more than one process speaks, or none:\n{said}")
    return folder / "run"


def test_torchrun_makes_one_run(whole):
    assert [p.name for p in whole.parent.iterdir()] == ["run"]
    assert logged(whole) == sorted(set(logged(whole))) and logged(whole)[-1] == 80
    result = json.loads((whole / "result.json").read_text())
    assert result["processes"] == 2 and result["steps"] == 80 and (whole / "samples.png").is_file()


def test_a_dead_process_and_a_sigterm_lose_nothing(site, whole, tmp_path):
    start = ["--no-python", "iddpm_train", "--out", "run", *STEPS, *TINY]
    go_on = ["--no-python", "iddpm_train", "--resume", "run", "--device", "cpu"]
    run = tmp_path / "run"

    p = torchrun(site, *start, folder=tmp_path, wait=False)
    wait_for(p, lambda: newest(run) >= 30)
    os.kill(workers(p)[-1], signal.SIGKILL)  # one process of the two; torchrun ends the other
    said, _ = p.communicate(timeout=120)
    assert p.returncode != 0 and "iddpm_train: process 0 has lost the others" in said, said

    before, begun = newest(run), lambda: (run / "config.json").stat().st_mtime_ns
    last = begun()
    p = torchrun(site, *go_on, folder=tmp_path, wait=False)
    # some steps on, and not from the log of the session before
    wait_for(p, lambda: begun() > last and logged(run)[-1:] > [before])
    p.send_signal(signal.SIGTERM)                                          # torchrun passes it on
    said, _ = p.communicate(timeout=120)
    stopped = newest(run)
    assert before < stopped < 80 and said.count(f"stopped at step {stopped}") == 1, said

    torchrun(site, *go_on, folder=tmp_path)
    for file in (whole / "checkpoints" / "0000080").glob("*.safetensors"):
        mine = safetensors.torch.load_file(run / "checkpoints" / "0000080" / file.name)
        its = safetensors.torch.load_file(file)
        assert all(its[k].equal(mine[k]) for k in its), (
            f"{file.name}: the weights differ after resuming")
    assert logged(run)[-1] == 80 and logged(run) == sorted(set(logged(run)))

    from iddpm_nb.cli.train import iddpm_train
    # and one process alone can go on
    iddpm_train(["--resume", str(run), "--steps", "85", "--device", "cpu"])
    result = json.loads((run / "result.json").read_text())
    assert (result["steps"], result["processes"]) == (85, 1)


def test_two_processes_sample_and_measure_as_one(site, whole):
    from iddpm_nb.data import digits, to_uint8
    from iddpm_nb.running.model import load
    both = whole.parent / "both.py"  # two commands in one start, which is slow
    both.write_text("from iddpm_nb.cli.sample import iddpm_sample\nfrom iddpm_nb.cli.evaluate "
                    "import iddpm_eval\niddpm_sample('run --n 5 --steps 10 --out five.png --device "
                    "cpu'.split())\niddpm_eval('run --n 7 --out bits.json --device cpu'.split())\n")
    said = torchrun(site, both, folder=whole.parent)
    assert said.count("5 images in") == 1 and said.count("written to") == 1, (
        f"more than one process speaks, or none:\n{said}")

    two = np.load(whole.parent / "five.npz")["images"].astype(int)
    one = to_uint8(load(whole).sample(5, 10)).permute(0, 2, 3, 1).numpy().astype(int)
    assert np.abs(two - one).max() <= 1 and two.std() > 10  # rounding may decide between two levels
    two = json.loads((whole.parent / "bits.json").read_text())
    assert two["n"] == 7 and abs(two["bits_per_dim"] - load(whole).bits_per_dim(
            digits("test").images[:7]).total.mean().item()) < 1e-4


def test_a_team_that_cannot_meet_says_so(monkeypatch):
    from iddpm_nb.training.distributed import join
    for k, v in {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "127.0.0.1",
                 "MASTER_PORT": "9"}.items():
        monkeypatch.setenv(k, v)
    with pytest.raises(OSError, match="process 1 of 2 found no way to the others at "
                       "127.0.0.1:9"), join("cpu", minutes=0.01):
        pass
