"""Take the weights that chapters load from a finished run of plain `iddpm_train`: tools/ship_model.py runs/digits

Writes nbs/models/digits.safetensors (bfloat16, so that it stays small) and beside it the run's own record.
"""
import shutil
import sys
from pathlib import Path

import torch

from iddpm_nb.training.checkpoint import save_model
from iddpm_nb.running.run import load

run, models = Path(sys.argv[1]), Path(__file__).parent.parent / "nbs" / "models"
model = load(run)
models.mkdir(exist_ok=True)
save_model(models / "digits.safetensors", model.net, model.config, torch.bfloat16)
shutil.copy(run / "result.json", models / "digits.json")
print(f"{(models / 'digits.safetensors').stat().st_size / 1e6:.2f} MB in {models}")
