"""The record of a finished run: tools/record_run.py RUN NAME

Writes results/NAME.json (what result.json says, and the options) and the grids results/NAME_50.png
and NAME_250.png.
"""
import json
import sys
from pathlib import Path

from iddpm_nb.pictures import save_grid
from iddpm_nb.running.model import load

run, name = Path(sys.argv[1]), sys.argv[2]
results = Path(__file__).parent.parent / "results"
results.mkdir(exist_ok=True)
model, record = load(run), json.loads((run / "result.json").read_text())
options = json.loads((run / "config.json").read_text())
options["data"].pop("root")                   # where downloads lie is nobody's business
for steps in (50, 250):
    save_grid(model.sample(64, steps, seed=0, progress=True), results / f"{name}_{steps}.png",
              cols=16, scale=2)
record |= {"options": options, "grids": {"n": 64, "seed": 0, "steps": [50, 250],
                                         "weights": model.config["averages"][0]}}
(results / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
print(f"written to {results / name}.json")
