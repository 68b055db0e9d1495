"""Modes of torch in which a call is not what it looks like: autocast, transforms, overrides. And
how calls of our own change a mode for a moment."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch.autograd import forward_ad
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from ovshim.reasons import Reason, reason

__all__ = [
    "USUAL_MODES",
    "function_modes",
    "in_special_mode",
    "mode_reason",
    "outside_inference",
    "without_grad",
]

T = TypeVar("T")

_AUTOCAST = reason("autocast")
_SPECIAL_MODE = reason("special-mode")

_autocast_on = torch._C._is_any_autocast_enabled
_dispatch_modes = torch._C._len_torch_dispatch_stack
function_modes = torch._C._len_torch_function_stack
_functorch = torch._C._functorch.peek_interpreter_stack

USUAL_MODES = ((function_modes, 0), (_dispatch_modes, 0), (_autocast_on, False), (_functorch, None))
"""What is asked of each thread, and answered where it is in no such mode."""


def in_special_mode() -> bool:
    """Whether this thread is under a mode in which only the module's own method is right."""
    return bool(
        (function_modes() and not _only_cpu_devices())
        or _dispatch_modes()
        or _autocast_on()
        or _functorch() is not None
        or forward_ad._current_level >= 0
    )


def mode_reason() -> Reason:
    """Why eager serves in such a mode."""
    return _AUTOCAST if _autocast_on() else _SPECIAL_MODE


def _only_cpu_devices() -> bool:
    """Whether all function modes are `torch.device("cpu")` or `set_default_device` to it."""
    return all(
        type(mode) is DeviceContext and mode.device.type == "cpu"
        for mode in _get_current_function_mode_stack()  # type: ignore[no-untyped-call]
    )


# Torch's context managers are Python's: a signal handler may raise on the way into one, or out of
# it, and the program is in another mode from then on. Here nobody asks for signals on the way.


def outside_inference(make: Callable[[], T]) -> T:
    """What `make` gives outside of inference mode: tensors that may be used anywhere."""
    guard = torch._C._InferenceMode(False)
    try:
        guard.__enter__()  # type: ignore[no-untyped-call]
        return make()
    finally:
        guard.__exit__(None, None, None)


def without_grad(make: Callable[[], T]) -> T:
    """What `make` gives where no gradients are recorded."""
    before = torch.is_grad_enabled()
    try:
        torch._C._set_grad_enabled(False)
        return make()
    finally:
        torch._C._set_grad_enabled(before)
