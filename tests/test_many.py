"""Many images: drawn in parts, on the disk one after the other, the same after any kill; and what
is read from the disk for a model."""
import json
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from conftest import clean_env, within
from PIL import Image
from test_commands import TRAIN, ask, refused
from iddpm_nb.checks import CALLS, crash_at
from iddpm_nb.data import digits
from iddpm_nb.conditioning.upsampler import lower
from iddpm_nb.training import files
from iddpm_nb.training.checkpoint import checkpoints
from iddpm_nb.running import model as models
from iddpm_nb.cli import sample as sampling
from iddpm_nb.cli.evaluate import iddpm_eval
from iddpm_nb.cli.train import iddpm_train
from iddpm_nb.cli.sample import iddpm_sample

SMALL = (4, 2**26)           # images in a part, in place of 1,000


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    "A class-conditional run, an upsampler and its base, of two steps each."
    with within(tmp_path_factory.mktemp("many")) as folder:
        np.savez("low.npz", images=lower(digits().images[:20], 4)[:, 0].numpy())
        for words in ("--class-cond --out classes", "--out plain", "--data low.npz --out base",
                      "--upsample-from 4 --noise-augment 0.1 --out up"):
            assert ask(iddpm_train, *TRAIN, *words.split())[0] == 0
    return folder


@pytest.fixture(autouse=True)
def here(home, monkeypatch):
    monkeypatch.chdir(home)
    monkeypatch.setattr(models, "TOGETHER", SMALL)


KINDS = {"plain": "plain", "classes": "classes", "asked": "classes --class seven,3",
         "two stages": "up --base base --base-steps 2", "from a file": "up --low low.npz"}


def line(kind, n=10):
    return [*KINDS[kind].split(), "--n", n, "--steps", 3, "--seed", 5, "--device", "cpu"]


def pictures(folder):
    return [np.array(Image.open(p)) for p in sorted(folder.glob("*.png"))]


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_images_in_one_file_and_as_pictures(tmp_path, kind):
    status, out, _ = ask(iddpm_sample, *line(kind), "--out", tmp_path / "a.png")
    f = np.load(tmp_path / "a.npz")
    assert status == 0 and "10 images, the first 4" in out and f["images"].shape == (10, 8, 8, 1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.npz", "a.png"]
    status, out, _ = ask(iddpm_sample, *line(kind), "--png", tmp_path / "many")
    names = [p.name for p in sorted((tmp_path / "many").glob("*.png"))]
    assert status == 0 and names == [f"{i:06d}.png" for i in range(10)]
    assert (np.stack(pictures(tmp_path / "many")) == f["images"][..., 0]).all()
    if "labels" in f.files:
        told = (tmp_path / "many" / "labels.txt").read_text().splitlines()
        want = [f"{i:06d}.png {f['classes'][k]}" for i, k in enumerate(f["labels"])]
        assert told == want and len(set(f["labels"].tolist())) > 1
    if "low" in f.files: assert len(f["low"]) == 10
    same = [(i, j) for i in range(10) for j in range(i) if (f["images"][i] == f["images"][j]).all()]
    assert not same, f"an image is drawn twice: {same}"


def test_up_to_one_part_nothing_differs_from_sample(tmp_path):
    ask(iddpm_sample, *line("plain", 4), "--out", tmp_path / "few.png")
    ask(iddpm_sample, *line("plain"), "--out", tmp_path / "many.png")
    few, many = (np.load(tmp_path / f"{k}.npz")["images"] for k in ("few", "many"))
    x = models.load("plain").sample(4, 3, 5)
    assert (few == sampling.plain(x)).all() and (many[:4] == few).all()


def test_the_portion_shown_to_the_network_changes_no_image(tmp_path):
    for k in 1, 3, 4:
        ask(iddpm_sample, *line("plain"), "--chunk", k, "--png", tmp_path / str(k))
    one, *others = (np.stack(pictures(tmp_path / k)).astype(int) for k in "134")
    assert all(np.abs(one - other).max() <= 1 for other in others)       # rounding, if anything


def test_killed_at_any_moment_the_rest_is_drawn(tmp_path):
    ask(iddpm_sample, *line("classes"), "--out", tmp_path / "whole.png")
    want, drawn, real = np.load(tmp_path / "whole.npz"), [], sampling.sampled
    def counted(job, part, shown):
        drawn.append(part.number)
        return real(job, part, shown)
    for k in range(99):
        folder = tmp_path / str(k)
        folder.mkdir()
        words = [*line("classes"), "--out", folder / "a.png"]
        with mock.patch.object(sampling, "sampled", counted):
            died = crash_at(k, lambda: ask(iddpm_sample, *words), CALLS)
            if not died: break
            had = len(list((folder / "a.parts").glob("0*.npz")))
            drawn.clear()
            if not (folder / "a.png").exists():
                assert ask(iddpm_sample, *words)[0] == 0
                assert drawn == list(range(had, 3)), (k, drawn, had)
        f = np.load(folder / "a.npz")
        assert all((f[key] == want[key]).all() for key in ("images", "labels", "classes"))
        assert not list(folder.glob(".*.part"))
    assert 10 < k < 99


def test_killed_between_pictures_the_rest_is_drawn(site, tmp_path, home):
    "A real process, by SIGKILL, several times."
    start = ("import sys\nfrom iddpm_nb.running import model\nmodel.TOGETHER = 4, 2**26\n"
             "from iddpm_nb.cli.sample import iddpm_sample\niddpm_sample(sys.argv[1:])\n")
    words = [str(w) for w in line("classes", 400)]
    def go(folder):
        return subprocess.Popen([sys.executable, "-c", start, *words, "--png", str(folder)],
                                cwd=home, env=clean_env(PYTHONPATH=str(site)))
    choose, folder, had = random.Random(0), tmp_path / "killed", 0
    for _ in range(3):
        process, end = go(folder), time.time() + 100
        while len(list(folder.glob("*.png"))) < had + 20 and time.time() < end:
            time.sleep(0.002)
        time.sleep(choose.uniform(0, 0.02))
        process.send_signal(signal.SIGKILL)
        process.wait()
        had = len(list(folder.glob("*.png")))
        assert 0 < had < 400
    assert go(folder).wait() == 0 and go(tmp_path / "whole").wait() == 0
    a, b = pictures(folder), pictures(tmp_path / "whole")
    assert len(a) == len(b) == 400 and all((x == y).all() for x, y in zip(a, b))
    assert not list(folder.glob(".*.part"))


def test_other_options_or_weights_are_refused(tmp_path):
    folder = tmp_path / "many"
    ask(iddpm_sample, *line("classes"), "--png", folder)
    before = pictures(folder)
    assert ask(iddpm_sample, *line("classes"), "--png", folder, "--chunk", 2)[0] == 0
    for more in (["--seed", 6], ["--n", 11], ["--steps", 2], ["--weights", "model"]):
        assert "other options" in refused(iddpm_sample, *line("classes"), *more, "--png", folder)
    assert all((a == b).all() for a, b in zip(before, pictures(folder)))
    (folder / "000003.png").unlink()
    assert ask(iddpm_sample, *line("classes"), "--png", folder)[0] == 0
    assert (pictures(folder)[3] == before[3]).all()
    other = tmp_path / "other"
    other.mkdir()
    (other / "mine.txt").write_text("mine")
    assert "other things" in refused(iddpm_sample, *line("plain"), "--png", other)
    assert [p.name for p in other.iterdir()] == ["mine.txt"]
    assert "give one" in refused(iddpm_sample, *line("plain"), "--png", other, "--out", "a.png")
    assert "is not" in refused(iddpm_sample, *line("plain"), "--png", tmp_path / "no" / "where")
    (tmp_path / "a.parts").mkdir()
    (tmp_path / "a.parts" / "mine.txt").write_text("mine")
    assert "other things" in refused(iddpm_sample, *line("plain"), "--out", tmp_path / "a.png")


def test_two_at_once_never_draw_into_one_folder(tmp_path):
    real, inner = sampling.sampled, []
    words = [*line("plain"), "--png", tmp_path / "many"]
    def drawn(*args):
        if not inner: inner.append(refused(iddpm_sample, *words))
        return real(*args)
    with mock.patch.object(sampling, "sampled", drawn):
        assert ask(iddpm_sample, *words)[0] == 0
    assert "another process" in inner[0]


def test_a_full_disk_is_one_sentence_and_the_rest_comes_later(site, tmp_path, home):
    def full(): # no file can grow: as on a full disk, writing fails in the middle
        resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, 2_000))
    start = ("import sys\nfrom iddpm_nb.running import model\nmodel.TOGETHER = 4, 2**26\n"
             "from iddpm_nb.cli.sample import iddpm_sample\niddpm_sample(sys.argv[1:])\n")
    words = [str(w) for w in [*line("plain", 40), "--out", tmp_path / "a.png"]]
    p = subprocess.run([sys.executable, "-c", start, *words], cwd=home, text=True,
                       capture_output=True, env=clean_env(PYTHONPATH=str(site)), preexec_fn=full)
    assert p.returncode == 1 and "Traceback" not in p.stderr, p.stderr
    assert "a.parts" in p.stderr and "the same command" in p.stderr
    assert len(list((tmp_path / "a.parts").glob("0*.npz"))) == 10
    assert not (tmp_path / "a.npz").exists()
    with mock.patch.object(sampling, "sampled", side_effect=AssertionError("drawn again")):
        assert ask(iddpm_sample, *words)[0] == 0
    assert len(np.load(tmp_path / "a.npz")["images"]) == 40 and not (tmp_path / "a.parts").exists()


def test_a_folder_that_cannot_be_written(tmp_path):
    denied = mock.patch.object(files, "open", side_effect=PermissionError(13, "Permission denied"),
                               create=True)
    with denied:
        said = refused(iddpm_sample, *line("plain"), "--png", tmp_path / "many")
    assert "Permission denied" in said and said.count("\n") == 1


def test_one_part_is_in_memory_at_a_time(tmp_path, monkeypatch):
    "However many parts there are, no array has more rows than a part."
    most, real = [], np.load
    def noted(kind):
        def call(x, *args, **kwargs):
            most.append(len(x))
            return kind(x, *args, **kwargs)
        return call
    monkeypatch.setattr(sampling, "to_uint8", noted(sampling.to_uint8))
    monkeypatch.setattr(sampling, "image_grid", noted(sampling.image_grid))
    monkeypatch.setattr(models, "sample", lambda net, s, shape, *a, real=models.sample, **k: (
        most.append(shape[0]), real(net, s, shape, *a, **k))[1])
    for where in (["--out", tmp_path / "a.png"], ["--png", tmp_path / "many"]):
        most.clear()
        assert ask(iddpm_sample, *line("plain", 30), *where)[0] == 0
        assert max(most) == 4
    assert len(real(tmp_path / "a.npz")["images"]) == 30


def test_features_are_seen_part_by_part(home, tmp_path):
    look = ["--fid", "--features", "digits", "--cache", tmp_path, "--steps", 3, "--device", "cpu"]
    words, seen, real = ["plain", *look, "--samples", 70], [], models.Drawn.__getitem__
    def noted(self, i):
        found = real(self, i)
        seen.append((len(found), len(self.held)))
        return found
    parts = mock.patch.object(models, "TOGETHER", (16, 2**26))
    with parts, mock.patch.object(models.Drawn, "__getitem__", noted):
        assert ask(iddpm_eval, *words, "--chunk", 6, "--out", tmp_path / "a.json")[0] == 0
        drawn = ask(iddpm_sample, "plain", "--n", 70, "--steps", 3, "--device", "cpu", "--png",
                    tmp_path / "many")
    assert drawn[0] == 0 and sum(n for n, _ in seen) == 70 and max(h for _, h in seen) <= 16 + 6
    assert ask(iddpm_eval, tmp_path / "many", *look[:5], "--device", "cpu", "--data", "digits",
               "--out", tmp_path / "b.json")[0] == 0
    a, b = (json.loads((tmp_path / f"{k}.json").read_text())["figures"]["FID"]["value"]
            for k in "ab")
    assert abs(a - b) < 1e-6 * a


def test_a_model_is_read_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [*TRAIN, "--steps", 8, "--keep", 4, "--out", "run"]
    assert ask(iddpm_train, *words)[0] == 0
    read, real = {}, open
    class Counted:
        def __init__(self, path, *args): self.path, self.file = path, real(path, *args)
        def read(self, n):
            piece = self.file.read(n)
            read[self.path] = read.get(self.path, 0) + len(piece)
            return piece
        def __enter__(self): return self
        def __exit__(self, *args): self.file.close()
    monkeypatch.setattr(files, "open", Counted, raising=False)
    models.load("run")
    latest = checkpoints(Path("run", "checkpoints"))[-1]
    file, = read
    assert file == latest / "ema_0.995.safetensors" and read[file] == file.stat().st_size
    for damage, want in ("state.pt", latest), ("ema_0.995.safetensors", None):
        data = (latest / damage).read_bytes()
        (latest / damage).write_bytes(data[:-8] + b"damaged!")
        found = models.weights_file(Path("run")).parent
        assert found == (want or checkpoints(Path("run", "checkpoints"))[-2]).absolute()
        (latest / damage).write_bytes(data)


def test_parts_of_large_images_are_small():
    for shape, size in ((3, 32, 32), 1000), ((3, 256, 256), 341), ((3, 4096, 4096), 1):
        with mock.patch.object(models, "TOGETHER", (1000, 2**26)):
            parts = models.parts_of(50_000, shape, 0)
        assert parts[0].places == slice(0, size) and parts[-1].places.stop == 50_000
        assert len({p.seed for p in parts}) == len(parts) and parts[0].seed == 0
        assert all(a.places.stop == b.places.start for a, b in zip(parts, parts[1:]))
