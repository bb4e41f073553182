"""A file of the codec between processes, and every way in which it can be damaged."""
import struct
import subprocess
import sys
import zlib

import pytest
import torch
from conftest import clean_env, ROOT
from iddpm_nb.data import digits, to_float
from iddpm_nb.running.model import load
from iddpm_nb.sampling import respace
from iddpm_nb.schedule import make_schedule
from iddpm_nb.beyond import codec as codecs
from iddpm_nb.beyond.codec import Codec, calibrated, compress, decompress

CODEC = """
import sys, torch
from iddpm_nb import load
from iddpm_nb.data import digits, to_float
from iddpm_nb.beyond.codec import calibrated, compress, decompress
torch.set_num_threads(int(sys.argv[2]))
model = load("digits")
codec = calibrated(model.net, model.schedule, to_float(digits("train").images[:16]), steps=12)
"""
WRITES = CODEC + """
sent = compress(codec, to_float(digits("test").images[:8]), 5)
open(sys.argv[1], "wb").write(sent.data)
torch.save(sent.x0_hat, sys.argv[1] + ".pt")
"""
READS = CODEC + """
try:
    x = decompress(codec, open(sys.argv[1], "rb").read())
    print(torch.equal(x, torch.load(sys.argv[1] + ".pt", weights_only=True)))
except ValueError as e:
    print("refused:", e)
"""
ALL_ZERO = torch.zeros(8, 1, 4, 4)


def process(code, file, threads):
    "What a process prints."
    done = subprocess.run([sys.executable, "-c", code, file, str(threads)], capture_output=True,
                          text=True, env=clean_env(PYTHONPATH=str(ROOT)), cwd=file.parent)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    "A file that another process has written."
    path = tmp_path_factory.mktemp("codec") / "digits.difc"
    process(WRITES, path, 1)
    return path


@pytest.fixture(scope="module")
def small():
    "A codec in which the network is a formula, a file, and what it shows."
    s = respace(make_schedule("cosine", 1000), range(0, 1000, 100))

    def net(x, t_model):
        return 0.9 * x

    error = (0.04 * (1 - s.alpha_bar) / (0.04 * s.alpha_bar + 1 - s.alpha_bar))
    codec = Codec(net, s, error.reshape(-1, 1, 1, 1).repeat(1, 1, 4, 4))
    x0 = 0.2 * torch.randn(8, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    return codec, compress(codec, x0, 2)


def signed(body):
    "A file whose last checksum is right."
    return body + struct.pack(">I", zlib.crc32(body))


def test_another_process_reads_the_same_pictures(file):
    assert process(READS, file, 1) == "True"


def test_other_threads_read_the_same_or_refuse(file):
    said = process(READS, file, 2)
    assert said == "True" or said.startswith("refused:") and "rounds otherwise" in said


def test_every_changed_byte_is_refused(small):
    codec, sent = small
    assert torch.equal(decompress(codec, sent.data), sent.x0_hat)
    for place in range(len(sent.data)):
        bad = bytearray(sent.data)
        bad[place] ^= 1 << place % 8
        with pytest.raises(ValueError, match="no file|format|damaged"):
            decompress(codec, bytes(bad))


def test_every_length_is_refused_but_its_own(small):
    codec, sent = small
    for n in range(len(sent.data)):
        with pytest.raises(ValueError, match="no file|cut off"):
            decompress(codec, sent.data[:n])
    with pytest.raises(ValueError, match="damaged"):
        decompress(codec, sent.data + b"\0")


def test_a_signed_file_that_does_not_agree_with_itself_is_refused(small):
    codec, sent = small
    head = list(codecs.HEAD.unpack(sent.data[:codecs.HEAD.size]))
    rest = sent.data[codecs.HEAD.size:-4]
    names = "magic version N C H W steps stop most extra seed mark ends".split()
    for name, value, said in (("version", 2, "format 2"), ("N", 9, "do not agree"),
                              ("H", 5, "do not agree"), ("steps", 11, "do not agree"),
                              ("stop", 0, "do not agree"), ("stop", 3, "do not agree"),
                              ("most", 30, "do not agree"), ("extra", 12, "do not agree"),
                              ("N", 0, "do not agree"), ("seed", 1, "rounds otherwise"),
                              ("mark", b"12345678", "another model"),
                              ("ends", 0, "rounds otherwise")):
        bad = dict(zip(names, head)) | {name: value}
        with pytest.raises(ValueError, match=said) as e:
            decompress(codec, signed(codecs.HEAD.pack(*bad.values()) + rest))
        assert "\n" not in str(e.value), name
    with pytest.raises(ValueError, match="do not agree"):
        decompress(codec, signed(sent.data[:-4] + b"\0"))


def test_the_length_depends_on_the_plan_alone(small):
    codec, sent = small
    assert len(compress(codec, ALL_ZERO, 2).data) == len(sent.data)
    assert compress(codec, ALL_ZERO, 2).data == compress(codec, ALL_ZERO, 2).data
    assert len(compress(codec, ALL_ZERO, 5).data) < len(sent.data)


def test_other_weights_are_another_model():
    model, images = load("digits"), to_float(digits("train").images[:4])
    codec = calibrated(model.net, model.schedule, images, steps=4)
    before = codecs.codec_mark(codec)
    with torch.no_grad():
        next(model.net.parameters()).flatten()[0] += 1e-3
    assert codecs.codec_mark(codec) != before


def test_what_cannot_be_sent_is_refused(small):
    codec, _ = small
    for x0, how, said in ((ALL_ZERO.double(), {}, "float32"), (ALL_ZERO[:0], {}, "at most"),
                          (ALL_ZERO[:, :, :3], {}, "images must be"),
                          (ALL_ZERO, {"most": 17}, "16 bits"), (ALL_ZERO, {"extra": 11}, "extra"),
                          (ALL_ZERO, {"seed": -1}, "a seed is")):
        with pytest.raises(ValueError, match=said):
            compress(codec, x0, 2, **how)
    for stop in (0, 9, 40):
        with pytest.raises(ValueError, match="stop must be a step from 1 to 8"):
            compress(codec, ALL_ZERO, stop)
