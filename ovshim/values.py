"""Values of inputs with which a graph is not to be trusted.

OpenVINO's kernels lose NaNs on the way (a ReLU of NaN is 0), overflow where eager does not, and
hold 64-bit integers in 32 bits. A call with such an input goes to eager. The check costs about a
microsecond an input.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ovshim.helper import hot
from ovshim.waiting import SHARED_OUT

__all__ = ["HALF", "WIDEST", "ValueCheck", "anything", "compile_value_check", "holds_nan", "usual"]

# The square of what is larger is no float32.
_LARGEST_NORM = 1e19

_FLOATS = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})

ValueCheck = Callable[[Sequence[torch.Tensor]], bool]
Limits = Mapping[int, tuple[int, int]]

# Of 64-bit integers OpenVINO's CPU plugin keeps the lower half.
WIDEST = (-(2**31), 2**31 - 1)
HALF = (-65504, 65504)
"""All that float16 holds."""


def compile_value_check(
    tensors: Sequence[torch.Tensor], limits: Limits, beside: Collection[int] = ()
) -> ValueCheck:
    """A function that tells whether the tensors of a call may go to OpenVINO.

    Args:
        beside: tensors that are looked at elsewhere, by index.
        tensors: those of the example. An input that holds infinities there (a mask) may hold them
            in every call, for the proof has seen them; a NaN may never.
        limits: the smallest and the largest value that each of these tensors may hold, by index,
            where it may not hold all.
    """
    tests = []
    for i, tensor in enumerate(tensors):
        if i in beside:
            continue
        if tensor.dtype is torch.int64 or i in limits:
            low, high = limits.get(i, WIDEST)
            tests.append(f"within(tensors[{i}], {low}, {high})")
        elif tensor.dtype.is_floating_point:
            tests.append(f"{'no_nan' if _infinite(tensor) else 'moderate'}(tensors[{i}])")
    if not tests:
        return anything
    scope: dict[str, Any] = {"within": _within, "no_nan": _no_nan, "moderate": _moderate}
    return eval(f"lambda tensors: {' and '.join(tests)}", scope)  # type: ignore[no-any-return]


def anything(tensors: Sequence[torch.Tensor]) -> bool:
    """The check where there is nothing to look at."""
    return True


def usual(tensors: Sequence[torch.Tensor], limits: Limits) -> list[int]:
    """Which of these only have to be free of NaNs, infinities and values near 1e19, by index:
    plain float32."""
    return [
        i
        for i, tensor in enumerate(tensors)
        if tensor.dtype is torch.float32 and i not in limits and not _infinite(tensor)
    ]


def holds_nan(leaves: Sequence[Any]) -> bool:
    """Whether a tensor among the leaves of a call holds a NaN: a graph that is right elsewhere need
    not be right there, and is not asked. It takes a look at every value."""
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    return any(t.dtype in _FLOATS and t.numel() > 0 and not _no_nan(t) for t in tensors)


def _infinite(tensor: torch.Tensor) -> bool:
    return tensor.numel() > 0 and bool(torch.isinf(tensor).any())


def _square(x: torch.Tensor) -> float:
    """The sum of squares: NaN if there is one in `x`, infinite if there is an infinity, or a value
    near 1e19 and beyond, whose square overflows. isfinite().all() takes six times as long."""
    if x.dtype is torch.float32 and not x.requires_grad and not x.is_neg():
        values = x.numpy()
        square: float = np.vdot(values, values)  # in half of torch.dot's time
        return square
    flat = x.detach().reshape(-1)
    if x.numel() < SHARED_OUT:
        return float(torch.dot(flat, flat).item())
    values = flat.resolve_neg().numpy()
    # A loop of NumPy's own: of float64 `vdot` makes work for threads that spin, too.
    return float(np.einsum("i,i", values, values))


def _moderate(x: torch.Tensor) -> bool:
    if x.dtype is torch.float16:  # its squares overflow at 256 already
        return _largest(x) < math.inf if x.numel() >= SHARED_OUT else bool(torch.isfinite(x).all())
    if x.dtype is torch.bfloat16:
        if x.numel() >= SHARED_OUT and _largest(x) * math.sqrt(x.numel()) < _LARGEST_NORM:
            return True
        return float(torch.linalg.vector_norm(x.detach(), dtype=torch.float32)) < _LARGEST_NORM
    return _square(x) < math.inf


def _no_nan(x: torch.Tensor) -> bool:
    if x.dtype in (torch.float16, torch.bfloat16):
        if x.numel() >= SHARED_OUT:
            return not math.isnan(_largest(x))
        return not bool(torch.isnan(x).any())
    return not math.isnan(_square(x))


def _largest(x: torch.Tensor) -> float:
    """The largest absolute value in 16 bits; NaN if there is one: its bits are the largest."""
    bits = (x.detach().resolve_neg().view(torch.int16).numpy() & 0x7FFF).max()
    return torch.tensor(int(bits), dtype=torch.int16).view(x.dtype).item()


def _within(x: torch.Tensor, low: int, high: int) -> bool:
    if x.numel() == 0:
        return True
    if x.numel() >= SHARED_OUT and x.dtype is not torch.bfloat16:
        values = x.detach().resolve_neg().numpy()
        return bool(low <= values.min() and values.max() <= high)
    plain = x.dtype is torch.int64 and x.is_contiguous() and not x.is_neg()
    # Of a view whose memory was taken away, the address is its offset.
    there = x.storage_offset() == 0 or x.untyped_storage().data_ptr() != 0
    if plain and there and hot is not None:  # in a sixth of the time
        found: bool = hot.all_within(x.data_ptr(), x.numel(), low, high)
        return found
    least, most = torch.aminmax(x)
    return low <= least.item() and most.item() <= high
