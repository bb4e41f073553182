"""The paper's tables and claims, line by line, and the theory of few steps."""
from .. import _give_way

_give_way()     # `iddpm_tables` is a command
