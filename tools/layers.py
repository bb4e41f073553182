"""The folders of the package, the arrows between them, and no arrow upward: python tools/layers.py

A module imports from earlier chapters only: first those of the root, which is the paper, then folder by
folder in the order of FOLDERS. An arrow upward fails, and so does an import that hides in a text.
"""
import ast
import sys
from pathlib import Path

from nbdev.config import get_config

FOLDERS = ("", "images", "conditioning", "training", "interop", "measuring", "running", "cli", "reproduction")
EXPORTS = "#| default_exp "


def chapters():
    "Modules in the order of their chapters: name -> place."
    from book import NBS, notebooks
    import nbformat
    found = []
    for path in notebooks():
        cells = nbformat.read(path, 4).cells
        homes = [c.source.removeprefix(EXPORTS).split()[0] for c in cells if c.source.startswith(EXPORTS)]
        folder = path.relative_to(NBS).parent.as_posix().strip(".")
        if folder not in FOLDERS: sys.exit(f"{path} lies in a folder that has no place in the order")
        for name in homes:
            if name.rpartition(".")[0] != folder: sys.exit(f"{path} exports {name}, a module of another folder")
            found.append((FOLDERS.index(folder), path.name, name))
    return {name: k for k, (_, _, name) in enumerate(sorted(found))}


def imported(path, lib, name):
    "Modules of the package that a module imports, also within its functions; and imports by name."
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import): yield from (a.name for a in node.names if a.name.split(".")[0] == lib)
        if isinstance(node, ast.ImportFrom):
            here = [lib, *name.split(".")]
            start = ".".join(here[:len(here) - node.level]) + "." if node.level else ""
            source = start + (node.module or "")
            if source.split(".")[0] == lib: yield from [source.strip(".")] if node.module else [start + a.name for a in node.names]
        if isinstance(node, ast.Call) and "import" in ast.unparse(node.func):
            if any(isinstance(a, ast.Constant) and str(a.value).startswith(lib) for a in node.args): yield f"{lib}.{ast.unparse(node)}"


def main():
    cfg = get_config()
    lib, order = cfg.lib_name, chapters()
    bad, arrows = [], {}
    for name in order:
        path = cfg.lib_path / (name.replace(".", "/") + ".py")
        for source in imported(path, lib, name):
            source = source.removeprefix(lib).strip(".")
            if source in ("", "__version__"): continue
            if source not in order: bad.append(f"{name} imports {source}, which no chapter exports")
            elif order[source] >= order[name]: bad.append(f"{name} imports {source}, which comes later")
            else: arrows.setdefault(name.rpartition(".")[0], set()).add(source.rpartition(".")[0])
    for folder in FOLDERS:
        modules = [name.rpartition(".")[2] for name in order if name.rpartition(".")[0] == folder]
        below = [f or "root" for f in FOLDERS if f in arrows.get(folder, ()) and f != folder]
        print(f"{folder or 'root':13}{' '.join(modules)}")
        if below: print(f"{'':13}imports from {', '.join(below)}")
    print("\n".join(bad) or f"{len(order)} modules, no arrow upward")
    sys.exit(bool(bad))


if __name__ == "__main__": main()
