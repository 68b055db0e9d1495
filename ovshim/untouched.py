"""Objects that nobody has written to need not be looked at, and memory tells it.

A look at each tensor and each dictionary of a module waits for memory, one thing after the other,
for after an inference nothing of it is in the caches. What tells of a write are single words: a
dictionary's count of writes, an object's type, a tensor's pointers, sizes, strides and version.
They are read at their addresses by a loop of NumPy's, so short that the processor waits for many at
once, and compared as bytes. They decide only that there is nothing to look at: what differs is
looked at as ever.

Nobody promises where these words are. They are searched for by what is known of an object, and put
to the test by writes of every kind, once in a process; where an interpreter or a torch has one of
them elsewhere, all is looked at on every call. Only objects that are alive are read: the caller
holds tensors, dictionaries and modules, and each group of words holds the addresses of the next,
which is read only where it is what it was. Where the compiled helper is there, its loop does it.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from ovshim.conditions import Conditions
from ovshim.dict_versions import tells_writes
from ovshim.helper import hot

__all__ = ["add_unless_touched"]

log = logging.getLogger("ovshim")

_WORD = 8
# Addresses of a program have 48 bits at most, where it does not ask for more.
_ADDRESSABLE = 1 << 48
# NumPy gives up the interpreter's lock to read more at once, and another thread could let go of
# what is read.
_AT_ONCE = 500
# Sizes and strides of more dimensions lie elsewhere.
_MOST_DIMENSIONS = 5
# Words of a TensorImpl that are looked through; it has some more.
_OF_IMPL = 22
_TRIES = 8
_MANAGED_DICT = 1 << 4  # Py_TPFLAGS_MANAGED_DICT


class UnknownPlaceError(Exception):
    """Something is not where it was looked for."""


class _Places(NamedTuple):
    """Where the words are, in bytes from the beginning of each object.

    Attributes:
        type, attributes: of an object: its type and its dictionary.
        writes: a dictionary's count.
        impl: a tensor's TensorImpl; in that, `storage`, `counter`, `offset`, `dtype`, `keys` (with
            what the values are to be taken for: conjugate, negative), `sizes` (behind their number)
            and `strides`.
        data: a storage's memory.
        version: the version, in a counter.
    """

    type: int
    attributes: int
    writes: int
    impl: int
    storage: int
    counter: int
    offset: int
    dtype: int
    keys: int
    sizes: int
    strides: int
    data: int
    version: int


class Watched:
    """The words of these objects, as they were when last looked at.

    Raises (when made):
        UnknownPlaceError: one of the objects is not like the others of its kind. And whatever a
            tensor raises that has no storage.
    """

    def __init__(
        self,
        places: _Places,
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
            words = _read(known[i])
            if i < 2 * leading and words != known[i + 1]:
                return self._laid()
            found += [known[i], words]
        return *found, leading, storages

    def _laid(self) -> tuple[Any, ...]:
        storages = [StorageWeakRef(t.untyped_storage()) for t in self._held[0]]  # type: ignore[no-untyped-call]
        leading = [*_cut(self._of_tensors()), *_cut(self._of_impls())]
        groups = [*leading, *_cut(self._of_contents()), *_cut(self._of_objects())]
        parts = (part for at in groups for part in (at, _read(at)))
        return *parts, len(leading), storages

    def _of_tensors(self) -> list[int]:
        found = [id(tensor) + self._places.impl for tensor in self._held[0]]
        _agree(found, [tensor._cdata for tensor in self._held[0]])
        return found

    def _of_impls(self) -> list[int]:
        places = self._places
        found: list[int] = []
        known: list[Any] = []
        for tensor in self._held[0]:
            impl, sizes, strides = tensor._cdata, tensor.shape, tensor.stride()
            dims = len(sizes)
            if dims > _MOST_DIMENSIONS:
                raise UnknownPlaceError(f"a tensor of {dims} dimensions")
            found += (impl + places.storage, impl + places.counter, impl + places.offset)
            known += (tensor.untyped_storage()._cdata, None, tensor.storage_offset())
            found += (impl + places.dtype, impl + places.keys)
            known += (None, None)
            found += range(impl + places.sizes - _WORD, impl + places.sizes + _WORD * dims, _WORD)
            known += (dims, *sizes)
            found += range(impl + places.strides, impl + places.strides + _WORD * dims, _WORD)
            known += strides
        _agree(found, known)
        return found

    def _of_contents(self) -> list[int]:
        places, (tensors, _, _) = self._places, self._held
        storages = [tensor.untyped_storage() for tensor in tensors]
        data = [storage._cdata + places.data for storage in storages]
        _agree(data, [storage.data_ptr() for storage in storages])
        counters = _words_at([tensor._cdata + places.counter for tensor in tensors])
        versions = [counter + places.version for counter in counters]
        found = [word & 0xFFFFFFFF for word in _words_at(versions)]
        if found != [tensor._version for tensor in tensors]:
            raise UnknownPlaceError("a version is not where such a thing was")
        return [*data, *versions]

    def _of_objects(self) -> list[int]:
        places, (_, dicts, modules) = self._places, self._held
        if not all(type(m).__flags__ & _MANAGED_DICT for m in modules):
            raise UnknownPlaceError("a module's attributes")
        types = [id(m) + places.type for m in modules]
        attributes = [id(m) + places.attributes for m in modules]
        _agree(types, [id(type(m)) for m in modules])
        _agree(attributes, [id(m.__dict__) for m in modules])
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
        except Exception:  # tensors have become such as have other words, or become it just now
            return look()
        if not look():
            return False
        watched.state[0], looked[0] = found, True
        return True

    reader = _reader() if hot is None else hot.same_words
    condition = watched.condition()
    conditions.add(f"({{2}}[0] and {condition}) or {{3}}()", reader, watched.state, looked, again)
    return True


# --- memory -----------------------------------------------------------------------------------


@functools.cache
def _reader() -> Callable[[Any], Any]:
    """Reads words: `array[indices]` of all memory but its first word, for an array at no address is
    none. Not the array itself, lest a debugger or a report of an error try to print it."""
    words = ctypes.c_uint64 * (_ADDRESSABLE // _WORD - 1)
    array = np.ctypeslib.as_array(words.from_address(_WORD))
    return array.__getitem__


def _read(at: Any) -> bytes:
    """The words at places of `_places_of`."""
    found: bytes = _reader()(at).tobytes() if hot is None else hot.read_words(at)
    return found


def _places_of(addresses: Iterable[int]) -> Any:
    found = np.fromiter(addresses, np.int64)
    return found // _WORD - 1 if hot is None else found.tobytes()


def _word(address: int) -> int:
    return int(_reader()(address // _WORD - 1))


def _cut(addresses: Sequence[int]) -> list[Any]:
    groups = (addresses[i : i + _AT_ONCE] for i in range(0, len(addresses), _AT_ONCE))
    return [_places_of(group) for group in groups]


def _words_at(addresses: Sequence[int]) -> list[int]:
    return [word for at in _cut(addresses) for word in np.frombuffer(_read(at), np.uint64).tolist()]


def _agree(addresses: Sequence[int], known: Sequence[int | None]) -> None:
    """Raise UnknownPlaceError where other words are there than are known to be."""
    for found, word in zip(_words_at(addresses), known, strict=True):
        if word is not None and found != word:
            raise UnknownPlaceError(f"{word} is not where such a thing was")


# --- where the words are ----------------------------------------------------------------------


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
def _places() -> _Places | None:
    """None where something is nowhere, or does not tell of every write."""
    gil = getattr(sys, "_is_gil_enabled", lambda: True)()
    if sys.implementation.name != "cpython" or not gil or ctypes.sizeof(ctypes.c_void_p) != _WORD:
        return None
    try:
        with torch._C.DisableTorchFunction(), torch.inference_mode(False), torch.no_grad():
            return _tried()
    except Exception:  # whatever another torch does
        log.debug("memory does not tell what was written to", exc_info=True)
        return None


def _tried() -> _Places | None:
    """What bytes between its fields an object got from others before it may look like one of them:
    one search in forty comes to nothing, where many objects have come and gone."""
    held: list[torch.Tensor] = []
    for _ in range(_TRIES):
        with contextlib.suppress(UnknownPlaceError):
            found = _found()
            if all(_tells(found, write) for write in _WRITES):
                return found
        # Into the memory that the next search would get again.
        held += [torch.zeros(4, dtype=torch.float32, device="cpu") for _ in range(8)]
    return None


def _tells(places: _Places, write: Callable[[Any], Any]) -> bool:
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


def _found() -> _Places:
    whole = torch.zeros(5000, dtype=torch.float32, device="cpu")
    one = whole.as_strided((41, 43), (53, 59), 37)
    for _ in range(29):
        one.add_(1)
    same, other, module = one.detach(), one.clone(), _Probe()
    impl, storage = one._cdata, one.untyped_storage()
    own = _words(impl, 0, _OF_IMPL)
    # A detached tensor shares its storage and its counter of versions, and nothing else does.
    theirs, others = (_words(tensor._cdata, 0, _OF_IMPL) for tensor in (same, other))
    shared = [at for at, word in own.items() if word == theirs[at] != others[at]]
    in_storage = _first(at for at in shared if own[at] == storage._cdata)
    sizes = _first(at for at, word in own.items() if (word, own.get(at + _WORD)) == (41, 43))
    strides = _words(impl, sizes, 2 * _MOST_DIMENSIONS)
    counter = _first(
        at
        for at in shared
        if at not in (in_storage, sizes) and own[at] > max(one.shape + one.stride() + (37,)) << 12
    )
    versions = _words(own[counter], 0, 3)
    dtype, keys = _of_kind()
    return _Places(
        type=_first(at for at, word in _words(id(module), 0, 2).items() if word == id(_Probe)),
        attributes=_first(
            at for at, word in _words(id(module), -4 * _WORD, 4).items() if word == id(vars(module))
        ),
        writes=_first(at for at in _words(id({}), 2 * _WORD, 3) if _counts_writes(at)),
        impl=_first(at for at, word in _words(id(one), 2 * _WORD, 3).items() if word == impl),
        storage=in_storage,
        counter=counter,
        offset=_first(at for at, word in own.items() if word == 37),
        dtype=dtype,
        keys=keys,
        sizes=sizes,
        strides=_first(at for at, word in strides.items() if word == 53),
        data=_first(
            at for at, word in _words(storage._cdata, 0, 6).items() if word == storage.data_ptr()
        ),
        version=_first(at for at, word in versions.items() if word & 0xFFFFFFFF == one._version),
    )


def _of_kind() -> tuple[int, int]:
    """Words of a TensorImpl in which tensors differ that are alike in all but their type, or in
    what their values are to be taken for."""
    one, alike = (torch.zeros(4, dtype=torch.float32, device="cpu") for _ in range(2))
    others = one.detach().view(torch.int32), torch._neg_view(one.detach())
    # Detached: a view has a word more of its own, for gradients.
    own, same, *changed = (
        _words(tensor._cdata, 0, _OF_IMPL)
        for tensor in (one, alike, *[other.detach() for other in others])
    )
    dtype, keys = (
        _first(at for at, word in own.items() if word == same[at] != words[at]) for words in changed
    )
    return dtype, keys


def _words(address: int, start: int, count: int) -> dict[int, int]:
    """Words of an object, by their places."""
    places = range(start, start + count * _WORD, _WORD)
    return {at: _word(address + at) for at in places}


def _counts_writes(at: int) -> bool:
    return tells_writes(lambda held: _word(id(held) + at))


def _first(places: Iterable[int]) -> int:
    for at in places:
        return at
    raise UnknownPlaceError("a word is nowhere")
