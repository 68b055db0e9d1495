"""Calls that may share a batch: which are alike, and whether their rows keep to themselves."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ovshim.dispatch import Dispatcher
from ovshim.guards import sizes_hold
from ovshim.plan import Served
from ovshim.serve import sizing
from ovshim.serve.flight import FAILURES, Flight, take_off
from ovshim.signature import fits, flatten, sizes_of
from ovshim.verify import Mismatch, compare, redraw

__all__ = ["Call", "Rows", "call_of"]

log = logging.getLogger("ovshim")

# So many of the first batches are compared with their calls computed one by one.
_COMPARED = 2


class Call:
    """A call that may share a batch with others.

    Attributes:
        rows: the size of dimension 0 of all its tensors.
        key: calls with equal keys are alike.
        computed: its part of what a batch computed; None until then.
        done: set when its batch has come to an end, whichever.
    """

    def __init__(self, flight: Flight, rows: int) -> None:
        self.flight = flight
        self.rows = rows
        modes = flight.modes
        sizes = tuple(tensor.shape[1:] for tensor in flight.given)
        self.key = (flight.served, modes.inference, modes.grad, sizes)
        self.computed: list[torch.Tensor] | None = None
        self.done = threading.Event()

    @property
    def served(self) -> Served:
        return self.flight.served

    @property
    def advised(self) -> int:
        return self.flight.advised

    def seconds(self, size: int) -> float:
        """What a batch of so many rows takes, made of this call's."""
        given = self.flight.given
        batch = [t.index_select(0, torch.arange(size) % len(t)) for t in given]
        return sizing.seconds_of(lambda: self.served.compute(batch))

    def answer(self) -> Any:
        """The module's answer."""
        assert self.computed is not None
        return self.flight.answer(self.computed)


def call_of(
    module: nn.Module,
    dispatcher: Dispatcher | None,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Call | None:
    """The call, if OpenVINO serves it and it has rows that could stand beside others'."""
    flight = take_off(module, dispatcher, args, kwargs, copied=False)
    if flight is None or not flight.given or any(t.dim() == 0 for t in flight.given):
        return None
    open_ = all(dims[0] is None for dims in flight.plan.pattern)
    rows = {tensor.shape[0] for tensor in flight.given}
    if not open_ or len(rows) != 1 or rows == {0}:
        return None
    return Call(flight, rows.pop())


class Rows:
    """What is known of the rows of the calls of one plan.

    Args:
        call: one of them.
        tolerance: the largest relative L2 error between a batch and its calls one by one.

    Attributes:
        apart: whether each depends on itself alone, and comes back in dimension 0.
        limit: the most of them in a batch.
    """

    def __init__(self, call: Call, tolerance: float) -> None:
        self.limit = 1
        self._tolerance = tolerance
        self._compared = 0
        other = _other_values(call.flight.given)
        try:
            self.apart = self._answered([call.flight.given, other], call, compared=True) is not None
        except FAILURES as error:
            log.debug("no batches: %s", error)
            self.apart = False

    def compute(self, calls: Sequence[Call]) -> bool:
        """Compute them as one batch. False where each has to see for itself.

        Raises one of FAILURES.
        """
        if not self.apart or not calls[0].flight.holds():
            return False
        compared = self._compared < _COMPARED
        self._compared += compared
        parts = self._answered([call.flight.given for call in calls], calls[0], compared)
        if parts is None:
            self.apart = False
            return False
        for call, part in zip(calls, parts, strict=True):
            call.computed = part
        return True

    def _answered(
        self, calls: Sequence[Sequence[torch.Tensor]], like: Call, compared: bool
    ) -> list[list[torch.Tensor]] | None:
        """What a batch of these tensors computes, parted; None where that cannot be."""
        plan, served = like.flight.plan, like.served
        together = [torch.cat(tensors) for tensors in zip(*calls, strict=True)]
        sizes = sizes_of(together)
        open_ = all(fits(mine, dims) for mine, dims in zip(sizes, plan.pattern, strict=True))
        if not open_ or not sizes_hold(plan.size_guards, sizes):
            return None
        parts = _parted(served, served.compute(together), [len(tensors[0]) for tensors in calls])
        if parts is None or not compared:
            return parts
        alone = [served.compute(tensors) for tensors in calls]
        return parts if all(map(self._same, alone, parts)) else None

    def _same(self, alone: list[torch.Tensor], part: list[torch.Tensor]) -> bool:
        try:
            compare(*flatten(alone), part, self._tolerance)
        except Mismatch as mismatch:
            log.debug("a batch is not its calls one by one: %s", mismatch)
            return False
        return True


def _parted(
    served: Served, computed: Sequence[torch.Tensor], rows: Sequence[int]
) -> list[list[torch.Tensor]] | None:
    """What was computed for a batch, as each call's own tensors; None if that has no such rows."""
    verdict = [computed[-1]] if served.checked else []
    outputs = computed[: len(computed) - len(verdict)]
    if any(tensor.dim() == 0 or len(tensor) != sum(rows) for tensor in outputs):
        return None
    by_output = [tensor.split(list(rows)) for tensor in outputs]
    # Clones: a caller who keeps a row should not keep the whole batch, nor see others write to it.
    return [[*(part.clone() for part in parts), *verdict] for parts in zip(*by_output, strict=True)]


def _other_values(given: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Values of another mean, spread and order: a row that looks beyond itself will show it."""
    generator = torch.Generator().manual_seed(0)
    drawn = [redraw(tensor, generator) for tensor in given]
    return [tensor * 0.5 if tensor.dtype.is_floating_point else tensor for tensor in drawn]
