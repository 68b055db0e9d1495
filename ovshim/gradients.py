"""Gradients of what OpenVINO has answered, for scripts that never say `no_grad`.

Hardly any call in grad mode is ever differentiated. So OpenVINO answers it, and the answer carries
a node of autograd's graph. If a backward pass comes by, the node runs the module once more, in
eager, and differentiates that, as `torch.utils.checkpoint` does.

The node is an `autograd.Function` whose inputs are all the weights that eager's graph reaches, and
what of the call requires grad: the answer of a module before, of a part beside. A dummy input whose
backward accumulates gradients by itself would answer `autograd.grad`, hooks and double backward
otherwise than eager does. An output that eager computes from another one (pooled from hidden
states) gets a node with that one for an input.

What is run again is a snapshot of the module, for the module may have changed since; over aliases
of its weights, for hooks on the weights themselves would be called twice.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import graphlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.autograd import Function

from ovshim.building import Backward
from ovshim.generation import Generation
from ovshim.job import BuildStopped, Job
from ovshim.matcher import Builder
from ovshim.preflight import Look, sources
from ovshim.reasons import Reason, reason
from ovshim.recordable import backward_hooks, hindrance
from ovshim.signature import Kind, TensorLeaf, flatten, unflatten_call
from ovshim.trial import alike

__all__ = ["Recorder", "recorder_of"]

log = logging.getLogger("ovshim")


@dataclasses.dataclass(frozen=True, eq=False)
class Node:
    """A node to be: for outputs that are computed from the same.

    Attributes:
        computed: indices of the tensors; `leaves`, of the same in eager's output.
        parents: indices of other tensors that these are computed from; `parent_leaves`, in eager's
            output.
        inputs: tensors of the call that they are computed from, by index.
        weights: the weights that they are computed from. What is reached only by way of parents is
            left out.
    """

    computed: tuple[int, ...]
    leaves: tuple[int, ...]
    parents: tuple[int, ...]
    parent_leaves: tuple[int, ...]
    inputs: tuple[int, ...]
    weights: tuple[torch.Tensor, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Recorder:
    """Builds the outputs of a plan, as its `builder` does, as nodes of autograd's graph.

    Attributes:
        builder: puts computed tensors into the module's own containers.
        call: the module's method, bound to a snapshot of the module.
        held: the tensors of the snapshot, which are the module's own.
        weights: those of them that eager's graph reaches.
        nodes: parents first.
        hooks: those of the module's submodules that a backward pass would call.
        kind, constants: the call's leaves; in `constants` None stands for each tensor.
        generation: the state of the module that all this was found in; `name`, of its class.
        backward: see `Backward`.
    """

    builder: Builder
    call: Callable[..., Any]
    held: Sequence[torch.Tensor]
    weights: tuple[torch.Tensor, ...]
    nodes: tuple[Node, ...]
    hooks: tuple[Any, ...]
    kind: Kind
    constants: Sequence[Any]
    generation: Generation
    name: str
    backward: Backward

    def __call__(self, computed: Any, given: Sequence[torch.Tensor]) -> Any:
        """The module's output, as `builder` makes it. `computed` is a list, and written to."""
        for node in self.nodes:
            kept = [computed[i] for i in node.computed]
            parents = [computed[i] for i in node.parents]
            inputs = [given[i] for i in node.inputs]
            recorded = _record(self, node, kept, given, *parents, *inputs, *node.weights)
            for i, tensor in zip(node.computed, recorded, strict=True):
                computed[i] = tensor
        return self.builder(computed, given)

    def refusal(self, tensors: Sequence[torch.Tensor]) -> Reason | None:
        """Why eager has to answer a call of these; None where gradients can be recorded."""
        return hindrance(tensors, self.hooks, self.backward)

    def gradients(
        self,
        node: Node,
        given: Sequence[torch.Tensor],
        grads: Sequence[torch.Tensor | None],
    ) -> list[torch.Tensor | None]:
        """The gradients of a node's parents, inputs and weights, for those of its outputs;
        differentiable in grad mode.

        Raises:
            RuntimeError: a weight has been changed since the call.
        """
        again = torch.is_grad_enabled()  # with create_graph, what is found is differentiated too
        with self.backward, torch.inference_mode(False), torch.enable_grad():
            if not self.generation.tensors_hold():
                raise RuntimeError(
                    "One of the variables needed for gradient computation has been modified since "
                    f"the call of {self.name}: it was answered by OpenVINO, and its gradients are "
                    "computed from the weights as they were. Call backward() before they change."
                )
            aliases = {id(w): _view(w) if again else _alias(w) for w in self.weights}
            inputs = _inputs(given, again)
            with torch.autocast("cpu", enabled=False):  # as in the call
                leaves, _ = flatten(self._run_over(aliases, inputs))
            pairs = [
                (leaves[i], grad)
                for i, grad in zip(node.leaves, grads, strict=True)
                if grad is not None
            ]
            parents = [leaves[i] for i in node.parent_leaves]
            weights = [aliases[id(weight)] for weight in node.weights]
            cut = _Cut(parents)
            found = torch.autograd.grad(
                [leaf for leaf, _ in pairs],
                [*parents, *(inputs[i] for i in node.inputs), *weights],
                [grad for _, grad in pairs],
                create_graph=again,
                allow_unused=True,
            )
        return [*cut.grads, *found[len(parents) :]]

    def check(self, seen: Look, leaves: Sequence[Any]) -> None:
        """Run the snapshot as a backward pass would.

        Args:
            seen: what eager itself did with these leaves.

        Raises:
            BuildStopped: it is not the same.
        """
        aliases = {id(weight): _alias(weight) for weight in self.weights}
        given = self.kind.requiring(leaves)
        inputs = _inputs([leaf for leaf in given if isinstance(leaf, torch.Tensor)], again=False)
        again = Look()
        again.leaves, again.structure = flatten(self._run_over(aliases, inputs))
        wanted = [
            source
            and (source.inputs, source.outputs, {id(aliases.get(id(w))) for w in source.weights})
            for source in seen.sources
        ]
        found = [
            source and (source.inputs, source.outputs, set(map(id, source.weights)))
            for source in sources(again.leaves, inputs)
        ]
        if found != wanted or not alike(seen, again):
            raise BuildStopped(reason("grad", "a copy of the module does not answer as it does"))

    def _run_over(self, aliases: Mapping[int, torch.Tensor], given: Sequence[torch.Tensor]) -> Any:
        """Eager's answer, with other tensors in the place of the weights, given by their ids."""
        call = copy.deepcopy(self.call, {id(tensor): tensor for tensor in self.held} | {**aliases})
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


class _Cut:
    """Keeps the gradients that arrive at tensors, and lets none of them go on from there: what is
    beyond is another node's.

    Attributes:
        grads: the gradient of each tensor, None where none has arrived.
    """

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self.grads: list[torch.Tensor | None] = [None] * len(tensors)
        for i, tensor in enumerate(tensors):
            torch.Tensor.register_hook(tensor, functools.partial(self._arrived, i))  # type: ignore[no-untyped-call]

    def _arrived(self, i: int, grad: torch.Tensor) -> torch.Tensor:
        self.grads[i] = grad
        return torch.zeros_like(grad)


class Recomputed(Function):
    """The node. (Its name shows in `grad_fn`.)"""

    @staticmethod
    def forward(
        ctx: Any,
        recorder: Recorder,
        node: Node,
        computed: Sequence[torch.Tensor],
        given: Sequence[torch.Tensor],
        *sources: torch.Tensor,
    ) -> Any:
        ctx.recorder, ctx.node = recorder, node
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*given)
        return tuple(computed)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> Any:
        given = ctx.saved_tensors
        if all(grad is None for grad in grads):
            return (None,) * len(ctx.needs_input_grad)
        return None, None, None, None, *ctx.recorder.gradients(ctx.node, given, grads)


# Function.apply asks for functorch first, which a call that comes here is not under.
_record: Callable[..., Any] = super(Function, Recomputed).apply


def recorder_of(
    job: Job,
    generation: Generation,
    builder: Builder,
    outputs: Sequence[int],
    seen: Look,
    leaves: Sequence[Any],
) -> Recorder:
    """What gives a plan's outputs their gradients, where some of eager's have any.

    Args:
        outputs: for each computed tensor, which leaf of eager's output it is.
        seen: what eager did with `leaves`.

    Raises:
        BuildStopped: eager's gradients could not be promised.
    """
    found = [source for i in outputs if (source := seen.sources[i]) is not None]
    if not job.grad:
        raise BuildStopped(reason("grad", "the module turns grad mode on by itself"))
    weights = {id(w): w for source in found for w in source.weights}
    foreign = weights.keys() - set(map(id, generation.tensors))
    if foreign or not all(weight.is_leaf for weight in weights.values()):
        raise BuildStopped(reason("grad", "the output depends on a tensor beside the module's own"))
    snapshot, held = _snapshot(job)
    made = Recorder(
        builder=builder,
        call=snapshot,
        held=held,
        weights=tuple(weights.values()),
        nodes=tuple(_nodes(seen, outputs)),
        hooks=backward_hooks(job.module),
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


def _snapshot(job: Job) -> tuple[Any, list[torch.Tensor]]:
    """The method, bound to a copy of the module as it is, and the tensors that the two share."""
    call: Any = job.call if job.apart is None else job.apart.resolve()
    if getattr(call, "__self__", None) is not (job.apart or job).module:
        raise BuildStopped(reason("grad", f"its {job.method} is no method of the module's class"))
    held = _tensors_of(call.__self__)
    try:
        return copy.deepcopy(call, {id(tensor): tensor for tensor in held}), held
    except Exception as error:  # whatever the attributes of users' modules raise
        raise BuildStopped(reason("grad", f"the module cannot be copied: {error}")) from error


def _nodes(seen: Look, outputs: Sequence[int]) -> Iterator[Node]:
    """One node for all outputs of the same sources: for several, each would run the module again.
    Not one for outputs of other sources: it would hand on gradients to weights that have none, and
    hooks would see them."""
    groups: dict[Any, list[int]] = {}
    below = {i: source.outputs for i in outputs if (source := seen.sources[i]) is not None}
    for i in graphlib.TopologicalSorter(below).static_order():
        source = seen.sources[i]
        assert source is not None
        key = source.outputs, source.inputs, frozenset(map(id, source.weights))
        groups.setdefault(key, []).append(i)
    place = {i: n for n, i in enumerate(outputs)}
    for leaves in groups.values():
        source = seen.sources[leaves[0]]
        assert source is not None
        yield Node(
            computed=tuple(place[i] for i in leaves),
            leaves=tuple(leaves),
            parents=tuple(place[i] for i in source.outputs),
            parent_leaves=source.outputs,
            inputs=source.inputs,
            weights=source.weights,
        )


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


def _inputs(given: Sequence[torch.Tensor], again: bool) -> list[torch.Tensor]:
    """The tensors of a call, with others over the same memory for those that require grad: what is
    one object stays one."""
    made = {id(x): (_view(x) if again else _alias(x)) if x.requires_grad else x for x in given}
    return [made[id(x)] for x in given]


def _view(weight: torch.Tensor) -> torch.Tensor:
    """The same for double backward: what is computed of it depends on the weight itself."""
    return weight.view_as(weight)
