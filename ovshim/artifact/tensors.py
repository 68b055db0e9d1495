"""Tensors in a file: their bytes one after the other, and beside them a description as JSON."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from ovshim.artifact.structure import dtype_named, whole

__all__ = ["Reader", "Writer"]

_ALIGNED = 64  # bytes


class Writer:
    """Collects tensors."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._size = 0

    def add(self, tensor: torch.Tensor) -> dict[str, Any]:
        """The description of a tensor (CPU, strided), whose bytes are taken now."""
        flat = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
        data = flat.view(torch.uint8).numpy().tobytes()
        described = {
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "shape": list(tensor.shape),
            "at": self._size,
        }
        padding = b"\0" * (-len(data) % _ALIGNED)
        self._parts += [data, padding]
        self._size += len(data) + len(padding)
        return described

    def write(self, path: Path) -> None:
        """Write all of them to a file that does not exist yet."""
        with open(path, "xb") as file:
            file.writelines(self._parts)


class Reader:
    """Reads what a `Writer` has written."""

    def __init__(self, path: Path) -> None:
        self._data = bytearray(path.read_bytes())

    def tensor(self, described: Any) -> torch.Tensor:
        """The tensor so described. Raises KeyError, TypeError or ValueError where that is none."""
        dtype, at = dtype_named(described["dtype"]), whole(described["at"])
        shape = [whole(size) for size in described["shape"]]
        count = math.prod(shape)
        if at + count * dtype.itemsize > len(self._data):
            raise ValueError("a tensor lies beyond the end of its file")
        if count == 0:
            return torch.empty(shape, dtype=dtype)
        return (
            torch.frombuffer(self._data, dtype=dtype, count=count, offset=at).reshape(shape).clone()
        )
