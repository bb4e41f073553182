"""The folders of the package, the arrows between them, and no arrow upward: python tools/layers.py

A module imports from earlier chapters only (the order is that of `book.py`). An arrow upward fails,
and so does an import that hides in a text, as in import_module("iddpm_nb.train").
"""
import ast
import sys

import nbformat
from book import FOLDERS, folder, notebooks
from nbdev.config import get_config

EXPORTS = "#| default_exp "


def chapters():
    "The modules, in the order of the chapters that export them."
    for path in notebooks():
        for c in nbformat.read(path, 4).cells:
            if not c.source.startswith(EXPORTS): continue
            name = c.source.removeprefix(EXPORTS).split()[0]
            if home(name) != folder(path): sys.exit(f"{path} exports {name}, of another folder")
            yield name


def home(name):
    "The folder of a module."
    return name.rpartition(".")[0]


def imported(tree, lib, name):
    "What a module imports of the package, also within its functions, by full names."
    package = [lib, *name.split(".")[:-1]]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import): yield from (a.name for a in node.names)
        if isinstance(node, ast.ImportFrom):
            start = package[:len(package) + 1 - node.level] if node.level else []
            source = ".".join([*start, *([node.module] if node.module else [])])
            yield source
            yield from (f"{source}.{a.name}" for a in node.names)
        if isinstance(node, ast.Call) and "import" in ast.unparse(node.func):
            words = [a.value for a in node.args if isinstance(a, ast.Constant)]
            if any(str(w).startswith(lib) for w in words): yield f"{lib}.{ast.unparse(node)}"


def faults(name, source, order):
    "What is wrong with an arrow."
    if "(" in source: yield f"{name} hides an import: {source}"
    elif order.index(source) >= order.index(name):
        yield f"{name} imports {source}, which comes later"


def doors(lib_path):
    "Names that a package hands out lazily, and the modules behind them: the `_HOMES` of each."
    for path in lib_path.rglob("__init__.py"):
        package = path.parent.relative_to(lib_path).as_posix().strip(".").replace("/", ".")
        for node in ast.parse(path.read_text()).body:
            if not isinstance(node, ast.Assign) or ast.unparse(node.targets[0]) != "_HOMES":
                continue
            for name, place in ast.literal_eval(node.value).items():
                yield f"{package}.{name}".strip("."), f"{package}.{place}".strip(".")


def behind(source, homes):
    "The module that a name leads to, through one lazy door or two."
    while source in homes:
        name, place = source.rpartition(".")[2], homes[source]
        source = f"{place}.{name}" if f"{place}.{name}" in homes else place
    return source


def arrows(cfg, order):
    "All imports between modules: who, whom. A name that is no module's is a function, say."
    homes = dict(doors(cfg.lib_path))
    for name in order:
        tree = ast.parse((cfg.lib_path / f"{name.replace('.', '/')}.py").read_text())
        found = {s.removeprefix(f"{cfg.lib_name}.") for s in imported(tree, cfg.lib_name, name)}
        found = {behind(s, homes) for s in found}
        yield from ((name, s) for s in sorted(found) if s in order or "(" in s)


def main():
    cfg = get_config()
    order = list(chapters())
    found = list(arrows(cfg, order))
    stray = {p.relative_to(cfg.lib_path).with_suffix("").as_posix().replace("/", ".")
             for p in cfg.lib_path.rglob("*.py") if not p.name.startswith("_")} - set(order)
    bad = [f"{name} is exported by no chapter" for name in sorted(stray)]
    bad += [fault for name, source in found for fault in faults(name, source, order)]
    for f in FOLDERS:
        print(f"{f or 'root':13}{' '.join(n.rpartition('.')[2] for n in order if home(n) == f)}")
        below = {home(s) for n, s in found if home(n) == f} - {f}
        if below:
            print(f"{'':13}imports from {', '.join(b or 'root' for b in FOLDERS if b in below)}")
    print("\n".join(bad) or f"{len(order)} modules, {len(found)} arrows, none upward")
    sys.exit(bool(bad))


if __name__ == "__main__": main()
