"""What the notebooks show now beside what they showed at a commit: python tools/same_numbers.py
COMMIT

Cells are found again by their ids, wherever their notebook lies now. Slow cells are left out: they
are run rarely. It lists each default cell whose outputs differ, line by line, and the cells that
are new or gone.
"""
import base64
import io
import subprocess
import sys

import nbformat
import numpy as np
from book import NBS, notebooks
from nbrun import skipped
from PIL import Image

PICTURES = "image/png", "image/jpeg"


def git(*words):
    return subprocess.run(["git", *words], cwd=NBS, capture_output=True, text=True,
                          check=True).stdout


def before(commit):
    "Path and text of every notebook at a commit."
    for path in git("ls-tree", "-r", "--name-only", "-z", commit, ".").split("\0"):
        if path.endswith(".ipynb"): yield path, git("show", f"{commit}:./{path}")


def shown(notebooks):
    "Cell id -> notebook, source and outputs, of the default cells."
    cells = {}
    for path, text in notebooks:
        for c in nbformat.reads(text, 4).cells:
            if c.cell_type != "code" or skipped(c): continue
            if c.id in cells: sys.exit(f"the id {c.id} is in {path} and in {cells[c.id][0]}")
            cells[c.id] = path, c.source, c.outputs
    return cells


def parts(outputs):
    "Lines of text and pictures, in their order."
    for o in outputs:
        data = o.get("data", {})
        pictures = [data[k] for k in PICTURES if k in data]
        yield from (("picture", p) for p in pictures)
        text = o.get("text") or data.get("text/markdown") or data.get("text/plain", "")
        if not pictures: yield from (("text", line) for line in text.splitlines())


def pixels(picture):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(picture))).convert("RGB"), float)


def difference(a, b):
    "What two parts differ in, in words; nothing, if they are the same."
    if a == b: return
    if a is None or b is None:
        return f"    only {'now' if a is None else 'then'}: {(a or b)[1][:100]}"
    if a[0] == b[0] == "picture":
        x, y = pixels(a[1]), pixels(b[1])
        if x.shape != y.shape: return f"    the picture was {x.shape}, and is {y.shape}"
        return (f"    the picture: {abs(x - y).mean():.2f} of 255 levels on average"
                if (x != y).any() else None)
    return f"    - {a[1][:150]}\n    + {b[1][:150]}"


def changes(old, new):
    "How the outputs of one cell differ."
    a, b = list(parts(old)), list(parts(new))
    n = max(len(a), len(b))
    pad = [[*x, *[None] * (n - len(x))] for x in (a, b)]
    return [d for x, y in zip(*pad) if (d := difference(x, y))]


def main():
    commit, = sys.argv[1:]
    old = shown(before(commit))
    new = shown((p.relative_to(NBS).as_posix(), p.read_text()) for p in notebooks())
    both = [k for k in new if k in old]
    found = {k: changes(old[k][2], new[k][2]) for k in both}
    for k, differ in found.items():
        if differ: print(f"{new[k][0]} {k}", *differ, sep="\n")
    for word, a, b in (("new", new, old), ("gone", old, new)):
        left = [f"{a[k][0]} {k}" for k in a if k not in b and a[k][2]]
        if left: print(f"{word}, with outputs: {', '.join(left)}")
    print(f"{len(both)} cells, {sum(map(bool, found.values()))} with other outputs")
    sys.exit(any(found.values()))


if __name__ == "__main__": main()
