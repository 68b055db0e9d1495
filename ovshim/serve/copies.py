"""Copies made without torch's threads: those would spin on while OpenVINO computes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ovshim.waiting import SHARED_OUT

__all__ = ["copied", "joined"]


def copied(tensor: torch.Tensor) -> torch.Tensor:
    """As `tensor.clone()`, for one that does not require grad."""
    if tensor.numel() < SHARED_OUT or tensor.layout is not torch.strided:
        return tensor.clone()
    copy = torch.empty_like(tensor)
    _copy(tensor, copy)
    return copy


def joined(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """As `torch.cat(tensors)`, for such as do not require grad, of one dtype, and of one size
    except in dimension 0."""
    count = sum(tensor.numel() for tensor in tensors)
    if count < SHARED_OUT or not all(tensor.is_contiguous() for tensor in tensors):
        return torch.cat(list(tensors))
    rows = [len(tensor) for tensor in tensors]
    whole = tensors[0].new_empty((sum(rows), *tensors[0].shape[1:]))
    for tensor, part in zip(tensors, torch.split(whole, rows), strict=True):
        _copy(tensor, part)
    return whole


def _copy(tensor: torch.Tensor, to: torch.Tensor) -> None:
    try:
        np.copyto(_array(to), _array(tensor))
    except (RuntimeError, TypeError):  # conjugated, negated, or of a dtype unknown to NumPy
        to.copy_(tensor)


def _array(tensor: torch.Tensor) -> Any:
    return (tensor.view(torch.int16) if tensor.dtype is torch.bfloat16 else tensor).numpy()
