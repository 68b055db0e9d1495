"""Which calls of a causal language model are steps of decoding, and what is in them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeGuard

import torch

from ovshim.reasons import Reason, reason

__all__ = ["Call", "LeftToEager", "Reader", "is_whole", "widened"]

_KNOWN = frozenset(
    {
        "input_ids",
        "attention_mask",
        "position_ids",
        "past_key_values",
        "use_cache",
        "logits_to_keep",
        "return_dict",
    }
)
# Not every forward has these.
_OF_SOME = frozenset({"position_ids", "logits_to_keep"})


class LeftToEager(Exception):
    """A step that is not served, and why."""

    def __init__(self, why: Reason) -> None:
        super().__init__(str(why))
        self.reason = why


@dataclasses.dataclass(slots=True)
class Call:
    """A step.

    Attributes:
        input_ids: int64 [batch, length], as all of these.
        attention_mask: [batch, past + length], or None for all ones.
        position_ids: [batch or 1, length], or None for the module's own.
        cache: None where the module would make one.
        keep: of how many of the last tokens logits are wanted; 0: of all.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor | None
    position_ids: torch.Tensor | None
    cache: Any
    keep: int


class Reader:
    """Reads the calls of one module.

    Args:
        names: the parameters of its forward, in order.
        uses_cache: what its configuration says of `use_cache`.
        caches: the classes of caches that can be bound, or are.
    """

    def __init__(self, names: tuple[str, ...], uses_cache: bool, caches: tuple[type, ...]) -> None:
        self.names = names
        self.caches = caches
        self.uses_cache = uses_cache

    def read(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call | Reason | None:
        """The step that a call is; None where it neither brings nor asks for a cache; or why one
        that brings a cache is left to eager."""
        given = {**dict(zip(self.names, args, strict=False)), **kwargs} if args else kwargs
        cache = given.get("past_key_values")
        use_cache = given.get("use_cache")
        if cache is None and not (self.uses_cache if use_cache is None else use_cache):
            return None
        if cache is not None and type(cache) not in self.caches:
            return reason("cache-unknown", f"a {type(cache).__qualname__}")
        call = self._step(given, cache)
        if isinstance(call, Call):
            return call
        return None if cache is None else reason("decode-call", call)

    def _step(self, given: Mapping[str, Any], cache: Any) -> Call | str:
        """The step, or the argument that makes the call none."""
        for name, value in given.items():
            odd = name not in _KNOWN or (name in _OF_SOME and name not in self.names)
            if odd and value is not None and value is not False:
                return name
        for name in ("use_cache", "return_dict"):
            if given.get(name) is False:
                return name
        ids, positions, mask = (
            widened(given.get(name)) for name in ("input_ids", "position_ids", "attention_mask")
        )
        keep = given.get("logits_to_keep", 0)
        if not is_whole(ids) or ids.numel() == 0:
            return "input_ids"
        batch, length = ids.shape
        if positions is not None and not (
            is_whole(positions)
            and positions.shape[0] in (1, batch)
            and positions.shape[1] == length
        ):
            return "position_ids"
        if type(keep) is not int or keep < 0:
            return "logits_to_keep"
        if mask is not None and not (is_whole(mask) and mask.shape[0] == batch):
            return "attention_mask"
        return Call(ids, mask, positions, cache, keep)


def widened(x: Any) -> Any:
    """Masks and ids of narrower types as int64; whatever else it is."""
    narrow = type(x) is torch.Tensor and x.dtype in (torch.bool, torch.int32)
    return x.to(torch.int64) if narrow else x


def is_whole(x: Any) -> TypeGuard[torch.Tensor]:
    """Whether it is a plain matrix of int64."""
    return (
        type(x) is torch.Tensor
        and x.dtype is torch.int64
        and x.dim() == 2
        and x.is_cpu
        and x.layout is torch.strided
    )
