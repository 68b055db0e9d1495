"""`memory="lean"`: torch's copy of the weights is let go once OpenVINO serves.

They lie in a file then, bit by bit as they are (OpenVINO's graph has folded, transposed or rounded
them), and the module's tensors are over a private map of it (`mapped`). The file is an entry of the
cache like any other, found by what it holds, so that processes and plans share one.
"""

from __future__ import annotations

import json
import logging
import mmap
import threading
import warnings
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import xxhash

from ovshim import mapped, pages
from ovshim.cache.scratch import scratch
from ovshim.errors import OvshimWarning
from ovshim.fingerprint import Unkeyable
from ovshim.fingerprint.weights import weights as weights_of
from ovshim.generation import Generation
from ovshim.job import Job
from ovshim.plan import Plan

__all__ = ["let_go"]

log = logging.getLogger("ovshim")

_FILE = "weights.bin"
# For so long an operation that another thread has begun may read what a tensor was over before.
_GRACE_SECONDS = 30.0


def let_go(job: Job, plan: Plan, generations: Iterable[Generation]) -> None:
    """Give back the memory of the weights of a module for which a plan was made.

    What somebody else holds stays where it is. Where no file can be written all of it does, with a
    warning.

    Args:
        generations: of plans that were made before, which go on to hold.
    """
    if plan.graph is not None:
        pages.drop(plan.graph.source)
        pages.drop(plan.graph.source.with_suffix(".bin"))
    with torch.inference_mode(False), torch.no_grad():
        blocks = mapped.held_alone(job.module)
        if blocks:
            _move(job, plan, blocks, generations)
    pages.trim()


def _move(
    job: Job, plan: Plan, blocks: list[mapped.Block], generations: Iterable[Generation]
) -> None:
    before = [g for g in {id(g): g for g in generations}.values() if g.holds()]
    try:
        file_map, release, old = _mapped(job, blocks)
    except (OSError, ValueError) as error:
        warnings.warn(
            f"memory='lean' keeps the weights of {type(job.module).__qualname__} in memory: no "
            f"file for them could be written ({error}). Make room in the cache, or name another "
            "place by cache_dir.",
            OvshimWarning,
            stacklevel=2,
        )
        return
    weakref.finalize(file_map, release)
    for generation in before:
        generation.moved()
    plan.given_back = sum(block.storage.nbytes() for block in blocks)
    log.info("%s: gave back %d bytes of weights", type(job.module).__qualname__, plan.given_back)
    blocks.clear()
    # In the thread that hands the module over nobody else is expected to use it.
    if (job.lenient or job.apart is not None) and threading.active_count() > 1:
        timer = threading.Timer(_GRACE_SECONDS, _forget, [old])
        timer.daemon = True
        timer.start()


def _forget(old: list[Any]) -> None:
    old.clear()
    pages.trim()


def _mapped(
    job: Job, blocks: list[mapped.Block]
) -> tuple[mmap.mmap, Callable[[], object], list[Any]]:
    """As `mapped.map_onto`, over a file that is found or written; and what lets go of the file."""

    def write(directory: Path) -> None:
        mapped.write(directory / _FILE, blocks)

    key = _key(job, blocks)
    if key is not None and job.store.enabled:
        found = job.store.entries(key)
        head = {
            "module": type(job.module).__qualname__,
            "graph": {"signature": "weights, for memory='lean'"},
        }
        entry = found[0] if found else job.store.publish(key, "0", write, head)
        lease = job.store.hold(entry)
        if lease is not None:
            try:
                file_map, old = mapped.map_onto(entry.file(_FILE), blocks)
                return file_map, lease.release, old
            except (OSError, ValueError, KeyError) as error:
                lease.release()
                log.warning("%s does not serve: %s", entry.path, error)
                job.store.discard(entry)
    directory, remove = scratch(write)
    try:
        file_map, old = mapped.map_onto(directory / _FILE, blocks)
    except (OSError, ValueError):
        remove()
        raise
    return file_map, remove, old


def _key(job: Job, blocks: list[mapped.Block]) -> str | None:
    """What the file is found by: the weights, which of them, and how they lie in it."""
    try:
        known = {} if job.fingerprint is None else job.fingerprint.parts
        weights = known.get("weights") or weights_of(job.module)[0]
    except Unkeyable:
        return None
    text = json.dumps(["lean", weights, mapped.described(job.module, blocks)])
    return xxhash.xxh3_128_hexdigest(text.encode())
