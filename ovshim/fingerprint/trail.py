"""Where each piece of a fingerprint's text came from: by it two keys can be compared.

A walk that is made for it marks the places of its text at which something else begins.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable, Sequence

import xxhash

__all__ = ["Trail", "short"]

_DIGITS = 8  # hexadecimal; the key itself has 32
_REFERENCE = re.compile(rb"(\w*@)(\d+);")
_TENSOR = re.compile(rb"tensor(\d+);")


class Trail:
    """The text of a walk with its marks, the names of the objects in it by their numbers, and the
    digests of its tensors. It holds none of the objects themselves."""

    def __init__(
        self,
        out: Sequence[bytes],
        marks: Sequence[tuple[int, str, str, str]],
        names: Sequence[str],
        tensors: Sequence[bytes],
    ) -> None:
        self._out, self._marks, self._names, self._tensors = out, marks, names, tensors

    def digests(self) -> dict[str, str]:
        """For each place a digest of 8 hex digits; a number or a boolean is shown as it is.

        An object that was met before is told by its name: by its number, everything that comes
        after a new one would differ.
        """
        sections: dict[str, list[bytes]] = {}
        ends = [mark[0] for mark in self._marks[1:]] + [len(self._out)]
        for (start, *place_of), end in zip(self._marks, ends, strict=True):
            if start < end:
                place = "".join(place_of).lstrip(" .") or "the module"
                sections.setdefault(place, []).extend(map(self._named, self._out[start:end]))
        return {place: _shown(text) for place, text in sections.items()}

    def _named(self, piece: bytes) -> bytes:
        reference, tensor = _REFERENCE.fullmatch(piece), _TENSOR.fullmatch(piece)
        if reference:
            name = self._names[int(reference[2])].encode("utf-8", "surrogatepass")
            return reference[1] + name
        return self._tensors[int(tensor[1])] if tensor else piece


def short(pieces: Iterable[bytes]) -> str:
    """8 hex digits of some text."""
    digest = xxhash.xxh3_64()
    for piece in pieces:
        digest.update(b"%d:" % len(piece) + piece)
    return digest.hexdigest()[:_DIGITS]


def _shown(text: Sequence[bytes]) -> str:
    """Of a name and a plain number the number, of anything else a digest. Strings are not shown:
    who reads a manifest need not read what a program holds in its globals."""
    value = text[1] if len(text) == 2 else b""
    if value in (b"True;", b"False;", b"None;"):
        return value[:-1].decode()
    if value[:1] == b"f" and len(value) == 9:
        return repr(struct.unpack("<d", value[1:])[0])
    if re.fullmatch(rb"i-?[0-9a-f]{1,16};", value):
        return str(int(value[1:-1], 16))
    return short(text)
