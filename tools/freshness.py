"""Are a notebook's outputs those of its cells, and of the code that the cells use? Hashes answer.

Syntax trees are hashed, without docstrings: where a line is broken does not matter, what it
computes does. Trees differ between versions of Python, so a hash of code names its version, and is
compared only under it.
"""
import ast
import datetime
import functools
import hashlib
import json
import sys

import torch
from layers import behind, chapters, doors, imported
from nbdev.config import get_config

cfg = get_config()
PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"


def digest(*parts):
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]


class Bare(ast.NodeTransformer):
    """Without what computes nothing: docstrings and other lone texts, the list of public names,
    types of arguments and results."""
    def visit_Expr(self, node):
        return None if isinstance(node.value, ast.Constant) else self.generic_visit(node)

    def visit_Assign(self, node):
        return None if ast.unparse(node.targets[0]) == "__all__" else self.generic_visit(node)

    def visit_FunctionDef(self, node):
        node.returns = None
        return self.generic_visit(node)

    def visit_arg(self, node):
        node.annotation = None
        return node


def meaning(source):
    "What a source computes; one that is no Python stands for itself."
    try:
        return ast.dump(Bare().visit(ast.parse(source)))
    except SyntaxError:
        return source


def cell_hash(cell):
    "Of the outputs, and of the source under this Python."
    return f"{digest(cell.get('outputs', []))} {PYTHON} {digest(meaning(cell.source))}"


def same(old, new):
    "Do two hashes agree, as far as they can be compared?"
    if old is None or len(old.split()) != len(new.split()): return False
    *out, python, code = old.split()
    *its, here, now = new.split()
    return out == its and (python != here or code == now)


@functools.cache
def modules():
    return set(chapters())


@functools.cache
def homes():
    return dict(doors(cfg.lib_path))


def found(tree, name=""):
    "The modules that a tree imports, or asks for as `iddpm_nb.name`."
    said = set(imported(tree, cfg.lib_name, name))
    said |= {ast.unparse(n) for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
    inside = (s.removeprefix(f"{cfg.lib_name}.") for s in said if s.startswith(f"{cfg.lib_name}."))
    return {behind(s, homes()) for s in inside} & modules()


@functools.cache
def module(name):
    "A module's meaning, and all modules that it needs, itself among them."
    text = (cfg.lib_path / f"{name.replace('.', '/')}.py").read_text()
    tree = ast.parse(text)
    needs = {name}.union(*(module(n)[1] for n in found(tree, name)))
    return meaning(text), needs


def used(nb):
    "A hash of all the code of the package that a notebook's cells import, directly or not."
    sources = [c.source for c in nb.cells if c.cell_type == "code"]
    trees = [ast.parse(s) for s in sources if meaning(s) != s]
    needs = set().union(*(module(n)[1] for t in trees for n in found(t)))
    return f"{PYTHON} {digest({n: module(n)[0] for n in needs})}"


def stamp(nb):
    "When a cell was run, and with what."
    version = (cfg.lib_path / "__init__.py").read_text().partition('__version__ = "')[2]
    return {"date": datetime.date.today().isoformat(), "version": version.partition('"')[0],
            "torch": torch.__version__.partition("+")[0], "used": used(nb)}
