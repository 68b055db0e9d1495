"""Values of inputs with which a graph is not to be trusted.

OpenVINO's kernels lose NaNs on the way (a ReLU of NaN is 0), and hold 64-bit integers in 32 bits.
A call with such an input goes to eager. The check costs about a microsecond an input.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

__all__ = ["ValueCheck", "compile_value_check"]

ValueCheck = Callable[[Sequence[torch.Tensor]], bool]

_DIRECT = (torch.float32, torch.float64)
_LIMIT = 2**31


def compile_value_check(tensors: Sequence[torch.Tensor]) -> ValueCheck:
    """A function that tells whether the tensors of a call may go to OpenVINO.

    Args:
        tensors: those of the example. An input that holds infinities there (a mask) may hold them
            in every call, for the proof has seen them; a NaN may never.
    """
    lines = []
    for i, tensor in enumerate(tensors):
        if tensor.dtype in (torch.int64, torch.uint32, torch.uint64):
            lines.append(f"small_integers(tensors[{i}])")
        elif tensor.dtype.is_floating_point:
            infinite = tensor.numel() > 0 and bool(torch.isinf(tensor).any())
            lines.append(f"{'no_nan' if infinite else 'finite'}(tensors[{i}])")
    scope: dict[str, Any] = {
        "small_integers": _small_integers,
        "no_nan": _no_nan,
        "finite": _finite,
    }
    return eval(f"lambda tensors: {' and '.join(lines) or True}", scope)  # type: ignore[no-any-return]


def _finite(x: torch.Tensor) -> bool:
    # A sum of squares is finite only if all are: one pass, a sixth of what isfinite().all() takes.
    # It overflows at values that are finite still, which is then looked at.
    if x.dtype in _DIRECT and x.is_contiguous():
        flat = x.detach().view(-1)
        if torch.dot(flat, flat).item() < math.inf:
            return True
    return bool(torch.isfinite(x).all())


def _no_nan(x: torch.Tensor) -> bool:
    if x.dtype in _DIRECT and x.is_contiguous():
        flat = x.detach().view(-1)
        square = torch.dot(flat, flat).item()
        return square == square
    return not bool(torch.isnan(x).any())


def _small_integers(x: torch.Tensor) -> bool:
    if x.numel() == 0:
        return True
    low, high = torch.aminmax(x)
    return low.item() >= -_LIMIT and high.item() < _LIMIT
