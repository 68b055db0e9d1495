"""Eager against a candidate: how far apart two outputs are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from ovshim.signature import Structure, flatten
from ovshim.views import Views, overlaps, refusal

__all__ = [
    "Mismatch",
    "compare",
    "compare_flat",
    "compare_views",
    "relative_errors",
    "sample_error",
]


class Mismatch(Exception):
    """Why a candidate's outputs are not eager's."""


def compare(leaves: Sequence[Any], structure: Structure, candidate: Any, tolerance: float) -> float:
    """The largest error over all outputs; the candidate is alike in everything else.

    The error of a floating output is its relative L2 error, ‖candidate − eager‖ / ‖eager‖ over
    its finite elements, in float64; absolute where eager's norm is zero. Cosine would miss a wrong
    scale, and an elementwise tolerance rejects harmless bf16 (measured; see docs/design.md).

    Args:
        leaves, structure: eager's output, flattened.
        candidate: the other output, as the module's caller would get it.
        tolerance: the largest error allowed. Integers and booleans must be equal under a tolerance
            of 1e-3 or less; above, integers may differ where rounding decides (an argmax), by the
            same relative error.

    Raises:
        Mismatch: structure, type, dtype, shape, the places of NaN and infinities, constants or
            values differ.
    """
    return compare_flat(leaves, structure, *flatten(candidate), tolerance)


def compare_flat(
    leaves: Sequence[Any],
    structure: Structure,
    others: Sequence[Any],
    other_structure: Structure,
    tolerance: float,
) -> float:
    """`compare` for a candidate that is flattened already."""
    if other_structure != structure:
        raise Mismatch(f"the structure is {other_structure}, eager's {structure}")
    worst = 0.0
    for i, (mine, other) in enumerate(zip(leaves, others, strict=True)):
        if isinstance(mine, torch.Tensor):
            error = _tensor_error(i, mine, other, tolerance)
            worst = max(worst, error)
            if not error <= tolerance:
                raise Mismatch(f"output {i} is off by {error:.2g} (allowed: {tolerance:.2g})")
        elif type(mine) is not type(other) or repr(mine) != repr(other):
            raise Mismatch(f"output {i} is {other!r}, eager's {mine!r}")
    return worst


def compare_views(leaves: Sequence[Any], views: Views) -> None:
    """Raise Mismatch where eager's output does not have these views among its leaves, or others."""
    why = refusal(overlaps(leaves), views)
    if why is not None:
        raise Mismatch(why.message)
    for leaf, view in views.items():
        mine, other = leaves[leaf], view.taken(leaves[view.of])
        if _memory(mine) != _memory(other):
            raise Mismatch(f"output {leaf} is not taken of output {view.of} as it is in the graph")


def _memory(tensor: torch.Tensor) -> tuple[Any, ...]:
    # Along a dimension of one element there are no steps.
    steps = [(n, step) for n, step in zip(tensor.shape, tensor.stride(), strict=True) if n != 1]
    return tensor.data_ptr(), tensor.dtype, tensor.shape, steps


def _tensor_error(i: int, mine: torch.Tensor, other: Any, tolerance: float) -> float:
    if not isinstance(other, torch.Tensor) or other.dtype != mine.dtype:
        what = other.dtype if isinstance(other, torch.Tensor) else type(other).__qualname__
        raise Mismatch(f"output {i} is {what}, eager's {mine.dtype}")
    if other.shape != mine.shape:
        raise Mismatch(f"output {i} has shape {tuple(other.shape)}, eager's {tuple(mine.shape)}")
    if mine.dtype.is_floating_point:
        return _relative_error(i, mine.detach(), other.detach())
    if torch.equal(mine, other):
        return 0.0
    if tolerance <= 1e-3 or mine.dtype is torch.bool:
        count = int((mine != other).sum())
        raise Mismatch(f"output {i} ({mine.dtype}) differs in {count} of {mine.numel()} elements")
    return _relative_error(i, mine.double(), other.double())


def relative_errors(leaves: Sequence[Any], candidates: Sequence[Any]) -> list[float]:
    """The relative L2 error of each floating output, in order; 0.0 for every other leaf.

    Raises:
        Mismatch: NaN or infinity at different places.
    """
    return [
        _relative_error(i, mine.detach(), other.detach())
        if isinstance(mine, torch.Tensor) and mine.dtype.is_floating_point
        else 0.0
        for i, (mine, other) in enumerate(zip(leaves, candidates, strict=True))
    ]


def sample_error(pairs: Sequence[tuple[Sequence[Any], Sequence[Any]]]) -> float:
    """The relative L2 error of the worst floating output over several calls: 99 of 100 calls are no
    further off. An output that is smaller than is usual counts as one of the usual size: all but
    zero, it would decide alone.

    Args:
        pairs: flattened outputs of each call, eager's first, alike but for their values.
    """
    worst = 0.0
    for mine, others in zip(
        zip(*(m for m, _ in pairs), strict=True),
        zip(*(o for _, o in pairs), strict=True),
        strict=True,
    ):
        if not isinstance(mine[0], torch.Tensor) or not mine[0].dtype.is_floating_point:
            continue
        exact = [torch.nan_to_num(m.detach().double()) for m in mine]
        apart = [
            torch.linalg.vector_norm(torch.nan_to_num(o.detach().double()) - m)
            for m, o in zip(exact, others, strict=True)
        ]
        norms = torch.stack([torch.linalg.vector_norm(m) for m in exact])
        usual = norms.median().clamp_min(torch.finfo(torch.float64).tiny)
        errors = torch.stack(apart) / norms.clamp_min(usual)
        worst = max(worst, errors.quantile(0.99).item())
    return worst


def _relative_error(i: int, mine: torch.Tensor, other: torch.Tensor) -> float:
    difference = (other.double() - mine.double()).flatten()
    norm = torch.linalg.vector_norm(mine, dtype=torch.float64).item()
    distance = torch.linalg.vector_norm(difference).item()
    if not (math.isfinite(norm) and math.isfinite(distance)):
        finite = torch.isfinite(mine)
        same = torch.where(finite, torch.zeros_like(mine), mine)
        alike = torch.where(torch.isfinite(other), torch.zeros_like(other), other)
        if not torch.equal(torch.nan_to_num(same, 1.0), torch.nan_to_num(alike, 1.0)) or (
            not torch.equal(torch.isnan(mine), torch.isnan(other))
        ):
            raise Mismatch(f"output {i} has NaN or infinity where eager has not, or the reverse")
        norm = torch.linalg.vector_norm(mine[finite], dtype=torch.float64).item()
        distance = torch.linalg.vector_norm(difference[finite.flatten()]).item()
    return float(distance / norm if norm > 0 else distance)
