"""Which integers a candidate may be asked, as far as the proof can tell, and which floats, where it
computes in float16."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence

import torch

from ovshim.eager import Answer, Candidate, Eager
from ovshim.plan import OutOfRangeError
from ovshim.values import HALF, WIDEST
from ovshim.verify import Mismatch

__all__ = ["half_limits", "integer_limits"]

log = logging.getLogger("ovshim")

# Integers beyond what float32 tells apart, and far from 32 bits.
_MIDDLE = (-(2**25), 2**25)


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
        for low, high in _ranges(least, most):
            if (low, high) == _MIDDLE and wrong:
                continue
            drawn = torch.randint(low, high, tensor.shape, generator=generator)
            drawn.view(-1)[:1], drawn.view(-1)[-1:] = low, high
            values = [drawn.to(value.dtype) if value is tensor else value for value in tensors]
            answer = eager.answer_or_none(values)
            if answer is None and served.checked:
                break
            agrees = answer is not None and _agrees(eager, served, answer, values)
            if agrees:
                if wrong:
                    limits[t] = (low, high)
                break
            wrong = wrong or agrees is not None
        else:
            limits[t] = (least, most)
    return limits


def half_limits(tensors: Sequence[torch.Tensor]) -> dict[int, tuple[int, int]]:
    """That of floats which float16 holds, but where the example has others: the proof has seen
    those."""
    return {
        t: HALF
        for t, tensor in enumerate(tensors)
        if tensor.dtype in (torch.float32, torch.float64, torch.bfloat16)
        and not bool((tensor.detach().abs() > HALF[1]).any())
    }


def _ranges(least: int, most: int) -> Iterator[tuple[int, int]]:
    """Ranges to try, from the widest to a little more than what the example shows."""
    yield WIDEST
    yield _MIDDLE
    span = max(abs(least), abs(most), 1)
    yield max(-4 * span, WIDEST[0]), min(4 * span, WIDEST[1])
    yield least - span // 4 - 1, most + span // 4 + 1


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
