"""The kinds of calls that a method has met, and their plans: so many, those that are in use.

A plan holds a compiled graph, with weights of its own. Where there are more than are wanted, the
one that was used longest ago goes. And what would go again before it had paid is not made: a kind
that has lost its plan, or comes when plans go without having served, has to come more often.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ovshim.plan import Plan
from ovshim.reasons import Reason, reason
from ovshim.signature import Kind

if TYPE_CHECKING:
    from ovshim.job import Job

__all__ = ["WORTH_BUILDING", "Families", "Family"]

# A plan that goes before it has served so many calls was not worth its build: the next build waits,
# twice as many calls each time.
WORTH_BUILDING = 16
_MOST_DOUBLED = 20
# Kinds without a plan of which it is kept how often they have come.
_MOST_WAITING = 64


class Family:
    """The plans of one kind of call.

    Attributes:
        stale, wait, why: how often its plans went stale too soon, for how many calls no plan is
            made for that, and the reason given meanwhile.
        build: what another thread is making.
        job: a plan that a later call goes on with (see `planner.Planner.finish`).
        met: sizes of calls that had no plan.
        came, ousted: calls that had no plan since the last one went, and how often it had to make
            room.
    """

    def __init__(self) -> None:
        self.plans: list[Plan] = []
        self.stale = 0
        self.wait = 0
        self.why = reason("stale", "it keeps changing")
        self.build: Any = None
        self.job: Job | None = None
        self.met: set[tuple[tuple[int, ...], ...]] = set()
        self.came = 0
        self.ousted = 0

    def add(self, plan: Plan) -> list[Plan]:
        """A plan for more sizes takes the place of those that it covers, which are returned."""
        covered = [known for known in self.plans if plan.covers(known)]
        self.plans = [known for known in self.plans if known not in covered] + [plan]
        return covered

    def drop_stale(self) -> list[Plan]:
        """Those that the module's present state contradicts go, and are returned. Where the next
        build has to wait, one of eager's stays for so long: its answers are right, and calls with a
        plan are answered sooner."""
        stale = [p for p in self.plans if _is_stale(p)]
        new = [p for p in stale if not p.kept_until]
        if new:
            self.put_off(sum(p.calls.value for p in new))
        kept = [p for p in new if self.wait and _may_stay(p)]
        for plan in kept:
            plan.kept_until, self.wait = plan.eager_calls.value + self.wait, 0
        gone = [p for p in stale if p not in kept]
        self.plans = [p for p in self.plans if p not in gone]
        return gone

    def put_off(self, served: int = 0, why: Reason | None = None) -> None:
        """Let some calls pass before the next build, if the last was not worth it."""
        self.why = why or reason("stale", "it keeps changing")
        self.stale = 0 if served >= WORTH_BUILDING else self.stale + 1
        self.wait = 2**self.stale - 1 if self.stale > 1 else 0


def _is_stale(plan: Plan) -> bool:
    generation = plan.generation
    if generation is None:
        return False
    eagers = plan.parts is None and not plan.open and bool(plan.closed)
    return not (generation.holds_but_for_values() if eagers else generation.holds())


def _may_stay(plan: Plan) -> bool:
    # Who has trained a submodule has it back in evaluation soon.
    eagers = plan.served is None and plan.parts is None
    return eagers and (plan.reason is None or plan.reason.code != "training")


class Families:
    """Every kind of call of one method, in each grad mode.

    Args:
        most: so many plans are kept.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._known: dict[tuple[Kind, bool], Family] = {}
        self._looked = 0
        self._worthless = 0

    def __len__(self) -> int:
        return len(self._known)

    def __iter__(self) -> Iterator[Family]:
        return iter(list(self._known.values()))

    def __contains__(self, key: tuple[Kind, bool]) -> bool:
        return key in self._known

    def of(self, kind: Kind, grad: bool) -> Family:
        """The family of such calls; a new one where there is none."""
        family = self._known.get((kind, grad))
        if family is None:
            self._forget()
            family = self._known.setdefault((kind, grad), Family())
        return family

    def in_mode(self, grad: bool) -> list[Family]:
        """Those of one grad mode."""
        return [family for (_, mode), family in self._known.items() if mode is grad]

    def clear(self) -> None:
        """Forget everything."""
        self._known.clear()
        self._worthless = 0

    @property
    def plans(self) -> list[Plan]:
        return [plan for family in self for plan in family.plans]

    # --- room for plans -----------------------------------------------------------------------

    def too_seldom(self, family: Family) -> Reason | None:
        """Why a call, which has no plan, is not to have one made: it might not come again."""
        count = sum(len(known.plans) for known in self._known.values())
        if family.plans or (not family.ousted and 2 * count < self._most):
            return None
        family.came += 1
        needed = 2 << min(self._worthless, _MOST_DOUBLED)
        if family.ousted:
            needed = max(needed, WORTH_BUILDING << min(family.ousted, _MOST_DOUBLED))
        if family.came >= needed:
            return None
        crowded = family.ousted or self._worthless
        return reason("too-many-plans") if crowded else reason("seldom")

    def make_room(self, new: Plan) -> list[Plan]:
        """Take away the plans that were used longest ago, where there are too many: these."""
        self._look()
        others = [plan for plan in self.plans if plan is not new]
        others.sort(key=lambda plan: plan.used)
        gone = others[: max(0, len(others) + 1 - self._most)]
        for plan in gone:
            for family in self:
                if plan in family.plans:
                    family.plans = [known for known in family.plans if known is not plan]
                    family.came, family.ousted = 0, family.ousted + 1
            if plan.served is not None:
                paid = plan.calls.value >= WORTH_BUILDING
                self._worthless = 0 if paid else self._worthless + 1
        return gone

    def _look(self) -> None:
        """See which plans were used since the last look, when a plan was made, by the calls that
        they have counted: to note the time of each call would cost each call."""
        self._looked += 1
        for plan in self.plans:
            count = plan.calls.value + plan.eager_calls.value
            if count != plan.counted or not plan.used:
                plan.counted, plan.used = count, self._looked

    def _forget(self) -> None:
        """Let the oldest kind go of which nothing is known but that it came."""
        waiting = [k for k, f in self._known.items() if not (f.plans or f.build or f.job)]
        if len(waiting) >= _MOST_WAITING:
            del self._known[waiting[0]]
