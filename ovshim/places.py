"""Where in memory the words are that tell of a write, and what reads them.

Nobody promises where they are: they are searched for by what is known of an object, and what is
found is to be put to the test (`untouched`). Only objects that are alive may be read.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from ovshim.dict_versions import tells_writes
from ovshim.helper import hot

__all__ = [
    "MOST_DIMENSIONS",
    "WORD",
    "Places",
    "UnknownPlaceError",
    "agree",
    "find",
    "groups_of",
    "read",
    "reader",
    "words_at",
]

WORD = 8  # bytes
# Sizes and strides of more dimensions lie elsewhere.
MOST_DIMENSIONS = 5
# Addresses of a program have 48 bits at most, where it does not ask for more.
_ADDRESSABLE = 1 << 48
# NumPy gives up the interpreter's lock to read more at once, and another thread could let go of
# what is read.
_AT_ONCE = 500
# Words of a TensorImpl that are looked through; it has some more.
_OF_IMPL = 22


class UnknownPlaceError(Exception):
    """Something is not where it was looked for."""


class Places(NamedTuple):
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


# --- memory -----------------------------------------------------------------------------------


@functools.cache
def reader() -> Callable[[Any], Any]:
    """Reads words: `array[indices]` of all memory but its first word, for an array at no address is
    none. Not the array itself, lest a debugger or a report of an error try to print it."""
    words = ctypes.c_uint64 * (_ADDRESSABLE // WORD - 1)
    array = np.ctypeslib.as_array(words.from_address(WORD))
    return array.__getitem__


def read(at: Any) -> bytes:
    """The words at one of the places of `groups_of`."""
    found: bytes = reader()(at).tobytes() if hot is None else hot.read_words(at)
    return found


def _places_of(addresses: Iterable[int]) -> Any:
    found = np.fromiter(addresses, np.int64)
    return found // WORD - 1 if hot is None else found.tobytes()


def _word(address: int) -> int:
    return int(reader()(address // WORD - 1))


def groups_of(addresses: Sequence[int]) -> list[Any]:
    """Places for `read`, so many at once as may be."""
    groups = (addresses[i : i + _AT_ONCE] for i in range(0, len(addresses), _AT_ONCE))
    return [_places_of(group) for group in groups]


def words_at(addresses: Sequence[int]) -> list[int]:
    """The words at these addresses."""
    return [
        word for at in groups_of(addresses) for word in np.frombuffer(read(at), np.uint64).tolist()
    ]


def agree(addresses: Sequence[int], known: Sequence[int | None]) -> None:
    """Raise UnknownPlaceError where other words are there than are known to be."""
    for found, word in zip(words_at(addresses), known, strict=True):
        if word is not None and found != word:
            raise UnknownPlaceError(f"{word} is not where such a thing was")


# --- the search -------------------------------------------------------------------------------


def find() -> Places:
    """Search for them. Raises UnknownPlaceError where one is nowhere.

    What bytes between its fields an object got from others before it may look like one of them: one
    search in forty comes to nothing, where many objects have come and gone.
    """
    whole = torch.zeros(5000, dtype=torch.float32, device="cpu")
    one = whole.as_strided((41, 43), (53, 59), 37)
    for _ in range(29):
        one.add_(1)
    same, other, module = one.detach(), one.clone(), nn.Module()
    attributes = vars(module)  # made when it is first asked for
    impl, storage = one._cdata, one.untyped_storage()
    own = _words(impl, 0, _OF_IMPL)
    # A detached tensor shares its storage and its counter of versions, and nothing else does.
    theirs, others = (_words(tensor._cdata, 0, _OF_IMPL) for tensor in (same, other))
    shared = [at for at, word in own.items() if word == theirs[at] != others[at]]
    in_storage = _first(at for at in shared if own[at] == storage._cdata)
    sizes = _first(at for at, word in own.items() if (word, own.get(at + WORD)) == (41, 43))
    strides = _words(impl, sizes, 2 * MOST_DIMENSIONS)
    counter = _first(
        at
        for at in shared
        if at not in (in_storage, sizes) and own[at] > max(one.shape + one.stride() + (37,)) << 12
    )
    versions = _words(own[counter], 0, 3)
    dtype, keys = _of_kind()
    return Places(
        type=_first(at for at, word in _words(id(module), 0, 2).items() if word == id(nn.Module)),
        attributes=_first(
            at for at, word in _words(id(module), -4 * WORD, 4).items() if word == id(attributes)
        ),
        writes=_first(at for at in _words(id({}), 2 * WORD, 3) if _counts_writes(at)),
        impl=_first(at for at, word in _words(id(one), 2 * WORD, 3).items() if word == impl),
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
    places = range(start, start + count * WORD, WORD)
    return {at: _word(address + at) for at in places}


def _counts_writes(at: int) -> bool:
    return tells_writes(lambda held: _word(id(held) + at))


def _first(places: Iterable[int]) -> int:
    for at in places:
        return at
    raise UnknownPlaceError("a word is nowhere")
