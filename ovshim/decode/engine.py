"""A compiled stateful graph: requests that each hold the keys and values of one conversation."""

from __future__ import annotations

import os
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ovshim.decode.states import variable
from ovshim.infer import Engine
from ovshim.inherited import all_of, keep_for_good
from ovshim.pool import Pool
from ovshim.single import SingleThreadEngine, either
from ovshim.slots import Slot

__all__ = ["StatefulEngine", "stateful_engine_for"]

# Requests that wait, with the memory of their last conversation.
_MOST_IDLE = 4

_engines: weakref.WeakSet[StatefulEngine] = weakref.WeakSet()


def _leak_after_fork() -> None:
    # Synchronous inference with what is inherited does not hang.
    for engine in all_of(_engines):
        keep_for_good(*(slot.request for slot in all_of(engine._all)))
        engine._settle()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leak_after_fork)


class Turn:
    """What a running step holds: slots belong to conversations, which keep them between steps."""

    __slots__ = ("__weakref__",)


class StatefulEngine(Engine):
    """Runs the steps of many conversations, each in a slot of its own.

    Args:
        compiled: takes some inputs and, for each row, the row of the state to go on from; gives the
            logits, and, if `checked`, whether all indices were in range.
        inputs: dtypes of those inputs but for the last.
        states: how many tensors of keys and values it keeps.
        dtype: of the logits, the keys and the values.

    Attributes:
        keys_and_values: what they are kept in, for reports.
    """

    keys_and_values: str | None = None

    def __init__(
        self,
        compiled: Any,
        inputs: Sequence[torch.dtype],
        states: int,
        dtype: torch.dtype,
        checked: bool,
    ) -> None:
        super().__init__(compiled, [*inputs, torch.int32], [dtype, *[torch.bool] * checked])
        self.dtype = dtype
        self._names = [variable(number) for number in range(states)]
        self._all: weakref.WeakSet[Slot] = weakref.WeakSet()
        self._idle: list[Slot] = []
        self._settle()
        _engines.add(self)

    def open(self) -> Slot:
        """A slot with an empty state. Raises EngineDead after a failure."""
        try:
            return self._idle.pop()
        except IndexError:
            slot = self._turns.alone(lambda turns: self._new_slot())
            self._all.add(slot)
            return slot

    def release(self, slot: Slot) -> None:
        """Take a slot back; its state is lost."""
        # Of one that was written halfway the next conversation is wrong, after `reset_state` too
        # (2026.4).
        if self.dead is None and slot.sound and len(self._idle) < _MOST_IDLE:
            slot.request.reset_state()
            self._idle.append(slot)

    def step(self, slot: Slot, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The outputs for these inputs, after which the slot's state is one step longer.

        Raises:
            EngineDead: OpenVINO failed; what became of the state is not known.
            ValueError: the model does not take these sizes; the state is as it was.
        """
        turns = self._turns
        try:
            turn = turns.free.pop()
        except IndexError:
            turn = turns.new(Turn)
        try:
            outputs = self._run(slot, tensors)
        except BaseException:
            self.unbind(slot)
            raise
        finally:
            turns.back.append(turn)
        return outputs if self._conversions is None else self._converted(outputs)

    def read(self, slot: Slot) -> list[torch.Tensor]:
        """Copies of the slot's keys and values, [batch, heads, length, width], layer by layer."""
        found = {state.name: state.state for state in slot.request.query_state()}
        return [_as_torch(found[name]).to(self.dtype) for name in self._names]

    def write(self, slot: Slot, tensors: Sequence[torch.Tensor]) -> None:
        """Set the slot's keys and values to copies of these. After an interrupt it is not `sound`,
        and must not serve any more."""
        given = dict(zip(self._names, tensors, strict=True))
        slot.sound = False
        for state in slot.request.query_state():
            state.state = _as_openvino(self._tensor, given[state.name].detach())
        slot.sound = True

    def _settle(self) -> None:
        self._turns: Pool[Turn] = Pool(StatefulEngine.step.__code__)


class OneThreadStatefulEngine(StatefulEngine, SingleThreadEngine):
    """The same in one stream of one thread, where OpenVINO hides failures."""

    repeats = False  # the state is one step further each time


def stateful_engine_for(compiled: Any, threads: int | None, *about: Any) -> StatefulEngine:
    """The engine that a compiled model needs.

    Args:
        threads: what the model was given.
        about: what `StatefulEngine` takes beside it.
    """
    return either(compiled, threads, StatefulEngine, OneThreadStatefulEngine)(compiled, *about)


def _as_torch(tensor: Any) -> torch.Tensor:
    kind = tensor.element_type.get_type_name()
    if kind == "bf16":
        bits = torch.from_numpy(np.array(tensor.data).view(np.uint16))
        return bits.view(torch.bfloat16)
    return torch.from_numpy(np.array(tensor.data))


def _as_openvino(make: Any, tensor: torch.Tensor) -> Any:
    tensor = tensor.contiguous()
    if tensor.dtype is torch.bfloat16:
        import openvino as ov

        made = make(ov.Type.bf16, list(tensor.shape))
        made.data.view(np.uint16)[...] = tensor.view(torch.uint16).numpy()
        return made
    return make(tensor.numpy(), shared_memory=True)  # a state is set to a copy
