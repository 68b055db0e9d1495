"""Calls of our own to the user's module, after which it is as it was."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from ovshim.inputs import once_each, redraw
from ovshim.job import BuildStopped, Job
from ovshim.modes import Operators
from ovshim.preflight import Look, look
from ovshim.reasons import reason
from ovshim.verify import Mismatch, compare_flat

__all__ = ["alike", "seen_twice", "settled", "trial"]

log = logging.getLogger("ovshim")

# Asks whether the mask has a form that can be packed, and packs by it.
_PACKS = "aten::_nested_tensor_from_mask"


def seen_twice(job: Job) -> Look:
    """What eager does on the example, and that it does so twice."""
    try:
        first = job.look or trial(job)
        if first.reason is not None and first.reason.code == "mutates-attribute":
            first = (settled(job) if _made_alike(job) else None) or first
        elif first.reason is not None and first.reason.code == "mutates-buffer":
            # By the module, at every call? Or by another thread, during this one?
            again = trial(job)
            if again.reason is None:
                raise BuildStopped(reason("stale", "weights changed while the module ran"))
        elif first.reason is not None and first.reason.code == "random":
            # In a call of the user's, nobody can tell who drew.
            first = trial(job, suspected=first.drew)
        second = first if first.reason is not None else _packing_refused(job)
    except BuildStopped:
        raise
    except Exception as error:  # whatever the user's module raises
        raise BuildStopped(reason("eager-refuses", f"{type(error).__name__}: {error}")) from error
    if second.reason is not None:
        return second
    if {id(held) for held in first.containers} & {id(held) for held in second.containers}:
        raise BuildStopped(reason("aliases-input", "two calls gave the same object"))
    if not alike(first, second):
        raise BuildStopped(reason("nondeterministic"))
    first.sources = second.sources  # the first may be a call of the user's, in inference mode
    return first


def alike(first: Look, second: Look) -> bool:
    """Whether two calls of eager with equal inputs gave the same. Sums may be ordered otherwise
    from run to run, which shows in the last digits."""
    tolerance = 1e-5 if all(_is_wide(leaf) for leaf in first.leaves) else 1e-2
    try:
        mine, other = (first.leaves, first.structure), (second.leaves, second.structure)
        compare_flat(*mine, *other, tolerance)
    except Mismatch as mismatch:
        log.debug("eager answered otherwise the second time: %s", mismatch)
        return False
    return True


def _is_wide(leaf: Any) -> bool:
    narrow = (torch.bfloat16, torch.float16)
    return not (isinstance(leaf, torch.Tensor) and leaf.dtype in narrow)


def trial(
    job: Job,
    leaves: Sequence[Any] | None = None,
    keep: bool = False,
    suspected: frozenset[Any] = frozenset(),
) -> Look:
    """A call of our own, after which the module is as it was (but for attributes, with `keep`)."""
    given = job.copies() if leaves is None else job.kind.requiring(leaves)
    tensors = [leaf for leaf in given if isinstance(leaf, torch.Tensor)]
    args, kwargs = both = job.arguments(given)
    if job.apart is None:
        seen = look(
            job.module,
            lambda: job.call(*args, **kwargs),
            tensors,
            restore=True,
            suspected=suspected,
            arguments=both,
        )
    else:
        call, module = job.apart.resolve(), job.apart.module
        seen = look(
            module,
            lambda: call(*args, **kwargs),
            tensors,
            restore=False,
            apart=True,
            arguments=both,
        )
    if not keep:
        seen.undo()
    return seen


def _packing_refused(job: Job) -> Look:
    """A trial, in which no TransformerEncoder may pack rows: with a padding mask its fast way does,
    for masks of one form and not for others, and what it leaves out is 0. Dynamo takes neither."""
    if not any(isinstance(inner, nn.TransformerEncoder) for inner in job.module.modules()):
        return trial(job)
    seen = Operators()
    with seen:
        found = trial(job)
    if any(name.startswith(_PACKS) for name in seen.names):
        raise BuildStopped(reason("value-dependent", "a TransformerEncoder packs unpadded rows"))
    return found


def settled(job: Job) -> Look | None:
    """A call after attributes have settled; None where they never do. A module may keep what it
    makes at its first call (a table, a flag that hooks are installed): that is no side effect."""
    first = trial(job, keep=True)
    second = trial(job)
    if second.reason is None or second.reason.code != "mutates-attribute":
        if job.apart is not None:
            # The copy has settled, the module has not: it does by a call as from any thread.
            job.call_with(job.copies())
            raise BuildStopped(reason("stale", "the module's first call has changed it"))
        return second
    first.undo()
    return None


def _made_alike(job: Job) -> bool:
    """Whether a first call makes the same attributes of other data and of other sizes: the user's
    first call, which is to make them, is not the example. Not where it fills a list or a dict, of
    its own or the buffers': those the original has as well. Asked before a capture; what an entry
    is of, was asked."""
    of_example = _made(job)
    others = (_other_values(job, floats_alone) for floats_alone in (False, True))
    if of_example is None or not _is_made_of(job, others, of_example):
        return False
    sizes = {size for tensor in job.tensors for size in tensor.shape[1:] if size > 1}
    sizes.update(tensor.shape[0] for tensor in job.tensors if tensor.dim() > 0)
    return all(
        _is_made_of(job, [_with_other_sizes(job, size)], of_example, refused=True)
        for size in sorted(sizes)
    )


def _is_made_of(
    job: Job, others: Iterable[list[Any]], made: dict[str, Any], refused: bool = False
) -> bool:
    """Whether the first of other inputs that eager takes makes these attributes as well.

    Args:
        refused: the answer where it takes none.
    """
    for leaves in others:
        job.check_time()
        try:
            other = _made(job, leaves)
        except Exception as error:  # as of a text without the places of its images
            log.debug("eager refuses other inputs: %s", error)
        else:
            return other is not None and _alike_value(made, other)
    return refused


def _other_values(job: Job, floats_alone: bool) -> list[Any]:
    generator = torch.Generator().manual_seed(0)

    def other(_: int, tensor: torch.Tensor) -> torch.Tensor:
        kept = floats_alone and not tensor.is_floating_point()
        return tensor.clone() if kept else redraw(tensor, generator)

    return job.leaves_with(once_each(job.tensors, other))


def _with_other_sizes(job: Job, size: int) -> list[Any]:
    """The example's leaves with one element more in each dimension of that size: the last twice."""

    def longer(_: int, tensor: torch.Tensor) -> torch.Tensor:
        for dim, length in enumerate(tensor.shape):
            if length == size and (length > 1 or dim == 0):
                tensor = torch.cat([tensor, tensor.narrow(dim, length - 1, 1)], dim)
        return tensor.clone()

    return job.leaves_with(once_each(job.tensors, longer))


def _made(job: Job, leaves: Sequence[Any] | None = None) -> dict[str, Any] | None:
    seen = trial(job, leaves, keep=True)
    made = seen.made()
    seen.undo()
    return made


def _alike_value(one: Any, other: Any) -> bool:
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return one.dtype is other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_alike_value(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(_alike_value, one, other))
    # Of other objects only their kind is known: they are made anew each time.
    return bool(one == other) if isinstance(one, (int, float, complex, str)) else True
