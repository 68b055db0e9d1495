"""From a language model to a decoding: capture of one step, proof, race.

    fingerprint → entry in the cache
        hit:   guards hold? → compile → one short probe
        miss:  capture → make stateful → publish → compile → all probes
    → race → decoding

Whatever goes wrong on the way becomes a decoding that eager serves, with the reason.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from transformers.cache_utils import DynamicCache, DynamicSlidingWindowLayer, EncoderDecoderCache

from ovshim.assemble import generation_of
from ovshim.building import own_modes
from ovshim.cache import Entry, StoreError
from ovshim.capture import TRACE_LOCK, CaptureError, Request, capture
from ovshim.checks import COMPRESSED
from ovshim.decode.decoding import Decoding, Ready, compile_fits
from ovshim.decode.engine import StatefulEngine
from ovshim.decode.experts import experts_of, made_dense
from ovshim.decode.finish import by_eager, finished, run_race
from ovshim.decode.key import family_of, tolerance_of
from ovshim.decode.manner import Causal
from ovshim.decode.overflow import refuse_overflow
from ovshim.decode.prove import Prover
from ovshim.decode.record import StepRecord
from ovshim.decode.states import make_stateful
from ovshim.decode.step import Unfit
from ovshim.errors import OptionError
from ovshim.generation import Generation, GuardFailedError
from ovshim.guards import BadGuardError
from ovshim.job import MOVED, BuildStopped, Job
from ovshim.kept import holds_here, keep_data, known_data, processor_of, published
from ovshim.reasons import Reason, reason
from ovshim.shortage import SHORTAGE, build_failure
from ovshim.signals import raise_heard
from ovshim.signature import flatten_call, kind_of

__all__ = ["build"]

log = logging.getLogger("ovshim")

_PRECISIONS = COMPRESSED | {"fp32", "bf16", "fp16"}
# Of the caches that a step is captured with, which are our own objects. (With those above them.)
_CLASSES = (DynamicCache, DynamicSlidingWindowLayer, EncoderDecoderCache)
_FOR_GOOD = frozenset({"unsupported-op", "value-dependent", "crashed-before", "proof-failed"})


def build(job: Job, original: Any, manner: Causal, shown: Mapping[str, Any]) -> Decoding:
    """The decoding for a job, whose kind and leaves are of no account.

    Args:
        original: the user's own forward; `job.call` is what it resolves to.
        shown: arguments of a call of eager that the proof is to look at as well; perhaps none.

    Raises:
        OptionError: calibration data that is none, unless a call of the user's began it.
    """
    with own_modes(job.grad):
        try:
            made = _Build(job, original, manner, shown).run()
        except BuildStopped as stopped:
            why = stopped.reason
            if job.weights_moved():
                why = MOVED
            made = by_eager(job, why)
            made.trouble = stopped.__cause__
        except OptionError as error:
            if not job.lenient:
                raise
            made = by_eager(job, reason("calibration-unfit", str(error)))
        except Exception as error:  # a fault of ours must not become one of the user's program
            log.debug("the build failed", exc_info=True)
            made = by_eager(job, build_failure(error))
    name, code = type(job.module).__qualname__, f" ({made.reason.code})" if made.reason else ""
    spent = time.perf_counter() - job.started
    log.info("%s, decoding: %s%s in %.2f s, cache %s", name, made.path, code, spent, made.cache)
    return made


class _Build:
    def __init__(self, job: Job, original: Any, manner: Causal, shown: Mapping[str, Any]) -> None:
        self.job = job
        self.original = original
        self.manner = manner
        self.shown = shown

    def run(self) -> Decoding:
        job = self.job
        if job.precision not in _PRECISIONS:
            raise BuildStopped(reason("decode-precision", job.precision))
        with job.stage("preflight"):
            try:
                self.form = self.manner.form(job.call)
            except Unfit as unfit:
                raise BuildStopped(reason("decode-unfit", str(unfit))) from unfit
            if self.form.dtype is torch.float64 and job.options.precision is None:
                raise BuildStopped(reason("double-precision"))
        self.prover = Prover(job, self.manner, self.form)
        with job.stage("fingerprint"):
            family = family_of(job, self.manner)
        if family is None:
            return self._from_capture(None)
        if job.store.died_building(family):
            self._in_child(family)
        with job.store.marked(family):
            return self._from_cache(family) or self._alone(family)

    # --- the cache ----------------------------------------------------------------------------

    def _alone(self, family: str) -> Decoding:
        job = self.job
        with job.store.lock(family, timeout=job.seconds_left(), meanwhile=job.check_time):
            return self._from_cache_or_capture(family)

    def _from_cache_or_capture(self, family: str) -> Decoding:
        found = self._from_cache(family)
        if found is not None:
            return found
        self.job.note_details()
        try:
            return self._from_capture(family)
        except BuildStopped as stopped:
            self._keep_verdict(family, stopped.reason)
            raise

    def _in_child(self, family: str) -> None:
        job = self.job
        # Both are held for the child; see `ovshim.build`.
        with (
            job.store.lock(family, timeout=job.seconds_left(), meanwhile=job.check_time),
            TRACE_LOCK,
        ):
            outcome = job.tried_in_child(lambda: self._from_cache_or_capture(family))
        if outcome == "crashed":
            self._keep_verdict(family, reason("crashed-before"))
            raise BuildStopped(reason("crashed-before"))
        self.job.check_time()

    def _keep_verdict(self, family: str, why: Reason) -> None:
        raise_heard()
        if why.code not in _FOR_GOOD or self.job.weights_moved():
            return
        record = StepRecord(processor=processor_of(why, self.job))
        head = self._head(record) | {"verdict": why.to_dict()}
        try:
            self.job.store.publish(family, "0", self.job.keep_details, head)
        except StoreError as error:
            log.debug("a verdict is not cached: %s", error)

    def _head(self, record: StepRecord) -> dict[str, Any]:
        return {**self.job.identity, "graph": record.to_json()}

    def _from_cache(self, family: str) -> Decoding | None:
        job = self.job
        for entry in job.store.entries(family):
            try:
                record = StepRecord.of_entry(entry, self._ranks())
                generation = generation_of(job, record, _CLASSES)
            except (BadGuardError, GuardFailedError, KeyError, TypeError, ValueError) as error:
                log.info("the entry %s is passed over: %s", entry.path, error)
                continue
            if not holds_here(record.processor, job):
                continue  # what its kernels make of a graph, this one's may make otherwise
            if record.verdict is not None:
                return by_eager(job, record.verdict, entry)
            self._refuse_overflow(entry)
            lease = job.store.hold(entry)
            if lease is None:
                continue
            try:
                engine, record, entry = self.prover.still_right(entry, record)
            except BuildStopped as trouble:
                lease.release()
                if job.weights_moved() or trouble.reason.code in ("build-too-slow", SHORTAGE):
                    raise
                log.info("the entry %s does not serve: %s", entry.path, trouble)
                job.store.discard(entry)
                continue
            weakref.finalize(engine, lease.release)
            return self._finished(engine, record, generation, entry, "hit")
        return None

    def _refuse_overflow(self, entry: Entry | None) -> None:
        """Raise BuildStopped where float16 does not hold the values of this job: an entry may have
        been proved with others."""
        job = self.job
        if not job.may_overflow:
            return
        known = [] if entry is None else known_data(entry)
        with job.stage("proof"):
            job.in_range = refuse_overflow(job, self.manner, self.form, self.shown, known)
        if entry is not None:
            keep_data(job, entry, job.in_range)

    def _ranks(self) -> list[int]:
        return [len(sizes) for sizes in self.form.sizes_of(1, 1, 1, 1)]

    # --- a miss -------------------------------------------------------------------------------

    def _from_capture(self, family: str | None) -> Decoding:
        job = self.job
        self._refuse_overflow(None)
        with job.stage("capture"), TRACE_LOCK:
            model, record = self._captured()
            generation = generation_of(job, record, _CLASSES)
        if job.precision in COMPRESSED:
            from ovshim.precision import graphs, quantize

            with job.stage("lower"):
                graphs.prepare(model)
                model = quantize.compress(model, job.precision)
        with job.stage("capture"):
            make_stateful(model, self._names(), len(self.form.sizes))
            named = None if family is None else self._named(family, record)
            source, entry, let_go = published(self.job, model, named)
        del model  # from here on the graph is a file: torch's weights and OpenVINO's share nothing
        with job.proving(entry, let_go):
            engine, record = self.prover.first_right(source, record, entry)
            weakref.finalize(engine, let_go)
        if entry is not None:
            entry = job.store.amend(entry, "proof", record.proof_to_json())
            if job.in_range is not None:
                entry = job.store.amend(entry, "in_range", [job.in_range])
        return self._finished(engine, record, generation, entry, "miss")

    def _finished(
        self,
        engine: StatefulEngine,
        record: StepRecord,
        generation: Generation,
        entry: Entry | None,
        cache: str,
    ) -> Decoding:
        form = self.form
        fits = compile_fits(record.size_guards, form, record.most)
        ready = Ready(engine, form, fits, record.conventions)
        made = finished(self.job, ready, record, generation, entry, cache)
        made.tolerance = tolerance_of(self.job)
        if self.job.options.prefer == "faster":
            run_race(self.job, self.manner, made, record)
        return made

    def _captured(self) -> tuple[Any, StepRecord]:
        job, form = self.job, self.form
        experts = experts_of(job.module)
        call: Any = job.call if not experts else made_dense(self.original, experts)
        step, given, open_ = self.manner.example(form, call)
        leaves, structure = flatten_call(given, {})
        request = Request(
            step,
            step.forward,
            kind_of(leaves, structure),
            leaves,
            tuple(map(frozenset, open_)),
            tuple(range(1 + len(form.sizes))),
        )
        try:
            captured = capture(request)
        except CaptureError as refused:
            raise BuildStopped(refused.reason) from refused
        pinned = [
            f"{t}[{d}]"
            for t, dims in enumerate(open_)
            for d in sorted(dims)
            if captured.pattern[t][d] is not None
        ]
        if pinned or len(captured.outputs) != 1 + len(form.sizes):
            detail = f"sizes that change are fixed in it: {', '.join(pinned)}"
            raise BuildStopped(reason("capture-failed", detail))
        record = StepRecord(
            size_guards=captured.size_guards,
            value_guards=StepRecord.of_module(captured.value_guards, experts),
            code=captured.code,
            asks=captured.asks,
            route=captured.route,
            checked=captured.checked,
        )
        return captured.model, record

    def _named(self, family: str, record: StepRecord) -> tuple[str, str, dict[str, Any]]:
        head = self._head(record)
        text = json.dumps(head["graph"], sort_keys=True).encode()
        return family, hashlib.blake2b(text, digest_size=8).hexdigest(), head

    # --- both ---------------------------------------------------------------------------------

    def _names(self) -> list[str]:
        crossed = [f"cross.{number}" for number in range(len(self.form.cross))]
        return [*self.manner.inputs, *crossed]
