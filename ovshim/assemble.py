"""What a build ends in, whether its graph was captured now or found in the cache: a plan."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from ovshim import blobs, executed, runtime
from ovshim.cache import Entry
from ovshim.checks import INTEGERS
from ovshim.eager import Eager
from ovshim.early import Compiled, Early
from ovshim.floats import floats_of
from ovshim.generation import Generation
from ovshim.guards import ValueGuard, roots_of
from ovshim.infer import Engine, EngineDead
from ovshim.job import BuildStopped, Job
from ovshim.limits import half_limits
from ovshim.matcher import Matcher, Output, compile_builder, compile_matcher
from ovshim.plan import Graph, Plan, Served
from ovshim.preflight import Look, Sources
from ovshim.proof import prove_values
from ovshim.ran import warnings_of
from ovshim.reached import UnwatchableError
from ovshim.reasons import Reason, reason
from ovshim.record import Record
from ovshim.rival import add_rival
from ovshim.shapes import ordered_keywords
from ovshim.shortage import compile_failure
from ovshim.signature import Kind, Pattern, sizes_of
from ovshim.single import engine_for
from ovshim.tiny import add_exact, fastest
from ovshim.values import compile_value_check, usual
from ovshim.verdict import decide
from ovshim.views import Views, refusal
from ovshim.wanted import settings_of

__all__ = [
    "eager_of",
    "eager_plan",
    "engine_of",
    "generation_of",
    "limits_of",
    "matcher_of",
    "plan_of",
    "served_by",
]


class Assumptions(Protocol):
    """What a captured graph rests on, as its record has it: a `Record`, or that of a decoding."""

    @property
    def value_guards(self) -> Sequence[ValueGuard]: ...
    @property
    def code(self) -> Sequence[str] | None: ...
    @property
    def asks(self) -> Sequence[str] | None: ...
    @property
    def route(self) -> str: ...


def generation_of(job: Job, record: Assumptions, classes: Iterable[type] = ()) -> Generation:
    """The module as it is now, and what the graph read beside it.

    Args:
        classes: see `Generation`.

    Raises:
        BuildStopped: nobody could tell when a weight changes.
        GuardFailedError: the graph was captured of something else.
    """
    roots = roots_of(job.module, job.call)
    try:
        # An ONNX model has no code, and what OpenVINO reads of it neither.
        follow = record.route.startswith("traced")
        generation = Generation(
            job.module,
            record.value_guards,
            roots,
            record.code,
            record.asks,
            job.grad,
            follow,
            classes,
        )
    except ValueError as error:
        raise BuildStopped(reason("untracked-weights", str(error))) from error
    except UnwatchableError as error:
        raise BuildStopped(reason("capture-failed", f"traced, and {error}")) from error
    if generation.asks_layout and any(getattr(leaf, "layout", "") for leaf in job.kind.leaves):
        # Which are read, and whether more than their order, nobody says.
        raise BuildStopped(reason("value-dependent", "the strides of an input are read"))
    return generation


def engine_of(job: Job, source: Path, record: Record, entry: Entry | None) -> Engine:
    """The graph compiled, in the way that is fastest here.

    Raises:
        BuildStopped: OpenVINO cannot.
    """
    if job.precision in INTEGERS:
        precision = _floats_of(job, source, record, entry)
    else:
        precision = job.precision if job.lowering is None else job.lowering.hint
    job.source, job.hint = source, precision

    def compiled(further: Mapping[str, Any]) -> Engine:
        return _compiled(job, source, record, precision, entry, further)

    try:
        return fastest(job, source, record, entry, compiled)
    except (EngineDead, ValueError) as error:
        raise BuildStopped(reason("infer-failed", str(error))) from error


def _floats_of(job: Job, source: Path, record: Record, entry: Entry | None) -> str:
    def ways() -> tuple[Callable[[], Any], Callable[[], Any]]:
        inputs = [job.leaves[i] for i in job.kind.distinct]
        exact, lower = (_compiled(job, source, record, p, entry) for p in ("fp32", "bf16"))
        return lambda: exact.run(inputs), lambda: lower.run(inputs)

    return floats_of(job, record.rest, entry, ways)


def _compiled(
    job: Job,
    source: Path,
    record: Record,
    precision: str,
    entry: Entry | None,
    further: Mapping[str, Any] | None = None,
    sizes: Sequence[Sequence[int]] | None = None,
) -> Engine:
    """The graph compiled with a precision as the hint, and with further properties; `sizes`: of its
    inputs, if it is for these alone.

    Raises:
        BuildStopped: OpenVINO cannot.
    """
    settings, device = settings_of(job, record, precision, further), job.options.device
    inputs = [job.leaves[i].dtype for i in job.kind.distinct]
    early: Early | None = None if job.ahead is None else job.ahead.early
    try:
        if entry is None or sizes is not None:
            made = Compiled(runtime.compile_model(source, device, settings, sizes))
        else:
            begun = None if early is None else early.take(entry, device, settings)
            made = begun or Compiled(*blobs.compiled(job.store, entry, device, settings))
            job.imported, job.model, job.settings = made.imported, made.graph, settings
        ran = made.precision_run or executed.precision_run(made.graph)
        if sizes is None:
            job.precision_run = ran
            job.modules_run, job.warnings = warnings_of(job, made.graph)
        elif ran != job.precision_run:
            raise ValueError("for these sizes it runs in another precision")
        threads = job.placement["threads"]
        return made.engine or engine_for(made.graph, threads, inputs, record.computed)
    except (RuntimeError, TypeError, ValueError) as error:
        raise BuildStopped(compile_failure(error)) from error


def served_by(
    job: Job,
    engine: Engine,
    record: Record,
    generation: Generation,
    seen: Look,
    leaves: Sequence[Any],
) -> Served:
    """What answers as eager has answered `leaves`: `seen`.

    Raises:
        BuildStopped: eager's answer is not of the graph's structure, or its gradients could not be
            promised.
    """
    tensors = job.kind.distinct
    every = list(job.kind.tensors)
    inputs = None if tensors == every else tuple(every.index(i) for i in tensors)
    if any(i >= len(seen.leaves) for i in record.outputs):
        raise BuildStopped(reason("proof-failed", "eager's output has another structure"))
    number = {id(seen.leaves[i]): n for n, i in enumerate(record.outputs)}
    _refuse_overlaps(record, seen)
    outputs = []
    for i, (leaf, given) in enumerate(zip(seen.leaves, seen.given, strict=True)):
        if given is not None:
            outputs.append(Output(given=given))
        elif i in record.views:
            view = record.views[i]
            outputs.append(Output(computed=record.outputs.index(view.of), view=view))
        elif isinstance(leaf, torch.Tensor) and id(leaf) in number:
            outputs.append(Output(computed=number[id(leaf)]))
        elif i in record.outputs:
            outputs.append(Output(computed=record.outputs.index(i), number=True))
        elif isinstance(leaf, torch.Tensor):
            raise BuildStopped(reason("proof-failed", f"output {i} is not computed"))
        else:
            outputs.append(Output(value=leaf))
    builder = compile_builder(seen.structure, outputs)
    recorder = None
    if any(seen.sources[i] is not None for i in record.outputs):
        from ovshim.gradients import recorder_of

        recorder = recorder_of(job, generation, builder, record.outputs, seen, leaves)
    made = recorder or builder
    return Served(
        engine,
        inputs,
        made,
        tuple(outputs),
        seen.structure,
        record.checked,
        _finite(record, seen) if job.may_overflow else (),
        recorder,
    )


def limits_of(job: Job) -> dict[int, tuple[int, int]]:
    """The values that the call's tensors may hold, by index, where the job's precision sets them an
    end."""
    return half_limits(job.tensors) if job.may_overflow else {}


def _finite(record: Record, seen: Look) -> tuple[int, ...]:
    """Which of the computed tensors are finite in eager's answer to the example."""
    computed = [seen.leaves[i] for i in record.outputs]
    floats = ((n, x) for n, x in enumerate(computed) if isinstance(x, torch.Tensor))
    return tuple(n for n, x in floats if x.is_floating_point() and bool(x.isfinite().all()))


def _refuse_overlaps(record: Record, seen: Look) -> None:
    """Raise BuildStopped where eager's outputs have memory in common that the graph's would not, or
    the views among them another place in autograd's graph."""
    why = refusal(seen.overlaps, record.views)
    if why is not None:
        raise BuildStopped(why)
    for leaf, view in record.views.items():
        without = seen.sources[leaf] is None and seen.sources[view.of] is None
        if not without and seen.sources[leaf] != Sources((), (), (view.of,)):
            raise BuildStopped(reason("aliases-input", "a view of another output, computed apart"))
    below = {i for source in seen.sources if source is not None for i in source.outputs}
    if below & set(record.views):
        raise BuildStopped(reason("aliases-input", "an output is computed from a view of one"))


def eager_of(job: Job, views: Views) -> Eager:
    """What the job's graph is compared with, of whose outputs these are taken of others."""
    return Eager(job.module, job.method, job.call, job.kind, job.leaves, job.tolerance, views)


def matcher_of(kind: Kind, pattern: Pattern, size_guards: Sequence[str], graph: Graph) -> Matcher:
    """Tells which calls a plan is for."""
    # It never meets a size of 0 that its proof has not seen: kernels differ there.
    open_ = [
        f"s{t}[{d}] > 0" for t, dims in enumerate(pattern) for d, n in enumerate(dims) if n is None
    ]
    return compile_matcher(kind, pattern, [*size_guards, *open_], graph.ordered, graph.strict)


def _add_exact(
    job: Job,
    served: Served,
    record: Record,
    entry: Entry | None,
    source: Path,
    below: float | None = None,
) -> None:
    """See `tiny.add_exact`."""

    def compiled(further: Mapping[str, Any], sizes: Sequence[Sequence[int]]) -> Engine:
        return _compiled(job, source, record, job.hint, None, further, sizes)

    def prove(exact: Served) -> None:
        draws = 1 if job.lowering is not None and job.lowering.samples is not None else 3
        prove_values(eager_of(job, record.views), exact, job.tensors, job.check_time, draws)

    add_exact(job, served, record, entry, compiled, prove, below)


def plan_of(
    job: Job,
    served: Served,
    record: Record,
    generation: Generation,
    cache: str,
    entry: Entry | None,
) -> Plan:
    """The plan of a graph that is proved, after its race.

    Args:
        cache: "hit" or "miss"; "off" without an entry.
    """
    graph = _graph_of(job, served, record, generation)
    _add_exact(job, served, record, entry, graph.source)
    inputs = range(len(job.tensors)) if served.inputs is None else served.inputs
    by_engine = {i: n for n, i in enumerate(inputs) if i in usual(job.tensors, record.limits)}
    plan = Plan(
        kind=job.kind,
        pattern=record.pattern,
        match=matcher_of(job.kind, record.pattern, record.size_guards, graph),
        values_fit=compile_value_check(job.tensors, record.limits),
        other_values_fit=compile_value_check(job.tensors, record.limits, beside=by_engine),
        served=served,
        reason=None,
        generation=generation,
        precision=job.precision,
        grad=job.grad,
        example=sizes_of(job.leaves),
        precision_run=job.precision_run,
        lowered=record.lowered,
        modules=job.modules_run,
        warnings=job.warnings,
        error=record.error,
        cache=cache,
        cache_path=None if entry is None else str(entry.path),
        family=None if entry is None else entry.family,
        bytes=None if entry is None else sum(f["size"] for f in entry.manifest["files"].values()),
        route=record.route,
        size_guards=record.size_guards,
        value_guards=record.value_guards,
        pinned=record.pinned,
        graph=graph,
        seconds=job.seconds,
    )
    served.engine.check(by_engine.values())
    decide(
        job, plan, record, entry, lambda s: _add_exact(job, served, record, entry, graph.source, s)
    )
    plan.way = job.way
    add_rival(job, plan, record, entry)
    return plan


def _graph_of(job: Job, served: Served, record: Record, generation: Generation) -> Graph:
    assert job.source is not None
    return Graph(
        source=job.source,
        hint=job.hint,
        properties=record.rung.properties,
        structure=served.structure,
        outputs=served.outputs,
        dtypes=record.dtypes,
        limits=record.limits,
        ordered=tuple(ordered_keywords(job.call, job.arguments()[1])),
        strict=generation.asks_layout,
        leaves=job.leaves,
        met=record.met,
        # int8 is right within the range that calibration has shown it.
        drawn=job.lowering is None or job.lowering.samples is None,
    )


def eager_plan(
    job: Job, why: Reason, entry: Entry | None = None, pattern: Pattern | None = None
) -> Plan:
    """A plan that eager serves: for every size of this kind, where the reason is the module's."""
    pattern = pattern or tuple((None,) * tensor.dim() for tensor in job.tensors)
    try:
        generation = Generation(job.module, grad=job.grad, values=False)
    except ValueError:  # weights that lie in no one place: nothing to watch, the reason stays
        generation = None
    return Plan(
        kind=job.kind,
        pattern=pattern,
        match=compile_matcher(job.kind, pattern),
        values_fit=lambda tensors: True,
        other_values_fit=lambda tensors: True,
        served=None,
        reason=why,
        generation=generation,
        precision=job.precision,
        grad=job.grad,
        example=sizes_of(job.leaves),
        cache="off" if entry is None else "hit",
        cache_path=None if entry is None else str(entry.path),
        seconds=job.seconds,
    )
