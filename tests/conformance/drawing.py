"""Arguments drawn anew: parts that know their shape but for batch and length, put into a call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from conformance.entries import Call, Redraw

__all__ = ["Part", "constant", "draw", "integers", "lengths", "mask", "normal", "of", "uniform"]

Part = Callable[[int, int], Any]
"""(batch, length) → one argument."""

Size = int | str


def shape(sizes: tuple[Size, ...], batch: int, length: int) -> list[int]:
    """`"B"` is the batch, `"L"` the length, `"2L"` twice that, a number itself."""
    found = []
    for size in sizes:
        if isinstance(size, int):
            found.append(size)
        else:
            unit = {"B": batch, "L": length}[size[-1]]
            found.append(unit * int(size[:-1] or 1))
    return found


def normal(*sizes: Size, dtype: torch.dtype | None = None, scale: float = 1.0) -> Part:
    return lambda batch, length: (torch.randn(shape(sizes, batch, length)) * scale).to(
        dtype or torch.float32
    )


def uniform(*sizes: Size, low: float = 0.0, high: float = 1.0) -> Part:
    return lambda batch, length: torch.rand(shape(sizes, batch, length)) * (high - low) + low


def integers(low: int, high: int, *sizes: Size, dtype: torch.dtype = torch.int64) -> Part:
    """From `low` up to but without `high`."""
    return lambda batch, length: torch.randint(low, high, shape(sizes, batch, length), dtype=dtype)


def lengths(*, sort: bool = False) -> Part:
    """[batch], from 1 to the length, one of them the length itself."""

    def make(batch: int, length: int) -> Tensor:
        drawn = torch.randint(1, length + 1, (batch,))
        drawn[0] = length
        return drawn.sort(descending=True).values if sort else drawn

    return make


def mask(dtype: torch.dtype = torch.int64, *, left: bool = False, full: bool = False) -> Part:
    """[batch, length], 1 where there is a token; padding at the right, or at the left."""

    def make(batch: int, length: int) -> Tensor:
        counts = torch.full((batch,), length) if full else lengths()(batch, length)
        filled = torch.arange(length)[None, :] < counts[:, None]
        return (filled.flip(1) if left else filled).to(dtype)

    return make


def constant(value: Any) -> Part:
    return lambda batch, length: value


def of(make: Callable[..., Any], *parts: Part) -> Part:
    """What `make` makes of the parts: a list, a record, a tensor of a kind of its own."""
    return lambda batch, length: make(*(part(batch, length) for part in parts))


def draw(*parts: Part, **named: Part) -> Redraw:
    """A call of those parts, positional and by name."""

    def redraw(seed: int, batch: int, length: int) -> Call:
        torch.manual_seed(1000 + seed)
        return Call(
            tuple(part(batch, length) for part in parts),
            {name: part(batch, length) for name, part in named.items()},
        )

    return redraw
