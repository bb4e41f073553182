"""The model card is the record; a model goes to the hub and comes back. There is no network here:
the calls of huggingface_hub are caught.
"""
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch

import iddpm_nb
from conftest import ROOT
from iddpm_nb.checks import sentence, typed
from iddpm_nb.running import underway
from iddpm_nb.running.model import load
from iddpm_nb.running.run import train_run
from iddpm_nb.running.sharing import card, from_hub, push_to_hub
from iddpm_nb.training.config import Config, DataConfig, DiffusionConfig, ModelConfig, TrainConfig
from iddpm_nb.cli.sample import iddpm_sample

SMALL = ModelConfig(channels=8, groups=4, num_heads=2, mult=(1,), attn_resolutions=())


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "A judged run of a few steps, with classes and a licence."
    folder = tmp_path_factory.mktemp("shared") / "run"
    t = TrainConfig(steps=4, batch=4, warmup=0, save_every=2, log_every=1, licence="mit")
    c = Config(DataConfig(class_cond=True), SMALL, DiffusionConfig(T=20), t)
    before, underway.curve = underway.curve, lambda folder: None
    train_run(c, out=folder, device="cpu", progress=False, say=lambda text: None)
    underway.curve = before
    return folder


def test_the_card_is_the_record_in_both_places(run):
    record, about = json.loads((run / "result.json").read_text()), load(run).config
    want = card(about, record, "run")
    for place in run, run / "checkpoints/0000004":
        assert (place / "README.md").read_text() == want
    assert not (run / "checkpoints/0000002/README.md").exists()


def test_every_figure_stands_with_its_protocol(run):
    record, text = json.loads((run / "result.json").read_text()), (run / "README.md").read_text()
    h, s = record["held_out"], record["samples"]
    rows = re.findall(r"^\| (.+?) \| ([\d.]+)(?: ± ([\d.]+))? \| (.+) \|$", text, re.M)
    assert [r[0] for r in rows] == [
        "bits per dimension", "distance to the nearest training image",
        "share of which a classifier is over 0.9 sure", "distance to the nearest training image",
        "share of which a classifier is over 0.9 sure",
        "share in which a classifier sees the class asked for"]
    near, sure = "distance_to_nearest_training_image", "share_a_classifier_is_sure_of"
    want = [h["bits_per_dim"], s[near], s[sure], h[near], h[sure],
            s["share_of_the_class_asked_for"]]
    assert all(abs(float(r[1]) - v) <= 5e-4 for r, v in zip(rows, want))
    assert f"{h['n']} images" in rows[0][3] and f"{h['num_t']} of 20 steps" in rows[0][3]
    assert f"{s['n']} samples, {s['steps']} steps, ddpm" in rows[1][3]
    assert s["precision"] in rows[1][3] and "float32" in rows[0][3]


def test_the_licence_and_the_data_are_those_that_were_given(run):
    text = (run / "README.md").read_text()
    assert text.startswith("---\nlibrary_name: iddpm_nb\n") and '\nlicense: "mit"\n' in text
    assert "| licence of the weights | mit |" in text
    assert f"trained with iddpm_nb {iddpm_nb.__version__}." in text
    about = load("digits").config
    assert "license:" not in card(about, {}, "x") and "| not stated |" in card(about, {}, "x")


def test_an_official_file_gets_a_card_too():
    from iddpm_nb.interop.openai import RELEASED, describe_openai
    for name, known in RELEASED.items():
        network = {"in_channels": 3, "channels": 128, "mult": (1, 2)} | known["network"]
        text = card(describe_openai(network, known, name), {}, name)
        assert "not recorded" not in text.partition("## Figures")[2]
        assert "Nothing was measured" in text


class Hub:
    "In the place of the hub: a folder."
    def __init__(self, home): self.home, self.asked = home, []

    def create_repo(self, api, name, private=None, exist_ok=False):
        self.asked.append((name, private, exist_ok))
        return f"https://hub/{name}"

    def create_commit(self, api, name, operations, commit_message):
        (self.home / name).mkdir(parents=True, exist_ok=True)
        for op in operations:
            with op.as_file() as f:
                (self.home / name / op.path_in_repo).write_bytes(f.read())

    def snapshot_download(self, name, revision=None, allow_patterns=None):
        self.asked.append((name, revision, allow_patterns))
        if not (self.home / name).is_dir(): raise RuntimeError("404 Client Error.\n\nmore of it")
        return str(self.home / name)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    real = pytest.importorskip("huggingface_hub")
    fake = Hub(tmp_path / "hub")
    for name in "create_repo", "create_commit":
        f = getattr(fake, name)
        monkeypatch.setattr(real.HfApi, name, lambda api, *args, f=f, **how: f(api, *args, **how))
    monkeypatch.setattr(real, "snapshot_download", fake.snapshot_download)
    return fake


def test_there_and_back(run, hub):
    assert push_to_hub(run, "me/digits", private=True) == "https://hub/me/digits"
    assert hub.asked == [("me/digits", True, True)]
    mine, back = load(run), iddpm_nb.load("hf://me/digits")
    for k, v in mine.net.state_dict().items():
        assert torch.equal(v, back.net.state_dict()[k])
    assert back.config == mine.config
    last = iddpm_nb.load("hf://me/digits", "model")
    assert not torch.equal(last.net.conv_in.weight, back.net.conv_in.weight)
    sent = {p.name for p in (hub.home / "me/digits").iterdir()}
    assert not sent & {"state.pt", "config.json", "checksums.json"} and "samples.png" in sent
    text = (hub.home / "me/digits/README.md").read_text()
    assert "iddpm_nb.load('hf://me/digits')" in text and "# digits\n" in text
    assert str(run) not in text


def test_what_train_run_returns_is_taken_and_a_revision_is_asked_for(run, hub):
    class Returned(dict):
        folder = run
    push_to_hub(Returned(), "me/digits")
    from_hub("hf://me/digits@v1")
    name, revision, patterns = hub.asked[-1]
    assert (name, revision) == ("me/digits", "v1") and patterns == ["*.safetensors", "*.json"]


def test_the_command_takes_an_address(run, hub, tmp_path):
    push_to_hub(run, "me/digits")
    line = "hf://me/digits --n 2 --steps 3 --out two.png --device cpu"
    status, _, err = typed(iddpm_sample, line, tmp_path)
    assert status == 0 and (tmp_path / "two.png").exists(), err
    says = sentence(iddpm_sample, "hf://me/cats --n 2 --device cpu", tmp_path)
    assert "hf://me/cats cannot be fetched: 404 Client Error." in says


def test_a_damaged_run_is_not_sent(run, hub, tmp_path):
    mine = Path(shutil.copytree(run, tmp_path / "mine"))
    for p in (mine / "checkpoints").glob("*/model.safetensors"):
        p.write_bytes(p.read_bytes()[:-1])
    with pytest.raises(ValueError, match="no whole checkpoint to send"):
        push_to_hub(mine, "me/digits")
    assert not hub.home.exists() and hub.asked == []


@pytest.mark.parametrize("address", ["hf://digits", "hf://a/b/c", "hf://", "hf:///x", "hf://a b/c"])
def test_a_name_that_is_none(address):
    with pytest.raises(ValueError, match="no name of a model on the hub"):
        iddpm_nb.load(address)


def test_without_the_package(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(OSError, match="pip install huggingface_hub"):
        iddpm_nb.load("hf://me/digits")
    with pytest.raises(ImportError, match="pip install huggingface_hub"):
        push_to_hub(run, "me/digits")


def test_the_version_is_the_same_everywhere():
    said = {re.search(pattern, (ROOT / name).read_text(), re.M)[1] for name, pattern in (
        ("settings.ini", r"^version = (.+)$"), ("CITATION.cff", r"^version: (.+)$"),
        ("CHANGELOG.md", r"^## (.+)$"), ("iddpm_nb/__init__.py", r'^__version__ = "(.+)"$'))}
    assert said == {iddpm_nb.__version__}


def test_no_pair_of_versions_is_claimed_that_was_not_run():
    record = json.loads((ROOT / "results/versions.json").read_text())
    words = re.compile(r"passed|failed: .+|not run: .+")
    assert all(words.fullmatch(p["result"]) for p in record["pairs"])
    ran = [p for p in record["pairs"] if p["result"] == "passed"]
    assert all(p["tests"]["passed"] > 0 and not p["tests"].get("failed") for p in ran)
    text = (ROOT / "CONTRIBUTING.md").read_text()
    for p in record["pairs"]:
        assert f"| {p['python']} | {p['torch']} | {p['result']} |" in text
