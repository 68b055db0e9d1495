"""What `precision=` makes of a captured graph, beyond a hint to OpenVINO.

    capture → quantize, compress or lower → publish → compile → prove

A build without int8, compressed weights, rules or float16 does not come here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Container, Mapping
from typing import Any

from ovshim import runtime
from ovshim.capture import Captured, names
from ovshim.checks import COMPRESSED
from ovshim.errors import CalibrationError
from ovshim.job import BuildStopped, Job
from ovshim.precision import calibration, graphs, islands, quantize, rules
from ovshim.precision.calibration import Misfit, Samples
from ovshim.precision.lowering import Lowering
from ovshim.precision.overflow import overflow
from ovshim.progress import bar
from ovshim.reasons import reason
from ovshim.shortage import compile_failure
from ovshim.signature import sizes_of

__all__ = [
    "CHECKED_FOR_OVERFLOW",
    "lowered",
    "lowering_of",
    "refuse_overflow",
    "samples_of",
]

# So many samples are looked at for overflow; and rules for more modules than so many help nobody.
CHECKED_FOR_OVERFLOW = 32
_LONGEST_CURE = 12


def lowered(job: Job, captured: Captured) -> tuple[Captured, dict[str, Any]]:
    """The graph of a job with a lowering, lowered, and what a report says of it.

    Raises:
        BuildStopped: the graph's operations do not say where they come from, no sample is of
            its sizes, or an operation does not exist in the precision it is to have.
    """
    lowering = job.lowering
    assert lowering is not None
    model = captured.model
    graphs.prepare(model)
    told: dict[str, Any] = {}
    if lowering.marked and all(names.path_of(node) is None for node in model.get_ops()):
        raise BuildStopped(reason("no-module-paths", f"captured by {captured.route}"))
    if lowering.precision in COMPRESSED:
        model = quantize.compress(model, lowering.precision)
    elif lowering.samples is not None:
        model, told = _quantized(job, lowering, captured, model)
    if lowering.has_islands:
        try:
            islands.lower(model, lambda node: _float_of(lowering, node))
        except RuntimeError as error:
            raise BuildStopped(compile_failure(error)) from error
    if lowering.marked:
        names.name_by_module(model)
    return dataclasses.replace(captured, model=model), told


def _quantized(
    job: Job, lowering: Lowering, captured: Captured, model: Any
) -> tuple[Any, dict[str, Any]]:
    assert lowering.samples is not None
    pattern, guards = captured.pattern, captured.size_guards
    tensors = list(job.kind.tensors)
    inputs = [tensors.index(i) for i in job.kind.distinct]
    learned, judged = (
        [[sample[t] for t in inputs] for sample in lowering.inputs_that_fit(pattern, which, guards)]
        for which in (lowering.samples.learned_from, lowering.samples.held_out)
    )
    if not learned or not judged:
        held_to = f", where {' and '.join(guards)}" if guards else ""
        detail = f"none is of the sizes {[list(dims) for dims in pattern]}{held_to}"
        raise BuildStopped(reason("calibration-unfit", detail))
    ignored = [
        node.get_friendly_name()
        for node in model.get_ops()
        if lowering.modules and _of(lowering, node) not in ("int8", None)
    ]
    made = quantize.quantize(
        model, learned, judged, ignored, lambda items, title: bar(items, title, job.options)
    )
    return made.model, {"preset": made.preset}


def _of(lowering: Lowering, node: Any) -> str | None:
    path = names.path_of(node)
    return None if path is None else lowering.modules.get(path)


def _float_of(lowering: Lowering, node: Any) -> str | None:
    """The floating type of an operation; what is int8 has its rest in fp32."""
    precision = _of(lowering, node)
    return "fp32" if precision == "int8" else precision


def lowering_of(job: Job) -> Lowering:
    """What is to be made of the graph of a job that `lowers`.

    Raises:
        CalibrationError: there is no calibration data that can be read, or it is of another kind
            than the job's calls (for a job that a call of the user's began: BuildStopped).
    """
    asked = job.options.precision
    modules: Mapping[str, str] = {}
    if isinstance(asked, Mapping):
        paths = [path for path, _ in job.module.named_modules(remove_duplicate=False)]
        modules = rules.by_module(asked, paths, job.own_precision)
        # Gated feed-forward layers in bf16 can end the process where streams have one thread.
        if runtime.safe_precision("bf16", **job.placement) == "fp32":
            floats = {"bf16": "fp32", "fp16": "fp32"}
            modules = {path: floats.get(p, p) for path, p in modules.items()}
    key: list[Any] = [sorted(modules.items())]
    samples = None
    if job.precision == "int8" or "int8" in modules.values():
        samples = samples_of(job)
        key.append(samples.digest)
    if not modules or samples is not None:
        key.append(quantize.parameters())
    return Lowering(job.precision, modules, samples, repr(key))


def samples_of(job: Job) -> Samples:
    """The calibration data as calls of the job's kind; sizes that change in it are opened.

    Raises: see `lowering_of`.
    """
    options = job.options
    args, kwargs = job.arguments()
    given = options.calibration, options.transform
    try:
        with job.stage("calibration"):
            found = calibration.collect(*given, job.call, args, kwargs, job.kind)
    except Misfit as misfit:
        if not job.lenient:
            told = misfit.name, misfit.value, misfit.allowed, misfit.remedy
            raise CalibrationError(*told) from None
        raise BuildStopped(reason("calibration-unfit", str(misfit))) from misfit
    for sample in found.tensors:
        job.open_sizes(sizes_of(sample), frozenset())
    return found


def refuse_overflow(job: Job, known: Container[str] = ()) -> str:
    """For a job that `may_overflow`: raise BuildStopped where values leave float16's range in what
    is to run in it, on the example or on calibration data, with the rules that keep those modules
    in fp32.

    Args:
        known: data that was looked at before, as this returns it.

    Returns:
        What stands for the data.
    """
    asked = job.options.precision
    wishes = asked if isinstance(asked, Mapping) else {rules.DEFAULT: job.precision}
    paths = [path for path, _ in job.module.named_modules(remove_duplicate=False)]
    wanted = rules.by_module(wishes, paths, job.own_precision)
    samples = job.lowering.samples if job.lowering else None
    if samples is None and job.options.calibration is not None:
        samples = samples_of(job)
    data = calibration.digest_of([job.tensors]) + ("" if samples is None else samples.digest)
    if data in known:
        return data
    sets = [job.tensors, *([] if samples is None else samples.tensors[:CHECKED_FOR_OVERFLOW])]
    for tensors in sets:
        job.check_time()
        found = overflow(
            job.module,
            lambda tensors=tensors: job.call_with(job.leaves_with(tensors)),  # type: ignore[misc]
            tensors,
            lambda path: wanted[path] == "fp16",
        )
        if found is not None:
            where = f"{found.path or 'the root module'} reaches {found.value:.3g}"
            cure = {**wishes, **dict.fromkeys(found.paths, "fp32")}
            by_rules = "" not in found.paths and len(found.paths) <= _LONGEST_CURE
            where += f"; cured by precision={cure}" if by_rules else ""
            raise BuildStopped(reason("overflow", where))
    return data
