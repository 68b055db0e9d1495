"""Calls that may share a batch: which are alike, and whether their rows keep to themselves."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ovshim.dispatch import Dispatcher
from ovshim.inputs import once_each, redraw
from ovshim.plan import Plan, Served
from ovshim.serve import sizing
from ovshim.serve.copies import copied, joined
from ovshim.serve.flight import FAILURES, Flight, take_off
from ovshim.signals import let_through
from ovshim.signature import flatten, flatten_call, unflatten_call
from ovshim.verify import Mismatch, compare

__all__ = ["Call", "NoPlanError", "Rows", "call_of"]

log = logging.getLogger("ovshim")

Tensors = Sequence[torch.Tensor]


class NoPlanError(Exception):
    """OpenVINO does not serve such a batch, for the time being."""


class Call:
    """A call that may share a batch with others.

    Attributes:
        given: its tensors.
        rows: the size of dimension 0 of all of them.
        key: calls with equal keys are alike.
        done: set when its batch has come to an end, whichever.
        part: the batch's plan, what served it, and what that has computed for this call; None until
            then.
    """

    def __init__(self, dispatcher: Dispatcher, flight: Flight, call: Any, rows: int) -> None:
        self.served = flight.served
        self.plan = flight.plan
        self.given = flight.given
        self.advised = flight.advised
        self.rows = rows
        sizes = tuple(tensor.shape[1:] for tensor in flight.given)
        self.key = (flight.served, flight.modes.inference, flight.modes.grad, sizes)
        self.done = threading.Event()
        self.part: tuple[Plan, Served, list[torch.Tensor]] | None = None
        self._dispatcher = dispatcher
        self._call = call

    def with_rows(self, tensors: Tensors) -> tuple[Plan, Served, Tensors]:
        """What serves such a call with these tensors in place of its own, and they.

        Raises:
            NoPlanError: OpenVINO does not.
        """
        leaves, structure = flatten_call(*self._call)
        others = {id(x): other for x, other in zip(self.given, tensors, strict=True)}
        call = unflatten_call([others.get(id(leaf), leaf) for leaf in leaves], structure)
        found = self._dispatcher.ready(*call, settled=False)
        if found is None:
            raise NoPlanError
        plan, served, given = found
        lane = plan.lane(plan.bucket(given))
        if not (lane.proved or lane.eager):
            self._meet(call)
        if plan.served is not served or not lane.proved or lane.eager:
            raise NoPlanError
        return plan, served, given

    def _meet(self, call: Any) -> None:
        """Make a call of sizes that were never met: eager answers it too, and is compared."""
        try:
            self._dispatcher.call(*call)
        except Exception as error:  # the user's own, of a call among the batch: it will meet it
            let_through(error)
            raise NoPlanError from error

    def seconds(self, rows: int) -> float:
        """What a batch of so many rows takes, made of this call's; infinite where none is served.

        Raises one of FAILURES.
        """
        first = once_each(self.given, lambda _, x: x.index_select(0, torch.arange(rows) % len(x)))
        try:
            _, served, batch = self.with_rows(first)
        except NoPlanError:
            return math.inf
        return sizing.seconds_of(lambda: served.compute(batch))

    def answer(self) -> Any:
        """The module's answer, of this call's part of a batch."""
        assert self.part is not None
        plan, served, computed = self.part
        plan.calls.add()
        return served.builder(computed, self.given)


def call_of(
    module: nn.Module,
    dispatcher: Dispatcher | None,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Call | None:
    """The call, if OpenVINO serves it and it has rows that could stand beside others'."""
    flight = take_off(module, dispatcher, args, kwargs, copied=False, settled=False)
    if flight is None or dispatcher is None or any(x.dim() == 0 for x in flight.given):
        return None
    rows = {len(tensor) for tensor in flight.given}
    if len(rows) != 1 or rows == {0}:
        return None
    return Call(dispatcher, flight, (args, kwargs), rows.pop())


class Rows:
    """What is known of the rows of the calls of one plan.

    Args:
        call: one of them.
        tolerance: the largest relative L2 error between a batch and its calls one by one.

    Attributes:
        apart: whether each depends on itself alone, and comes back in dimension 0.
        limit: the most of them in a batch.

    Raises (when made):
        NoPlanError: that cannot be said, for nothing serves two of them.
    """

    def __init__(self, call: Call, tolerance: float) -> None:
        self.limit = 1
        self._tolerance = tolerance
        self._batches = 0
        self._compared: set[int] = set()
        try:
            both = [call.given, _other_values(call.given)]
            self.apart = self._parts(call, both, compared=True) is not None
        except FAILURES as error:
            let_through(error)
            log.debug("no batches: %s", error)
            self.apart = False

    def compute(self, calls: Sequence[Call]) -> bool:
        """Compute them as one batch. False where each has to see for itself.

        Raises NoPlanError, or one of FAILURES.
        """
        self._batches += 1
        rows = sum(call.rows for call in calls)
        # Each number of rows once, and each time after twice as many batches: rows may meet in
        # large batches alone, or for values that come seldom.
        compared = rows not in self._compared or self._batches.bit_count() == 1
        self._compared.add(rows)
        found = self._parts(calls[0], [call.given for call in calls], compared)
        if found is None:
            self.apart = False
            return False
        plan, served, parts = found
        for call, part in zip(calls, parts, strict=True):
            call.part = plan, served, part
        return True

    def _parts(
        self, like: Call, calls: Sequence[Tensors], compared: bool
    ) -> tuple[Plan, Served, list[list[torch.Tensor]]] | None:
        """What a batch of these tensors computes, by call; None where it cannot be told apart."""
        together = once_each(like.given, lambda i, _: joined([given[i] for given in calls]))
        plan, served, batch = like.with_rows(together)
        parts = _parted(served, served.compute(batch), [len(given[0]) for given in calls])
        if parts is None:
            return None
        pairs = zip(calls, parts, strict=True)
        if compared and not all(self._same(like, served, given, part) for given, part in pairs):
            return None
        return plan, served, parts

    def _same(self, like: Call, served: Served, given: Tensors, part: list[torch.Tensor]) -> bool:
        try:
            alone = flatten(like.served.answer(given))
            compare(*alone, served.builder(part, given), self._tolerance)
        except Mismatch as mismatch:
            log.debug("a batch is not its calls one by one: %s", mismatch)
            return False
        return True


def _parted(
    served: Served, computed: Tensors, rows: Sequence[int]
) -> list[list[torch.Tensor]] | None:
    """What was computed for a batch, as each call's own tensors; None if that has no such rows."""
    verdict = [computed[-1]] if served.checked else []
    outputs = computed[: len(computed) - len(verdict)]
    if any(tensor.dim() == 0 or len(tensor) != sum(rows) for tensor in outputs):
        return None
    by_output = [torch.split(tensor, list(rows)) for tensor in outputs]
    # Copies: a caller who keeps a row should not keep the whole batch, nor see others write to it.
    return [[*(copied(part) for part in parts), *verdict] for parts in zip(*by_output, strict=True)]


def _other_values(given: Tensors) -> list[torch.Tensor]:
    """Values of another mean, spread and order: a row that looks beyond itself will show it."""
    generator = torch.Generator().manual_seed(0)

    def draw(_: int, tensor: torch.Tensor) -> torch.Tensor:
        drawn = redraw(tensor, generator)
        return drawn * 0.5 if tensor.dtype.is_floating_point else drawn

    return once_each(given, draw)
