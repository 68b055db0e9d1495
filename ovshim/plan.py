"""A plan: how calls of one signature are served. Made once by `build`, applied often."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from ovshim.buckets import Bucket, shown
from ovshim.errors import PrecisionWarning
from ovshim.guards import ValueGuard, sizes_hold
from ovshim.lanes import Lane
from ovshim.matcher import Builder, Glance, Matcher, Output
from ovshim.pace import Pace
from ovshim.race import Finish
from ovshim.reasons import Reason
from ovshim.signature import Kind, Pattern, Structure, describe, fits
from ovshim.unmet import Unmet
from ovshim.values import ValueCheck
from ovshim.views import Views

if TYPE_CHECKING:
    from ovshim.generation import Generation
    from ovshim.infer import Engine

__all__ = ["Counter", "Graph", "OutOfRangeError", "Plan", "Recording", "Served"]


class Counter:
    """Counts from many threads without a lock: `next` of an `itertools.count` is one C call."""

    __slots__ = ("_count", "add")

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self._count = itertools.count()
        self.add = self._count.__next__

    @property
    def value(self) -> int:
        # A count says where it stands only in its representation: 'count(12)'.
        return int(repr(self._count)[6:-1])


class Recording(Protocol):
    """Gives a plan's outputs their place in autograd's graph."""

    def refusal(self, tensors: Sequence[torch.Tensor], /) -> Reason | None:
        """Why it cannot, for a call of these; None where it can."""


class OutOfRangeError(Exception):
    """A value of a call has no place in the graph, as an index outside of its table has not: eager
    knows what to answer, or to raise."""


@dataclasses.dataclass(frozen=True, eq=False)
class Served:
    """What serves a plan in OpenVINO.

    Attributes:
        engine: runs the distinct tensors of a call.
        inputs: which tensors of the call these are, by index; None for all, in order.
        builder: puts the computed tensors into the module's own containers; `outputs` and
            `structure` say how.
        checked: whether the last computed tensor says whether all indices were in range.
        finite: which computed tensors eager has to give where they are not finite: float16 may have
            ended inside.
        recorder: gives the outputs gradients, as `builder`; None where they have none.
        answer: the module's output for the tensors of a call. Raises OutOfRangeError where an index
            lies outside of its table, and EngineDead and ValueError as `infer.Engine.run` does.
    """

    engine: Engine
    inputs: tuple[int, ...] | None
    builder: Builder
    outputs: tuple[Output, ...]
    structure: Structure
    checked: bool = False
    finite: tuple[int, ...] = ()
    recorder: Recording | None = None
    answer: Callable[[Sequence[torch.Tensor]], Any] = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "answer", self._compiled())

    def _compiled(self) -> Callable[[Sequence[torch.Tensor]], Any]:
        builder, compute, engine = self.builder, self.compute, self.engine
        if self.inputs is not None or self.checked or self.finite:
            return lambda given: builder(compute(given), given)
        return lambda given: builder(engine.run(given), given)

    @property
    def views(self) -> Views:
        """Which leaves of the output are taken of others."""
        return {i: output.view for i, output in enumerate(self.outputs) if output.view is not None}

    def compute(self, given: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """What the graph computes of them: `builder` makes the output of it.

        Raises as `answer` does.
        """
        inputs = self.inputs
        taken = given if inputs is None else [given[i] for i in inputs]
        return self.in_range(self.engine.run(taken))

    def in_range(self, computed: list[torch.Tensor]) -> list[torch.Tensor]:
        """What the engine has computed. Raises OutOfRangeError where an index was not in range, or
        where float16 has ended."""
        if self.checked and not computed[-1]:
            raise OutOfRangeError
        if self.finite and not all(bool(computed[n].isfinite().all()) for n in self.finite):
            raise OutOfRangeError
        return computed


@dataclasses.dataclass(frozen=True, eq=False)
class Graph:
    """All that it takes to compile a plan's graph once more, and to call it, elsewhere too.

    Attributes:
        source: the IR that was compiled.
        hint, properties: the precision as OpenVINO was told it; properties beside the options'.
        structure, outputs: how an output is made of what the graph computes.
        dtypes: of the computed tensors, in order.
        limits: the smallest and the largest value that a tensor may hold, by its index.
        ordered: keywords that have to come in this order.
        strict: whether strides of 1 are asked for as well (`compile_matcher`).
        leaves: an example of a call, flattened.
        met: the sizes of the calls at which it was proved.
        drawn: whether it was also proved with values drawn anew.
        names: of its inputs and of its outputs, where they are known already.
    """

    source: Path
    hint: str
    properties: tuple[tuple[str, str], ...]
    structure: Structure
    outputs: tuple[Output, ...]
    dtypes: tuple[torch.dtype, ...]
    limits: Mapping[int, tuple[int, int]]
    ordered: tuple[str, ...]
    strict: bool
    leaves: Sequence[Any]
    met: tuple[tuple[tuple[int, ...], ...], ...]
    drawn: bool
    names: tuple[tuple[str, ...], tuple[str, ...]] | None = None


class Notes(Protocol):
    """Keeps what is found out about a plan after its build, for every process."""

    def met(self, sizes: Sequence[Sequence[int]], /) -> None:
        """Calls of these sizes are answered rightly."""

    def raced(self, bucket: Bucket, finish: Finish, /) -> None:
        """A race in this bucket came out so."""

    def condemn(self, why: Reason, /) -> None:
        """The graph is wrong: eager serves from now on."""


class Mixed(Protocol):
    """A module that stays in eager while some of its submodules run in OpenVINO."""

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any], /) -> Any:
        """What the module answers."""

    def refusal(self, tensors: Sequence[torch.Tensor], /) -> Reason | None:
        """Why eager has to answer a call of these as a whole."""

    def to_list(self) -> list[dict[str, Any]]:
        """The submodules in OpenVINO, for a report."""


@dataclasses.dataclass(eq=False)
class Plan:
    """How one signature is served, and everything a report says of it.

    Attributes:
        kind, pattern: what calls it is for look like, and their sizes.
        match: tells whether a call has this signature, and gives its tensors.
        glance: tells whether a call looks as if it had; made when first needed.
        values_fit: tells whether the tensors' values are such as OpenVINO computes rightly;
            `other_values_fit` leaves out those that the engine looks at.
        served: None where eager serves, as a whole or between its parts; `reason` says why.
        bucket: the bucket of a call's tensors.
        lanes: who serves which bucket.
        key: what `open` knows a call by: its bucket, or, where OpenVINO's first call of each size
            has to be paid for (`unmet`), its sizes.
        open, closed: keys of calls that OpenVINO serves, and buckets that eager serves, beyond
            doubt.
        paces: how long calls take, by key, as far as `serve` has found out.
        tolerance: largest relative L2 error, for sizes met for the first time.
        graph: what serves, as it can be carried away; None where eager serves.
        notes: keeps with the entry what is found out later; None where nothing is cached.
        parts: answers where some submodules run in OpenVINO under an eager parent.
        generation: the state of the module that the plan was made for.
        grad: whether it is for calls in grad mode.
        example: sizes of the call that it was made for.
        route: how its graph was captured.
        size_guards, value_guards, pinned: what the graph takes for granted, as in its `Record`.
        precision, precision_run: as asked for, and what most of the compiled graph runs in.
        error: the largest relative L2 error found in the proof; None where nothing was proved.
        raced: whether buckets are raced against eager before OpenVINO serves them.
        lowered, modules: how the graph was lowered, and what each module of it runs in, by path,
            where precision was asked for by rules.
        warnings: where that is not what was asked for.
        candidates: what was tried for `precision="auto"`, one row each.
        way: how a tiny graph is run (`tiny`).
        given_back: bytes of torch's weights that were given back for it (`memory="lean"`).
        cache: "hit", "miss" or "off".
        cache_path, family, bytes: of its entry in the cache, where it lies, the key and the size on
            disk.
        speedup, medians: of the race, eager's median over ours, and both in seconds a call; None
            where none was run.
        trouble: the exception behind the reason, where there was one.
        calls, eager_calls: served by OpenVINO (or with parts in it), and given to eager.
        kept_until: so many calls given to eager it stays, although the module has changed; 0 while
            nobody has decided that.
        used, counted: for `families`: at which look calls were last seen to have come here, and how
            many there were.
        seconds: what each stage of the build took.
    """

    kind: Kind
    pattern: Pattern
    match: Matcher
    values_fit: ValueCheck
    other_values_fit: ValueCheck
    served: Served | None
    reason: Reason | None
    generation: Generation | None
    precision: str
    grad: bool = False
    example: tuple[tuple[int, ...], ...] = ()
    precision_run: str | None = None
    error: float | None = None
    speedup: float | None = None
    medians: tuple[float, float] | None = None
    cache: str = "off"
    cache_path: str | None = None
    route: str | None = None
    lowered: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    modules: Mapping[str, str] = dataclasses.field(default_factory=dict)
    warnings: Sequence[PrecisionWarning] = ()
    candidates: Sequence[Mapping[str, Any]] = ()
    way: str | None = None
    given_back: int | None = None
    family: str | None = None
    bytes: int | None = None
    size_guards: tuple[str, ...] = ()
    value_guards: tuple[ValueGuard, ...] = ()
    pinned: frozenset[tuple[int, int]] = frozenset()
    bucket: Callable[[Sequence[torch.Tensor]], Bucket] = len
    lanes: dict[Bucket, Lane] = dataclasses.field(default_factory=dict)
    key: Callable[[Sequence[torch.Tensor]], Bucket] = len
    unmet: Unmet | None = None
    open: set[Bucket] = dataclasses.field(default_factory=set)
    closed: set[Bucket] = dataclasses.field(default_factory=set)
    paces: dict[Bucket, Pace] = dataclasses.field(default_factory=dict)
    glance: Glance | None = None
    raced: bool = False
    tolerance: float = 0.0
    graph: Graph | None = None
    notes: Notes | None = None
    parts: Mixed | None = None
    trouble: BaseException | None = None
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    calls: Counter = dataclasses.field(default_factory=Counter)
    eager_calls: Counter = dataclasses.field(default_factory=Counter)
    kept_until: int = 0
    used: int = 0
    counted: int = 0

    @property
    def path(self) -> str:
        """Who serves calls like the example; of other sizes `lanes` may say otherwise."""
        if self.served is not None:
            return "openvino" if self.reason is None else "eager"
        return "eager" if self.parts is None else "mixed"

    @property
    def counted_as(self) -> str | None:
        """The path that the calls count for which a plan has counted as its own."""
        if self.served is not None:
            return "openvino"
        return None if self.parts is None else "mixed"

    def lane(self, bucket: Bucket) -> Lane:
        """The lane of that bucket, a new one for sizes that were never met."""
        lane = self.lanes.get(bucket)
        if lane is None:
            lane = self.lanes.setdefault(bucket, Lane(proved=False, raced=not self.raced))
        return lane

    def pace(self, tensors: Sequence[torch.Tensor]) -> Pace:
        """How long calls take that are like one of these."""
        key = self.key(tensors)
        return self.paces.get(key) or self.paces.setdefault(key, Pace())

    def settle(self) -> None:
        """Let the lanes that are settled be found by the hot path."""
        lanes = list(self.lanes.items())
        self.open = {bucket for bucket, lane in lanes if lane.open}
        if self.unmet is not None:
            met = list(self.unmet.met.items())
            self.open = {sizes for sizes, bucket in met if bucket in self.open}
        self.closed = {bucket for bucket, lane in lanes if lane.eager}

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
            "grad": self.grad,
            "path": self.path,
            "reason": self.reason.to_dict() if self.reason else None,
            "precision_run": self.precision_run,
            "preset": self.lowered.get("preset"),
            "modules": dict(self.modules),
            "candidates": [dict(row) for row in self.candidates],
            "error": self.error,
            "speedup": self.speedup,
            "cache": self.cache,
            "cache_path": self.cache_path,
            "seconds": {stage: round(spent, 4) for stage, spent in self.seconds.items()},
            "calls": self.calls.value + self.eager_calls.value,
            "route": self.route,
            "way": self.way,
            "given_back": self.given_back,
            "sizes": [
                {"bucket": shown(bucket), "path": "eager" if lane.eager else "openvino"}
                for bucket, lane in sorted(self.lanes.items(), key=repr)
            ],
            "parts": [] if self.parts is None else self.parts.to_list(),
            "guards": [*self.size_guards, *map(str, self.value_guards)],
        }
