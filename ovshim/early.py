"""A graph out of the cache, compiled in another thread while it is still found out what is wanted,
and called once with the input of the short proof.

OpenVINO needs nothing of Python while it compiles; the imports of the rest of this package, the
twin, the fingerprint and eager's answer for the proof need nothing of OpenVINO. So they go side by
side. Which entry it will be, a hint says: the one that served last for a module that looks like
this one. It decides nothing: what was compiled is used where the fingerprint has led to the very
same entry, and is dropped otherwise.
"""

from __future__ import annotations

import ctypes
import dataclasses
import itertools
import json
import logging
import os
import platform
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import xxhash
from torch import nn

from ovshim import blobs, executed, runtime
from ovshim.attributes import tensors_of
from ovshim.building import own_modes
from ovshim.cache.entry import Entry
from ovshim.cache.store import Store
from ovshim.inherited import all_of, keep_for_good
from ovshim.options import Options
from ovshim.record import Record
from ovshim.signature import flatten_call, kind_of, sizes_of
from ovshim.version import exact_version
from ovshim.wanted import Wanted, settings_of

if TYPE_CHECKING:
    from ovshim.infer import Engine
    from ovshim.job import Job

__all__ = ["Ahead", "Early", "begin", "begin_after", "begin_for", "begin_with", "remember"]

log = logging.getLogger("ovshim")

_SAMPLE_BYTES = 64
_LOOK_UP_SECONDS = 1.0
# Compared with its checksum while the graph is compiled: it takes as long as all that comes before.
_LARGE_FILE = "model.bin"
# From so many bytes on a compilation takes longer than what is done beside it, and eager is asked
# meanwhile: then it is compared behind the compilation, in that thread. With less, that thread
# would wait for the interpreter at each piece (BERT-base, 436 MB: 20 ms less; ResNet-50, 102 MB:
# 20 ms more).
_BEHIND_BYTES = 256 << 20
# A fork waits so long for compilations: their locks would stay locked in the child.
_FORK_SECONDS = 30.0


@dataclasses.dataclass(eq=False)
class Ahead:
    """What was begun before the fingerprint was known.

    Attributes:
        hint_key: what the next process looks for the entry by; None where it would not pay.
        died: the family of the entry that it would have been, where a process has died of that.
        early: the compilation under way, where one is.
    """

    hint_key: str | None = None
    died: str | None = None
    early: Early | None = None


@dataclasses.dataclass(eq=False)
class Compiled:
    """What comes of a compilation.

    Attributes:
        graph: the compiled model.
        imported: whether the cache had it compiled.
        precision_run: see `executed.precision_run`; None: not looked at yet.
        engine: what has called it; None: nobody has.
    """

    graph: Any
    imported: bool = False
    precision_run: str | None = None
    engine: Engine | None = None


class Early:
    """A compilation under way, and behind it the first call, on the input of the short proof: it
    is the one that packs weights and makes kernels.

    Args:
        unread: whether the entry's large file is still to be compared with its checksum.
    """

    def __init__(self, wanted: Wanted, entry: Entry, record: Record, unread: bool = False) -> None:
        self.entry = entry
        self._store, self._device = wanted.store, wanted.options.device
        self._settings = settings_of(wanted, record, wanted.precision)
        self._compiled: Compiled | None = None
        self._call: Callable[[Any], tuple[Engine, list[torch.Tensor]]] | None = None
        self._told, self._over = threading.Event(), threading.Event()
        self._given: list[Any] = []
        self._answer: list[torch.Tensor] | None = None
        self._taken = False
        self._sound = None if unread else True
        _known.add(self)
        # No daemon: one that is inside OpenVINO when the interpreter goes ends the process.
        self._thread = threading.Thread(target=self._run, name="ovshim-compile", daemon=False)
        try:
            self._thread.start()
        except RuntimeError as error:  # the program ends, or has all the threads it may have
            log.debug("no thread to compile in: %s", error)
            self._settings = {}

    def go_on(self, wanted: Wanted, record: Record) -> None:
        """Have it called as well, if the entry is sound."""
        try:
            self._given, self._call = _small_call(wanted, record)
        except Exception:  # of an example that cannot be made small: the proof will see to it
            log.debug("nothing is called early", exc_info=True)
        finally:
            self._told.set()

    def stop(self) -> None:
        """Nobody will need it."""
        self._settings = {}
        self._told.set()

    def is_over(self) -> bool:
        """Whether it has ended."""
        return self._over.is_set() or not self._thread.is_alive()  # in a forked child it is not

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until it has ended, so many seconds at the most; whether it has."""
        # Not for the thread: an interrupt in `join` would let Python take it for ended, and end
        # while it is inside of OpenVINO.
        return self.is_over() or self._over.wait(timeout)

    def is_sound(self) -> bool:
        """Whether the entry is what it was, every byte of it; else it must not serve. Waits."""
        self.wait()
        return self._looked_at()

    def take(self, entry: Entry, device: str, settings: Mapping[str, Any]) -> Compiled | None:
        """What came of it, once; None where it was another one, or could not be compiled."""
        wanted = (entry.path, device, dict(settings))
        if (self.entry.path, self._device, self._settings) != wanted:
            return None
        self.wait()
        compiled, self._compiled = self._compiled, None
        self._taken = compiled is not None
        return compiled

    def answer(self, leaves: Sequence[Any]) -> list[torch.Tensor] | None:
        """What the graph that was taken computes of these leaves of a call; None where it was not
        asked about them."""
        # Not before it is asked: what begins a start has to be short.
        from ovshim.answered import hold_the_same

        answer, self._answer = self._answer, None
        if not self._taken or len(self._given) != len(leaves):
            return None
        return answer if hold_the_same(_tensors(self._given), _tensors(leaves)) else None

    def is_here(self) -> bool:
        """Whether this thread is the one that is about it."""
        return threading.current_thread() is self._thread

    def keep_in_child(self) -> None:
        """Keep what a child has inherited of OpenVINO."""
        keep_for_good(self._compiled)

    def _run(self) -> None:
        try:
            with self._store.marked(self.entry.family):  # should the process die of it
                compiled = Compiled(
                    *blobs.compiled(self._store, self.entry, self._device, self._settings)
                )
                compiled.precision_run = executed.precision_run(compiled.graph)
                if not self._looked_at():
                    return
                while not self._told.wait(_LOOK_UP_SECONDS):
                    if not threading.main_thread().is_alive():
                        return  # who would have told was interrupted, and the program ends
                if self._call is not None:
                    # Where it fails the compiled graph must not be used any more.
                    compiled.engine, self._answer = self._call(compiled.graph)
                self._compiled = compiled
        except Exception:  # whoever needs it meets the same, and knows what to do
            log.debug("nothing was compiled early", exc_info=True)
        finally:
            self._over.set()

    def _looked_at(self) -> bool:
        if self._sound is None:
            self._sound = _is_still(self._store, self.entry)
        return self._sound


def begin_for(
    module: nn.Module, options: Options, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Ahead | None:
    """Begin for an example that nothing was looked at yet of. None where that goes wrong, in
    whatever way of the module's own: the build will see to it."""
    try:
        leaves, structure = flatten_call(args, kwargs)
        store = Store(options.cache_dir, quiet=True)
        kind = kind_of(leaves, structure)
        wanted = Wanted(module, options.methods[0], options, store, kind, leaves, grad=False)
        with torch.inference_mode(False):
            return begin(wanted)
    except Exception:
        log.debug("nothing was begun early", exc_info=True)
        return None


def begin_after(job: Job) -> Ahead | None:
    """Begin for a call that eager has answered. None where that goes wrong: see above."""
    try:
        with own_modes(job.grad):
            there = any(plan.served is not None for plan in job.siblings)
            return begin(job, there, behind=True)
    except Exception:
        log.debug("nothing was begun early", exc_info=True)
        return None


def begin(wanted: Wanted, there: bool = False, behind: bool = False) -> Ahead:
    """Begin with the entry that a hint names, if there is one and it pays.

    Args:
        there: whether the graph that is wanted is most likely compiled already.
        behind: whether nobody waits for it, so that all that can be done in its thread is.
    """
    if not _pays(wanted):
        return Ahead()
    store, ahead = wanted.store, Ahead(_key(wanted))
    path = None if there or ahead.hint_key is None else store.hinted(ahead.hint_key)
    if path is None or not blobs.is_large(path):
        return ahead
    entry = store.sound(path, unread=_LARGE_FILE)
    if entry is None or "proof" not in entry.manifest:
        return ahead
    try:
        record = Record.of_entry(entry, wanted.kind)
        fits = record.fits(sizes_of(wanted.leaves))
    except Exception:  # of a manifest that is not as we write them
        log.debug("%s is not begun with", path, exc_info=True)
        return ahead
    if store.died_building(entry.family):
        ahead.died = entry.family
    elif fits and record.verdict is None:
        behind = behind or blobs.is_large(path, _BEHIND_BYTES)
        early = Early(wanted, entry, record, unread=behind)
        try:
            if behind or _is_still(store, entry):
                early.go_on(wanted, record)
                ahead.early = early
        finally:
            if ahead.early is None:  # not sound, or interrupted
                early.stop()
    return ahead


def _is_still(store: Store, entry: Entry) -> bool:
    """Whether an entry, read but for its large file, is sound. Another may have taken its place
    since: what is compiled is what was read."""
    sound = store.sound(entry.path)
    return sound is not None and sound.manifest["files"] == entry.manifest["files"]


def begin_with(job: Job, entry: Entry, record: Record) -> None:
    """Begin with an entry that was found, if it pays."""
    job.ahead.early = None
    if job.awaited and _pays(job) and blobs.is_large(entry.path):
        job.ahead.early = Early(job, entry, record)
        job.ahead.early.go_on(job, record)


def remember(job: Job, entry: Entry) -> None:
    """Let the entry be the one that the next process begins with."""
    key = None if job.ahead is None else job.ahead.hint_key
    if key is not None and blobs.is_large(entry.path):
        job.store.hint(key, entry)


def _small_call(
    wanted: Wanted, record: Record
) -> tuple[list[Any], Callable[[Any], tuple[Engine, list[torch.Tensor]]]]:
    """The input of the short proof, and what calls a compiled graph with it."""
    # Not before the compilation is under way.
    from ovshim.inputs import small_leaves
    from ovshim.single import engine_for

    threads = wanted.placement["threads"]
    with torch.no_grad():
        leaves = small_leaves(wanted.kind, wanted.leaves, record.pattern, record.sizes)
    tensors = [leaves[i] for i in wanted.kind.distinct]
    inputs, outputs = [tensor.dtype for tensor in tensors], record.computed

    def call(compiled: Any) -> tuple[Engine, list[torch.Tensor]]:
        engine = engine_for(compiled, threads, inputs, outputs)
        return engine, engine.run(tensors)

    return leaves, call


def _tensors(leaves: Sequence[Any]) -> list[torch.Tensor]:
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


def _pays(wanted: Wanted) -> bool:
    # Elsewhere the precision is not known yet.
    return wanted.options.precision in (None, "fp32", "bf16", "fp16") and wanted.store.enabled


def _key(wanted: Wanted) -> str | None:
    """What is seen of a module at a glance, the first bytes of its weights included: others that
    were trained from the same ones differ there. None for tensors that show no bytes."""
    module, options = wanted.module, wanted.options
    facts = [
        *(exact_version(), runtime.version(), runtime.processor(), torch.__version__),
        *(platform.python_version(), type(module).__module__, type(module).__qualname__),
        *(
            wanted.method,
            str(wanted.kind),
            wanted.grad,
            options.device,
            wanted.precision,
            wanted.tolerance,
        ),
        sorted((name, str(value)) for name, value in options.properties.items()),
    ]
    digest = xxhash.xxh3_128(json.dumps(facts).encode())
    try:
        for name, tensor in itertools.chain(*tensors_of(module)):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
            digest.update(_first_bytes(tensor))
    except Exception as error:  # whatever a class of tensors raises: without a hint it goes as well
        log.debug("no hint: %s", error)
        return None
    return digest.hexdigest()


def _first_bytes(tensor: torch.Tensor) -> bytes:
    """By the address: a view for each tensor would take ten times as long. Raises TypeError for one
    that is elsewhere."""
    storage = tensor.untyped_storage()
    start, size = int(storage.data_ptr()), int(storage.nbytes())
    if not tensor.is_cpu:
        raise TypeError(f"a tensor on {tensor.device}")
    if start == 0:
        return b""
    offset = int(tensor.storage_offset()) * tensor.element_size()
    return ctypes.string_at(start + offset, max(0, min(_SAMPLE_BYTES, size - offset)))


_known: weakref.WeakSet[Early] = weakref.WeakSet()


def _before_fork() -> None:
    ends = time.monotonic() + _FORK_SECONDS
    for begun in all_of(_known):
        if not begun.is_here():
            begun.wait(max(0.0, ends - time.monotonic()))


def _after_fork_in_child() -> None:
    for begun in all_of(_known):
        begun.keep_in_child()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_child=_after_fork_in_child)
