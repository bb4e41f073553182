"""Each line of the README and of the chapter of commands, as written. Trainings are made short
from outside; the words typed are those written there.

The two lines that install are run in other ways as well: .ci/run installs with the one and tests
with the other.
"""
import dataclasses
import importlib
import json
import os
import re
import shlex
import subprocess
import sys
import venv
from configparser import ConfigParser
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, clean_env
from PIL import Image

INSTALLS = ("pip install . && iddpm_train",
            "pip install -e '.[docs]' && python tools/website.py --serve",
            "pip install -e '.[dev]' && nbdev_test")
TORCHRUN = "torchrun --standalone --nproc_per_node=8 --no-python --"


def written():
    "The commands of the README, then those of the chapter of commands, without what follows a #."
    chapter = json.loads((ROOT / "nbs" / "cli" / "01_commands.ipynb").read_text())
    texts = [(ROOT / "README.md").read_text(), *("".join(c["source"]) for c in chapter["cells"])]
    blocks = [x for text in texts for x in re.findall(r"```sh\n(.*?)```", text, re.S)]
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [" ".join(re.sub(r"\s#.*", "", line).split()) for line in lines if line.strip()]


def commands():
    "The console scripts by name, as the package declares them."
    config = ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini")
    for entry in config["DEFAULT"]["console_scripts"].split():
        name, _, place = entry.partition("=")
        module, _, function = place.partition(":")
        yield name, getattr(importlib.import_module(module), function)


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    "A folder with what the lines expect beside them: pictures, small images, an official file."
    folder, rng = tmp_path_factory.mktemp("desk"), np.random.default_rng(0)
    (folder / "my_pictures").mkdir()
    for i in range(12):
        photo = rng.integers(0, 256, (40 + i, 60, 3), dtype=np.uint8)
        Image.fromarray(photo).save(folder / "my_pictures" / f"{i}.jpg")
    np.savez(folder / "small.npz", images=rng.integers(0, 256, (40, 4, 4), dtype=np.uint8))
    return folder


@pytest.fixture(scope="module")
def official(desk):
    "A file with the layout of the released one; all its numbers are 0."
    from iddpm_nb.interop.openai import RELEASED, official_name
    from iddpm_nb.unet import UNet
    with torch.device("meta"):
        net = UNet(**RELEASED["cifar10_uncond_50M_500K"]["network"])
    zeros = {official_name(k): torch.zeros(v.shape, dtype=torch.float16)
             for k, v in net.state_dict().items()}
    torch.save(zeros, desk / "cifar10_uncond_50M_500K.pt")


def shorter(c):
    "A run of three steps on a chain of fifty."
    train = dataclasses.replace(c.train, steps=3, batch=4, warmup=0)
    return dataclasses.replace(c, train=train, diffusion=dataclasses.replace(c.diffusion, T=50))


@pytest.fixture
def quick(monkeypatch, official):
    "Less to compute behind the same words."
    from iddpm_nb import unet
    from iddpm_nb.cli import train
    from iddpm_nb.reproduction import lines, tables
    train_run, forward, SCALES = train.train_run, unet.UNet.forward, lines.SCALES
    monkeypatch.setattr(train, "train_run",
                        lambda c, *args, **more: train_run(shorter(c), *args, **more))

    def at_once(net, x, t, y=None):                   # large images are not really drawn
        if torch.is_grad_enabled() or x.shape[-1] < 32: return forward(net, x, t, y)
        return x.new_zeros(len(x), 2 * x.shape[1], *x.shape[2:])
    monkeypatch.setattr(unet.UNet, "forward", at_once)
    few = {"images": 12, "num_t": 12, "samples": 12, "steps": 4}
    digits = dataclasses.replace(SCALES["digits"], rows=SCALES["digits"].rows[-1:], more={},
                                 budget=few)
    monkeypatch.setitem(SCALES, "mnist16", dataclasses.replace(digits, base=shorter(digits.base)))
    assert tables.SCALES is SCALES


LINES = [line for line in written() if line.startswith("iddpm_")]


def test_every_line_is_known():
    others = [line for line in written() if line not in LINES]
    assert others == [*INSTALLS, f"{TORCHRUN} iddpm_train --preset cifar10 --out cifar10 "
                      "--resume auto"]
    assert len(LINES) >= 11
    script = (ROOT / ".ci" / "run").read_text()
    assert "install -q -e '.[dev]'" in script and "nbdev_test" in script


# in the order of the README: later ones need earlier ones
@pytest.mark.parametrize("line", ["iddpm_train", *LINES])
def test_line(line, desk, quick, monkeypatch, capsys):
    monkeypatch.chdir(desk)
    monkeypatch.setenv("XDG_CACHE_HOME", str(desk / "cache"))
    name, *words = shlex.split(line)
    try:
        dict(commands())[name](words)
    except SystemExit as e:
        pytest.fail(f"exit status {e.code}: {capsys.readouterr()}")
    out = capsys.readouterr().out
    for path in re.findall(r"/\S+\.(?:png|npz|json)", out):
        assert Path(path).exists(), f"{path} is promised and not there"
    assert out.strip(), "nothing was said"


def test_the_overnight_line(site, tmp_path):
    """Eight processes, as written, and the same line again; the network and the images are made
    small."""
    script = tmp_path / "bin" / "iddpm_train"
    script.parent.mkdir()
    script.write_text(f"#!{sys.executable}\n" + SMALL)
    script.chmod(0o755)
    program, = [line for line in written() if line.startswith("torchrun")]
    env = clean_env(PYTHONPATH=str(site), PATH=os.pathsep.join([str(script.parent),
                str(Path(sys.executable).parent), os.environ["PATH"]]))
    for begins in (0, 3):
        p = subprocess.run(shlex.split(program), cwd=tmp_path, env=env, capture_output=True,
                           text=True, timeout=300)
        assert p.returncode == 0 and f"steps {begins} to 3" in p.stdout, p.stdout + p.stderr
        assert (tmp_path / "cifar10" / "checkpoints" / "0000003").is_dir(), p.stdout
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith("cifar10")] == ["cifar10"]


SMALL = '''
import dataclasses, sys
import torch, torchvision
class Few:
    "CIFAR-10, as torchvision would give it."
    classes = [f"class {i}" for i in range(10)]
    def __init__(self, root, train, download):
        g = torch.Generator().manual_seed(int(train))
        self.data = torch.randint(0, 256, (32, 32, 32, 3), generator=g, dtype=torch.uint8).numpy()
        self.targets = [i % 10 for i in range(32)]
torchvision.datasets.CIFAR10 = Few
from iddpm_nb.training import config
from iddpm_nb.cli import train
paper = config.PRESETS["cifar10"]
config.PRESETS["cifar10"] = dataclasses.replace(
    paper,
    model=dataclasses.replace(paper.model, channels=8, groups=4, num_res_blocks=1, num_heads=2),
    diffusion=dataclasses.replace(paper.diffusion, T=4),
    train=dataclasses.replace(paper.train, steps=3, batch=16, save_every=3))
train.iddpm_train(sys.argv[1:])
'''


@pytest.mark.skipif(os.name != "posix", reason="the line is one of a POSIX shell")
def test_the_first_line(tmp_path):
    """Installed into an environment of its own from a copy of the sources, and started in another
    folder."""
    source, desk, home = tmp_path / "source", tmp_path / "desk", tmp_path / "venv"
    files = subprocess.run(["git", "ls-files", "-z", "-co", "--exclude-standard"], cwd=ROOT,
                           capture_output=True, text=True, check=True).stdout
    for name in filter(None, files.split("\0")):
        if not (ROOT / name).is_file(): continue
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    venv.create(home, with_pip=True)
    desk.mkdir()
    packages, = home.glob("lib/*/site-packages")
    # torch is there already
    (packages / "others.pth").write_text("\n".join(p for p in sys.path
                                                   if p.endswith("site-packages")))
    env = clean_env(PATH=f"{home / 'bin'}{os.pathsep}{os.environ['PATH']}")
    env.pop("PIP_CONSTRAINT", None)
    install, train = INSTALLS[0].split(" && ")
    p = subprocess.run(["bash", "-c", install], cwd=source, env=env, capture_output=True, text=True)
    assert p.returncode == 0, p.stdout + p.stderr
    p = subprocess.run(["bash", "-c", f"{train} --help && which iddpm_train"], cwd=desk, env=env,
                       capture_output=True, text=True)
    assert p.returncode == 0 and str(home) in p.stdout, p.stdout + p.stderr
    where = subprocess.run([home / "bin" / "python", "-c",
                            "import iddpm_nb; print(iddpm_nb.__file__)"], cwd=desk, env=env,
                           capture_output=True, text=True).stdout
    assert str(home) in where, where
