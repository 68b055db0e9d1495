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

__all__ = ["REST", "Rest", "Resting"]

# Each call after so many goes all the way: the module may have changed, or be under another mode.
REST = 72
# So many sizes may rest at once: the powers of two up to 128 rows.
_MOST_SIZES = 8

Sizes = tuple[torch.Size, ...]


class Rest:
    """Some calls, each of the sizes and in the grad mode of some that eager has served.

    Attributes:
        left: so many may follow. Threads may count one for two: then it is a longer rest.
        glance, sizes, grad: what a call has to look like.
        plan, counter: where each is counted, by whoever lets it go to eager.
    """

    __slots__ = ("counter", "glance", "grad", "left", "plan", "sizes")

    def __init__(self, plan: Plan, counter: Counter, sizes: tuple[Sizes, ...]) -> None:
        self.plan = plan
        self.counter = counter
        self.glance = plan.glance or _blind
        self.sizes = sizes
        self.grad = torch.is_grad_enabled()
        self.left = REST


class Resting:
    """The sizes of the calls that eager has lately served by one plan. Those that come again rest,
    all at once; where each call is of others, or of another plan, nothing is made.

    Args:
        original: the user's own method.
    """

    def __init__(self, original: Any) -> None:
        self._original = original
        self._lately: tuple[Plan | None, tuple[Sizes, ...]] = None, ()

    def after(
        self, plan: Plan, counter: Counter, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """The rest after a call of this plan: of the compiled helper, or one of those above; both
        have `left`. None where the call's sizes have not come lately, or a glance tells nothing.

        Args:
            counter: of the calls that eager has served for this reason.
        """
        if plan.glance is None:
            plan.glance = compile_glance(plan.kind) or _blind
        sizes = plan.glance(args, kwargs)
        if sizes is None:
            return None
        before, lately = self._lately
        lately = lately if plan is before else ()
        if sizes not in lately:
            self._lately = plan, (*lately, sizes)[-_MOST_SIZES:]
            return None
        plain = not kwargs and all(type(argument) is torch.Tensor for argument in args)
        dtypes = tuple(argument.dtype for argument in args) if plain else None
        return _rest(plan, counter, lately, self._original, dtypes)


def _rest(
    plan: Plan,
    counter: Counter,
    sizes: tuple[Sizes, ...],
    original: Any,
    dtypes: tuple[torch.dtype, ...] | None,
) -> Any:
    """See above.

    Args:
        dtypes: of the arguments, where all are tensors: then each is asked without the glance.
    """
    if hot is None or original.usual is None:
        return Rest(plan, counter, sizes)
    function, method = original.usual
    calls, add = plan.eager_calls, counter.add
    return hot.Rest(
        left=REST,
        facts=((building, "running", 0), (plan, "eager_calls", calls), (counter, "add", add)),
        questions=((torch.is_grad_enabled, torch.is_grad_enabled()), (function_modes, 0)),
        glance=plan.glance if dtypes is None else None,
        sizes=sizes,
        tensor=torch.Tensor,
        dtypes=dtypes or (),
        counts=(calls.add, add),
        module=original.module,
        name=original.name,
        function=function,
        method=method,
    )


def _blind(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """The glance at calls of which only torch's pytree knows the inside."""
