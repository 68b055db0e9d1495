"""`ovshim.load`: a module made of an artifact, without the code that it was saved from.

It has the plans of the artifact and no eager to fall back on: what eager would have to answer
raises FallbackError with the reason.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import nn

from ovshim.arguments import path_of
from ovshim.bound import install, installed
from ovshim.dispatch import Dispatcher
from ovshim.errors import FallbackError, OptionError
from ovshim.generation import Generation
from ovshim.handle import Handle
from ovshim.matcher import Matcher
from ovshim.options import OptionFields, Options, resolve
from ovshim.plan import Plan
from ovshim.planner import Given, Planner
from ovshim.properties import check_placement
from ovshim.reasons import Reason, reason
from ovshim.signature import describe, sizes_of

__all__ = ["load"]

# The others are about conversion, or about eager.
_TAKEN = frozenset({"device", "hint", "streams", "threads", "properties", "progress"})
# Nothing is converted, and there is no eager to go to.
_SETTLED: dict[str, Any] = {"cache_dir": False, "strict": True}


def load(
    directory: str | os.PathLike[str],
    *,
    options: Options | None = None,
    **fields: Unpack[OptionFields],
) -> nn.Module:
    """A module that runs what `fast.ovshim.save(directory)` has written, without its code.

    It answers the kinds of calls that were saved, and was proved on this machine against the
    recorded answers. There is no eager: whatever eager would have to answer (training mode, NaN in
    an input, other kinds of calls) raises FallbackError. Outputs of classes that the saved module's
    code defines come as objects with the same fields.

    Args:
        options, fields: `device`, `hint`, `streams`, `threads` and `properties` of
            `ovshim.Options`; what is about conversion was settled when the artifact was made.

    Raises:
        ArtifactError: the directory is no artifact, is damaged, or does not give the recorded
            answers here.
        OptionError: an option that has no meaning here, or cannot be right.
    """
    for name, only in _SETTLED.items():
        given: Any = fields.get(name)
        if given is not None and given != only:
            raise OptionError(name, given, repr(only), "Leave it out: it is so in any case.")
    chosen = resolve(options, {**fields, **_SETTLED})
    default = Options(**_SETTLED)
    for name in set(Options.__dataclass_fields__) - _TAKEN - _SETTLED.keys():
        harmless = (getattr(default, name), "openvino" if name == "prefer" else None)
        if getattr(chosen, name) not in harmless:
            given = getattr(chosen, name)
            remedy = "Give it to accelerate() before the artifact is saved."
            raise OptionError(name, given, f"nothing but {', '.join(sorted(_TAKEN))}", remedy)
    check_placement(chosen)
    where = path_of("directory", directory)
    module = Loaded(where).eval()
    install(module, "forward", Maker(where, chosen))
    # Not setattr: it is not part of what the module is.
    module.__dict__["ovshim"] = Handle(module, chosen)
    dispatcher = installed(module)["forward"].dispatcher  # reads, compiles and proves
    assert isinstance(dispatcher, Artifact)
    dispatcher.tally.tell_precision()
    module.name = dispatcher.name
    return module


class Loaded(nn.Module):
    """What `load` gives.

    Attributes:
        name: of the class that was saved.
        directory: the artifact.
        of_artifact: see `hooks.is_loaded`.
    """

    name = ""
    of_artifact = True

    def __init__(self, directory: Path) -> None:
        super().__init__()
        self.directory = directory

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Nobody's code: the dispatcher in the instance answers."""
        raise _no_eager(reason("not-in-artifact"))

    def extra_repr(self) -> str:
        return f"{self.name}, {str(self.directory)!r}"


class Maker:
    """Reads an artifact: what copies and pickles of a loaded module carry along."""

    def __init__(self, directory: Path, options: Options) -> None:
        self.directory = directory
        self.options = options

    def __call__(self, module: nn.Module, original: Callable[..., Any]) -> Artifact:
        from ovshim.artifact.read import read

        name, plans = read(self.directory, self.options, _Unchanging())
        return Artifact(module, name, plans, original, self.options)


class Artifact(Dispatcher):
    """Serves the calls of a loaded module."""

    _yields = False

    def __init__(
        self,
        module: nn.Module,
        name: str,
        plans: Sequence[Plan],
        original: Callable[..., Any],
        options: Options,
    ) -> None:
        def planner(*args: Any) -> Planner:
            return _Fixed(plans, *args)

        super().__init__(module, "forward", original, options, make_planner=planner)
        self.name = name
        self._off = False  # there is nothing else that could answer

    def in_eager(self, why: Reason, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.tally.count(why)
        raise _no_eager(why)

    def _is_to_look_out(self, leaves: Sequence[Any]) -> bool:
        return False  # there is no backward pass without eager

    def failed(self, plan: Plan, error: Exception) -> None:
        try:
            super().failed(plan, error)
        except FallbackError as failed:
            raise _no_eager(failed.reason) from error


class _Fixed(Planner):
    """The plans of an artifact: no others are ever made, and none goes."""

    def __init__(self, plans: Sequence[Plan], *args: Any) -> None:
        super().__init__(*args)
        self._fixed = list(plans)
        for plan in plans:
            plan.match = _without_gradients(plan.match)
        for grad in (False, True):
            self._on_change(grad, tuple(plans))

    @property
    def plans(self) -> list[Plan]:
        return list(self._fixed)

    def answer(self, given: Given) -> tuple[Any, Reason]:
        """Raises FallbackError: of such calls there is no plan."""
        if given.kind.requires_grad:
            raise _no_eager(reason("input-grad"))
        known = "; ".join(describe(plan.kind, plan.pattern) for plan in self._fixed)
        asked = describe(given.kind, sizes_of(given.leaves))
        raise _no_eager(reason("not-in-artifact", f"{asked}; there are: {known}"))

    def prepare(self, given: Given, wait: bool = True) -> Plan | None:
        """The plan for such calls; FallbackError where there is none."""
        for plan in self._fixed:
            if plan.match(given.args, given.kwargs) is not None:
                return plan
        self.answer(given)
        return None

    def drop(self, plan: Plan) -> None:
        """Nothing goes."""

    def drop_stale(self) -> None:
        """Nothing goes stale: there is no module behind the graph."""

    def drop_all(self) -> None:
        """Nothing goes: nothing could be made anew."""


def _without_gradients(match: Matcher) -> Matcher:
    """In grad mode not of inputs that require grad: there is nothing to compute gradients with."""

    def matched(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[torch.Tensor, ...] | None:
        tensors = match(args, kwargs)
        if tensors is not None and torch.is_grad_enabled():
            return None if any(tensor.requires_grad for tensor in tensors) else tensors
        return tensors

    return matched


class _Unchanging(Generation):
    """The generation of what has neither code nor weights."""

    def __init__(self) -> None:
        pass

    def holds(self) -> bool:
        return True


def _no_eager(why: Reason) -> FallbackError:
    remedy = why.remedy
    if why.code != "not-in-artifact":
        remedy = "An artifact has no eager module: ask the module itself about such calls."
    return FallbackError(Reason(why.code, why.message, remedy))
