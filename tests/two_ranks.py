"""Two processes of test_runs: trainings that do not belong together, one after the other; what each of them said."""
import dataclasses
import json
import os
import shutil
import sys
from pathlib import Path

import torch.distributed as dist
from iddpm_nb import underway
from iddpm_nb.run import train_run
from iddpm_nb.unet import UNet
from test_runs import NO_MEMORY, pictures, tiny

RANK, HOME = int(os.environ["RANK"]), Path(sys.argv[1])
underway.curve = lambda folder: None


def other(**more): # the second process is asked for something else
    return more if RANK else {}


def trainings():
    yield "loss", lambda: tiny(steps=2), dict(out=HOME / "loss"), dict(loss="simple", variance="beta")
    yield "dropout", lambda: tiny(steps=2), dict(out=HOME / "dropout"), dict(dropout=0.1)
    yield "sampler", lambda: tiny(steps=2), dict(out=HOME / "sampler"), dict(sampler="importance")
    yield "precision", lambda: tiny(steps=2), dict(out=HOME / "precision"), dict(precision="bfloat16")
    yield "save_every", lambda: tiny(steps=2), dict(out=HOME / "save"), dict(save_every=1)
    yield "sample_every", lambda: tiny(steps=2), dict(out=HOME / "sample"), dict(sample_every=1)
    yield "images", lambda: tiny(HOME / f"data{RANK}", steps=2), dict(out=HOME / "images"), {}
    yield "no data", lambda: tiny(HOME / ("data0", "nowhere")[RANK], steps=2), dict(out=HOME / "none"), {}
    yield "taken", lambda: tiny(steps=2), dict(out=HOME), {}
    yield "right", lambda: tiny(steps=4), dict(out=HOME / "run"), {}
    yield "resume", lambda: tiny(steps=6), dict([("resume_from", HOME / "run"), ("out", HOME / "new")][RANK:][:1]), {}
    yield "no folder", lambda: tiny(steps=6), dict(resume_from=HOME / ("run", "nowhere")[RANK]), {}
    yield "step", lambda: tiny(steps=6), dict(resume_from=HOME / ("run", "older")[RANK]), {}
    yield "memory", lambda: tiny(steps=6), dict(resume_from=HOME / "run"), {}


def changed(c, more):
    parts = {f.name: getattr(c, f.name) for f in dataclasses.fields(c)}
    for name, part in parts.items():
        mine = {k: v for k, v in more.items() if hasattr(part, k)}
        parts[name] = dataclasses.replace(part, **mine)
    return type(c)(**parts)


def short_of_memory(self, x, *args, forward=UNet.forward, **cond): # when it is asked without gradients
    if not self.training and x.device.type == "cpu": raise NO_MEMORY
    return forward(self, x, *args, **cond)


heard = {}
pictures(HOME / f"data{RANK}", seed=RANK)
for name, config, how, more in trainings():
    said = []
    if name == "step" and RANK:
        shutil.copytree(HOME / "run", HOME / "older")
        shutil.rmtree(HOME / "older" / "checkpoints" / "0000004")
    if name == "memory" and RANK: UNet.forward = short_of_memory
    try:
        train_run(changed(config(), other(**more)), device="cpu", progress=False, judged=False, say=said.append, **how)
        heard[name] = "\n".join(said)
    except (ValueError, OSError) as e:
        heard[name] = f"{type(e).__name__}: {e}"
        if dist.is_initialized(): dist.destroy_process_group()
(HOME / f"heard{RANK}.json").write_text(json.dumps(heard))
