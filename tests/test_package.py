"""The wheel, used as a user uses it: in another folder, without the checkout, without a network."""
import json
import re

import numpy as np
from conftest import ROOT, TINY


def test_digits_travel_in_the_wheel(run, site):
    said = run("python", "import iddpm_nb.data as d; x = d.digits(); print(d.__file__, len(x), "
               "len(d.digits('test')), tuple(x.images.shape))")
    assert str(site) in said and "1500 297 (1500, 1, 8, 8)" in said


def test_the_shipped_model_travels_in_the_wheel(run, site):
    ask = ("import iddpm_nb; m = iddpm_nb.load('digits'); x = m.sample(2, 3, seed=0); "
           "print(iddpm_nb.__file__, tuple(x.shape), bool(x.isfinite().all()), len(m.schedule))")
    said = run("python", ask)
    assert str(site) in said and "(2, 1, 8, 8) True 1000" in said and not list(run.folder.iterdir())
    assert "2 images" in run("iddpm_sample", "digits", "--n", "2", "--steps", "3", "--device",
                             "cpu")
    assert (run.folder / "samples_2x3.png").exists()             # here, and not beside the weights
    assert "bits/dim" in run("iddpm_eval", "digits", "--n", "4", "--num-t", "12", "--device", "cpu")
    (run.folder / "digits").mkdir()                              # what is there comes first
    assert "neither a run" in run("iddpm_sample", "digits", "--n", "2", "--device", "cpu", status=1)


def test_a_folder_called_digits_comes_first(run):
    run("iddpm_train", "--steps", "2", "--out", "digits", *TINY)
    ask = ("import iddpm_nb; m = iddpm_nb.load('digits'); print(len(m.schedule), tuple(m.sample(2, "
           "3).shape))")
    assert "20 (2, 1, 8, 8)" in run("python", ask)  # its own chain, not the shipped 1,000
    assert "2 images" in run("iddpm_sample", "digits", "--n", "2", "--steps", "3", "--device",
                             "cpu")
    assert (run.folder / "digits" / "samples_2x3.png").exists()


def test_what_is_in_the_wheel(site):
    shipped = {p.name for p in (ROOT / "data" / "shipped").iterdir()}
    kept = {p.name: p.stat().st_size for p in (site / "iddpm_nb" / "_data").iterdir()
            if p.is_file()}
    assert shipped == kept.keys() and sum(kept.values()) < 5_000_000
    assert len(shipped) >= 7 and sum(kept.values()) > 3_000_000
    there = {p.relative_to(ROOT) for p in (ROOT / "iddpm_nb").rglob("*.py")}
    assert there == {p.relative_to(site) for p in (site / "iddpm_nb").rglob("*.py")}
    folders = {p.name for p in (ROOT / "nbs").iterdir() if list(p.glob("*.ipynb"))}
    assert len(folders) >= 8 and all((site / "iddpm_nb" / f / "__init__.py").exists()
                                     for f in folders)
    assert {p.name for p in site.iterdir() if not p.name.endswith("-info")} == {"iddpm_nb", "bin"}


def test_every_shipped_file_is_described():
    rows = re.findall(r"^\| `(.+?)` \|(.*)\|$", (ROOT / "data/shipped/README.md").read_text(), re.M)
    assert {name for name, _ in rows} == {p.name for p in (ROOT / "data" / "shipped").iterdir()}
    for name, row in rows:
        assert row.rstrip().endswith(("CC BY 4.0", "CC BY 2.0", "Apache 2.0")), name


def test_arrays_are_described():
    "Each array of the shipped files is named in the page beside them."
    told = set(re.findall(r"`(\w+)`", (ROOT / "data/shipped/README.md").read_text()))
    for file in (ROOT / "data" / "shipped").glob("*.npz"):
        names = {re.sub("_(free|clipped)$", "", name) for name in np.load(file).files}
        assert names and not names - told, (file.name, names - told)


def test_what_is_not_needed_is_not_imported(run):
    said = run("python", "import sys, iddpm_nb.train, iddpm_nb.data; print([m for m in "
               "('torchvision', 'matplotlib', 'fastcore', 'tyro') if m in sys.modules])")
    assert said.strip() == "[]"


def test_no_fastcore_at_runtime(site):
    modules = list((site / "iddpm_nb").rglob("*.py"))
    assert len(modules) > 40
    assert not [p for p in modules if "fastcore" in p.read_text() and p.name != "_modidx.py"]


def test_commands(run):
    said = run("iddpm_train", "--steps", "10", *TINY)
    folder = run.folder / "runs" / "digits"
    for name in ("samples.png", "curve.png", "result.json", "checkpoints/0000010"):
        assert (folder / name).exists() and str(folder / name) in said
    result = json.loads((folder / "result.json").read_text())
    assert (result["held_out"]["n"] == 297 and set(result["bits_per_dim_without_a_network"])
            == {"uniform", "histogram", "histogram_per_pixel"})
    assert "4 images" in run("iddpm_sample", "runs/digits", "--n", "4", "--steps", "5", "--device",
                             "cpu")
    assert "bits/dim" in run("iddpm_eval", "runs/digits", "--n", "8", "--device", "cpu")
    assert "Traceback" not in run("iddpm_train", "--out", "runs/digits", *TINY, status=1)


def test_where_files_go(run):
    run("iddpm_train", "--steps", "2", *TINY)
    checkpoint = "runs/digits/checkpoints/0000002"
    # a checkpoint is deleted one day, a run is not
    said = run("iddpm_sample", checkpoint, "--n", "2", "--steps", "5", "--device", "cpu")
    assert (str(run.folder / "runs" / "digits" / "samples_2x5.png") in said
            and not list((run.folder / checkpoint).glob("*.png")))
    for command in (["iddpm_sample", "runs/digits", "--out", "nowhere/a.png"],
                    ["iddpm_eval", "runs/digits", "--out", "nowhere/a.json"]):
        said = run(*command, "--device", "cpu", status=1)
        assert "there is no folder" in said and "Traceback" not in said


def test_help_names_every_option_with_its_default(run):
    said = run("iddpm_train", "--help")
    for option in ("--data", "--channels", "--T", "--loss", "--schedule", "--sampler", "--steps",
                   "--lr", "--ema", "--seed", "--resume", "--out", "--preset", "--clip", "--micro",
                   "--flip", "--ema-plain", "--precision", "--threads", "--compile", "--workers"):
        assert option in said
    assert said.count("default: ") > 35


def test_official_checkpoint(run, site):
    run("python", "import torch, iddpm_nb; from iddpm_nb.unet import UNet; "
        "torch.save(iddpm_nb.to_openai(UNet(1, 2, 32, (1,), 1, (), 8)), 'net.pt')")
    known = ["--image-size", "8", "--num-heads", "4", "--schedule", "cosine", "--T", "20",
             "--rescale-t", "True"]
    said = run("iddpm_convert", "net.pt", *known)
    assert str(run.folder / "net.safetensors") in said and (run.folder / "net.safetensors").exists()
    assert "2 images" in run("iddpm_sample", "net.safetensors", "--n", "2", "--steps", "5",
                             "--device", "cpu")
    assert "bits/dim" in run("iddpm_eval", "net.safetensors", "--data", "digits", "--n", "4",
                             "--device", "cpu")
    for command in ("iddpm_sample", "iddpm_eval", "iddpm_convert"):        # nothing is guessed
        said = run(command, "net.pt", status=1)
        assert "Traceback" not in said and "cifar10_uncond_50M_500K" in said
    assert "Traceback" not in run("iddpm_convert", "net.pt", *known, "--out", "net.safetensors",
                                  status=1)


def test_diffusers_is_not_imported_unasked(run):
    said = run("python", "import sys, iddpm_nb.cli.evaluate, iddpm_nb.interop.openai; "
               "print('diffusers' in sys.modules)")
    assert said.strip() == "False"


def test_figures_of_samples(run):
    run("iddpm_train", "--steps", "10", *TINY)
    asked = "--fid --pr --samples 40 --steps 5 --cache kept --device cpu".split()
    said = run("iddpm_eval", "runs/digits", *asked, "--out", "first.json")
    first = json.loads((run.folder / "first.json").read_text())
    assert ("FID, digits classifier: " in said and "precision, k = 5, digits classifier: " in said
            and "bits/dim" not in said)
    assert first["samples"] == {"images": "runs/digits", "n": 40, "steps": "5", "T": 20,
                                "method": "ddpm", "eta": 0.0, "variance": "learned",
                                "precision": "float32"}
    assert first["reference"] == {"images": "digits/train",
                                  "n": 1500} and first["weights"].startswith("ema_") and {"seed",
            "version", "commit", "machine", "seconds"} <= set(first)
    kept, = (run.folder / "kept").iterdir()
    whole = kept.read_bytes()
    kept.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))  # damaged: computed again
    run("iddpm_eval", "runs/digits", *asked, "--bpd", "--n", "4", "--out", "second.json")
    second = json.loads((run.folder / "second.json").read_text())
    assert kept.read_bytes() == whole and second["bits_per_dim"] > 0
    for name, figure in first["figures"].items():
        assert name != "FID" or figure["name"] != "FID"
        assert figure == second["figures"][name]


def test_figures_of_samples_on_disk(run):
    run("python", "import numpy as np, iddpm_nb.data as d; np.savez('made.npz', "
        "images=d.digits('test').images.numpy())")
    said = run("iddpm_eval", "made.npz", "--data", "digits", "--fid", "--pr", "--cache", "kept",
               "--device", "cpu")
    assert "of 297 samples against 1500 images of digits/train" in said
    for wrong in (["--fid"], ["--data", "digits"], ["--data", "digits", "--bpd", "--fid"]):
        assert "Traceback" not in run("iddpm_eval", "made.npz", *wrong, "--device", "cpu", status=1)


def test_figures_need_their_extra(run):
    assert run("python", "import sys, iddpm_nb.cli.evaluate; print('torch_fidelity' in "
               "sys.modules)").strip() == "False"
    run("python", "import numpy as np, iddpm_nb.data as d; np.savez('made.npz', "
        "images=d.digits('test').images.numpy())")
    line = ("import sys; sys.modules['torch_fidelity'] = None; from iddpm_nb.cli.evaluate import "
            "iddpm_eval; iddpm_eval('made.npz --data digits --fid --device cpu'.split())")
    said = run("python", line, status=1)
    assert "pip install 'iddpm_nb[eval]'" in said and "Traceback" not in said


def test_inception_that_cannot_be_fetched(run):
    run("python",
        "import numpy as np; np.savez('made.npz', images=np.zeros((4, 8, 8, 3), np.uint8))")
    line = ("import torch, urllib.error; from unittest import mock; from iddpm_nb.cli.evaluate "
            "import iddpm_eval; torch.hub.set_dir('hub')\n" "with "
            "mock.patch('torch.hub.download_url_to_file', side_effect=urllib.error.URLError('no "
            "network')): iddpm_eval('made.npz --data made.npz --fid --device cpu'.split())")
    said = run("python", line, status=1)
    assert ("weights-inception-2015-12-05-6726825d.pth" in said and "hub/checkpoints" in said
            and "--features" in said and "Traceback" not in said)


def test_lines_of_the_tables(run):
    line = ("iddpm_tables", "digits", "--rows", "cosine-120-hybrid", "--seeds", "0", "--device",
            "cpu")
    run(*line)
    record = run.folder / "results/tables/digits/cosine-120-hybrid-0.json"
    before = record.read_bytes()
    assert ({"bits", "samples", "options", "budget"} <= set(json.loads(before))
            and "commit" in json.loads(before)["measured"]["bits"])
    run(*line)
    assert record.read_bytes() == before
    said = run("iddpm_tables", "digits", "--rows", "cosine-120-hybird", status=1)
    assert "cosine-120-hybrid" in said and "Traceback" not in said
    assert "hours of a GPU" in run("iddpm_tables", "cifar10", "--rows", "cosine-4000-vlb",
                                   "--seeds", "0", "--plan")


def test_the_workbook_travels_in_the_wheel(run, site):
    book = site / "iddpm_nb" / "_book"
    chapters = {p.name for p in (ROOT / "nbs").glob("[0-9]*.ipynb")}
    assert chapters == {p.name for p in book.iterdir()} and len(chapters) > 15
    assert not [p for p in book.iterdir() if '"output_type"' in p.read_text()]
    wheel, = site.parent.glob("*.whl")
    assert wheel.stat().st_size < 5_000_000, "the package is too large"
    assert "7 functions to write" in run("iddpm_workbook", "03")
    made = run.folder / "workbook" / "03_posterior.ipynb"
    before = made.read_bytes()
    assert "stays as it is" in run("iddpm_workbook", "3") and made.read_bytes() == before
    assert "raise YourTurn" in made.read_text()
