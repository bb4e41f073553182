"""What would happen on a GPU, seen without one: tensors that have shape, type and device but no
numbers (FakeTensorMode) go through training, sampling and bits per dimension. Devices never mix,
no number is read back inside a step, and after the first step nothing is copied from the host.
"""
import contextlib
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from iddpm_nb import train as training
from iddpm_nb.conditioning.labels import Dropping, Guided
from iddpm_nb.conditioning.upsampler import Paired, Upsampler
from iddpm_nb.data import Batches, Images
from iddpm_nb.importance import LossSecondMomentSampler, StratifiedSampler, UniformSampler
from iddpm_nb.likelihood import bits_per_dim
from iddpm_nb.sampling import sample
from iddpm_nb.schedule import make_schedule
from iddpm_nb.training.log import watch
from iddpm_nb.training.memory import Alive
from iddpm_nb.unet import UNet

pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer")   # copy.deepcopy does
aten = torch.ops.aten
# the answer depends on numbers: the host has to wait for them, whatever the device
READS = {aten._local_scalar_dense.default, aten.equal.default, aten.nonzero.default,
         aten.masked_select.default, aten._unique2.default, aten.bincount.default,
         aten.repeat_interleave.Tensor, aten.is_nonzero.default}
COPIES = {aten._to_copy.default, aten.copy_.default}


class Gpu(TorchDispatchMode):
    """A GPU that is not there. What lies on the CPU is computed as always; what lies on the GPU has
    no numbers. Reads of a number and copies from the host are noted, with the moment: `calls` is
    how often the network was called."""
    def __init__(self):
        super().__init__()
        self.reads, self.copies, self.calls, self.convolved = [], [], 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        pretended = [x for x in tensors if isinstance(x, FakeTensor)]
        to_gpu = torch.device(kwargs.get("device") or "cpu").type == "cuda"
        if not pretended and not to_gpu:
            with _disable_current_modes():
                return func(*args, **kwargs)
        self.look(func, args, kwargs, tensors, to_gpu)
        if func is aten.convolution.default: self.convolved.add(args[0].dtype)
        if func is aten._local_scalar_dense.default: return 1.0
        if kwargs.get("generator") is not None: kwargs = kwargs | {"generator": None}
        return func(*args, **kwargs)

    def look(self, func, args, kwargs, tensors, to_gpu):
        on_gpu = [x.device.type == "cuda" for x in tensors]
        away = func in COPIES and (
            on_gpu[-1] and not on_gpu[0] if func is aten.copy_.default
            else on_gpu[0] and "device" in kwargs and kwargs["device"] is not None and not to_gpu)
        if away or (func in READS and any(on_gpu)): self.note(self.reads, func, tensors)
        host = [x for x, there in zip(tensors, on_gpu) if not there]
        if func in COPIES and host and (to_gpu or any(on_gpu)) and not away:
            self.note(self.copies, func, host, kwargs.get("non_blocking", False)
                      or func is aten.copy_.default and args[2:] == (True,))
            return
        mixed = any(on_gpu) and any(x.ndim for x in host) and func not in COPIES
        assert not mixed, f"{func} mixes devices: {[(x.device, *x.shape) for x in tensors]}"

    def note(self, where, func, tensors, waits_not=False):
        where.append((self.calls, str(func), sum(x.numel() for x in tensors), waits_not))


class Generator(torch.Generator):
    "A source of random numbers that says it is on the GPU."
    def __new__(cls, device="cpu"): return super().__new__(cls)
    def __init__(self, device="cpu"): self.where = torch.device(device)
    device = property(lambda self: self.where)


def leaves(node, seen):
    "The parameters behind a loss."
    stack = [node]
    while stack:
        if (node := stack.pop()) is None or node in seen: continue
        seen.add(node)
        if hasattr(node, "variable"): yield node.variable
        stack += [n for n, _ in node.next_functions]


def backward(loss, *_):
    "Gradients of 0 for all that the loss depends on: the real ones need a driver."
    for p in leaves(loss.grad_fn, set()):
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad + 0


@contextlib.contextmanager
def gpu():
    with (FakeTensorMode(allow_non_fake_inputs=True), patch.object(Tensor, "backward", backward),
          patch.object(torch, "Generator", Generator),
          patch.object(torch.cuda, "get_device_capability", lambda *_: (9, 0)),
          patch.object(torch.cuda, "is_bf16_supported", lambda *_: True),
          patch("torch.cuda.amp.common.amp_definitely_not_available", lambda: False),
          Gpu() as seen):
        yield seen


class Counted(nn.Module):
    "A network whose calls are counted."
    def __init__(self, net, seen):
        super().__init__()
        self.net, self.seen = net, seen
        self.num_classes = getattr(net, "num_classes", None)
    def forward(self, *args, **kwargs):
        self.seen.calls += 1
        return self.net(*args, **kwargs)


SMALL = dict(channels=16, mult=(1, 2), num_res_blocks=1, attn_resolutions=(4,), image_size=8,
             num_heads=2, groups=8, dropout=0.1)
LEAN = SMALL | dict(mult=(1,), attn_resolutions=(8,))      # where the network is not the question


def network(seen, kind="plain", out=6, size=LEAN):
    with torch.device("cuda"):
        if kind == "classes": net = UNet(3, out, num_classes=11, **size)
        elif kind == "upsampler": net = Upsampler(4, in_channels=6, out_channels=out, **size)
        else: net = UNet(3, out, **size)
    return Counted(net, seen)


def told(kind, n):
    "What a network of this kind is told beside the images and t."
    if kind == "classes": return {"y": torch.zeros(n, dtype=torch.long, device="cuda")}
    if kind == "upsampler": return {"low": torch.zeros(n, 3, 4, 4, device="cuda")}
    return {}


def one_step(seen, kind="plain", where="cuda", net=None, **options):
    "A training step; all it needs is on the device before."
    net, s = net or network(seen, kind, size=SMALL), make_schedule("cosine", 20).to(where)
    opt = torch.optim.AdamW(net.parameters(), fused=True)
    x0, eps = (torch.randn(8, 3, 8, 8, device="cuda") for _ in range(2))
    t, w = torch.randint(20, (8,), device="cuda"), torch.ones(8, device="cuda")
    seen.reads, seen.copies = [], []
    losses, length = training.train_step(net, opt, s, x0, t, w, eps, cond=told(kind, 8), **options)
    assert losses.device.type == length.device.type == "cuda" and losses.shape == (8,)
    assert all(p.grad is not None and p.grad.device == p.device for p in net.parameters())
    return seen


def clean(seen):
    assert not seen.reads, f"numbers are read back: {seen.reads}"
    assert not seen.copies, f"copied from the host: {seen.copies}"


@pytest.mark.parametrize("micro", [None, 3])
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "auto"])
@pytest.mark.parametrize("loss", ["simple", "hybrid", "vlb"])
def test_a_step_never_asks_the_host(loss, precision, micro):
    with gpu() as seen:
        clean(one_step(seen, loss=loss, precision=precision, micro=micro))
        assert seen.calls == (1 if micro is None else 3)
        kind = torch.float32 if precision == "float32" else torch.bfloat16
        assert seen.convolved == {kind}


@pytest.mark.parametrize("kind", ["classes", "upsampler"])
def test_nor_with_a_condition(kind):
    with gpu() as seen:
        clean(one_step(seen, kind, precision="bfloat16", micro=3, clip=1.0))


def asks(real): # a loss whose value is looked at
    def objective(*args):
        losses = real(*args)
        if losses.mean().item() > 1e9: raise FloatingPointError
        return losses
    return objective


class MadeOnTheHost(nn.Module):
    "A table made on the CPU and moved in each call."
    def __init__(self, net):
        super().__init__()
        self.net = net
    def forward(self, x, t): return self.net(x, t + torch.zeros(len(t)).to(x.device))


def test_each_mistake_is_seen():
    with gpu() as seen:
        assert one_step(seen, where="cpu").reads          # the schedule's tables on the CPU
    with gpu() as seen, patch.object(training, "objective", asks(training.objective)):
        assert one_step(seen).reads and not seen.copies
    with gpu() as seen:
        assert one_step(seen, net=MadeOnTheHost(network(seen))).copies and not seen.reads
    with gpu() as seen, pytest.raises(AssertionError, match="mixes devices"):
        torch.zeros(3, device="cuda") + torch.zeros(3)
    with gpu() as seen:
        table = torch.zeros(9, device="cuda")
        for do in (lambda: table[:2].tolist(), lambda: table.nonzero(), lambda: bool(table[0]),
                   lambda: table.cpu(), lambda: torch.equal(table, table)):
            before = len(seen.reads)
            with contextlib.suppress(Exception):
                do()
            assert len(seen.reads) > before
        torch.tensor([1.0, 2.0], device="cuda")
        assert len(seen.copies) == 1, "a table written in Python comes from the host"


def test_backward_asks_nothing_either():
    "On the device meta, which has no numbers, the true backward pass runs: a read is an error."
    from iddpm_nb.training.memory import step_memory
    import json
    args = {"in_channels": 3, "out_channels": 6, **SMALL}
    for loss in ("simple", "hybrid", "vlb"):
        assert step_memory(json.dumps(args), (3, 8, 8), 2, loss, 1025)[1] > 0
    w = torch.zeros(3, device="meta", requires_grad=True)
    with pytest.raises(RuntimeError), Alive():
        w.sum().backward(w.sum().item())


def loop(seen, kind="plain", sampler=UniformSampler, steps=3, flip=False, drop=0.0, augment=0.0,
         batches=None, logged=0, **options):
    "The training loop with everything that a run has."
    data = Images(torch.zeros(24, 3, 8, 8, dtype=torch.uint8), torch.arange(24) % 10,
                  tuple("0123456789"))
    batches = batches or Batches(data, 8, 0, "cuda", flip)
    if kind != "classes": batches.labels = None
    if drop: batches = Dropping(batches, drop, 10)
    if kind == "upsampler": batches = Paired(batches, 4, augment)
    net = network(seen, kind)
    run = training.start_training(net, batches, sampler(20), ema_rates=(0.9,), plain_rates=(0.99,))
    assert run.opt.defaults["fused"]
    each = training.train(run, make_schedule("cosine", 20), steps, warmup=2, anneal=True, **options)
    if logged: each = watch(each, steps, logged, progress=False)
    next(each)
    seen.reads, seen.copies = [], []
    for m in each:
        where = {m[k].device.type for k in ("t", "losses", "weights")}
        assert where == {"cuda"} and (logged or m["grad_norm"].device.type == "cuda")
    assert run.step == steps
    return seen


def indices_only(seen, each=1, steps=2):
    """The order of the images is drawn on the CPU, the same for all devices: 8 numbers for each
    image come from there, and nobody waits for them. Nothing else is copied."""
    assert not seen.reads, f"numbers are read back: {seen.reads}"
    assert all(n <= 8 * 48 and waits_not for _, _, n, waits_not in seen.copies), seen.copies
    assert len(seen.copies) == each * steps, seen.copies


@pytest.mark.parametrize("sampler",
                         [UniformSampler, StratifiedSampler, LossSecondMomentSampler])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_loop_copies_the_numbers_of_images_and_no_more(sampler, precision):
    with gpu() as seen:
        indices_only(loop(seen, sampler=sampler, precision=precision, loss="vlb"))


@pytest.mark.parametrize("kind, more, each", [
    ("plain", dict(flip=True, micro=3), 2), ("classes", dict(), 1),
    ("classes", dict(drop=0.1), 2), ("upsampler", dict(), 1), ("upsampler", dict(augment=0.1), 2)])
def test_nor_do_mirrors_labels_and_small_images(kind, more, each):
    with gpu() as seen:
        indices_only(loop(seen, kind, precision="bfloat16", **more), each)


def test_losses_are_read_when_they_are_logged():
    with gpu() as seen:
        loop(seen, steps=4, logged=2)
        assert {moment for moment, *_ in seen.reads} == {2, 4}


class Blocking(Batches):
    "Images that come from the host in each step, and are waited for."
    def __next__(self):
        x, y = super().__next__()
        return torch.zeros(x.shape).to("cuda"), y


def test_a_loop_that_waits_is_seen():
    with gpu() as seen, pytest.raises(AssertionError):
        indices_only(loop(seen, batches=Blocking(Images(torch.zeros(24, 3, 8, 8,
                                                                    dtype=torch.uint8)), 8, 0,
                                                 "cuda")))
    class Reads(UniformSampler):
        def update(self, t, losses): self.last = losses.tolist()
    with gpu() as seen, pytest.raises(AssertionError, match="read back"):
        indices_only(loop(seen, sampler=Reads))


def inside(seen):
    "What happens between the first call of the network and the last."
    return [x for x in seen.reads + seen.copies if 0 < x[0] < seen.calls]


WAYS = [dict(), dict(variance="beta"), dict(variance="beta_tilde"), dict(method="ddim"),
        dict(method="ddim", eta=1.0), dict(chunk=2)]


@pytest.mark.parametrize("how", WAYS, ids=str)
def test_a_chain_never_asks_the_host(how):
    fixed = how.get("variance", "learned") != "learned"
    with gpu() as seen:
        net, s = network(seen, out=3 if fixed else 6), make_schedule("cosine", 20)
        x = sample(net, s, (4, 3, 8, 8), 5, generator=Generator("cuda"), progress=False, **how)
        assert x.device.type == "cuda" and x.dtype == torch.float32 and x.shape == (4, 3, 8, 8)
        assert not seen.reads and not inside(seen), (seen.reads, inside(seen))
        assert seen.calls == (10 if "chunk" in how else 5)


@pytest.mark.parametrize("kind, scale", [("classes", 1.0), ("classes", 2.0), ("upsampler", 1.0)])
def test_nor_does_one_with_a_condition(kind, scale):
    with gpu() as seen:
        net = network(seen, kind)
        net = Guided(net, scale, 10) if kind == "classes" else net
        sample(net, make_schedule("cosine", 20), (4, 3, 8, 8), 5, generator=Generator("cuda"),
               cond=told(kind, 4), progress=False)
        assert not seen.reads and not inside(seen) and seen.calls == 5


def test_a_chain_that_waits_is_seen():
    with gpu() as seen:
        sample(MadeOnTheHost(network(seen)), make_schedule("cosine", 20), (4, 3, 8, 8), 5,
               generator=Generator("cuda"), progress=False)
        assert inside(seen)
    with gpu() as seen:
        sample(network(seen), make_schedule("cosine", 20), (4, 3, 8, 8), 5,
               generator=Generator("cpu"), progress=False)   # noise that every device has: copied
        assert len(inside(seen)) >= 4
    with gpu() as seen:
        sample(network(seen), make_schedule("cosine", 20), (4, 3, 8, 8), 5, progress=False,
               generator=Generator("cuda"), callback=lambda t, x: float(x.mean()))
        assert inside(seen)


@pytest.mark.parametrize("kind, num_t, T", [("plain", None, 5), ("plain", 12, 20),
                                            ("classes", None, 3), ("upsampler", None, 3)])
@pytest.mark.filterwarnings("ignore:these images do not lie")   # their numbers are made up
def test_bits_per_dimension_wait_for_nothing_underway(kind, num_t, T):
    with gpu() as seen:
        net, x0 = network(seen, kind), torch.zeros(4, 3, 8, 8, device="cuda")
        b = bits_per_dim(net, make_schedule("cosine", T), x0, num_t=num_t, cond=told(kind, 4),
                         generator=Generator("cuda"), chunk=3)
        assert b.total.shape == (4,) and seen.calls == 2 * (num_t or T)
        assert not inside(seen), inside(seen)


def counted():
    "A network compiled by a backend that changes nothing, and the number of its compilations."
    torch._dynamo.reset()
    count, net = CompileCounter(), UNet(3, 6, **LEAN)
    net.compile(backend=count)
    return net, count


def steps_of(net, *portions, lr=(1e-3,), **more):
    "Training steps of 8 images, in portions, at these learning rates."
    s, opt = make_schedule("cosine", 20), torch.optim.AdamW(net.parameters(), fused=True)
    x0, t = torch.zeros(8, 3, 8, 8), torch.arange(8)
    for micro in portions:
        for rate in lr:
            opt.param_groups[0]["lr"] = rate
            training.train_step(net, opt, s, x0, t, torch.ones(8), torch.randn_like(x0),
                                precision="float32", micro=micro, **more)


def test_the_network_is_one_graph():
    torch._dynamo.reset()
    found = torch._dynamo.explain(UNet(3, 6, **SMALL))(torch.zeros(2, 3, 8, 8), torch.zeros(2))
    assert (found.graph_count, found.graph_break_count) == (1, 0), found.break_reasons


def test_a_new_learning_rate_compiles_nothing():
    net, count = counted()
    steps_of(net, None, lr=(1e-3, 5e-4))
    assert count.frame_count == 1


def test_a_last_portion_of_another_size_compiles_once_more():
    net, count = counted()
    steps_of(net, 3, 3)                       # 3, 3 and 2 images, twice
    assert count.frame_count == 2


def test_evaluation_compiles_once_and_training_goes_on():
    net, count = counted()
    for _ in range(2):
        net.train()
        steps_of(net, None)
        with torch.no_grad():
            net.eval()(torch.zeros(8, 3, 8, 8), torch.zeros(8))
    assert count.frame_count == 2


class Numbered(nn.Module):
    "Broken: a Python number that changes in each call is a constant of the graph."
    def __init__(self, net):
        super().__init__()
        self.net, self.n = net, 0
    def forward(self, x, t):
        self.n += 1
        return self.net(x, t) * (1 if self.n % 2 else 2)


def test_what_compiles_anew_or_breaks_the_graph_is_seen():
    torch._dynamo.reset()
    count, net = CompileCounter(), Numbered(UNet(3, 6, **LEAN))
    net.compile(backend=count)
    steps_of(net, None, None)
    assert count.frame_count > 1
    def reads(x, t): return x * t.sum().item() if t.sum().item() > 0 else x
    assert torch._dynamo.explain(reads)(torch.zeros(2), torch.ones(2)).graph_break_count > 0
