"""Import every module by itself, away from the checkout's folder: python tools/imports.py

Each import happens in a fork that knows none of our modules; what others wrote is loaded once
before, which takes most of the time.
"""
import importlib
import os
import sys
import warnings

import matplotlib.pyplot  # noqa: F401
import torchvision  # noqa: F401
import tyro  # noqa: F401
from book import NBS

LIB = "iddpm_nb"


def modules():
    "The name of every module, as it is imported."
    root = NBS.parent / LIB
    found = sorted(p for p in root.rglob("*.py") if not p.name.startswith("_"))
    return [f"{LIB}." + ".".join(p.relative_to(root).with_suffix("").parts) for p in found]


def alone(name):
    "Import it in a fork; whether that went well."
    if child := os.fork(): return os.waitpid(child, 0)[1] == 0
    try:
        os.chdir("/")
        warnings.filterwarnings("error", category=SyntaxWarning)
        warnings.filterwarnings("error", category=DeprecationWarning, module=LIB)
        importlib.import_module(name)
    except BaseException as e:
        print(f"{name}: {type(e).__name__}: {e}", flush=True)
        os._exit(1)
    os._exit(0)


def main():
    assert not any(name.startswith(LIB) for name in sys.modules), "a module is there already"
    sys.path.insert(0, str(NBS.parent))
    names = modules()
    bad = [name for name in names if not alone(name)]
    print(f"{len(names)} modules, {len(bad)} that cannot be imported")
    sys.exit(bool(bad) or not names)


if __name__ == "__main__": main()
