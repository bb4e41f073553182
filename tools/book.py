"""The notebooks as one book: python tools/book.py checks that each is sound and that every link
leads somewhere.

`notebooks()` finds them, in all folders, and fails when it sees others than git knows: a notebook
that a tool passes over in silence is a chapter that nobody tests.
"""
import re
import subprocess
import sys
from pathlib import Path

import nbformat
from nbdev.doclinks import nbglob

NBS = Path(__file__).resolve().parent.parent / "nbs"
# the root is the paper, each folder an appendix; what comes later may need what comes earlier
FOLDERS = ("", "images", "conditioning", "training", "interop", "measuring", "running", "cli",
           "reproduction", "beyond")
MERGE = "<<<<<<<", ">>>>>>>"


def folder(path):
    "Where a notebook lies: the name of its folder, and nothing for the root."
    return path.relative_to(NBS).parent.as_posix().strip(".")


def place(path):
    "What sorts notebooks as they are read: the index, the paper, and one appendix after another."
    if folder(path) not in FOLDERS:
        sys.exit(f"{path} lies in a folder that has no place in the order")
    return FOLDERS.index(folder(path)), path.stem != "index", path.name


def notebooks():
    "All notebooks, as they are read."
    found = {p for p in NBS.rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts}
    asked = ["git", "ls-files", "-z", "-co", "--exclude-standard", "*.ipynb"]
    said = subprocess.run(asked, cwd=NBS, capture_output=True, text=True, check=True).stdout
    known = {NBS / name for name in said.split("\0") if name and (NBS / name).exists()}
    if found != known: sys.exit(f"git and the folder disagree about notebooks: {found ^ known}")
    passed = found - {Path(p).resolve() for p in nbglob(NBS)}
    if passed: sys.exit(f"nbdev passes over {passed}")
    return sorted(found, key=place)


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
        if re.match(r"[a-z]+:|#", target): continue  # elsewhere, or within the page
        if not (path.parent / target.partition("#")[0]).exists(): yield f"a link leads to {target}"


def neighbours(path, nb):
    "The chapters before and after, as the last cell names them; None where it names none."
    last = nb.cells[-1].source
    found = [re.search(rf"{word} \[[^]]+\]\(([^)]+)\)", last) for word in ("Back to", "on to")]
    return [m and (path.parent / m[1]).resolve() for m in found]


def broken_chain(books):
    "Where 'Back to' and 'on to' do not lead through all chapters in their order."
    index, *order = books
    for k, path in enumerate(order):
        want = [index, *order][k], order[k + 1] if k + 1 < len(order) else None
        for word, wanted, said in zip(("back to", "on to"), want, neighbours(path, books[path])):
            if said != wanted:
                yield f"{path.relative_to(NBS)}: it should lead {word} {wanted}, not {said}"


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
