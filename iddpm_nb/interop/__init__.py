"""The way in and out: official checkpoints, and diffusers, which is imported only when it is asked for."""
from .. import _lazily

_HOMES = {"load_openai": "openai", "to_openai": "openai", "to_diffusers": "diffusers_bridge",
          "schedule_to_diffusers": "diffusers_bridge", "schedule_from_diffusers": "diffusers_bridge"}
__all__ = list(_HOMES)
__getattr__ = _lazily(__name__, _HOMES)
