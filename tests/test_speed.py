"""What a GPU would punish, seen without one: gradients that a CUDA graph overwrites, strides that
keep torch off its fast path, two rules for one choice, random numbers left behind. And commands
whose idle threads give way.
"""
import json
import os
import subprocess
import sys
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from conftest import clean_env
from torch import nn

import iddpm_nb
from iddpm_nb.data import Batches, Images
from iddpm_nb.importance import LossSecondMomentSampler
from iddpm_nb.schedule import make_schedule
from iddpm_nb.train import Alone, Stepping, pick_precision, start_training, train, train_step
from iddpm_nb.training import checkpoint, speed
from iddpm_nb.training.speed import InPrecision, fast_network
from iddpm_nb.unet import UNet

S = make_schedule("cosine", 20)


def network(size=8, **more):
    torch.manual_seed(0)
    net = UNet(3, 6, 16, (1, 2), 1, (size // 2,), size, num_heads=2, groups=8, **more)
    for p in net.parameters():
        if not p.detach().any(): nn.init.normal_(p, std=0.02)
    return net


def batch(size=8, n=8):
    g = torch.Generator().manual_seed(1)
    x0, eps = (torch.randn(n, 3, size, size, generator=g) for _ in range(2))
    return S, x0.clamp(-1, 1), torch.arange(n) * 20 // n, torch.ones(n), eps


# CUDA graphs

class Placed(torch.autograd.Function):
    "A weight whose gradient comes in the same memory each time, as from a replayed graph."
    places = {}
    @staticmethod
    def forward(ctx, w, name):
        ctx.name = name
        return w.view_as(w)
    @staticmethod
    def backward(ctx, g):
        place = Placed.places.setdefault(ctx.name, torch.empty_like(g))
        return place.copy_(g).view_as(place), None


class Graphed(nn.Module):
    "A network as a CUDA graph plays it."
    def __init__(self, net):
        super().__init__()
        self.net = net
    def forward(self, *args):
        weights = {k: Placed.apply(p, k) for k, p in self.net.named_parameters()}
        return torch.func.functional_call(self.net, weights, args)


def gradients(net, **how):
    Placed.places.clear()
    train_step(net, torch.optim.SGD(net.parameters(), lr=0.0), *batch(), **how)
    return [p.grad.clone() for p in net.parameters()]


@pytest.mark.parametrize("micro", [None, 8, 7, 3, 1])
def test_gradients_of_portions_outlive_the_next_replay(micro):
    for a, b in zip(gradients(network(), micro=micro), gradients(Graphed(network()), micro=micro)):
        assert a.equal(b)


def test_a_replay_takes_the_gradient_with_it():
    "The imitation does what it should: torch takes the tensor that it is given."
    net = Graphed(network())
    gradients(net)
    assert all(p.grad.data_ptr() == Placed.places[k].data_ptr()
               for k, p in net.net.named_parameters())


# the length of the gradient

def test_without_a_limit_the_gradient_is_only_measured():
    net = network()
    grads = gradients(net)
    _, length = train_step(net, torch.optim.SGD(net.parameters(), lr=0.0), *batch())
    assert length.equal(nn.utils.clip_grad_norm_(net.parameters(), float("inf")))
    assert all(p.grad.equal(g) for p, g in zip(net.parameters(), grads))
    with patch.object(torch, "_foreach_mul_", None):       # nothing is multiplied
        train_step(net, torch.optim.SGD(net.parameters(), lr=0.0), *batch())
    with patch.object(torch, "_foreach_mul_", None), pytest.raises(TypeError):
        train_step(net, torch.optim.SGD(net.parameters(), lr=0.0), *batch(), clip=0.01)


@pytest.mark.parametrize("bad", [float("inf"), -float("inf"), float("nan")])
def test_one_infinite_gradient_spoils_one_weight(bad):
    net = network()
    net.conv_out.bias.register_hook(lambda g: torch.full_like(g, bad))
    _, length = train_step(net, torch.optim.SGD(net.parameters(), lr=1.0), *batch())
    spoilt = [k for k, p in net.named_parameters() if not p.isfinite().all()]
    assert spoilt == ["conv_out.bias"] and not length.isfinite()


# the order in memory

def strides(run):
    "Those of the weights, and of all that is paired with them."
    mine = [p.stride() for p in run.net.parameters()]
    paired = [[p.stride() for p in e.net.parameters()] for e in run.emas]
    paired.append([p.grad.stride() for p in run.net.parameters()])
    for k in ("exp_avg", "exp_avg_sq"):
        paired.append([run.opt.state[p][k].stride() for p in run.net.parameters()])
    return mine, paired


def as_on_a_gpu(net):
    "The layout that `fast_network` chooses for a GPU, here."
    before = torch.get_float32_matmul_precision()
    with patch.object(nn.Module, "compile", lambda self, mode=None: None):
        asked = fast_network(net, "cuda")
    torch.set_float32_matmul_precision(before)
    return asked


def begun(layout=True):
    data = Images(torch.arange(24 * 192).reshape(24, 3, 8, 8).mul(7).remainder(256).byte())
    run = start_training(network(), Batches(data, 8), LossSecondMomentSampler(20), ema_rates=(0.9,),
                         plain_rates=(0.99,))
    if layout: run.ask = as_on_a_gpu(run.net)      # after optimizer and averages, as a run does
    return run


def go(run, steps):
    for _ in train(run, S, steps, lr=1e-3):
        pass
    return run


def test_everything_has_the_strides_of_its_weight(tmp_path):
    config = {"network": {}, "schedule": {}}
    run = go(begun(), 2)
    mine, paired = strides(run)
    weight = run.net.down[0][0].conv1.weight
    assert weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
    assert all(other == mine for other in paired) and len(paired) == 5
    checkpoint.save_checkpoint(tmp_path, run, config)
    for layout in (True, False):                           # resumed on a GPU, and on a CPU
        again = begun(layout)
        assert checkpoint.resume(tmp_path, again)
        mine, paired = strides(go(again, 3))
        assert all(other == mine for other in paired)


def test_layouts_that_differ_are_seen():
    run = begun()
    with patch("iddpm_nb.train.same_layout", lambda run: None):
        mine, paired = strides(go(run, 1))
    assert paired[0] != mine and paired[1] != mine         # the averages were copied before


@pytest.mark.parametrize("compile", ["off", "auto", "on", "graphs"])
@pytest.mark.parametrize("keeps", [False, True])
def test_channels_last_where_the_norm_leaves_it_or_is_compiled(compile, keeps):
    before, net = torch.get_float32_matmul_precision(), nn.Conv2d(3, 3, 3)
    with (patch.object(nn.Module, "compile", lambda self, mode=None: None),
          patch.object(speed, "keeps_channels_last", lambda device: keeps)):
        fast_network(net, "cuda", compile)
    torch.set_float32_matmul_precision(before)
    last = net.weight.is_contiguous(memory_format=torch.channels_last)
    assert last == (keeps or compile != "off")


def test_what_was_cast_once_lies_channels_last_on_a_cpu_and_stays_so():
    last = torch.channels_last
    net = UNet(3, 6, 32, (1, 2), 1, (8,), 16)
    fast = fast_network(speed.cast_once(net, "bfloat16"), "cpu")
    weight = fast.conv_in.weight
    assert weight.is_contiguous(memory_format=last) and weight.dtype == torch.bfloat16
    assert net.conv_in.weight.is_contiguous()              # the network itself is as it was
    plain = fast_network(speed.cast_once(net, "float32"), "cpu")
    assert plain is net and net.conv_in.weight.is_contiguous()


class Kernels(nn.Module):
    "A network of a user's, with a weight of four indices that no layer of torch's holds."
    def __init__(self):
        super().__init__()
        self.kernel = nn.Parameter(torch.zeros(4, 3, 3, 3))


def test_a_cast_copy_never_rearranges_a_weight_of_the_network():
    net = Kernels()
    cast = speed.cast_once(net, "bfloat16")
    assert cast.kernel.is_contiguous(memory_format=torch.channels_last)
    assert net.kernel.is_contiguous() and cast.kernel is not net.kernel


# one rule for the kind of number

def kinds(size, precision="auto", native=True):
    "The kinds of number of the last layer in a step, in sampling, and by the rule of the commands."
    seen, net = [], network(size)
    net.conv_out.register_forward_hook(lambda module, inputs, out: seen.append(out.dtype))
    with patch("iddpm_nb.train.fast_bfloat16", lambda: native):
        train_step(net, torch.optim.SGD(net.parameters(), lr=0.0), *batch(size, 2),
                   how=Stepping(precision))
        with torch.no_grad():
            InPrecision(net, precision)(torch.zeros(1, 3, size, size), torch.zeros(1))
        rule = getattr(torch, pick_precision(precision, "cpu", size))
    return {*seen, rule}


@pytest.mark.parametrize("size, native, want", [
    (8, True, torch.float32), (32, True, torch.bfloat16), (32, False, torch.float32)])
def test_library_and_commands_choose_alike(size, native, want):
    assert kinds(size, native=native) == {want}
    assert kinds(8, "bfloat16") == {torch.bfloat16} and kinds(8, "float32") == {torch.float32}


def test_there_is_one_rule():
    assert speed.pick_precision is pick_precision


# random numbers of a device

class Device:
    "torch's generator of a device that is not here."
    def __init__(self): self.state = torch.arange(16, dtype=torch.uint8)
    def get_rng_state(self, device): return self.state.clone()
    def set_rng_state(self, state, device): self.state = state.clone()


class Source:
    "A generator that says it is on the device."
    def __init__(self, device): self.device, self.g = torch.device(device), torch.Generator()
    def __getattr__(self, name): return getattr(self.g, name)


@pytest.mark.parametrize("kind", ["mps", "cuda", "xpu"])
def test_the_dropout_of_a_device_is_saved(kind):
    there, nothing = Device(), SimpleNamespace(state_dict=dict)
    weight = SimpleNamespace(device=torch.device(kind))
    run = SimpleNamespace(net=SimpleNamespace(parameters=lambda: iter([weight])), team=Alone(),
                          generator=Source(kind), step=1, seconds=0.0, opt=nothing, emas=[],
                          sampler=nothing, batches=nothing)
    with patch.object(torch, "get_device_module", lambda device: there):
        saved = checkpoint.training_state(run)["rng"]
        there.state += 1
        checkpoint.restore_random(run, saved, kind)
        assert there.state.equal(torch.arange(16, dtype=torch.uint8))
        there.state += 1
        checkpoint.restore_random(run, {"torch": saved["torch"]}, "cpu")   # saved elsewhere
        assert there.state.equal(torch.arange(16, dtype=torch.uint8) + 1)
        with pytest.raises(ValueError, match="random state is cut short"):
            checkpoint.restore_random(run, saved | {kind: saved[kind][:, :5]}, kind)


# idle threads give way

ENTRY = {"iddpm_train": "cli.train", "iddpm_sample": "cli.sample", "iddpm_eval": "cli.evaluate",
         "iddpm_convert": "cli.convert", "iddpm_workbook": "cli.workbook",
         "iddpm_tables": "reproduction.tables"}
ASK = """
import importlib.abc, json, os, sys
class Before(importlib.abc.MetaPathFinder):
    "What is set when torch is first imported."
    def find_spec(self, name, *rest):
        if name == "torch": raise SystemExit(json.dumps(dict(os.environ)))
sys.meta_path.insert(0, Before())
import importlib
importlib.import_module(sys.argv[1])
raise SystemExit(json.dumps(dict(os.environ)))
"""


def before_torch(module, **said):
    env = {k: v for k, v in clean_env().items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    root = os.path.dirname(os.path.dirname(iddpm_nb.__file__))
    p = subprocess.run([sys.executable, "-c", ASK, module], capture_output=True, text=True,
                       env=env | {"PYTHONPATH": root} | said)
    env = json.loads(p.stderr)
    return env.get("GOMP_SPINCOUNT"), env.get("OMP_WAIT_POLICY")


@pytest.mark.parametrize("module", ENTRY.values())
def test_a_command_lets_idle_threads_give_way(module):
    assert before_torch(f"iddpm_nb.{module}") == ("10000", None)


def test_what_the_user_says_stays():
    assert before_torch("iddpm_nb.cli.train", GOMP_SPINCOUNT="7") == ("7", None)
    assert before_torch("iddpm_nb.cli.train", OMP_WAIT_POLICY="ACTIVE") == (None, "ACTIVE")


def test_the_library_says_nothing():
    assert before_torch("iddpm_nb") == (None, None)
    assert before_torch("iddpm_nb.train") == (None, None)


def test_the_commands_are_those_of_the_package():
    from configparser import ConfigParser
    settings, root = ConfigParser(delimiters=["="]), os.path.dirname(__file__)
    settings.read(os.path.join(root, "..", "settings.ini"), encoding="utf-8")
    words = settings["DEFAULT"]["console_scripts"].split()
    assert {w.split("=")[0]: w.split("=")[1].split(":")[0] for w in words} == {
        k: f"iddpm_nb.{v}" for k, v in ENTRY.items()}


def test_torch_that_is_there_already_is_left_alone():
    with patch.dict(os.environ), patch.dict(sys.modules, {"torch": torch}):
        os.environ.pop("GOMP_SPINCOUNT", None)
        iddpm_nb._give_way()
        assert "GOMP_SPINCOUNT" not in os.environ
