"""Where numbers go besides metrics.jsonl: a table, Weights & Biases (offline), TensorBoard; and
after a run was killed and continued.
"""
import csv
import dataclasses
import importlib.util
import json
import shutil
import subprocess
import sys
import types

import pytest
from conftest import clean_env
from iddpm_nb.checks import sentence
from iddpm_nb.running import underway
from iddpm_nb.running.run import train_run
from iddpm_nb.training import log as logs
from iddpm_nb.training.config import Config, DiffusionConfig, ModelConfig, TrainConfig
from iddpm_nb.training.log import boards, in_columns, log, read_log
from iddpm_nb.cli.train import iddpm_train

HERE = {name: importlib.util.find_spec(name) is not None for name in ("wandb", "tensorboard")}
C = Config(model=ModelConfig(channels=8, groups=4, num_heads=2, mult=(1,), attn_resolutions=()),
           diffusion=DiffusionConfig(T=20),
           train=TrainConfig(steps=6, batch=4, warmup=0, save_every=2, log_every=1, keep=9))


@pytest.fixture(autouse=True)
def undrawn(monkeypatch):
    monkeypatch.setattr(underway, "curve", lambda folder: None)
    logs.SAID.clear()


def trained(out, *kinds, **how):
    c = dataclasses.replace(C, train=dataclasses.replace(C.train, log=kinds))
    train_run(c, out=out, device="cpu", progress=False, judged=False, say=lambda text: None, **how)


def record(folder):
    "step -> its numbers, as metrics.jsonl has them."
    found = {}
    for row in read_log(folder):
        found.setdefault(row["step"], {}).update(in_columns(row))
    return found


def table(folder):
    "The same as metrics.csv has them; no step may be there twice."
    with open(folder / "metrics.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    found = {int(r["step"]): {k: float(v) for k, v in r.items() if v != ""} for r in rows}
    assert len(found) == len(rows)
    return found


def cut_back(folder, *steps):
    "As if the process had been killed after its log and before these checkpoints."
    for step in steps:
        shutil.rmtree(folder / f"checkpoints/{step:07d}")
    (folder / "result.json").unlink()


def test_a_table_is_the_record_and_stays_it_when_the_run_goes_on(tmp_path):
    trained(tmp_path / "run", "csv")
    whole = table(tmp_path / "run")
    assert whole == record(tmp_path / "run") and sorted(whole) == [*range(1, 7)]
    assert [k for k, v in whole.items() if "held_out" in v] == [2, 4, 6]
    cut_back(tmp_path / "run", 4, 6)
    trained(None, "csv", resume_from=tmp_path / "run")
    again = table(tmp_path / "run")
    for name in "loss", "lr", "grad_norm", "held_out":
        mine, its = ({k: v.get(name) for k, v in t.items()} for t in (again, whole))
        assert mine == its, name


def test_a_table_may_be_asked_for_later_and_left_out_again(tmp_path):
    trained(tmp_path / "run")
    assert not (tmp_path / "run/metrics.csv").exists()
    cut_back(tmp_path / "run", 6)
    trained(None, "csv", resume_from=tmp_path / "run")
    assert table(tmp_path / "run") == record(tmp_path / "run")
    cut_back(tmp_path / "run", 6)
    trained(None, resume_from=tmp_path / "run")       # log may change
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert config["train"]["log"] == []


def test_a_table_that_is_gone_or_in_the_way_ends_nothing(tmp_path):
    (tmp_path / "metrics.csv").mkdir()
    with pytest.warns(UserWarning, match="metrics.csv gets no numbers"):
        assert "metrics.csv" not in boards(tmp_path, 0, ("csv",))
    (tmp_path / "metrics.csv").rmdir()
    to = boards(tmp_path, 0, ("csv",))
    (tmp_path / "metrics.csv").unlink()
    with pytest.warns(UserWarning, match="metrics.csv does not get all numbers"):
        log(tmp_path, {"step": 1, "loss": 1.0}, to)
    assert read_log(tmp_path) == [{"step": 1, "loss": 1.0}]


@pytest.mark.parametrize("name", ["wandb", "tensorboard"])
def test_what_is_not_installed_is_refused_in_one_sentence(name, tmp_path, monkeypatch):
    monkeypatch.setattr(logs.importlib.util, "find_spec", lambda name: None)
    said = sentence(iddpm_train, f"--log csv {name} --steps 1 --device cpu", tmp_path)
    assert f"pip install {name}" in said and not (tmp_path / "runs").exists()


def test_an_unknown_one_is_refused(tmp_path):
    with pytest.raises(ValueError, match="log"):
        trained(tmp_path / "run", "paper")


class Recorder(types.ModuleType):
    "In the place of the package wandb: what it was asked for."
    def __init__(self):
        super().__init__("wandb")
        self.asked, self.rows, self.ended = [], [], 0

    def init(self, **how):
        self.asked.append(how)
        return types.SimpleNamespace(log=lambda row, step: self.rows.append((step, row)),
                                     finish=self.finish)

    def finish(self): self.ended += 1


def test_wandb_gets_every_number_and_a_continued_run_has_the_same_number(tmp_path, monkeypatch):
    fake = Recorder()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr(logs, "check_loggers", lambda kinds: None)
    monkeypatch.setattr("iddpm_nb.running.run.check_loggers", lambda kinds: None)
    trained(tmp_path / "run", "wandb")
    sent = {}
    for step, row in fake.rows:
        sent.setdefault(step, {"step": step}).update(row)
    assert sent == record(tmp_path / "run") and fake.ended == 1
    cut_back(tmp_path / "run", 4, 6)
    trained(None, "wandb", resume_from=tmp_path / "run")
    first, second = fake.asked
    assert first["id"] == second["id"] and second["resume"] == "allow" and fake.ended == 2
    assert first["config"]["train"]["steps"] == 6 and first["name"] == "run"
    trained(tmp_path / "other", "wandb")
    assert fake.asked[2]["id"] != first["id"]


def test_a_wandb_that_raises_ends_nothing(tmp_path, monkeypatch):
    broken = types.ModuleType("wandb")
    def init(**how): raise RuntimeError("no network")
    broken.init = init
    monkeypatch.setitem(sys.modules, "wandb", broken)
    with pytest.warns(UserWarning, match="Weights & Biases gets no numbers: no network"):
        assert boards(tmp_path, 0, ("wandb",)).keys() <= {"TensorBoard"}


@pytest.mark.skipif(not HERE["wandb"], reason="wandb is not installed")
def test_the_real_wandb_offline(tmp_path):
    lines = ["import sys", "from iddpm_nb.cli.train import iddpm_train",
             "iddpm_train(sys.argv[1:])"]
    how = ("--log wandb csv --channels 8 --groups 4 --num-heads 2 --mult 1 --attn-resolutions "
           "--T 20 --batch 4 --warmup 0 --save-every 2 --log-every 1 --device cpu").split()
    env = clean_env(WANDB_MODE="offline", PYTHONPATH=":".join(sys.path), WANDB_SILENT="true")
    def go(*more):
        p = subprocess.run([sys.executable, "-c", "\n".join(lines), *more], cwd=tmp_path, env=env,
                           capture_output=True, text=True)
        assert p.returncode == 0, p.stderr
        assert "warning" not in p.stderr.lower() or "resume" in p.stderr, p.stderr
    go(*how, "--steps", "4", "--out", "run")
    go("--resume", "run", "--steps", "6")
    kept = sorted((tmp_path / "run/wandb").glob("offline-run-*"))
    names = {p.name.rpartition("-")[2] for p in kept}
    assert len(kept) == 2 and names == {(tmp_path / "run/wandb.id").read_text()}
    assert sorted(table(tmp_path / "run")) == [*range(1, 7)]


@pytest.mark.skipif(not HERE["tensorboard"], reason="TensorBoard is not installed")
def test_the_real_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    trained(tmp_path / "run", "tensorboard")
    cut_back(tmp_path / "run", 4, 6)
    trained(None, "tensorboard", resume_from=tmp_path / "run")
    seen = EventAccumulator(str(tmp_path / "run/tensorboard")).Reload()
    steps = [e.step for e in seen.Scalars("loss")]
    assert steps == [*range(1, 7)]
