"""The likelihood of the flow, as a user types it: iddpm_eval --ode, for models with classes and
upsamplers, and what it refuses."""
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ask

from iddpm_nb import load
from iddpm_nb.cli.train import iddpm_train
from iddpm_nb.data import digits
from iddpm_nb.measuring.flow_likelihood import FlowPath, model_flow
from iddpm_nb.training.predicts import Predicts

RUN = ("--channels 8 --groups 4 --num-heads 2 --mult 1 --attn-resolutions --T 40 --steps 3 "
       "--batch 8 --warmup 0 --log-every 3 --save-every 3 --device cpu")
ODE = "--ode --n 2 --device cpu"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    "Runs on 60 digits: plain, with classes, an upsampler, a fixed variance."
    home, d = tmp_path_factory.mktemp("ode"), digits()
    np.savez(home / "few.npz", images=d.images[:60, 0].numpy(), labels=d.labels[:60].numpy())
    for name, more in KINDS.items():
        ask(home, f"--data few.npz --out {name} {RUN} {more}", command=iddpm_train)
    return home


KINDS = {"plain": "", "classes": "--class-cond", "up": "--upsample-from 4",
         "fixed": "--loss simple --variance beta"}


@pytest.mark.parametrize("name", ["classes", "up"])
def test_flow_and_bound_have_one_decoder(home, name):
    out = home / f"{name}.json"
    said = ask(home, f"{name} {ODE} --out {out}")
    r = json.loads(out.read_text())
    assert "flow of the same network" in said and "bits/dim" in said
    assert r["ode"]["decoder"] == pytest.approx(r["decoder"], abs=1e-5)
    gap = r["bits_per_dim"] - r["ode"]["bits_per_dim"]
    assert r["ode"]["bound_minus_flow"] == pytest.approx(gap, abs=1e-9)
    assert r["ode"]["bits_per_dim"] > 0 and r["ode"]["stderr"] > 0


def test_one_image_has_no_interval(home):
    r = home / "one.json"
    assert "+-" not in ask(home, f"fixed --ode --n 1 --device cpu --out {r}").split("flow")[1]
    assert json.loads(r.read_text())["ode"]["stderr"] is None


def test_what_has_no_flow_is_refused(home, monkeypatch):
    assert "--ode without --steps" in ask(home, f"plain {ODE} --steps 10", 1)
    model = load(home / "plain")
    net = Predicts("x0", model.config["network"], model.config["schedule"])
    with pytest.raises(ValueError, match="predicts x0"):
        model_flow(replace(model, net=net), digits().images[:2])
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "one process" in ask(home, f"plain {ODE}", 1)


def test_a_network_that_has_diverged(home):
    model = load(home / "plain")
    with torch.no_grad():
        model.net.conv_out.bias.fill_(float("nan"))
    f = model_flow(model, digits().images[:2], FlowPath(2))
    assert not f.total.isfinite().any()


def test_the_chunk_makes_no_difference(home):
    model, x = load(home / "plain"), digits().images[:5]
    a, b = (model_flow(model, x, FlowPath(3, chunk=n)).total for n in (2, None))
    assert (a - b).abs().max() < 1e-4
