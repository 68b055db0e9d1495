"""What a stateful graph is asked before it serves: short conversations, which eager has as well."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from ovshim.verify import relative_errors

__all__ = [
    "Probe",
    "ProbeFailed",
    "all_probes",
    "ask",
    "bucket",
    "small_probe",
]

# The longest conversation of the proof, where a sliding window does not ask for a longer one.
_LONG = 160


class ProbeFailed(Exception):
    """A graph that does not answer as eager does."""


@dataclasses.dataclass(frozen=True)
class Probe:
    """A conversation.

    Attributes:
        pieces: how many tokens each step adds.
        pads: for each row, how many of its first tokens are padding.
        reorders: after which step the rows are reordered (the first goes on twice).
        cuts: after which step the last token is cut off.
    """

    pieces: tuple[int, ...]
    pads: tuple[int, ...] = (0,)
    reorders: int | None = None
    cuts: int | None = None

    @property
    def length(self) -> int:
        return sum(self.pieces)


def small_probe() -> Probe:
    """What a graph out of the cache is asked: two rows, the first padded, which goes on twice."""
    return Probe((4, 1, 2), (2, 0), reorders=0)


def all_probes(window: int | None, longest: int | None) -> Iterator[Probe]:
    """All conversations of a proof.

    Args:
        window: the smallest sliding window that is to be looked beyond; None: there is none.
        longest: how many positions there are; None: no end of them.
    """
    probes = [
        small_probe(),
        Probe((1, 1, 1)),
        Probe((6, 1, 1, 3, 1), (0, 0, 0), reorders=2, cuts=3),
        Probe((7, 1, 4, 1, 1), (3, 0), reorders=1, cuts=2),
        Probe((_LONG - 9, 8, 1)),
    ]
    if window is not None:
        beyond = (window + 3, 1, 1, 3, 1, 2 * window)
        probes += [Probe(beyond), Probe(beyond, (2, 0), reorders=1)]
    for probe in probes:
        if longest is None or probe.length <= longest:
            yield probe


def ask(
    probe: Probe, ways: Sequence[Any], vocabulary: int, seed: int = 0
) -> Iterator[list[torch.Tensor]]:
    """The answers of each way to each step of a probe."""
    generator = torch.Generator().manual_seed(seed)
    batch = len(probe.pads)
    mask = torch.ones((batch, 0), dtype=torch.int64)
    for n, tokens in enumerate(probe.pieces):
        ids = torch.randint(0, vocabulary, (batch, tokens), generator=generator)
        mask = torch.cat([mask, torch.ones((batch, tokens), dtype=torch.int64)], dim=1)
        if n == 0:
            for row, pad in enumerate(probe.pads):
                mask[row, :pad] = 0
        positions = positions_of(mask)[:, -tokens:]
        yield [way.step(ids, mask, positions) for way in ways]
        if n == probe.reorders:
            rows = torch.tensor([0, 0, *range(1, batch)][:batch])
            mask = mask[rows]
            for way in ways:
                way.reorder(rows)
        if n == probe.cuts:
            mask = mask[:, :-1]
            for way in ways:
                way.cut(1)


def positions_of(mask: torch.Tensor) -> torch.Tensor:
    """The positions that `generate` derives of a mask, [batch, length]."""
    return (mask.cumsum(-1) - 1).masked_fill(mask == 0, 0)


def error_of(expected: torch.Tensor, found: torch.Tensor, tolerance: float, ids: bool) -> float:
    """The relative L2 error of logits.

    Args:
        ids: whether the likeliest token has to be eager's, unless eager all but ties.

    Raises:
        ProbeFailed: it is over the tolerance, or another token is likeliest.
    """
    if expected.shape != found.shape or expected.dtype != found.dtype:
        raise ProbeFailed(f"logits are {tuple(found.shape)}, eager's {tuple(expected.shape)}")
    (error,) = relative_errors([expected], [found])
    if not error <= tolerance:
        raise ProbeFailed(f"logits are off by {error:.2g} (allowed: {tolerance:.2g})")
    if ids:
        best = expected.max(-1).values
        chosen = expected.gather(-1, found.argmax(-1, keepdim=True)).squeeze(-1)
        slack = tolerance * expected.abs().amax(-1).clamp_min(1e-6)
        if bool((best - chosen > slack).any()):
            raise ProbeFailed("another token is the likeliest")
    return error


def bucket(*sizes: int) -> tuple[int, ...]:
    """Sizes that are looked at together: the same powers of two."""
    return tuple(size.bit_length() for size in sizes)
