"""Bits/dim of MNIST's test images without a network: tools/baselines.py MNIST.npz [NAME]

Adds them to results/NAME.json (mnist32): a uniform level, histograms counted on the training
images, and compressors of everyday use, all on the images of the record: 32x32, in a black frame.
"""
import io
import json
import lzma
import sys
from pathlib import Path

import numpy as np
from PIL import Image

FRAME = (0, 0), (2, 2), (2, 2)


def histograms(train, test):
    "Bits of a test pixel by one histogram of the training images, and by one for each pixel."
    counts = np.bincount(train.ravel(), minlength=256) + 1.0
    levels, places = train.reshape(len(train), -1), np.arange(train[0].size)
    each = np.stack([np.bincount(levels[:, j], minlength=256) + 1 / 256 for j in places])
    each /= each.sum(1, keepdims=True)
    return (float(-np.log2(counts / counts.sum())[test].mean()),
            float(-np.log2(each[places, test.reshape(len(test), -1)]).mean()))


def png(image):
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG", optimize=True)
    return len(file.getvalue())


def main():
    path, name = sys.argv[1], (*sys.argv[2:], "mnist32")[0]
    place = Path(__file__).parent.parent / "results" / f"{name}.json"
    record, data = json.loads(place.read_text()), np.load(path)
    train, test = (np.pad(data[k], FRAME) for k in ("train_images", "test_images"))
    test = test[:record["held_out"]["n"]]
    one, per_pixel = histograms(train, test)
    xz = len(lzma.compress(test.tobytes(), preset=9 | lzma.PRESET_EXTREME))
    record["bits_per_dim_without_a_network"] = {
        "uniform": 8.0, "histogram": one, "histogram_per_pixel": per_pixel,
        "png_of_each": 8 * sum(map(png, test)) / test.size, "xz_of_all": 8 * xz / test.size}
    place.write_text(json.dumps(record, indent=1) + "\n")
    print(record["bits_per_dim_without_a_network"])


if __name__ == "__main__": main()
