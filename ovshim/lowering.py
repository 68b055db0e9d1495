"""What `precision=` makes of a captured graph, beyond a hint to OpenVINO.

    capture → quantize, compress or lower → publish → compile → prove

A build without int8, compressed weights or rules does not come here.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Container, Iterable, Mapping
from typing import Any

from ovshim import executed, runtime
from ovshim.capture import Captured, distinct_tensors, names
from ovshim.checks import COMPRESSED, INTEGERS
from ovshim.errors import PrecisionWarning
from ovshim.job import BuildStopped, Job
from ovshim.precision import calibration, graphs, islands, quantize, rules
from ovshim.precision.calibration import Misfit, Samples
from ovshim.precision.lowering import Lowering
from ovshim.precision.overflow import overflow
from ovshim.progress import bar
from ovshim.reasons import reason
from ovshim.signature import sizes_of

__all__ = [
    "CHECKED_FOR_OVERFLOW",
    "lowered",
    "lowering_of",
    "refuse_overflow",
    "samples_of",
    "warnings_of",
]

# So many samples are looked at for overflow; and rules for more modules than so many help nobody.
CHECKED_FOR_OVERFLOW = 32
_LONGEST_CURE = 12

_RAN = {"fp32": "f32", "bf16": "bf16", "fp16": "f16", "int8": "i8"}
# Operations of the execution graph of which int8 is expected in a module that asks for it. Products
# of activations with each other (attention) stay in floats.
_WEIGHTED = frozenset(
    {
        "Convolution",
        "Deconvolution",
        "FullyConnected",
        "GroupConvolution",
        "FullyConnectedCompressed",
    }
)
# Others than products whose precision is worth a look.
_REDUCING = frozenset({"MVN", "NormalizeL2", "RMSNorm", "Softmax"})


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
            detail = str(error).strip().splitlines()[-1][:200]
            raise BuildStopped(reason("compile-failed", detail)) from error
    if lowering.marked:
        names.name_by_module(model)
    return dataclasses.replace(captured, model=model), told


def _quantized(
    job: Job, lowering: Lowering, captured: Captured, model: Any
) -> tuple[Any, dict[str, Any]]:
    assert lowering.samples is not None
    pattern = captured.pattern
    tensors = list(job.kind.tensors)
    inputs = [tensors.index(i) for i in distinct_tensors(job.kind)]
    learned, judged = (
        [[sample[t] for t in inputs] for sample in lowering.inputs_that_fit(pattern, which)]
        for which in (lowering.samples.learned_from, lowering.samples.held_out)
    )
    if not learned or not judged:
        detail = f"none is of the sizes {[list(dims) for dims in pattern]}"
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


def lowering_of(job: Job) -> Lowering | None:
    """What is to be made of the job's graph; None where a hint does all there is to do.

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
    elif job.precision not in INTEGERS:
        return None
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
            raise
        raise BuildStopped(reason("calibration-unfit", str(misfit))) from misfit
    for sample in found.tensors:
        job.open_sizes(sizes_of(sample), frozenset())
    return found


def refuse_overflow(job: Job, known: Container[str] = ()) -> str | None:
    """Raise BuildStopped where values leave float16's range in what is to run in it, on the example
    or on calibration data, with the rules that keep those modules in fp32.

    Args:
        known: data that was looked at before, as this returns it.

    Returns:
        What stands for the data; None where nothing is to run in float16.
    """
    asked = job.options.precision
    wishes = asked if isinstance(asked, Mapping) else {rules.DEFAULT: job.precision}
    if "fp16" not in wishes.values() or job.own_precision == "fp16":
        return None
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


# --- what ran in the end ----------------------------------------------------------------------


def warnings_of(job: Job, compiled: Any) -> tuple[dict[str, str], list[PrecisionWarning]]:
    """The precision that each module runs in, by its path (for rules), and what there is to warn of
    because it is not what was asked for."""
    lowering, wishes = job.lowering, job.options.precision
    if lowering is None or not isinstance(wishes, Mapping):
        # A hint is about products; what only adds and compares runs as the plugin likes.
        told = _of_hint(job)
        kinds = (kind for kind, _, _ in executed.operations(compiled)) if told else ()
        return {}, told if any(map(executed.computes, kinds)) else []
    ran: dict[str, Counter[str]] = {}
    wrong: dict[tuple[str, str], list[str]] = {}
    asked = rules.by_module(wishes, lowering.modules, job.own_precision)
    for paths, kind, precision in names.ran_in(compiled):
        path = paths[0]
        if not (executed.computes(kind) or kind in _REDUCING):
            continue
        ran.setdefault(path, Counter())[precision] += 1
        wanted = asked.get(path)
        expected = wanted != "int8" or kind in _WEIGHTED
        if wanted is not None and expected and _RAN[wanted] != precision:
            wrong.setdefault((wanted, precision), []).append(path)
    told = [
        PrecisionWarning(wanted, f"OpenVINO runs {_listed(paths)} in {ran_in}: {why}", remedy)
        for (wanted, ran_in), paths in wrong.items()
        for why, remedy in [_why(job, ran_in)]
    ]
    return {path: ", ".join(sorted(count)) for path, count in ran.items()}, told


def _of_hint(job: Job) -> list[PrecisionWarning]:
    ran = job.precision_run
    if ran is None or job.options.precision not in ("bf16", "fp16"):
        return []
    if ran in (_RAN[job.precision], "unknown"):
        return []
    why, remedy = _why(job, ran)
    return [PrecisionWarning(job.precision, f"OpenVINO runs it in {ran}: {why}", remedy)]


def _why(job: Job, ran: str) -> tuple[str, str]:
    """Why something runs in another precision than it was given, and what to do."""
    if runtime.safe_precision("bf16", **job.placement) == "fp32":
        return (
            "with one thread to a stream its lower precision can end the process.",
            "Give threads= or streams= so that each stream has two threads.",
        )
    name = {"f32": "fp32", "f16": "fp16", "i8": "int8"}.get(ran, ran)
    return (
        "the processor, or the plugin for it, has no other.",
        f"Give precision {name!r} to say so.",
    )


def _listed(paths: Iterable[str]) -> str:
    distinct = [path or "the root module" for path in dict.fromkeys(paths)]
    return ", ".join(distinct[:4]) + (f" and {len(distinct) - 4} more" if distinct[4:] else "")
