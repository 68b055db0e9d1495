"""Calls of sizes for which it is not settled who serves them: answered by both, or in turns."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch

from ovshim.lanes import Lane
from ovshim.plan import OutOfRangeError, Plan, Served
from ovshim.reasons import Reason, reason
from ovshim.signature import flatten, sizes_of
from ovshim.tally import Tally
from ovshim.verify import Mismatch, compare

__all__ = ["NOT_ANSWERED", "Answering", "Asked", "take_turn"]

NOT_ANSWERED = (OutOfRangeError, RuntimeError, ValueError)
"""What `Served.answer` raises where eager has to answer."""

_OUT_OF_RANGE = reason("out-of-range")
_TAKING_TURNS = reason("taking-turns")


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
    """The answer to a call of a lane that is not settled."""
    turn = lane.turn()
    if turn == "both":
        return _compared(by, asked, lane)
    plan, started = asked.plan, time.perf_counter()
    if turn == "openvino":
        failure = None
        try:
            answer = asked.served.answer(asked.tensors)
            plan.calls.add()
        except NOT_ANSWERED as raised:
            # A traceback would keep this frame, and the tensors in it.
            failure = raised.with_traceback(None)
        if failure is not None:
            answer = by.instead(asked, failure)
    else:
        answer = by.in_eager(_TAKING_TURNS, asked.args, asked.kwargs)
    finish = lane.timed(turn, time.perf_counter() - started)
    if finish is not None:
        plan.settle()
        if plan.notes is not None:
            plan.notes.raced(plan.bucket(asked.tensors), finish)
    return answer


def _compared(by: Answering, asked: Asked, lane: Lane) -> Any:
    """Both answer sizes that are met for the first time; a graph that is wrong there goes."""
    plan, tensors = asked.plan, asked.tensors
    expected = by.original(*asked.args, **asked.kwargs)
    try:
        answer = asked.served.answer(tensors)
        with torch.no_grad():
            compare(*flatten(expected), answer, plan.tolerance)
    except OutOfRangeError:
        by.tally.note(_OUT_OF_RANGE)
        return expected
    except Mismatch as mismatch:
        by.tally.retire([plan])
        plan.served = None
        plan.reason = reason("first-use-mismatch", f"{sizes_of(tensors)}: {mismatch}")
        if plan.notes is not None:
            plan.notes.condemn(plan.reason)
        by.tally.note(plan.reason)
        return expected
    except (RuntimeError, ValueError) as error:
        by.failed(plan, error)
        return expected
    lane.passed()
    plan.settle()
    if plan.notes is not None:
        plan.notes.met(sizes_of(tensors))
    plan.calls.add()
    return answer
