"""Interpolation, where a size may change: to how many elements, and which of them is the nearest.
Eager counts them in float64 and finds them in float32; OpenVINO does both by other formulas, which
agree but where a quotient is nearly a whole number."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ovshim.capture.rewrites.division import quotient_of
from ovshim.capture.rewrites.entry import Function, Rewrite, argument, tensor_of
from ovshim.capture.rewrites.sizes import floor_division

__all__ = ["TABLE"]

# Whole multiples up to this come out alike: the first that eager rounds down is the 41st.
_REPEATED = 32


def nearest(x: torch.Tensor, size: Any) -> torch.Tensor:
    """`F.interpolate(x, size)`, each dimension by its indices."""
    spatial = x.dim() - 2
    sizes = list(size) if isinstance(size, (tuple, list)) else [size] * spatial
    for dim, after in enumerate(sizes, 2):
        before = x.shape[dim]
        one, other = (torch.as_tensor(n).to(torch.float32) for n in (before, after))
        x = x.index_select(dim, _places(before, after, quotient_of(one, other)))
    return x


def scaled(x: torch.Tensor, factors: tuple[float, ...]) -> torch.Tensor:
    """`F.interpolate(x, scale_factor=factors)`, of factors that are ratios."""
    for dim, factor in enumerate(factors, 2):
        over, under = _ratio(factor).as_integer_ratio()
        before = x.shape[dim]
        after = floor_division(before * over, under)
        places = _places(before, after, torch.tensor(1.0 / factor, dtype=torch.float32))
        x = x.index_select(dim, torch.where(_is(after, before), torch.arange(after), places))  # type: ignore[arg-type]
    return x


def _places(before: Any, after: Any, scale: torch.Tensor) -> torch.Tensor:
    """As ATen has it (`nearest_neighbor_compute_source_index`), rounding by rounding."""
    found = torch.floor(torch.arange(after).to(torch.float32) * scale).to(torch.int64)
    return torch.minimum(found, torch.as_tensor(before - 1, dtype=torch.int64))


def _is(one: Any, other: Any) -> torch.Tensor:
    return torch.as_tensor(one) == torch.as_tensor(other)


def _ratio(factor: float) -> Fraction:
    return Fraction(factor).limit_denominator(1024)


def _counts(factor: float) -> bool:
    """Whether a size times this is rounded down in float64 as it is in integers: a factor a little
    below its ratio makes 2 of 10 * 0.3."""
    return 0 <= Fraction(factor) - _ratio(factor) < Fraction(1, 2**45)


def _interpolation(node: Node) -> Function | None:
    """Sizes that do not change are compared by the proof; what cannot be counted is fixed."""
    made, given = tensor_of(node), tensor_of(node.args[0])
    if made is None or given is None:
        return None
    pairs = list(zip(made.shape[2:], given.shape[2:], strict=True))
    uneven = [pair for pair in pairs if _is_open(*pair) and not _repeats(*pair)]
    size = argument(node, 1, "size")
    plain = argument(node, 3, "mode", "nearest") == "nearest"
    if not uneven or (size is not None and not plain):
        return None
    if size is not None:
        node.args, node.kwargs = (node.args[0], size), {}
        return nearest
    factor: Any = argument(node, 2, "scale_factor")
    factors = tuple(factor) if isinstance(factor, (tuple, list)) else (factor,) * len(pairs)
    again = argument(node, 5, "recompute_scale_factor")
    if not again and plain and all(map(_counts, factors)):
        node.args, node.kwargs = (node.args[0], factors), {}
        return scaled
    if again or plain or not all(map(_is_exact, factors)):
        for _, before in uneven:
            int(before)  # a guard
    return None


def _is_exact(factor: float) -> bool:
    """Whether float32 holds a size times this."""
    return _ratio(factor) == factor


def _is_open(after: Any, before: Any) -> bool:
    return isinstance(after, torch.SymInt) or isinstance(before, torch.SymInt)


def _repeats(after: Any, before: Any) -> bool:
    return any(statically_known_true(after == before * n) for n in range(1, _REPEATED + 1))


TABLE = (Rewrite((F.interpolate,), _interpolation, "takes the neighbour at some sizes"),)
