"""Improved DDPM, derived, checked and implemented notebook by notebook."""
__version__ = "0.0.1"

_HOMES = {"Schedule": "forward", "make_schedule": "schedule", "UNet": "unet", "sample": "sampling",
          "bits_per_dim": "likelihood", "Config": "training.config", "load_openai": "interop.openai",
          "to_openai": "interop.openai", "to_diffusers": "interop.diffusers_bridge",
          "load": "running.model", "train_run": "running.run"}
__all__ = list(_HOMES)


def __getattr__(name):     # lazily, so that one broken module does not break the import of all others
    if name not in _HOMES: raise AttributeError(f"module 'iddpm_nb' has no attribute {name!r}")
    from importlib import import_module
    return getattr(import_module(f"iddpm_nb.{_HOMES[name]}"), name)
