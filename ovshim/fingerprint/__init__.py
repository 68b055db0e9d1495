"""Everything that could change what a module computes, in one record with one key.

The key of a cached conversion has to change with everything that changes the answer and with
nothing else: not with the process, the directory of the code, or the order of a dict that nobody
iterates. `facts` that a version number stands for (torch, the standard library) belong to the
caller's `environment`. What cannot be keyed is an exception, never a guess.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

import xxhash
from torch import nn

from ovshim.fingerprint.errors import Unkeyable
from ovshim.fingerprint.trail import short
from ovshim.fingerprint.walk import code, trail
from ovshim.fingerprint.weights import weights

__all__ = ["Fingerprint", "Unkeyable", "fingerprint"]


@dataclass(frozen=True)
class Fingerprint:
    """`parts`: `code` and `weights` (32 hex digits), and the texts that the caller gave for
    `inputs`, `options` and `environment` (as sorted JSON). Two records can be compared by part,
    and, by `details`, within the first two.
    """

    parts: Mapping[str, str]
    _weights: Mapping[str, bytes] = field(repr=False, compare=False)

    @property
    def key(self) -> str:
        """32 hex digits of all parts."""
        digest = xxhash.xxh3_128()
        for name, value in sorted(self.parts.items()):
            for text in (name.encode(), value.encode("utf-8", "surrogatepass")):
                digest.update(b"%d:" % len(text) + text)
        return digest.hexdigest()

    def details(self, module: nn.Module, method: str) -> dict[str, dict[str, str]]:
        """Of `code` and of `weights`: by place (a function, a class, an attribute's path, a weight)
        8 hex digits, or a plain number as it is. The code is walked once more, so that who needs no
        details, as a hit, does not pay for them. Raises `Unkeyable`."""
        each = {name: short([content]) for name, content in self._weights.items()}
        return {"code": trail(module, method).digests(), "weights": each}


def fingerprint(
    module: nn.Module,
    method: str,
    *,
    inputs: str,
    options: str,
    environment: Mapping[str, str],
) -> Fingerprint:
    """The record of `module.method` as it stands now.

    inputs, options: texts that change with what the conversion takes from them.
    environment: versions of Python, torch and the rest, and what of the processor matters.
    Raises `Unkeyable` for a module with anything in reach of its code that cannot be keyed.
    """
    held, each = weights(module)
    parts = {
        "code": code(module, method),
        "weights": held,
        "inputs": inputs,
        "options": options,
        "environment": json.dumps(dict(environment), sort_keys=True),
    }
    return Fingerprint(parts, each)
