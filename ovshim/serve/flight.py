"""One call under way: taken apart into what decides, what computes, and what makes the answer.

Whether OpenVINO may serve a call is asked in the thread that makes it, where modes, hooks and
values are known; what computes may then run anywhere; and the answer is made only if the module is
still what it was.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.fx import _symbolic_trace
from torch.nn.modules import module as torch_module

from ovshim.bound import installed
from ovshim.dispatch import Dispatcher
from ovshim.pace import Pace
from ovshim.plan import OutOfRangeError, Plan, Served
from ovshim.serve.copies import copied
from ovshim.signature import flatten_call, unflatten_call
from ovshim.special_mode import in_special_mode, outside_inference

__all__ = [
    "FAILURES",
    "Call",
    "Flight",
    "Kept",
    "Modes",
    "Ready",
    "dispatcher_of",
    "ready",
    "take_off",
]

Call = tuple[tuple[Any, ...], dict[str, Any]]
Ready = tuple[Plan, Served, tuple[torch.Tensor, ...]]

# What may come out of a computation that eager should answer instead.
FAILURES = (OutOfRangeError, RuntimeError, ValueError)

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = tuple(getattr(torch_module, f"_global{name}") for name in _HOOKS)


def dispatcher_of(module: nn.Module) -> Dispatcher | None:
    """What serves the calls of `module(...)`; None where `forward` is not accelerated."""
    bound = installed(module).get("forward")
    dispatcher = None if bound is None else bound.dispatcher
    return dispatcher if isinstance(dispatcher, Dispatcher) else None


class Modes:
    """The modes of a thread that decide what sort of tensors a call answers with, and its context,
    which may be a block of `disabled()`."""

    def __init__(self) -> None:
        self.inference = torch.is_inference_mode_enabled()
        self.grad = torch.is_grad_enabled()
        self.context = contextvars.copy_context()

    def hold(self) -> bool:
        """Whether this thread is under the same, and no special ones."""
        same = torch.is_inference_mode_enabled() == self.inference
        return same and torch.is_grad_enabled() == self.grad and not in_special_mode()

    def call(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        """Call a function under them. Raises what it raises."""
        with torch.inference_mode(self.inference), torch.set_grad_enabled(self.grad):
            return self.context.run(function, *args, **kwargs)


class Kept:
    """A call to be made later, by its own thread or another, whatever is written to its tensors
    meanwhile. Those that require grad stay themselves: gradients have to reach them."""

    def __init__(self, call: Call) -> None:
        leaves, self._structure = flatten_call(*call)
        found = {id(x): x for x in leaves if type(x) is torch.Tensor and not x.requires_grad}
        self._pairs = {key: (x, _copy_of(x)) for key, x in found.items()}
        self._leaves = [self._pairs[id(x)][1] if id(x) in found else x for x in leaves]
        self._versions = {key: copy._version for key, (_, copy) in self._pairs.items()}

    def copies(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """What stands for these tensors of the call."""
        return [self._pairs[id(x)][1] if id(x) in self._pairs else _copy_of(x) for x in tensors]

    def call(self, module: Callable[..., Any]) -> Any:
        """What the module answers. What it writes to its inputs reaches those of the caller.

        Raises what it raises.
        """
        args, kwargs = unflatten_call(self._leaves, self._structure)
        output = module(*args, **kwargs)
        for key, (original, copy) in self._pairs.items():
            if copy._version != self._versions[key]:
                with torch.no_grad():
                    original.copy_(copy)
        return output


def _copy_of(tensor: torch.Tensor) -> torch.Tensor:
    """A plain copy, whatever mode this thread is in."""
    return outside_inference(lambda: copied(tensor.detach()))


class Flight:
    """A call that OpenVINO serves.

    Args:
        served: what serves it in OpenVINO.
        given: its tensors.
        copied: whether it is computed of copies of them, for whoever made the call goes on and may
            write to them.
    """

    def __init__(
        self,
        plan: Plan,
        served: Served,
        given: Sequence[torch.Tensor],
        call: Call,
        copied: bool = True,
    ) -> None:
        self.plan = plan
        self.given = given
        self.modes = Modes()
        self.served = served
        self._kept = Kept(call) if copied else None
        self._taken = given if self._kept is None else self._kept.copies(given)

    def compute(self) -> list[torch.Tensor]:
        """What OpenVINO computes. From any thread. Raises one of FAILURES."""
        return self.modes.call(self.served.compute, self._taken)  # type: ignore[no-any-return]

    def holds(self) -> bool:
        """Whether the module is what it was when this was asked for, and the plan serves."""
        generation = self.plan.generation
        return self.plan.served is self.served and generation is not None and generation.holds()

    def answer(self, computed: list[torch.Tensor]) -> Any:
        """The module's answer, of what was computed."""
        self.plan.calls.add()
        return self.served.builder(computed, self.given)

    @property
    def advised(self) -> int:
        """How many such calls OpenVINO advises to have under way."""
        return self.served.engine.advised

    @property
    def threads(self) -> int:
        """How many threads keep OpenVINO at work: where it takes several calls at once, one more
        than those, so that what one of them does in Python is done while all are computing."""
        return self.advised + (self.advised > 1)

    @property
    def pace(self) -> Pace:
        """How long such calls take."""
        return self.plan.pace(self.given)

    def call(self, module: Callable[..., Any]) -> Any:
        """Make the call after all. Raises what the module raises."""
        assert self._kept is not None
        return self._kept.call(module)


def take_off(
    module: nn.Module,
    dispatcher: Dispatcher | None,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    copied: bool = True,
    settled: bool = True,
) -> Flight | None:
    """The call, if OpenVINO serves it and `module(...)` does nothing besides; else None.

    Args:
        copied: see `Flight`.
        settled: see `Dispatcher.ready`.
    """
    found = ready(module, dispatcher, args, kwargs, settled)
    return None if found is None else Flight(*found, (args, kwargs), copied)


def ready(
    module: nn.Module,
    dispatcher: Dispatcher | None,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    settled: bool = True,
) -> Ready | None:
    """As `take_off`: what serves the call, and its tensors."""
    if dispatcher is None or not _is_plain_call(module):
        return None
    return dispatcher.ready(args, kwargs, settled)


def _is_plain_call(module: nn.Module) -> bool:
    """Whether `module(...)` comes to a call of `forward` and nothing else."""
    return (
        type(module).__call__ is nn.Module.__call__
        and module._compiled_call_impl is None
        and not any(_GLOBAL_HOOKS)
        and not any(getattr(module, name) for name in _HOOKS)
        and torch._C._get_tracing_state() is None
        and not torch.compiler.is_compiling()
        and not _symbolic_trace._is_fx_tracing_flag
    )
