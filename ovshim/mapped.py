"""Weights in a file: a module's tensors over a private map of it, in place of memory of their own.

Nothing else changes: parameters stay the objects that they were, with their versions, flags and
hooks, and whoever reads them reads the same bits, out of the file, when they do. What is written to
them stays in the process (the system copies the page), so they can be trained, moved and saved as
ever. To release storages and bring weights back when somebody asks would have to know every way in
which they can be asked for; here there is none to know.
"""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import mmap
import os
import threading
import time
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ovshim.cache.files import open_regular

__all__ = ["Block", "described", "held_alone", "layout", "map_onto", "write"]

# Below that a page's worth of rounding and a tensor of the map cost more than they give back.
_LEAST_BYTES = 64 << 10
_PAGE = 4096
_CHUNK = 1 << 20
_PLAIN = (torch.Tensor, nn.Parameter, nn.Buffer)
# A tensor of more dimensions keeps them outside of itself, where another thread that reads it at
# the moment of the change could find neither the old nor the new ones.
_MOST_DIMS = 5
# An operation of another thread holds what it reads, of a small module soon all there is.
_LOOKS = 250
_BETWEEN_LOOKS_SECONDS = 0.002


@dataclasses.dataclass(frozen=True, eq=False)
class Block:
    """A storage and all the tensors over it, which are the module's own."""

    storage: torch.UntypedStorage
    tensors: tuple[torch.Tensor, ...]


def held_alone(module: nn.Module) -> list[Block]:
    """The storages of the module's parameters and buffers that nobody else looks at.

    A view that the program keeps, a NumPy array over a weight, a graph that waits for its backward
    pass: to let go of a storage that somebody else holds frees nothing, and would take apart what
    they share. It is left alone, as are small ones, those that processes share, and maps.
    """
    tensors = {id(t): t for t in (*module.parameters(), *module.buffers())}
    over: dict[int, list[torch.Tensor]] = {}
    for tensor in tensors.values():
        if type(tensor) in _PLAIN and tensor.layout is torch.strided and tensor.is_cpu:
            over.setdefault(tensor.untyped_storage()._cdata, []).append(tensor)
    blocks = [Block(found[0].untyped_storage(), tuple(found)) for found in over.values()]
    fit = [block for block in blocks if _fits(block)]
    if not all(map(_is_alone, fit)):
        gc.collect()  # what a capture leaves goes in cycles
        _wait_for_others(fit)
    return [block for block in fit if _is_alone(block)]


def _wait_for_others(blocks: Sequence[Block]) -> None:
    for _ in range(_LOOKS):
        if all(map(_is_alone, blocks)) or threading.active_count() == 1:
            break
        time.sleep(_BETWEEN_LOOKS_SECONDS)


def _fits(block: Block) -> bool:
    return (
        block.storage.nbytes() >= _LEAST_BYTES
        and not block.storage.is_shared()
        and all(t.dim() <= _MOST_DIMS and not t.is_inference() for t in block.tensors)
        and not _is_mapped(block)
    )


# Where our maps begin and end.
_ranges: dict[int, int] = {}


def _is_mapped(block: Block) -> bool:
    where = block.storage.data_ptr()
    return any(start <= where < end for start, end in list(_ranges.items()))


def _is_alone(block: Block) -> bool:
    # The tensors, and the one object by which Python holds the storage.
    uses: int = torch._C._storage_Use_Count(block.storage._cdata)
    return uses == len(block.tensors) + 1


def described(module: nn.Module, blocks: Sequence[Block]) -> list[Any]:
    """For each block its size, and the names of its tensors and how they lie in it: what decides
    the bytes of a file, beside the values."""
    known = {id(t): name for name, t in (*module.named_parameters(), *module.named_buffers())}
    return [
        [
            block.storage.nbytes(),
            [[known[id(t)], t.storage_offset(), list(t.stride())] for t in block.tensors],
        ]
        for block in blocks
    ]


def layout(blocks: Sequence[Block]) -> list[tuple[int, int]]:
    """Where the bytes of each block begin in a file, and how many they are."""
    places, end = [], 0
    for block in blocks:
        places.append((end, block.storage.nbytes()))
        end += -(-block.storage.nbytes() // _PAGE) * _PAGE
    return places


def write(path: Path, blocks: Sequence[Block]) -> None:
    """Write the bytes of the blocks to a new file. OSError where that fails."""
    with open(path, "xb") as file:
        for block, (start, _) in zip(blocks, layout(blocks), strict=True):
            file.seek(start)
            file.write(_bytes(block).data)


def map_onto(path: Path, blocks: Sequence[Block]) -> tuple[mmap.mmap, list[Any]]:
    """Let the tensors of the blocks be over a private map of a file that `write` has written.

    Returns:
        The map, which lives as long as any tensor over it; and what is to be kept for as long as
        other threads may be inside an operation that began before.

    Raises:
        ValueError: the file does not hold the blocks' bytes.
        OSError: it cannot be read or mapped.
    """
    places = layout(blocks)
    descriptor = open_regular(path)
    try:
        # Read, not mapped: an error of the disk is an exception here. And what was compared through
        # a map would stay in memory with it.
        _compare(descriptor, blocks, places)
        # The last block need not fill its page.
        mapped = mmap.mmap(descriptor, 0, access=mmap.ACCESS_COPY)
    finally:
        os.close(descriptor)
    first = torch.frombuffer(mapped, dtype=torch.uint8).data_ptr()
    _ranges[first] = first + len(mapped)
    weakref.finalize(mapped, _ranges.pop, first, None)
    old = []
    for block, (start, size) in zip(blocks, places, strict=True):
        whole = torch.frombuffer(mapped, dtype=torch.uint8, count=size, offset=start)
        for tensor in block.tensors:
            place = tensor.storage_offset(), tensor.size(), tensor.stride()
            new = torch.empty(0, dtype=tensor.dtype).set_(whole.untyped_storage(), *place)
            tensor.data = new
        old.append(block.storage)
    return mapped, old


def _compare(descriptor: int, blocks: Sequence[Block], places: Sequence[tuple[int, int]]) -> None:
    buffer = np.empty(_CHUNK, np.uint8)
    with os.fdopen(os.dup(descriptor), "rb", buffering=0) as file:
        for block, (start, size) in zip(blocks, places, strict=True):
            file.seek(start)
            mine = _bytes(block)
            for at in range(0, size, _CHUNK):
                wanted = mine[at : at + _CHUNK]
                read = file.readinto(buffer.data[: len(wanted)])
                if read != len(wanted) or not np.array_equal(buffer[:read], wanted):
                    raise ValueError(f"{file} does not hold the weights")


def _bytes(block: Block) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """All bytes of a storage, in its own memory. Not by `Tensor.numpy()`, after which a storage
    cannot be resized any more."""
    size = block.storage.nbytes()
    memory = (ctypes.c_uint8 * size).from_address(block.storage.data_ptr())
    return np.ctypeslib.as_array(memory)
