"""Tensors of an output that lie in the memory of another one: who writes to one writes to both.

No graph gives such tensors. So it gives the other one, and of that they are taken as eager takes
them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from ovshim.reasons import Reason, reason

__all__ = ["View", "Views", "copied", "copied_together", "overlaps", "refusal", "storage_of"]

# Outputs that share a storage of more elements than this are taken to overlap.
_LARGEST_MAP = 1 << 26

Part = int | tuple[int, int | None]
"""Of one dimension: the place that is selected, or where a slice begins and where it ends."""


@dataclasses.dataclass(frozen=True)
class View:
    """How one tensor is taken of another.

    Attributes:
        of: which leaf of the output that is.
        parts: what is taken of each of its dimensions.
        order: which of those that are left the view's dimensions are.
    """

    of: int
    parts: tuple[Part, ...]
    order: tuple[int, ...]

    def taken(self, tensor: torch.Tensor) -> torch.Tensor:
        """It, of such a tensor."""
        key = tuple(part if isinstance(part, int) else slice(*part) for part in self.parts)
        return tensor[key].permute(self.order)

    def to_json(self) -> list[Any]:
        """As a manifest holds it."""
        return [self.of, list(self.parts), list(self.order)]

    @staticmethod
    def from_json(stored: Sequence[Any]) -> View:
        """The view that a manifest holds. Raises where it holds none."""
        of, parts, order = stored
        return View(_whole(of), tuple(map(_part, parts)), tuple(map(_whole, order)))


Views = Mapping[int, View]
"""By leaf of an output: how it is taken of another one, which is none of these."""


def _part(stored: Any) -> Part:
    if not isinstance(stored, list):
        return _whole(stored)
    start, stop = stored
    return _whole(start), None if stop is None else _whole(stop)


def _whole(stored: Any) -> int:
    if type(stored) is not int:
        raise ValueError(f"{stored!r} is no whole number")
    return stored


def refusal(overlaps: Iterable[tuple[int, int]], views: Views) -> Reason | None:
    """Why an output is eager's two leaves of which overlap; None where views make them so."""
    for one, other in overlaps:
        if _owner(one, views) != _owner(other, views):
            return reason("aliases-input", "two outputs overlap in memory")
    return None


def copied(tensor: torch.Tensor) -> torch.Tensor:
    """A copy that lies in memory as the tensor does, its gaps and repetitions included."""
    tensor = tensor.detach()
    made = tensor.clone()
    if made.stride() == tensor.stride() or tensor.layout is not torch.strided:
        return made
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    extent = 1 + sum((size - 1) * stride for size, stride in pairs)
    whole = tensor.as_strided((extent,), (1,), tensor.storage_offset()).clone()
    return whole.as_strided(tensor.shape, tensor.stride())


def copied_together(tensors: Iterable[torch.Tensor]) -> dict[int, torch.Tensor]:
    """Copies by the tensors' ids. What these have in common of their memory, the copies have."""
    storages: dict[int, torch.UntypedStorage] = {}
    copies: dict[int, torch.Tensor] = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        copy = storages.get(storage.data_ptr()) or storage.clone()  # type: ignore[no-untyped-call]
        storages[storage.data_ptr()] = copy
        place = tensor.storage_offset(), tensor.size(), tensor.stride()
        copies[id(tensor)] = torch.empty(0, dtype=tensor.dtype).set_(copy, *place)
    return copies


def _owner(leaf: int, views: Views) -> int:
    return views[leaf].of if leaf in views else leaf


def overlaps(leaves: Sequence[Any]) -> Iterator[tuple[int, int]]:
    """Pairs of leaves, different tensors, that have memory in common."""
    shared: dict[int, list[int]] = {}
    known: set[int] = set()
    for i, leaf in enumerate(leaves):
        if not isinstance(leaf, torch.Tensor) or id(leaf) in known or not storage_of(leaf):
            continue
        known.add(id(leaf))
        others = shared.setdefault(storage_of(leaf), [])
        yield from ((j, i) for j in others if _overlap(leaf, leaves[j]))
        others.append(i)


def _overlap(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two views of one storage have an element in common. (The parts of a split have none:
    nobody can tell them from tensors of their own.)"""
    count = one.untyped_storage().nbytes() // one.element_size()
    if one.dtype != other.dtype or count > _LARGEST_MAP:
        return True
    taken = torch.zeros(count, dtype=torch.bool)
    taken.as_strided(one.size(), one.stride(), one.storage_offset()).fill_(True)
    return bool(taken.as_strided(other.size(), other.stride(), other.storage_offset()).any())


def storage_of(tensor: torch.Tensor) -> int:
    """Where the storage of a tensor lies; 0 where it has none."""
    if tensor.layout is not torch.strided or tensor.is_meta:
        return 0
    return tensor.untyped_storage().data_ptr()
