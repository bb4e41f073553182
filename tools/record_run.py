"""The record of a finished run: tools/record_run.py RUN NAME

Writes results/NAME.json (options, machine, commit, steps, seconds, bits/dim) and the grids results/NAME_50.png and NAME_250.png.
"""
import json
import sys
from pathlib import Path

import torch

from iddpm_nb.data import load_images
from iddpm_nb.pictures import save_grid
from iddpm_nb.run import load

run, name = Path(sys.argv[1]), sys.argv[2]
results = Path(__file__).parent.parent / "results"
results.mkdir(exist_ok=True)
model, record = load(run), json.loads((run / "result.json").read_text())
options = json.loads((run / "config.json").read_text())
place = options["data"].pop("root")           # where downloads lie is nobody's business
held = load_images(options["data"]["data"], "test", model.config["shape"][-1], place)
for steps in (50, 250): save_grid(model.sample(64, steps, seed=0, progress=True), results / f"{name}_{steps}.png", cols=16, scale=2)
b = model.bits_per_dim(held.images[:1000], num_t=74, progress=True)
record |= {"options": options, "bits_per_dim": {"images": held.name, "n": len(b.total), "bits_per_dim": b.total.mean().item(), "stderr": b.stderr, "decoder": b.decoder.mean().item(),
                                               "prior": b.prior.mean().item(), "evaluated_t": b.t.shape[1], "T": len(model.schedule)},
           "grids": {"n": 64, "seed": 0, "steps": [50, 250], "weights": model.config["averages"][0]}, "evaluated_with_torch": torch.__version__}
(results / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
print(f"written to {results / name}.json; bits/dim {record['bits_per_dim']['bits_per_dim']:.4f} +- {b.stderr:.4f}")
