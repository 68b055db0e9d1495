"""Hooks inside of a module, which a graph would not call, and what else in its present state keeps
it in eager."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn
from torch.nn.modules import module as torch_module

from ovshim.reasons import Reason, reason
from ovshim.scripted import is_plain

__all__ = ["are_called", "inner_hooks", "is_loaded", "is_recorded", "obstacle"]

_RECORDING = "transformers.utils.output_capturing"


def obstacle(module: nn.Module) -> Reason | None:
    """What in the module's present state keeps it in eager, without a look at what it computes:
    training mode, or hooks that a graph would not call. Not training mode of a submodule: a
    ModuleList put in anew is in it to no effect; preflight sees what has one."""
    if module.training:
        return reason("training")
    if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
        return reason("inner-hooks", "hooks for all modules")
    try:
        below = [(name, inner) for name, inner in module.named_modules() if inner is not module]
    except TypeError as error:  # for a set; with __eq__ there may be no __hash__
        return reason("capture-failed", str(error))
    for name, inner in below:
        if is_loaded(inner):
            text = f"{name} was loaded from an artifact and has no code"
            return reason("capture-failed", text)
        if are_called(inner._forward_hooks) or inner._forward_pre_hooks:
            return reason("inner-hooks", name)
        if not is_plain(inner) and getattr(inner, "training", False):
            return reason("training")  # a trace would leave it in eval mode
        if inner._forward_hooks and is_recorded():
            return reason("inner-hooks", f"{name}, which a model around this one records")
    return None


def is_loaded(module: nn.Module) -> bool:
    """Whether `ovshim.load` has made it: it runs in OpenVINO, and eager has nothing to run."""
    return bool(getattr(type(module), "of_artifact", False))


def inner_hooks(root: nn.Module, modules: Iterable[nn.Module]) -> Iterable[Any]:
    """Hooks that would fire inside the graph. Those of the root fire around it, as ever."""
    for module in modules:
        if module is not root:
            yield module._forward_hooks
            yield module._forward_pre_hooks
    yield torch_module._global_forward_hooks
    yield torch_module._global_forward_pre_hooks


def are_called(hooks: Mapping[Any, Any]) -> bool:
    """Whether there are hooks that a graph would have to call. Not those that transformers puts on
    layers once hidden states or the like were asked for: they give what the same call returns."""
    return any(getattr(hook, "__module__", None) != _RECORDING for hook in hooks.values())


def is_recorded() -> bool:
    """Whether a transformers model that is running now takes down what its layers answer."""
    recording = sys.modules.get(_RECORDING)
    # What it takes down is empty where nothing was asked for.
    return recording is not None and bool(recording._active_collector.get())
