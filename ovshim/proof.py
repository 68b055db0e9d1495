"""The proof: a candidate answers as eager does, before it serves anybody.

It is asked the example, the example's values drawn anew, and, for each size that may change,
another size; every answer is compared with eager's. A size at which eager itself raises, or at
which the candidate is wrong, stays what it is in the example: it is *pinned*.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ovshim import pages
from ovshim.buckets import open_groups
from ovshim.eager import Answer, Candidate, Eager
from ovshim.guards import sizes_hold
from ovshim.infer import EngineDead
from ovshim.inputs import other_sizes, redraw_all, resize_all, uniform_masks
from ovshim.limits import integer_limits
from ovshim.plan import OutOfRangeError
from ovshim.signature import Pattern, flatten, sizes_of
from ovshim.verify import Mismatch, compare

if TYPE_CHECKING:
    from ovshim.preflight import Look

__all__ = [
    "NotTakenError",
    "Proof",
    "ProofFailedError",
    "amount",
    "prove",
    "prove_small",
    "redrawn",
    "tied",
]

log = logging.getLogger("ovshim")

Sizes = tuple[tuple[int, ...], ...]


class ProofFailedError(Exception):
    """The candidate's answers are not eager's."""


class NotTakenError(ProofFailedError):
    """The example holds values that the candidate leaves to eager: it says nothing of others."""


class DiedOfSizesError(Exception):
    """The candidate ended when `places`, (tensor, dimension), had another size: it may be made
    again for the example's."""

    def __init__(self, places: Sequence[tuple[int, int]], why: str) -> None:
        super().__init__(why)
        self.places = frozenset(places)


@dataclasses.dataclass(frozen=True, eq=False)
class Proof:
    """What was found.

    Attributes:
        error: the largest relative L2 error of all outputs of all runs.
        sizes: the smallest sizes among those proved, for the short proof of a cache hit.
        met: all sizes proved.
        pinned: (tensor, dimension) that must keep the example's size.
        limits: the smallest and the largest integer that a tensor may hold, by the tensor's index,
            where the candidate is wrong beyond those of the example.
    """

    error: float
    sizes: Sizes
    met: tuple[Sizes, ...]
    pinned: frozenset[tuple[int, int]]
    limits: Mapping[int, tuple[int, int]]


def prove(
    eager: Eager,
    served: Candidate,
    tensors: Sequence[torch.Tensor],
    pattern: Pattern,
    size_guards: Sequence[str],
    check_time: Callable[[], None],
    samples: Sequence[Sequence[torch.Tensor]] = (),
) -> Proof:
    """The whole proof.

    Args:
        tensors: those of the example.
        check_time: raises when the build has no time left.
        samples: tensors of other calls, which stand in for the example with values drawn anew:
            int8 is right within the range that calibration has shown it.

    Raises:
        ProofFailedError: the candidate is wrong on the example's sizes, or does not take the
            example (NotTakenError).
        DiedOfSizesError: it cannot be asked any more.
    """
    generator = torch.Generator().manual_seed(0)
    draws = 1 if samples else 3
    worst = prove_values(eager, served, tensors, check_time, draws, generator)
    fitting = [sample for sample in samples if sizes_hold(size_guards, sizes_of(sample))]
    worst = max(worst, _prove_samples(eager, served, fitting, check_time))
    # Where all is hidden, int8 meets values that no calibration has shown it.
    masks = uniform_masks(tensors, hidden=not samples)
    worst = max(worst, _prove_masks(eager, served, masks, check_time))
    met = [sizes_of(tensors)]
    pinned: set[tuple[int, int]] = set()
    pages.trim()  # at other sizes eager and OpenVINO take more than they did so far
    for group in open_groups(pattern, size_guards):
        check_time()
        drawn = None if samples else generator
        error, sizes = _prove_group(eager, served, tensors, pattern, size_guards, group, drawn)
        if error is None:
            pinned.update(group)
        else:
            worst = max(worst, error)
            met.append(sizes)
    check_time()
    limits = integer_limits(eager, served, tensors, fitting, generator)
    return Proof(worst, min(met, key=amount), tuple(met), frozenset(pinned), limits)


def prove_values(
    eager: Eager,
    served: Candidate,
    tensors: Sequence[torch.Tensor],
    check_time: Callable[[], None],
    draws: int = 3,
    generator: torch.Generator | None = None,
) -> float:
    """The largest error on the example and on other values of its sizes, `draws` times in all.

    Raises:
        ProofFailedError: the candidate is wrong there, or does not take the example
            (NotTakenError).
    """
    generator = generator or torch.Generator().manual_seed(0)
    check_time()
    try:
        worst = eager.judge(eager.answer(tensors), served.answer(tensors))
    except OutOfRangeError as refused:
        raise NotTakenError("it does not take the example") from refused
    except Mismatch as mismatch:
        raise ProofFailedError(f"on the example: {mismatch}") from mismatch
    for _ in range(1, draws):
        check_time()
        try:
            drawn = redrawn(eager, tensors, generator)
            worst = max(worst, _error_on(eager, served, tensors, *drawn))
        except (Mismatch, OutOfRangeError) as mismatch:
            raise ProofFailedError(f"on other values: {mismatch}") from mismatch
    return worst


def _error_on(
    eager: Eager,
    served: Candidate,
    tensors: Sequence[torch.Tensor],
    answer: Answer,
    values: Sequence[torch.Tensor],
) -> float:
    """The error on values drawn in the place of the tensors' own, which eager has answered. Where
    the candidate leaves those to eager, what may be a mask keeps its own: drawn anew it may hide
    all there is.

    Raises:
        Mismatch: it is too large.
        OutOfRangeError: the candidate takes neither.
    """
    try:
        return eager.judge(answer, served.answer(values))
    except OutOfRangeError:
        tamer = [a if _may_be_mask(a) else b for a, b in zip(tensors, values, strict=True)]
        other = eager.answer_or_none(tamer)
        if other is None:
            raise
        return eager.judge(other, served.answer(tamer))


def _may_be_mask(tensor: torch.Tensor) -> bool:
    return not tensor.dtype.is_floating_point or not bool(tensor.isfinite().all())


def _prove_masks(
    eager: Eager,
    served: Candidate,
    masks: Iterable[Sequence[torch.Tensor]],
    check_time: Callable[[], None],
) -> float:
    """The error with masks of one value, as far as eager and the candidate take those."""
    worst = 0.0
    for values in masks:
        check_time()
        answer = eager.answer_or_none(values)
        try:
            if answer is not None:
                worst = max(worst, eager.judge(answer, served.answer(values)))
        except OutOfRangeError:
            continue
        except Mismatch as mismatch:
            raise ProofFailedError(f"with masks of one value: {mismatch}") from mismatch
    return worst


def _prove_samples(
    eager: Eager,
    served: Candidate,
    samples: Sequence[Sequence[torch.Tensor]],
    check_time: Callable[[], None],
) -> float:
    """The error on samples: 99 of 100 are no further off."""
    pairs = []
    try:
        for sample in samples:
            check_time()
            answer, candidate = eager.answer(sample), served.answer(sample)
            compare(answer.leaves, answer.structure, candidate, float("inf"))
            pairs.append((answer.leaves, flatten(candidate)[0]))
        return eager.judge_samples(pairs) if pairs else 0.0
    except (Mismatch, OutOfRangeError) as mismatch:
        raise ProofFailedError(f"on calibration data: {mismatch}") from mismatch


def prove_small(
    eager: Eager,
    answer: Callable[[Sequence[torch.Tensor]], Any],
    tensors: Sequence[torch.Tensor],
    seen: Look,
) -> float:
    """One small run, for a plan out of the cache.

    Args:
        answer: the candidate's.
        seen: what eager answered to `tensors`.

    Raises:
        ProofFailedError: the candidate is wrong there, or does not take it (NotTakenError).
    """
    eagers = Answer(seen.leaves, seen.structure, eager.exact(tensors))
    try:
        return eager.judge(eagers, answer(tensors))
    except OutOfRangeError as refused:
        raise NotTakenError("it does not take a small input") from refused
    except Mismatch as mismatch:
        raise ProofFailedError(f"on a small input: {mismatch}") from mismatch


def redrawn(
    eager: Eager, tensors: Sequence[torch.Tensor], generator: torch.Generator | None
) -> tuple[Answer, list[torch.Tensor]]:
    """Other values (without a generator: these) and eager's answer to them. A tensor whose other
    values eager refuses (the offsets of a bag, lengths that must be sorted) keeps those of the
    example."""
    if generator is None:
        return eager.answer(tensors), list(tensors)
    drawn = redraw_all(tensors, generator)
    answer = eager.answer_or_none(drawn)
    if answer is not None:
        return answer, drawn
    values = list(tensors)
    for tensor in dict.fromkeys(map(id, tensors)):
        places = [t for t, known in enumerate(tensors) if id(known) == tensor]
        trial = [drawn[t] if t in places else value for t, value in enumerate(values)]
        if eager.answer_or_none(trial) is not None:
            values = trial
    return eager.answer(values), values


def _prove_group(
    eager: Eager,
    served: Candidate,
    tensors: Sequence[torch.Tensor],
    pattern: Pattern,
    size_guards: Sequence[str],
    group: Sequence[tuple[int, int]],
    generator: torch.Generator | None,
) -> tuple[float | None, Sizes]:
    """The error at another size of this group, or None where none can be proved. With a generator
    the values are drawn anew."""
    t, d = group[0]
    for size in other_sizes(tensors[t].shape[d]):
        other = resize_all(tensors, pattern, dict.fromkeys(group, size))
        if not sizes_hold(size_guards, sizes_of(other)):
            continue
        try:
            drawn = redrawn(eager, other, generator)
        except Exception as error:  # whatever a user's module raises at sizes it does not take
            log.debug("eager refuses size %d at %s: %s", size, group, error)
            return None, ()
        try:
            return _error_on(eager, served, other, *drawn), sizes_of(other)
        except OutOfRangeError:  # cut to that size a mask may hide all there is
            continue
        except EngineDead as dead:
            raise DiedOfSizesError(group, f"size {size} at {list(group)}: {dead}") from dead
        except (Mismatch, RuntimeError) as error:
            log.debug("size %d at %s is not served: %s", size, group, error)
            return None, ()
    return None, ()


def tied(
    pattern: Pattern, size_guards: Sequence[str], sizes: Sequence[Sequence[int]]
) -> tuple[str, ...]:
    """The guards, and one more for each pair of open sizes that are the same dimension of two
    tensors, of the same size in the example, and bound by no guard yet.

    They are most likely one size (the batch of ids and of their mask) that the graph happens not
    to compare. Eager mostly refuses to see one of them changed alone, so that alone it could not
    be proved; a call in which they differ gets a plan of its own.
    """
    groups = open_groups(pattern, size_guards)
    guards = list(size_guards)
    for n, group in enumerate(groups):
        (t, d), size = group[0], sizes[group[0][0]][group[0][1]]
        for other in groups[:n]:
            match = [(u, e) for u, e in other if e == d and sizes[u][e] == size]
            if match:
                guards.append(f"s{t}[{d}] == s{match[0][0]}[{d}]")
                break
    return tuple(guards)


def amount(sizes: Sizes) -> int:
    """How many elements tensors of these sizes have."""
    return sum(torch.Size(dims).numel() for dims in sizes)
