"""Chapters as pages: a copy of each notebook that a web page can be made of.

The source notebooks stay as they are. In the copy nbdev's directives do not show, imports and
checks fold, exported cells say what they export, equations of the paper can be linked to, and
pictures have a text for those who cannot see them.
"""
import ast
import copy
import posixpath
import re

PAPER = {str(n) for n in range(1, 21)}     # \tag{15}: a number of the paper's own
FOLDED = {"imports": "imports", "check": "a check"}
CHECKS = {"close", "must_fail", "refused", "typed", "sentence"}
DRAWS = {"figure": 0, "show_images": 1}    # where the caption stands among the arguments


def directives(source):
    "The names of nbdev's directives in a cell, with what follows them."
    found = re.findall(r"^#\|\s*(\w+):?[ \t]*(.*)$", source, re.M)
    return {name: rest.strip() for name, rest in found}


def bare(source):
    "The source of a cell without its directives."
    return re.sub(r"^#\|.*\n?", "", source, flags=re.M).strip("\n")


def parsed(source):
    "The tree of a cell; one with a magic, say, has none."
    try:
        return ast.parse(source)
    except SyntaxError:
        return ast.Module([], [])


def defined(source):
    "The names that a cell defines."
    for node in parsed(source).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)): yield node.name
        if isinstance(node, ast.Assign):
            targets = [t for target in node.targets
                       for t in (target.elts if isinstance(target, ast.Tuple) else [target])]
            yield from (t.id for t in targets if isinstance(t, ast.Name))
        if isinstance(node, ast.AnnAssign): yield node.target.id


def called(node):
    "The name of what is called, if it has a plain one."
    return node.func.id if isinstance(node.func, ast.Name) else ""


def drawn(cell):
    "Does this cell show a picture?"
    return any(k.startswith("image/") for o in cell.get("outputs", []) for k in o.get("data", {}))


def kind(cell):
    "What a cell is for, as far as it matters for folding it: imports, a check, or neither."
    body = parsed(bare(cell.source)).body
    if body and all(isinstance(n, (ast.Import, ast.ImportFrom)) for n in body): return "imports"
    nodes = list(ast.walk(ast.Module(body, [])))
    calls = {called(n) for n in nodes if isinstance(n, ast.Call)}
    checks = calls & CHECKS or any(name.startswith("check_") for name in calls)
    named = any(isinstance(n, ast.FunctionDef) and n.name.startswith("check_") for n in body)
    if not drawn(cell) and (checks or named): return "check"
    return ""


def words(node):
    "A text in code, as far as it is known before the code runs."
    if isinstance(node, ast.Constant): return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(n.value if isinstance(n, ast.Constant) else "…" for n in node.values)
    if isinstance(node, ast.BinOp): return words(node.left) + words(node.right)
    return ""


def captions(source):
    "The captions of the pictures that a cell draws."
    for node in ast.walk(parsed(source)):
        if not isinstance(node, ast.Call) or called(node) not in DRAWS: continue
        place = DRAWS[called(node)]
        said = [k.value for k in node.keywords if k.arg == "caption"] + node.args[place:place + 1]
        yield from filter(None, map(words, said[:1]))


def plain(text):
    "Markdown as plain words."
    text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", re.sub(r"[*`>$]|^#+ ", "", text, flags=re.M))
    return " ".join(text.split())


def described(cell, before, after):
    """What a picture shows, in words: its caption, or the heading above it and the first sentence
    after it."""
    said = " ".join(captions(bare(cell.source)))
    if said: return " ".join(said.split())
    headings = [line for c in before for line in c.source.splitlines() if line.startswith("#")]
    first = re.split(r"(?<=\.)\s", plain(after.source) if after else "")[0]
    return f"A picture of the section: {plain(headings[-1]) if headings else ''}. {first}".strip()


def numbered(source, place, seen):
    "A text in which each equation with a number of the paper can be linked to."
    def marked(m):
        found = [n for n in re.findall(r"\\tag\{(\w+)\}", m[0]) if n in PAPER]
        names = [f"(eq-{n}-{place})=" for n in found]
        seen.extend((n, place) for n in found)
        return "\n\n" + "\n".join([*names, m[0]]) if names else m[0]
    return re.sub(r"\$\$.+?\$\$", marked, source, flags=re.S)


def relinked(source, path):
    "A text whose links to the index lead to the first page of the site."
    home = posixpath.relpath("index", posixpath.dirname(path) or ".")
    return re.sub(r"\]\((?:\.\./)*index\.ipynb\)", f"]({home}.md)", source)


def ref(name):
    "The place of a public name in the reference; places do not tell `bits` from `Bits`."
    return f"ref-{name}" + "-class" * name[0].isupper()


def code_place(module, cell_id):
    "The names of the two places of an exported cell: in its chapter, and in its module."
    return f"cell-{module}-{cell_id}", f"src-{module}-{cell_id}"


def note(cell, module, public):
    "What is said above an exported cell."
    here, there = code_place(module, cell.id)
    names = [f"[`{n}`](#{ref(n)})" if n in public else f"[`{n}`](#{there})"
             for n in defined(bare(cell.source))]
    what = f"iddpm_nb.{module}"
    return (f"({here})=\n\n:::{{container}} exported-note\n{', '.join(names) or 'code'} "
            f"in [`{what}`](#{there})\n:::")


def code_cells(cell, found, module, public, new):
    "A code cell as it is shown, and what is said above it."
    source, tags = bare(cell.source), []
    if not source: return
    name = kind(cell)
    if "echo" in found: tags.append("remove-input")
    elif found.keys() & {"export", "exporti"} and name != "imports":
        yield new("markdown", note(cell, module, public))
        tags.append("exported")
    elif name:
        tags.append("hide-input")
        cell.metadata["mystnb"] = {"code_prompt_show": f"Show {FOLDED[name]}",
                                   "code_prompt_hide": f"Hide {FOLDED[name]}"}
    cell.source, cell.metadata["tags"] = source, tags
    yield cell


def page(nb, path, public, seen, new):
    """The copy of a notebook: `path` says where it lies, `public` which names have a place in the
    reference, `seen` collects the paper's equations, and `new(kind, source)` makes a cell."""
    nb, cells, module = copy.deepcopy(nb), [], ""
    place = path.replace("/", "-")
    texts = [c for c in nb.cells if c.cell_type == "markdown"]
    for c in nb.cells:
        c.metadata = type(c.metadata)()
        if c.cell_type == "markdown":
            c.source = relinked(numbered(c.source, place, seen), path)
            cells.append(c)
            texts = texts[1:]
        if c.cell_type != "code": continue
        found = directives(c.source)
        module = found.get("default_exp", module)
        if found.keys() & {"hide", "default_exp"}: continue
        before = [x for x in cells if x.cell_type == "markdown"]
        alt = described(c, before, texts[0] if texts else None)
        cells += code_cells(c, found, module, public, new)
        if drawn(c): c.metadata.setdefault("mystnb", {})["image"] = {"alt": alt}
    nb.cells, nb.metadata = cells, {"kernelspec": {"name": "python3", "display_name": "Python 3",
                                                   "language": "python"},
                                    "language_info": {"name": "python"}}
    return nb
