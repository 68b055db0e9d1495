"""A graph out of the cache, compiled in another thread while it is still found out what is wanted.

OpenVINO needs nothing of Python while it compiles; the fingerprint and eager's answer for the proof
need nothing of OpenVINO. So they go side by side. Which entry it will be, a hint says: the one that
served last for a module that looks like this one. It decides nothing: what was compiled is used
where the fingerprint has led to the very same entry, and is dropped otherwise.
"""

from __future__ import annotations

import json
import logging
import platform
import threading
from collections.abc import Mapping
from typing import Any

import torch
import xxhash

from ovshim import blobs, runtime
from ovshim.cache import Entry
from ovshim.job import Job
from ovshim.record import Record
from ovshim.signature import sizes_of
from ovshim.version import __version__

__all__ = ["Early", "begin", "begin_with", "remember", "settings_of"]

log = logging.getLogger("ovshim")

_SAMPLE_BYTES = 64


class Early:
    """A compilation under way, of an entry that is sound."""

    def __init__(self, job: Job, entry: Entry, record: Record) -> None:
        self.entry = entry
        self._store, self._device = job.store, job.options.device
        self._settings = settings_of(job, record, job.precision)
        self._compiled: tuple[Any, bool] | None = None
        self._thread = threading.Thread(target=self._run, name="ovshim-compile")
        try:
            # No daemon: one that is inside OpenVINO when the interpreter goes ends the process.
            self._thread.start()
        except RuntimeError as error:  # the program ends, or has all the threads it may have
            log.debug("no thread to compile in: %s", error)
            self._settings = {}

    def take(
        self, entry: Entry, device: str, settings: Mapping[str, Any]
    ) -> tuple[Any, bool] | None:
        """As `blobs.compiled`, once; None where it was another one, or could not be compiled."""
        wanted = (entry.path, device, dict(settings))
        if (self.entry.path, self._device, self._settings) != wanted:
            return None
        self._thread.join()
        compiled, self._compiled = self._compiled, None
        return compiled

    def _run(self) -> None:
        try:
            with self._store.marked(self.entry.family):  # should the process die of it
                self._compiled = blobs.compiled(
                    self._store, self.entry, self._device, self._settings
                )
        except Exception:  # whoever needs it meets the same, and knows what to do
            log.debug("nothing was compiled early", exc_info=True)


def begin(job: Job) -> Early | None:
    """Begin with the entry that a hint names; None where there is none, or it would not pay."""
    job.hint_key = _key(job) if _pays(job) else None
    if any(plan.served is not None for plan in job.siblings):
        return None  # it will most likely be the graph of one of them
    path = None if job.hint_key is None else job.store.hinted(job.hint_key)
    if path is None or not blobs.is_large(path):
        return None
    entry = job.store.sound(path)
    if entry is None or "proof" not in entry.manifest:
        return None
    if job.store.died_building(entry.family):
        job.died = entry.family
        return None
    try:
        record = Record.of_entry(entry, job.kind)
    except Exception:  # of a manifest that is not as we write them
        log.debug("%s is not begun with", path, exc_info=True)
        return None
    return Early(job, entry, record) if record.fits(sizes_of(job.leaves)) else None


def begin_with(job: Job, entry: Entry, record: Record) -> Early | None:
    """Begin with an entry that was found; None where it would not pay."""
    return Early(job, entry, record) if _pays(job) and blobs.is_large(entry.path) else None


def remember(job: Job, entry: Entry) -> None:
    """Let the entry be the one that the next process begins with."""
    if job.hint_key is not None and blobs.is_large(entry.path):
        job.store.hint(job.hint_key, entry)


def settings_of(
    job: Job, record: Record, precision: str, further: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """What OpenVINO is told of a graph, with a precision as the hint, and further properties."""
    safe = runtime.safe_precision(precision, **job.placement)
    properties = {**dict(record.rung.properties), **job.options.properties}
    settings = runtime.settings(precision=safe, **job.placement, properties=properties)
    return {**settings, **(further or {})}


def _pays(job: Job) -> bool:
    # What another thread makes nobody waits for; and elsewhere the precision is not known yet.
    plain = job.options.precision in (None, "fp32", "bf16", "fp16")
    return plain and job.apart is None and not job.candidate and job.store.enabled


def _key(job: Job) -> str | None:
    """What is seen of a module at a glance, the first bytes of its weights included: others that
    were trained from the same ones differ there. None for tensors that show no bytes."""
    options = job.options
    facts = [
        *(__version__, runtime.version(), runtime.processor(), torch.__version__),
        *(platform.python_version(), type(job.module).__module__, type(job.module).__qualname__),
        *(job.method, str(job.kind), job.grad, options.device, job.precision, job.tolerance),
        sorted((name, str(value)) for name, value in options.properties.items()),
    ]
    digest = xxhash.xxh3_128(json.dumps(facts).encode())
    try:
        for name, tensor in (*job.module.named_parameters(), *job.module.named_buffers()):
            digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
            count = min(tensor.numel(), _SAMPLE_BYTES // tensor.element_size())
            first = tensor.detach().as_strided((count,), (1,), tensor.storage_offset())
            digest.update(first.view(torch.uint8).numpy().data)
    except (RuntimeError, TypeError, NotImplementedError) as error:
        log.debug("no hint: %s", error)
        return None
    return digest.hexdigest()
