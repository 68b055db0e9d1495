"""Run PyTorch modules through OpenVINO, proved against eager and with eager to fall back on.

fast = ovshim.accelerate(model, example_input)
with torch.inference_mode():
    y = fast(x)
print(ovshim.explain(fast))
"""

import importlib
import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ovshim.api import accelerate, explain
    from ovshim.errors import (
        ArtifactError,
        CalibrationError,
        FallbackError,
        FallbackWarning,
        OptionError,
        OvshimError,
        OvshimWarning,
        PrecisionWarning,
    )
    from ovshim.foreign import from_onnx
    from ovshim.loaded import load
    from ovshim.options import Options
    from ovshim.runtime import Device, devices
    from ovshim.scope import Scope, disable, disabled, enable, enabled

from ovshim.lazy import attach
from ovshim.version import __version__ as __version__

__all__ = [
    "ArtifactError",
    "CalibrationError",
    "Device",
    "FallbackError",
    "FallbackWarning",
    "OptionError",
    "Options",
    "OvshimError",
    "OvshimWarning",
    "PrecisionWarning",
    "Scope",
    "accelerate",
    "devices",
    "disable",
    "disabled",
    "enable",
    "enabled",
    "explain",
    "from_onnx",
    "load",
]

_MODULES = ("cache", "errors", "options", "precision", "reasons", "runtime", "serve")
_WITHOUT_TORCH = frozenset({"errors", "options", "reasons", "runtime"})
# Imported when asked for: `ovshim run` may not import torch before the script does, which may set
# variables that torch reads.
_PLACES = {
    **dict.fromkeys(__all__, "errors"),  # but for these
    "Device": "runtime",
    "Options": "options",
    "Scope": "scope",
    "accelerate": "api",
    "devices": "runtime",
    "disable": "scope",
    "disabled": "scope",
    "enable": "scope",
    "enabled": "scope",
    "explain": "api",
    "from_onnx": "foreign",
    "load": "loaded",
    **{module: module for module in _MODULES},
}


def _torch_first(place: str) -> None:
    if place not in _WITHOUT_TORCH:
        # On its own: what it loads in turn, by OVSHIM=1, must not find us half imported.
        importlib.import_module("torch")


if not TYPE_CHECKING:  # type checkers would take every misspelt name for one of these
    __getattr__, __dir__ = attach(globals(), _PLACES, _torch_first)

logging.getLogger("ovshim").addHandler(logging.NullHandler())
