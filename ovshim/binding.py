"""OpenVINO's binding to Python, `openvino._pyopenvino`, without the package around it.

The package takes longer to import than the binding, for what a graph out of the cache never needs:
sixteen sets of operations, converters, front ends (19 ms of 31, OpenVINO 2026.4). So the binding is
loaded by itself, where nobody has imported the package yet. Whoever does so later does not notice.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import logging
import sys
from types import ModuleType
from typing import Any

from ovshim.imports import apart, import_apart

__all__ = ["binding", "package"]

_log = logging.getLogger("ovshim")
# What `import` itself is made of: nothing public loads a module under its lock but not its package.
_bootstrap: Any = importlib._bootstrap

_PACKAGE, _BINDING = "openvino", "openvino._pyopenvino"

_alone: ModuleType | None = None


def binding() -> Any:
    """The binding, loaded at the first call. ImportError without OpenVINO."""
    if _alone is not None:
        return _alone
    # On Windows it is the package that says where its libraries are.
    # An interrupt would leave half of it.
    if _PACKAGE not in sys.modules and sys.platform != "win32" and not apart(_load):
        _load()
    if _alone is None:
        package()  # first: its error is the one that users know
        return importlib.import_module(_BINDING)
    return _alone


def package() -> Any:
    """The package itself, imported at the first call."""
    # The telemetry package forks and calls out on every conversion; without it
    # openvino.tools.ovc falls back to a stub of its own.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import_apart(_PACKAGE)
    return importlib.import_module(_PACKAGE)


def _load() -> None:
    global _alone
    try:
        # The locks that imports of both take, in their order: nobody meets half a module.
        with _bootstrap._ModuleLockManager(_PACKAGE), _bootstrap._ModuleLockManager(_BINDING):
            if sys.modules.keys().isdisjoint((_PACKAGE, _BINDING)):
                _alone = _loaded()
    except Exception:  # whatever is new in Python, or where it was installed
        _log.debug("OpenVINO's binding is not loaded by itself", exc_info=True)


def _loaded() -> ModuleType:
    if _alone is not None:  # by another thread, meanwhile
        return _alone
    package = importlib.util.find_spec(_PACKAGE)
    where = None if package is None else package.submodule_search_locations
    spec = importlib.machinery.PathFinder.find_spec(_BINDING, where)
    if where is None or spec is None:
        raise ImportError(f"{_BINDING} is not where it used to be.")
    loaded: ModuleType = _bootstrap._load_unlocked(spec)
    # So that an import of it goes as if it were the first, and tells the package. What is loaded is
    # not loaded twice: the same is handed out again. Once it is asked for here (0.1 ms), for where
    # that is not so nobody could import OpenVINO any more.
    del sys.modules[_BINDING]
    try:
        again = _bootstrap._load_unlocked(spec)
    except ImportError:
        again = None
    if again is loaded:
        del sys.modules[_BINDING]
    else:
        sys.modules[_BINDING] = loaded
    return loaded
