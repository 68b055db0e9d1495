"""Under which key the cache keeps a decoding."""

from __future__ import annotations

import logging

import transformers

from ovshim.decode.manner import Causal
from ovshim.eager import LOW_TOLERANCE
from ovshim.fingerprint import Unkeyable, fingerprint
from ovshim.job import Job, versions

__all__ = ["family_of", "is_cached", "tolerance_of"]

log = logging.getLogger("ovshim")


def tolerance_of(job: Job) -> float:
    """The largest relative L2 error of logits that is allowed."""
    return LOW_TOLERANCE if job.tolerance is None else job.tolerance


def family_of(job: Job, manner: Causal) -> str | None:
    """The family of entries for a job; None where nothing is cached."""
    if not job.store.enabled:
        return None
    options = job.options
    decisive = [job.precision, options.device, sorted(options.properties.items())]
    try:
        found = fingerprint(
            job.module,
            job.method,
            inputs=f"decoding by {type(manner).__name__}",
            options=repr([*decisive, tolerance_of(job)]),
            environment={**versions(), "transformers": transformers.__version__},
        )
    except Unkeyable as unkeyable:
        log.info("%s is not cached: %s", type(job.module).__qualname__, unkeyable)
        return None
    job.fingerprint = found
    return found.key


def is_cached(job: Job, manner: Causal) -> bool:
    """Whether there are entries for a module like the job's. Raises whatever a build meets."""
    family = family_of(job, manner)
    return family is not None and bool(job.store.entries(family))
