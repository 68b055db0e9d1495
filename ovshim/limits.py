"""Which integers a candidate may be asked, as far as the proof can tell, and which floats, where it
computes in float16."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Literal

import torch

from ovshim.eager import Answer, Candidate, Eager
from ovshim.plan import OutOfRangeError
from ovshim.values import HALF, WIDEST
from ovshim.verify import Mismatch

__all__ = ["half_limits", "integer_limits"]

log = logging.getLogger("ovshim")

# Integers beyond what float32 tells apart, and far from 32 bits.
_MIDDLE = (-(2**25), 2**25)
# Of which sines and powers are still alike: models of diffusion count their steps to 1,000.
_NARROWER = (2**20, 2**16, 2**12)


def integer_limits(
    eager: Eager,
    served: Candidate,
    tensors: Sequence[torch.Tensor],
    samples: Sequence[Sequence[torch.Tensor]],
    generator: torch.Generator,
) -> dict[int, tuple[int, int]]:
    """Which integer tensors must keep to the range that the example and the samples show.

    Each is asked all over the range that a plan lets in. If eager refuses that, it is an index, and
    the graph checks it itself (but a traced graph does not: then the example's range it is).
    What the graph refuses itself (a sum that leaves 32 bits) needs no limit; it is asked less."""
    limits = {}
    for t, tensor in enumerate(tensors):
        wide = tensor.dtype in (torch.int32, torch.int64) and tensor.numel() > 0
        if not wide or any(tensor is earlier for earlier in tensors[:t]):
            continue
        seen = [tensor, *(sample[t] for sample in samples if sample[t].numel() > 0)]
        least, most = int(min(x.min() for x in seen)), int(max(x.max() for x in seen))
        wrong = False
        for ends, after_wrong in _ranges(least, most):
            if after_wrong is not None and after_wrong is not wrong:
                continue
            found = _asked(eager, served, tensors, t, ends, generator)
            if found == "right" and wrong:
                limits[t] = ends
            if found == "right" or (found == "index" and not wrong):
                break
            wrong = wrong or found == "wrong"
        else:
            limits[t] = (least, most)
    return limits


def _asked(
    eager: Eager,
    served: Candidate,
    tensors: Sequence[torch.Tensor],
    t: int,
    ends: tuple[int, int],
    generator: torch.Generator,
) -> Literal["right", "wrong", "refused", "index"]:
    """What comes of integers in the place of `tensors[t]` that reach to both ends: also that the
    candidate refuses them itself, or that eager does, of which it looks after itself."""
    tensor = tensors[t]
    drawn = torch.randint(*ends, tensor.shape, generator=generator)
    drawn.view(-1)[:1], drawn.view(-1)[-1:] = ends
    low = [torch.full_like(drawn, ends[0])] if tensor.numel() == 1 else []
    for given in (drawn, *low):
        values = [given.to(value.dtype) if value is tensor else value for value in tensors]
        answer = eager.answer_or_none(values)
        if answer is None and served.checked:
            return "index"
        agrees = answer is not None and _agrees(eager, served, answer, values)
        if not agrees:
            return "refused" if agrees is None else "wrong"
    return "right"


def half_limits(tensors: Sequence[torch.Tensor]) -> dict[int, tuple[int, int]]:
    """That of floats which float16 holds, but where the example has others: the proof has seen
    those."""
    return {
        t: HALF
        for t, tensor in enumerate(tensors)
        if tensor.dtype in (torch.float32, torch.float64, torch.bfloat16)
        and not bool((tensor.detach().abs() > HALF[1]).any())
    }


def _ranges(least: int, most: int) -> Iterator[tuple[tuple[int, int], bool | None]]:
    """Ranges to try, from the widest to a little more than what the example shows; and whether only
    where a wider one was wrong, or only where none was."""
    yield WIDEST, None
    yield _MIDDLE, False
    span = max(abs(least), abs(most), 1)
    for end in _NARROWER:
        if end > 4 * span:
            yield (-end, end), True
    yield (max(-4 * span, WIDEST[0]), min(4 * span, WIDEST[1])), None
    yield (least - span // 4 - 1, most + span // 4 + 1), None


def _agrees(
    eager: Eager, served: Candidate, answer: Answer, values: Sequence[torch.Tensor]
) -> bool | None:
    """None where the candidate says itself that it cannot answer."""
    try:
        eager.judge(answer, served.answer(values))
    except OutOfRangeError:
        return None
    except Mismatch as error:
        log.debug("wrong for wide integers: %s", error)
        return False
    return True
