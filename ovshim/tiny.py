"""Tiny graphs: below 50 µs a call, waking other threads and pinning them may cost more than it
brings, and so may sizes that are left open. Such a graph is compiled in other ways too, and the
fastest is kept.

For the example's sizes alone it takes 2 to 8 µs less, and in one thread up to 4 less again. Calls
of other sizes go to the open graph, of which the whole proof is; the exact one is proved when the
open one has been. With several streams (`hint="throughput"`) it is in one: to hand a call to a
stream's thread and back takes longer than such a graph. Calls of larger sizes have the open one's
streams. The open graph is never in one thread of its own accord: there it takes 10 to 20 µs more to
notice that a call has failed (`single`).

What was found is noted by the bucket of the example's sizes, as races are: an example of one row
has to say nothing of one of 2,048."""

from __future__ import annotations

import dataclasses
import logging
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ovshim import runtime
from ovshim.buckets import compile_bucket
from ovshim.cache import Entry
from ovshim.infer import Engine
from ovshim.job import Job
from ovshim.plan import Served
from ovshim.race import rounds
from ovshim.record import Record
from ovshim.signature import sizes_of
from ovshim.single import SingleThreadEngine
from ovshim.verdict import placed

__all__ = ["add_exact", "fastest"]

log = logging.getLogger("ovshim")

# Calls that take longer gain nothing: 9.5 µs instead of 12 on a layer of 256, nothing from 512 up.
_TINY_SECONDS = 50e-6
# Tried are those of so many times as long: what a busy machine makes of it would be kept for good.
_BUSY = 2
# More weights than these are not even read in that time.
_TINY_BYTES = 8 << 20
_BUDGET_SECONDS = 0.015
# What another way has to gain before it takes the place of the usual one.
_MARGIN = 1.05

# How the graph of the example's sizes runs, by what is noted of it beside the open one's way.
_EXACT = ", exact sizes"
_IN_ONE_STREAM = ", exact sizes in one stream"
_IN_ONE_THREAD = ", exact sizes in one thread"

_USUAL = "usual"
_WAYS: Mapping[str, Mapping[str, Any]] = {
    _USUAL: {},
    "not pinned": {"ENABLE_CPU_PINNING": False},
}
_ONE_STREAM = {"PERFORMANCE_HINT": "LATENCY", "ENABLE_CPU_PINNING": False}
_ONE_THREAD = {**_ONE_STREAM, "INFERENCE_NUM_THREADS": 1}
# With several streams what would be tiny in one may take so many times as long; and where the open
# graph runs in one thread, so many.
_HANDED_OVER, _MARKED = 4, 2


def fastest(
    job: Job,
    source: Path,
    record: Record,
    entry: Entry | None,
    compiled: Callable[[Mapping[str, Any]], Engine],
) -> Engine:
    """The graph of a job as it runs fastest; sets `job.way` and `job.tiny`.

    Found out once on each processor for like sizes, and kept with the entry.

    Args:
        compiled: compiles the graph with further properties.
    """
    job.way, job.tiny = None, False
    options = job.options
    plain = options.device == "CPU" and options.streams is None and not options.properties
    if not plain or not _is_small(source):
        return compiled({})
    pinned = options.threads is None and not runtime.leaves_cores(torch.get_num_threads())
    ways = _WAYS if pinned else {_USUAL: _WAYS[_USUAL]}
    streams = options.hint == "throughput"
    known = record.ways.get(_where(job, record), "").partition(", ")[0]
    if known in ways:
        job.way = known
        return compiled(ways[known])
    usual = compiled({})
    engine, way = usual, _USUAL
    inputs = [job.leaves[i] for i in job.kind.distinct]
    job.tiny = _is_tiny(lambda: usual.run(inputs), _allowance(usual, streams))
    if job.tiny and not streams and len(ways) > 1:
        with job.stage("compile"):
            engines = {way: compiled(more) if more else usual for way, more in ways.items()}
            medians = _medians(engines.values(), inputs)
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
    below: float | None = None,
) -> None:
    """Let calls of the example's sizes be served by a graph of their own, where that is faster.

    Args:
        compiled: compiles the graph with further properties and for these sizes of its inputs.
        prove: raises where that is wrong.
        below: also where it is not tiny, if it takes less than so many seconds.
    """
    if (
        job.way is None
        or isinstance(job.options.precision, Mapping)  # of which nobody would read back what runs
        or served.engine.exact is not None  # of the other grad mode's plan
    ):
        return
    ways = _ways_of_exact(job, job.way, record, served.engine)
    noted = record.ways.get(_where(job, record), "")
    known = next((way for way in ways if noted.endswith(way)), None)
    if known is not None:
        ways = {known: ways[known]}
    elif not job.tiny and below is None:
        return
    inputs = [job.leaves[i] for i in job.kind.distinct]
    sizes = [tuple(tensor.shape) for tensor in inputs]
    try:
        with job.stage("compile"):
            engines = {way: compiled(more, sizes) for way, more in ways.items()}
        most = math.inf if below is None else below
        if job.options.hint == "throughput":
            most = min(most, _TINY_SECONDS)
        best = known or _best(served.engine, engines, inputs, most)
        if best is None:
            return
        with job.stage("proof"):
            prove(dataclasses.replace(served, engine=engines[best]))
    except Exception:  # the module's own too, on values drawn anew: the open graph is proved
        log.debug("no graph for %s alone", sizes, exc_info=True)
        return
    served.engine.leave(sizes, engines[best])
    _keep(job, record, entry, f"{job.way}{best}")


def _ways_of_exact(
    job: Job, way: str, record: Record, usual: Engine
) -> Mapping[str, Mapping[str, Any]]:
    """In which ways a graph of the example's sizes may run, beside the open one's."""
    streams = job.options.hint == "throughput"
    ways: dict[str, Mapping[str, Any]] = {}
    if streams:
        if job.options.threads is None:
            ways[_IN_ONE_STREAM] = _ONE_STREAM
    elif any(n is None for dims in record.pattern for n in dims):
        ways[_EXACT] = _WAYS[way]
    safe = runtime.safe_precision(job.hint, device="CPU", hint="latency", streams=1, threads=1)
    if (
        job.hint == safe
        and job.options.threads is None
        and not isinstance(usual, SingleThreadEngine)
    ):
        ways[_IN_ONE_THREAD] = _ONE_THREAD
    return ways


def _best(
    usual: Engine, engines: Mapping[str, Engine], inputs: Sequence[torch.Tensor], most: float
) -> str | None:
    """The fastest way; None where none is clearly faster than the usual one, or it takes more than
    so many seconds."""
    before, *medians = _medians([usual, *engines.values()], inputs)
    seconds, best = min(zip(medians, engines, strict=True), default=(before, None))
    if before <= _MARGIN * seconds or seconds > most:
        return None
    return best


def _medians(engines: Iterable[Engine], inputs: Sequence[torch.Tensor]) -> list[float]:
    calls = [lambda engine=engine: engine.run(inputs) for engine in engines]
    return list(map(statistics.median, rounds(calls, _BUDGET_SECONDS)))


def _where(job: Job, record: Record) -> str:
    _, of_sizes = compile_bucket(record.pattern, record.size_guards)
    bucket = of_sizes(sizes_of(job.leaves))
    return f"{job.measured_on}{placed(job.options)} bucket={bucket}"


def _keep(job: Job, record: Record, entry: Entry | None, way: str) -> None:
    job.way = way
    where = _where(job, record)
    if entry is not None and record.ways.get(where) != way:
        job.store.amend(entry, "ways", {**record.ways, where: way})


def _allowance(usual: Engine, streams: bool) -> int:
    if streams:
        return _HANDED_OVER
    return _MARKED if isinstance(usual, SingleThreadEngine) else 1


def _is_tiny(call: Callable[[], Any], times: int) -> bool:
    """Whether it may be, if it takes so many times as long as it might."""
    call()  # packs weights and takes memory
    if _seconds(call) > 2 * _BUSY * times * _TINY_SECONDS:
        return False
    (seconds,) = rounds([call], budget=0.0)
    return min(seconds) <= _BUSY * times * _TINY_SECONDS


def _seconds(call: Callable[[], Any]) -> float:
    """The shortest of three."""
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
