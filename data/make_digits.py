"""Writes data/shipped/digits.npz from scikit-learn's copy of the UCI handwritten digits: run once,
kept for the record."""
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits

d = load_digits()
k = d.images.astype(int)                                        # 17 grey levels, 0..16
images = np.floor(255 * k / 16 + 0.5).astype(np.uint8)          # round(255 k/16), halves up
np.savez_compressed(Path(__file__).parent / "shipped" / "digits.npz", images=images,
                    labels=d.target.astype(np.uint8))
print(images.shape, "images,", len(np.unique(images)), "grey levels")
