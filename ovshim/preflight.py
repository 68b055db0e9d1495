"""One look at eager: what a call of the module gives, and what it does besides.

A graph gives outputs and does nothing else. A module that does something else (writes to its
inputs or buffers, keeps a counter, draws random numbers, changes a setting of torch's) is found
here, by comparing the world before and after a call, and stays in eager with that reason.
"""

from __future__ import annotations

import dataclasses
import io
import logging
import random
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
import torch.utils._pytree as pytree
from torch import nn

from ovshim.attributes import Attributes, tensors_beside, tensors_of
from ovshim.containers import opened
from ovshim.modes import Drawing, Writes, Writing, harmless
from ovshim.random_generators import GeneratorStates, drawn_by
from ovshim.reasons import Reason, reason
from ovshim.settings import Settings
from ovshim.shortage import build_failure
from ovshim.signature import Structure, UnknownLeafError, flatten, kind_of
from ovshim.stamps import stamp
from ovshim.views import overlaps, storage_of
from ovshim.watched import Seen, watched

__all__ = ["Look", "Sources", "look", "place_of", "sources", "used_up"]

log = logging.getLogger("ovshim")

# Of a write to what was made in inference mode, which trials are not in.
_OUTSIDE = "Inplace update to inference tensor outside InferenceMode"

# Buffers are copied before a trial call, so that they can be put back. Beyond this many bytes (no
# module met so far) they are not: a second copy of a model's size is not ours to take.
_RESTORABLE_BYTES = 64 << 20
_GENERATORS = (torch.Generator, random.Random, np.random.Generator, np.random.RandomState)


def used_up(module: nn.Module) -> Reason | None:
    """What a module holds that a look would use up, and nobody could put back: its own iterators
    and generators of random numbers. Files are left out: what they are for is writing."""
    ends: dict[type, bool] = {}  # thousands of attributes are of a few classes
    for path, inner in module.named_modules():
        for name, value in vars(inner).items():
            held = value.values() if isinstance(value, dict) else value
            for one in held if isinstance(value, (list, tuple, dict)) else (value,):
                kind = type(one)
                if ends[kind] if kind in ends else ends.setdefault(kind, _ends(kind)):
                    where = f"{path}.{name}".lstrip(".")
                    return reason("mutates-attribute", f"a call may use up {where}, {one!r}")
    return None


def _ends(kind: type) -> bool:
    return issubclass(kind, (Iterator, *_GENERATORS)) and not issubclass(kind, io.IOBase)


class Look:
    """What one call of a module gave and did.

    Attributes:
        leaves, structure: the flattened output.
        containers: the objects that hold the leaves and may be written to.
        given: for each leaf, the index of the input tensor that it is (the same object), or None.
        sources: see `sources`.
        overlaps: pairs of leaves, tensors that have memory in common.
        seconds: how long the call took.
        undo: puts attributes back to what they were before the call.
        made: attributes that are not what they were before the call, by path; None where a list, a
            dict or a set was written to, hooks left out.
        drew: generators of random numbers that it draws from (`GeneratorStates`); of a call of the
            user's, those that have moved, whoever drew.
        reason: why this module cannot be served by a graph, or None.
    """

    leaves: list[Any]
    structure: Structure
    containers: list[Any]
    given: list[int | None]
    sources: list[Sources | None]
    overlaps: tuple[tuple[int, int], ...] = ()
    seconds: float
    drew: frozenset[Any] = frozenset()
    reason: Reason | None = None
    undo: Callable[[], None]
    made: Callable[[], dict[str, Any] | None]


def look(
    module: nn.Module,
    call: Callable[[], Any],
    inputs: Sequence[torch.Tensor],
    restore: bool,
    apart: bool = False,
    suspected: frozenset[Any] = frozenset(),
    arguments: Any = (),
) -> Look:
    """Run `call()` (which calls `module` on `inputs`) and watch.

    Args:
        restore: put buffers, generators, and the parameters that this thread writes to, back to
            what they were, because this is a trial and not a call of the user's, which keeps every
            effect it has. Attributes are the caller's business (`Look.undo`), unless the module
            raises.
        apart: the module is a copy that nobody else has, and other threads go on meanwhile. The
            generators are theirs too: they are neither compared nor put back. An operator that
            would draw from torch's is not run, and this thread is watched for Python's. (What
            NumPy's gives shows in the output: two calls then differ.)
        suspected: generators that an earlier call may have drawn from, or may have left where the
            next one leaves them.
        arguments: what `call` gives to the module, tensors and what holds them.

    Raises:
        whatever the module raises.
    """
    world = _World(module, inputs, restore, arguments)
    found, seen = Look(), Seen()
    found.undo, found.made = world.put_back_attributes, world.made_attributes
    started = time.perf_counter()
    try:
        if apart and world.generators.has_own:
            raise Drawing  # whose numbers other threads may be drawing meanwhile
        if apart:
            with watched() as seen:
                output = harmless(call, [tensor for _, tensor, _ in world.tensors])
        elif restore:
            with watched() as seen:
                output = world.keeping(call)
        else:
            output = call()
    except Drawing:
        output = None
        found.reason = reason("random")
    except Writing as writing:
        output = None
        found.reason = reason("mutates-buffer", world.name_of(writing.args[0]))
    except BaseException as error:
        if not restore and not apart:
            raise
        found.undo()
        if not isinstance(error, RuntimeError) or _OUTSIDE not in str(error):
            raise
        output = None
        found.reason = reason("mutates-buffer", "one that was made in inference mode")
    finally:
        found.seconds = time.perf_counter() - started
        try:
            again = call if restore else None
            found.reason = found.reason or world.difference(again, apart, seen, suspected)
        finally:  # it calls as well
            found.drew = world.drew
            if restore:
                world.put_back()
            if restore or apart:
                world.settings.put_back(world.settings_of(seen, watched=True))
    try:
        _describe(found, output, inputs, world)
    except Exception as error:  # a fault of ours must not take away the user's answer
        log.debug("the output was not understood", exc_info=True)
        found.reason = build_failure(error)
        found.leaves, found.structure = flatten(())
        found.containers, found.given, found.sources = [], [], []
    return found


def _describe(found: Look, output: Any, inputs: Sequence[torch.Tensor], world: _World) -> None:
    found.leaves, found.structure = flatten(output)
    found.containers = _containers(output)
    found.given = [_index_of(leaf, inputs) for leaf in found.leaves]
    found.sources = sources(found.leaves, inputs)
    if {id(held) for held in found.containers} & {id(held) for held in world.containers}:
        what = "the output holds a list or a dict that was given"
        found.reason = found.reason or reason("aliases-input", what)
    found.reason = found.reason or _unfit_output(
        found, [*inputs, *(tensor for _, tensor, _ in world.tensors)]
    )
    if found.reason is None:
        found.overlaps = tuple(overlaps(found.leaves))


@dataclasses.dataclass(frozen=True)
class Sources:
    """What a tensor of an output is computed from, in autograd's graph.

    Attributes:
        weights: leaves of the graph.
        inputs: tensors of the call, by index.
        outputs: other tensors of the output, by index; what is reached only by way of them, or of
            inputs, is left out.
    """

    weights: tuple[torch.Tensor, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


def sources(leaves: Sequence[Any], inputs: Sequence[torch.Tensor]) -> list[Sources | None]:
    """The sources of each leaf of an output; None where it does not require grad.

    Args:
        inputs: those of the call; what is computed is not followed beyond them.
    """
    given: dict[Any, int] = {}
    for i, tensor in enumerate(inputs):
        if _is_in_graph(tensor):
            given.setdefault(_edge(tensor), i)
    edges: dict[Any, int] = {}
    for i, leaf in enumerate(leaves):
        if _is_in_graph(leaf) and _edge(leaf) not in given:
            edges.setdefault(_edge(leaf), i)
    return [_sources(leaf, given, edges) if _is_in_graph(leaf) else None for leaf in leaves]


def _is_in_graph(leaf: Any) -> bool:
    """Whether autograd follows a tensor further. A view of a parameter that was made without grad
    says that it requires grad, and comes from nowhere."""
    if not isinstance(leaf, torch.Tensor) or not leaf.requires_grad:
        return False
    return leaf.grad_fn is not None or not leaf._is_view()


def _edge(tensor: torch.Tensor) -> Any:
    """Where a tensor comes from in autograd's graph."""
    with torch.inference_mode(False):  # a leaf's is that of a view of it
        return tuple(torch.autograd.graph.get_gradient_edge(tensor)[:2])


def _sources(tensor: torch.Tensor, given: dict[Any, int], edges: dict[Any, int]) -> Sources:
    start = _edge(tensor)
    if start in given:
        return Sources((), (given[start],), ())
    own = edges[start]
    weights: list[torch.Tensor] = []
    inputs: set[int] = set()
    outputs: set[int] = set()
    todo: list[Any] = [start[0]]
    seen = set(todo)
    while todo:
        node = todo.pop()
        if hasattr(node, "variable"):  # only nodes that accumulate a leaf's gradient have it
            weights.append(node.variable)
        for edge in node.next_functions:
            if edge in given:
                inputs.add(given[edge])
            elif edges.get(edge, own) != own:
                outputs.add(edges[edge])
            elif edge[0] is not None and edge[0] not in seen:
                seen.add(edge[0])
                todo.append(edge[0])
    return Sources(tuple(weights), tuple(sorted(inputs)), tuple(sorted(outputs)))


class _World:
    """What a call may leave changed, before the call."""

    def __init__(
        self, module: nn.Module, inputs: Sequence[torch.Tensor], copies: bool, arguments: Any
    ) -> None:
        self.containers = _containers(arguments)
        self.inputs = [(t, stamp(t)) for t in inputs]
        modules = list(module.named_modules())
        parameters, buffers = tensors_of(module, modules)
        self.tensors = [(name, t, (stamp(t), place_of(t))) for name, t in (*parameters, *buffers)]
        self.kept = [*(t for _, t in parameters), *tensors_beside(modules)]
        self.named = {id(t) for _, t in (*parameters, *buffers)}
        self.attributes = [Attributes(name, m) for name, m in modules]
        self.generators = GeneratorStates.of(module)
        self.settings = Settings()
        # Not parameters: another thread may be at them, and its update must not be undone. Those
        # that this thread writes to are copied just before, as are tensors in other attributes.
        self.written: list[tuple[torch.Tensor, torch.Tensor]] = []
        size = sum(b.numel() * b.element_size() for _, b in buffers)
        copied = buffers if copies and size <= _RESTORABLE_BYTES else ()
        self.copies = [(b, b.detach().clone()) for _, b in copied]
        self.drew: frozenset[Any] = frozenset()

    def keeping(self, call: Callable[[], Any]) -> Any:
        """`call()`, with a copy kept of each of these that it writes to."""
        writes = Writes(self.kept)
        self.written = writes.copies
        with writes:
            return call()

    def difference(
        self,
        call: Callable[[], Any] | None,
        apart: bool,
        seen: Seen,
        suspected: frozenset[Any],
    ) -> Reason | None:
        """What the call has changed. `call` may be called again to find out."""
        written = self._written_to()
        settings = [*self.settings_of(seen, apart or call is not None), *seen.set_again()]
        if written is None and settings:
            written = reason("mutates-setting", f"torch.{settings[0]}")
        if apart:
            self.drew = frozenset(seen.generators)
        else:
            self.drew = self.generators.moved() | seen.generators | suspected
            if self.drew and call is not None:
                self.drew = drawn_by(call, self.drew)
        return written or (reason("random") if self.drew else None)

    def settings_of(self, seen: Seen, watched: bool) -> list[str]:
        """Those that the call has changed. Of one that was watched not what others have set
        meanwhile, nor how many threads `intraop` gives it."""
        own = {*seen.settings, "set_grad_enabled"}
        return [name for name in self.settings.changed() if not watched or name in own]

    def _written_to(self) -> Reason | None:
        for i, (tensor, version) in enumerate(self.inputs):
            if stamp(tensor) != version:
                return reason("mutates-input", f"input tensor {i}")
        for name, tensor, known in self.tensors:
            if (stamp(tensor), place_of(tensor)) != known:
                return reason("mutates-buffer", name)
        if any(id(tensor) not in self.named for tensor, _ in self.written):
            return reason("mutates-attribute", "a tensor in one")
        for attributes in self.attributes:
            changed = attributes.changed()
            if changed:
                return reason("mutates-attribute", f"{attributes.name}.{changed}".lstrip("."))
        return None

    def name_of(self, tensor: torch.Tensor) -> str:
        return next((name for name, known, _ in self.tensors if known is tensor), "")

    def put_back(self) -> None:
        self.generators.put_back(self.drew)
        with torch.no_grad():
            for buffer, copy in [*self.written, *self.copies]:
                if torch.equal(buffer, copy):
                    continue
                # Elsewhere it is refused, though only when it is done.
                inside = torch.inference_mode() if buffer.is_inference() else nullcontext()
                with inside:
                    buffer.copy_(copy)

    def made_attributes(self) -> dict[str, Any] | None:
        if any(attributes.filled() for attributes in self.attributes):
            return None
        made = (attributes.made() for attributes in self.attributes)
        return dict(pair for each in made for pair in each.items())

    def put_back_attributes(self) -> None:
        for attributes in self.attributes:
            attributes.put_back()


def place_of(tensor: torch.Tensor) -> int:
    """Where its values lie; 0 where it has no one place. A write by `data` tells by it alone."""
    try:
        return tensor.data_ptr()
    except RuntimeError:
        return 0


def _index_of(leaf: Any, inputs: Sequence[torch.Tensor]) -> int | None:
    return next((i for i, given in enumerate(inputs) if given is leaf), None)


def _containers(output: Any) -> list[Any]:
    """What within an output may be written to, tensors aside. What comes back from a second call is
    not made by the call: it belongs to somebody, and must stay what it is."""
    inside = opened(output, caches=True)
    mutable = isinstance(output, (list, dict, deque)) or (inside is not None and inside.mutable)
    met = [output] if mutable else []
    if inside is not None:
        held = inside.values(output)
    else:
        held = pytree.tree_flatten(output, is_leaf=lambda one: one is not output)[0]
    for one in held:
        if one is not output:  # as a leaf is of itself
            met += _containers(one)
    return met


def _unfit_output(found: Look, taken: Sequence[torch.Tensor]) -> Reason | None:
    """Why no graph gives such an output; `taken`: the inputs and the module's own tensors."""
    try:
        kind_of(found.leaves, found.structure)
    except UnknownLeafError as unknown:
        name = str(unknown)
        # Who reads no cache of it need not have one made.
        of_steps = name.startswith("transformers.") and name.endswith("Cache")
        more = ", of which there is none with use_cache=False" if of_steps else ""
        return reason("unknown-leaf", f"the output holds a {name}{more}")
    if len({id(held) for held in found.containers}) < len(found.containers):
        return reason("aliases-input", "the output holds one object twice")
    tensors = [leaf for leaf in found.leaves if isinstance(leaf, torch.Tensor)]
    for tensor in tensors:
        unfit = type(tensor) is not torch.Tensor or tensor.layout is not torch.strided
        if unfit or not tensor.is_cpu or tensor.is_quantized or tensor.is_complex():
            what = f"a {type(tensor).__qualname__} of {tensor.dtype} on {tensor.device}"
            return reason("special-tensor", f"the output holds {what}")
    owned = {storage_of(tensor) for tensor in taken}
    for leaf, given in zip(found.leaves, found.given, strict=True):
        if isinstance(leaf, torch.Tensor) and given is None and storage_of(leaf) in owned - {0}:
            return reason("aliases-input")
    return None
