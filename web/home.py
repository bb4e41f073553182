"""The first page, the table of contents, and a page for each part."""
import re
from pathlib import Path

from web.pages import plain
from web.reference import PARTS, label, title

START = Path(__file__).with_name("home.md")


def claim(nb):
    "What a chapter says in one sentence."
    return next((line[2:] for line in nb.cells[0].source.splitlines() if line.startswith("> ")), "")


def starred(index):
    "The chapters of the short path, as the index marks them."
    text = "\n".join(c.source for c in index.cells if c.cell_type == "markdown")
    return re.findall(r"★ \[[^]]+\]\((\w+)\.ipynb\)", text)


def entry(place, nb, stars):
    "How a chapter is called in the sidebar."
    name = place.rpartition("/")[2]
    return f"{name.partition('_')[0]} {title(nb)}{' ★' if place in stars else ''} </{place}>"


def tree(entries, caption=""):
    "A table of contents that only the sidebar shows."
    head = [f":caption: {caption}"] if caption else []
    return "\n".join(["```{toctree}", *head, ":hidden:", "", *entries, "```", ""])


def listed(books, part):
    "The chapters of a part."
    return {p: nb for p, nb in books.items() if p.rpartition("/")[0] == part}


def lines(chapters, stars=()):
    "Chapters with their claims."
    return [f"- [**{label(p)}** {title(nb)}](/{p}.ipynb){' ★' if p in stars else ''}  \n  "
            f"{claim(nb)}" for p, nb in chapters.items()]


def part_page(part, chapters):
    "The page of an appendix."
    return "\n".join([f"# {PARTS[part]}\n", *lines(chapters), "",
                      tree([entry(p, nb, ()) for p, nb in chapters.items()])])


def contents(books, stars):
    "All chapters on one page."
    made = ["# All chapters\n", "Read the paper's part from the first to the last; one can stop "
            "after any chapter, with a library that works up to there. Who is in a hurry follows "
            "the stars.\n", ":::{admonition} The short path\n:class: tip\n"
            + " → ".join(f"[{label(p)}](/{p}.ipynb)" for p in stars) + "\n:::\n"]
    for part, name in PARTS.items():
        made += [f"## {name}\n", *lines(listed(books, part), stars), ""]
    return "\n".join(made)


def pages(books, index):
    "place -> text."
    stars = starred(index)
    made = {f"{p}/index.md": part_page(p, listed(books, p)) for p in PARTS if p}
    made["contents.md"] = contents(books, stars)
    trees = [tree(["All chapters </contents>", "Playground </playground>", "Gallery </gallery>",
                   "Measured </measured>"], "Start"),
             tree([entry(p, nb, stars) for p, nb in listed(books, "").items()], "The paper"),
             tree([f"{name} </{p}/index>" for p, name in PARTS.items() if p], "Appendices"),
             tree(["Reference </reference/index>"], "Look up")]
    made["index.md"] = "\n".join([START.read_text(encoding="utf-8"), *trees])
    return made
