"""Calls of sizes for which it is not settled who serves them: answered by both, or in turns, or by
eager until OpenVINO's first call of them is paid for."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch

from ovshim.lanes import Lane, Turn
from ovshim.plan import OutOfRangeError, Plan, Served
from ovshim.reasons import Reason, reason
from ovshim.signals import let_through
from ovshim.signature import flatten, sizes_of
from ovshim.special_mode import without_grad
from ovshim.tally import Tally
from ovshim.unmet import Unmet
from ovshim.verify import Mismatch, compare, compare_views

__all__ = ["NOT_ANSWERED", "Answering", "Asked", "take_turn"]

NOT_ANSWERED = (OutOfRangeError, RuntimeError, ValueError)
"""What `Served.answer` raises where eager has to answer."""

_OUT_OF_RANGE = reason("out-of-range")
_TAKING_TURNS = reason("taking-turns")
_NEW_SIZES = reason("new-sizes")


class Asked(NamedTuple):
    """A call that has a plan: its arguments, and the tensors among them."""

    plan: Plan
    served: Served
    tensors: tuple[torch.Tensor, ...]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Answering(Protocol):
    """Who answers calls otherwise."""

    original: Callable[..., Any]
    tally: Tally

    def in_eager(self, why: Reason, args: tuple[Any, ...], kwargs: dict[str, Any], /) -> Any:
        """Eager's answer, counted."""

    def instead(self, asked: Asked, error: Exception, /) -> Any:
        """Eager's answer where OpenVINO has raised."""

    def failed(self, plan: Plan, error: Exception, /) -> None:
        """OpenVINO has raised."""


def take_turn(by: Answering, asked: Asked, lane: Lane) -> Any:
    """The answer to a call of a lane that is not settled, or of sizes that OpenVINO has not run."""
    turn = lane.turn()
    unmet = _unmet(asked)
    if unmet is not None and turn != "eager":
        if not unmet.affords(turn == "both", asked.plan.calls.value):
            return _spared(by, asked, unmet)
        if turn == "openvino":
            return _met(by, asked, unmet)
    if turn == "both":
        return _compared(by, asked, lane, unmet)
    started = time.perf_counter()
    if turn == "openvino":
        answer = _by_openvino(by, asked)
    else:
        answer = by.in_eager(_TAKING_TURNS, asked.args, asked.kwargs)
    _timed(asked, lane, turn, time.perf_counter() - started)
    return answer


def _unmet(asked: Asked) -> Unmet | None:
    """What may be spent on a first call of these sizes; None where it need not be paid for."""
    unmet = asked.plan.unmet
    return None if unmet is None or asked.plan.key(asked.tensors) in unmet.met else unmet


def _by_openvino(by: Answering, asked: Asked) -> Any:
    try:
        answer = asked.served.answer(asked.tensors)
    except NOT_ANSWERED as raised:
        let_through(raised)
        # A traceback would keep this frame, and the tensors in it.
        failure = raised.with_traceback(None)
    else:
        asked.plan.calls.add()
        return answer
    return by.instead(asked, failure)


def _timed(asked: Asked, lane: Lane, turn: Turn, seconds: float) -> None:
    plan = asked.plan
    finish = lane.timed(turn, seconds)
    if finish is not None:
        plan.settle()
        if plan.notes is not None:
            plan.notes.raced(plan.bucket(asked.tensors), finish)


def _spared(by: Answering, asked: Asked, unmet: Unmet) -> Any:
    """Eager answers: OpenVINO's first call of these sizes would cost more than is put aside."""
    started = time.perf_counter()
    answer = by.in_eager(_NEW_SIZES, asked.args, asked.kwargs)
    unmet.eager_took(time.perf_counter() - started)
    return answer


def _met(by: Answering, asked: Asked, unmet: Unmet) -> Any:
    """OpenVINO's first call of these sizes: no sample for a race, for the next ones are faster."""
    plan, started = asked.plan, time.perf_counter()
    answer = _by_openvino(by, asked)
    unmet.openvino_took(time.perf_counter() - started, by_both=False)
    unmet.meet(plan.key(asked.tensors), plan.bucket(asked.tensors))
    plan.settle()
    return answer


def _compare(asked: Asked, expected: Any, answer: Any) -> None:
    """Raises Mismatch."""
    leaves, structure = flatten(expected)
    compare(leaves, structure, answer, asked.plan.tolerance)
    compare_views(leaves, asked.served.views)


def _compared(by: Answering, asked: Asked, lane: Lane, unmet: Unmet | None) -> Any:
    """Both answer sizes that are met for the first time; a graph that is wrong there goes."""
    plan, tensors = asked.plan, asked.tensors
    begun = time.perf_counter()
    expected = by.original(*asked.args, **asked.kwargs)
    started = time.perf_counter()
    try:
        answer = asked.served.answer(tensors)
        without_grad(lambda: _compare(asked, expected, answer))
    except OutOfRangeError:
        by.tally.note(_OUT_OF_RANGE)
        return expected
    except Mismatch as mismatch:
        if plan.generation is not None and not plan.generation.holds():
            by.tally.note(reason("stale", plan.generation.change()))  # while both answered
            return expected
        by.tally.retire([plan])
        plan.served = None
        plan.reason = reason("first-use-mismatch", f"{sizes_of(tensors)}: {mismatch}")
        if plan.notes is not None:
            plan.notes.condemn(plan.reason)
        by.tally.note(plan.reason)
        return expected
    except (RuntimeError, ValueError) as error:
        let_through(error)
        by.failed(plan, error)
        return expected
    if unmet is not None:
        unmet.eager_took(started - begun)
        unmet.openvino_took(time.perf_counter() - started, by_both=True)
        unmet.meet(plan.key(tensors), plan.bucket(tensors))
    lane.passed()
    plan.settle()
    if plan.notes is not None:
        plan.notes.met(sizes_of(tensors))
    plan.calls.add()
    return answer
