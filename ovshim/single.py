"""Graphs that run in one stream of one thread, where OpenVINO hides that an `infer` has failed.

Such a request is run by a queue of the executor's, which swallows exceptions (OpenVINO 2026.4): the
outputs are then those of an earlier call. What failed stays at the head of the queue and runs again
in the place of the next request, be it of another model, and after its own has gone. So outputs are
marked before each call, a mark that is left is a failure, and what has failed is kept for good: its
executor is then given to no other model. About 4 µs an output.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch

from ovshim import runtime
from ovshim.infer import Engine, EngineDead
from ovshim.slots import Array, Slot

__all__ = ["SingleThreadEngine", "either", "engine_for"]

E = TypeVar("E", bound=Engine)

_MARK = 0xAD
_MARKED_BYTES = 8

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
    """An engine that finds out by itself whether an `infer` has failed."""

    def _run(self, slot: Slot, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        bound = self._bind_inputs(slot, tensors)
        marked = [index for index, bindable in enumerate(self._bindable) if bindable]
        for index in marked:
            self._bind_marked(slot, index)
        try:
            results = self._infer(slot.request, {}, True, False)
        except Exception as error:
            self._failed(slot, str(error))
            raise EngineDead(self.dead) from error
        del bound  # needed until here
        arrays: list[Array] = list(results.values())
        if any(_is_marked(arrays[index]) for index in marked):
            self._failed(slot, "it gave no output, and OpenVINO does not say why")
        if self.dead is not None:
            raise EngineDead(self.dead)
        outputs = [a if index in marked else a.copy() for index, a in enumerate(arrays)]
        return list(map(torch.from_numpy, outputs))

    def _bind_marked(self, slot: Slot, index: int) -> None:
        """A new buffer, of the least size that the output may have. One of none is marked too: a
        call with outputs of no element is not told from a failure, and goes to eager."""
        tensor = self._tensor(*self._fresh[index])
        _head(tensor.data)[:] = _MARK
        slot.request.set_output_tensor(index, tensor)

    def _failed(self, slot: Slot, why: str) -> None:
        _kept.append((self._compiled, slot, list(self._pool.free)))
        self.close(f"OpenVINO failed while running the model: {why}")


def _head(array: Array) -> Array:
    return array.reshape(-1).view(np.uint8)[:_MARKED_BYTES]


def _is_marked(array: Array) -> bool:
    return bool((_head(array) == _MARK).all())
