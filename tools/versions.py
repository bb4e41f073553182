"""With which versions of Python and torch does the package run? python tools/versions.py

For each interpreter that is found here and each torch that is asked for, an environment is made
(once: it stays in --home), the quick tests run in it, and results/versions.json says "passed",
"failed: ..." or "not run: ..." of each pair. What was not run is not claimed. --table prints the
record as Markdown, and runs nothing. An environment with its own torch takes about 5 GB.
"""
import argparse
import datetime
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "results" / "versions.json"
PYTHONS = "3.10", "3.11", "3.12", "3.13", "3.14"
TORCHES = "2.6", "2.10", "newest"    # the oldest that is claimed, one between, the newest
# a run that is trained, killed, resumed, loaded and shared; every option; what a card says
QUICK = ("tests/test_config.py", "tests/test_fine_tuning.py", "tests/test_loggers.py",
         "tests/test_sharing.py")
NOT_QUICK = "not two_processes and not claimed"   # a wheel; the record itself
ASKED = "import sys, torch, torchvision, numpy; print(sys.version.split()[0], torch.__version__, " \
        "torchvision.__version__, numpy.__version__)"


def answer(*words, timeout=600, **how):
    "What a command prints, or None if it fails."
    try:
        done = subprocess.run([str(w) for w in words], capture_output=True, text=True,
                              timeout=timeout, **how)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def bare(**more):
    "The environment without this checkout, and without its constraints."
    off = "PYTHONPATH", "PIP_CONSTRAINT", "IN_TEST"
    return {k: v for k, v in os.environ.items() if k not in off} | more


def interpreter(version):
    "The path of a Python that runs, or None: one on the path, or one that uv has or can fetch."
    found = [shutil.which(f"python{version}")]
    if shutil.which("uv"):
        answer("uv", "python", "install", version, timeout=300)
        found.append(answer("uv", "python", "find", version))
    says = "import sys; print('%d.%d' % sys.version_info[:2])"
    return next((p for p in found if p and answer(p, "-c", says) == version), None)


def requirements():
    "What the package needs, without torch and torchvision."
    config = ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini", encoding="utf-8")
    words = shlex.split(config["DEFAULT"]["requirements"])
    return [w for w in words if not re.match("torch(vision)?[<>=]", w)]


def environment(home, python, version, torch):
    "The Python of an environment with this torch, made if it is not there; or why there is none."
    folder = home / f"py{version}-torch{torch}"
    mine = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    if answer(mine, "-c", ASKED, env=bare()): return mine, ""
    wanted = "torch" if torch == "newest" else f"torch=={torch}.*"
    for line in ([python, "-m", "venv", "--clear", folder],
                 [mine, "-m", "pip", "install", "-q", wanted, "torchvision", *requirements(),
                  "pytest", "huggingface_hub"]):
        done = subprocess.run([str(w) for w in line], capture_output=True, text=True, env=bare())
        if done.returncode:
            said = [x for x in done.stderr.splitlines() if x.startswith("ERROR")]
            return None, (said or done.stderr.splitlines() or ["it cannot be made"])[-1]
    return mine, ""


def tried(mine):
    "The quick tests in an environment: what is said of them, and how many there were."
    env = bare(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1", TQDM_DISABLE="1", MPLBACKEND="agg",
               PYTHONDONTWRITEBYTECODE="1")
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run([str(mine), "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k",
                               NOT_QUICK, f"--basetemp={folder}/t", *QUICK], cwd=ROOT, env=env,
                              capture_output=True, text=True)
    counts = dict((k, int(n)) for n, k in re.findall(r"(\d+) (passed|failed|errors?|skipped)",
                                                    done.stdout.splitlines()[-1]))
    bad = [x for x in done.stdout.splitlines() if x.startswith(("FAILED", "ERROR"))]
    if done.returncode == 0 and counts.get("passed"): return "passed", counts
    why = (bad or (done.stdout + done.stderr).splitlines())[-1]
    return f"failed: {why}", counts


def pair(home, version, torch, python):
    "One line of the record."
    line = {"python": version, "torch": torch}
    if python is None: return line | {"result": "not run: no such interpreter here"}
    mine, why = environment(home, python, version, torch)
    if mine is None: return line | {"result": f"not run: {why}"}
    names = "python", "torch", "torchvision", "numpy"
    line |= dict(zip(names, answer(mine, "-c", ASKED, env=bare()).split()))
    result, counts = tried(mine)
    return line | {"result": result, "tests": counts}


def table(record):
    "The record, in Markdown."
    rows = [f"| {p['python']} | {p['torch']} | {p['result']} |" for p in record["pairs"]]
    return "| Python | torch | quick tests |\n|---|---|---|\n" + "\n".join(rows)


def main():
    ask = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    ask.add_argument("--python", nargs="+", default=PYTHONS)
    ask.add_argument("--torch", nargs="+", default=TORCHES)
    ask.add_argument("--home", type=Path, default=Path(tempfile.gettempdir()) / "versions")
    ask.add_argument("--table", action="store_true", help="print the record, and run nothing")
    o = ask.parse_args()
    if o.table: return print(table(json.loads(RECORD.read_text())))
    found = []
    for version in o.python:
        python = interpreter(version)
        for torch in o.torch if python else ["any"]:
            found.append(pair(o.home, version, torch, python))
            print(*found[-1].values(), sep="   ", flush=True)
    system = f"{platform.system()} ({platform.machine()})"
    record = {"date": datetime.date.today().isoformat(), "system": system,
              "tests": [*QUICK, f"-k {NOT_QUICK}"], "pairs": found}
    RECORD.write_text(json.dumps(record, indent=1) + "\n")
    sys.exit(any(p["result"].startswith("failed") for p in found))


if __name__ == "__main__": main()
