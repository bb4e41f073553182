"""The book as a web site: python tools/website.py writes it to _site/; --serve shows it.

Nothing is executed and nothing is fetched, except once, by npm, what runs the model in the
playground; without it that page says what is missing. It needs pip install -e '.[docs]'.
"""
import argparse
import configparser
import functools
import http.server
import shutil
import sys
import zlib
from pathlib import Path

import nbformat
from book import NBS, notebooks
from sphinx.cmd.build import main as sphinx

sys.path.insert(0, str(NBS.parent))
from web import home, pages, playground, records, reference

ROOT = NBS.parent
WORK = ROOT / "build" / "website"


def put(path, data):
    "Write a file, if it says something new: what stays as it is need not be built again."
    if path.exists() and path.read_bytes() == data: return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def chapters():
    "All chapters as they are read, by their places below `nbs/`, without the index."
    books = {p.relative_to(NBS).with_suffix("").as_posix(): p for p in notebooks()}
    return {place: nbformat.read(p, 4) for place, p in books.items() if place != "index"}


def new_cell(kind, source):
    "A cell without an id of its own."
    return nbformat.from_dict({"cell_type": kind, "source": source, "metadata": {},
                               "id": f"note{zlib.crc32(source.encode())}"})


def sources(pictures):
    "All pages, place -> text; the bytes of their pictures go to `pictures`."
    books, seen = chapters(), []
    index = nbformat.read(NBS / "index.ipynb", 4)
    modules = reference.modules(ROOT / "iddpm_nb", books)
    public = {n for m in modules for n in m.public}
    made = {f"{place}.ipynb": nbformat.writes(pages.page(nb, place, public, seen, new_cell))
            for place, nb in books.items()}
    made |= home.pages(books, index)
    made |= reference.pages(modules, books, seen)
    made |= records.pages(ROOT, books | {"index": index}, pictures)
    made["playground.md"] = playground.page(WORK / "extra" / "playground", ROOT / "build" / "npm")
    return made


def stage(folder):
    "Write all sources, and take away those of chapters that are gone."
    pictures = {}
    made = {name: text.encode() for name, text in sources(pictures).items()}
    made |= {f"pictures/{name}": data for name, data in pictures.items()}
    for name, data in made.items():
        put(folder / name, data)
    for path in folder.rglob("*"):
        if path.is_file() and path.relative_to(folder).as_posix() not in made: path.unlink()


def config():
    "Where the repository is, as settings.ini says."
    settings = configparser.ConfigParser(delimiters=["="])
    settings.read(ROOT / "settings.ini", encoding="utf-8")
    s = settings["DEFAULT"]
    return ["-D", f"html_extra_path={WORK / 'extra'}",
            "-D", f"html_theme_options.repository_url={s['git_url']}",
            "-D", f"release={s['version']}"]


def build(site, fresh):
    "From the notebooks to the pages; a warning is an error."
    if fresh: shutil.rmtree(WORK, ignore_errors=True)
    if fresh and (site / ".buildinfo").exists(): shutil.rmtree(site)    # what an earlier build left
    stage(WORK / "source")
    status = sphinx(["-W", "--keep-going", "-q", "-b", "html", "-c", str(ROOT / "web"), "-d",
                     str(WORK / "doctrees"), "-j", "2", *config(), str(WORK / "source"), str(site)])
    if status:
        shutil.rmtree(WORK / "doctrees", ignore_errors=True)    # or the next build would be silent
        sys.exit("the site has the faults above")
    print(f"{len(list(site.rglob('*.html')))} pages in {site}; open index.html, or see all of it, "
          "the playground too, with --serve")


def serve(site, port):
    "Show the site to this machine's browser."
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=site)
    with http.server.ThreadingHTTPServer(("127.0.0.1", port), handler) as server:
        print(f"http://127.0.0.1:{server.server_port}/ (Ctrl-C ends it)", flush=True)
        server.serve_forever()


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "_site", help="where the site goes")
    parser.add_argument("--serve", action="store_true", help="show it afterwards")
    parser.add_argument("--port", type=int, default=8000, help="of --serve")
    parser.add_argument("--fresh", action="store_true", help="build every page again")
    told = parser.parse_args()
    build(told.out.resolve(), told.fresh)
    if told.serve: serve(told.out.resolve(), told.port)


if __name__ == "__main__": main()
