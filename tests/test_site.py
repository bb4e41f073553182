"""The book as a web site: what becomes of cells and docstrings, and that every link of the built
pages leads somewhere. What needs a browser is in test_browser.py."""
import json
import re
import sys
from html.parser import HTMLParser
from urllib.parse import unquote, urlsplit

import nbformat
import pytest
from conftest import ROOT, write_site

pytest.importorskip("sphinx_book_theme")
sys.path.extend(map(str, (ROOT, ROOT / "tools")))
from web import docments, pages, playground, reference

HEAVIEST = 1_500_000       # bytes of a page with its pictures


def cell(source, kind="code", picture=False):
    c = {"cell_type": kind, "source": source, "metadata": {}, "id": f"c{abs(hash(source))}"[:12]}
    if kind == "code": c |= {"execution_count": None, "outputs": []}
    if picture:
        c["outputs"] = [{"output_type": "display_data", "metadata": {},
                         "data": {"image/jpeg": "aGk="}}]
    return c


def made(*cells, place="04_x"):
    "A page of these cells, and the equations that were seen."
    nb = nbformat.from_dict({"cells": list(cells), "metadata": {}, "nbformat": 4,
                             "nbformat_minor": 5})
    before, seen = nbformat.writes(nb), []
    new = lambda kind, source: nbformat.from_dict(cell(source, kind))
    done = pages.page(nb, place, {"f"}, seen, new)
    assert nbformat.writes(nb) == before, "the notebook itself was changed"
    return done.cells, seen


def test_directives_and_hidden_cells_are_gone():
    cells, _ = made(cell("#| default_exp a.b"), cell("#| hide\nx = 1"),
                    cell("#| slow\n# why\ny = 2"), cell("#| export\ndef f(x): return x"))
    text = "\n".join(c.source for c in cells)
    assert "#|" not in text and "x = 1" not in text and "# why\ny = 2" in text
    note, code = cells[-2:]
    assert "[`f`](#ref-f)" in note.source and "iddpm_nb.a.b" in note.source
    assert code.metadata["tags"] == ["exported"]


@pytest.mark.parametrize("source, picture, kind", [
    ("import torch\nfrom x import y", False, "imports"), ("close(a, b, 1)", False, "check"),
    ("def check_it(): pass\nx = 1", False, "check"), ("print(must_fail(f))", False, "check"),
    ("figure('x')\nclose(a, b, 1)", True, ""), ("x = 1\nprint(x)", False, ""),
    ("%magic", False, "")])
def test_what_folds(source, picture, kind):
    assert pages.kind(nbformat.from_dict(cell(source, picture=picture))) == kind


def test_pictures_have_words():
    cells, _ = made(cell("# T\n## The curve", "markdown"),
                    cell("fig, ax = figure('What to ' 'notice', 2)", picture=True),
                    cell("show_images(x, f'{n} digits')", picture=True),
                    cell("ax.plot(x)", picture=True), cell("It *falls*. And more.", "markdown"))
    alts = [c.metadata["mystnb"]["image"]["alt"] for c in cells if pages.drawn(c)]
    assert alts == ["What to notice", "… digits", "A picture of the section: The curve. It falls."]


def test_equations_can_be_linked_to():
    cells, seen = made(cell("so\n$$a\n\\tag{15}$$\nand $$b \\tag{ii}$$", "markdown"))
    assert "\n\n(eq-15-04_x)=\n$$a" in cells[0].source and seen == [("15", "04_x")]
    assert "eq-ii" not in cells[0].source


def test_links_to_the_index_lead_to_the_first_page():
    assert pages.relinked("[x](../index.ipynb)", "cli/01_a") == "[x](../index.md)"
    assert pages.relinked("[x](index.ipynb), [y](01_a.ipynb)", "00_a") == ("[x](index.md), "
                                                                           "[y](01_a.ipynb)")


SOURCE = '''
LIMIT = 3   # of tries
def f(
    x:Tensor, y:int=2, # images, and how many
    *,
    z:str="a|b",       # a choice:
                       # of two
) -> Tensor: # (B,C), in [-1,1]
    """What it does."""
    check_y(y)
    require(z, f"z must be said, got {z}", TypeError)
    return x
def check_y(y):
    if y < 0: raise ValueError("y is negative")
class K:
    "A thing."
    def __init__(self, n:int): self.n = n # how many
    def go(self, t:int=0) -> int: # more
        "Go."
        return t
    def _own(self): pass
'''


def test_docments_are_read():
    limit, f, k = docments.entries(SOURCE, ["LIMIT", "f", "K"])
    assert (limit.value, limit.doc) == ("3", "of tries")
    assert f.signature == "f(x, y=2, *, z='a|b')" and f.doc == "What it does."
    assert [(a.name, a.said) for a in f.arguments] == [
        ("x", "images, and how many"), ("y", "images, and how many"),
        ("z", "a choice: of two")]
    assert f.returns == "`Tensor` – (B,C), in [-1,1]"
    assert f.refusals == [("TypeError", "z must be said, got …"), ("ValueError", "y is negative")]
    assert k.signature == "K(n)" and [m.name for m in k.methods] == ["K.go"]


def test_every_public_name_is_in_the_reference_once():
    import website
    found = reference.modules(ROOT / "iddpm_nb", website.chapters())
    made_ = reference.pages(found, website.chapters(), [])
    text = "\n".join(t for name, t in made_.items() if name.startswith("reference/"))
    names = [n for m in found for n in m.public]
    assert len(names) == len(set(names)) >= 150
    for n in names:
        assert text.count(f"({pages.ref(n)})=\n") == 1, n
        assert re.search(rf"^### `{n}`\n\n\*\[chapter: ", text, re.M), n


def test_what_npm_sends_must_be_what_is_known(tmp_path):
    (tmp_path / f"{playground.RUNTIME}-{playground.VERSION}.tgz").write_bytes(b"something else")
    assert "was not onnxruntime-web" in playground.runtime(tmp_path)
    assert not list(tmp_path.iterdir())


def test_without_npm_the_page_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    text = playground.page(tmp_path / "extra", tmp_path / "npm")
    assert "was not built: there was no npm" in text.replace("\n", " ") and "<script" not in text


class Page(HTMLParser):
    "Places, links and pictures of a page."
    def __init__(self, text):
        super().__init__()
        self.ids, self.links, self.images, self.fetched = set(), [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        if a.get("id"): self.ids.add(a["id"])
        if tag == "a" and a.get("href"): self.links.append(a["href"])
        if tag == "img": self.images.append((a.get("src", ""), a.get("alt", "")))
        if tag == "script" and a.get("src"): self.fetched.append(a["src"])
        if tag == "link" and a.get("rel") not in ("canonical", "index", "search", "next", "prev"):
            self.fetched.append(a["href"])


@pytest.fixture(scope="module")
def built():
    "The site, as the command writes it: path -> page."
    found = {p: Page(p.read_text(encoding="utf-8")) for p in write_site().rglob("*.html")}
    return {p: page for p, page in found.items() if "_static" not in p.parts}


def test_every_chapter_has_a_page(built):
    import website
    for place in website.chapters():
        assert ROOT / "_site" / f"{place}.html" in built, place
    for name in ("index", "contents", "playground", "gallery", "measured", "symbols", "equations",
                 "search", "reference/index", "source/forward"):
        assert ROOT / "_site" / f"{name}.html" in built, name


def test_every_link_leads_somewhere(built):
    dead = []
    for path, page in built.items():
        for link in page.links:
            to = urlsplit(link)
            if to.scheme or link.startswith("//"): continue
            target = (path.parent / unquote(to.path)).resolve() if to.path else path
            if not target.is_file(): dead.append((path.name, link))
            elif to.fragment and target in built:
                if unquote(to.fragment) not in built[target].ids: dead.append((path.name, link))
    assert not dead, dead[:10]


def test_nothing_comes_from_elsewhere(built):
    for path, page in built.items():
        away = [f for f in page.fetched if urlsplit(f).scheme or f.startswith("//")]
        assert not away, (path, away)


def test_pictures_have_words_and_pages_are_light(built):
    for path, page in built.items():
        weight = path.stat().st_size
        for src, alt in page.images:
            if src.startswith("data:"): continue
            picture = (path.parent / unquote(src)).resolve()
            assert picture.is_file(), (path, src)
            assert len(alt.split()) > 2, (path, src, alt)
            weight += picture.stat().st_size
        assert weight < HEAVIEST, (path, weight)


def test_directives_do_not_show(built):
    "As the first line of a cell; a chapter may write of them."
    for path in built:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"<pre>(<span></span>)?<span[^>]*>#\| ?\w", text), path


def test_the_starred_path_and_the_order(built):
    import website
    first = built[ROOT / "_site" / "contents.html"]
    links = [unquote(urlsplit(x).path).removesuffix(".html") for x in first.links]
    order = list(website.chapters())
    found = [x for x in links if x in order]
    # in the sidebar, in the starred path and in the list; the last has them all, as they are read
    assert found[-len(order):] == order


def test_measured_figures_are_those_of_the_records(built):
    text = (ROOT / "_site" / "measured.html").read_text(encoding="utf-8")
    r = json.loads((ROOT / "data/shipped/digits.json").read_text())
    assert f"{r['held_out']['bits_per_dim']:.2f} ±" in text
    mnist = json.loads((ROOT / "results/mnist32.json").read_text())
    assert f"{mnist['held_out']['bits_per_dim']:.3f} ±" in text
