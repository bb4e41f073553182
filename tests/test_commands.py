"""The commands under bad input: each line ends in one sentence, and nothing made is lost."""
import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from iddpm_nb.checks import CALLS, crash_at
from iddpm_nb.data import digits
from iddpm_nb.unet import UNet
from iddpm_nb.sampling import sample
from iddpm_nb.conditioning.upsampler import lower
from iddpm_nb.training.checkpoint import checkpoints
from iddpm_nb.interop.openai import to_openai
from iddpm_nb.running import model as models
from iddpm_nb.cli import convert, sample as sampling, train
from iddpm_nb.cli.train import iddpm_train
from iddpm_nb.cli.sample import iddpm_sample
from iddpm_nb.cli.convert import iddpm_convert

TRAIN = ("--steps 2 --T 20 --batch 4 --channels 8 --groups 4 --num-heads 2 --mult 1 "
         "--attn-resolutions --warmup 0 --save-every 2 --device cpu").split()
FEW = "--n 3 --steps 2 --out".split()
KNOWN = "--image-size 16 --num-heads 4 --schedule cosine --T 20 --rescale-t True".split()
NAMES = ["\x1b[31mred\n", "東京", "zwei"]   # the first would colour a terminal and break the line


class Slow(BaseException):
    "Not an error that a command could take for one of the user's."


@contextlib.contextmanager
def soon(seconds=60):
    "What takes longer fails."
    def late(*args): raise Slow(f"longer than {seconds} s")
    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def ask(command, *words, out=None):
    "Type a command -> its status, and what it printed."
    out, err, status = out or io.StringIO(), io.StringIO(), 0
    with soon(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            command([str(w) for w in words])
        except SystemExit as e:
            status = e.code or 0
    return status, out.getvalue() if isinstance(out, io.StringIO) else "", err.getvalue()


def refused(command, *words):
    "The one sentence that these words get."
    status, out, err = ask(command, *words)
    assert status in (1, 2) and "Traceback" not in err, (words, status, err)
    if status == 1:
        name, _, said = err.partition(": ")
        assert name == command.__name__ and said.endswith("\n") and len(said) > 10, err
        assert said[:-1].isprintable(), err                           # so it is one line
    return err


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    "A class-conditional run of two steps, an upsampler, its base, an official file; made once."
    folder, before = tmp_path_factory.mktemp("home"), os.getcwd()
    os.chdir(folder)
    d = digits()
    np.savez("low.npz", images=lower(d.images[:40], 4)[:, 0].numpy())
    np.savez("mixed.npz", images=d.images[:40, 0].numpy(), labels=np.arange(40) % 3, classes=NAMES)
    for words in ("--class-cond --label-drop 0.2 --out classes --data mixed.npz",
                  "--out base --data low.npz",
                  "--out up --upsample-from 4 --noise-augment 0.1 --schedule linear --T 30"):
        status, out, err = ask(iddpm_train, *TRAIN, *words.split())
        assert status == 0, err
    net = UNet(3, 6, 32, (1, 2), 1, (8,), 16, num_classes=10)
    torch.save(to_openai(net), "official.pt")
    (folder / "text.safetensors").write_text("hello")
    (folder / "empty").mkdir()
    os.mkfifo("pipe")
    yield folder
    os.chdir(before)


@pytest.fixture(autouse=True)
def there(home, monkeypatch):
    monkeypatch.chdir(home)


BAD_SAMPLES = [
    "classes --steps ", "classes --steps '", "classes --steps 0", "classes --steps -3",
    "classes --steps 1,,2", "classes --steps ٥٠", "classes --steps 1e1",
    "classes --steps 99999999999999999999", "classes --steps ddim", "classes --steps ddim٣",
    "classes --steps 5.0", "classes --n 0", "classes --n -1", "classes --n 10000000000000",
    "classes --n " + "9" * 400, "classes --n 1e3", "classes --n x", "classes --chunk 0",
    "classes --chunk -5", "classes --eta nan", "classes --eta 0.5",
    "classes --method ddim --eta nan", "classes --method ddim --eta inf",
    "classes --method ddim --eta -1", "classes --method ddim --eta 1.01",
    "classes --method ddim --variance beta", "classes --method euler", "classes --variance large",
    "classes --guidance 1e30", "classes --guidance nan", "classes --guidance inf",
    "classes --guidance -1", "base --guidance 2", "classes --seed -1",
    "classes --seed 18446744073709551615", "classes --seed 9223372036854775808",
    "classes --seed 1.5", "classes --base-steps 3", "up --low low.npz --base-steps 3",
    "classes --base base", "classes --low low.npz", "base --base ", "base --low ", "up",
    "up --base base --low low.npz", "up --base classes", "up --base up", "up --base nowhere",
    "up --low nowhere.npz", "up --low pipe", "up --low mixed.npz", "up --low official.pt",
    "up --low empty", "up --low base", "up --base base --base-steps ",
    "up --base base --base-steps 99", "up --base base --steps 99", "up --base base --class 3",
    "classes --class ", "classes --class 3", "classes --class -1", "classes --class 0,,1",
    "classes --class nope", "base --class 0", "classes --weights nope",
    "classes --weights ../model", "classes --weights /etc/passwd", "low.npz --weights model",
    "classes --preset cifar10_uncond_50M_500K", "official.pt", "official.pt --preset nope",
    "nowhere", "empty", "pipe", "text.safetensors", "low.npz", "/dev/null", "/dev/zero", "a\tb",
    "-", "classes --device abacus", "classes --device meta", "classes --device /dev/meta",
    "classes --device cuda:99", "classes --device mps", "classes --device xla",
    "classes --device privateuseone", "classes --device vulkan", "classes --precision float16",
    "classes --compile never", "classes --no-such-option", "classes --n", "classes base",
    "classes --out ", "classes --out a.jpg", "classes --out nowhere/a.png", "classes --out empty",
    "classes --out .png", "classes --out /", "classes --out " + "x" * 300 + ".png",
]


@pytest.mark.parametrize("line", BAD_SAMPLES)
def test_sampling_refuses_in_a_sentence(line):
    before = sorted(Path().rglob("*"))
    refused(iddpm_sample, *line.split(" "))
    assert sorted(Path().rglob("*")) == before, "something was left behind"


SETTINGS = [
    "--T 10000000", "--T 0", "--T -5", "--T 1", "--T 1e7", "--T 99999999999999999999",
    "--num-heads 0", "--num-heads -4", "--num-heads 5", "--image-size 0", "--image-size -16",
    "--image-size 7", "--image-size 1000000000", "--schedule sigmoid", "--groups 0", "--groups -32",
    "--groups 5", "--dropout nan", "--dropout 2", "--dropout -1", "--low-size 8", "--low-size 0",
    "--out ", "--out a.pt", "--out nowhere/a.safetensors", "--out empty", "--out official.pt",
    "--out text.safetensors", "--preset cifar10_uncond_50M_500K", "--rescale-t maybe",
]
BAD_CONVERSIONS = [
    "nowhere.pt", "empty", "pipe", "/dev/null", "text.safetensors", "low.npz", "base",
    "official.pt", "official.pt --preset nope", "official.pt --preset cifar10_uncond_50M_500K",
    "official.pt --T 20", "classes/checkpoints/0000002/model.safetensors",
    *(f"official.pt {' '.join(KNOWN)} {more}" for more in SETTINGS),
]


@pytest.mark.parametrize("line", BAD_CONVERSIONS)
def test_converting_refuses_in_a_sentence(line):
    before = sorted(Path().rglob("*"))
    refused(iddpm_convert, *line.split(" "))
    assert sorted(Path().rglob("*")) == before, "something was left behind"


BAD_TRAININGS = [
    "--resume nowhere", "--resume empty", "--resume ", "--resume", "--resume classes --out other",
    "--resume classes --preset cifar10", "--resume pipe", "--resume low.npz",
    "--resume auto --out empty/nothing/pipe --data nowhere", "--new-data", "--preset nope",
    "--preset ", "--resume classes --steps 1", "--resume classes --channels 64", "--device meta",
    "--device /dev/meta", "--device abacus", "--no-such-option", "--steps ٣x", "--data nowhere",
    "--data pipe", "--data empty", "--data /dev/null",
    "--seed -1", "--seed 18446744073709551615", "--seed 1.5", "--T 10000000",
    "--batch 100000000000000000000",
]


def test_too_many_levels_are_called_that():
    assert "cannot be halved 4 times" in refused(iddpm_train, "--mult", 1, 2, 2, 2, 2)


@pytest.mark.parametrize("line", BAD_TRAININGS)
def test_training_refuses_in_a_sentence(line):
    refused(iddpm_train, *line.split(" "))
    assert not Path("runs").exists()


OTHERS = [(iddpm_train, "--data"), (iddpm_train, "--root"), (iddpm_train, "--device"),
          (iddpm_train, "--out"), (iddpm_sample, "base --device"),
          (iddpm_sample, "base --weights"), (iddpm_convert, "official.pt --preset")]
DIGITS = [(iddpm_train, "--T ١٠"), (iddpm_train, "--threads ٢"), (iddpm_train, "--steps ٣"),
          (iddpm_train, "--lr ٠.١"), (iddpm_train, "--mult 1 ٢"), (iddpm_sample, "base --n ٣"),
          (iddpm_sample, "base --chunk ３"), (iddpm_convert, "official.pt --T ٢٠")]


@pytest.fixture
def idle(monkeypatch):
    "The work of the commands, left undone: what they were asked for."
    seen = []
    def note(*args, **kwargs): seen.append((args, kwargs))
    monkeypatch.setattr(sampling, "draw", note)
    monkeypatch.setattr(train, "train_run", note)
    return seen


@pytest.mark.parametrize("command, line", OTHERS)
def test_nothing_is_given_as_an_empty_text(idle, command, line):
    *words, name = line.split()
    for given in [name, ""], [f"{name}="]:
        said = " ".join(refused(command, *words, *given).split())
        assert name in said and "it is empty: give it a value, or leave it out" in said
    assert not idle


@pytest.mark.parametrize("command, line", DIGITS)
def test_numbers_have_one_kind_of_digits(idle, command, line):
    said = refused(command, *line.split())
    assert line.split()[-1] in said or "digits 0 to 9" in said
    assert not idle


def test_names_may_have_any_digits(idle):
    assert ask(iddpm_sample, "٢", "--class", "٣,４", "--weights", "ema_٩")[0] == 0
    (o, _), _ = idle[0]
    assert (o.path, o.classes, o.weights) == ("٢", "٣,４", "ema_٩")


ALLOCATOR = ("[enforce fail at alloc_cpu.cpp:126] err == 0. DefaultCPUAllocator: can't allocate "
             "memory: you tried to allocate 8000000000000 bytes. Error code 12")
NO_MEMORY = RuntimeError(ALLOCATOR), MemoryError(), torch.OutOfMemoryError("CUDA out of memory.")
OURS = RuntimeError("a fault of ours"), KeyError("a fault of ours"), AttributeError("ours")


@pytest.mark.parametrize("error", NO_MEMORY)
@pytest.mark.parametrize("command", [iddpm_sample, iddpm_train, iddpm_convert])
def test_memory_that_runs_out_is_a_sentence_with_a_hint(monkeypatch, command, error):
    def fail(*args, **kwargs): raise error
    for module, name in (sampling, "load"), (train, "train_run"), (convert, "read_openai"):
        monkeypatch.setattr(module, name, fail)
    words = {iddpm_sample: ["base"], iddpm_train: TRAIN, iddpm_convert: ["official.pt"]}
    said = refused(command, *words[command])
    assert "--micro" in said and "--chunk" in said


@pytest.mark.parametrize("error", OURS)
def test_faults_of_ours_are_not_hidden(monkeypatch, error):
    def fail(*args, **kwargs): raise error
    monkeypatch.setattr(sampling, "load", fail)
    with pytest.raises(type(error)):
        ask(iddpm_sample, "base")


# what a sampling leaves behind

def made(folder, name):
    "The arrays of a sampling, and the size of its picture."
    with np.load(folder / f"{name}.npz") as f:
        arrays = {k: f[k] for k in f.files}
    with Image.open(folder / f"{name}.png") as picture:
        return arrays, picture.size


def spied(monkeypatch):
    "What labels the networks are shown."
    seen, real = [], sampling.load
    def note(net, args, kwargs):
        if kwargs["y"].device.type == "cpu": seen.append(kwargs["y"])
    def load(*args, **more):
        model = real(*args, **more)
        model.net.register_forward_pre_hook(note, with_kwargs=True)
        return model
    monkeypatch.setattr(sampling, "load", load)
    return seen


def test_labels_drawn_at_random_are_written(monkeypatch, tmp_path):
    seen = spied(monkeypatch)
    line = ["classes", "--n", 9, "--steps", 2, "--seed", 5, "--out", tmp_path / "a.png"]
    assert ask(iddpm_sample, *line)[0] == 0
    f, _ = made(tmp_path, "a")
    assert all(f["labels"].tolist() == y.tolist() for y in seen) and len(np.unique(f["labels"])) > 1
    assert f["classes"].tolist() == NAMES
    model, chance = models.load("classes"), torch.Generator().manual_seed(5)
    y = torch.randint(3, (9,), generator=chance)      # the images that this seed has always given
    how = dict(generator=chance, cond={"y": y}, progress=False)
    x = sample(model.net, model.schedule, (9, 1, 8, 8), 2, **how)
    assert (np.abs(f["images"][..., 0] / 127.5 - 1 - x[:, 0].numpy()) < 0.005).all()
    assert y.tolist() == f["labels"].tolist()
    line = [*TRAIN, "--class-cond", "--data", tmp_path / "a.npz", "--out", tmp_path / "next"]
    status, _, err = ask(iddpm_train, *line)                          # and they are data again
    assert status == 0 and models.load(tmp_path / "next").config["classes"] == NAMES, err


def test_labels_of_two_stages_are_written(monkeypatch, tmp_path):
    up = "--upsample-from 4 --noise-augment 0.1 --schedule linear --T 30".split()
    for name, file, more in ("base", "low.npz", []), ("up", "mixed.npz", up):
        data, out = tmp_path / file, tmp_path / name
        np.savez(data, images=np.load(file)["images"], labels=np.arange(40) % 3)
        assert ask(iddpm_train, *TRAIN, "--class-cond", "--data", data, "--out", out, *more)[0] == 0
    seen = spied(monkeypatch)
    line = [tmp_path / "up", "--n", 7, "--steps", 2, "--seed", 3, "--out"]
    base = ["--base", tmp_path / "base", "--base-steps", 2]
    assert ask(iddpm_sample, *line, tmp_path / "a.png", *base)[0] == 0
    assert ask(iddpm_sample, *line, tmp_path / "b.png", "--low", "low.npz")[0] == 0
    for name, shown in ("a", seen[:4]), ("b", seen[4:]):
        f, _ = made(tmp_path, name)
        assert len(shown) in (2, 4) and all(f["labels"].tolist() == y.tolist() for y in shown)
        assert len(np.unique(f["labels"])) > 1 and f["low"].shape == (7, 4, 4, 1)


def test_of_many_images_a_picture_shows_some(tmp_path):
    status, out, _ = ask(iddpm_sample, "base", *FEW, tmp_path / "a.png", "--n", 450)
    f, size = made(tmp_path, "a")
    assert status == 0 and "the first 400" in out
    assert f["images"].shape == (450, 4, 4, 1) and size[0] == size[1]


def test_a_picture_that_fails_is_a_warning(monkeypatch, tmp_path):
    def fail(*args, **kwargs): raise MemoryError("Unable to allocate 80. GiB")
    monkeypatch.setattr(sampling, "image_grid", fail)
    status, out, err = ask(iddpm_sample, "base", *FEW, tmp_path / "a.png")
    assert status == 0 and "a.npz" in out and "a.png" not in out
    assert err.count("\n") == 1 and "80. GiB" in err
    assert len(np.load(tmp_path / "a.npz")["images"]) == 3 and not (tmp_path / "a.png").exists()


def test_the_name_is_taken_before_the_sampling(monkeypatch, tmp_path):
    real, inner = sampling.sampled, []
    def sampled(*args):
        if not inner:                                                  # meanwhile another one comes
            inner.append(None)
            inner[0] = [ask(iddpm_sample, *line, "--out", tmp_path / "a.png"),
                        ask(iddpm_sample, *line)]
        return real(*args)
    monkeypatch.setattr(sampling, "sampled", sampled)
    line = ["base", "--n", 3, "--steps", 3]
    assert ask(iddpm_sample, *line, "--out", tmp_path / "a.png")[0] == 0
    (status, _, err), (other, out, _) = inner[0]
    assert status == 1 and "a.png" in err and other == 0 and "samples_3x3.png" in out


def test_the_name_of_a_conversion_is_taken_before_it(monkeypatch, tmp_path):
    real, inner = convert.read_openai, []
    line = ["official.pt", *KNOWN, "--out", tmp_path / "a.safetensors"]
    def read(*args, **given):
        if not inner: inner.append(refused(iddpm_convert, *line))
        return real(*args, **given)
    monkeypatch.setattr(convert, "read_openai", read)
    assert ask(iddpm_convert, *line)[0] == 0 and "a.safetensors is taken" in inner[0]


WRITES = [*CALLS, (np, "savez_compressed"), (Image.Image, "save")]


def test_killed_at_any_moment_the_same_command_works_again(tmp_path):
    for k in range(20):
        folder = tmp_path / str(k)
        folder.mkdir()
        line = ["base", *FEW, folder / "a.png"]
        reached = crash_at(k, lambda line=line: ask(iddpm_sample, *line), WRITES)
        if (folder / "a.npz").exists(): assert len(np.load(folder / "a.npz")["images"]) == 3
        if (folder / "a.png").exists(): Image.open(folder / "a.png").load()
        if not reached: break
        done = (folder / "a.png").exists()
        status, _, err = ask(iddpm_sample, *line)
        assert (status, "is taken" in err) == ((1, True) if done else (0, False)), err
        assert not list(folder.glob(".*.part"))
    assert 5 < k < 20


def test_another_npz_beside_the_picture_is_not_overwritten(tmp_path):
    line = ["base", *FEW, tmp_path / "a.png"]
    ask(iddpm_sample, *line)
    (tmp_path / "a.png").unlink()
    whole = (tmp_path / "a.npz").read_bytes()
    for more in ["--seed", 1], ["--n", 4]:
        assert "is taken" in refused(iddpm_sample, *line, *more)
    assert (tmp_path / "a.npz").read_bytes() == whole
    for junk in b"", b"PK", b"hello":
        (tmp_path / "b.npz").write_bytes(junk)
        assert "is taken" in refused(iddpm_sample, "base", *FEW, tmp_path / "b.png")


def test_a_conversion_that_is_killed_works_again(tmp_path):
    for k in range(20):
        out = tmp_path / f"{k}.safetensors"
        line = ["official.pt", *KNOWN, "--out", out]
        if not crash_at(k, lambda line=line: ask(iddpm_convert, *line)): break
        if out.exists(): load_file(out)
        else: assert ask(iddpm_convert, *line)[0] == 0 and load_file(out)
        assert not list(tmp_path.glob(".*.part"))
    assert 1 < k < 20


# what is printed

def test_words_that_a_console_cannot_show(tmp_path):
    folder = tmp_path / "Bücher 東京"
    folder.mkdir()
    console = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    assert ask(iddpm_sample, "base", *FEW, folder / "a.png", out=console)[0] == 0
    console.flush()
    said = console.buffer.getvalue().decode("ascii")
    assert "B\\xfccher" in said and "\\u6771" in said and (folder / "a.npz").exists()
    said = refused(iddpm_sample, "classes", "--class", "nope")
    assert "\\x1b[31mred\\n" in said and "東京" in said


def test_help_in_a_narrow_terminal(monkeypatch):
    for width in ("1", "2", "0", "-5", "39"):
        monkeypatch.setenv("COLUMNS", width)
        for command in (iddpm_train, iddpm_sample, iddpm_convert):
            status, out, _ = ask(command, "--help")
            assert status == 0 and "--device" in out or command is iddpm_convert
        assert os.environ["COLUMNS"] == width
        refused(iddpm_sample, "--no-such-option")


def test_a_warning_is_one_line(monkeypatch):
    def warn(*args): warnings.warn("some\nthing", stacklevel=1)
    monkeypatch.setattr(sampling, "draw", warn)
    assert ask(iddpm_sample, "base")[2] == "iddpm_sample: some\\nthing\n"


def typed(*words, first="pass", **how):
    "Start a sampling in a process of its own."
    line = (f"import os; from iddpm_nb.cli import sample; {first}; "
            f"sample.iddpm_sample({[*map(str, words)]!r})")
    env = os.environ | {"PYTHONPATH": str(Path(sampling.__file__).parents[2]), "TQDM_DISABLE": "1"}
    env.pop("PYTHONUNBUFFERED", None)  # what is buffered is written at the end, and may fail there
    how = {"stderr": subprocess.PIPE, "env": env | {"OMP_NUM_THREADS": "1"}} | how
    return subprocess.Popen([sys.executable, "-c", line], **how)


class Full(io.StringIO):
    "A disk without room."
    def write(self, text): raise OSError(28, "No space left on device")


@pytest.mark.parametrize("command", [iddpm_train, iddpm_sample, iddpm_convert])
def test_a_help_that_is_lost_is_a_failure(command):
    status, _, err = ask(command, "--help", out=Full())
    assert status == 1 and "words" in err and "No space left" in err
    assert ask(command, "--help")[0] == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a system without /dev/full")
def test_closed_and_full_outputs_lose_nothing(tmp_path):
    line = [Path("base").resolve(), *FEW]
    gone = typed(*line, tmp_path / "gone.png", stdout=subprocess.PIPE)
    gone.stdout.close()
    with open("/dev/full", "w") as f:
        full = typed(*line, tmp_path / "full.png", stdout=f)
        both = typed(*line, tmp_path / "both.png", stdout=f, stderr=f)
    said = {name: p.communicate()[1] for name, p in (("gone", gone), ("full", full))}
    assert [p.wait() for p in (gone, full, both)] == [0, 0, 0]
    assert said["gone"] == b"" and said["full"].count(b"\n") == 1
    assert b"No space left" in said["full"]
    for name in ("gone", "full", "both"):
        made(tmp_path, name)


def test_two_at_once_and_outputs_that_are_not_there(tmp_path):
    def closed():
        os.close(1)
        os.close(2)
    line = [Path("base").resolve(), "--n", 2, "--steps", 20, "--out", tmp_path / "a.png"]
    two = [typed(*line), typed(*line)]
    lost = typed(*line[:-1], tmp_path / "b.png", stderr=None, preexec_fn=closed)
    said = [p.communicate()[1].decode() for p in two]
    assert sorted(p.returncode for p in two) == [0, 1] and "a.png is taken" in "".join(said)
    assert lost.wait() == 0 and len(made(tmp_path, "b")[0]["images"]) == 2 and made(tmp_path, "a")


@pytest.mark.parametrize("where", ["sample.image_grid", "os.replace"])
def test_killed_by_a_signal_the_same_command_works_again(tmp_path, where):
    line = ["base", *FEW, tmp_path / "a.png"]
    p = typed(*line, first=f"{where} = lambda *args: os.kill(os.getpid(), 9)")
    assert p.communicate() and p.returncode == -signal.SIGKILL and not (tmp_path / "a.png").exists()
    assert (tmp_path / "a.npz").exists() == (where == "sample.image_grid")
    status, _, err = ask(iddpm_sample, *line)
    assert status == 0 and len(made(tmp_path, "a")[0]["images"]) == 3, err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.npz", "a.png"]


# models from outside

def hostile(tmp_path, change):
    "A model file of ours whose configuration is changed."
    file = next(Path("classes/checkpoints").glob("*/model.safetensors"))
    with safe_open(file, "pt") as f:
        config = json.loads(f.metadata()["iddpm_nb"])
    config["averages"] = []
    text = change(config)
    if not isinstance(text, str): text = json.dumps(config)
    save_file(load_file(file), tmp_path / "x.safetensors", {"iddpm_nb": text})
    return tmp_path / "x.safetensors"


def put(*keys, value):
    def change(config):
        for k in keys[:-1]:
            config = config[k]
        config[keys[-1]] = value
    return change


def without(*keys):
    def change(config):
        for k in keys[:-1]:
            config = config[k]
        del config[keys[-1]]
    return change


HOSTILE = {
    **{f"no {k}": without(k) for k in ("shape", "variance", "network", "schedule")},
    **{f"shape {v}": put("shape", value=v) for v in ("abc", [1, 8, 8, 8], [1, 10**6, 10**6], None)},
    **{f"T {v}": put("schedule", "T", value=v) for v in (10**9, 0, -7, "many", None, 1.5, True)},
    **{f"classes {v}": put("classes", value=v) for v in ([1, 2], ["a"], "abc", 5)},
    **{f"text {v[:10]}": lambda config, v=v: v
       for v in ("null", "[]", "7", '{"network"', "", "[" * 10**5 + "]" * 10**5)},
    **{f"{k} {v}"[:40]: put("network", k, value=v) for k, v in (("num_classes", 10**9),
            ("channels", 10**9), ("channels", "wide"), ("dropout", float("nan")),
            ("mult", [1] * 1000), ("mult", []), ("num_res_blocks", 10**6), ("image_size", 10**6),
            ("colour", "red"), ("groups", 0), ("num_heads", -1), ("low_size", 4))},
    "no width": without("network", "channels"), "a list": put("network", value=[]),
    "variance": put("variance", value="none"),}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_configuration_is_not_believed(tmp_path, case):
    file = hostile(tmp_path, HOSTILE[case])
    refused(iddpm_sample, file, "--n", 1, "--steps", 2)
    (tmp_path / "x.safetensors").rename(tmp_path / "model.safetensors")
    refused(iddpm_sample, tmp_path, "--n", 1, "--steps", 2)


@pytest.mark.parametrize("averages", [5, "abc", [5], [[]], ["../../x"], {"a": 1}])
def test_averages_are_not_believed(tmp_path, averages):
    hostile(tmp_path, put("averages", value=averages)).rename(tmp_path / "model.safetensors")
    refused(iddpm_sample, tmp_path, "--n", 1, "--steps", 2)


def test_weights_without_their_average_are_named(tmp_path):
    file = next(Path("classes/checkpoints").glob("*/model.safetensors"))
    (tmp_path / "model.safetensors").write_bytes(file.read_bytes())
    with pytest.warns(UserWarning, match="has no ema_0.995"):
        models.load(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        models.load(tmp_path, "model")


def test_the_latest_checkpoint_is_read_and_not_the_others(monkeypatch):
    line = [*TRAIN, "--steps", 6, "--data", "low.npz", "--out", "long", "--keep", 3]
    assert ask(iddpm_train, *line)[0] == 0
    read, real = [], models.whole
    monkeypatch.setattr(models, "whole", lambda p, *only: read.append(p.name) or real(p, *only))
    models.load("long")
    assert {*read} == {checkpoints(Path("long/checkpoints"))[-1].name} == {"0000006"}


# official files that are of another code

def guided():
    "A state dict of guided-diffusion: blocks that halve and double."
    w = torch.load("official.pt", weights_only=True)
    first, places = "input_blocks.1.0.", ("input_blocks.2.0", "output_blocks.1.2")
    block = {k.removeprefix(first): v for k, v in w.items() if k.startswith(first)}
    w = {k: v for k, v in w.items() if not k.startswith(places)}
    return w | {f"{at}.{k}": v for at in places for k, v in block.items()}


def classifier():
    "A state dict of one of its classifiers."
    w = {k: v for k, v in guided().items() if not k.startswith(("output_blocks", "out."))}
    return w | {"out.0.weight": torch.ones(64), "out.2.qkv_proj.weight": torch.ones(192, 64, 1)}


@pytest.mark.parametrize("make", [guided, classifier])
@pytest.mark.parametrize("words", [[iddpm_convert, *KNOWN], [iddpm_convert], [iddpm_sample]])
def test_files_of_guided_diffusion_are_named_as_such(tmp_path, make, words):
    torch.save(make(), tmp_path / "256x256_diffusion.pt")
    said = refused(words[0], tmp_path / "256x256_diffusion.pt", *words[1:])
    assert "guided-diffusion" in said and ("classifier" in said) == (make is classifier)


def test_tensors_that_say_more_than_the_file_holds(tmp_path):
    w = torch.load("official.pt", weights_only=True)
    meta = torch.zeros(3, device="meta")
    for large in torch.zeros(1).expand(10**12), torch.zeros(1).to_sparse(), meta:
        torch.save(w | {"out.2.bias": large}, tmp_path / "x.pt")
        status, _, err = ask(iddpm_convert, tmp_path / "x.pt", *KNOWN)
        assert status == 1 and err.endswith("x.pt does not hold all numbers of out.2.bias\n")


# runs that are continued

def test_auto_passes_over_what_is_no_run(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    line = [*TRAIN, "--data", Path(sampling.__file__), "--resume", "auto"]
    line[line.index("--data") + 1] = tmp_path / "low.npz"
    np.savez("low.npz", images=np.zeros((20, 8, 8), np.uint8))
    for name, text in ("a", "{}"), ("b", "not JSON"), ("c", "[]"), ("d", '{"data": 5}'):
        Path("runs", name).mkdir(parents=True)
        Path("runs", name, "config.json").write_text(text)
    Path("runs/e/config.json").mkdir(parents=True)
    status, out, err = ask(iddpm_train, *line)
    assert status == 0 and "steps 0 to 2" in out and err.count("passed over") == 4, err
    status, out, err = ask(iddpm_train, *line, "--steps", 4)
    assert status == 0 and "steps 2 to 4" in out
    for name in "abcd":
        assert name in refused(iddpm_train, "--resume", f"runs/{name}")
    refused(iddpm_train, *line, "--out", "runs/b")


def test_a_preset_beside_auto_is_compared(monkeypatch):
    seen = []
    monkeypatch.setattr(train, "train_run", lambda c, *args, **more: seen.append((c, args, more)))
    line = "--resume auto --out classes --preset cifar10 --new-data"
    assert ask(iddpm_train, *line.split())[0] == 0
    c, args, more = seen[0]
    assert c.model.channels == 128 and args == ()
    assert more == {"out": None, "resume_from": "classes", "device": None, "new_data": True,
                    "trust": False}
    assert ask(iddpm_train, "--resume", "classes")[0] == 0 and seen[1][0].model.channels == 8


# the commit

def test_git_that_does_not_answer_is_not_waited_for(monkeypatch, tmp_path):
    (tmp_path / "git").write_text("#!/bin/sh\nsleep 100\n")
    (tmp_path / "git").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    models.commit.cache_clear()
    try:
        with soon(20):
            assert models.commit() is None
    finally:
        models.commit.cache_clear()


def test_seeds_of_the_library():
    model = models.load("base")
    for seed in (-1, 2**63, 2**64):
        with pytest.raises(ValueError, match="a seed is a whole number"):
            model.sample(1, 2, seed)
        with pytest.raises(ValueError, match="a seed is a whole number"):
            model.bits_per_dim(torch.zeros(1, 1, 4, 4), 2, seed)
    assert model.sample(1, 2, 2**63 - 1).shape == (1, 1, 4, 4)
    with pytest.raises(MemoryError, match="draw fewer"):
        model.sample(10**12, 2)
