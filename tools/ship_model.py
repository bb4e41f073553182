"""Take the weights that chapters load from a finished run of plain `iddpm_train`:
tools/ship_model.py runs/digits

Writes data/shipped/digits.safetensors (bfloat16, so that it stays small) and beside it the run's
own record.
"""
import shutil
import sys
from pathlib import Path

import torch

from iddpm_nb.running.model import load
from iddpm_nb.training.checkpoint import save_model

run, shipped = Path(sys.argv[1]), Path(__file__).parent.parent / "data" / "shipped"
model = load(run)
save_model(shipped / "digits.safetensors", model.net, model.config, torch.bfloat16)
shutil.copy(run / "result.json", shipped / "digits.json")
print(f"{(shipped / 'digits.safetensors').stat().st_size / 1e6:.2f} MB in {shipped}")
