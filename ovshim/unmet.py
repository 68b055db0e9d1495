"""Sizes that OpenVINO has not run: its first inference there is slow, and may be made once it is
paid for.

At each new size it chooses and compiles kernels, which can take longer than eager's whole call; a
program whose sizes never come back would be slower in each of its calls. So a sixteenth of what
eager takes at such sizes, and what OpenVINO saves elsewhere, is put aside and spent on first calls.
"""

from __future__ import annotations

from ovshim.buckets import Bucket

__all__ = ["Unmet"]

# Of eager's time: so much slower may a program become of what OpenVINO tries.
_SHARE = 1 / 16
# Sizes that are remembered. OpenVINO itself keeps kernels for some thousands.
_MOST = 4096


class Unmet:
    """What one plan may spend, and on which sizes it need not.

    Args:
        example: the sizes of the example, as far as they may change; OpenVINO has run them.
        bucket: of the example.
        eager, openvino: seconds that each takes for it.

    Attributes:
        met: sizes that OpenVINO has run, and the bucket of each.
    """

    __slots__ = ("_calls", "_eager", "_first", "_left", "_saves", "met")

    def __init__(self, example: Bucket, bucket: Bucket, eager: float, openvino: float) -> None:
        self.met: dict[Bucket, Bucket] = {example: bucket}
        self._eager = eager
        self._saves = max(0.0, eager - openvino)
        self._calls = 0
        self._first: float | None = None
        self._left = 0.0

    def affords(self, by_both: bool, calls: int) -> bool:
        """Whether a first call may be made now.

        Args:
            by_both: whether eager answers it too.
            calls: that OpenVINO has answered so far.
        """
        self._left += self._saves * (calls - self._calls)
        self._calls = calls
        # Before the first one it is taken to be twice as long as eager's.
        first = 2 * self._eager if self._first is None else self._first
        return self._left >= (first if by_both else first - self._eager)

    def eager_took(self, seconds: float) -> None:
        """Eager has answered a call of new sizes."""
        self._eager = seconds
        self._left += _SHARE * seconds

    def openvino_took(self, seconds: float, by_both: bool) -> None:
        """OpenVINO has run some sizes for the first time."""
        self._first = seconds
        self._left -= seconds if by_both else seconds - self._eager
        self._calls += 1  # what this one has saved is counted

    def meet(self, sizes: Bucket, bucket: Bucket) -> None:
        """These sizes need not be paid for any more."""
        if len(self.met) >= _MOST:
            self.met.clear()
        self.met[sizes] = bucket
