"""Which calls in grad mode OpenVINO may answer: not those whose gradients are wanted already, nor
those of which somebody looks at how they are recorded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_module

from ovshim.building import Backward
from ovshim.reasons import Reason, reason
from ovshim.signature import flatten

__all__ = ["backward_hooks", "hindrance", "look_out", "unrecordable"]

_BACKWARD = reason("backward")
_SPECIAL_MODE = reason("special-mode")
_INNER_HOOKS = reason("inner-hooks", "for the backward pass")

_saving_hooks = torch._C._autograd._top_saved_tensors_default_hooks
_may_save: Callable[[], bool] = getattr(torch._C._autograd, "_saved_tensors_hooks_is_enabled")  # noqa: B009 # no stub has it
_anomalies = torch.is_anomaly_enabled


def unrecordable(leaves: Sequence[Any], module: nn.Module, backward: Backward) -> Reason | None:
    """Why a call in grad mode cannot be served whatever the module does, if it has gradients."""
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    if not any(tensor.requires_grad for tensor in [*tensors, *module.parameters()]):
        return None
    return hindrance(tensors, backward_hooks(module), backward)


def hindrance(
    tensors: Sequence[torch.Tensor], hooks: Sequence[Any], backward: Backward
) -> Reason | None:
    """Why eager has to answer a call whose gradients would be recorded; else None.

    Args:
        hooks: those of the module's submodules, see `backward_hooks`.
    """
    if backward.seen:
        return _BACKWARD
    # Eager itself cannot save inference tensors for a backward pass, and says so; and inside of
    # inference mode it records nothing, though grad mode may be on.
    inference = torch.is_inference_mode_enabled() or any(t.is_inference() for t in tensors)
    if inference or _is_watched():
        return _SPECIAL_MODE
    return _INNER_HOOKS if any(hooks) else None


def look_out(output: Any, backward: Backward) -> None:
    """Take note if a backward pass reaches this output, which is eager's own."""

    def reached(grads: Any) -> None:
        backward.seen = True

    for leaf in flatten(output)[0]:
        if isinstance(leaf, torch.Tensor) and leaf.grad_fn is not None:
            leaf.grad_fn.register_prehook(reached)


def _is_watched() -> bool:
    """Whether somebody looks at what this thread records for a backward pass: one node in the
    place of a module's own would show."""
    return _anomalies() or not _may_save() or _saving_hooks(True) is not None


def backward_hooks(module: nn.Module) -> tuple[Any, ...]:
    """The hooks that a backward pass calls within a module. Its own are called around it."""
    found: list[Any] = [
        torch_module._global_backward_hooks,
        torch_module._global_backward_pre_hooks,
    ]
    for inner in module.modules():
        if inner is not module:
            found += [inner._backward_hooks, inner._backward_pre_hooks]
    return tuple(found)
