"""Run PyTorch modules through OpenVINO, proved against eager and with eager to fall back on.

fast = ovshim.accelerate(model, example_input)
with torch.inference_mode():
    y = fast(x)
print(ovshim.explain(fast))
"""

import importlib
import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ovshim.api import accelerate, explain
    from ovshim.errors import (
        ArtifactError,
        CalibrationError,
        DeviceWarning,
        FallbackError,
        FallbackWarning,
        OptionError,
        OvshimError,
        OvshimWarning,
        PrecisionWarning,
    )
    from ovshim.options import Options
    from ovshim.runtime import Device, devices
    from ovshim.scope import Scope, disable, disabled, enable, enabled

__version__ = "0.1.0"

__all__ = [
    "ArtifactError",
    "CalibrationError",
    "Device",
    "DeviceWarning",
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
]

# Where each name is, but for the errors. Imported when asked for: `ovshim run` may not import torch
# before the script does, which may set variables that torch reads.
_PLACES = {
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
}
_MODULES = frozenset({"cache", "errors", "options", "precision", "reasons", "runtime", "serve"})
_WITHOUT_TORCH = frozenset({"errors", "options", "reasons", "runtime"})


if not TYPE_CHECKING:  # type checkers would take every misspelt name for one of these

    def __getattr__(name: str) -> Any:
        place = name if name in _MODULES else _PLACES.get(name)
        if place is None and name in __all__:
            place = "errors"
        if place is None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        if place not in _WITHOUT_TORCH:
            # On its own: what it loads in turn, by OVSHIM=1, must not find us half imported.
            importlib.import_module("torch")
        module = importlib.import_module(f"{__name__}.{place}")
        value = module if name in _MODULES else getattr(module, name)
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__, *_MODULES})


logging.getLogger("ovshim").addHandler(logging.NullHandler())
