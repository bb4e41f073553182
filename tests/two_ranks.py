"""Started twice by test_runs: trainings that do not belong together, one after the other."""
import contextlib
import dataclasses
import io
import json
import os
import shutil
import sys
import time
from pathlib import Path

import torch.distributed as dist
from test_runs import NO_MEMORY, pictures, tiny
from iddpm_nb.unet import UNet
from iddpm_nb.running import underway
from iddpm_nb.running.run import train_run
from iddpm_nb.cli.train import iddpm_train

RANK, HOME = int(os.environ["RANK"]), Path(sys.argv[1])
underway.curve = lambda folder: None


OTHER = {                              # what the second process is asked for
    "loss": dict(loss="simple", variance="beta"), "dropout": dict(dropout=0.1),
    "sampler": dict(sampler="importance"), "precision": dict(precision="bfloat16"),
    "save_every": dict(save_every=1), "sample_every": dict(sample_every=1)}


def trainings(): # name, configuration, arguments of train_run
    for name, more in OTHER.items():
        yield name, changed(tiny(steps=2), more if RANK else {}), dict(out=HOME / name)
    yield "images", tiny(HOME / f"data{RANK}", steps=2), dict(out=HOME / "images")
    yield "no data", tiny(HOME / ("data0", "nowhere")[RANK], steps=2), dict(out=HOME / "none")
    yield "taken", tiny(steps=2), dict(out=HOME)
    yield "right", tiny(steps=4), dict(out=HOME / "run")
    yield "resume", tiny(), {("resume_from", "out")[RANK]: HOME / ("run", "new")[RANK]}
    yield "no folder", tiny(), dict(resume_from=HOME / ("run", "nowhere")[RANK])
    yield "step", tiny(), dict(resume_from=HOME / ("run", "older")[RANK])
    yield "memory", tiny(), dict(resume_from=HOME / "run")


def changed(c, more):
    parts = {f.name: getattr(c, f.name) for f in dataclasses.fields(c)}
    for name, part in parts.items():
        mine = {k: v for k, v in more.items() if hasattr(part, k)}
        parts[name] = dataclasses.replace(part, **mine)
    return type(c)(**parts)


def short_of_memory(self, x, *args, forward=UNet.forward, **cond): # without gradients
    if not self.training and x.device.type == "cpu": raise NO_MEMORY
    return forward(self, x, *args, **cond)


def both_left(name):
    "Wait until both have left the meeting place: it is the next training's too."
    (HOME / f"left {name}, {RANK}").touch()
    while not all((HOME / f"left {name}, {r}").exists() for r in (0, 1)):
        time.sleep(0.01)


heard = {}
pictures(HOME / f"data{RANK}", seed=RANK)
for name, c, how in trainings():
    said = []
    if name == "step" and RANK:
        shutil.copytree(HOME / "run", HOME / "older")
        shutil.rmtree(HOME / "older" / "checkpoints" / "0000004")
    if name == "memory" and RANK: UNet.forward = short_of_memory
    try:
        train_run(c, device="cpu", progress=False, judged=False, say=said.append, **how)
        heard[name] = "\n".join(said)
    except (ValueError, OSError) as e:
        heard[name] = f"{type(e).__name__}: {e}"
        if dist.is_initialized(): dist.destroy_process_group()
    both_left(name)
said = io.StringIO()
with contextlib.redirect_stderr(said):  # a machine that does not see the folder, as typed
    try:
        iddpm_train(["--resume", str(HOME / ("run", "nowhere")[RANK]), "--device", "cpu"])
    except SystemExit:
        heard["command"] = said.getvalue()
(HOME / f"heard{RANK}.json").write_text(json.dumps(heard))
