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


def neighbours(nb):
    "The chapters before and after, as the last cell names them."
    last = nb.cells[-1].source
    return [re.search(rf"{word} \[[^]]+\]\(([^)]+)\)", last) for word in ("Back to", "on to")]


def broken_chain(books):
    "Where 'Back to' and 'on to' of two chapters do not agree."
    steps = {p.name: [m and m[1] for m in neighbours(nb)] for p, nb in books.items()}
    for name, (before, after) in steps.items():
        if after in steps and after != "index.ipynb" and steps[after][0] != name:
            yield f"{name}: it leads on to {after}, which leads back to {steps[after][0]}"
        if before in steps and before != "index.ipynb" and steps[before][1] != name:
            yield f"{name}: it leads back to {before}, which leads on to {steps[before][1]}"


def main():
    books = {path: nbformat.read(path, 4) for path in notebooks()}
    bad, links = list(broken_chain(books)), 0
    for path, nb in books.items():
        found = [*faults(path, nb), *dead_links(path, nb)]
        bad += [f"{path.relative_to(NBS)}: {fault}" for fault in found]
        links += sum(c.source.count(".ipynb)") for c in nb.cells if c.cell_type == "markdown")
    print("\n".join(bad) or f"{len(books)} notebooks, {links} links between them")
    sys.exit(bool(bad))


if __name__ == "__main__": main()
