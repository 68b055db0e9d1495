"""Objects that nobody has written to need not be looked at, and memory tells it.

A look at each tensor and each dictionary of a module waits for memory, one thing after the other,
for after an inference nothing of it is in the caches. What tells of a write are single words: a
dictionary's count of writes, an object's type, a tensor's pointers, sizes, strides and version.
They are read at their addresses by a loop of NumPy's, so short that the processor waits for many at
once, and compared as bytes. They decide only that there is nothing to look at: what differs is
looked at as ever.

Nobody promises where these words are. They are searched for (`places`), and put to the test by
writes of every kind, once in a process; where an interpreter or a torch has one of them elsewhere,
all is looked at on every call. Only objects that are alive are read: the caller holds tensors,
dictionaries and modules, and each group of words holds the addresses of the next, which is read
only where it is what it was. Where the compiled helper is there, its loop does it.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from ovshim.conditions import Conditions
from ovshim.helper import hot
from ovshim.places import (
    MOST_DIMENSIONS,
    WORD,
    Places,
    UnknownPlaceError,
    agree,
    find,
    groups_of,
    read,
    reader,
    words_at,
)
from ovshim.signals import let_through

__all__ = ["add_unless_touched"]

log = logging.getLogger("ovshim")

_TRIES = 8
_MANAGED_DICT = 1 << 4  # Py_TPFLAGS_MANAGED_DICT


class Watched:
    """The words of these objects, as they were when last looked at.

    Raises (when made):
        UnknownPlaceError: one of the objects is not like the others of its kind. And whatever a
            tensor raises that has no storage.
    """

    def __init__(
        self,
        places: Places,
        tensors: Sequence[torch.Tensor],
        dicts: Sequence[dict[Any, Any]],
        modules: Sequence[nn.Module],
    ) -> None:
        self._places = places
        self._held = tensors, dicts, modules
        # Addresses and what was found there, in turns; then how many of these groups hold the
        # addresses of others, and the storages, weakly, so that nothing else comes to lie where
        # one of them is. One object, so that a thread which reads it while another one replaces it
        # has all of one time.
        self.state: list[tuple[Any, ...]] = [self._laid()]

    def condition(self) -> str:
        """An expression that tells whether all words are what they were; `{0}` is what reads them,
        or compares, `{1}` is `state`."""
        if hot is not None:
            return "{0}({1}[0])"
        count = len(self.state[0]) // 2 - 1
        first = "{0}((now := {1}[0])[0]).tobytes() == now[1]"
        rest = (f"{{0}}(now[{2 * i}]).tobytes() == now[{2 * i + 1}]" for i in range(1, count))
        return " and ".join((first, *rest))

    def read(self) -> tuple[Any, ...]:
        """What `state` would hold now."""
        (*known, leading, storages), found = self.state[0], []
        for i in range(0, len(known), 2):
            words = read(known[i])
            if i < 2 * leading and words != known[i + 1]:
                return self._laid()
            found += [known[i], words]
        return *found, leading, storages

    def _laid(self) -> tuple[Any, ...]:
        storages = [StorageWeakRef(t.untyped_storage()) for t in self._held[0]]  # type: ignore[no-untyped-call]
        leading = [*groups_of(self._of_tensors()), *groups_of(self._of_impls())]
        groups = [*leading, *groups_of(self._of_contents()), *groups_of(self._of_objects())]
        parts = (part for at in groups for part in (at, read(at)))
        return *parts, len(leading), storages

    def _of_tensors(self) -> list[int]:
        found = [id(tensor) + self._places.impl for tensor in self._held[0]]
        agree(found, [tensor._cdata for tensor in self._held[0]])
        return found

    def _of_impls(self) -> list[int]:
        places = self._places
        found: list[int] = []
        known: list[Any] = []
        for tensor in self._held[0]:
            impl, sizes, strides = tensor._cdata, tensor.shape, tensor.stride()
            dims = len(sizes)
            if dims > MOST_DIMENSIONS:
                raise UnknownPlaceError(f"a tensor of {dims} dimensions")
            found += (impl + places.storage, impl + places.counter, impl + places.offset)
            known += (tensor.untyped_storage()._cdata, None, tensor.storage_offset())
            found += (impl + places.dtype, impl + places.keys)
            known += (None, None)
            found += range(impl + places.sizes - WORD, impl + places.sizes + WORD * dims, WORD)
            known += (dims, *sizes)
            found += range(impl + places.strides, impl + places.strides + WORD * dims, WORD)
            known += strides
        agree(found, known)
        return found

    def _of_contents(self) -> list[int]:
        places, (tensors, _, _) = self._places, self._held
        storages = [tensor.untyped_storage() for tensor in tensors]
        data = [storage._cdata + places.data for storage in storages]
        agree(data, [storage.data_ptr() for storage in storages])
        counters = words_at([tensor._cdata + places.counter for tensor in tensors])
        versions = [counter + places.version for counter in counters]
        found = [word & 0xFFFFFFFF for word in words_at(versions)]
        if found != [tensor._version for tensor in tensors]:
            raise UnknownPlaceError("a version is not where such a thing was")
        return [*data, *versions]

    def _of_objects(self) -> list[int]:
        places, (_, dicts, modules) = self._places, self._held
        if not all(type(m).__flags__ & _MANAGED_DICT for m in modules):
            raise UnknownPlaceError("a module's attributes")
        types = [id(m) + places.type for m in modules]
        attributes = [id(m) + places.attributes for m in modules]
        agree(types, [id(type(m)) for m in modules])
        agree(attributes, [id(m.__dict__) for m in modules])
        return [*types, *attributes, *(id(d) + places.writes for d in dicts)]


def add_unless_touched(
    conditions: Conditions,
    tensors: Sequence[torch.Tensor],
    dicts: Sequence[dict[Any, Any]],
    modules: Sequence[nn.Module],
    look: Callable[[], bool],
) -> bool:
    """Add a condition that depends on nothing but these objects: on where the tensors' values lie,
    their sizes, strides and versions, what is written in the dictionaries, and the modules' types
    and `__dict__`. It is asked when first met, and then only after a write.

    Returns whether it was added: not where memory does not tell.
    """
    places = _places()
    if places is None:
        return False
    try:
        watched = Watched(places, tensors, dicts, modules)
    except Exception as error:  # whatever a class of tensors raises that has no memory
        log.debug("all is looked at on every call: %s", error)
        return False
    looked = [False]

    def again() -> bool:
        # Before the look: a write meanwhile is a write after it.
        try:
            found = watched.read()
        except Exception as error:  # tensors have become such as have other words, or do just now
            let_through(error)
            return look()
        if not look():
            return False
        watched.state[0], looked[0] = found, True
        return True

    reads = reader() if hot is None else hot.same_words
    condition = watched.condition()
    conditions.add(f"({{2}}[0] and {condition}) or {{3}}()", reads, watched.state, looked, again)
    return True


# --- the test ---------------------------------------------------------------------------------


class _Probe(nn.Module):
    """No layer of torch's: those draw random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.float32, device="cpu"))


class _Other(_Probe):
    pass


_WRITES: Sequence[Callable[[Any], Any]] = (
    lambda m: m.weight.add_(1),
    lambda m: m.weight.t_(),
    lambda m: m.weight.set_(m.weight.clone()),
    lambda m: setattr(m.weight, "data", m.weight.data.clone()),
    lambda m: setattr(m.weight, "data", m.weight.data.t()),
    lambda m: setattr(m.weight, "data", m.weight.data[:2]),
    lambda m: setattr(m.weight, "data", m.weight.data.view(4, 4, 1)),
    lambda m: setattr(m.weight, "data", m.weight.data.view(16)[3:][:12].view(3, 4)),
    lambda m: setattr(m.weight.requires_grad_(False), "data", m.weight.data.view(torch.int32)),
    lambda m: setattr(m.weight, "data", torch._neg_view(m.weight.data)),
    lambda m: setattr(m, "weight", nn.Parameter(m.weight.detach())),
    lambda m: setattr(m, "flag", 1),
    lambda m: setattr(m, "training", False),
    lambda m: m.register_forward_hook(print),
    lambda m: setattr(m, "__class__", _Other),
    lambda m: setattr(m, "__dict__", dict(m.__dict__)),
)


@functools.cache
def _places() -> Places | None:
    """None where something is nowhere, or does not tell of every write."""
    gil = getattr(sys, "_is_gil_enabled", lambda: True)()
    if sys.implementation.name != "cpython" or not gil or ctypes.sizeof(ctypes.c_void_p) != WORD:
        return None
    try:
        with torch._C.DisableTorchFunction(), torch.inference_mode(False), torch.no_grad():
            return _tried()
    except Exception:  # whatever another torch does
        log.debug("memory does not tell what was written to", exc_info=True)
        return None


def _tried() -> Places | None:
    """The places as one search of a few has found them that stands the test."""
    held: list[torch.Tensor] = []
    for _ in range(_TRIES):
        with contextlib.suppress(UnknownPlaceError):
            found = find()
            if all(_tells(found, write) for write in _WRITES):
                return found
        # Into the memory that the next search would get again.
        held += [torch.zeros(4, dtype=torch.float32, device="cpu") for _ in range(8)]
    return None


def _tells(places: Places, write: Callable[[Any], Any]) -> bool:
    module = _Probe()
    dicts: list[Any] = [vars(module), module._parameters, module._forward_hooks]
    watched = Watched(places, [module.weight], dicts, [module])
    before = watched.state[0]
    _ = str(module), list(module.parameters()), module.weight.sum(), module.training
    if not _same(watched.read(), before):
        return False
    write(module)
    return not _same(watched.read(), before)


def _same(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    return one[1:-2:2] == other[1:-2:2]
