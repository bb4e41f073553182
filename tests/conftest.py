"""What a notebook cannot hold: the wheel, the commands as a user types them, processes that are
killed.
"""
import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from iddpm_nb.checks import typed
from iddpm_nb.cli.evaluate import iddpm_eval

ROOT = Path(__file__).parent.parent
TINY = ("--channels 32 --mult 1 --attn-resolutions --T 20 --batch 8 --warmup 2 --log-every 5 "
        "--device cpu").split()


def clean_env(**more):
    "The environment without this checkout on the path, one thread, no bars."
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "IN_TEST")}
    return env | {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", "MPLBACKEND": "agg"} | more


def ask(home, line, status=0, command=iddpm_eval):
    "What a command says; it must end as expected, and never in a traceback."
    got, out, err = typed(command, line, home)
    assert got == status and "Traceback" not in out + err, f"{line}: {got}\n{out}{err}"
    return out + err


@contextmanager
def within(folder):
    "Work in a folder for a while."
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield folder
    finally:
        os.chdir(before)


def write_site():
    "The web site, as the command writes it: its folder."
    done = subprocess.run([sys.executable, "tools/website.py"], cwd=ROOT, capture_output=True,
                          text=True, env=clean_env(PYTHONPATH=str(ROOT)))
    assert done.returncode == 0, done.stdout + done.stderr
    return ROOT / "_site"


@pytest.fixture
def heard():
    "Signals that whoever started pytest ignores (nohup, a script's &) are heard in this test."
    names = "SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    before = {n: signal.getsignal(n) for n in numbers if signal.getsignal(n) == signal.SIG_IGN}
    for n in before:
        signal.signal(n, signal.SIG_DFL if n != signal.SIGINT else signal.default_int_handler)
    yield
    for n in before:
        signal.signal(n, signal.SIG_IGN)


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    "The wheel, built and unpacked as pip does it, away from the checkout."
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    files = subprocess.run(["git", "ls-files", "-z", "-co", "--exclude-standard"], cwd=ROOT,
                           capture_output=True, text=True, check=True).stdout
    for name in filter(None, files.split("\0")):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run([sys.executable, "-m", "build", "--no-isolation", "--wheel", "-o", str(out),
                    str(source)], check=True, capture_output=True, env=clean_env())
    wheel, = out.glob("*.whl")
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target",
                    str(out / "site"), str(wheel)], check=True, env=clean_env())
    return out / "site"


@pytest.fixture
def run(site, tmp_path):
    "Run a command or a line of Python from the wheel, in an empty folder."
    def go(*args, status=0, folder=tmp_path):
        first = ([sys.executable, "-c"] if args[0] == "python"
                 else [sys.executable, str(site / "bin" / args[0])])
        p = subprocess.run([*first, *args[1:]], cwd=folder, capture_output=True, text=True,
                           env=clean_env(PYTHONPATH=str(site)))
        assert p.returncode == status, f"{args}: status {p.returncode}\n{p.stdout}\n{p.stderr}"
        return p.stdout + p.stderr
    go.folder = tmp_path
    return go
