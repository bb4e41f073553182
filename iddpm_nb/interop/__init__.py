"""The way in and out: official checkpoints, and diffusers, which is imported only when it is asked for."""
_HOMES = {"load_openai": "openai", "to_openai": "openai", "to_diffusers": "diffusers_bridge",
          "schedule_to_diffusers": "diffusers_bridge", "schedule_from_diffusers": "diffusers_bridge"}
__all__ = list(_HOMES)


def __getattr__(name):
    if name not in _HOMES: raise AttributeError(f"module 'iddpm_nb.interop' has no attribute {name!r}")
    from importlib import import_module
    return getattr(import_module(f"iddpm_nb.interop.{_HOMES[name]}"), name)
