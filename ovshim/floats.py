"""What is left in floats where products, or weights alone, are integers: fp32, or bf16 where that
is faster.

Of a step of decoding with compressed weights the weights are the cost; of a prompt, and of a batch,
the arithmetic is, which bf16 halves. A processor without units for it is slower in bf16, and what a
plugin claims to have says nothing of that: so both are run, once on each processor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ovshim import runtime
from ovshim.cache import Entry
from ovshim.checks import INTEGERS
from ovshim.infer import EngineDead
from ovshim.job import BuildStopped, Job
from ovshim.race import race

__all__ = ["floats_of", "in_fp32", "may_be_refused"]

# How much faster the less exact one has to be, and what finding out may take, in seconds.
_MARGIN = 1.1
_SECONDS = 0.3
# A busy machine decides nothing at first, and what is chosen then is for the life of this process.
_ATTEMPTS = 2

# What acts in fp32 alone: whoever asks for one of them by name gets it.
_OF_FP32: Mapping[str, Callable[[Any], bool]] = {
    "DYNAMIC_QUANTIZATION_GROUP_SIZE": lambda value: str(value) != "0",
    **dict.fromkeys(
        ("KV_CACHE_PRECISION", "KEY_CACHE_PRECISION", "VALUE_CACHE_PRECISION"),
        lambda value: str(value).lower() == "f32",
    ),
}


def floats_of(
    job: Job,
    known: Mapping[str, str],
    entry: Entry | None,
    ways: Callable[[], tuple[Callable[[], Any], Callable[[], Any]]],
) -> str:
    """The precision of what stays in floats, as the hint to compile with.

    Args:
        known: what was found out before, by processor and threads.
        entry: where the same is kept, with what is found out now.
        ways: gives two calls that compute the same, with that in fp32 and in bf16.
    """
    own, here = job.own_precision, job.measured_on
    if own != "fp32" or runtime.safe_precision("bf16", **job.placement) != "bf16":
        return own
    if any(name in _OF_FP32 and _OF_FP32[name](v) for name, v in job.options.properties.items()):
        return own
    if here in known:
        return known[here]
    if not _has_bf16(job.options.device):
        return own
    try:
        exact, lower = ways()
        with job.stage("compile"):
            for _ in range(_ATTEMPTS):
                finish = race(exact, lower, min(_SECONDS, job.seconds_left() / 8))
                if finish.decided:
                    break
    except (EngineDead, ValueError):  # if it was the first of them, it dies in the proof again
        return "fp32"
    except BuildStopped as stopped:
        if stopped.reason.code != "compile-failed":
            raise
        return "fp32"
    chosen = "bf16" if finish.low > 1.0 and finish.eager > _MARGIN * finish.candidate else "fp32"
    if finish.decided:
        _keep(job, entry, {**known, here: chosen})
    return chosen


def may_be_refused(job: Job, chosen: str) -> bool:
    """Whether a proof that has failed may succeed with `in_fp32`."""
    return chosen == "bf16" and job.own_precision == "fp32" and job.precision in INTEGERS


def in_fp32(job: Job, known: Mapping[str, str], entry: Entry | None) -> Mapping[str, str]:
    """What is known once bf16 was found too inexact: fp32, on this processor."""
    found = {**known, job.measured_on: "fp32"}
    _keep(job, entry, found)
    return found


def _keep(job: Job, entry: Entry | None, found: Mapping[str, str]) -> None:
    if entry is not None:
        job.store.amend(entry, "rest", dict(found))


def _has_bf16(device: str) -> bool:
    return any(d.name == device and "bf16" in d.precisions for d in runtime.devices())
