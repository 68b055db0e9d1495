"""What a process leaves to the next one: a graph, that there is none for good, which data is in
range, the compiled graph."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ovshim import blobs, early, runtime
from ovshim.cache import Entry, StoreError
from ovshim.cache.scratch import scratch
from ovshim.job import Job
from ovshim.reasons import Reason
from ovshim.record import Record
from ovshim.signals import raise_heard
from ovshim.signature import sizes_of
from ovshim.values import holds_nan

if TYPE_CHECKING:
    import openvino as ov

__all__ = [
    "head_of",
    "holds_here",
    "is_of_nan",
    "keep_compiled",
    "keep_data",
    "keep_verdict",
    "known_data",
    "processor_of",
    "published",
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


def published(
    job: Job, model: ov.Model, named: tuple[str, str, Mapping[str, Any]] | None
) -> tuple[Path, Entry | None, Callable[[], None]]:
    """A graph as a file: in the cache, or, where that cannot be, in a directory of our own. Returns
    the IR, its entry, and what lets go of the file when it is not needed any more.

    Args:
        named: family, variant and manifest of its entry; None: it is not to have one.
    """

    def write(directory: Path) -> None:
        # Not compressed: fp16 weights would be off by 2e-3 on a BERT.
        target = str(directory / "model.xml")
        runtime.openvino().save_model(model, target, compress_to_fp16=False)
        job.keep_details(directory)

    if named is not None:
        family, variant, head = named
        try:
            entry = job.store.publish(family, variant, write, head)
            lease = job.store.hold(entry)
            if lease is not None:
                return entry.file("model.xml"), entry, lease.release
        except StoreError as error:
            log.warning("%s is not cached: %s", type(job.module).__qualname__, error)
    directory, remove = scratch(write)
    return directory / "model.xml", None, remove


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
    record = Record(pattern, (), (), "", (), (), verdict=why, processor=processor_of(why, job))
    head = {**head_of(job, record), "verdict": why.to_dict()}
    try:
        job.store.publish(family, record.variant(job.kind), job.keep_details, head)
    except StoreError as error:
        log.debug("a verdict is not cached: %s", error)


def processor_of(why: Reason, job: Job) -> str:
    """The only processor that a verdict holds for; empty: it holds for all."""
    return _here(job) if why.code in _OF_PROCESSOR else ""


def holds_here(processor: str, job: Job) -> bool:
    """Whether a verdict for that processor is one for this job."""
    return processor in ("", _here(job))


def _here(job: Job) -> str:
    """The processor, with what it computes lower precisions in: one thread to a stream has none."""
    if job.options.precision in (None, "fp32"):
        return runtime.processor()
    return f"{runtime.processor()}, {runtime.safe_precision('bf16', **job.placement)}"


def known_data(entry: Entry) -> list[str]:
    """The data that float16 was seen to hold."""
    kept = entry.manifest.get("in_range")
    return list(map(str, kept)) if isinstance(kept, list) else []


def keep_data(job: Job, entry: Entry, data: str) -> None:
    """Let no process look at that data again."""
    known = known_data(entry)
    if data not in known:
        job.store.amend(entry, "in_range", [*known, data][-_MOST_DATA:])
