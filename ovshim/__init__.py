"""Run PyTorch modules through OpenVINO, proved against eager and with eager to fall back on.

fast = ovshim.accelerate(model, example_input)
with torch.inference_mode():
    y = fast(x)
print(ovshim.explain(fast))
"""

import logging

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

logging.getLogger("ovshim").addHandler(logging.NullHandler())
