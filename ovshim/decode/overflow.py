"""Whether the values of a decoding stay within float16's range, found out by running eager."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

import torch

from ovshim.decode import probes
from ovshim.decode.manner import Causal
from ovshim.decode.step import Form
from ovshim.job import BuildStopped, Job
from ovshim.lowering import CHECKED_FOR_OVERFLOW, samples_of
from ovshim.precision.calibration import digest_of
from ovshim.precision.overflow import overflow
from ovshim.reasons import reason
from ovshim.signature import flatten_call

__all__ = ["refuse_overflow"]


def refuse_overflow(
    job: Job, manner: Causal, form: Form, shown: Mapping[str, Any], known: Collection[str]
) -> str:
    """For a job that `may_overflow`: raise BuildStopped where a value leaves float16's range, in
    the conversations of the proof, on what the caller has shown, or on calibration data.

    Args:
        shown: arguments of a call without a past, as `Causal.shown` gives them; perhaps none.
        known: data that was looked at before, as this returns it.

    Returns:
        What stands for the data.
    """
    tensors = [x for x in flatten_call((), dict(shown))[0] if isinstance(x, torch.Tensor)]
    calls: list[Callable[[], Any]] = [partial(job.call, **shown)] if shown else []
    data = digest_of([tensors])
    # What an encoder is to be shown is no call of what is decoded.
    if job.options.calibration is not None and not manner.probed_source:
        samples = samples_of(job)
        data += samples.digest
        calls += [partial(job.call, *given) for given in samples.tensors[:CHECKED_FOR_OVERFLOW]]
    if data in known:
        return data
    if not known:
        asked = enumerate(manner.probes(None))
        calls += [partial(_asked, job, manner, form, probe, seed) for seed, probe in asked]
    for call in calls:
        job.check_time()
        found = overflow(job.module, call, (), lambda path: True)
        if found is not None:
            where = f"{found.path or 'the root module'} reaches {found.value:.3g}"
            raise BuildStopped(reason("overflow", f"{where}; rules are not offered for decoding"))
    return data


def _asked(job: Job, manner: Causal, form: Form, probe: probes.Probe, seed: int) -> None:
    way = manner.eager(job.call, form, probe)
    for _ in probes.ask(probe, [way], manner.vocabulary, seed):
        pass
