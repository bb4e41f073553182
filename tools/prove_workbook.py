"""Prove the workbook: python tools/prove_workbook.py [NUMBER ...]

Each chapter of the core runs once, in one process. At every exported cell the process forks, once
for each function or method whose body a reader writes: in the fork that body is missing, and the
chapter goes on until a cell fails. It must fail, and the cell that fails must be a check: a reader
is told by a check, not by an accident. Exercises are proven too: a stub waits, the folded solution
passes its check, and the slip beside it does not; the chapter goes on with the solution.

Cells marked slow or cuda are left out, and so is the last check of the capstone, which trains the
network that its solutions make. `--slow` runs them as well.
"""
import argparse
import contextlib
import io
import json
import os
import re
import sys
import time
import types
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"       # a fork has no threads, and OpenMP would wait for them
os.environ["MPLBACKEND"] = "agg"

import matplotlib.pyplot as plt  # noqa: E402
from iddpm_nb.checks import YourTurn  # noqa: E402
from iddpm_nb.cli.workbook import asked, chapters, directives, without  # noqa: E402

CHECK = re.compile(r"\b(close|must_fail|refused|assert|your_turn|check_\w+)\b")
TRY = re.compile(r"^your_turn\((?:check_)?\w+, (\w+)\)", re.M)
STUB = re.compile(r'raise YourTurn\("(\w+)"\)')


class Chapter:
    "A chapter as its code runs, cell by cell, in one namespace."
    def __init__(self, path, slow):
        os.chdir(path.parent)
        self.cells = json.loads(path.read_text("utf-8"))["cells"]
        self.slow = slow
        module = types.ModuleType("chapter")      # a real one: dataclasses look themselves up there
        sys.modules["chapter"] = module
        self.names = module.__dict__
        self.names["YourTurn"] = YourTurn         # a workbook imports it in its first code cell

    def source(self, i):
        "The code of cell i, nothing for text and for cells that are left out."
        c = self.cells[i]
        off = {"eval", "default_exp"} | (set() if self.slow else {"slow", "cuda"})
        text = "".join(c["source"]) if c["cell_type"] == "code" else ""
        return "" if directives(text) & off or "nbdev_export(" in text else text

    def run(self, i, source=None):
        "Execute a cell, or another source in its place; what it prints."
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            text = self.source(i) if source is None else source
            exec(compile(text, f"cell {i}", "exec"), self.names)
        plt.close("all")
        return said.getvalue()


def forked(f):
    "What f returns, as text, of a copy of this process."
    read, write = os.pipe()
    if not (child := os.fork()):
        try:
            said = f()
        except BaseException as e:
            said = f"{type(e).__name__}: {e}"
        with os.fdopen(write, "w") as pipe:
            pipe.write(said)
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    return said


def noticed(chapter, i, name):
    "How the chapter ends if one body of cell i is missing."
    k, source = i, without(chapter.source(i), [name])
    try:
        chapter.run(i, source)
        for k in range(i + 1, len(chapter.cells)):
            chapter.run(k)
    except BaseException as e:
        here, which = chapter.source(k), f"cell {k} ({chapter.cells[k]['id']})"
        if not isinstance(e, (YourTurn, AssertionError)): return f"{which}: {type(e).__name__}: {e}"
        return "" if CHECK.search(here) else f"{which} stops without a check"
    return "nothing notices"


def blocks(cell):
    "The Python that is folded in a text."
    return re.findall(r"```python\n(.*?)```", "".join(cell["source"]), re.S)


def exercise(chapter, stub, i):
    "What is wrong with an exercise: its stub's cell, and cell i, which checks it."
    name = STUB.search(chapter.source(stub))[1]
    folded = chapter.cells[i + 1] if i + 1 < len(chapter.cells) else {"cell_type": ""}
    found = blocks(folded) if folded["cell_type"] == "markdown" else []
    if len(found) < 2: return f"{name}: no folded solution with a slip below its check"
    solution, *slips = found
    said = forked(lambda: chapter.run(i))
    if "your turn" not in said: return f"{name}: the stub says {said!r}"
    for slip in slips:
        said = forked(lambda: [chapter.run(stub, x) for x in (solution, slip)] and chapter.run(i))
        if not said.startswith("AssertionError"): return f"{name}: the slip says {said!r}"
    chapter.run(stub, solution)
    said = chapter.run(i)
    return "" if f"{name}: right" in said else f"{name}: the solution says {said!r}"


def prove(path, slow):
    "Units and exercises of a chapter, and what is wrong."
    chapter, units, tried, bad, stub = Chapter(path, slow), 0, 0, [], None
    for i in range(len(chapter.cells)):
        source = chapter.source(i)
        for name, _ in asked(source):
            units += 1
            fault = forked(lambda: noticed(chapter, i, name))
            if fault: bad.append(f"{path.stem}: {name}: {fault}")
        if TRY.search(source) and stub is not None:
            tried += 1
            fault = exercise(chapter, stub, i)
            if fault: bad.append(f"{path.stem}: {fault}")
            stub = None
        elif slow or not TRY.search(source):
            chapter.run(i)
            if STUB.search(source) and not TRY.search(source): stub = i
    return units, tried, bad


def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("numbers", nargs="*")
    p.add_argument("--slow", action="store_true")
    p.add_argument("--part", default="1/1", help="2/3: the second of three parts")
    a, faults, counts = p.parse_args(), [], [0, 0]
    part, parts = map(int, a.part.split("/"))
    for number, path in list(chapters().items())[part - 1::parts]:
        if a.numbers and number not in a.numbers: continue
        start = time.time()
        units, tried, bad = prove(Path(path).resolve(), a.slow)
        counts, faults = [counts[0] + units, counts[1] + tried], faults + bad
        print(f"{number}: {units} bodies, {tried} exercises, {len(bad)} faults, "
              f"{time.time() - start:.0f} s", flush=True)
    found = f"{counts[0]} bodies and {counts[1]} exercises, {len(faults)} faults"
    print("\n".join([*faults, found]))
    sys.exit(bool(faults))


if __name__ == "__main__": main()
