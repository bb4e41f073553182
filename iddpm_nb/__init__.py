"""Improved DDPM, derived, checked and implemented notebook by notebook."""
import os
import sys
from importlib import import_module

__version__ = "0.1.0"


def _lazily(package, homes):
    "A package's `__getattr__`: a name is imported when it is asked for, so one broken module breaks no other import."
    def find(name):
        if name not in homes: raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f"{package}.{homes[name]}"), name)
    return find


def _give_way():
    """Let idle threads of torch (GNU OpenMP) leave the processor to other processes soon. A command
    calls it before torch is imported; what the user has said about waiting stays."""
    said = os.environ.keys() & {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}
    if "torch" not in sys.modules and not said: os.environ["GOMP_SPINCOUNT"] = "10000"


_HOMES = {"Schedule": "forward", "make_schedule": "schedule", "UNet": "unet", "sample": "sampling",
          "bits_per_dim": "likelihood", "Config": "training.config", "load_openai": "interop",
          "to_openai": "interop", "to_diffusers": "interop", "load": "running.model", "train_run": "running.run",
          "push_to_hub": "running.sharing"}
__all__ = list(_HOMES)
__getattr__ = _lazily(__name__, _HOMES)
