"""The proof of the workbook notices what it is there to notice."""
import json
import os
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "tools"))

GOOD = [
    "from iddpm_nb.checks import YourTurn, close, must_fail, your_turn",
    "#| export\ndef double(x):\n    'Twice.'\n    return 2 * x",
    "close(double(2), 4, 0)",
    "print(double(3))",
    "def triple(x):\n    'Thrice.'\n    raise YourTurn('triple')".replace("'triple'", '"triple"'),
    "def check_triple(triple): close(triple(2), 6, 0)\nyour_turn(check_triple, triple)",
    "<details>\n```python\ndef triple(x): return 3 * x\n```\nA slip:\n"
    "```python\ndef triple(x): return 2 * x\n```\n</details>",
]


def book(folder, sources):
    "A chapter of these cells; those that begin with < are text."
    cells = [{"cell_type": "markdown" if s.startswith("<") else "code", "id": f"c{i}",
              "source": s.splitlines(True)} for i, s in enumerate(sources)]
    path = folder / "01_made.ipynb"
    path.write_text(json.dumps({"cells": cells}))
    return path


def proven(folder, sources):
    "What the proof says of such a chapter, in a process of its own: it forks and moves."
    from prove_workbook import forked, prove
    here = os.getcwd()
    try:
        return json.loads(forked(lambda: json.dumps(prove(book(folder, sources), False))))
    finally:
        os.chdir(here)


def test_a_sound_chapter_passes(tmp_path):
    assert proven(tmp_path, GOOD) == [1, 1, []]


@pytest.mark.parametrize("cell, source, said", [
    (2, "#| slow\nclose(double(2), 4, 0)", "stops without a check"),
    (2, "print(double(2))", "stops without a check"),
    (2, "try: close(double(2), 4, 0)\nexcept BaseException: pass", "stops without a check"),
    (5, "def check_triple(triple): triple(2)\nyour_turn(check_triple, triple)", "the slip says"),
    (5, "def check_triple(triple): close(triple(2), 7, 0)\nyour_turn(check_triple, triple)",
     "differ by 1"),
    (6, "<details>\n```python\ndef triple(x): return 3 * x\n```\n</details>", "no folded solution"),
    (6, GOOD[6].replace("2 * x", "3 * x"), "the slip says"),
])
def test_what_is_wrong_is_noticed(tmp_path, cell, source, said):
    changed = [source if i == cell else s for i, s in enumerate(GOOD)]
    try:
        found = str(proven(tmp_path, changed)[2])
    except json.JSONDecodeError as e:       # the chapter itself fails
        found = e.doc
    assert said in found


def test_nothing_notices(tmp_path):
    assert "nothing notices" in str(proven(tmp_path, [GOOD[0], GOOD[1], "print(2)"])[2])
