"""The mixed way: submodules that run in OpenVINO under a parent that stays in eager.

What keeps a module in eager is mostly one place of it: an operator that OpenVINO lacks, a branch on
values. The parts beside that place can still be served. They are looked for from the top: a
submodule that has a plan of its own is taken whole, of one that has none the children are tried.
All this happens in a twin of the module that nobody else sees; the user's own tree stays as it is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from ovshim import proof
from ovshim.bound import install, installed, uninstall
from ovshim.building import Backward, own_modes, serving
from ovshim.carried import Carried
from ovshim.dispatch import Dispatcher
from ovshim.eager import Eager
from ovshim.errors import OptionError
from ovshim.infer import EngineDead
from ovshim.job import BuildStopped, Job
from ovshim.matcher import compile_matcher
from ovshim.options import Options, for_part
from ovshim.outside import Written
from ovshim.plan import Plan
from ovshim.proof import ProofFailedError
from ovshim.race import race
from ovshim.random_generators import GeneratorStates, drawn_by, seeded
from ovshim.reasons import Reason, reason
from ovshim.recordable import backward_hooks, hindrance
from ovshim.signature import flatten_call, sizes_of, unflatten_call
from ovshim.twin import make_watched_twin
from ovshim.watched import watched

__all__ = ["Parts", "divide"]

log = logging.getLogger("ovshim")

# What keeps a whole in eager and need not keep its parts. Not what a second tree would hide from
# the user: attributes written to, hooks that are given the module.
_DIVISIBLE = frozenset(
    {"unsupported-op", "value-dependent", "random", "aliases-input", "mutates-input"}
    | {"capture-failed", "compile-failed", "infer-failed", "proof-failed", "unknown-leaf"}
)
# A whole that loses to eager is divided if there is this much to win.
_WORTH_DIVIDING_SECONDS = 2e-3
# A part that eager answers within this time cannot win what its own call costs.
_WORTH_SERVING_SECONDS = 60e-6


class Parts:
    """A module some of whose submodules run in OpenVINO.

    In grad mode each of them records its own gradients (`gradients`), and what the module computes
    between them is recorded as ever: branches and random numbers need not be met again by a
    backward pass.

    Args:
        tree: a twin of the module, ours alone.
        recording: whether gradients are recorded.

    Attributes:
        carried: carries over what calls leave in the tree's attributes; None while it is built.
    """

    def __init__(self, job: Job, tree: nn.Module, recording: bool) -> None:
        self.tree = tree
        self.call: Callable[..., Any] = getattr(tree, job.method)
        # The user's own: what is registered on those does not reach the twin.
        self._hooks = backward_hooks(job.module) if recording else ()
        self._backward = job.backward if recording else None
        self.carried: Carried | None = None

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the module's own method answers, in eager but for the parts."""
        try:
            return self.call(*args, **kwargs)
        finally:
            if self.carried is not None and not self.carried.unchanged():
                self.carried.carry()

    def refusal(self, tensors: Sequence[torch.Tensor]) -> Reason | None:
        """Why eager has to answer a call of these as a whole."""
        if self._backward is None:
            return None
        return hindrance(tensors, self._hooks, self._backward)

    def served(self) -> list[str]:
        """Paths of the submodules that OpenVINO serves, as `named_modules()` gives them."""
        return [name for name, inner in self.tree.named_modules() if installed(inner)]

    def to_list(self) -> list[dict[str, Any]]:
        """Each of them with its plans, for a report."""
        return [
            {
                "module": name,
                "class": type(inner).__qualname__,
                "plans": [plan.to_dict() for part in _parts_of(inner) for plan in part.plans],
            }
            for name, inner in self.tree.named_modules()
            if installed(inner)
        ]


def divide(job: Job, whole: Plan) -> Plan:
    """A mixed plan in the place of `whole`, which eager serves, where one is proved and faster.

    Never raises but for KeyboardInterrupt and its like.
    """
    assert whole.reason is not None
    slow = whole.reason.code == "slower" and (whole.medians or (0.0,))[0] > _WORTH_DIVIDING_SECONDS
    divisible = slow or whole.reason.code in _DIVISIBLE
    if job.apart is not None and whole.reason.code == "random":
        divisible = False  # to compare two answers the generators of all threads would be set
    of_whole = for_part(job.options) is None
    if not divisible or of_whole or job.options.strict or job.module.training:
        return whole
    with own_modes(job.grad):
        try:
            return _divided(job, whole)
        except (BuildStopped, ProofFailedError, EngineDead) as stopped:
            log.debug("%s is not divided: %s", type(job.module).__qualname__, stopped)
        except Exception:  # a fault of ours, or the module's own: the whole stays in eager
            log.debug("%s could not be divided", type(job.module).__qualname__, exc_info=True)
    return whole


def _divided(job: Job, whole: Plan) -> Plan:
    tree = make_watched_twin(job.module)
    if tree is None:
        return whole
    for inner in tree.modules():  # a twin brings along what is accelerated in its original
        for name in installed(inner):
            uninstall(inner, name)
    trained = any(parameter.requires_grad for parameter in job.module.parameters())
    parts = Parts(job, tree, recording=job.grad and (trained or job.kind.requires_grad))
    with job.stage("parts"):
        drawn = _drawn(job)
        _serve_parts(job, tree, parts, drawn)
    if not parts.served():
        return whole
    carried = Carried(job.module, tree)
    with job.stage("proof"):
        error = _proved(job, parts, drawn)
    medians = None
    if job.options.prefer == "faster":
        with job.stage("race"):
            medians = _raced(job, parts, drawn)
    if medians is not None and medians[0] <= medians[1]:
        return whole
    if not carried.unchanged():
        raise BuildStopped(reason("mutates-attribute", "at sizes or values other than these"))
    parts.carried = carried
    open_ = tuple((None,) * tensor.dim() for tensor in job.tensors)
    return dataclasses.replace(
        whole,
        pattern=open_,
        match=compile_matcher(job.kind, open_),
        served=None,
        parts=parts,
        error=error,
        medians=medians,
        speedup=None if medians is None else medians[0] / medians[1],
        example=sizes_of(job.leaves),
    )


# --- finding them -----------------------------------------------------------------------------


@dataclasses.dataclass
class _Met:
    """How one call of the whole calls a submodule: the first arguments, whether grad mode is on in
    it, and all the seconds."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    grad: bool
    seconds: float = 0.0
    started: float = 0.0


def _drawn(job: Job) -> frozenset[Any]:
    """The generators that the whole draws from. They are left as they were.

    Raises:
        BuildStopped: the module writes to what is not its own. To divide it takes many calls more.
    """

    def call() -> None:
        job.call_with(job.copies())

    written, states = Written(job.module), GeneratorStates.of(job.module)
    with watched() as seen:
        call()
    drawn: frozenset[Any] = frozenset()
    if job.apart is None:  # what was seen to draw is not divided there, and others may draw
        moved = states.moved()
        drawn = drawn_by(call, moved) if moved else moved
        states.put_back(drawn)
    if seen.speaks or written.anything():
        raise BuildStopped(reason("mutates-attribute", "outside of the module"))
    return drawn


def _serve_parts(job: Job, tree: nn.Module, parts: Parts, drawn: frozenset[Any]) -> None:
    """Put plans on the largest submodules that can have one."""
    elsewhere = _plans_elsewhere(job, tree)
    frontier = _children(tree)
    while frontier:
        met = _meet(job, parts, frontier, drawn)
        below: dict[int, nn.Module] = {}
        for module in frontier:
            call = met.get(id(module))
            if call is None or not _is_worth_it(job, module, call):
                continue
            job.check_time()
            if not _is_served(job, module, call, elsewhere.get(module, ())):
                below.update((id(child), child) for child in _children(module))
        frontier = list(below.values())


def _children(module: nn.Module) -> list[nn.Module]:
    """The submodules next below that are called; those that only hold others are passed through."""
    found: dict[int, nn.Module] = {}
    for child in module.children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            found.update((id(inner), inner) for inner in _children(child))
        elif not isinstance(child, torch.jit.ScriptModule):
            found[id(child)] = child
    return list(found.values())


def _meet(
    job: Job, parts: Parts, modules: Sequence[nn.Module], drawn: frozenset[Any]
) -> dict[int, _Met]:
    """Call the whole on the example, and see how these submodules are called."""
    met: dict[int, _Met] = {}

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if id(module) not in met:
            leaves, structure = flatten_call(args, kwargs)
            copies = [_copy(leaf) for leaf in leaves]
            met[id(module)] = _Met(*unflatten_call(copies, structure), torch.is_grad_enabled())
        met[id(module)].started = time.perf_counter()

    def after(module: nn.Module, args: Any, output: Any) -> None:
        met[id(module)].seconds += time.perf_counter() - met[id(module)].started

    with contextlib.ExitStack() as stack:
        for module in modules:
            stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(after).remove)
        args, kwargs = job.arguments(job.copies())
        with seeded(drawn):
            parts(args, kwargs)
    return met


def _copy(leaf: Any) -> Any:
    if not isinstance(leaf, torch.Tensor):
        return leaf
    detached = leaf.detach()
    return (detached.requires_grad_() if leaf.requires_grad else detached).clone()


def _is_worth_it(job: Job, module: nn.Module, call: _Met) -> bool:
    wanted = job.options.prefer == "openvino" and any(True for _ in module.parameters())
    return wanted or call.seconds >= _WORTH_SERVING_SECONDS


def _is_served(job: Job, module: nn.Module, call: _Met, elsewhere: Sequence[Plan]) -> bool:
    """Whether a submodule has got a plan in OpenVINO; if not, it is as it was."""
    options = for_part(job.options)
    assert options is not None  # or nothing is divided
    options = dataclasses.replace(options, max_build_seconds=max(job.seconds_left(), 1e-3))
    bound = install(module, "forward", _PartMaker(options, job.backward))
    dispatcher = bound.dispatcher
    assert isinstance(dispatcher, Dispatcher)
    dispatcher.share(elsewhere)
    with contextlib.suppress(OptionError):  # it refuses its own arguments when asked again
        dispatcher.prepare(call.args, call.kwargs, grad=call.grad)
    dispatcher.share(())  # it would keep them
    if any(plan.served is not None for plan in dispatcher.plans):
        return True
    uninstall(module, "forward")
    return False


def _plans_elsewhere(job: Job, tree: nn.Module) -> dict[nn.Module, list[Plan]]:
    """For each submodule, the plans that it has as a part in the other grad mode."""
    found: dict[nn.Module, list[Plan]] = {}
    inner = dict(tree.named_modules())
    for plan in job.siblings:
        if isinstance(plan.parts, Parts):
            for name, part in plan.parts.tree.named_modules():
                plans = [known for one in _parts_of(part) for known in one.plans]
                if plans and name in inner:
                    found.setdefault(inner[name], []).extend(plans)
    return found


class _PartMaker:
    """Makes the dispatcher of a part: of its troubles the report tells, and no warning."""

    def __init__(self, options: Options, backward: Backward) -> None:
        self.options = options
        self.backward = backward

    def __call__(self, module: nn.Module, original: Callable[..., Any]) -> Dispatcher:
        return Dispatcher(
            module, "forward", original, self.options, quiet=True, backward=self.backward
        )


def _parts_of(module: nn.Module) -> list[Dispatcher]:
    found = (bound.dispatcher for bound in installed(module).values())
    return [dispatcher for dispatcher in found if isinstance(dispatcher, Dispatcher)]


# --- whether they may serve -------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Candidate:
    """The mixed module, as the proof asks it. The parts check their own indices."""

    job: Job
    parts: Parts
    drawn: frozenset[Any]
    checked: bool = True

    def answer(self, values: Sequence[torch.Tensor]) -> Any:
        with serving(), seeded(self.drawn):
            return self.parts(*self.job.arguments(self.job.leaves_with(values)))


def _proved(job: Job, parts: Parts, drawn: frozenset[Any]) -> float:
    """The error of the whole.

    Raises:
        ProofFailedError: it does not answer as eager does.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        with seeded(drawn):
            return job.call(*args, **kwargs)

    eager = Eager(job.module, job.method, call, job.kind, job.leaves, job.tolerance)
    sizes = sizes_of(job.leaves)
    pattern = tuple(
        tuple(None if d in dims else n for d, n in enumerate(own))
        for own, dims in zip(sizes, job.dynamic, strict=True)
    )
    guards = proof.tied(pattern, (), sizes)
    candidate = _Candidate(job, parts, drawn)
    found = proof.prove(eager, candidate, job.tensors, pattern, guards, job.check_time)
    return found.error


def _raced(job: Job, parts: Parts, drawn: frozenset[Any]) -> tuple[float, float]:
    """Seconds of eager and of the mixed module; equal where nothing is decided, for a mixed one
    has to win."""
    args, kwargs = job.arguments()

    def candidate() -> Any:
        with serving():
            return parts(args, kwargs)

    with seeded(drawn):
        finish = race(lambda: job.call(*args, **kwargs), candidate, job.race_seconds())
    if finish.decided and not finish.lost:
        return finish.eager, finish.candidate
    log.debug("parts of %s in OpenVINO gain nothing: %s", type(job.module).__qualname__, finish)
    return finish.eager, finish.eager
