"""Gradients of what OpenVINO has answered, for scripts that never say `no_grad`.

Hardly any call in grad mode is ever differentiated. So OpenVINO answers it, and the answer carries
a node of autograd's graph. If a backward pass comes by, the node runs the module once more, in
eager, and differentiates that, as `torch.utils.checkpoint` does.

The node is one `autograd.Function` whose inputs are all the weights that eager's graph reaches. A
dummy input whose backward accumulates gradients by itself would answer `autograd.grad`, hooks and
double backward otherwise than eager does.

What is run again is a snapshot of the module, for the module may have changed since; over aliases
of its weights, for hooks on the weights themselves would be called twice.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from operator import attrgetter
from typing import Any, Protocol

import torch
from torch import nn
from torch.autograd import Function

from ovshim.generation import Generation
from ovshim.job import BuildStopped, Job
from ovshim.matcher import Builder
from ovshim.plan import Recording
from ovshim.preflight import Look, reached
from ovshim.proof import alike
from ovshim.reasons import Reason, reason
from ovshim.signature import Kind, TensorLeaf, flatten, unflatten_call

__all__ = ["Recorder", "is_watched", "recorder_of", "refusal"]

log = logging.getLogger("ovshim")

_INPUT_GRAD = reason("input-grad")
_BACKWARD = reason("backward")
_SPECIAL_MODE = reason("special-mode")
_HOOKED = reason("grad", "a weight that not every output depends on has a hook")

_saving_hooks = torch._C._autograd._top_saved_tensors_default_hooks
_may_save: Callable[[], bool] = getattr(torch._C._autograd, "_saved_tensors_hooks_is_enabled")  # noqa: B009 # no stub has it
_anomalies = torch.is_anomaly_enabled
_hooks: Callable[[torch.Tensor], tuple[Any, Any]] = attrgetter(
    "_backward_hooks", "_post_accumulate_grad_hooks"
)
_NO_HOOKS = (None, None)


class Backward(AbstractContextManager[Any], Protocol):
    """Entered while a backward pass runs the module again.

    Attributes:
        seen: whether one ever did.
    """

    seen: bool


@dataclasses.dataclass(frozen=True, eq=False)
class Recorder:
    """Builds the outputs of a plan, as its `builder` does, as nodes of autograd's graph.

    Attributes:
        builder: puts computed tensors into the module's own containers.
        call: the module's method, bound to a snapshot of the module.
        held: the tensors of the snapshot, which are the module's own.
        weights: those of them that eager's graph reaches.
        computed: indices of the computed tensors that require grad, and `leaves`, of the same in
            eager's output.
        uneven: whether some outputs reach fewer weights than others.
        kind, constants: the call's leaves; in `constants` None stands for each tensor.
        generation: the state of the module that all this was found in; `name`, of its class.
        backward: see `Backward`.
    """

    builder: Builder
    call: Callable[..., Any]
    held: Sequence[torch.Tensor]
    weights: tuple[torch.Tensor, ...]
    computed: tuple[int, ...]
    leaves: tuple[int, ...]
    uneven: bool
    kind: Kind
    constants: Sequence[Any]
    generation: Generation
    name: str
    backward: Backward

    def __call__(self, computed: Any, given: Sequence[torch.Tensor]) -> Any:
        """The module's output, as `builder` makes it. `computed` is a list, and written to."""
        kept = [computed[i] for i in self.computed]
        for i, tensor in zip(self.computed, _record(self, kept, given, *self.weights), strict=True):
            computed[i] = tensor
        return self.builder(computed, given)

    def gradients(
        self, given: Sequence[torch.Tensor], grads: Sequence[torch.Tensor | None]
    ) -> list[torch.Tensor | None]:
        """The gradient of each weight, for those of the outputs; differentiable in grad mode.

        Raises:
            RuntimeError: a weight has been changed since the call.
        """
        again = torch.is_grad_enabled()  # with create_graph, what is found is differentiated too
        with self.backward, ExitStack() as modes:
            modes.enter_context(torch.inference_mode(False))
            modes.enter_context(torch.set_grad_enabled(True))
            modes.enter_context(torch.autocast("cpu", enabled=False))
            if not self.generation.tensors_hold():
                raise RuntimeError(
                    "One of the variables needed for gradient computation has been modified since "
                    f"the call of {self.name}: it was answered by "
                    "OpenVINO, and its gradients are computed from the weights as they were. Call "
                    "backward() before they change, or make the call in fast.train()."
                )
            aliases = [_view(w) if again else _alias(w) for w in self.weights]
            leaves, _ = flatten(self._run_over(aliases, given))
            outputs = [leaves[i] for i in self.leaves]
            pairs = [(y, g) for y, g in zip(outputs, grads, strict=True) if g is not None]
            if not pairs:
                return [None] * len(aliases)
            found = torch.autograd.grad(
                [y for y, _ in pairs],
                aliases,
                [g for _, g in pairs],
                create_graph=again,
                allow_unused=True,
            )
        return list(found)

    def refusal(self, tensors: Sequence[torch.Tensor]) -> Reason | None:
        """Why eager has to answer a call of these; None where gradients can be recorded."""
        if self.backward.seen:
            return _BACKWARD
        # Eager itself cannot save inference tensors for a backward pass, and says so.
        if is_watched() or any(tensor.is_inference() for tensor in tensors):
            return _SPECIAL_MODE
        # A node hands on a gradient to each weight, None where there is none, and hooks see it.
        if self.uneven and any(_hooks(weight) != _NO_HOOKS for weight in self.weights):
            return _HOOKED
        return None

    def check(self, seen: Look, leaves: Sequence[Any]) -> None:
        """Run the snapshot as a backward pass would.

        Args:
            seen: what eager itself did with these leaves.

        Raises:
            BuildStopped: it is not the same.
        """
        aliases = [_alias(weight) for weight in self.weights]
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        again = Look()
        again.leaves, again.structure = flatten(self._run_over(aliases, tensors))
        own = {id(a): id(w) for a, w in zip(aliases, self.weights, strict=True)}
        found = [{own.get(id(w)) for w in reached(leaf)} for leaf in again.leaves]
        wanted = [set(map(id, tensors)) for tensors in seen.reached]
        if found != wanted or not alike(seen, again):
            raise BuildStopped(reason("grad", "a copy of the module does not answer as it does"))

    def _run_over(self, aliases: Sequence[torch.Tensor], given: Sequence[torch.Tensor]) -> Any:
        """Eager's answer, with these in the place of the weights."""
        memo: dict[int, Any] = {id(tensor): tensor for tensor in self.held}
        memo.update({id(w): a for w, a in zip(self.weights, aliases, strict=True)})
        call = copy.deepcopy(self.call, memo)
        tensors = iter(given)
        leaves: list[Any] = []
        for i, (leaf, constant) in enumerate(zip(self.kind.leaves, self.constants, strict=True)):
            if isinstance(leaf, TensorLeaf):
                tensor = next(tensors)
                leaves.append(tensor if leaf.same_as == i else leaves[leaf.same_as])
            else:
                leaves.append(constant)
        args, kwargs = unflatten_call(leaves, self.kind.structure)
        return call(*args, **kwargs)


class Recomputed(Function):
    """The node. (Its name shows in `grad_fn`.)"""

    @staticmethod
    def forward(
        ctx: Any,
        recorder: Recorder,
        computed: Sequence[torch.Tensor],
        given: Sequence[torch.Tensor],
        *weights: torch.Tensor,
    ) -> Any:
        ctx.recorder = recorder
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*given)
        return tuple(computed)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> Any:
        return None, None, None, *ctx.recorder.gradients(ctx.saved_tensors, grads)


# Function.apply asks for functorch first, which a call that comes here is not under.
_record: Callable[..., Any] = super(Function, Recomputed).apply


def recorder_of(
    job: Job,
    generation: Generation,
    builder: Builder,
    outputs: Sequence[int],
    seen: Look,
    leaves: Sequence[Any],
) -> Recorder | None:
    """What gives a plan's outputs their gradients; None where eager's have none either.

    Args:
        outputs: for each computed tensor, which leaf of eager's output it is.
        seen: what eager did with `leaves`.

    Raises:
        BuildStopped: eager's gradients could not be promised.
    """
    if not job.grad or not any(seen.reached):
        return None
    weights = {id(tensor): tensor for tensors in seen.reached for tensor in tensors}
    foreign = weights.keys() - set(map(id, generation.tensors))
    if foreign or not all(weight.is_leaf for weight in weights.values()):
        raise BuildStopped(reason("grad", "the output depends on a tensor beside the module's own"))
    call: Any = job.call if job.apart is None else job.apart.resolve()
    held = _tensors_of(call.__self__)
    try:
        snapshot = copy.deepcopy(call, {id(tensor): tensor for tensor in held})
    except Exception as error:  # whatever the attributes of users' modules raise
        raise BuildStopped(reason("grad", f"the module cannot be copied: {error}")) from error
    computed = [n for n, i in enumerate(outputs) if seen.reached[i]]
    made = Recorder(
        builder=builder,
        call=snapshot,
        held=held,
        weights=tuple(weights.values()),
        computed=tuple(computed),
        leaves=tuple(outputs[n] for n in computed),
        uneven=any(len(seen.reached[outputs[n]]) < len(weights) for n in computed),
        kind=job.kind,
        constants=[None if isinstance(leaf, torch.Tensor) else leaf for leaf in job.leaves],
        generation=generation,
        name=type(job.module).__qualname__,
        backward=job.backward,
    )
    try:
        made.check(seen, leaves)
    except BuildStopped:
        raise
    except Exception as error:
        raise BuildStopped(reason("grad", f"a copy of the module raised: {error}")) from error
    return made


def refusal(tensors: Sequence[torch.Tensor], recorder: Recording | None) -> Reason | None:
    """Why eager has to answer a call in grad mode, of a plan that OpenVINO serves; else None.

    Args:
        recorder: the plan's; None where nothing of the module requires grad.
    """
    for tensor in tensors:
        if tensor.requires_grad:
            return _INPUT_GRAD
    return None if recorder is None else recorder.refusal(tensors)


def is_watched() -> bool:
    """Whether somebody looks at what this thread records for a backward pass: one node in the
    place of a module's own would show."""
    return _anomalies() or not _may_save() or _saving_hooks(True) is not None


def _tensors_of(module: nn.Module) -> list[torch.Tensor]:
    plain = (value for inner in module.modules() for value in vars(inner).values())
    attributes = [value for value in plain if isinstance(value, torch.Tensor)]
    return [*module.parameters(), *module.buffers(), *attributes]


def _alias(weight: torch.Tensor) -> torch.Tensor:
    """A leaf over the same memory."""
    detached = weight.detach()
    if isinstance(weight, nn.Parameter):
        return nn.Parameter(detached)
    return detached.requires_grad_()


def _view(weight: torch.Tensor) -> torch.Tensor:
    """The same for double backward: what is computed of it depends on the weight itself."""
    return weight.view_as(weight)
