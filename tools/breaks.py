"""Break the formulas: python tools/breaks.py [NUMBER ...]

Each line of breaks.txt is a plausible mistake in an exported function of a core chapter:
number | function | the text as it stands there, once | the text in its place. The chapter runs as
in prove_workbook; at the function's cell the process forks, and in the fork the broken cell and
the rest of the chapter run until something fails. What fails should be a check. A break that no
cell notices has survived: a check is missing, or the change is none.

Cells marked slow or cuda are left out.
"""
import argparse
import ast
import sys
import time
from pathlib import Path
from typing import NamedTuple

from prove_workbook import CHECK, Chapter, forked

from iddpm_nb.cli.workbook import chapters, directives

LIST = Path(__file__).resolve().with_suffix(".txt")
SURVIVED, LOST = "survived", "error: "


class Break(NamedTuple):
    "A mistake that a reader or an author could make."
    number: str
    name: str
    old: str
    new: str

    def __str__(self): return f"{self.number} {self.name}: {self.old} -> {self.new}"


def listed(text):
    "The breaks of a list; empty lines and lines that begin with # say nothing."
    for line in text.splitlines():
        if not line.strip() or line.startswith("#"): continue
        fields = line.split(" | ")
        if len(fields) != 4: sys.exit(f"not number | function | old | new: {line}")
        yield Break(*fields)


def spans(source):
    "First and last line of each function, class and method of a cell, by name."
    if not directives(source) & {"export", "exporti"}: return
    for node in ast.parse(source).body:
        if not isinstance(node, (ast.FunctionDef, ast.ClassDef)): continue
        yield node.name, node.lineno, node.end_lineno
        methods = node.body if isinstance(node, ast.ClassDef) else []
        for f in methods:
            if isinstance(f, ast.FunctionDef): yield f"{node.name}.{f.name}", f.lineno, f.end_lineno


def broken(source, b, first, last):
    "The cell with the mistake in it."
    lines = source.splitlines(True)
    here = "".join(lines[first - 1:last])
    if here.count(b.old) != 1:
        raise LookupError(f"{here.count(b.old)} times in the function, not once: {b.old}")
    return "".join([*lines[:first - 1], here.replace(b.old, b.new), *lines[last:]])


def fate(chapter, i, source):
    "What becomes of a chapter whose cell i is broken."
    try:
        for k in range(i, len(chapter.cells)):
            chapter.run(k, source if k == i else None)
    except BaseException as e:
        kind, what = "a check" if CHECK.search(chapter.source(k)) else "no check", type(e).__name__
        return f"noticed by cell {k} ({chapter.cells[k]['id']}, {kind}): {what}: {str(e)[:80]!r}"
    return SURVIVED


def tried(path, breaks):
    "Each break of a chapter with its fate."
    chapter, left = Chapter(path, slow=False), list(breaks)
    for i in range(len(chapter.cells)):
        source = chapter.source(i)
        places = {name: lines for name, *lines in spans(source)}
        for b in [b for b in left if b.name in places]:
            left.remove(b)
            try:
                wrong = broken(source, b, *places[b.name])
                compile(wrong, "break", "exec")
            except (LookupError, SyntaxError) as e:
                yield b, f"{LOST}{e}"
            else:
                yield b, forked(lambda: fate(chapter, i, wrong)) or "noticed: the process ends"
        chapter.run(i)
    yield from ((b, f"{LOST}no exported function of this name") for b in left)


def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("numbers", nargs="*")
    a, breaks, rows, found = p.parse_args(), list(listed(LIST.read_text("utf-8"))), [], []
    for number, path in chapters().items():
        mine = [b for b in breaks if b.number == number]
        if not mine or a.numbers and number not in a.numbers: continue
        start = time.time()
        for b, said in tried(Path(path).resolve(), mine):
            found.append((b, said))
            print(f"{b}\n    {said}", flush=True)
        rows.append((number, [said for _, said in found[-len(mine):]], time.time() - start))
    print("\nchapter  breaks  by a check  otherwise  survived  errors  seconds")
    for number, fates, spent in rows:
        noticed = [said for said in fates if said.startswith("noticed")]
        checks = sum(", a check): " in said for said in noticed)
        lost = sum(said.startswith(LOST) for said in fates)
        print(f"{number:7} {len(fates):7} {checks:11} {len(noticed) - checks:10} "
              f"{fates.count(SURVIVED):9} {lost:7} {spent:8.0f}")
    bad = [f"{said}: {b}" for b, said in found if not said.startswith("noticed")]
    print("\n".join([*bad, f"{len(found)} breaks, {len(found) - len(bad)} noticed by their own "
                          f"chapter, {len(bad)} survivors and errors"]))
    sys.exit(bool(bad))


if __name__ == "__main__": main()
