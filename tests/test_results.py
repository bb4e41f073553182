"""The verdicts that are printed are those of the records that are committed; and with other
records the chapters that print them run, and say what these records say."""
import importlib
import json
import math
import shutil

import pytest
from conftest import ROOT

from iddpm_nb.reproduction.claims import (Claim, Compared, claims, compare, interval, orderings,
                                          read_records, seven, sign_of, verdict)

SCALES = "mnist16", "cifar16"
TABLES = ROOT / "results" / "tables"
RECORDS = sorted(TABLES.rglob("*.json"))


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


PLACES = {(-0.6, -0.3): "below", (-0.4, -0.1): "below, across", (-0.2, -0.1): "below, little",
          (-0.1, 0.1): "zero", (0.1, 0.2): "above, little", (0.1, 0.4): "above, across",
          (0.3, 0.6): "above", (-1.0, 1.0): "all", (math.nan, math.nan): "no number"}


@pytest.mark.parametrize("ends, place", PLACES.items(), ids=PLACES.values())
@pytest.mark.parametrize("kind", ["paper", "other", "ours"])
@pytest.mark.parametrize("rises", [True, False, None])
def test_each_place_of_an_interval_has_its_word(ends, place, kind, rises):
    low, high = ends
    said = verdict(Claim("", "", rises, (), (), True, kind=kind),
                   Compared((low + high) / 2, (high - low) / 2, 3))
    side = place.split(",")[0] if place.startswith(("above", "below")) else ""
    if kind == "ours":
        assert said == {"above": "rises", "below": "falls"}.get(side, "not resolved")
    elif rises is None:                                 # a vague word, within a factor of 1.25
        beyond = {"above": "not as read", "below": "not as read"}.get(place, "open")
        assert said == ("as read" if "little" in place or place == "zero" else beyond)
    else:
        right = {"above": rises, "below": not rises}.get(side)
        assert said == {True: "confirmed", False: "contradicted", None: "not resolved"}[right]


@pytest.mark.parametrize("seeds, half", [(1, None), (2, 1e-6)])
def test_fewer_than_three_seeds_have_no_verdict(seeds, half):
    for c in claims(1000):
        assert verdict(c, Compared(1.0, half, seeds)) == f"{seeds} of 3 seeds"


def test_a_bold_sign_stands_for_every_part():
    found = read_records(TABLES / "mnist16")
    for _, _, parts in orderings(1000, "-1clip"):
        every = [verdict(c, f) if (f := compare(c, found)) else "not run" for c in parts]
        whole = not any(v in ("not run", "void", "at the floor") or "seeds" in v for v in every)
        sign = sign_of(parts, found)
        assert sign.startswith("**") == whole
        assert all((c.what in sign) == (v == "not run" or "seeds" in v)
                   for c, v in zip(parts, every))


def test_the_last_step_is_left_out_as_the_record_says():
    for record in read_records(TABLES / "mnist16")["cosine-1000-hybrid"].values():
        g, left = record["gradients"]["vlb"], record["but_last"]["vlb"]
        p, G, T = g["p"][-1], g["G"][-1], 1000
        assert math.isclose((left["uniform"] * (T - 1) + G) / T, g["uniform"])
        whole = (left["importance"] * (T - 1)**2 / (1 - p) + G / p) / T**2
        assert math.isclose(whole, g["importance"])


def test_ddim_against_the_learned_variance_is_the_papers_claim():
    ddim = [c for c in claims(1000) if "DDIM" in c.what and "than learned" in c.what]
    assert {c.kind for c in ddim} == {"paper"} and len(ddim) == 8
    assert all(c.rises == (int(c.what.split()[0]) >= 50) for c in ddim)


def test_seeds_that_make_all_of_a_difference_have_students_interval():
    mean, half = interval([1.0, 2.0, 3.0])
    assert mean == 2 and math.isclose(half, 4.302653 / 3**0.5, rel_tol=1e-6)
    assert math.isclose(interval([1.0, 2.0, 3.0], 1 - 0.05 / 7)[1], 11.769 / 3**0.5, rel_tol=1e-3)


def test_there_are_seven_orderings():
    assert [len(parts) for _, _, parts in orderings(4000)] == [1, 2, 2, 2, 3, 3, 3]


def natural(found, seeds):
    "Records as of cifar16, made of those of the digits: every study, gradients clipped."
    for row in orderings(1000)[3][2][0].a[0], *SIX:
        for seed in range(seeds):
            r = json.loads(json.dumps(found[row][seed]))
            r.pop("but_last", None)
            r["budget"] |= {"images": 1000, "samples": 2000, "long_samples": 500}
            r["options"]["train"]["clip"], r["features"] = 1.0, "cifar10"
            r["bits"]["bits_per_dim"] = sum(r["bits"]["each"]) / len(r["bits"]["each"])
            if "few_steps" in r:
                few = r["few_steps"]
                few |= {f"ddim_{k}": few["ddim"] for k in ("stride", "quadratic")}
                for study, K in ("many_steps", "250"), ("full_length", None):
                    r[study] = {v: {K: d["100"]} if K else d["100"] for v, d in few.items()}
                for d in (d for v in few.values() for d in v.values()):
                    d |= {"pixels": d["distance"] / 10, "power": 1.0, "rings": [0.0]}
            if row == "cosine-1000-hybrid":
                r["floor"] = {"500": {"distance": 0.5}, "2000": {"distance": 0.2, "pixels": 0.1}}
                r["quiet_end"] = {v: r["few_steps"]["beta_tilde"] for v in ("0.99", "0.9", "0.5")}
                arms = dict.fromkeys(("beta", "beta_tilde", "learned", "exact", "best"),
                                     {"distance": 3.0})
                r["dial"] = {"K": 10, "samples": dict.fromkeys(("0.0", "0.5", "1.0"), arms)}
            yield f"{row}-{seed}.json", r


SIX = ("linear-250-simple", "linear-1000-simple", "linear-1000-hybrid", "cosine-1000-simple",
       "cosine-1000-vlb")


PROSE = "check_natural(records"      # holds sentences against the records that are committed


def run_chapter(name, start="", end="no such cell", module=None):
    "What a chapter's cells print and show, from the one with `start` to the one with `end`."
    nb = json.loads((ROOT / "nbs" / "reproduction" / name).read_text())
    code = ["".join(c["source"]) for c in nb["cells"] if c["cell_type"] == "code"]
    code = [s for s in code if not s.startswith("#|") and PROSE not in s]
    first = next(k for k, s in enumerate(code) if start in s)
    imports = [s for s in code[:first] if s.startswith(("from ", "import "))]
    said, names = [], {**(vars(importlib.import_module(module)) if module else {}),
                       "__name__": "__main__"}
    shows = dict.fromkeys(("Markdown", "print"), lambda *x, **k: said.append(" ".join(map(str, x))))
    for source in [*imports, *code[first:]]:
        exec(compile(source, name, "exec"), names)
        names |= shows                                  # after an import of IPython's own, too
        if end in source: break
    return "\n".join(said)


@pytest.fixture(params=[0, 1, 2, 3])
def home(request, tmp_path, monkeypatch):
    "A copy of the records of the digits, and so many seeds of natural images that are made up."
    there = tmp_path / "results" / "tables"
    shutil.copytree(TABLES / "mnist16", there / "mnist16")
    (there / "cifar16").mkdir()
    for name, record in natural(read_records(TABLES / "mnist16"), request.param):
        (there / "cifar16" / name).write_text(json.dumps(record))
    (tmp_path / "nbs" / "reproduction").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "nbs" / "reproduction")
    monkeypatch.setenv("MPLBACKEND", "Agg")
    return request.param


def test_the_results_say_what_is_there(home):
    said = run_chapter("00_results.ipynb")
    column = [line.split("|")[5].strip() for line in said.splitlines()
              if line.startswith("| ") and line.split("|")[1].strip() in set("1234567")]
    assert len(column) == 7
    if home == 0:
        assert set(column) == {"not run"} and "on the natural images not run: 1, 2, 3" in said
    elif home < 3:
        assert not any("**" in sign for sign in column), "a sign without a verdict"
        assert all(f"{home} of 3 seeds" in sign for sign in column[:3])
    else:
        # L_vlb of the digits failed where it was not clipped: void here, and so is no sign
        assert [sign.startswith("**") for sign in column] == [True] * 3 + [False] + [True] * 3
        assert "void" in column[3] and "all steps" not in column[4]
        assert "cause unknown" in said


def test_the_tables_and_the_dial_run_with_any_records(home, monkeypatch):
    parts = "iddpm_nb.reproduction"
    for count in "training_operations", "gpu_hours":    # they take their time, and do not matter
        monkeypatch.setattr(f"{parts}.lines.{count}", lambda scale, row: 1e13)
    said = run_chapter("04_tables.ipynb", "both = {", module=f"{parts}.tables")
    assert f"{6 * home} records of natural images" in said and "42 records of digits" in said
    dial = run_chapter("01a_dial.ipynb", "ARMS = ", "dial_row(scale, read(scale)", f"{parts}.dial")
    assert dial.count("not run") == (36 if home == 0 else 18)
    lines = run_chapter("03_lines.ipynb", "def missing", 'Markdown("', f"{parts}.lines")
    assert lines.count("| cifar16 |") == (6 if home < 3 else 0)
