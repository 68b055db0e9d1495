"""What a build of a decoding ends in, and the race that it is put to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ovshim import runtime
from ovshim.cache import Entry
from ovshim.decode import probes
from ovshim.decode.decoding import Decoding, Ready
from ovshim.decode.long_steps import LongSteps
from ovshim.decode.manner import Causal
from ovshim.decode.record import StepRecord
from ovshim.deferred import later
from ovshim.generation import Generation
from ovshim.job import Job
from ovshim.race import Finish, race
from ovshim.reasons import Reason
from ovshim.signature import Pattern, flatten_call, kind_of
from ovshim.verdict import placed, slower

__all__ = ["by_eager", "finished", "run_race"]

# What is raced: some tokens after a short prompt. What long prompts take is found out on those that
# come (`long_steps`).
_RACED = probes.Probe((16, *(1,) * 8))


def finished(
    job: Job,
    ready: Ready,
    record: StepRecord,
    generation: Generation,
    entry: Entry | None,
    cache: str,
) -> Decoding:
    """A decoding that OpenVINO serves.

    Args:
        cache: "hit" or "miss"; without an entry it is off.
    """
    made = _shell(job, None, entry, "off" if entry is None else cache)
    made.ready, made.generation, made.error = ready, generation, record.error
    made.met, made.entry = set(record.met), entry
    made.precision_run, made.route, made.warnings = job.precision_run, record.route, job.warnings
    made.size_guards, made.value_guards = record.size_guards, record.value_guards
    return made


def run_race(job: Job, manner: Causal, made: Decoding, record: StepRecord) -> None:
    """Let eager and OpenVINO go through a short conversation; what was found is kept."""
    where = runtime.measured_on(torch.get_num_threads()) + placed(job.options, made.generation)
    finish, raced = Finish.of_json(record.race.get(where)), _conversation(manner)
    if finish is None:
        finish = _raced(job, manner, made, raced)
        if made.entry is not None and finish.decided:
            job.store.amend(made.entry, "race", {**record.race, where: finish.to_json()})
    steps = len(raced.pieces)
    made.medians = (finish.eager / steps, finish.candidate / steps)
    made.speedup = finish.eager / finish.candidate
    if finish.lost:
        made.reason = slower(finish)
    made.long_steps = _long_steps(job, made, record, where)


def _conversation(manner: Causal) -> probes.Probe:
    """What is raced, in as many tokens as the model has positions for."""
    most = manner.longest
    return _RACED if most is None or most >= _RACED.length else probes.Probe((1,) * most)


def _raced(job: Job, manner: Causal, made: Decoding, raced: probes.Probe) -> Finish:
    ready, generation = made.ready, made.generation
    assert ready is not None
    assert generation is not None

    def eager() -> None:
        way = manner.eager(job.call, ready.form, raced)
        for _ in probes.ask(raced, [way], manner.vocabulary):
            pass

    def candidate() -> None:
        way = manner.candidate(job.call, ready.form, ready.engine, raced)
        for _ in probes.ask(raced, [way], manner.vocabulary):
            generation.holds()  # which a step pays for and eager does not

    with job.stage("race"):
        return race(eager, candidate, job.race_seconds())


def _long_steps(job: Job, made: Decoding, record: StepRecord, where: str) -> LongSteps:
    store, entry = job.store, made.entry

    def keep(found: Mapping[str, Any]) -> None:
        if entry is not None:
            later(lambda: store.amend(entry, "long_steps", {**record.long_steps, where: found}))

    return LongSteps(record.long_steps.get(where), keep)


def by_eager(job: Job, why: Reason, entry: Entry | None = None) -> Decoding:
    """A decoding that eager serves."""
    made = _shell(job, why, entry, "off" if entry is None else "hit")
    try:
        made.generation = Generation(job.module, values=False)
    except ValueError:  # weights that lie in no one place: nothing to watch, the reason stays
        made.generation = None
    return made


def _shell(job: Job, why: Reason | None, entry: Entry | None, cache: str) -> Decoding:
    tokens = torch.zeros((1, 1), dtype=torch.int64)
    leaves, structure = flatten_call((tokens,), {})
    pattern: Pattern = ((None, None),)
    files: Mapping[str, Any] = {} if entry is None else entry.manifest["files"]
    return Decoding(
        kind=kind_of(leaves, structure),
        pattern=pattern,
        match=lambda args, kwargs: None,
        values_fit=lambda tensors: True,
        other_values_fit=lambda tensors: True,
        served=None,
        reason=why,
        generation=None,
        precision=job.precision,
        cache=cache,
        cache_path=None if entry is None else str(entry.path),
        family=None if entry is None else entry.family,
        bytes=sum(file["size"] for file in files.values()) if entry is not None else None,
        seconds=job.seconds,
    )
