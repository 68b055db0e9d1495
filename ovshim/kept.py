"""What a process leaves to the next one beside a graph: that there is none for good, which data is
in range, the compiled graph."""

from __future__ import annotations

import logging
from typing import Any

from ovshim import blobs, early, runtime
from ovshim.cache import Entry, StoreError
from ovshim.job import Job
from ovshim.reasons import Reason
from ovshim.record import Record
from ovshim.signals import raise_heard
from ovshim.signature import sizes_of
from ovshim.values import holds_nan

__all__ = [
    "head_of",
    "is_of_nan",
    "keep_compiled",
    "keep_data",
    "keep_verdict",
    "known_data",
    "processor_of",
]

log = logging.getLogger("ovshim")

# Found by work that need not be done again: an entry's key holds all that it depends on. Of the
# second sort it may depend on the call's sizes too.
_OF_SIZES = frozenset({"proof-failed", "compile-failed"})
_FOR_GOOD = frozenset({"unsupported-op", "value-dependent", "crashed-before"}) | _OF_SIZES
# Sets of data of which it is kept that float16 holds them.
_MOST_DATA = 32
# What kernels make of a graph, another processor's may make otherwise: a cache may be an image's.
_OF_PROCESSOR = frozenset({"crashed-before"}) | _OF_SIZES


def keep_compiled(job: Job, entry: Entry) -> None:
    """Let the next process find the compiled graph of an entry, and begin with it."""
    if not job.imported and job.model is not None:
        blobs.keep(job.store, entry, job.options.device, job.settings, job.model)
    job.model = None
    early.remember(job, entry)


def is_of_nan(job: Job, why: Reason) -> bool:
    """Whether it says nothing of the graph: its proof has failed with a NaN in the example."""
    return why.code == "proof-failed" and holds_nan(job.leaves)


def head_of(job: Job, record: Record) -> dict[str, Any]:
    """What the manifest of an entry says from the beginning."""
    return {**job.identity, "graph": record.graph(job.kind)}


def keep_verdict(job: Job, family: str, why: Reason) -> None:
    """Let no process look for again what is so for good."""
    raise_heard()
    if why.code not in _FOR_GOOD or job.weights_moved() or is_of_nan(job, why):
        return
    exact = why.code in _OF_SIZES
    pattern = sizes_of(job.leaves) if exact else tuple((None,) * t.dim() for t in job.tensors)
    record = Record(pattern, (), (), "", (), (), verdict=why, processor=processor_of(why))
    head = {**head_of(job, record), "verdict": why.to_dict()}
    try:
        job.store.publish(family, record.variant(job.kind), job.keep_details, head)
    except StoreError as error:
        log.debug("a verdict is not cached: %s", error)


def processor_of(why: Reason) -> str:
    """The only processor that a verdict holds for; empty: it holds for all."""
    return runtime.processor() if why.code in _OF_PROCESSOR else ""


def known_data(entry: Entry) -> list[str]:
    """The data that float16 was seen to hold."""
    kept = entry.manifest.get("in_range")
    return list(map(str, kept)) if isinstance(kept, list) else []


def keep_data(job: Job, entry: Entry, data: str) -> None:
    """Let no process look at that data again."""
    known = known_data(entry)
    if data not in known:
        job.store.amend(entry, "in_range", [*known, data][-_MOST_DATA:])
