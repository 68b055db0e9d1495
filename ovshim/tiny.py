"""Tiny graphs: below 50 µs a call, waking other threads and pinning them may cost more than it
brings, and so may sizes that are left open. Such a graph is compiled in other ways too, and the
fastest is kept.

For the example's sizes alone it takes 2 to 8 µs less. Calls of other sizes go to the open graph, of
which the whole proof is; the exact one is proved when the open one has been. With several streams
(`hint="throughput"`) it is in one: to hand a call to a stream's thread and back takes longer than
such a graph. Calls of larger sizes have the open one's streams. One stream of one thread would save
as much again, but hides failures (`single`)."""

from __future__ import annotations

import dataclasses
import logging
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ovshim import runtime
from ovshim.cache import Entry
from ovshim.infer import Engine
from ovshim.job import Job
from ovshim.plan import Served
from ovshim.race import rounds
from ovshim.record import Record

__all__ = ["add_exact", "fastest"]

log = logging.getLogger("ovshim")

# Calls that take longer are not tried: 9.5 µs instead of 12 on a layer of 256, nothing from 512 up.
_TINY_SECONDS = 50e-6
# More weights than these are not even read in that time.
_TINY_BYTES = 8 << 20
_BUDGET_SECONDS = 0.015
# What another way has to gain before it takes the place of the usual one.
_MARGIN = 1.05

_EXACT = ", exact sizes"
_IN_ONE_STREAM = ", exact sizes in one stream"

_WAYS: Mapping[str, Mapping[str, Any]] = {
    "usual": {},
    "not pinned": {"ENABLE_CPU_PINNING": False},
}
_ONE_STREAM = {"PERFORMANCE_HINT": "LATENCY", "ENABLE_CPU_PINNING": False}
# With several streams what would be tiny in one may take so many times as long.
_HANDED_OVER = 4


def fastest(
    job: Job,
    source: Path,
    record: Record,
    entry: Entry | None,
    compiled: Callable[[Mapping[str, Any]], Engine],
) -> Engine:
    """The graph of a job as it runs fastest; sets `job.way` and `job.tiny`.

    Found out once on each processor, and kept with the entry.

    Args:
        compiled: compiles the graph with further properties.
    """
    job.way, job.tiny = None, False
    options = job.options
    asked = options.streams is not None or options.threads is not None
    plain = options.device == "CPU" and not options.properties
    pinned = not runtime.leaves_cores(torch.get_num_threads())
    if asked or not plain or not pinned or not _is_small(source):
        return compiled({})
    streams = options.hint == "throughput"
    known = record.ways.get(_where(job), "").partition(", ")[0]
    if known in _WAYS:
        job.way = known
        return compiled(_WAYS[known])
    usual = compiled({})
    engine, way = usual, "usual"
    inputs = [job.leaves[i] for i in job.kind.distinct]
    job.tiny = _is_tiny(lambda: usual.run(inputs), _HANDED_OVER if streams else 1)
    if job.tiny and not streams:
        with job.stage("compile"):
            engines = {way: compiled(more) if more else usual for way, more in _WAYS.items()}
            calls = [lambda engine=engine: engine.run(inputs) for engine in engines.values()]
            medians = list(map(statistics.median, rounds(calls, _BUDGET_SECONDS)))
        seconds, best = min(zip(medians, engines, strict=True))
        if medians[0] > _MARGIN * seconds:
            engine, way = engines[best], best
    _keep(job, record, entry, way)
    return engine


def add_exact(
    job: Job,
    served: Served,
    record: Record,
    entry: Entry | None,
    compiled: Callable[[Mapping[str, Any], Sequence[Sequence[int]]], Engine],
    prove: Callable[[Served], Any],
) -> None:
    """Let calls of the example's sizes be served by a graph of their own, where that is faster.

    Args:
        compiled: compiles the graph with further properties and for these sizes of its inputs.
        prove: raises where that is wrong.
    """
    streams = job.options.hint == "throughput"
    known = record.ways.get(_where(job), "").endswith((_EXACT, _IN_ONE_STREAM))
    is_open = any(n is None for dims in record.pattern for n in dims)
    if (
        job.way is None
        or isinstance(job.options.precision, Mapping)  # of which nobody would read back what runs
        or not (is_open or streams)
        or not (known or job.tiny)
        or type(served.engine) is not Engine
        or served.engine.exact is not None  # of the other grad mode's plan
    ):
        return
    inputs = [job.leaves[i] for i in job.kind.distinct]
    sizes = [tuple(tensor.shape) for tensor in inputs]
    try:
        with job.stage("compile"):
            exact = compiled(_ONE_STREAM if streams else _WAYS[job.way], sizes)
        with job.stage("proof"):
            prove(dataclasses.replace(served, engine=exact))
    except Exception:  # the module's own too, on values drawn anew: the open graph is proved
        log.debug("no graph for %s alone", sizes, exc_info=True)
        return
    if not known:
        calls = [lambda engine=engine: engine.run(inputs) for engine in (served.engine, exact)]
        usual, other = map(statistics.median, rounds(calls, _BUDGET_SECONDS))
        if usual <= _MARGIN * other or (streams and other > _TINY_SECONDS):
            return
    served.engine.leave(sizes, exact)
    _keep(job, record, entry, job.way + (_IN_ONE_STREAM if streams else _EXACT))


def _where(job: Job) -> str:
    hint = "" if job.options.hint == "latency" else f" hint={job.options.hint}"
    return job.measured_on + hint


def _keep(job: Job, record: Record, entry: Entry | None, way: str) -> None:
    job.way = way
    known = record.ways.get(_where(job))
    if entry is not None and known != way:
        job.store.amend(entry, "ways", {**record.ways, _where(job): way})


def _is_tiny(call: Callable[[], Any], times: int) -> bool:
    """Whether it may be, if it takes so many times as long as it might."""
    call()  # packs weights and takes memory
    if _seconds(call) > 2 * times * _TINY_SECONDS:
        return False
    (seconds,) = rounds([call], budget=0.0)
    return min(seconds) <= times * _TINY_SECONDS


def _seconds(call: Callable[[], Any]) -> float:
    """The shortest of three: what a busy machine makes of it would be kept for good."""
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def _is_small(source: Path) -> bool:
    try:
        return source.with_suffix(".bin").stat().st_size <= _TINY_BYTES
    except OSError:  # it may be as large as it likes then
        return False
