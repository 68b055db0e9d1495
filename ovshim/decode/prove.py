"""A step's graph compiled, and proved against eager by short conversations."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from ovshim import executed, runtime
from ovshim.cache import Entry
from ovshim.checks import COMPRESSED
from ovshim.decode import probes
from ovshim.decode.decoding import compile_fits
from ovshim.decode.engine import StatefulEngine, stateful_engine_for
from ovshim.decode.key import tolerance_of
from ovshim.decode.manner import Causal
from ovshim.decode.probes import ProbeFailed
from ovshim.decode.record import StepRecord
from ovshim.decode.step import Form
from ovshim.floats import floats_of, in_fp32, may_be_refused
from ovshim.infer import EngineDead
from ovshim.job import BuildStopped, Job
from ovshim.plan import OutOfRangeError
from ovshim.ran import warnings_of
from ovshim.reasons import reason
from ovshim.shortage import compile_failure

__all__ = ["Prover"]

log = logging.getLogger("ovshim")

# Windows that are wider are not looked beyond: a proof of that length would take minutes.
_WIDEST = 1024
_KEPT_IN = {"bf16": "bf16", "fp16": "f16"}
# Properties that have cured graphs which OpenVINO compiled wrongly (see `ovshim.build`).
_LADDER: tuple[tuple[tuple[str, str], ...], ...] = ((), (("SNIPPETS_MODE", "DISABLE"),))
# What is timed to choose between floats: some tokens after a prompt, the longer one where there are
# positions for it; of an encoder-decoder model, whose first step is eager's, tokens alone.
_TIMED = (probes.Probe((128, *(1,) * 8)), probes.Probe((16, *(1,) * 8)))
_TIMED_ALONE = probes.Probe((1,) * 24)


class Prover:
    """Compiles and proves the graphs of one job."""

    def __init__(self, job: Job, manner: Causal, form: Form) -> None:
        self.job = job
        self.manner = manner
        self.form = form

    def first_right(
        self, source: Path, record: StepRecord, entry: Entry | None
    ) -> tuple[StatefulEngine, StepRecord]:
        """The graph compiled in the first of several ways that is proved.

        Raises:
            BuildStopped: there is none.
        """
        window = self.form.window
        wide = window is not None and window > _WIDEST
        record = dataclasses.replace(
            record,
            most=window if wide else None,
            conventions=self.manner.conventions(self.job.call, self.form),
        )
        first: BuildStopped | None = None
        for properties in _LADDER:
            record = dataclasses.replace(record, properties=properties)
            try:
                return self._right(source, record, entry)
            except BuildStopped as stopped:
                if stopped.reason.code not in ("proof-failed", "infer-failed"):
                    raise first or stopped from None
                log.info("%s, %s: %s", type(self.job.module).__qualname__, properties, stopped)
                first = first or stopped
        assert first is not None
        raise first

    def still_right(
        self, entry: Entry, record: StepRecord
    ) -> tuple[StatefulEngine, StepRecord, Entry]:
        """An entry's graph, and what is known of it then: it was proved, and is asked one thing
        again; or everything, where it was never proved in what it runs in here.

        Raises:
            BuildStopped: it is right no more.
        """
        engine = self.engine(entry.file("model.xml"), record, entry)
        if self.job.hint == "fp32" or self.job.ran_as in record.proved_in:
            return engine, self.proved(engine, record, [probes.small_probe()]), entry
        record = self._wholly_proved(engine, record)
        return engine, record, self.job.store.amend(entry, "proof", record.proof_to_json())

    def _wholly_proved(self, engine: StatefulEngine, record: StepRecord) -> StepRecord:
        window = self.form.window if record.most is None else None
        record = self.proved(engine, record, list(self.manner.probes(window)))
        return dataclasses.replace(record, proved_in=(*record.proved_in, self.job.ran_as))

    def _right(
        self, source: Path, record: StepRecord, entry: Entry | None
    ) -> tuple[StatefulEngine, StepRecord]:
        """The graph compiled and proved; where bf16 around its integers is not exact enough, both
        are done anew without."""
        while True:
            engine = self.engine(source, record, entry)
            try:
                return engine, self._wholly_proved(engine, record)
            except BuildStopped as stopped:
                inexact = stopped.reason.code == "proof-failed"
                if not inexact or not may_be_refused(self.job, self.job.hint):
                    raise
                log.info("%s, floats in bf16: %s", type(self.job.module).__qualname__, stopped)
                rest = in_fp32(self.job, record.rest, entry)
                record = dataclasses.replace(record, rest=rest)

    def engine(self, source: Path, record: StepRecord, entry: Entry | None) -> StatefulEngine:
        """The compiled graph. Raises BuildStopped where OpenVINO cannot."""
        job = self.job
        if job.precision in COMPRESSED:
            job.hint = floats_of(job, record.rest, entry, lambda: self._ways(source, record))
        else:
            job.hint = job.precision
        return self._compiled(source, record, job.hint)

    def _ways(
        self, source: Path, record: StepRecord
    ) -> tuple[Callable[[], None], Callable[[], None]]:
        """A conversation with the graph compiled in fp32, and with that in bf16."""
        manner = self.manner
        ends = [n for n in (manner.longest, record.most) if n is not None]
        fitting = [probe for probe in _TIMED if all(probe.length <= n for n in ends)]
        timed = _TIMED_ALONE if manner.probed_source else next(iter(fitting), _TIMED[-1])

        def through(engine: StatefulEngine) -> Callable[[], None]:
            def run() -> None:
                way = manner.candidate(self.job.call, self.form, engine, timed)
                for _ in probes.ask(timed, [way], manner.vocabulary):
                    pass

            return run

        exact, lower = (
            through(self._compiled(source, record, precision)) for precision in ("fp32", "bf16")
        )
        return exact, lower

    def _compiled(self, source: Path, record: StepRecord, wanted: str) -> StatefulEngine:
        job = self.job
        with job.stage("compile"):
            safe = runtime.safe_precision(wanted, **job.placement)
            # By default the plugin keeps them in 8 bits, in every precision but fp32.
            kept = {} if safe == "fp32" else {"KV_CACHE_PRECISION": _KEPT_IN[safe]}
            properties = {**kept, **dict(record.properties), **job.options.properties}
            settings = runtime.settings(precision=safe, **job.placement, properties=properties)
            try:
                compiled = runtime.compile_model(source, job.options.device, settings)
                job.precision_run = executed.precision_run(compiled)
                _, job.warnings = warnings_of(job, compiled)
                states = len(self.form.sizes)
                inputs = [torch.int64] * len(self.manner.inputs)
                if self.form.cross:
                    inputs = [*inputs[:-1], *[self.form.dtype] * (1 + len(self.form.cross))]
                threads = job.placement["threads"]
                about = inputs, states, self.form.dtype, record.checked
                engine = stateful_engine_for(compiled, threads, *about)
                engine.keys_and_values = executed.keys_and_values(compiled)
                return engine
            except (RuntimeError, TypeError, ValueError) as error:
                raise BuildStopped(compile_failure(error)) from error

    def proved(
        self, engine: StatefulEngine, record: StepRecord, asked: Sequence[probes.Probe]
    ) -> StepRecord:
        """The record, with what the proof has found. Raises BuildStopped where it fails."""
        with self.job.stage("proof"):
            try:
                return self._proved(engine, record, asked)
            except ProbeFailed as failed:
                raise BuildStopped(reason("proof-failed", str(failed))) from failed
            except (EngineDead, OutOfRangeError, ValueError) as dead:
                raise BuildStopped(reason("infer-failed", str(dead))) from dead

    def _proved(
        self, engine: StatefulEngine, record: StepRecord, asked: Sequence[probes.Probe]
    ) -> StepRecord:
        job, form = self.job, self.form
        tolerance, exact = tolerance_of(job), job.precision == "fp32"
        error, met = record.error, set(record.met)
        fits = compile_fits(record.size_guards, form, record.most)
        for seed, probe in enumerate(asked):
            job.check_time()
            ways = [
                self.manner.eager(job.call, form, probe),
                self.manner.candidate(job.call, form, engine, probe),
            ]
            done = 0
            answers = probes.ask(probe, ways, self.manner.vocabulary, seed)
            for n, (expected, found) in enumerate(answers):
                done += probe.pieces[n]
                error = max(error, probes.error_of(expected, found, tolerance, exact))
                sizes = len(probe.pads), probe.pieces[n], done, self.manner.probed_source
                if not fits(*sizes):
                    raise BuildStopped(reason("capture-failed", f"not for sizes {sizes}"))
                met.add(probes.bucket(*sizes))
                done -= n == probe.cuts
        return dataclasses.replace(record, error=error, met=tuple(sorted(met)))
