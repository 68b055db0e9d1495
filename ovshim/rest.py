"""Rest: calls like those that eager serves because it is faster go there at a glance.

Of a module of a few microseconds even the questions who serves it are a good part of its time, and
where the answer was eager, a mistake cannot be wrong: so for some calls only the sizes are asked.
"""

from __future__ import annotations

from typing import Any

import torch

from ovshim import building
from ovshim.helper import hot
from ovshim.matcher import compile_glance
from ovshim.plan import Counter, Plan
from ovshim.special_mode import function_modes

__all__ = ["REST", "Rest", "rest_after"]

# Each call after so many goes all the way: the module may have changed, or be under another mode.
REST = 72


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
        self.left = REST


def rest_after(
    plan: Plan, counter: Counter, original: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """The rest after a call of this plan: of the compiled helper, or one of those above; both have
    `left`. None where a glance tells nothing.

    Args:
        counter: of the calls that eager has served for this reason.
        original: the user's own method.
    """
    if plan.glance is None:
        plan.glance = compile_glance(plan.kind) or _blind
    sizes = plan.glance(args, kwargs)
    if sizes is None:
        return None
    if hot is None or original.usual is None:
        return Rest(plan, counter, sizes)
    function, method = original.usual
    calls, add = plan.eager_calls, counter.add
    plain = not kwargs and all(type(argument) is torch.Tensor for argument in args)
    return hot.Rest(
        left=REST,
        facts=((building, "running", 0), (plan, "eager_calls", calls), (counter, "add", add)),
        questions=((torch.is_grad_enabled, torch.is_grad_enabled()), (function_modes, 0)),
        glance=None if plain else plan.glance,  # what it would ask is asked without it
        sizes=sizes,
        tensor=torch.Tensor,
        dtypes=tuple(argument.dtype for argument in args) if plain else (),
        counts=(calls.add, add),
        module=original.module,
        name=original.name,
        function=function,
        method=method,
    )


def _blind(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """The glance at calls of which only torch's pytree knows the inside."""
