"""Writes data/shipped/photos.npz: crops at 64x64 of the two photographs that come with
scikit-learn: run once, kept for the record."""
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

china, flower = (Image.fromarray(a) for a in load_sample_images().images)
squares = (china, 180, 0, 420), (china, 20, 190, 200), (flower, 110, 0, 420)  # left, top, side
crops = [photo.crop((x, y, x + side, y + side)).resize((64, 64), Image.Resampling.LANCZOS)
         for photo, x, y, side in squares]
images = np.stack([np.asarray(c) for c in crops])                          # (3, 64, 64, 3) uint8
np.savez_compressed(Path(__file__).parent / "shipped" / "photos.npz", images=images)
print(images.shape, "images")
