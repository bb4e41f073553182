"""Parts of the user's in a run: from the command line, through a stop, and what is refused."""
import os
import shutil
import sys
import types
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from iddpm_nb.cli.evaluate import iddpm_eval
from iddpm_nb.cli.sample import iddpm_sample
from iddpm_nb.cli.train import iddpm_train
from iddpm_nb.data import digits, to_float
from iddpm_nb.images.own_sets import own_sets
from iddpm_nb.importance import UniformSampler
from iddpm_nb.running.model import load
from iddpm_nb.running.parts import set_at
from iddpm_nb.running.run import train_run
from iddpm_nb.training import own
from iddpm_nb.training.checkpoint import read_model
from iddpm_nb.training.config import Config, DiffusionConfig, TrainConfig

CODE = """
import torch
from torch import nn
class Bars(torch.utils.data.Dataset):
    classes = ["left", "right"]
    def __len__(self): return 40
    def __getitem__(self, i):
        x = -torch.ones(1, 8, 8)
        x[:, 1 + i % 5:, 4 * (i % 2):4 + 4 * (i % 2)] = i / 80
        return x + 0.1 * torch.rand(1, 8, 8), i % 2
class Net(nn.Module):
    def __init__(self, width=4, classes=None):
        super().__init__()
        self.a, self.b = nn.Conv2d(2, width, 3, padding=1), nn.Conv2d(width, 2, 3, padding=1)
        self.classes = nn.Embedding(classes, width) if classes else None
    def forward(self, xt, t, y=None):
        x = self.a(torch.cat([xt, (t / 1000)[:, None, None, None].expand_as(xt)], 1)).relu()
        return self.b(x if y is None else x + self.classes(y)[:, :, None, None])
def loss(s, out, x0, xt, t, eps): return (out - eps).abs().flatten(1).mean(1)
def betas(T): return torch.linspace(0.001, 0.2, T, dtype=torch.float64)
"""


@pytest.fixture
def code(tmp_path, monkeypatch):
    "A module in the working folder, which no process knows."
    (tmp_path / "bars_code.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(own, "GIVEN", {})
    sys.modules.pop("bars_code", None)
    yield tmp_path
    sys.modules.pop("bars_code", None)


def forget():
    own.GIVEN.clear()
    sys.modules.pop("bars_code", None)


def refusal(command, line, capsys):
    capsys.readouterr()
    with pytest.raises(SystemExit) as e:
        command(line.split())
    assert e.value.code == 1
    return capsys.readouterr().err


TRAIN = ("--data bars_code:Bars --own bars_code:Net --loss bars_code:loss "
         "--schedule bars_code:betas --T 20 --batch 8 --save-every 2 --out run --device cpu ")


def test_the_commands_take_parts_by_their_place(code, capsys):
    iddpm_train((TRAIN + "--steps 4").split())
    forget()
    again = "--resume run --steps 6"
    for command, line in ((iddpm_train, again), (iddpm_sample, "run --n 2 --steps 5 --out a.png"),
                          (iddpm_eval, "run --num-t 15")):
        said = refusal(command, line, capsys)
        assert "--trust" in said and "bars_code" in said and "bars_code" not in sys.modules
    for command, line in ((iddpm_train, again), (iddpm_sample, "run --n 2 --steps 5 --out a.png"),
                          (iddpm_eval, "run --num-t 15 --out e.json")):
        forget()
        command((line + " --trust").split())
    assert (code / "a.png").exists() and (code / "e.json").exists()


def test_a_run_goes_on_to_the_same_weights(code, capsys):
    whole = TRAIN.replace("--out run", "--out whole") + "--steps 6"
    iddpm_train(whole.split())
    iddpm_train(whole.replace("--out whole", "--out other").split())
    shutil.rmtree(code / "other/checkpoints/0000006")       # as if it had been killed before
    forget()
    iddpm_train("--resume other --trust".split())
    one, two = (read_model(code / n / "checkpoints/0000006/model.safetensors")[0]
                for n in ("whole", "other"))
    assert all(torch.equal(one[k], two[k]) for k in one)


def quick(**diffusion):
    train = TrainConfig(steps=2, batch=8, precision="float32")
    return Config(train=train, diffusion=DiffusionConfig(T=20, **diffusion))


HUSH = dict(device="cpu", progress=False, judged=False, say=lambda text: None)
x, y = digits().images[:40], digits().labels[:40]


@pytest.mark.parametrize("data", [x, to_float(x), (x, y), digits().take(torch.arange(40)),
                                  list(zip(to_float(x), y.tolist()))],
                         ids=["bytes", "floats", "pair", "Images", "list"])
def test_images_in_any_form(data, tmp_path):
    run = train_run(quick(), data, out=tmp_path / "run", **HUSH)
    assert run["steps"] == 2 and run.folder == tmp_path / "run"
    assert tuple(run.model.config["shape"]) == (1, 8, 8)
    again = train_run(quick(), data, resume_from=tmp_path / "run", **HUSH)
    assert again["steps"] == 2
    with pytest.raises(ValueError, match="not the images that the checkpoint was trained on"):
        train_run(quick(), x.flip(0)[:30], resume_from=tmp_path / "run", **HUSH)


def test_a_network_with_labels(code, monkeypatch):
    monkeypatch.syspath_prepend(code)
    import bars_code
    c = replace(quick(), data=replace(Config().data, class_cond=True))
    run = train_run(c, bars_code.Bars(), net=(bars_code.Net, {"classes": 2}), out="run", **HUSH)
    one, other = (run.model.sample(4, 5, cond={"y": torch.full((4,), k)}) for k in range(2))
    assert not torch.equal(one, other) and run.model.config["classes"] == ["left", "right"]
    forget()
    close = load("run", trust=True).sample(4, 5, cond={"y": torch.zeros(4, dtype=torch.long)})
    assert torch.equal(close, one)


class Base(nn.Module):
    def __init__(self, more=None):
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 2, 3, padding=1)
    def forward(self, xt, t, y=None):
        time = (t / 1000)[:, None, None, None].expand_as(xt)
        return self.b(self.middle(self.a(torch.cat([xt, time], 1))).relu())
    def middle(self, x): return x


class Counting(Base):
    "Its batch norm counts batches in a whole number."
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(4)
        self.register_buffer("mask", torch.ones(4, dtype=torch.bool))
    def middle(self, x): return self.norm(x) * self.mask[:, None, None]


class Tied(Base):
    def __init__(self):
        super().__init__()
        self.c, self.d = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.d.weight = self.c.weight
    def middle(self, x): return self.d(self.c(x))


class Lazy(Base):
    def __init__(self):
        super().__init__()
        self.c = nn.LazyConv2d(4, 1)
    def middle(self, x): return self.c(x)


class Steps(UniformSampler):
    "It has a state of its own."
    def __init__(self, T):
        super().__init__(T)
        self.n = 0
    def update(self, t, losses): self.n += 1
    def state_dict(self): return {"n": self.n}
    def load_state_dict(self, state): self.n = state["n"]


class Odd(Steps):
    def state_dict(self): return {"n": np.zeros(3)}


class Shaky(list):
    "Images that change at random; by torch, or by a generator of its own."
    def __init__(self, images, own=None):
        super().__init__(images)
        self.own = own
    def __getitem__(self, i):
        x = super().__getitem__(i)
        return (x * (self.own.random() if self.own else torch.rand(()).item())).to(torch.uint8)


def test_a_network_with_whole_numbers_is_saved_and_goes_on(tmp_path):
    run = train_run(quick(), x, net=(Counting, {}), out=tmp_path / "run", **HUSH)
    assert run.model.net.norm.num_batches_tracked.dtype == torch.long
    train_run(quick(), x, net=(Counting, {}), resume_from=tmp_path / "run", **HUSH)
    assert torch.equal(load(tmp_path / "run").sample(2, 5), run.model.sample(2, 5))


def test_a_sampler_with_a_state_goes_on(tmp_path):
    train_run(quick(), x, sampler=Steps, out=tmp_path / "run", **HUSH)
    again = train_run(quick(), x, sampler=Steps, resume_from=tmp_path / "run", **HUSH)
    assert again["steps"] == 2


def test_a_random_set_is_known_by_its_content(tmp_path):
    train_run(quick(), Shaky(x), out=tmp_path / "run", **HUSH)
    train_run(quick(), Shaky(x), resume_from=tmp_path / "run", **HUSH)
    with pytest.raises(ValueError, match="not the images that the checkpoint was trained on"):
        train_run(quick(), Shaky(255 - x), resume_from=tmp_path / "run", **HUSH)
    with pytest.raises(ValueError, match="a generator of its own"):
        train_run(quick(), Shaky(x, np.random.default_rng(0)), out=tmp_path / "b", **HUSH)


@pytest.mark.parametrize("answer, steps", [
    (True, 1), (np.True_, 1), (torch.tensor(True), 1), (1, 2), ("yes", 2), (None, 2), (False, 2)])
def test_only_a_yes_ends_a_run(answer, steps, tmp_path):
    assert train_run(quick(), x, on_step=lambda m: answer, out=tmp_path / "run",
                     **HUSH)["steps"] == steps


def test_a_failing_on_step_is_said_once(tmp_path):
    said = []
    train_run(quick(), x, on_step=lambda m: {}["a"], out=tmp_path / "run",
              **HUSH | {"say": said.append})
    assert sum("what on_step does" in line for line in said) == 1


def test_pil_images():
    grey = [Image.fromarray(i[0].numpy()) for i in x]
    train, held = own_sets(grey)
    assert len(train) + len(held) == 40
    with pytest.raises(ValueError, match="mode P"):
        own_sets([im.quantize(4) for im in grey])


WRONG_CHAIN = {"what": "x0", "schedule": {"name": "linear", "T": 50},
               "network": dict(in_channels=1, out_channels=2, channels=8, mult=[1],
                               num_res_blocks=1, attn_resolutions=[], image_size=8, groups=4)}


class Timeless(nn.Conv2d):
    def __init__(self): super().__init__(1, 2, 3, padding=1)
    def forward(self, xt, t_model): return super().forward(xt)


@pytest.mark.parametrize("how, said", [
    (dict(net=(Timeless, {})), "same for every t_model"),
    (dict(net=Timeless()), "its class and its arguments"),
    (dict(net=(Tied, {})), "one tensor"), (dict(net=(Lazy, {})), "first input"),
    (dict(net=(Base, {"width": 3})), "cannot be made with the arguments"),
    (dict(net=("iddpm_nb.training.predicts:Predicts", WRONG_CHAIN)), "another schedule"),
    (dict(sampler=Odd), "cannot be read back"),
    (dict(loss="bars_code:betas"), "argument|missing"),
    (dict(net=("bars_code:Net", {"width": 4, "classes": 3.5})), "classes|arguments|must be"),
    (dict(loss="bars_code:nothing"), "holds no nothing"),
    (dict(loss=lambda *args: 0), "no name by which"),
    (dict(schedule="bars_code:loss"), "argument|missing"),
    (dict(sampler="bars_code:Net"), "what UniformSampler has"),
    (dict(data=to_float(x) / 2 + 0.5), r"\[0,1\]"),
    (dict(data="bars_code:loss"), "without arguments"),
    (dict(data=7), "no set of images")])
def test_a_bad_part_is_refused_in_one_sentence(code, how, said):
    with pytest.raises((ValueError, TypeError), match=said) as e:
        train_run(quick(), out="bad", **HUSH | how)
    assert "\n" not in str(e.value) and not os.path.exists("bad/checkpoints")


def test_what_a_folder_names_is_not_imported_unasked(code, monkeypatch):
    monkeypatch.syspath_prepend(code)
    import bars_code
    train_run(quick(), bars_code.Bars(), None, (bars_code.Net, {}), bars_code.loss,
              bars_code.betas, out="run", **HUSH)
    forget()
    with pytest.raises(ValueError, match="trust=True"):
        load("run")
    assert "bars_code" not in sys.modules
    assert len(load("run", trust=True).schedule) == 20


def test_a_module_that_python_was_told_to_leave_out(monkeypatch):
    "An entry of sys.modules may be None: the import of that module is blocked."
    monkeypatch.setitem(sys.modules, "left_out", None)
    monkeypatch.setitem(sys.modules, "its_parts", types.ModuleType("its_parts"))
    part = types.SimpleNamespace(__module__="nowhere")
    sys.modules["its_parts"].part = part
    assert own.place_of(part, "the part") == "its_parts:part"


def wrong_inside(): return None + 1


def test_a_function_that_fails_inside_is_not_one_that_wants_arguments():
    place = own.hand_over(wrong_inside, "this function")
    with pytest.raises(TypeError, match="unsupported operand"):
        set_at(place, False)
