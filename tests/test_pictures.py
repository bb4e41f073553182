"""Folders of strange but legal pictures: loading ends well, or in one true sentence."""
import io
import os
import shutil
import socket
import struct
import subprocess
import sys
import warnings
import zlib
from unittest.mock import patch

import numpy as np
import pytest
import torch
from PIL import Image
from tqdm import tqdm
from iddpm_nb.data import Batches, Images
from iddpm_nb.images.reading import CLEAR, decoded
from iddpm_nb.images.folders import open_images, open_sets
from iddpm_nb.training.loading import Prefetch, make_batches

SIZE = 8
pytestmark = pytest.mark.skipif(os.name != "posix", reason="pipes, links and signals of POSIX")


def random(seed=0, h=9, w=11):
    return np.random.RandomState(seed).randint(0, 256, (h, w, 3), np.uint8)


def save(path, seed=0, **how):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(random(seed)).save(path, **how)


def fill(folder, n=12, classes=("cat", "dog")):
    for i in range(n):
        save(folder / classes[i % len(classes)] / f"{i}.png", i)
    return folder


def said(folder, **how):
    "The one sentence in which loading ends."
    with pytest.raises((ValueError, OSError)) as e:
        open_sets(str(folder), SIZE, **how)
    text = str(e.value)
    assert text.isprintable() and "\n" not in text and len(text) > 20
    return text


def opened(folder, size=SIZE, **how):
    "How many images there are, their classes, and what is said about them."
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train, held = open_sets(str(folder), size, **how)
    n = len(train) + (len(held) if held else 0)
    notes = " | ".join(train.notes)
    assert notes.isprintable()
    return n, train.classes, notes


# ---- a zoo of folders: each a function that fills a folder, and what is expected

ZOO = []


def animal(f):
    ZOO.append(pytest.param(f, id=f.__name__))
    return f


@animal
def hidden_and_system_folders(d):
    fill(d)
    for name in (".thumbnails", ".ipynb_checkpoints", "@eaDir", "__MACOSX", "cat/.trash"):
        fill(d / name, 3)
    save(d / "cat" / "._1.png")
    n, classes, notes = opened(d)
    assert (n, classes) == (12, ("cat", "dog")) and "@eaDir" in notes and "hidden" in notes


@animal
def below_a_hidden_folder(d):
    assert opened(fill(d / ".cache" / "__MACOSX"))[:2] == (12, ("cat", "dog"))


@animal
def a_linked_class(d):
    fill(d / "set", 6, ["cat"])
    fill(d / "elsewhere", 6, ["dog"])
    (d / "set" / "dog").symlink_to(d / "elsewhere" / "dog")
    assert opened(d / "set")[:2] == (12, ("cat", "dog"))


@animal
def only_links(d):
    fill(d / "elsewhere")
    (d / "set").mkdir()
    for name in ("cat", "dog"):
        (d / "set" / name).symlink_to(d / "elsewhere" / name)
    (d / "set" / "dog" / "a.png").symlink_to(d / "elsewhere" / "cat" / "0.png")
    assert opened(d / "set")[:2] == (13, ("cat", "dog"))


@animal
def loops_of_links(d):
    fill(d)
    (d / "cat" / "up").symlink_to(d)
    (d / "self").symlink_to("self")
    (d / "cat" / "me.png").symlink_to("me.png")
    (d / "nowhere.png").symlink_to("gone.png")
    n, classes, notes = opened(d)
    assert (n, classes) == (12, ("cat", "dog")) and "nowhere.png" in notes and "up" in notes


@animal
def a_folder_called_like_a_picture(d):
    fill(d, classes=("album.jpg", "b.png"))
    assert opened(d)[:2] == (12, ("album.jpg", "b.png"))


@animal
def names_that_are_no_text(d):
    fill(d)
    try:
        shutil.copy(d / "cat" / "0.png", os.fsencode(d / "cat") + b"/\xe9.png")
    except OSError:
        pytest.skip("this disk takes no such names")
    assert opened(d)[0] == 13 and opened(d, on_disk=True)[0] == 13
    shutil.copy(__file__, os.fsencode(d / "cat") + b"/\xff.png")
    assert "udcff.png is not a readable image" in said(d)


@animal
def names_in_other_scripts_and_escapes(d):
    fill(d, classes=("\u732b", "red\x1b[31m\n"))
    n, classes, notes = opened(d)
    assert n == 12 and classes == ("red\x1b[31m\n", "\u732b")
    (d / "red\x1b[31m\n" / "a\x1b.png").write_bytes(b"x")
    (d / "empty\x1b").mkdir()
    assert "\\x1b.png is not" in said(d) and "empty\\x1b" in opened(d, skip_broken=True)[2]


@animal
def suffixes_that_are_rare(d):
    fill(d)
    save(d / "bird" / "0.ppm", 20)
    save(d / "bird" / "1.jfif", 21, format="JPEG")
    save(d / "bird" / "none", 22, format="PNG")
    save(d / "bird" / "2.dat", 23, format="WEBP")
    save(d / "bird" / "3.JPG", 24, format="JPEG")
    assert opened(d)[:2] == (17, ("bird", "cat", "dog"))


@animal
def files_that_are_no_pictures(d):
    fill(d)
    for name in ("a.heic", "b.heic", "list.csv", "README"):
        (d / name).write_bytes(b"no picture")
    n, _, notes = opened(d)
    assert n == 12 and "left out 4 files" in notes
    assert all(x in notes for x in ("2 .heic", "1 .csv", "1 without a suffix"))
    (d / "phone").mkdir()
    shutil.copy(d / "a.heic", d / "phone" / "a.heic")
    assert "1 .heic" in said(d / "phone")


@animal
def parts_above_the_classes(d):
    for name in ("train", "val"):
        fill(d / name)
    n, classes, notes = opened(d)
    assert classes == ("train", "val") and "parts of a set" in notes


@animal
def one_stray_picture(d):
    fill(d)
    save(d / "stray.png", 99)
    n, classes, notes = opened(d)
    assert (n, classes) == (13, ()) and "1 of 13 pictures" in notes and "cat, dog" in notes


@animal
def a_class_without_pictures(d):
    fill(d)
    (d / "empty").mkdir()
    (d / "texts").mkdir()
    (d / "texts" / "a.txt").write_text("x")
    n, classes, notes = opened(d)
    assert classes == ("cat", "dog") and "2 folders without pictures: empty, texts" in notes


@animal
def broken_files(d):
    fill(d)
    (d / "cat" / "empty.png").write_bytes(b"")
    (d / "cat" / "text.jpg").write_bytes(b"no picture")
    whole = (d / "dog" / "1.png").read_bytes()
    (d / "dog" / "cut.png").write_bytes(whole[:len(whole) // 2])
    for on_disk in (False, True):
        text = said(d, on_disk=on_disk)
        assert "3 files" in text and "--skip-broken" in text
        assert all(x in text for x in ("empty.png", "text.jpg", "cut.png"))
        n, classes, notes = opened(d, on_disk=on_disk, skip_broken=True)
        assert n == 12 and "cut.png" in notes


@animal
def nothing_but_broken_files(d):
    (d / "a.png").write_bytes(b"x")
    for skip in (False, True):
        text = said(d, skip_broken=skip)
        assert "a.png" in text and "--skip-broken" not in text


@animal
def a_class_of_broken_files(d):
    fill(d)
    (d / "bird").mkdir()
    (d / "bird" / "a.png").write_bytes(b"x")
    n, classes, notes = opened(d, skip_broken=True)
    assert n == 12 and "1 of 3 classes have no image: bird" in notes


@animal
def pipes_sockets_and_devices(d):
    fill(d)
    os.mkfifo(d / "pipe.png")
    os.mkfifo(d / "pipe")
    (d / "zero.png").symlink_to("/dev/zero")
    was = os.getcwd()
    os.chdir(d)
    try:
        with socket.socket(socket.AF_UNIX) as s:
            s.bind("socket.png")
            n, classes, notes = opened(d)
    finally:
        os.chdir(was)
    assert (n, classes) == (12, ("cat", "dog"))
    assert all(x in notes for x in ("pipe.png", "zero.png", "socket.png"))


@animal
def what_this_package_has_made(d):
    fill(d)
    for made, mark in ("runs/a", "checkpoints/1/x"), ("runs/deep/b", "metrics.jsonl"):
        save(d / made / "samples" / "1.png", 50)
        (d / made / mark).parent.mkdir(parents=True, exist_ok=True)
        (d / made / mark).write_text("x")
        (d / made / "config.json").write_text("{}")
    save(d / "samples_4x5.png", 51)
    np.savez(d / "samples_4x5.npz", images=np.zeros((4, 8, 8, 3), np.uint8))
    n, classes, notes = opened(d)
    assert (n, classes) == (12, ("cat", "dog"))
    assert "runs" in notes and "samples_4x5.png" in notes and "without pictures" not in notes


@animal
def pictures_with_arrays_of_another_kind_beside_them(d):
    fill(d)
    np.savez(d / "cat" / "0.npz", depth=np.zeros((8, 8)))
    (d / "dog" / "1.npz").write_bytes(b"damaged")
    n, classes, notes = opened(d)
    assert n == 12 and "2 .npz" in notes


def png(w, h, depth, kind, row, none=None):
    "A PNG made by hand."
    def chunk(name, data):
        return (struct.pack(">I", len(data)) + name + data
                + struct.pack(">I", zlib.crc32(name + data)))
    head = struct.pack(">IIBBBBB", w, h, depth, kind, 0, 0, 0)
    data = chunk(b"IDAT", zlib.compress((b"\0" + row) * h))
    data = data if none is None else chunk(b"tRNS", none) + data
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + data + chunk(b"IEND", b"")


@pytest.mark.parametrize("depth, kind, row, none, want", [
    (1, 0, b"\x40", b"\0\0", [255, 255]), (2, 0, b"\x10", b"\0\1", [0, 255]),
    (4, 0, b"\x37", b"\0\3", [255, 119]), (8, 0, b"\x05\x75", b"\0\5", [255, 117]),
    (16, 0, b"\x03\xe8\x75\0", b"\x03\xe8", [255, 117]),
    (16, 2, b"\x03\xe8" * 3 + b"\x75\0" * 3, b"\x03\xe8" * 3, [255, 117])])
def test_a_number_that_counts_as_none(depth, kind, row, none, want):
    x, special = decoded(png(2, 1, depth, kind, row, none))
    assert x.tolist() == [[want]] * 3 and CLEAR in special


def test_what_is_opaque_everywhere_is_not_called_transparent():
    for mode, opacity in (("RGBA", 255), ("LA", 255), ("RGBA", 254), ("LA", 0)):
        file = io.BytesIO()
        im = Image.new(mode, (3, 3), (5,) * len(mode[:-1]) + (255,))
        im.putpixel((1, 1), (5,) * len(mode[:-1]) + (opacity,))
        im.save(file, "PNG")
        assert (CLEAR in decoded(file.getvalue())[1]) == (opacity < 255)
    assert CLEAR not in decoded(png(2, 1, 16, 0, b"\x03\xe8\x75\0", b"\0\1"))[1]


@animal
def a_decompression_bomb(d):
    fill(d)
    (d / "cat" / "bomb.png").write_bytes(png(30_000, 30_000, 8, 0, b""))
    text = said(d)
    assert "bomb.png has more than" in text and "not a readable" not in text


@animal
def a_picture_of_another_program_by_name(d):
    fill(d)
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
    (d / "cat" / "a.png").write_bytes(script)
    with patch("subprocess.check_call", side_effect=AssertionError("a script was run")):
        assert "a.png is not a readable image" in said(d)
        os.rename(d / "cat" / "a.png", d / "cat" / "a.eps")
        assert "1 .eps" in opened(d)[2]


@animal
def every_mode(d):
    grey = Image.fromarray(random(3)[..., 0])
    for i, mode in enumerate(("1", "L", "P", "LA", "PA", "RGBA", "CMYK", "YCbCr", "LAB")):
        im = grey.convert("RGB").convert(mode) if mode != "LAB" else Image.new("LAB", (9, 9))
        im.save(d / f"{mode}.tif")
    (d / "deep.png").write_bytes(png(4, 4, 16, 2, bytes(24)))
    n, _, notes = opened(d)
    assert n == 10 and "1 picture with more than 8 bits a number" in notes


@animal
def numbers_without_a_white(d):
    fill(d)
    Image.fromarray(np.zeros((9, 9), np.float32)).save(d / "cat" / "f.tif")
    Image.fromarray(np.zeros((9, 9), np.int32)).save(d / "cat" / "i.tif")
    text = said(d)
    assert "f.tif has numbers of 32 bits" in text and "i.tif has numbers of 32 bits" in text


@animal
def animations_and_pages(d):
    fill(d)
    frames = [Image.fromarray(random(i)) for i in range(60, 63)]
    for name in ("a.gif", "b.png", "c.tif", "d.webp"):
        frames[0].save(d / "cat" / name, save_all=True, append_images=frames[1:])
    n, _, notes = opened(d)
    assert n == 16 and "4 pictures with several images: the first is read" in notes


@animal
def sizes_that_differ(d):
    fill(d)
    Image.new("RGB", (7, 5)).save(d / "dog" / "small.png")
    with pytest.raises(ValueError, match="small.png has 5x7 pixels.*--image-size"):
        open_sets(str(d))
    assert opened(d)[0] == 13


@animal
def one_pixel_and_one_line(d):
    fill(d)
    Image.new("RGB", (1, 1)).save(d / "cat" / "one.png")
    Image.new("RGB", (3000, 1)).save(d / "cat" / "wide.png")
    Image.new("L", (1, 3000)).save(d / "cat" / "tall.png")
    assert opened(d)[0] == 15


@animal
def a_camera_s_notes_are_damaged(d):
    fill(d)
    save(d / "cat" / "bad.jpg", 5,
         exif=b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\xff\xff\xff\xff")
    save(d / "cat" / "worse.jpg", 6, exif=b"Exif\0\0nonsense")
    assert opened(d)[0] == 14


@animal
def very_deep(d):
    deep = d.joinpath(*["x"] * 200)
    save(deep / "a.png")
    assert opened(d)[:2] == (1, ("x",))


@animal
def ten_copies_of_one_picture(d):
    for i in range(10):
        save(d / f"{i}.png", 1)
    train, held = open_sets(str(d), SIZE)
    assert len(train) == 10 and held is None                    # nothing else is left to train on
    with pytest.raises(ValueError, match="too equal to hold one out"):
        open_images(str(d), "test", SIZE)


@animal
def every_picture_twice(d):
    for k in range(40):
        for i in range(6):
            save(d / str(k) / "a" / f"{i}.png", 100 * k + i)
        (d / str(k) / "b").symlink_to(d / str(k) / "a")
        shutil.copytree(d / str(k) / "a", d / str(k) / "c")
        train, held = open_sets(str(d / str(k)), SIZE)
        assert len(train) + len(held) == 12 and not set(train.sums) & set(held.sums)


@animal
def hidden_pictures(d):
    fill(d)
    for name in (".hid.png", "cat/._1.JPG"):
        save(d / name, format="PNG")
    for name in (".DS_Store", "cat/.nomedia"):
        (d / name).write_bytes(b"x")
    n, classes, notes = opened(d)
    assert (n, classes) == (12,
                            ("cat", "dog")) and ".DS_Store" not in notes and ".nomedia" not in notes
    assert ".hid.png" in notes and "cat/._1.JPG" in notes


@animal
def one_picture(d):
    save(d / "a.png")
    train, held = open_sets(str(d), SIZE)
    assert len(train) == 1 and held is None


@animal
def an_empty_folder(d):
    assert "no images in" in said(d)


@animal
def a_folder_of_empty_folders(d):
    (d / "cat").mkdir()
    assert "without pictures: cat" in said(d)


@animal
def a_folder_that_cannot_be_opened(d):
    fill(d)
    real = os.listdir
    def listdir(path):
        if str(path).endswith("dog"): raise PermissionError(13, "Permission denied", path)
        return real(path)
    with patch("os.listdir", listdir):
        text = said(d)
        assert text.startswith("1 folder: ") and "dog cannot be opened" in text
        assert opened(d, skip_broken=True)[0] == 6
    with patch("os.listdir", side_effect=PermissionError(13, "Permission denied", str(d))):
        assert "cannot be opened" in said(d)


@animal
def no_folder_at_all(d):
    save(d / "photo.jpg")
    (d / "x.npz").write_bytes(b"")
    assert "neither a folder nor an .npz" in said(d / "photo.jpg")
    assert "is no such file" in said(d / "nothing\x1b") and "not a readable" in said(d / "x.npz")
    os.mkfifo(d / "pipe.npz")
    assert "no ordinary file" in said(d / "pipe.npz")


@animal
def an_array_called_like_dots(d):
    x = np.random.RandomState(0).randint(0, 256, (12, 6, 8, 3), np.uint8)
    np.savez(d / "a.npz", images=x)
    os.rename(d / "a.npz", d / "...npz")
    assert opened(d / "...npz", None)[0] == 12
    train, held = open_sets(str(d / "...npz"), SIZE)         # not square: scaled, as it is told
    assert train.images.shape[1:] == (3, 8, 8) and len(train) + len(held) == 12


@animal
def an_array_of_colours_in_grey(d):
    x = np.stack([random(i, 8, 8) for i in range(12)])
    np.savez(d / "a.npz", images=x)
    for i, a in enumerate(x):
        (d / "set").mkdir(exist_ok=True)
        Image.fromarray(a).save(d / "set" / f"{i}.png")
    for size in (None, 4):
        same = (open_images(str(d / name), "all", size, mode="L") for name in ("a.npz", "set"))
        a, b = ({im.numpy().tobytes() for im in s.images} for s in same)
        assert a == b and len(a) == 12
    assert open_images(str(d / "a.npz"), "all", 4).images.shape == (12, 3, 4, 4)


@animal
def an_array_that_is_not_square_is_said_to_be_cropped(d):
    np.savez(d / "a.npz", images=np.zeros((12, 6, 8, 3), np.uint8))
    assert "images of 6x8 are scaled and cropped to 8x8" in open_images(str(d / "a.npz"), "all",
            8).notes
    assert not open_images(str(d / "a.npz"), "all").notes


@animal
def parts_are_not_called_like_folders(d):
    train, _ = open_sets(str(fill(d)), SIZE)
    assert train.name == f"{d} (train)"


@animal
def a_folder_called_like_a_data_set(d):
    fill(d / "mnist")
    was = os.getcwd()
    os.chdir(d)
    try:
        with patch("torchvision.datasets.MNIST", side_effect=RuntimeError("no:\n\tnet")):
            text = said("mnist")
    finally:
        os.chdir(was)
    assert "(no: net); the one beside you is ./mnist" in text and "\\n" not in text


@pytest.mark.parametrize("f", ZOO)
def test_zoo(f, tmp_path):
    f(tmp_path)


# ---- labels in arrays

TYPED = ("--image-size 8 --attn-resolutions 4 --steps 1 --batch 4 --channels 8 --groups 4 "
         "--num-heads 2 " "--T 20 --warmup 0 --ema 0.9 --threads 1 --device cpu").split()


@pytest.mark.parametrize("f", ZOO)
def test_zoo_through_the_command(f, tmp_path, monkeypatch, capsys):
    "What a person types ends well, or in one sentence, for every folder that an animal has made."
    (tmp_path / "zoo").mkdir()
    from iddpm_nb.cli.train import iddpm_train
    from iddpm_nb.running import run, underway
    folders, here = [], sys.modules[__name__]

    def noted(real):
        def call(folder, *how, **more):
            folders.append(folder)
            return real(folder, *how, **more)
        return call
    with monkeypatch.context() as m:
        for name in ("open_sets", "open_images"):
            m.setattr(here, name, noted(globals()[name]))
        f(tmp_path / "zoo")
    monkeypatch.setattr(run, "judge", lambda *how: {})              # what is tried is the reading
    monkeypatch.setattr(underway, "curve", lambda folder: None)
    for i, folder in enumerate(dict.fromkeys(folders)):
        capsys.readouterr()
        try:
            iddpm_train(["--data", str(folder), "--out", str(tmp_path / f"run{i}"), *TYPED])
        except SystemExit as e:
            status = e.code
        else:
            status = 0
        out, err = capsys.readouterr()
        last = err.strip().splitlines()[-1:]
        assert "Traceback" not in out + err and status in (0, 1), err
        assert status == 0 or last[0].startswith("iddpm_train: ") and len(last[0]) > 40, err
        assert status or (tmp_path / f"run{i}" / "checkpoints" / "0000001").is_dir(), out


Y = np.arange(12) % 3
LABELS = {
    "texts": (np.array(list("abc"))[Y], "whole numbers"), "fractions": (Y / 2, "whole numbers"),
    "one_hot": (np.eye(3, dtype=int)[Y], "argmax"), "too_few": (Y[:11], "for each of the 12"),
    "stray": (np.where(np.arange(12) == 5, 700_000, Y), "700000"),
    "1e8": (np.where(np.arange(12) == 5, 10**8, Y), "100000000"),
    "1e12": (np.where(np.arange(12) == 5, 10**12, Y), "1000000000000"),
    "below_0": (Y - 1, "-1"), "beyond": (Y.astype(np.uint64) + 2**63, "9223372036854775808"),
}


@pytest.mark.parametrize("name", LABELS)
def test_what_is_no_label_gets_a_sentence(name, tmp_path):
    labels, word = LABELS[name]
    np.savez(tmp_path / "a.npz", images=np.zeros((12, 8, 8), np.uint8), labels=labels)
    assert word in said(tmp_path / "a.npz")


def test_labels_in_any_byte_order(tmp_path):
    for kind in (">i8", ">u2", "<i4", "u1"):
        x = np.arange(12 * 64, dtype=np.uint8).reshape(12, 8, 8)
        np.savez(tmp_path / "a.npz", images=x, labels=Y.astype(kind))
        assert opened(tmp_path / "a.npz", None)[:2] == (12, ("0", "1", "2"))


def test_classes_without_images_are_said(tmp_path):
    np.savez(tmp_path / "a.npz", images=np.zeros((12, 8, 8), np.uint8), labels=Y * 2)
    assert "2 of 5 classes have no image: 1, 3" in opened(tmp_path / "a.npz")[2]


def test_an_array_that_does_not_fit_is_not_read(tmp_path):
    zeros = np.broadcast_to(np.uint8(0), (4000, 100, 100))
    np.savez_compressed(tmp_path / "a.npz", images=zeros)
    with patch("iddpm_nb.data.free_memory", lambda device: 10**7):
        assert "more than fits into the memory" in said(tmp_path / "a.npz")


# ---- content

def pixels(d):
    return ({x.numpy().tobytes() for x in d[:]} if d.__class__.__name__ == "Files"
            else {x.numpy().tobytes() for x in d.images})


def test_held_out_stays_held_out(tmp_path):
    train, held = open_sets(str(fill(tmp_path / "a", 40)), SIZE)
    assert train.whole == held.whole and 1 <= len(held) <= 12
    moved = tmp_path / ".other" / "place"
    for i, p in enumerate(sorted((tmp_path / "a").rglob("*.png"))):
        target = moved / p.parent.name / f"{97 * i % 41}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(p, target)
    train2, held2 = open_sets(str(moved), SIZE)
    assert train2.whole == train.whole
    assert train2.images.equal(train.images) and held2.images.equal(held.images)
    assert train2.labels.equal(train.labels)
    save(moved / "cat" / "0new.png", 1000)
    train3, held3 = open_sets(str(moved), SIZE)
    assert train3.whole != train.whole
    assert pixels(held) <= pixels(held3) and pixels(train) <= pixels(train3)


def test_disk_and_memory_hold_the_same(tmp_path):
    fill(tmp_path, 40)
    for a, b in zip(open_sets(str(tmp_path), SIZE), open_sets(str(tmp_path), SIZE, on_disk=True)):
        assert a.images.equal(b[:]) and a.labels.equal(b.labels)
        assert (a.classes, a.name, a.notes, a.whole) == (b.classes, b.name, b.notes, b.whole)


def test_files_of_equal_name_and_size_are_not_equal(tmp_path):
    def files():
        return open_sets(str(tmp_path), SIZE, on_disk=True)[0]
    fill(tmp_path)
    for p in tmp_path.rglob("*.png"):
        Image.fromarray(random(1)).save(p.with_suffix(".bmp"))
        p.unlink()
    before = files()
    state = Prefetch(before, 4, workers=0).state_dict()
    for p in tmp_path.rglob("*.bmp"):
        Image.fromarray(random(2)).save(p)
    with pytest.raises(ValueError, match="has changed: .*--new-data"):
        next(Prefetch(before, 4, workers=0))
    after = Prefetch(files(), 4, workers=0)
    with pytest.raises(ValueError, match="not the images.*--new-data"):
        after.load_state_dict(state)
    after.load_state_dict(state, new_data=True)
    next(after)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_breaks_in_the_middle_of_a_run(workers, tmp_path):
    fill(tmp_path)
    batches = Prefetch(open_sets(str(tmp_path), SIZE, on_disk=True)[0], 4, workers=workers)
    state = batches.state_dict()
    gone = batches.images.paths[0]
    gone.unlink()
    with pytest.raises(ValueError, match=f"{gone.name} .*--new-data --skip-broken"):
        for _ in range(4):
            next(batches)
    gone.write_bytes(b"half a file")
    again = make_batches(open_sets(str(tmp_path), SIZE, on_disk=True, skip_broken=True)[0], 4,
                         workers=0)
    again.load_state_dict(state, new_data=True)
    assert [len(next(again)[0]) for _ in range(4)] == [4] * 4


def test_labels_are_compared_on_resume():
    x, y = torch.arange(64, dtype=torch.uint8).reshape(4, 1, 4, 4), torch.tensor([0, 1, 0, 1])
    state = Batches(Images(x, y, ("a", "b")), 2).state_dict()
    for labels, names in ((y.flip(0), ("a", "b")), (y, ("a", "c"))):
        other = Batches(Images(x, labels, names), 2)
        with pytest.raises(ValueError, match="other labels or class names"):
            other.load_state_dict(state)
        other.load_state_dict(state, new_data=True)
    Batches(Images(x, y, ("a", "b")), 2).load_state_dict(state)


def test_a_checkpoint_of_the_version_that_split_by_place():
    d, other = (Images(torch.full((4, 1, 4, 4), k, dtype=torch.uint8)) for k in (0, 1))
    state = Batches(d, 2).state_dict()
    with pytest.raises(ValueError, match="these are not the images"):
        Batches(other, 2).load_state_dict(state)
    older = {k: v for k, v in state.items() if k != "labels"}
    with pytest.raises(ValueError, match="by place, not by content.*--new-data.*trained on"):
        Batches(other, 2).load_state_dict(older)
    Batches(other, 2).load_state_dict(older, new_data=True)
    Batches(d, 2).load_state_dict(older)


def test_the_size_of_a_set_is_told_without_an_option():
    with pytest.raises(ValueError, match="8x8, and 16x16 are wanted here$"):
        open_sets("digits", 16)


def test_a_position_that_points_nowhere():
    d = Images(torch.zeros(4, 1, 4, 4, dtype=torch.uint8))
    for order in (torch.tensor([4]), torch.tensor([-1]), torch.tensor([0.0]), torch.zeros(2, 2)):
        with pytest.raises(ValueError, match="position in the data is damaged"):
            Batches(d, 2).load_state_dict(Batches(d, 2).state_dict() | {"order": order})


# ---- speed, memory and processes

def test_every_file_is_decoded_once_by_several_threads(tmp_path):
    import threading

    from iddpm_nb.images import folders
    fill(tmp_path, 30)
    seen, real = [], folders.decoded
    def decoded(data, *how):
        seen.append(threading.get_ident())
        return real(data, *how)
    with patch.object(folders, "decoded", decoded), patch("os.cpu_count", lambda: 4):
        open_sets(str(tmp_path), SIZE)
    assert len(seen) == 30 and len(set(seen)) > 1


def test_a_bar_from_the_first_picture(tmp_path):
    fill(tmp_path)
    told = io.StringIO()
    def bar(total, unit, progress):
        assert (total, progress) == (12, True)
        return tqdm(total=total, file=told, disable=False, mininterval=0)
    with patch("iddpm_nb.images.folders.progress_bar", bar):
        open_sets(str(tmp_path), SIZE, progress=True)
    assert " 0/12" in told.getvalue() and "12/12" in told.getvalue()


def test_a_batch_of_many_epochs_is_joined_once():
    d, moved, real = Images(torch.zeros(4, 1, 4, 4, dtype=torch.uint8)), [], torch.cat
    def cat(tensors):
        moved.append(sum(map(len, tensors)))
        return real(tensors)
    with patch("torch.cat", cat):
        Batches(d, 4000).indices()
    assert sum(moved) <= 4000


def test_memory_without_proc_and_sysconf():
    from iddpm_nb.data import fits, free_memory
    with patch("builtins.open",
               side_effect=OSError), patch("io.open",
                                           side_effect=OSError), patch("os.sysconf", None):
        assert free_memory("cpu") > 2**26 and fits(1000, "cpu")


def test_workers_that_are_spawned(tmp_path):
    fill(tmp_path)
    code = ("import sys, torch, multiprocessing as mp\n" "from iddpm_nb.training.loading import "
            "Prefetch\nfrom iddpm_nb.images.folders import open_sets\n"
            "if __name__ == '__main__':\n" "    d = open_sets(sys.argv[1], 8, on_disk=True)[0]\n"
            "    a = next(Prefetch(d, 4, workers=0))[0]\n" "    mp.set_start_method('spawn', "
            "force=True)\n" "    print(a.equal(next(Prefetch(d, 4, workers=1))[0]))\n")
    (tmp_path.parent / "go.py").write_text(code)
    p = subprocess.run([sys.executable, tmp_path.parent / "go.py", tmp_path], capture_output=True,
                       text=True)
    assert p.stdout.strip() == "True", p.stderr


def test_a_worker_that_is_killed(tmp_path):
    import signal

    from iddpm_nb.training import loading
    class Killed(loading.Rows):
        def __getitems__(self, i): os.kill(os.getpid(), signal.SIGKILL)
    d = Images(torch.zeros(4, 1, 4, 4, dtype=torch.uint8))
    with patch.object(loading, "Rows", Killed), pytest.raises(OSError, match="--workers 1 or 0"):
        next(Prefetch(d, 2, workers=1))
