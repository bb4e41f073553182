"""The reference: every public name once, the source of every module, a glossary of symbols, and an
index of the paper's equations."""
import ast
import re
import sys
from dataclasses import dataclass

from web.docments import entries
from web.pages import code_place, directives, plain, ref

PARTS = {"": "The paper", "images": "Images", "conditioning": "Conditioning",
         "training": "Training", "interop": "Exchange with others", "measuring": "Measuring",
         "running": "Running", "cli": "The commands", "reproduction": "Reproduction",
         "beyond": "Beyond the paper"}


@dataclass
class Module:
    "A module, and the chapter that it was made from."
    name: str       # within the package: training.files
    place: str      # of its chapter: training/01_files
    title: str      # of the chapter
    doc: str
    source: str
    public: list
    cells: list     # (id, source)

    @property
    def part(self): return self.name.rpartition(".")[0]


def title(nb):
    "The first heading of a chapter."
    return plain(nb.cells[0].source.splitlines()[0])


def module_of(nb):
    "The module that a chapter writes, or nothing."
    found = [directives(c.source).get("default_exp") for c in nb.cells if c.cell_type == "code"]
    return next(filter(None, found), "")


def split(source):
    "The cells that nbdev put together: (id, source)."
    parts = re.split(r"^# %% \S+ #(\w+)\n", source, flags=re.M)
    return list(zip(parts[1::2], (p.strip("\n") for p in parts[2::2])))


def module(lib, place, nb):
    "One module."
    name = module_of(nb)
    path = lib / f"{name.replace('.', '/')}.py"
    if not path.exists(): sys.exit(f"{place} exports {name}, which is not there: run nbdev_export")
    source = path.read_text(encoding="utf-8")
    tree = ast.parse(source)
    exported = [n.value for n in tree.body if isinstance(n, ast.Assign)
                and ast.unparse(n.targets[0]) == "__all__"]
    public = ast.literal_eval(exported[0]) if exported else []
    cells = [(i, s) for i, s in split(source) if i != "0"]
    return Module(name, place, title(nb), ast.get_docstring(tree) or "", source, public, cells)


def modules(lib, books):
    "All of them, in the order of their chapters."
    return [module(lib, place, nb) for place, nb in books.items() if module_of(nb)]


def escaped(text):
    "Words of a comment as Markdown: only `code` means something, and numbers of equations."
    parts = text.split("`")
    for i in range(0, len(parts), 2):
        parts[i] = re.sub(r"([\\*_<>\[\]|$~{}#])", r"\\\1", parts[i])
        parts[i] = re.sub(r"Eq\. (\d+)", lambda m: f"[Eq. {m[1]}](#eq-{m[1]})", parts[i])
    return "`".join(parts) if len(parts) % 2 else "\\`".join(parts)


def code(text):
    "Code within a line of a table."
    return f"`{text}`".replace("|", "\\|") if text else ""


def table(entry, what):
    "The arguments, one a line."
    if not entry.arguments: return ""
    rows = [f"| {code(a.name)} | {code(a.kind)} | {code(a.default)} | {escaped(a.said)} |"
            for a in entry.arguments]
    return "\n".join([f"| {what} | type | default | meaning |", "|---|---|---|---|", *rows, ""])


def body(entry, what="argument"):
    "What is said of a name, below its heading."
    yield f"```python\n{entry.signature or f'{entry.name} = {entry.value}'}\n```\n"
    if entry.doc: yield escaped(" ".join(entry.doc.split())) + "\n"
    yield table(entry, what)
    if entry.returns:
        kind, _, said = entry.returns.partition(" – ")
        yield f"**Returns** {kind}" + (f": {escaped(said)}" if said else "") + "\n"
    if entry.refusals:
        lines = [f"- `{kind}`: {escaped(' '.join(said.split()))}" for kind, said in entry.refusals]
        yield "<details><summary>What it refuses</summary>\n"
        yield "\n".join([*lines, "", "</details>\n"])


def section(entry, m):
    "One name of a module."
    cell = next((i for i, s in m.cells if re.search(
        rf"^(def|class) {entry.name}\b|^{entry.name} *=", s, re.M)), None)
    yield f"({ref(entry.name)})=\n### `{entry.name}`\n"
    if cell:
        here, there = code_place(m.name, cell)
        yield f"*[chapter: {m.title}](#{here}) · [source](#{there})*\n"
    yield from body(entry)
    for method in entry.methods:
        yield f"#### `{method.name}`\n"
        yield from body(method)


def part_page(part, found):
    "The reference of one folder."
    lines = [f"# Reference: {PARTS[part].lower() if part else 'the paper'}\n"]
    for m in found:
        if not m.public: continue
        lines += [f"## `iddpm_nb.{m.name}`\n", f"{m.doc} "
                  f"Chapter: [{m.title}](/{m.place}.ipynb).\n"]
        for entry in entries(m.source, m.public):
            lines += section(entry, m)
    return "\n".join(lines)


def source_page(m):
    "A module as it is, cell by cell."
    lines = ["---\nnosearch: true\n---\n", f"# `iddpm_nb.{m.name}`\n",
             f"Made from the chapter [{m.title}](/{m.place}.ipynb), which derives and checks it.\n",
             f"> {m.doc}\n"]
    for cell, source in m.cells:
        lines += [f"({code_place(m.name, cell)[1]})=\n", f"````python\n{source}\n````\n"]
    return "\n".join(lines)


def overview(found):
    "All names at a glance."
    lines = ["# Reference\n", f"All {sum(len(m.public) for m in found)} public names, by the "
             "chapters that derive them. Code counts steps from 0: code `t` is the paper's "
             "$t-1$.\n", "| module | names |", "|---|---|"]
    for m in found:
        names = " · ".join(f"[`{n}`](#{ref(n)})" for n in m.public)
        if names: lines.append(f"| `{m.name}` | {names} |")
    parts = [p for p in PARTS if any(m.part == p and m.public for m in found)]
    entries_ = [f"{PARTS[p]} <{page_of(p)}>" for p in parts]
    return "\n".join([*lines, "", "```{toctree}\n:hidden:\n", *entries_,
                      "Symbols </symbols>", "Equations </equations>", "Source </source/index>",
                      "```\n"])


def page_of(part):
    "The page of a part of the reference."
    return f"/reference/{part or 'paper'}"


def symbols(books):
    "The tables of symbols of all chapters, as rows: symbol, code, shape, meaning, place."
    for place, nb in books.items():
        rows = re.findall(r"^\|(.+)\|\s*$", nb.cells[0].source, re.M)
        cells = [[x.strip() for x in re.split(r"(?<!\\)\|", row)] for row in rows]
        heads = cells[0] if cells else []
        if len(heads) < 3 or heads[0] != "symbol": continue
        for row in cells[2:]:
            if row[0] == "–": continue          # code without a symbol
            told = dict(zip(heads, row))
            last = row[-1]
            yield (row[0], told.get("code", ""), told.get("shape", told.get("unit", "")), last,
                   place)


def glossary(books):
    "One line for each symbol with one code, and the chapters in which it stands."
    found = {}
    for symbol, name, shape, meaning, place in symbols(books):
        found.setdefault((symbol, name), []).append((shape, meaning, place))
    lines = ["# Symbols\n", "The tables of symbols of all chapters in one. What a network learns "
             "is red. A symbol with two codes has a line for each.\n",
             "| symbol | code, shape | range, meaning, chapters |", "|---|---|---|"]
    for (symbol, name), rows in found.items():
        shape, meaning, _ = rows[0]
        where = ", ".join(f"[{label(place)}](/{place}.ipynb)" for _, _, place in rows)
        told = relative(meaning, rows[0][2])
        said = " ".join(x for x in (name, shape) if x not in ("", "–"))
        lines.append(f"| {symbol} | {said} | {told} ({where}) |")
    return "\n".join(lines) + "\n"


def relative(text, place):
    "Links of a chapter, as seen from the root."
    folder = place.rpartition("/")[0]
    def absolute(m):
        target = m[2].removeprefix("../") if m[2].startswith("../") else f"{folder}/{m[2]}"
        return f"[{m[1]}](/{target.lstrip('/')})"
    return re.sub(r"\[([^]]+)\]\(([^)#:]+\.ipynb)\)", absolute, text)


def label(place):
    "A chapter by its number."
    folder, _, name = place.rpartition("/")
    number = name.partition("_")[0]
    return f"{folder}/{number}" if folder else number


def equations(books, seen):
    "Where each numbered equation of the paper is."
    lines = ["# Equations of the paper\n", "The numbers are those of the paper (Nichol & Dhariwal "
             "2021). Equations that it takes over from earlier work and does not number have "
             "letters in the chapters.\n"]
    for number in sorted({n for n, _ in seen}, key=int):
        lines.append(f"(eq-{number})=\n## Eq. {number}\n")
        for _, place in [pair for pair in seen if pair[0] == number]:
            shown, = formula(books[place], number)
            where = f"{label(place)} {title(books[place])}"
            lines += [shown, f"Eq. {number} is [here, in {where}]"
                      f"(#eq-{number}-{place.replace('/', '-')}).\n"]
    return "\n".join(lines)


def formula(nb, number):
    "The equation itself."
    text = "\n\n".join(c.source for c in nb.cells if c.cell_type == "markdown")
    found = re.findall(r"\$\$.+?\$\$", text, re.S)
    return [f for f in found if rf"\tag{{{number}}}" in f][:1]


def pages(found, books, seen):
    "All pages of the reference: place -> text."
    made = {"reference/index.md": overview(found), "symbols.md": glossary(books),
            "equations.md": equations(books, seen)}
    for part in {m.part for m in found}:
        mine = [m for m in found if m.part == part]
        if any(m.public for m in mine): made[f"{page_of(part)[1:]}.md"] = part_page(part, mine)
    for m in found:
        made[f"source/{m.name}.md"] = source_page(m)
    listed = [f"{m.name} <{m.name}>" for m in found]
    made["source/index.md"] = "\n".join(
        ["---\nnosearch: true\n---\n", "# Source\n",
         "Every module as it is installed, with a way back to the chapter that made it.\n",
         "```{toctree}\n:maxdepth: 1\n", *listed, "```\n"])
    return made
