"""What tells of a write to a tensor: its count of versions or, where it was made in inference mode
and counts none, its values.

All of them, at 10 GB/s and more: by samples an update of one row would go unnoticed. What that
costs a call is in its race, for eager need not look.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ovshim.fingerprint.weights import digests_of, flat

__all__ = ["Values", "layout_of", "stamp"]

# Of others their classes say what their values are.
_PLAIN = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)


def stamp(tensor: torch.Tensor) -> int | bytes | None:
    """Equal to an earlier one if nobody has written to the tensor since; None where it cannot be
    told."""
    if not tensor.is_inference():
        return tensor._version
    return digests_of([flat(tensor)])[0] if _can_be_read(tensor) else None


def layout_of(tensor: torch.Tensor) -> tuple[Any, ...]:
    """By `data` another view of the same memory may be put in place."""
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.is_conj(), tensor.is_neg()


class Values:
    """The values of tensors, which count no versions, when this is made.

    Raises (when made):
        ValueError: of one of the tensors they cannot be read.
    """

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        for tensor in tensors:
            if not _can_be_read(tensor):
                what = f"{type(tensor).__qualname__} of layout {tensor.layout} on {tensor.device}"
                raise ValueError(f"a {what} that was made in inference mode counts no versions")
        self._tensors = list(tensors)
        # They need not be made anew for each look, which takes longer than a small one's digest.
        self._flats = [flat(t) if _lies_flat(t) else None for t in tensors]
        self._where = self._places()
        self._digests = self._read()

    def same(self) -> bool:
        """Whether nobody has written to any."""
        return self._places() == self._where and self._read() == self._digests

    def same_of(self, tensor: torch.Tensor) -> bool:
        """Whether nobody has written to this one, of them."""
        at = next(i for i, known in enumerate(self._tensors) if known is tensor)
        same_place = (tensor.data_ptr(), layout_of(tensor)) == self._where[at]
        return same_place and digests_of([flat(tensor)])[0] == self._digests[at]

    def _places(self) -> list[Any]:
        return [(t.data_ptr(), layout_of(t)) for t in self._tensors]

    def _read(self) -> list[bytes]:
        held = zip(self._flats, self._tensors, strict=True)
        return digests_of([flat(t) if own is None else own for own, t in held])


def _lies_flat(tensor: torch.Tensor) -> bool:
    return tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()


def _can_be_read(tensor: torch.Tensor) -> bool:
    plain = type(tensor) in _PLAIN and tensor.layout is torch.strided and not tensor.is_nested
    return plain and tensor.is_cpu and not tensor.is_quantized
