"""Models for other programs: what the command writes is run by onnxruntime, also where there is no
torch."""
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import TINY, clean_env

import iddpm_nb
from iddpm_nb.checks import typed
from iddpm_nb.cli.convert import iddpm_convert
from iddpm_nb.cli.train import iddpm_train
from iddpm_nb.forward import model_time
from iddpm_nb.interop.onnx_bridge import OnnxNetwork
from iddpm_nb.sampling import Sampling, sample

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


def asked(folder, command, *words):
    return typed(command, " ".join(map(str, words)), folder)


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    "Short runs: plain, with classes, with a fixed variance, and an upsampler."
    folder = tmp_path_factory.mktemp("desk")
    kinds = {"plain": [], "classes": ["--class-cond"], "fixed": ["--loss simple --variance beta"],
             "up": ["--upsample-from", 4]}
    for name, words in kinds.items():
        status, out, err = asked(folder, iddpm_train, "--steps 2", *TINY, "--out", name, *words)
        assert status == 0, out + err
    return folder


def inputs(model, n):
    "Something to ask a network."
    g, config = torch.Generator().manual_seed(0), model.config
    cond = {}
    if low := config["network"].get("low_size"): cond["low"] = torch.rand(n, 1, low, low) - 0.5
    if k := config["network"].get("num_classes"): cond["y"] = torch.arange(n) % k
    t = torch.randint(0, len(model.schedule), (n,), generator=g)
    return torch.randn(n, *config["shape"], generator=g), model_time(model.schedule, t), cond


@pytest.mark.parametrize("kind", ["plain", "classes", "fixed", "up"])
def test_a_run_as_the_command_writes_it(desk, kind):
    status, out, err = asked(desk, iddpm_convert, kind, "--to onnx")
    assert status == 0 and f"{kind}.onnx" in out, out + err
    model, theirs = iddpm_nb.load(desk / kind), OnnxNetwork(desk / f"{kind}.onnx")
    for n in (1, 3):
        x, t, cond = inputs(model, n)
        with torch.no_grad():
            ours = model.net(x, t, **cond)
        assert (theirs(x, t, **cond) - ours).abs().max() < 1e-5
    assert theirs.config == json.loads(json.dumps(model.config))
    assert torch.equal(theirs.schedule.beta, model.schedule.beta)
    status, out, _ = asked(desk, iddpm_convert, kind, "--to onnx")
    assert status == 0 and f"{kind}-2.onnx" in out     # nothing is overwritten


def test_a_checkpoint_file_goes_beside_itself(desk):
    file = next((desk / "plain" / "checkpoints").rglob("model.safetensors"))
    assert asked(desk, iddpm_convert, file, "--to onnx")[0] == 0
    assert OnnxNetwork(file.with_suffix(".onnx")).schedule


def test_the_file_samples_like_the_library(desk):
    assert asked(desk, iddpm_convert, "digits --to onnx --out d.onnx")[0] == 0
    model, theirs = iddpm_nb.load("digits"), OnnxNetwork(desk / "d.onnx")
    drawn = [sample(net, model.schedule, (2, 1, 8, 8), Sampling(20), progress=False,
                    generator=torch.Generator().manual_seed(1)) for net in (model.net, theirs)]
    assert (drawn[0] - drawn[1]).abs().max() < 1e-4


ALONE = """
import json, sys
sys.modules["torch"] = None                            # as if it were not installed
import numpy as np, onnxruntime
s = onnxruntime.InferenceSession(sys.argv[1])
told = s.get_modelmeta().custom_metadata_map
ab, clock = (np.array(json.loads(told[k])) for k in ("alpha_bar", "t_model"))
x = np.load(sys.argv[2])
out, = s.run(None, {"x": x, "t": np.full(len(x), clock[500], np.float32)})
np.savez(sys.argv[3], out=out, alpha_bar=ab)
"""


def test_it_runs_where_there_is_no_torch(desk):
    asked(desk, iddpm_convert, "digits --to onnx --out alone.onnx")
    x = torch.randn(2, 1, 8, 8)
    np.save(desk / "x.npy", x.numpy())
    files = [str(desk / name) for name in ("alone.onnx", "x.npy", "out.npz")]
    done = subprocess.run([sys.executable, "-c", ALONE, *files], env=clean_env(),
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    model, found = iddpm_nb.load("digits"), np.load(desk / "out.npz")
    with torch.no_grad():
        ours = model.net(x, model_time(model.schedule, torch.full((2,), 500)))
    assert abs(found["out"] - ours.numpy()).max() < 1e-5
    assert np.array_equal(found["alpha_bar"], model.schedule.alpha_bar.numpy())


@pytest.mark.parametrize("words, said", [
    ("nowhere --to onnx", "nowhere"), ("plain --to onnx --out a.safetensors", "new .onnx"),
    ("plain --out a.onnx", "new .safetensors"), ("plain --to onnx --T 20", "describes itself"),
    ("plain --to onnx --preset cifar10_uncond_50M_500K", "describes itself"),
    ("plain --to tensorflow", "onnx"), ("plain --to", "--to")])
def test_converting_to_onnx_refuses_in_a_sentence(desk, words, said):
    before = sorted(p for p in desk.rglob("*"))
    status, out, err = asked(desk, iddpm_convert, words)
    assert status in (1, 2) and said in err and "Traceback" not in err, (status, out, err)
    assert sorted(p for p in desk.rglob("*")) == before, "something was left behind"


def test_without_the_library_it_names_the_extra(desk, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    status, _, err = asked(desk, iddpm_convert, "digits --to onnx --out b.onnx")
    assert status == 1 and "pip install 'iddpm_nb[onnx]'" in err and not (desk / "b.onnx").exists()


def test_a_label_that_no_class_has_is_an_error(desk):
    asked(desk, iddpm_convert, "classes --to onnx --out labels.onnx")
    net, (x, t, _) = OnnxNetwork(desk / "labels.onnx"), inputs(iddpm_nb.load(desk / "classes"), 1)
    with pytest.raises(Exception, match="(?i)out of"):
        net(x, t, y=torch.tensor([99]))
