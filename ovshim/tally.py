"""What became of the calls: counted by path and by reason, and told once."""

from __future__ import annotations

import sys
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Sequence

from torch import nn

from ovshim.errors import FallbackError, FallbackWarning
from ovshim.plan import Counter, Plan
from ovshim.reasons import Reason

__all__ = ["Tally"]

# Reasons that `strict` does not object to: the user's own doing, or better so.
_FINE_WITH_STRICT = frozenset(
    {"training", "grad", "input-grad", "slower", "prefer-eager", "off", "building"}
    | {"backward", "first-step", "seldom", "stale", "special-values", "out-of-range"}
    | {"taking-turns", "new-sizes", "empty-tensor", "reentered"}
)
# Reasons that nobody is warned of: they are how the module is used, not what is wrong with it.
_SILENT = _FINE_WITH_STRICT - {"grad"}
# Of so many plans that are gone calls may still be on their way.
_LEAVING = 64


class Tally:
    """The calls of one method of one module.

    Args:
        plans: gives the plans that stand; they count their own calls.
        strict: raise instead of warning.
        quiet: warn of nothing.

    Attributes:
        name: of the module, in warnings.
    """

    def __init__(
        self, module: nn.Module, plans: Callable[[], Sequence[Plan]], strict: bool, quiet: bool
    ) -> None:
        self.name = type(module).__qualname__
        self._plans = plans
        self._strict = strict
        self._quiet = quiet
        self._eager: dict[str, Counter] = {}
        self._earlier = {"openvino": 0, "mixed": 0}
        self._leaving: dict[str, deque[Counter]] = {path: deque() for path in self._earlier}
        self._warned: set[str] = set()  # and nothing is left to raise

    def note(self, why: Reason) -> None:
        """Count a call that eager serves, and tell of it."""
        counter = self._eager.get(why.code)
        if counter is not None and why.code in self._warned:
            counter.add()
        else:
            self.count(why)
            self.tell(why)

    def count(self, why: Reason) -> None:
        """Count a call that eager serves, or would."""
        self.counter(why).add()

    def counter(self, why: Reason) -> Counter:
        """The counter of the calls that eager serves for this reason."""
        counter = self._eager.get(why.code)
        return self._eager.setdefault(why.code, Counter()) if counter is None else counter

    def tell(self, why: Reason) -> None:
        """Warn, once for each reason; raises FallbackError if that is what `strict` asks for."""
        if self._strict and why.code not in _FINE_WITH_STRICT:
            raise FallbackError(why)
        if why.code not in self._warned:
            self._warned.add(why.code)
            if why.code not in _SILENT and not self._quiet:
                warnings.warn(FallbackWarning(why, self.name), stacklevel=_users_level())

    def tell_precision(self) -> None:
        """Warn, once each, of plans that run in another precision than was asked for."""
        for plan in self._plans():
            for warning in plan.warnings if plan.counted_as == "openvino" else ():
                if str(warning) not in self._warned:
                    self._warned.add(str(warning))
                    warnings.warn(warning, stacklevel=_users_level())

    def retire(self, plans: Iterable[Plan]) -> None:
        """Keep the counts of plans that go."""
        for plan in plans:
            path = plan.counted_as
            if path is None:
                continue
            # The counter itself: a call that another thread is about counts itself when it ends.
            leaving = self._leaving[path]
            leaving.append(plan.calls)
            while len(leaving) > _LEAVING:
                self._earlier[path] += leaving.popleft().value

    def served(self, path: str, plans: Iterable[Plan] | None = None) -> int:
        """Calls served by that path ("openvino" or "mixed"), by plans that are gone as well.

        plans: those that stand, where they are at hand.
        """
        plans = self._plans() if plans is None else plans
        standing = [plan.calls for plan in plans if plan.counted_as == path]
        # By identity: one that was given up may serve again.
        counters = {id(counter): counter for counter in (*standing, *self._leaving[path].copy())}
        return self._earlier[path] + sum(counter.value for counter in counters.values())

    @property
    def eager(self) -> dict[str, int]:
        """Calls that eager has served, by reason code."""
        counts = {code: counter.value for code, counter in list(self._eager.items())}
        return {code: count for code, count in counts.items() if count}

    def reset(self) -> None:
        """Set every counter back to 0."""
        self._earlier = dict.fromkeys(self._earlier, 0)
        for leaving in self._leaving.values():
            leaving.clear()
        for counter in list(self._eager.values()):
            counter.reset()
        for plan in self._plans():
            plan.calls, plan.eager_calls, plan.kept_until = Counter(), Counter(), 0


def _users_level() -> int:
    """How far above the caller the first frame is that is neither ours nor torch's."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None:
        name = frame.f_globals.get("__name__", "")
        if not name.startswith(("ovshim.", "torch.")):
            break
        level, frame = level + 1, frame.f_back
    return level
