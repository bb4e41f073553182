"""The wheel, used as a user uses it: in another folder, without the checkout, without a network."""
import json

from conftest import TINY


def test_digits_travel_in_the_wheel(run, site):
    said = run("python", "import iddpm_nb.data as d; x = d.digits(); print(d.__file__, len(x), len(d.digits('test')), tuple(x.images.shape))")
    assert str(site) in said and "1500 297 (1500, 1, 8, 8)" in said


def test_what_is_not_needed_is_not_imported(run):
    said = run("python", "import sys, iddpm_nb.train, iddpm_nb.data; print([m for m in ('torchvision', 'matplotlib', 'fastcore', 'tyro') if m in sys.modules])")
    assert said.strip() == "[]"


def test_no_fastcore_at_runtime(site):
    assert not [p for p in (site / "iddpm_nb").glob("*.py") if "fastcore" in p.read_text() and p.name != "_modidx.py"]


def test_commands(run):
    said = run("iddpm_train", "--steps", "10", *TINY)
    folder = run.folder / "runs" / "digits"
    for name in ("samples.png", "curve.png", "result.json", "checkpoints/0000010"):
        assert (folder / name).exists() and str(folder / name) in said
    result = json.loads((folder / "result.json").read_text())
    assert result["held_out"]["n"] == 297 and set(result["bits_per_dim_without_a_network"]) == {"uniform", "histogram", "histogram_per_pixel"}
    assert "4 images" in run("iddpm_sample", "runs/digits", "--n", "4", "--steps", "5", "--device", "cpu")
    assert "bits/dim" in run("iddpm_eval", "runs/digits", "--n", "8", "--device", "cpu")
    assert "Traceback" not in run("iddpm_train", "--out", "runs/digits", *TINY, status=1)


def test_help_names_every_option_with_its_default(run):
    said = run("iddpm_train", "--help")
    for option in ("--data", "--channels", "--T", "--loss", "--schedule", "--sampler", "--steps", "--lr", "--ema", "--seed", "--resume", "--out"):
        assert option in said
    assert said.count("default: ") > 25


def test_official_checkpoint(run, site):
    run("python", "import torch, iddpm_nb; from iddpm_nb.unet import UNet; torch.save(iddpm_nb.to_openai(UNet(1, 2, 32, (1,), 1, (), 8)), 'net.pt')")
    known = ["--image-size", "8", "--num-heads", "4", "--schedule", "cosine", "--T", "20", "--rescale-t", "True"]
    said = run("iddpm_convert", "net.pt", *known)
    assert str(run.folder / "net.safetensors") in said and (run.folder / "net.safetensors").exists()
    assert "2 images" in run("iddpm_sample", "net.safetensors", "--n", "2", "--steps", "5", "--device", "cpu")
    assert "bits/dim" in run("iddpm_eval", "net.safetensors", "--data", "digits", "--n", "4", "--device", "cpu")
    for command in ("iddpm_sample", "iddpm_eval", "iddpm_convert"):        # nothing is guessed
        said = run(command, "net.pt", status=1)
        assert "Traceback" not in said and "cifar10_uncond_50M_500K" in said
    assert "Traceback" not in run("iddpm_convert", "net.pt", *known, "--out", "net.safetensors", status=1)


def test_diffusers_is_not_imported_unasked(run):
    said = run("python", "import sys, iddpm_nb.cli, iddpm_nb.interop; print('diffusers' in sys.modules)")
    assert said.strip() == "False"
