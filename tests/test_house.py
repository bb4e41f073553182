"""The tools that keep the house in order notice what they are there for."""
import ast
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "tools"))
import book
import freshness
import layers
import lines
import same_numbers


def of(text, name="training.files"):
    return set(layers.imported(ast.parse(text), "iddpm_nb", name))


@pytest.mark.parametrize("text", [
    "from ..train import x", "from .. import train", "import iddpm_nb.train as t",
    "from iddpm_nb.train import x", "from iddpm_nb import train",
    "def f():\n    from ..train import x", "def f():\n    import iddpm_nb.train"])
def test_every_way_to_import_is_seen(text):
    assert "iddpm_nb.train" in of(text)


def test_folders_are_told_apart():
    assert "iddpm_nb.training.train" in of("from .train import x")
    assert "iddpm_nb.train" not in of("from .train import x")


def test_an_import_that_hides_in_a_text_is_a_fault():
    hidden, = of("import_module('iddpm_nb.train').x")
    assert list(layers.faults("files", hidden, ["train", "files"]))
    assert not of("import_module(name)") and not of("import_module('diffusers')")


def test_only_arrows_upward_are_faults():
    order = ["forward", "train", "training.files"]
    assert not list(layers.faults("training.files", "forward", order))
    assert list(layers.faults("forward", "train", order))
    assert list(layers.faults("train", "train", order))


@pytest.fixture
def copy(tmp_path):
    "The notebooks and modules, in a folder of their own with its own git."
    for name in ("nbs", "iddpm_nb", "tools"):
        shutil.copytree(ROOT / name, tmp_path / name)
    shutil.copy(ROOT / "settings.ini", tmp_path)
    subprocess.run(["git", "init", "-q", "."], cwd=tmp_path, check=True)
    return tmp_path


def said(copy, tool, status):
    done = subprocess.run([sys.executable, f"tools/{tool}.py"], cwd=copy, capture_output=True,
                          text=True)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_layers(copy):
    assert "none upward" in said(copy, "layers", 0)
    module = copy / "iddpm_nb" / "forward.py"
    module.write_text(module.read_text() + "\nfrom .running.model import load\n")
    assert "forward imports running.model, which comes later" in said(copy, "layers", 1)
    text = module.read_text().replace("from .running.model import load", "LINE")
    for line, home in (("from . import load", "running.model"),
                       ("from . import to_openai", "interop.openai"),
                       ("from .interop import to_diffusers", "interop.diffusers_bridge")):
        module.write_text(text.replace("LINE", line))
        assert f"forward imports {home}, which comes later" in said(copy, "layers", 1)
    (copy / "iddpm_nb" / "stray.py").touch()
    assert "stray is exported by no chapter" in said(copy, "layers", 1)


def test_imports(copy):
    module = copy / "iddpm_nb" / "forward.py"
    module.write_text(module.read_text() + "\nimport nowhere_at_all\n")
    out = said(copy, "imports", 1)
    assert "iddpm_nb.schedule: ModuleNotFoundError" in out
    assert "iddpm_nb.checks:" not in out


def test_book(copy):
    assert "links between them" in said(copy, "book", 0)
    chapter = copy / "nbs" / "training" / "01_files.ipynb"
    text = chapter.read_text()
    chapter.write_text(text.replace("01a_own_parts.ipynb", "01a_one_parts.ipynb"))
    assert "a link leads to 01a_one_parts.ipynb" in said(copy, "book", 1)
    chapter.write_text(text.replace("on to [parts of", "and [parts of"))
    assert "should lead on to" in said(copy, "book", 1)
    chapter.write_text(text)
    for stray in ("_hidden.ipynb", "elsewhere/01_a.ipynb"):
        (copy / "nbs" / "elsewhere").mkdir(exist_ok=True)
        shutil.copy(chapter, copy / "nbs" / stray)
        said(copy, "book", 1)
        (copy / "nbs" / stray).unlink()


def test_changed_outputs_are_found():
    one = [{"output_type": "stream", "text": "a 1\nb 2\n"}]
    other = [{"output_type": "stream", "text": "a 1\nb 3\n"}]
    assert not same_numbers.changes(one, one)
    assert same_numbers.changes(one, other) == ["    - b 2\n    + b 3"]
    assert same_numbers.changes(one, []) == ["    only then: a 1", "    only then: b 2"]


def test_the_order_of_the_folders_is_the_one_on_disk():
    there = {p.name for p in (ROOT / "nbs").iterdir() if p.is_dir() and list(p.glob("*.ipynb"))}
    assert there == set(book.FOLDERS) - {""}
    for name in there:
        assert (ROOT / "iddpm_nb" / name / "__init__.py").read_text().startswith('"""')


@pytest.mark.parametrize("text", [
    "for x in y: f(x)", "while x: f()", "with x: f()", "try: f()\nexcept E:\n    g()",
    "try:\n    f()\nexcept E: g()", "try:\n    f()\nfinally: g()", "if x: f(); g()",
    "for x in y:\n    f(x)\nelse: g()", "def f():\n    for x in y: g()",
    "class A: x = 1; y = 2"])
def test_a_body_that_shares_its_line_is_seen(text):
    assert list(lines.crowded(text))


@pytest.mark.parametrize("text", [
    "if x: f()", "if x: f()\nelif y: g()\nelse: h()", "def f(x): return x", "class A(B): pass",
    "if x:\n    f()\nelse:\n    if y: g()", "for x in y:\n    if x: continue",
    "x = [f(y) for y in z]", "if (x and\n        y): f()"])
def test_a_guard_and_a_one_line_function_may_stay(text):
    assert not list(lines.crowded(text))


def test_long_code_is_seen():
    body = "".join(f"    x = {i}\n" for i in range(26))
    assert list(lines.too_long(f"def f():\n{body}"))
    short = body.removesuffix("    x = 25\n")
    assert not list(lines.too_long(f"def f():\n    'What it does.'\n{short}"))
    assert list(lines.too_long("x = 1\n" * 401)) and not list(lines.too_long("x = 1\n\n" * 400))


def test_what_a_source_means():
    mean = freshness.meaning
    assert mean("def f(x):\n    'Says.'\n    return (x +\n            1)  # why") == mean(
        "def f(x):\n\n    return x + 1")
    assert mean("x = 1; y = 2") == mean("x = 1\ny = 2")
    assert mean("def f(x:int=1) -> int: return x") == mean("def f(x=1): return x")
    assert mean("def f(x=2): return x") != mean("def f(x=1): return x")
    assert mean("x = 1") != mean("x = 2") and mean("%time x") == "%time x"


def test_hashes_are_compared_as_far_as_they_can_be():
    same = freshness.same
    assert same("out 3.11 code", "out 3.11 code") and same("out 3.12 other", "out 3.11 code")
    assert not same("out 3.11 other", "out 3.11 code")
    assert not same("other 3.12 code", "out 3.11 code")
    assert not same(None, "3.11 code") and not same("deadbeef", "out 3.11 code")


HASHES = """
import sys
sys.path.insert(0, "tools")
import nbformat
from freshness import used
nb = nbformat.v4.new_notebook()
for line in ("from iddpm_nb.losses import l_vlb", "import iddpm_nb; iddpm_nb.load('digits')",
             "from iddpm_nb import checks", "import torch"):
    nb.cells = [nbformat.v4.new_code_cell(line)]
    print(used(nb))
"""


@pytest.fixture(scope="module")
def hashes_before():
    return hashes(ROOT)


def hashes(folder):
    ran = subprocess.run([sys.executable, "-c", HASHES], cwd=folder, text=True,
                         capture_output=True, check=True)
    return ran.stdout.splitlines()


@pytest.mark.parametrize("module, old, new, changed", [
    ("forward", "alpha_bar = (1 - beta).cumprod(0)", "alpha_bar = (1 - beta).cumprod(-1)", "11.."),
    ("running/model", "check_seed(seed)", "check_seed(seed + 0)", ".1.."),
    ("checks", "def require(", "def require (", "...."),
    ("checks", "assert gap <= tol", "assert gap < tol", "111.")])
def test_the_code_that_a_chapter_uses_is_known(copy, hashes_before, module, old, new, changed):
    before, path = hashes_before, copy / "iddpm_nb" / f"{module}.py"
    assert len(set(before)) == 4 and old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    now = "".join("1" if a != b else "." for a, b in zip(before, hashes(copy)))
    assert now == changed
