"""What only a GPU can show. Without one each test runs on the CPU alone, so that every line of it
has run before it is needed; the halves that need a GPU are skipped with one reason.

python -m pytest -rs tests/test_cuda.py
"""
import contextlib
import json
import os
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, clean_env

from iddpm_nb.data import Images
from iddpm_nb.forward import model_time
from iddpm_nb.likelihood import bits_per_dim
from iddpm_nb.running.model import Model, load
from iddpm_nb.running.run import begin
from iddpm_nb.sampling import sample
from iddpm_nb.train import Alone, Stepping, train, train_step
from iddpm_nb.training.checkpoint import resume, save_checkpoint
from iddpm_nb.training.config import (Config, DataConfig, DiffusionConfig, ModelConfig,
                                      TrainConfig)
from iddpm_nb.training.distributed import check_agreement
from iddpm_nb.training.memory import Alive, training_memory
from iddpm_nb.training.speed import InPrecision, fast_network, product_rate

NO_GPU = "there is no CUDA device here"
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason=NO_GPU)
needs_two = pytest.mark.skipif(torch.cuda.device_count() < 2,
                               reason="there are not two CUDA devices here")
BOTH = ["cpu", pytest.param("cuda", marks=needs_gpu)]


@pytest.fixture(params=BOTH)
def device(request):
    "A device, whose switches are put back afterwards."
    cudnn, old = torch.backends.cudnn, torch.get_float32_matmul_precision()
    flags = cudnn.allow_tf32, cudnn.benchmark
    yield request.param
    torch.set_float32_matmul_precision(old)
    cudnn.allow_tf32, cudnn.benchmark = flags


@contextlib.contextmanager
def strict(device):
    "On a GPU everything that waits for it is an error here."
    cuda = device == "cuda"
    if cuda: torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if cuda: torch.cuda.set_sync_debug_mode("default")


def images(size=16, n=32):
    g = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=g)
    return Images(x, torch.arange(n) % 10, tuple("0123456789"))


def config(loss="hybrid", sampler="uniform", cond=False, channels=32, batch=8, **how):
    more = dict(class_cond=True, label_drop=0.1) if cond else {}
    how = dict(precision="float32", compile="off") | how
    return Config(DataConfig(flip=True, **more),
                  ModelConfig(channels, (1, 2), 1, (8,), 2, groups=8),
                  DiffusionConfig(20, loss=loss, sampler=sampler),
                  TrainConfig(100, batch, lr=1e-3, warmup=2, ema=(0.9,), ema_plain=(0.99,), **how))


def begun(device, c=None, d=None, team=Alone(), last=False):
    """A training before its first step, as `iddpm_train` makes it. No layer is silent in it.
    last: channels-last, as compiled networks are on a GPU."""
    c = c or config()
    run, s, about = begin(c, d or images(), torch.device(device), team)
    if last: run.net.to(memory_format=torch.channels_last)
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in run.net.parameters():
            if not p.any(): p.copy_(0.02 * torch.randn(p.shape, generator=g))
        for ema in run.emas:
            ema.net.load_state_dict(run.net.state_dict())
    return run, s, about, c


def steps(run, s, c, n):
    "n more steps, as `iddpm_train` takes them -> what each says."
    t, d = c.train, c.diffusion
    how = Stepping(t.precision, t.micro, t.clip)
    return list(train(run, s, run.step + n, d.loss, t.lr, t.warmup, how=how))


def off(a, b):
    "How far apart, relative to b, in the root mean square."
    a, b = (torch.as_tensor(x).detach().cpu().double() for x in (a, b))
    return ((a - b).square().mean().sqrt() / b.square().mean().sqrt()).item()


@pytest.mark.parametrize("loss, sampler, more", [
    ("hybrid", "uniform", {}), ("hybrid", "uniform", dict(precision="bfloat16")),
    ("vlb", "importance", dict(micro=3)), ("simple", "uniform", dict(clip=1.0)),
    ("hybrid", "uniform", dict(cond=True))])
def test_a_step_waits_for_nothing(device, loss, sampler, more):
    c = config(loss, sampler, **more)
    if loss == "simple":
        c = Config(c.data, c.model, DiffusionConfig(20, loss=loss, variance="beta"), c.train)
    run, s, _, c = begun(device, c)
    steps(run, s, c, 3)
    with strict(device):
        said = steps(run, s, c, 3)
    assert all(m["losses"].isfinite().all() for m in said) and run.step == 6


def test_the_strict_mode_hears_a_read(device):
    x = torch.ones(3, device=device)
    with strict(device):
        if device == "cuda":
            with pytest.raises(RuntimeError): x.sum().item()
        else: assert x.sum().item() == 3


def test_a_chain_waits_for_nothing(device):
    run, s, _, _ = begun(device)
    g = torch.Generator(device).manual_seed(0)
    def draw(**how):
        return sample(run.net, s, (4, 3, 16, 16), 5, generator=g, progress=False, **how)
    for how in ({}, dict(method="ddim"), dict(variance="beta")):
        draw(**how)
        seen = []
        def later(t, x):      # from the second step on: before it the schedule is respaced
            if not seen and device == "cuda": torch.cuda.set_sync_debug_mode("error")
            seen.append(t)
            if t == 0 and device == "cuda": torch.cuda.set_sync_debug_mode("default")
        try:
            x = draw(callback=later, **how)
        finally:
            if device == "cuda": torch.cuda.set_sync_debug_mode("default")
        assert len(seen) == 5 and x.isfinite().all()


def answer(net, s, device, precision="float32"):
    g = torch.Generator().manual_seed(2)
    x, t = torch.randn(4, 3, 16, 16, generator=g), torch.tensor([0, 3, 10, 19])
    with torch.no_grad():
        return InPrecision(net.eval(), precision)(x.to(device), model_time(s, t.to(device)))


def test_every_way_to_compute_is_the_same_function(device):
    """float32 is right to 2^-24 a product, TF32 to 2^-11, bfloat16 to 2^-9; errors of some tens of
    layers add up like the steps of a random walk, so to about 8 times that."""
    run, s, _, _ = begun("cpu")
    right = answer(run.net, s, "cpu")
    net, s = run.net.to(device), s.to(device)
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    assert off(answer(net, s, device), right) < 3e-5
    net = fast_network(net, device, "off")                       # TF32 and channels last on a GPU
    assert off(answer(net, s, device), right) < 4e-3
    bf16 = off(answer(net, s, device, "bfloat16"), right)
    assert 1e-4 < bf16 < 2e-2, f"{bf16}: not bfloat16, or not the same function"
    if device == "cuda":
        net = fast_network(net, device, "on")
        assert off(answer(net, s, device), right) < 4e-3
        assert off(answer(net, s, device, "bfloat16"), right) < 2e-2


def losses_of(device, n=12, **how):
    run, s, _, c = begun(device, config(**how))
    return torch.stack([m["losses"].mean() for m in steps(run, s, c, n)]).cpu()


@pytest.mark.parametrize("way", ["on", "graphs"])
def test_a_compiled_training_learns_the_same(device, way):
    plain = losses_of(device)
    way = way if device == "cuda" else "off"    # the CPU's compiler has a chapter of its own
    assert off(losses_of(device, compile=way), plain) < 2e-2
    assert off(losses_of(device, compile=way, precision="bfloat16"), plain) < 5e-2


def gradient(device, **how):
    run, s, _, c = begun(device, config(**how))
    for _ in range(3):          # graphs are recorded in the second step, replayed from the third
        g = torch.Generator().manual_seed(3)
        x0, eps = (torch.randn(8, 3, 16, 16, generator=g).to(device) for _ in range(2))
        t, w = torch.arange(8, device=device), torch.ones(8, device=device)
        for group in run.opt.param_groups:
            group["lr"] = 0.0
        train_step(run.ask or run.net, run.opt, s, x0, t, w, eps, precision="float32",
                   micro=c.train.micro)
    return torch.cat([p.grad.flatten() for p in run.net.parameters()])


def test_portions_under_graphs_are_refused_or_right(device):
    "A replay that writes where the last portion's gradients lie would lose them."
    way = "graphs" if device == "cuda" else "off"
    whole = gradient(device)
    try:
        portions = gradient(device, compile=way, micro=3)
    except ValueError as e:
        assert "micro" in str(e) or "portion" in str(e)
        return
    assert off(portions, whole) < 4e-3


def kept(run):
    "All numbers of a training that a checkpoint keeps, on the CPU."
    found = {f"net.{k}": v for k, v in run.net.state_dict().items()}
    for e in run.emas:
        found |= {f"{e.name}.{k}": v for k, v in e.net.state_dict().items()}
    for i, p in enumerate(run.net.parameters()):
        found |= {f"{k}.{i}": v for k, v in run.opt.state[p].items()}
    sampler = run.sampler.state_dict()
    if sampler: found |= {"history": sampler["history"][:-1], "count": sampler["count"][:-1]}
    return {k: v.detach().cpu().clone() for k, v in found.items()}


def same_bits(a, b):
    wrong = [k for k in a if not torch.equal(a[k], b[k])]
    assert a.keys() == b.keys() and not wrong, f"{len(wrong)} differ: {wrong[:5]}"


def same_strides(run):
    "The layout of a parameter is that of its average and of what the optimizer remembers of it."
    for e in run.emas:
        for mine, p in zip(e.net.parameters(), run.net.parameters()):
            assert mine.stride() == p.stride()
    for p, moments in run.opt.state.items():
        for v in moments.values():
            assert v.ndim == 0 or v.stride() == p.stride()


def next_step(run, s, device):
    "One step with given numbers -> the weights after it."
    g = torch.Generator().manual_seed(4)
    x0, eps = (torch.randn(8, 3, 16, 16, generator=g).to(device) for _ in range(2))
    w, t = torch.ones(8, device=device), torch.arange(8, device=device)
    before = torch.cat([p.detach().flatten().cpu() for p in run.net.parameters()])
    train_step(run.net, run.opt, s, x0, t, w, eps, precision="float32")
    return torch.cat([p.detach().flatten().cpu() for p in run.net.parameters()]) - before


@pytest.mark.parametrize("sampler, loss", [("uniform", "hybrid"), ("importance", "vlb")])
def test_a_run_goes_to_the_cpu_and_back_to_the_bit(device, tmp_path, sampler, loss):
    c = config(loss, sampler)
    torch.backends.cudnn.allow_tf32 = False
    run, s, about, c = begun(device, c, last=True)
    steps(run, s, c, 4)
    same_strides(run)
    there = kept(run)
    save_checkpoint(tmp_path / "there", run, about)
    here, s_here, *_ = begun("cpu", c)
    resume(tmp_path / "there", here)
    same_bits(there, kept(here))
    same_strides(here)
    save_checkpoint(tmp_path / "here", here, about)
    back, s_back, *_ = begun(device, c, last=True)
    resume(tmp_path / "here", back)
    same_bits(there, kept(back))
    same_strides(back)
    assert here.step == back.step == 4
    torch.set_float32_matmul_precision("highest")       # `begin` has allowed TF32
    torch.backends.cudnn.allow_tf32 = False
    stayed, moved, far = (next_step(r, t, where) for r, t, where in
                          ((run, s, device), (back, s_back, device), (here, s_here, "cpu")))
    # Adam divides by the size of a gradient: where that is near 0, its direction is chance
    assert off(moved, stayed) <= (1e-2 if device == "cuda" else 0)   # its sums have no fixed order
    assert off(far, stayed) < 5e-2
    steps(back, s_back, c, 2)
    steps(here, s_here, c, 2)


def test_samples_and_bits_are_those_of_the_cpu(device):
    "Noise from a generator on the CPU is the same everywhere."
    run, s, about, _ = begun("cpu")
    x0 = images(n=4).images.float() / 127.5 - 1
    def found(net, where):
        g = lambda: torch.Generator().manual_seed(5)
        draw = lambda **how: sample(net, s, (4, 3, 16, 16), 8, generator=g(), progress=False, **how)
        return [draw(), draw(method="ddim"), draw(variance="beta_tilde"),
                bits_per_dim(net, s, x0.to(where), num_t=12, generator=g()).total]
    here = found(run.net, "cpu")
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    for a, b in zip(found(run.net.to(device), device), here):
        assert off(a, b) < 1e-3        # float32's rounding, grown over 8 steps
    model = Model(run.net, s.to(device), about)
    draw = lambda m: m.sample(4, 8, seed=1)
    assert off(draw(model.quick("bfloat16")), draw(model)) < 0.2     # 8 steps, each rounded
    assert draw(model).device.type == device


def test_a_training_takes_the_memory_that_was_counted(device):
    """The count (training/09) may be too high, by what the device's kernels do not keep, and must
    hardly be too low. On the CPU the tensors of a step are counted one by one."""
    big = dict(channels=64, batch=64) if device == "cuda" else {}
    run, s, about, c = begun(device, config(**big), images(32 if big else 16, 64))
    counted = training_memory(about, device)
    if device == "cuda":
        steps(run, s, c, 2)
        torch.cuda.reset_peak_memory_stats()
        steps(run, s, c, 2)
        taken = torch.cuda.max_memory_allocated()
    else:
        with Alive([*run.net.parameters()]) as seen:
            steps(run, s, c, 2)
        taken = seen.peak + sum(p.nbytes for p in run.net.parameters())
    assert 0.4 * counted < taken < 1.1 * counted, f"{taken / counted:.2f} of the count"


def test_the_rate_of_a_product(device):
    assert product_rate(device, torch.bfloat16, None if device == "cuda" else 64, 2) > 0


PROGRAM = """
import sys
sys.path.insert(0, sys.argv[1])
import test_cuda, torch
from iddpm_nb.training.distributed import join
with join(sys.argv[2]) as team:
    torch.save(test_cuda.in_a_team(team, team.device), f"{sys.argv[3]}/{team.rank}.pt")
"""


def in_a_team(team, device):
    "Some steps of a team -> what every process has to agree about."
    torch.set_num_threads(1)
    c = config("vlb", "importance", micro=3)
    run, s, _, c = begun(device, c, team=team)
    said = steps(run, s, c, 6)
    check_agreement(run)
    return {"lengths": torch.stack([m["grad_norm"] for m in said]).cpu(),
            "losses": torch.stack([m["losses"] for m in said]).cpu(),
            "weights": torch.cat([p.detach().flatten().cpu() for p in run.net.parameters()])}


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_two)], indirect=True)
def test_two_processes_take_the_steps_of_one(device, tmp_path):
    "gloo on the CPU, NCCL between GPUs."
    program = tmp_path / "team.py"
    program.write_text(PROGRAM)
    env = clean_env(PYTHONPATH=os.pathsep.join([str(ROOT), *filter(None, sys.path)]))
    ran = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                          "--nproc_per_node=2", str(program), str(ROOT / "tests"), device,
                          str(tmp_path)], env=env, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    two = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    one = in_a_team(Alone(), torch.device(device))
    for k in one:
        assert torch.equal(two[0][k], two[1][k]), f"the processes disagree about the {k}"
        assert off(two[0][k], one[k]) < (1e-2 if device == "cuda" else 1e-4), k


TABLE = {1: ["passed +1", "failure +0"], 2: ["tiny: a step of 2 images", "train, ours +[0-9.]+ im"],
         3: ["steps +20", "4 samples, 10 steps", "held-out bits/dim", "weights"]}


@pytest.mark.parametrize("part", [1, 2, 3])
def test_the_gpu_file_runs_dry(part, tmp_path):
    def gpu(*args):
        return subprocess.run([sys.executable, ROOT / "bench" / "gpu.py", *map(str, args)],
                              env=clean_env(PYTHONPATH=str(ROOT)), capture_output=True, text=True)
    ran = gpu("--part", part, "--dry", "--out", tmp_path)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    table = ran.stdout.rpartition(f"part {part} on CPU")[2]
    for line in TABLE[part]:
        assert re.search(line, table), table
    assert json.loads((tmp_path / f"part{part}.json").read_text())["dry"]
    if part != 3: return
    ran = gpu("--join", tmp_path / "weights", "--out", tmp_path / "whole.safetensors")
    assert ran.returncode == 0, ran.stderr
    whole, trained = load(tmp_path / "whole.safetensors"), load(tmp_path / "run")
    for k, v in trained.net.state_dict().items():
        assert torch.equal(whole.net.state_dict()[k], v.bfloat16().float()), k
    assert len(list(tmp_path.glob("samples_*_steps.png"))) == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_the_gpu_file_says_what_it_lacks():
    def said(*args):
        ran = subprocess.run([sys.executable, ROOT / "bench" / "gpu.py", *args], text=True,
                             env=clean_env(PYTHONPATH=str(ROOT)), capture_output=True)
        assert ran.returncode and "Traceback" not in ran.stderr, ran.stderr
        return ran.stderr
    assert "no CUDA device here: --dry" in said("--part", "1", "--out", "nowhere")
    assert "which --part?" in said()
