"""Lower precision than a module's own, beyond what a hint to OpenVINO does.

graphs        put into a form that NNCF knows, run, compared
lowering      what is to be made of a graph, as data
rules         which module gets which precision
calibration   example inputs out of whatever the user has
islands       parts of a graph in bf16 or fp16
quantize      int8 by NNCF: all of it, or the weights alone
overflow      where values leave float16's range
sensitive     which modules suffer, and rules that spare them: `sensitivity`, for users
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ovshim.precision.sensitive import Sensitivity, sensitivity

__all__ = ["Sensitivity", "sensitivity"]

if not TYPE_CHECKING:  # type checkers would take every misspelt name for one of these

    def __getattr__(name: str) -> Any:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{__name__}.sensitive"), name)
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
