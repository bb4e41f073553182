"""The notebooks as one book: python tools/book.py checks that each is sound and that every link leads somewhere.

`notebooks()` finds them, in all folders, and fails when it sees others than git knows: a notebook that a
tool passes over in silence is a chapter that nobody tests.
"""
import re
import subprocess
import sys
from pathlib import Path

import nbformat

NBS = Path(__file__).parent.parent / "nbs"
MERGE = "<<<<<<<", ">>>>>>>"


def notebooks():
    "All notebooks, in the order of their paths."
    found = {p for p in NBS.rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts}
    asked = ["git", "ls-files", "-z", "-co", "--exclude-standard", "*.ipynb"]
    said = subprocess.run(asked, cwd=NBS, capture_output=True, text=True, check=True).stdout
    known = {NBS / name for name in said.split("\0") if name and (NBS / name).exists()}
    if found != known: sys.exit(f"git and the folder disagree about notebooks: {found ^ known}")
    return sorted(found)


def faults(path, nb):
    "What is wrong with a notebook itself."
    nbformat.validate(nb)
    ids = [c.get("id") for c in nb.cells]
    if nb.nbformat_minor < 5 or None in ids: yield "cell ids are missing"
    if len(ids) != len(set(ids)): yield "two cells have one id"
    outputs = [o for c in nb.cells for o in c.get("outputs", [])]
    if any(o.output_type == "error" for o in outputs): yield "an output is an error"
    lines = [line for c in nb.cells for line in c.source.splitlines()]
    if any(line.strip("`").startswith(MERGE) for line in lines): yield "it holds a merge marker"
    if path.stat().st_size > 2**20: yield "it is larger than 1 MB"


def dead_links(path, nb):
    "Links to files that are not there."
    text = "\n".join(c.source for c in nb.cells if c.cell_type == "markdown")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:|#", target): continue                 # elsewhere, or within the page
        if not (path.parent / target.partition("#")[0]).exists(): yield f"a link leads to {target}"


def main():
    bad, links = [], 0
    for path in notebooks():
        nb = nbformat.read(path, 4)
        found = [*faults(path, nb), *dead_links(path, nb)]
        bad += [f"{path.relative_to(NBS)}: {fault}" for fault in found]
        links += sum(c.source.count(".ipynb)") for c in nb.cells if c.cell_type == "markdown")
    print("\n".join(bad) or f"{len(notebooks())} notebooks, {links} links between them")
    sys.exit(bool(bad))


if __name__ == "__main__": main()
