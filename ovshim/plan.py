"""A plan: how calls of one signature are served. Made once by `build`, applied often."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from ovshim.guards import ValueGuard, sizes_hold
from ovshim.matcher import Builder, Matcher
from ovshim.reasons import Reason
from ovshim.signature import Kind, Pattern, describe, fits
from ovshim.values import ValueCheck

if TYPE_CHECKING:
    from ovshim.generation import Generation
    from ovshim.infer import Engine

__all__ = ["Counter", "OutOfRangeError", "Plan", "Served"]


class Counter:
    """Counts from many threads without a lock: `next` of an `itertools.count` is one C call."""

    __slots__ = ("_count", "add")

    def __init__(self) -> None:
        self._count = itertools.count()
        self.add = self._count.__next__

    @property
    def value(self) -> int:
        # A count says where it stands only in its representation: 'count(12)'.
        return int(repr(self._count)[6:-1])


class OutOfRangeError(Exception):
    """An index of a call lies outside of its table: eager knows what to raise."""


@dataclasses.dataclass(frozen=True)
class Served:
    """What serves a plan in OpenVINO.

    Attributes:
        engine: runs the distinct tensors of a call.
        inputs: which tensors of the call these are, by index; None for all, in order.
        builder: puts the computed tensors into the module's own containers.
        checked: whether the last computed tensor says whether all indices were in range.
    """

    engine: Engine
    inputs: tuple[int, ...] | None
    builder: Builder
    checked: bool = False

    def answer(self, given: Sequence[torch.Tensor]) -> Any:
        """The module's output for these tensors of a call.

        Raises:
            OutOfRangeError: an index lies outside of its table.
            EngineDead, ValueError: see `infer.Engine.run`.
        """
        return self.builder(self.compute(given), given)

    def compute(self, given: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """What the graph computes of them: `builder` makes the output of it.

        Raises as `answer` does.
        """
        inputs = self.inputs
        taken = given if inputs is None else [given[i] for i in inputs]
        computed = self.engine.run(taken)
        if self.checked and not computed[-1]:
            raise OutOfRangeError
        return computed


@dataclasses.dataclass
class Plan:
    """How one signature is served, and everything a report says of it.

    Attributes:
        match: tells whether a call has this signature, and gives its tensors.
        values_fit: tells whether the tensors' values are such as OpenVINO computes rightly.
        served: None where eager serves; `reason` says why.
        generation: the state of the module that the plan was made for.
        example: sizes of the call that it was made for.
        error: the largest relative L2 error found in the proof; None where nothing was proved.
        speedup: eager's median over ours, None where no race was run.
        cache: "hit", "miss" or "off".
        trouble: the exception behind the reason, where there was one.
        seconds: what each stage of the build took.
    """

    kind: Kind
    pattern: Pattern
    match: Matcher
    values_fit: ValueCheck
    served: Served | None
    reason: Reason | None
    generation: Generation | None
    precision: str
    example: tuple[tuple[int, ...], ...] = ()
    precision_run: str | None = None
    error: float | None = None
    speedup: float | None = None
    medians: tuple[float, float] | None = None
    cache: str = "off"
    cache_path: str | None = None
    route: str | None = None
    rung: str | None = None
    size_guards: tuple[str, ...] = ()
    value_guards: tuple[ValueGuard, ...] = ()
    pinned: frozenset[tuple[int, int]] = frozenset()
    trouble: BaseException | None = None
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    calls: Counter = dataclasses.field(default_factory=Counter)

    @property
    def path(self) -> str:
        return "eager" if self.served is None else "openvino"

    def covers(self, other: Plan) -> bool:
        """Whether this plan serves the call that another one was made for."""
        return (
            self.served is not None
            and all(
                fits(mine, dims) for mine, dims in zip(other.example, self.pattern, strict=True)
            )
            and sizes_hold(self.size_guards, other.example)
        )

    def to_dict(self) -> dict[str, Any]:
        """The plan as `explain(...).to_dict()` promises it."""
        return {
            "signature": describe(self.kind, self.pattern),
            "path": self.path,
            "reason": self.reason.to_dict() if self.reason else None,
            "precision_run": self.precision_run,
            "error": self.error,
            "speedup": self.speedup,
            "cache": self.cache,
            "cache_path": self.cache_path,
            "seconds": {stage: round(spent, 4) for stage, spent in self.seconds.items()},
            "calls": self.calls.value,
            "route": self.route,
            "guards": [*self.size_guards, *map(str, self.value_guards)],
        }
