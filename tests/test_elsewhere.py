"""Windows and macOS, as far as Linux can play them: what only Linux has is taken away, and the
commands run.

Not run: the real systems. What is taken away here is what this library was once seen to need.
"""
import subprocess
import sys

import numpy as np
from conftest import TINY, clean_env
from PIL import Image

ELSEWHERE = '''
import builtins, io, multiprocessing, os, signal, sys
import psutil                                        # asks other systems in other ways

def take_away():
    for name in ("sysconf", "sched_getaffinity", "getloadavg"):
        if hasattr(os, name): delattr(os, name)
    for name in ("SIGHUP", "SIGUSR1", "SIGUSR2"):
        if hasattr(signal, name): delattr(signal, name)
    is_there = open
    def not_here(file, *args, **more):
        if str(file).startswith(("/proc", "/sys")): raise FileNotFoundError(2, "no such file", file)
        return is_there(file, *args, **more)
    builtins.open = io.open = not_here
    psutil.virtual_memory = lambda: type("Memory", (), {"available": 2**31, "total": 2**32})
    from iddpm_nb.training import files
    files.fcntl = None

if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")        # no fork
    take_away()
    from iddpm_nb.cli.sample import iddpm_sample
    from iddpm_nb.cli.train import iddpm_train
    from iddpm_nb.cli.evaluate import iddpm_eval
    for command, words in COMMANDS:
        {"train": iddpm_train, "sample": iddpm_sample, "eval": iddpm_eval}[command](words.split())
    print("all done")
'''


def elsewhere(folder, *commands):
    program = folder / "elsewhere.py"
    program.write_text(ELSEWHERE.replace("COMMANDS", repr([c.split(" ", 1) for c in commands])))
    p = subprocess.run([sys.executable, program], cwd=folder,
                       env=clean_env(PYTHONPATH=":".join(sys.path)), capture_output=True, text=True,
                       timeout=300)
    assert p.returncode == 0 and "all done" in p.stdout, p.stdout + p.stderr
    return p.stdout


def test_the_digits_where_nothing_of_linux_is_there(tmp_path):
    tiny = " ".join(TINY)
    said = elsewhere(tmp_path, f"train --steps 4 --save-every 2 {tiny}",
                     "train --resume auto --steps 6 --device cpu", "sample runs/digits --n 3 "
                     "--steps 5 --device cpu", "eval runs/digits --n 4 --device cpu")
    assert "3 images in" in said and "bits/dim" in said


def test_workers_that_are_not_forked_give_the_same_bits(tmp_path):
    import safetensors.torch
    rng = np.random.default_rng(0)
    (tmp_path / "pictures").mkdir()
    for i in range(12):
        Image.fromarray(rng.integers(0, 256, (8, 8, 3),
                                     dtype=np.uint8)).save(tmp_path / "pictures" / f"{i}.png")
    tiny = " ".join(TINY) + " --data pictures --image-size 8 --on-disk True --batch 4 --steps 4"
    elsewhere(tmp_path, f"train {tiny} --workers 0 --out none",
              f"train {tiny} --workers 2 --out two")
    file = "checkpoints/0000004/model.safetensors"
    none, two = (safetensors.torch.load_file(tmp_path / run / file) for run in ("none", "two"))
    assert none.keys() == two.keys() and all(none[k].equal(two[k]) for k in none)
