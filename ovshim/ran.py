"""What a compiled graph runs in, where that is not what was asked for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from ovshim import executed, runtime
from ovshim.errors import PrecisionWarning
from ovshim.job import Job

if TYPE_CHECKING:
    from ovshim.precision.lowering import Lowering

__all__ = ["warnings_of"]

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


def warnings_of(job: Job, compiled: Any) -> tuple[dict[str, str], list[PrecisionWarning]]:
    """The precision that each module runs in, by its path (for rules), and what there is to warn of
    because it is not what was asked for."""
    wishes = job.options.precision
    if job.lowering is not None and isinstance(wishes, Mapping):
        return _by_module(job, wishes, job.lowering, compiled)
    if wishes == "int8":
        return {}, _of_integers(job, compiled)
    # A hint is about products; what only adds and compares runs as the plugin likes.
    told = _of_hint(job)
    kinds = (kind for kind, _, _ in executed.operations(compiled)) if told else ()
    return {}, told if any(map(executed.computes, kinds)) else []


def _of_integers(job: Job, compiled: Any) -> list[PrecisionWarning]:
    """Where weights were rounded to integers, and nothing is computed in them."""
    found = list(executed.operations(compiled))
    if not found or any(executed.computes(kind) and ran in ("i8", "u8") for kind, ran, _ in found):
        return []
    why = f"OpenVINO runs it in {job.precision_run}: it has no kernels in integers for this."
    return [PrecisionWarning("int8", why, "Give another precision, or leave it out.")]


def _by_module(
    job: Job, wishes: Mapping[str, str], lowering: Lowering, compiled: Any
) -> tuple[dict[str, str], list[PrecisionWarning]]:
    from ovshim.capture import names
    from ovshim.precision import rules

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
