"""Improved DDPM, derived, checked and implemented notebook by notebook."""
from importlib import import_module

__version__ = "0.0.1"


def _lazily(package, homes):
    "A package's `__getattr__`: a name is imported when it is asked for, so one broken module breaks no other import."
    def find(name):
        if name not in homes: raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f"{package}.{homes[name]}"), name)
    return find


_HOMES = {"Schedule": "forward", "make_schedule": "schedule", "UNet": "unet", "sample": "sampling",
          "bits_per_dim": "likelihood", "Config": "training.config", "load_openai": "interop",
          "to_openai": "interop", "to_diffusers": "interop", "load": "running.model", "train_run": "running.run"}
__all__ = list(_HOMES)
__getattr__ = _lazily(__name__, _HOMES)
