"""The commands, one module each."""
from .. import _give_way

_give_way()
