"""Buckets: sizes of a call that are looked at together.

A graph proved at some sizes is compared with eager once more when calls of quite other sizes come,
and whether it is faster depends on them too. Sizes are told apart by powers of two in each open
dimension: 0, 1, 2 to 3, 4 to 7, and so on; dimensions that guards hold equal count once.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import torch

from ovshim.signature import Pattern

__all__ = ["Bucket", "compile_bucket", "compile_sizes", "open_groups", "shown"]

Bucket = int | tuple[int, ...] | str
"""The text is of sizes that have a graph of their own: they are looked at apart."""

_EQUAL = re.compile(r"s(\d+)\[(\d+)\] == s(\d+)\[(\d+)\]")


def compile_bucket(
    pattern: Pattern, size_guards: Sequence[str]
) -> tuple[Callable[[Sequence[torch.Tensor]], Bucket], Callable[[Sequence[Sequence[int]]], Bucket]]:
    """Two functions that give the bucket of a call: of its tensors, and of its tensors' sizes."""
    places = [group[0] for group in open_groups(pattern, size_guards)]
    return (
        _compiled([f"tensors[{t}].shape[{d}]" for t, d in places]),
        _compiled([f"tensors[{t}][{d}]" for t, d in places]),
    )


def shown(bucket: Bucket) -> list[int] | str:
    """A bucket in reports: a list whatever the number of open dimensions, or the text."""
    if isinstance(bucket, str):
        return bucket
    return [bucket] if isinstance(bucket, int) else list(bucket)


def compile_sizes(
    pattern: Pattern, size_guards: Sequence[str]
) -> Callable[[Sequence[torch.Tensor]], Bucket]:
    """A function that gives the sizes themselves."""
    places = [group[0] for group in open_groups(pattern, size_guards)]
    return _compiled([f"tensors[{t}].shape[{d}]" for t, d in places], "")


def _compiled(sizes: Sequence[str], of_each: str = ".bit_length()") -> Callable[..., Bucket]:
    lengths = [f"{size}{of_each}" for size in sizes]
    text = lengths[0] if len(lengths) == 1 else f"({''.join(f'{n}, ' for n in lengths)})"
    return eval(f"lambda tensors: {text}")  # type: ignore[no-any-return]


def open_groups(pattern: Pattern, size_guards: Sequence[str]) -> list[list[tuple[int, int]]]:
    """Open dimensions as (tensor, dimension), those that guards hold equal together."""
    root = {(t, d): (t, d) for t, s in enumerate(pattern) for d, n in enumerate(s) if n is None}
    for guard in size_guards:
        match = _EQUAL.fullmatch(guard)
        if match:
            a, b, c, e = map(int, match.groups())
            if (a, b) in root and (c, e) in root:
                old, new = root[a, b], root[c, e]
                root = {place: new if held == old else held for place, held in root.items()}
    groups: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for place, held in root.items():
        groups.setdefault(held, []).append(place)
    return list(groups.values())
