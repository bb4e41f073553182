"""Can the code be read on a page? python tools/lines.py

It asks what ruff does not: the body of a `for`, `while`, `with` or `try` stands on its own lines,
while a guard, `if x: return y`, or a `def f(x): return y` may share one; a function has at
most 25 lines, signature and docstring aside, a class at most 40, a module at most 400 that say
something.
"""
import ast
import sys

import nbformat
from book import notebooks
from nbdev.config import get_config

FUNCTION, CLASS, MODULE = 25, 40, 400
LONE = ast.For, ast.AsyncFor, ast.While, ast.With, ast.AsyncWith, ast.Try, ast.ExceptHandler
MAY = ast.If, ast.FunctionDef, ast.ClassDef


def blocks(node):
    "The blocks of a compound statement."
    return [b for f in ("body", "orelse", "finalbody") if (b := getattr(node, f, None))]


def crowded(source):
    "Lines on which a compound statement and its body stand together, where they may not."
    lines = [line.encode() for line in source.splitlines()]
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, LONE + MAY): continue
        for block in blocks(node):
            first = block[0]
            alone = not lines[first.lineno - 1][:first.col_offset].strip()
            # an `elif` is an `if` that stands where a block begins
            chained = isinstance(node, ast.If) and isinstance(first, ast.If)
            simple = len(block) == 1 and not isinstance(first, LONE + MAY)
            if not alone and not chained and not (isinstance(node, MAY) and simple):
                yield first.lineno


def length(nodes):
    "Lines from the first to the last, without a docstring at the start."
    lone = isinstance(nodes[0], ast.Expr) and isinstance(nodes[0].value, ast.Constant)
    nodes = nodes[1:] if lone else nodes
    return nodes[-1].end_lineno - nodes[0].lineno + 1 if nodes else 0


def too_long(source):
    "Functions, classes and the module, if they are longer than a page shows."
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and length(node.body) > FUNCTION:
            yield f"{node.name} has {length(node.body)} lines, more than {FUNCTION}"
        if isinstance(node, ast.ClassDef):
            n = sum(length(f.body) for f in node.body if isinstance(f, ast.FunctionDef))
            if n > CLASS: yield f"the methods of {node.name} have {n} lines, more than {CLASS}"
    n = sum(bool(x.strip()) and not x.startswith("# %%") for x in source.splitlines())
    if n > MODULE: yield f"it has {n} lines, more than {MODULE}"


def main():
    bad = []
    for path in notebooks():
        for cell in nbformat.read(path, as_version=4).cells:
            if cell.cell_type != "code": continue
            bad += [f"{path}, cell {cell.id}, line {n}: a body shares its line"
                    for n in crowded(cell.source)]
    lib = get_config().lib_path
    modules = [p for p in sorted(lib.rglob("*.py")) if p.name != "_modidx.py"]
    for path in modules: bad += [f"{path}: {what}" for what in too_long(path.read_text())]
    print("\n".join([*bad, f"{len(modules)} modules; {len(bad)} places that cannot be read"]))
    sys.exit(bool(bad))


if __name__ == "__main__": main()
