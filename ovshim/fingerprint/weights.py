"""Content of tensors, at the speed of memory."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import xxhash

from ovshim.fingerprint.errors import Unkeyable

_PIECE = 8 << 20  # bytes hashed by one thread at a time; part of the format
_ALONE = 32 << 20  # bytes below which starting threads costs more than it saves

_READ = 0x100  # PyBUF_READ
_view: Any = ctypes.pythonapi.PyMemoryView_FromMemory
_view.restype, _view.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int)

_OF_GRAPH = frozenset({"requires_grad", "is_leaf", "grad_fn"})
_OF_MEMORY = frozenset({"as_strided", "storage", "untyped_storage", "data_ptr"})
_OF_LAYOUT = _OF_MEMORY | {"stride", "is_contiguous", "storage_offset"}

_PLAIN = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)


def check(tensor: torch.Tensor, where: str) -> None:
    """`Unkeyable` for a tensor whose bytes are not all there is to it."""
    kind = type(tensor)
    if kind not in _PLAIN:
        raise Unkeyable(where, f"a tensor of type {kind.__qualname__}")
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_nested:
        raise Unkeyable(where, f"a tensor of layout {tensor.layout}")
    if tensor.device.type != "cpu":
        raise Unkeyable(where, f"a tensor on {tensor.device}")


def describe(tensor: torch.Tensor) -> str:
    """Data type and shape. Not strides, which `read` has: a copy may lay out the same values in
    another way."""
    return f"{tensor.dtype}{list(tensor.shape)}"


def read(tensor: torch.Tensor, names: set[str]) -> list[object]:
    """What code with these names may read of a tensor besides type, shape and values. Other code
    answers the same whatever that is."""
    found: list[object] = []
    if not _OF_GRAPH.isdisjoint(names):
        found += (tensor.requires_grad, tensor.is_leaf)
    if not _OF_LAYOUT.isdisjoint(names):
        found += (tensor.stride(), tensor.storage_offset())
    if not _OF_MEMORY.isdisjoint(names):  # what lies beside a view as well
        found.append(torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()))
    if "grad" in names and tensor.is_leaf:
        found.append(tensor.grad)
    return found


def digests(tensors: Iterable[torch.Tensor]) -> list[bytes]:
    """16 bytes for each tensor (CPU, strided), of its values in logical order.

    Memory that several of them share is read once.
    """
    flats: list[torch.Tensor] = []
    index: dict[object, int] = {}
    order: list[int] = []
    with torch.no_grad():
        for tensor in tensors:
            key = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(),
                   tensor.is_conj(), tensor.is_neg())  # fmt: skip
            if key not in index:
                index[key] = len(flats)
                flats.append(flat(tensor))
            order.append(index[key])
    found = digests_of(flats)
    return [found[position] for position in order]


def flat(tensor: torch.Tensor) -> torch.Tensor:
    """Its values in logical order, in one dimension: its own memory where they lie in it one by
    one, else a copy."""
    return tensor.detach().resolve_conj().resolve_neg().reshape(-1).contiguous()


def digests_of(flats: Sequence[torch.Tensor]) -> list[bytes]:
    """16 bytes of each, which is `flat`, by as many threads as torch has where they are large."""
    views = list(map(_memory, flats))
    pieces = [view[start : start + _PIECE]
              for view in views for start in range(0, len(view) or 1, _PIECE)]  # fmt: skip
    remaining = iter(_hashed(pieces))
    found = []
    for view in views:
        parts = [next(remaining) for _ in range(0, len(view) or 1, _PIECE)]
        found.append(parts[0] if len(parts) == 1 else xxhash.xxh3_128_digest(b"".join(parts)))
    return found


def _hashed(pieces: list[memoryview]) -> list[bytes]:
    threads = torch.get_num_threads()
    if threads > 1 and sum(map(len, pieces)) > _ALONE:
        # xxhash lets go of the GIL. A pool of its own, gone at the end: nothing to survive a fork.
        # Where there is no thread to be had, as when the interpreter ends, this one does it.
        with contextlib.suppress(RuntimeError), ThreadPoolExecutor(threads) as pool:
            return list(pool.map(xxhash.xxh3_128_digest, pieces))
    return [xxhash.xxh3_128_digest(piece) for piece in pieces]


def _memory(flat: torch.Tensor) -> memoryview:
    """As long as `flat` lives. Not by NumPy: nobody could resize what has been an array's."""
    if flat.numel() == 0:
        return memoryview(b"")
    return _view(flat.data_ptr(), flat.nbytes, _READ)  # type: ignore[no-any-return]


def weights(module: torch.nn.Module) -> tuple[str, dict[str, bytes]]:
    """32 hex digits for the names, types, shapes and values of all parameters and buffers; and,
    by name, what they were made of.

    Also which names mean one tensor, by identity: a deep copy keeps that, while tensors that
    merely share memory are taken apart by it.
    """
    named = [*module.named_parameters(remove_duplicate=False),
             *module.named_buffers(remove_duplicate=False)]  # fmt: skip
    named.sort(key=lambda pair: pair[0])
    for name, tensor in named:
        check(tensor, name)
    first: dict[int, str] = {}
    digest = xxhash.xxh3_128()
    found: dict[str, bytes] = {}
    for (name, tensor), content in zip(named, digests(t for _, t in named), strict=True):
        same = first.setdefault(id(tensor), name)
        found[name] = f"{name}\0{describe(tensor)}\0{same}\0".encode() + content
        digest.update(found[name])
    return digest.hexdigest(), found
