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

from typing import TYPE_CHECKING

from ovshim.lazy import attach

if TYPE_CHECKING:
    from ovshim.precision.sensitive import Sensitivity, sensitivity

__all__ = ["Sensitivity", "sensitivity"]

if not TYPE_CHECKING:  # type checkers would take every misspelt name for one of these
    __getattr__, __dir__ = attach(globals(), dict.fromkeys(__all__, "sensitive"))
