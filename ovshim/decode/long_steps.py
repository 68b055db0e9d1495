"""Steps of many tokens, at which eager may be the faster one although single tokens are cheaper in
OpenVINO.

OpenVINO's attention in float32 multiplies four rows of a prompt at a time, and takes tokens one by
one where there is a past (2026.4): on some processors a prompt of 900 tokens took it 1.4 times as
long as eager, and 128 tokens after 768 twice as long. A prompt is measured on the calls themselves:
both answer it until OpenVINO has been faster once, or eager several times. The lengths that a race
at build time could try would not be those that come.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["LongSteps"]

# Steps of fewer tokens stay: a conversation that eager takes over is copied, and back.
_FEWEST = 16
# Eager serves where it was faster so often, and OpenVINO never.
_OFTEN = 3
# The exponent of no size is larger.
_LARGEST = 64

Bucket = tuple[int, ...]


class LongSteps:
    """Who is faster at long steps, by buckets of sizes (see `probes.bucket`).

    Args:
        known: what was found out earlier, as `keep` was given it; anything at all.
        keep: called with all that is known whenever a bucket is settled.

    Several threads may ask and add at once, also one within a call of its own: there is no lock.
    """

    def __init__(self, known: Any, keep: Callable[[dict[str, Any]], None]) -> None:
        self._samples: dict[Bucket, list[tuple[float, float]]] = _checked(known)
        self._keep = keep

    def open(self, bucket: Bucket) -> bool:
        """Whether both are to answer a step, so that their time can be taken."""
        samples = self._samples.get(bucket, ())
        return bucket[1] >= _FEWEST.bit_length() and not _settled(samples)

    def lost(self, bucket: Bucket) -> bool:
        """Whether steps of a bucket are eager's."""
        samples = self._samples.get(bucket, ())
        return len(samples) >= _OFTEN and _settled(samples) and not _won(samples)

    def add(self, bucket: Bucket, eager: float, openvino: float) -> None:
        """Both have answered the same step, in so many seconds."""
        if self.open(bucket):
            samples = self._samples.setdefault(bucket, [])
            samples.append((eager, openvino))
            if _settled(samples):
                self._keep(self._to_json())

    def to_list(self) -> list[dict[str, Any]]:
        """For reports: who serves which bucket; medians of eager and of OpenVINO, in seconds."""
        known = {bucket: tuple(samples) for bucket, samples in dict(self._samples).items()}
        return [
            {
                "bucket": list(bucket),
                "path": "eager" if self.lost(bucket) else "openvino",
                "medians": [statistics.median(each) for each in zip(*samples, strict=True)],
            }
            for bucket, samples in sorted(known.items())
            if samples
        ]

    def _to_json(self) -> dict[str, Any]:
        known = dict(self._samples)  # at once: others add to it
        settled = [(b, samples) for b, samples in known.items() if _settled(samples)]
        return {",".join(map(str, b)): [list(one) for one in samples] for b, samples in settled}


def _won(samples: Any) -> bool:
    return any(openvino <= eager for eager, openvino in samples)


def _settled(samples: Any) -> bool:
    return len(samples) >= _OFTEN or _won(samples)


def _checked(known: Any) -> dict[Bucket, list[tuple[float, float]]]:
    """What of it is such samples; the rest is found out anew."""
    found: dict[Bucket, list[tuple[float, float]]] = {}
    for key, samples in known.items() if isinstance(known, Mapping) else ():
        try:
            bucket = tuple(map(int, key.split(",")))
            pairs = [(float(eager), float(openvino)) for eager, openvino in samples]
        except (AttributeError, OverflowError, TypeError, ValueError):
            continue
        sizes = len(bucket) == 4 and min(bucket) >= 0 and max(bucket) <= _LARGEST
        if sizes and all(math.isfinite(second) for pair in pairs for second in pair):
            found[bucket] = pairs
    return found
