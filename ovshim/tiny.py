"""Tiny graphs: below 50 µs a call, waking other threads and pinning them may cost more than it
brings. Such a graph is compiled in other ways too, and the fastest is kept."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ovshim import runtime
from ovshim.cache import Entry
from ovshim.capture import distinct_tensors
from ovshim.infer import Engine
from ovshim.job import Job
from ovshim.race import rounds
from ovshim.record import Record

__all__ = ["fastest"]

# Calls that take longer are not tried: 9.5 µs instead of 12 on a layer of 256, nothing from 512 up.
_TINY_SECONDS = 50e-6
# More weights than these are not even read in that time.
_TINY_BYTES = 8 << 20
_BUDGET_SECONDS = 0.03
# What another way has to gain before it takes the place of the usual one.
_MARGIN = 1.05

_WAYS: Mapping[str, Mapping[str, Any]] = {
    "usual": {},
    "not pinned": {"ENABLE_CPU_PINNING": False},
}


def fastest(
    job: Job,
    source: Path,
    record: Record,
    entry: Entry | None,
    compiled: Callable[[Mapping[str, Any]], Engine],
) -> Engine:
    """The graph of a job as it runs fastest; sets `job.way`.

    Found out once on each processor, and kept with the entry.

    Args:
        compiled: compiles the graph with further properties.
    """
    options = job.options
    asked = options.streams is not None or options.threads is not None
    plain = options.device == "CPU" and options.hint == "latency" and not options.properties
    if asked or not plain or not _is_small(source):
        return compiled({})
    where = f"{runtime.processor()} threads={job.placement['threads']}"
    known = record.ways.get(where)
    if known is not None and known in _WAYS:
        job.way = known
        return compiled(_WAYS[known])
    usual = compiled({})
    inputs = [job.leaves[i] for i in distinct_tensors(job.kind)]
    usual.run(inputs)  # packs weights and takes memory
    started = time.perf_counter()
    usual.run(inputs)
    if time.perf_counter() - started > 2 * _TINY_SECONDS:
        return usual
    (seconds,) = rounds([lambda: usual.run(inputs)], budget=0.0)
    if statistics.median(seconds) > _TINY_SECONDS:
        return usual
    ways = list(_WAYS)
    with job.stage("compile"):
        engines = [usual if not _WAYS[way] else compiled(_WAYS[way]) for way in ways]
        calls = [lambda engine=engine: engine.run(inputs) for engine in engines]
        medians = list(map(statistics.median, rounds(calls, _BUDGET_SECONDS)))
    best = min(range(len(medians)), key=medians.__getitem__)
    chosen = best if medians[0] > _MARGIN * medians[best] else 0
    job.way = ways[chosen]
    if entry is not None:
        job.store.amend(entry, "ways", {**record.ways, where: job.way})
    return engines[chosen]


def _is_small(source: Path) -> bool:
    try:
        return source.with_suffix(".bin").stat().st_size <= _TINY_BYTES
    except OSError:  # it may be as large as it likes then
        return False
