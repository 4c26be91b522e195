"""The modules of `fastattn._gpu` that need no CuPy, also where there is none.

The package itself imports CuPy, so where that fails they are imported from a package that is found
but not run, and that is gone again once they have read what they read.
"""

import importlib.util
import sys

try:
    from fastattn._gpu import config, params, source
except ImportError:
    _spec = importlib.util.find_spec("fastattn._gpu")
    _before = set(sys.modules)
    sys.modules["fastattn._gpu"] = importlib.util.module_from_spec(_spec)
    from fastattn._gpu import config, params, source

    source.fingerprint()  # reads all files
    for _name in set(sys.modules) - _before:
        if _name.startswith("fastattn._gpu"):
            del sys.modules[_name]

__all__ = ["config", "params", "source"]
