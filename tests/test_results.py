"""The verdicts that are printed are those of the records that are committed."""
import json

import pytest
from conftest import ROOT

from iddpm_nb.reproduction.claims import claims, compare, orderings, read_records, seven, verdict

SCALES = "mnist16", "cifar16"
TABLES = ROOT / "results" / "tables"
RECORDS = sorted(TABLES.rglob("*.json"))


def test_the_readme_prints_what_the_records_say():
    table = seven(*(read_records(TABLES / scale) for scale in SCALES))
    assert table in (ROOT / "README.md").read_text(), "run index.ipynb, and tools/readme.py"


def test_the_results_chapter_prints_what_the_records_say():
    nb = json.loads((ROOT / "nbs/reproduction/00_results.ipynb").read_text())
    said = ["".join(o["data"]["text/markdown"]) for c in nb["cells"] for o in c.get("outputs", [])
            if "text/markdown" in o.get("data", {})]
    assert seven(*(read_records(TABLES / scale) for scale in SCALES)) in said, "run 00_results"


@pytest.mark.parametrize("path", RECORDS, ids=lambda p: p.stem)
def test_a_figure_of_samples_is_named(path):
    record = json.loads(path.read_text())
    few = [v for way in record.get("few_steps", {}).values() for v in way.values()]
    once = [v for k in ("full_length", "skipped") for v in record.get(k, {}).values()]
    assert all("distance" in v for v in [*few, *once])
    assert path.stem == f"{record['row']}-{record['seed']}"


def test_a_failed_training_confirms_nothing():
    found = read_records(TABLES / "mnist16")
    said = {c.what: verdict(c, compare(c, found)) for c in claims(1000) if compare(c, found)}
    wrecked = [what for what in said if what.startswith(("L_hybrid to L_vlb: ",
                                                         "L_hybrid to L_vlb, both trained"))]
    assert len(wrecked) == 4 and {said[what] for what in wrecked} == {"void"}


def test_nothing_of_ours_and_no_vague_word_is_contradicted():
    for scale in SCALES:
        found = read_records(TABLES / scale)
        for c in claims(1000):
            f = compare(c, found)
            if f and (c.kind == "ours" or c.rises is None):
                assert verdict(c, f) not in ("contradicted", "confirmed"), c.what


def test_there_are_seven_orderings():
    assert [len(parts) for _, _, parts in orderings(4000)] == [1, 2, 2, 2, 3, 2, 2]
