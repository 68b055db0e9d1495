"""Whether a plan serves: it runs against eager once on each sort of machine, and that is kept."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from ovshim import runtime
from ovshim.cache import Entry
from ovshim.job import Job
from ovshim.plan import Plan
from ovshim.race import Finish, race
from ovshim.reasons import reason
from ovshim.record import Record
from ovshim.signature import sizes_of

__all__ = ["decide"]

# A race may take a quarter of what is left of the build's time, and never longer than this.
_RACE_SECONDS = 0.5


def decide(job: Job, plan: Plan, record: Record, entry: Entry | None) -> None:
    """Let the plan run against eager, or read what an earlier race on such a machine found."""
    where = f"{runtime.processor()} threads={torch.get_num_threads()} sizes={sizes_of(job.leaves)}"
    finish = _known_finish(record.race.get(where))
    if finish is None:
        args, kwargs = job.arguments()

        def candidate() -> Any:
            # All that a call pays for beyond eager's own way to the method.
            tensors = plan.match(args, kwargs)
            holds = plan.generation is not None and plan.generation.holds()
            if tensors is not None and plan.served and holds and plan.values_fit(tensors):
                return plan.served.answer(tensors)
            return None

        with job.stage("race"):
            budget = max(0.0, min(_RACE_SECONDS, job.seconds_left() / 4))
            finish = race(lambda: job.call(*args, **kwargs), candidate, budget)
        # What was not decided is run again by the next process, on a quieter machine perhaps.
        if entry is not None and finish.decided:
            job.store.amend(entry, "race", {**record.race, where: dataclasses.astuple(finish)})
    plan.medians = (finish.eager, finish.candidate)
    plan.speedup = finish.eager / finish.candidate
    if finish.lost:
        plan.served = None
        text = f"{finish.eager * 1e3:.3g} ms against {finish.candidate * 1e3:.3g} ms"
        plan.reason = reason("slower", text)


def _known_finish(stored: Any) -> Finish | None:
    if not isinstance(stored, list) or len(stored) != 4:
        return None
    return Finish(*stored) if all(isinstance(number, float) for number in stored) else None
