"""Checkpoints and logs that are damaged, hostile or laid out otherwise; and what only shows."""
import copy
import errno
import json
import os
import resource
import shutil
import struct
import subprocess
import sys
import time
import types
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import clean_env
from iddpm_nb.data import Batches, Images
from iddpm_nb.schedule import make_schedule
from iddpm_nb.importance import UniformSampler
from iddpm_nb.train import start_training, train
from iddpm_nb.conditioning.labels import Dropping
from iddpm_nb.conditioning.upsampler import Paired
from iddpm_nb.training import checkpoint, log as watching
from iddpm_nb.training.files import checksum
from iddpm_nb.training.checkpoint import (build, checkpoints, load_model, resume, save_checkpoint,
                                          save_model)
from iddpm_nb.training.log import Board, boards, curve, log, read_log

NETWORK = {"in_channels": 1, "out_channels": 2, "channels": 8, "mult": [1, 1], "num_res_blocks": 1,
           "attn_resolutions": [4], "image_size": 8, "num_heads": 2}
CONFIG = {"network": NETWORK, "schedule": {"name": "cosine", "T": 20}}
PLAIN, LAST = torch.contiguous_format, torch.channels_last


def pictures(seed=0, classes=()):
    g = torch.Generator().manual_seed(seed)
    x = torch.randint(256, (12, 1, 8, 8), generator=g, dtype=torch.uint8)
    return Images(x, torch.arange(12) % len(classes), classes) if classes else Images(x)


def start(layout=PLAIN, batches=None, net=None):
    torch.manual_seed(0)
    net = net or build(CONFIG)[0].to(memory_format=layout)
    batches = batches or Batches(pictures(), 4)
    return start_training(net, batches, UniformSampler(20), ema_rates=(0.9,))


def small():
    "A training in which files are short: its network is one layer."
    return start(net=torch.nn.Linear(3, 2))


def go(run, steps=3):
    loop = train(run, make_schedule("cosine", 20), 100, lr=1e-3)
    for _ in range(steps):
        next(loop)
    return run


def step_by(run):
    "One step with gradients that do not depend on the network."
    for i, p in enumerate(run.net.parameters()):
        g = torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
        p.grad = torch.empty_like(p).copy_(g)
    run.opt.step()
    for ema in run.emas:
        ema.update(run.net)
    return weights(run)


def weights(run):
    nets = [run.net, *(e.net for e in run.emas)]
    return torch.cat([p.detach().flatten() for net in nets for p in net.parameters()])


def saved(folder, *steps, keep=9):
    run = small()
    for run.step in steps:
        save_checkpoint(folder, run, {}, keep)
    return run


def renew(path):
    "Checksums to match whatever is in a checkpoint now."
    sums = {p.name: checksum(p) for p in path.iterdir() if p.name != "checksums.json"}
    (path / "checksums.json").write_text(json.dumps(sums))


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def one_sentence(call, *kinds):
    "What a call is refused with: one line that a terminal can show."
    with pytest.raises(kinds or ValueError) as e:
        call()
    said = str(e.value)
    assert said and len(said) < 600 and said.isprintable(), repr(said)
    return said


# Layouts of memory

@pytest.mark.parametrize("layout", [PLAIN, LAST])
@pytest.mark.parametrize("here", [PLAIN, LAST])
def test_moments_and_averages_follow_the_layout_of_their_weights(tmp_path, layout, here):
    run, other = go(start(layout)), start(here)
    save_checkpoint(tmp_path, run, CONFIG)
    assert resume(tmp_path, other)
    assert torch.equal(step_by(other), step_by(run))
    for p, q in zip(other.net.parameters(), other.emas[0].net.parameters()):
        moments = other.opt.state[p]["exp_avg"], other.opt.state[p]["exp_avg_sq"]
        assert {v.stride() for v in (q, *moments)} == {p.stride()}


@pytest.mark.parametrize("layout", [PLAIN, LAST])
def test_a_network_laid_out_anew_after_some_steps_keeps_its_moments(layout):
    runs = [go(start()), go(start())]
    runs[1].net.to(memory_format=layout)
    for run in runs:
        next(train(run, make_schedule("cosine", 20), 4, lr=0.0))
    assert torch.equal(step_by(runs[0]), step_by(runs[1]))
    for p, q in zip(runs[1].net.parameters(), runs[1].emas[0].net.parameters()):
        assert p.stride() == q.stride()


# Best

@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_score_that_is_not_finite_never_is_the_best(tmp_path, bad):
    run = small()
    for run.step, score in ((1, 3.0), (2, bad), (3, 5.0), (4, 4.0)):
        save_checkpoint(tmp_path, run, {}, 1)
        checkpoint.mark_best(tmp_path, run.step, score, 1)
    assert [p.name for p in checkpoints(tmp_path)] == ["0000001", "0000004"]
    assert checkpoint.best(tmp_path) == {"step": 1, "score": 3.0}


def test_a_checkpoint_without_a_score_stays_until_it_is_measured(tmp_path):
    run = small()
    for run.step in (1, 2, 3):
        save_checkpoint(tmp_path, run, {}, 2)
    checkpoint.mark_best(tmp_path, 3, 1.0, 2)
    assert [p.name for p in checkpoints(tmp_path)] == ["0000002", "0000003"]
    one_sentence(lambda: checkpoint.mark_best(tmp_path, 7, 0.5, 2))


BESTS = [b"[1]", b"3", b"null", b"{}", b'{"step": 1}', b'{"step": "1", "score": 0.0}',
         b'{"step": 1, "score": NaN}', b'{"step": 1, "score": "low"}', b"[" * 100_000,
         b'{"step": -1, "score": 0.0}', b"\xff\xfe", b'{"step": 1, "score": 0.']


@pytest.mark.parametrize("text", BESTS)
def test_a_best_json_of_another_form_is_set_aside(tmp_path, text):
    run = saved(tmp_path, 1, 2)
    (tmp_path / "best.json").write_bytes(text)
    run.step = 3
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        save_checkpoint(tmp_path, run, {}, 2)
        checkpoint.mark_best(tmp_path, 3, 1.0, 2)
    assert said and "best.json" in str(said[0].message)
    assert checkpoint.best(tmp_path) == {"step": 3, "score": 1.0}


def test_a_best_checkpoint_that_is_gone_does_not_stand_in_the_way(tmp_path):
    saved(tmp_path, 1, 2)
    (tmp_path / "best.json").write_text('{"step": 9, "score": -1.0}')
    assert checkpoint.best(tmp_path) == {}
    checkpoint.mark_best(tmp_path, 2, 1.0)
    assert checkpoint.best(tmp_path)["step"] == 2


# Names

@pytest.mark.parametrize("name", ["000000²", "٠٠٠٠٠٢٠", "20", "00000020", "0000020.bak", "1e7"])
def test_strange_names_are_no_steps(tmp_path, name):
    saved(tmp_path, 3)
    shutil.copytree(tmp_path / "0000003", tmp_path / name)
    assert [p.name for p in checkpoints(tmp_path)] == ["0000003"]
    run = small()
    assert resume(tmp_path, run).name == "0000003" and run.step == 3
    save_checkpoint(tmp_path, run, {}, 1)
    assert (tmp_path / name).is_dir()


def test_the_step_in_the_state_decides_not_the_name(tmp_path):
    saved(tmp_path, 3, 6)
    for name in "9999999", "12345678":
        shutil.copytree(tmp_path / "0000003", tmp_path / name)
    run = small()
    with pytest.warns(UserWarning) as said:
        assert resume(tmp_path, run).name == "0000006"
    assert ["12345678" in str(w.message) for w in said] == [True, False]
    assert run.step == 6
    assert [p.name for p in checkpoints(tmp_path)] == ["0000003", "0000006"]


def test_links_are_removed_as_links(tmp_path):
    folder, kept = tmp_path / "run", tmp_path / "elsewhere"
    saved(kept, 1)
    folder.mkdir()
    (folder / "0000001").symlink_to(kept / "0000001")
    (folder / "0000009").symlink_to(tmp_path / "nowhere")           # where the next one belongs
    (folder / ".0000004.part").symlink_to(kept)
    saved(folder, 2, 9, keep=1)
    assert names(folder) == ["0000009"] and checkpoint.whole(folder / "0000009")
    assert names(kept) == ["0000001"]


def test_a_file_in_the_place_of_a_checkpoint(tmp_path):
    (tmp_path / "0000002").write_text("a note")
    saved(tmp_path, 2)
    assert checkpoint.whole(tmp_path / "0000002")


def test_an_old_checkpoint_that_cannot_be_deleted_is_a_warning(tmp_path, monkeypatch):
    saved(tmp_path, 1)
    def stuck(path, *args, **kwargs): raise OSError(errno.EBUSY, "Device or resource busy")
    monkeypatch.setattr(shutil, "rmtree", stuck)
    with pytest.warns(UserWarning, match="0000001"):
        saved(tmp_path, 2, keep=1)
    assert checkpoint.whole(tmp_path / "0000002")


def test_damaged_a_second_time(tmp_path):
    for _ in range(2):
        run = saved(tmp_path, 3, 6)
        (tmp_path / "0000006" / "state.pt").write_bytes(b"cut")
        with pytest.warns(UserWarning, match="damaged"):
            path = resume(tmp_path, run)
        assert path.name == "0000003"
    assert len([n for n in names(tmp_path) if "damaged" in n]) == 2


# Files that cannot be read

FILES = ["checksums.json", "state.pt", "model.safetensors", "ema_0.9.safetensors"]


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("code", [errno.EACCES, errno.EIO])
def test_a_file_that_cannot_be_read_is_no_damage(tmp_path, monkeypatch, file, code):
    saved(tmp_path, 3, 6)
    real = open
    def opened(path, *args, **kwargs):
        bad = str(path).endswith(f"0000006/{file}")
        if bad: raise OSError(code, os.strerror(code), str(path))
        return real(path, *args, **kwargs)
    monkeypatch.setattr("builtins.open", opened)
    monkeypatch.setattr("io.open", opened)
    said = one_sentence(lambda: resume(tmp_path, small()), OSError)
    assert file in said and "cannot be read" in said
    assert names(tmp_path) == ["0000003", "0000006"]


# What a model file says

CLAIMS = {"width": {"channels": 4096}, "wider": {"channels": 10**9},
          "blocks": {"num_res_blocks": 10**6}, "size": {"image_size": 10**6},
          "levels": {"mult": [1] * 60}, "odd": {"channels": "8"}}


@pytest.mark.parametrize("claim", CLAIMS.values(), ids=CLAIMS)
def test_a_claim_takes_no_memory_and_no_time(tmp_path, claim):
    save_model(tmp_path / "m.safetensors", build(CONFIG)[0], CONFIG | {"network": NETWORK | claim})
    before, clock = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    one_sentence(lambda: load_model(tmp_path / "m.safetensors"))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000      # kilobytes
    assert time.process_time() - clock < 3


def raw(path, header, data=b"\0" * 8):
    "A safetensors file with this header."
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)
    return path


def with_config(text):
    meta = json.dumps({"iddpm_nb": text}).encode()
    return b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"__metadata__":%s}' % meta


DEEP = "[" * 10_000 + "]" * 10_000
LONG = json.dumps(CONFIG | {"schedule": {"name": "cosine", "T": 10**9}})
HEADERS = {
    "deep": with_config(DEEP),
    "deep in network": with_config(f'{{"network": {DEEP}, "schedule": {{}}}}'),
    "list": with_config("[]"),
    "number": with_config("7"),
    "no JSON": with_config("{"),
    "empty": with_config("{}"),
    "network is text": with_config('{"network": "low_size", "schedule": {}}'),
    "twice": with_config('{"a": 1, "a": 2}'),
    "no schedule": with_config(json.dumps({"network": NETWORK})),
    "long chain": with_config(LONG),
    "the same name twice": b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
                           b'"a":{"dtype":"I32","shape":[2],"data_offsets":[0,8]},'
                           b'"__metadata__":{"iddpm_nb":"{}"}}',
    "two places": b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
                  b'"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}'}


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS)
def test_a_header_of_another_form_is_one_sentence_with_the_file(tmp_path, header):
    path = raw(tmp_path / "odd\n.safetensors", header)
    said = one_sentence(lambda: load_model(path))
    assert "odd" in said or "configuration" in said


def test_weights_that_are_no_floats(tmp_path):
    path = tmp_path / "m.safetensors"
    save_model(path, build(CONFIG)[0], CONFIG)
    data = path.read_bytes()
    end = 8 + struct.unpack("<Q", data[:8])[0]
    raw(path, data[8:end].replace(b'"F32"', b'"I32"'), data[end:])
    assert "I32" in one_sentence(lambda: load_model(path))


# What a training state says

def put(path, new):
    "An edit of one place in a state."
    def edit(state):
        *way, last = path
        place = state
        for k in way:
            place = place[k]
        place[last] = new(place[last]) if callable(new) else new
        return state
    return edit


MOMENT = ("opt", "state", 0, "exp_avg")
RNG = ("rng", "torch")
STATES = {
    "huge": put(MOMENT, lambda m: torch.zeros(1).expand(10**5, 6 * 10**4)),
    "flat": put(MOMENT, lambda m: m.flatten()),
    "short": put(MOMENT, lambda m: m[:1]),
    "half": put(MOMENT, lambda m: m.half()),
    "whole numbers": put(MOMENT, lambda m: m.long()),
    "sparse": put(MOMENT, lambda m: m.to_sparse()),
    "a number": put(MOMENT, 1.0),
    "another name": put(("opt", "state", 0), {}),
    "too many": put(("opt", "state", 99), {}),
    "no moments at all": put(("opt", "state"), 3),
    "no groups": put(("opt", "param_groups"), []),
    "other decay": put(("opt", "param_groups", 0, "weight_decay"), 3.0),
    "step": put(("step",), -7),
    "a text": put(("step",), "three"),
    "nan": put(("seconds",), float("nan")),
    "ages": put(("emas",), {"0.9": "old"}),
    "other averages": put(("emas",), {"0.\x1b": 1}),
    "sampler": put(("sampler",), {"history": torch.zeros(2)}),
    "data": put(("batches",), [1]),
    "no order": put(("batches",), {}),
    "short random state": put(("rng", "run"), lambda r: r[:10]),
    "short dropout": put(RNG, lambda r: r[:, :10]),
    "huge random state": put(RNG, lambda r: r[:, :1].expand(1, 10**11)),
    "no random state": put(("rng",), {}),
    "list": lambda s: [s],
    "nothing": lambda s: None,
    "tensor": lambda s: torch.zeros(3)}


@pytest.mark.parametrize("edit", STATES.values(), ids=STATES)
def test_a_state_of_another_form_is_refused_and_nothing_is_changed(tmp_path, edit):
    run = small()
    for p in run.net.parameters():
        p.grad = torch.ones_like(p)
    run.opt.step()
    run.step = 3
    path = save_checkpoint(tmp_path, run, {})
    torch.save(edit(torch.load(path / "state.pt", weights_only=True)), path / "state.pt")
    renew(path)
    other = small()
    before, own = weights(other), copy.deepcopy(checkpoint.training_state(other))
    with warnings.catch_warnings():            # a step that is not its folder's is passed over
        warnings.simplefilter("ignore")
        try:
            assert resume(tmp_path, other) is None
        except ValueError as e:
            assert str(e).isprintable() and len(str(e)) < 600
    now = checkpoint.training_state(other)
    assert torch.equal(weights(other), before) and other.step == 0 and not now["opt"]["state"]
    assert all(torch.equal(now["rng"][k], own["rng"][k]) for k in own["rng"])
    step_by(other)                                         # nor does the process die


def test_a_packed_state_is_not_unpacked(tmp_path):
    saved(tmp_path, 3)
    path = tmp_path / "0000003" / "state.pt"
    with zipfile.ZipFile(path) as z:
        files = {n: z.read(n) for n in z.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as z:
        for n, data in files.items():
            z.writestr(n, data)
        z.writestr("archive/data/bomb", b"\0" * 10**7)
    renew(path.parent)
    assert "state.pt" in one_sentence(lambda: resume(tmp_path, small()))


# Other data

def test_new_data_are_passed_on_to_what_draws_them(tmp_path):
    def drawn(seed):
        d = pictures(seed, ("cat", "dog"))
        return Paired(Dropping(Batches(d, 4), 0.5, 2), 4, 0.1)
    state = drawn(0).state_dict()
    one_sentence(lambda: drawn(1).load_state_dict(state))
    new = drawn(1)
    new.load_state_dict(state, True)
    assert torch.equal(new.generator.get_state(), state["noise"])
    run = start(net=torch.nn.Linear(2, 2))
    run.step = 5
    save_checkpoint(tmp_path, run, {})
    other = start(net=torch.nn.Linear(2, 2), batches=Batches(pictures(1), 4))
    one_sentence(lambda: resume(tmp_path, other))
    assert other.step == 0 and resume(tmp_path, other, new_data=True) and other.step == 5


# What only shows

M = {"step": 2, "loss": 1.0, "lr": 0.1, "images_per_s": 3.0, "grad_norm": 1.0,
     "quarters": [0.1, 0.2, 0.3, 0.4], "held_out": 2.0}


@pytest.fixture
def once():
    watching.SAID.clear()
    yield
    watching.SAID.clear()


def test_a_plot_that_cannot_be_drawn_is_a_warning(tmp_path, monkeypatch, once):
    log(tmp_path, M)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)              # not installed
    with pytest.warns(UserWarning, match=r"curve\.png was not drawn") as said:
        curve(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        curve(tmp_path)                                                     # said once
    assert len(said) == 1


def test_a_backend_that_nobody_knows(tmp_path):
    log(tmp_path, M)
    code = f"from iddpm_nb.training.log import curve; curve({str(tmp_path)!r}); print('on')"
    env = clean_env(MPLBACKEND="nonsense", PYTHONPATH=str(Path(watching.__file__).parents[2]))
    p = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert p.stdout == "on\n" and "was not drawn" in p.stderr and "Traceback" not in p.stderr


@pytest.mark.parametrize("name", ["cost_$5_$10^", "$", "\\$_", "a\nb", "日本", "$" * 99, "\udce9"])
def test_a_curve_of_a_run_of_any_name(tmp_path, name, once):
    folder = tmp_path / name
    folder.mkdir()
    log(folder, M)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        curve(folder)
    assert names(folder) == ["curve.png", "metrics.jsonl"]
    assert (folder / "curve.png").stat().st_size > 1000


def test_a_curve_that_is_in_the_way_or_may_not_be_written(tmp_path, monkeypatch, once):
    import matplotlib.pyplot as plt
    before = plt.get_fignums()
    log(tmp_path, M)
    (tmp_path / "curve.png").mkdir()
    with pytest.warns(UserWarning, match="not drawn"):
        curve(tmp_path)
    watching.SAID.clear()
    def full(*args): raise OSError(errno.EROFS, os.strerror(errno.EROFS))
    monkeypatch.setattr(os, "fsync", full)
    with pytest.warns(UserWarning, match="not drawn"):
        curve(tmp_path)
    assert plt.get_fignums() == before       # other tests of this process may have left some open


def test_a_tensorboard_that_raises(tmp_path, monkeypatch, once):
    class Writer:
        def __init__(self, *args, **kwargs): raise RuntimeError("no such device")
    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    with pytest.warns(UserWarning, match="TensorBoard"):
        assert boards(tmp_path) == {}
    broken = types.SimpleNamespace(add_scalar=lambda *args: 1 / 0, flush=lambda: None)
    with pytest.warns(UserWarning, match="TensorBoard"):
        log(tmp_path, M, {"TensorBoard": Board(broken)})
    assert read_log(tmp_path) == [M]


def test_a_log_that_takes_no_lines(tmp_path, monkeypatch, once):
    log(tmp_path, M)
    def full(*args): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with monkeypatch.context() as m:
        m.setattr("builtins.open", full)
        with pytest.warns(UserWarning, match="No space left"):
            log(tmp_path, M)
    with open(tmp_path / "metrics.jsonl", "a") as f:
        f.write('{"step": 3, "lo')  # half a line
    log(tmp_path, M | {"step": 4})
    with pytest.warns(UserWarning, match="another form"):
        rows = read_log(tmp_path)
    assert [r["step"] for r in rows] == [2, 4]


def test_a_log_that_cannot_be_read_is_not_emptied(tmp_path, monkeypatch, once):
    log(tmp_path, M)
    def denied(self): raise PermissionError(errno.EACCES, "Permission denied", str(self))
    with monkeypatch.context() as m:
        m.setattr(Path, "read_bytes", denied)
        m.setattr(Path, "read_text", denied)
        with pytest.warns(UserWarning, match="left as it is"):
            rows = read_log(tmp_path, upto=1)
    assert rows == []
    assert read_log(tmp_path) == [M]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_named_pipes_are_not_waited_for(tmp_path, once):
    run = saved(tmp_path, 3, 6)
    for name in "best.json", "metrics.jsonl", "0000006/checksums.json":
        (tmp_path / name).unlink(missing_ok=True)
        os.mkfifo(tmp_path / name)
    with pytest.warns(UserWarning):
        assert checkpoint.best(tmp_path) == {} and read_log(tmp_path) == []
        assert resume(tmp_path, run).name == "0000003"


def test_memory_that_runs_out_is_not_called_damage(tmp_path, monkeypatch):
    saved(tmp_path, 3)
    real = torch.load
    def full(*args, **how):
        if how.get("mmap"): return real(*args, **how)
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to get 9 bytes")
    monkeypatch.setattr(torch, "load", full)
    with pytest.raises(RuntimeError, match="allocate"):
        resume(tmp_path, small())


@pytest.mark.parametrize("kind, how", [("SGD", {"momentum": 0.9, "fused": True}), ("Adafactor", {}),
                                       ("Adam", {"amsgrad": True}), ("RMSprop", {})])
def test_other_optimizers_go_on_too(tmp_path, kind, how):
    run, other = small(), small()
    for r in (run, other):
        r.opt = getattr(torch.optim, kind)(r.net.parameters(), lr=0.01, **how)
    for _ in range(2):
        step_by(run)
    save_checkpoint(tmp_path, run, {})
    assert resume(tmp_path, other) and torch.equal(step_by(other), step_by(run))


def test_a_checkpoint_that_lost_its_average_says_so(tmp_path):
    path = save_checkpoint(tmp_path, small(), {})
    (path / "ema_0.9.safetensors").unlink()
    renew(path)
    assert "lacks ema_0.9" in one_sentence(lambda: resume(tmp_path, small()), FileNotFoundError)
