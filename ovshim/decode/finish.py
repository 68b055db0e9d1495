"""What a build of a decoding ends in, and the race that it is put to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ovshim import runtime
from ovshim.cache import Entry
from ovshim.decode import probes
from ovshim.decode.decoding import Decoding, Ready
from ovshim.decode.manner import Causal
from ovshim.decode.record import StepRecord
from ovshim.generation import Generation
from ovshim.job import Job
from ovshim.race import Finish, race
from ovshim.reasons import Reason
from ovshim.signature import Pattern, flatten_call, kind_of
from ovshim.verdict import placed, slower

__all__ = ["by_eager", "finished", "run_race"]

# What is raced: some tokens after a short prompt, and after a long one. Of prompts between them
# those of more tokens than this are taken for long.
_AFTER_SHORT = probes.Probe((16, *(1,) * 8))
_AFTER_LONG = probes.Probe((256, *(1,) * 8))
_LONG = 64


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
    """Let eager and OpenVINO go through short conversations; what was found is kept.

    Where eager is faster after a long prompt alone, it serves conversations that begin with one.
    """
    known = dict(record.race)
    finish = _finish(job, manner, made, known, _AFTER_SHORT)
    steps = len(_AFTER_SHORT.pieces)
    made.medians = (finish.eager / steps, finish.candidate / steps)
    made.speedup = finish.eager / finish.candidate
    if finish.lost:
        made.reason = slower(finish)
        return
    # What an encoder-decoder model goes on from is a token or two.
    ends = [n for n in (manner.longest, record.most) if n is not None]
    if not manner.probed_source and all(_AFTER_LONG.length <= n for n in ends):
        finish = _finish(job, manner, made, known, _AFTER_LONG)
        made.longest_start = _LONG if finish.lost else None


def _finish(
    job: Job, manner: Causal, made: Decoding, known: dict[str, Any], raced: probes.Probe
) -> Finish:
    """How the race over one conversation came out: as `known` has it, or as is added to it now."""
    ready, generation = made.ready, made.generation
    assert ready is not None
    assert generation is not None
    measured = runtime.measured_on(torch.get_num_threads()) + placed(job.options)
    where = f"{measured} prompt={raced.pieces[0]}"
    stored = Finish.of_json(known.get(where))
    if stored is not None:
        return stored

    def eager() -> None:
        way = manner.eager(job.call, ready.form, raced)
        for _ in probes.ask(raced, [way], manner.vocabulary):
            pass

    def candidate() -> None:
        way = manner.candidate(job.call, ready.form, ready.engine, raced)
        for _ in probes.ask(raced, [way], manner.vocabulary):
            generation.holds()  # which a step pays for and eager does not

    with job.stage("race"):
        finish = race(eager, candidate, job.race_seconds())
    if made.entry is not None and finish.decided:
        known[where] = finish.to_json()
        job.store.amend(made.entry, "race", dict(known))
    return finish


def by_eager(job: Job, why: Reason, entry: Entry | None = None) -> Decoding:
    """A decoding that eager serves."""
    made = _shell(job, why, entry, "off" if entry is None else "hit")
    try:
        made.generation = Generation(job.module)
    except ValueError:  # weights that count no versions: nothing to watch, the reason stays
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
