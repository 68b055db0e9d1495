"""Rest: calls like those that eager serves because it is faster go there at a glance.

Of a module of a few microseconds even the questions who serves it are a good part of its time, and
where the answer was eager, a mistake cannot be wrong: so for some calls only the sizes are asked.
"""

from __future__ import annotations

from typing import Any

import torch

from ovshim.matcher import compile_glance
from ovshim.plan import Counter, Plan

__all__ = ["Rest"]

# Each call after so many goes all the way: the module may have changed, or be under another mode.
_CALLS = 72


class Rest:
    """Some calls, each of the same sizes and in the same grad mode as one that eager has served.

    Attributes:
        left: so many may follow. Threads may count one for two: then it is a longer rest.
        glance, sizes, grad: what a call has to look like.
        plan, counter: where each is counted, by whoever lets it go to eager.
    """

    __slots__ = ("counter", "glance", "grad", "left", "plan", "sizes")

    def __init__(self, plan: Plan, counter: Counter, sizes: tuple[torch.Size, ...]) -> None:
        self.plan = plan
        self.counter = counter
        self.glance = plan.glance or _blind
        self.sizes = sizes
        self.grad = torch.is_grad_enabled()
        self.left = _CALLS

    @staticmethod
    def after(
        plan: Plan, counter: Counter, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Rest | None:
        """The rest after a call of this plan; None where a glance tells nothing.

        Args:
            counter: of the calls that eager has served for this reason.
        """
        if plan.glance is None:
            plan.glance = compile_glance(plan.kind) or _blind
        sizes = plan.glance(args, kwargs)
        return None if sizes is None else Rest(plan, counter, sizes)


def _blind(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """The glance at calls of which only torch's pytree knows the inside."""
