"""Graphs that run in one stream of one thread, where OpenVINO hides that an `infer` has failed.

Such a request is run by a queue of the executor's, which swallows exceptions (OpenVINO 2026.4): the
outputs are then those of an earlier call. What failed stays at the head of the queue and runs again
in the place of the next request, be it of another model, and after its own has gone. So outputs are
marked before each call, a mark that is left is a failure, and what has failed is kept for good: its
executor is then given to no other model. A mark takes half a microsecond where outputs are small
and of one size, for they stay in the request then; else each gets a new buffer, which takes ten to
twenty.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch

from ovshim import runtime
from ovshim.infer import Engine, EngineDead
from ovshim.signals import let_through_inference
from ovshim.slots import Array, Slot

__all__ = ["MARKS", "NO_OUTPUT", "SingleThreadEngine", "either", "engine_for"]

E = TypeVar("E", bound=Engine)

MARKS = _MARK, _OTHER_MARK = 0xAD, 0x52
NO_OUTPUT = "it gave no output, and OpenVINO does not say why"
_MARKED_BYTES = 8
_HEADS = {mark: bytes([mark]) * _MARKED_BYTES for mark in MARKS}
# Larger ones are not copied twice.
_STAYING_BYTES = 64 * 1024

_kept: list[Any] = []


def engine_for(
    compiled: Any,
    threads: int | None,
    inputs: Sequence[torch.dtype],
    outputs: Sequence[torch.dtype],
) -> Engine:
    """The engine that a compiled model needs. See `infer.Engine`; `threads`: what it was given."""
    return either(compiled, threads, Engine, SingleThreadEngine)(compiled, inputs, outputs)


def either(
    compiled: Any, threads: int | None, plain: Callable[..., E], alone: Callable[..., E]
) -> Callable[..., E]:
    """Of two classes of engines the one that a compiled model needs.

    Args:
        threads: what the model was given.
        alone: the one that finds out by itself whether an `infer` has failed.
    """
    return alone if runtime.hides_failures(compiled, threads) else plain


class SingleThreadEngine(Engine):
    """An engine that finds out by itself whether an `infer` has failed.

    `repeats`: whether a call may run twice. It does where an output begins like a mark. `stay`:
    whether outputs stay where the request has them.
    """

    queues = True
    repeats = True

    def __init__(
        self, compiled: Any, inputs: Sequence[torch.dtype], outputs: Sequence[torch.dtype]
    ) -> None:
        super().__init__(compiled, inputs, outputs)
        # OpenVINO takes other memory for an output that outgrows its own: marks would be beside it.
        self.stay = all(self._bindable) and all(map(_is_small, compiled.outputs))

    def _run(self, slot: Slot, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        bound = self._bind_inputs(slot, tensors)
        run = self._run_in_place if self.stay else self._run_in_new
        try:
            arrays, failed = run(slot, _MARK)
            if failed and self.repeats:  # if it is what is to be given, it is so again
                arrays, failed = run(slot, _OTHER_MARK)
        except Exception as error:
            let_through_inference(error)
            self.failed(slot, str(error))
            raise EngineDead(self.dead) from error
        del bound  # needed until here
        if failed:
            self.failed(slot, NO_OUTPUT)
        if self.dead is not None:
            raise EngineDead(self.dead)
        return list(map(torch.from_numpy, arrays))

    def _run_in_place(self, slot: Slot, mark: int) -> tuple[Iterable[Array], bool]:
        """Copies of the request's own outputs, and whether a mark is left."""
        heads = slot.heads
        if not heads:
            every = range(len(self._bindable))
            heads = [_head(slot.request.get_output_tensor(index).data) for index in every]
            slot.heads = heads
        for head in heads:
            head.fill(mark)
        arrays = self._infer(slot.request, {}, False, False).values()
        return arrays, _is_left(mark, heads)

    def _run_in_new(self, slot: Slot, mark: int) -> tuple[Iterable[Array], bool]:
        """Outputs in new buffers, copies of those that take none; and whether a mark is left."""
        marked = [index for index, bindable in enumerate(self._bindable) if bindable]
        for index in marked:
            self._bind_marked(slot, index, mark)
        arrays = list(self._infer(slot.request, {}, True, False).values())
        failed = _is_left(mark, [_head(arrays[index]) for index in marked])
        return [a if index in marked else a.copy() for index, a in enumerate(arrays)], failed

    def _bind_marked(self, slot: Slot, index: int, mark: int) -> None:
        """A new buffer, of the least size that the output may have. One of none is marked too: a
        call with outputs of no element is not told from a failure, and goes to eager."""
        tensor = self._tensor(*self._fresh[index])
        _head(tensor.data).fill(mark)
        slot.request.set_output_tensor(index, tensor)

    def failed(self, slot: Slot, why: str) -> None:
        _kept.append((self._compiled, slot, list(self._pool.free)))
        super().failed(slot, why)


def _is_small(port: Any) -> bool:
    shape = port.partial_shape
    if not shape.is_static:
        return False
    nbytes: int = math.prod(shape.to_shape()) * port.element_type.size
    return nbytes <= _STAYING_BYTES


def _head(array: Array) -> Array:
    return array.reshape(-1).view(np.uint8)[:_MARKED_BYTES]


def _is_left(mark: int, heads: Iterable[Array]) -> bool:
    marks = _HEADS[mark]
    # A generator for `any` takes 0.7 µs more: its code is cold by then.
    for head in heads:  # noqa: SIM110
        if marks.startswith(head.tobytes()):
            return True
    return False
