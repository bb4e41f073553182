"""The tools that keep the house in order notice what they are there for."""
import ast
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "tools"))
import book
import layers
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


def test_book(copy):
    assert "links between them" in said(copy, "book", 0)
    chapter = copy / "nbs" / "training" / "01_files.ipynb"
    text = chapter.read_text()
    chapter.write_text(text.replace("02_described.ipynb", "02_descried.ipynb"))
    assert "a link leads to 02_descried.ipynb" in said(copy, "book", 1)
    chapter.write_text(text.replace("on to [what a", "and [what a"))
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
