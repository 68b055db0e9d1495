"""`torch.compile(model, backend="ovshim")`: the graphs that Dynamo cuts out of a program.

Dynamo hands over a graph whose weights are inputs, and passes the present ones on every call
without a look at them. Here they are frozen: for each set of weights that comes along, a module
that holds them and takes the rest, which is served like any other module: proved against the graph
itself, raced against it, watched for changes of the weights, kept in the cache. Calls that record
gradients run the graph as it was given.
"""

from __future__ import annotations

import collections
import copy
import dataclasses
import operator
import re
import threading
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter, itemgetter
from typing import Any

import torch
from torch import fx, nn

from ovshim.bound import Original
from ovshim.dispatch import Dispatcher
from ovshim.errors import FallbackWarning, OptionError
from ovshim.handle import report_of
from ovshim.options import Options, resolve
from ovshim.reasons import reason
from ovshim.report import Report

__all__ = ["compile_graph", "reports"]

# Instances of a class, and repeated layers, share one graph: so many sets of weights are kept.
_MOST_SETS = 8
# What Dynamo says by itself, or what is of modules.
_NOT_OF_GRAPHS = ("inplace", "methods", "dynamic_shapes", "dynamic_batch")

# What Dynamo writes for arithmetic on sizes, and does not read itself.
_OF_NUMBERS: dict[Any, Callable[..., Any]] = {
    torch.sym_sum: sum,
    torch.sym_max: max,
    torch.sym_min: min,
    torch.sym_int: int,
    torch.sym_float: float,
    torch.sym_not: operator.not_,
}

_wants_grad: Callable[[torch.Tensor], bool] = attrgetter("requires_grad")
_data_ptr: Callable[[torch.Tensor], int] = torch.Tensor.data_ptr


def compile_graph(
    graph: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """What `torch.compile(..., backend="ovshim", options={...})` calls for each graph.

    Args:
        options: fields of `ovshim.Options`, but for those that Dynamo says by itself (which sizes
            change) or that are said of modules.

    Raises:
        OptionError: a value that cannot be right. torch.compile shows it as the cause of its own
            exception.
    """
    if mode not in (None, "default"):
        raise OptionError("mode", mode, "None", "Leave it out: it is for inductor.")
    fields = dict(options or {})
    for name in _NOT_OF_GRAPHS:
        if name in fields:
            raise OptionError(name, fields[name], "nothing here", "Leave it out.")
    chosen = resolve(None, fields)
    layout = _Layout.of(graph)
    # The same graph comes again for each mode (no_grad, inference_mode), and from threads that
    # compile at once. Its constants are not in its code.
    constants = any(node.op in ("get_attr", "call_module") for node in graph.graph.nodes)
    key = repr((graph.code, layout.dynamic, chosen, id(graph) if constants else None))
    with _lock:
        known = _graphs.get(key)
        if known is None:
            known = _graphs[key] = Graph(graph, layout, chosen)
        return known


def reports() -> list[Report]:
    """How each graph has been served so far, one report for each set of weights."""
    return [frozen.report() for known in list(_graphs.values()) for frozen in known.frozen]


@dataclasses.dataclass(frozen=True)
class _Layout:
    """What the inputs of a graph are, by position.

    Attributes:
        static: weights, buffers and tensor attributes.
        given: what a frozen graph takes: tensors, and numbers that are no tensor's size.
        floats: those of `given` that come as tensors, although they are Python's numbers.
        sizes: inputs that are the size of a dimension of another one.
        dynamic: for each of `given`, the dimensions that may change.
    """

    static: tuple[int, ...]
    given: tuple[int, ...]
    floats: frozenset[int]
    sizes: Mapping[int, tuple[int, int]]
    dynamic: tuple[tuple[int, ...], ...]

    @staticmethod
    def of(graph: fx.GraphModule) -> _Layout:
        nodes = graph.graph.find_nodes(op="placeholder")
        static = [i for i, node in enumerate(nodes) if _is_static(node)]
        examples = [node.meta.get("example_value") for node in nodes]
        sizes: dict[int, tuple[int, int]] = {}
        for i, symbol in enumerate(examples):
            if isinstance(symbol, torch.SymInt):
                place = _place_of(symbol, examples)
                if place is not None:
                    sizes[i] = place
        given = [i for i in range(len(nodes)) if i not in static and i not in sizes]
        return _Layout(
            static=tuple(static),
            given=tuple(given),
            floats=frozenset(i for i in given if _is_number(nodes[i])),
            sizes=sizes,
            dynamic=tuple(_open_dims(examples[i]) for i in given),
        )


def _is_static(node: fx.Node) -> bool:
    return "_dynamo_static_input_type" in (node.meta.get("tensor_dict") or {})


def _is_number(node: fx.Node) -> bool:
    """Whether it is a float of Python's: Dynamo makes a tensor of one that changes, and has the
    graph take the number out again."""
    fake = node.meta.get("example_value")
    return (
        isinstance(fake, torch.Tensor)
        and fake.dim() == 0
        and fake.dtype is torch.float64
        and bool(node.users)
        and all(user.op == "call_method" and user.target == "item" for user in node.users)
    )


def _place_of(symbol: torch.SymInt, examples: Sequence[Any]) -> tuple[int, int] | None:
    for i, other in enumerate(examples):
        if isinstance(other, torch.Tensor):
            sizes: list[Any] = list(other.shape)
            for d, size in enumerate(sizes):
                if isinstance(size, torch.SymInt) and size.node.expr == symbol.node.expr:
                    return i, d
    return None


def _open_dims(example: Any) -> tuple[int, ...]:
    if not isinstance(example, torch.Tensor):
        return ()
    sizes: list[Any] = list(example.shape)
    return tuple(d for d, size in enumerate(sizes) if _is_open(size))


def _is_open(size: Any) -> bool:
    """Not a symbol that turned out to have but one value."""
    return isinstance(size, torch.SymInt) and not size.node.expr.is_number


class Graph:
    """What Dynamo calls in the place of a graph, from any thread.

    Attributes:
        frozen: the graph with each set of weights that is known at the moment.
    """

    def __init__(self, graph: fx.GraphModule, layout: _Layout, options: Options) -> None:
        self._name = _name_of(graph)
        self._eager = graph.forward
        # Inside, whatever the caller's mode is.
        self._enables_grad = any(
            node.target is torch._C._set_grad_enabled and node.args[0] is True
            for node in graph.graph.nodes
        )
        self._graph = graph
        self._layout = layout
        self._options = dataclasses.replace(
            options,
            dynamic_batch=False,
            # Each by a name of its own: which are one, the capture finds out.
            dynamic_shapes=[
                {d: f"size{n}_{d}" for d in dims} or None for n, dims in enumerate(layout.dynamic)
            ],
        )
        self._statics = _getter(layout.static)
        self._given = _getter(layout.given)
        tensors = [
            i
            for i, node in enumerate(graph.graph.find_nodes(op="placeholder"))
            if isinstance(node.meta.get("example_value"), torch.Tensor)
        ]
        self._tensors = _getter(tensors)
        self._known: collections.OrderedDict[tuple[int, ...], _Frozen] = collections.OrderedDict()
        self._lock = threading.Lock()
        self._met = 0
        self._wait = 0
        self._warned = False

    @property
    def frozen(self) -> list[_Frozen]:
        return list(self._known.values())

    def __call__(self, *args: Any) -> Any:
        recording = torch.is_grad_enabled() or self._enables_grad
        if recording and any(map(_wants_grad, self._tensors(args))):
            return self._recorded(args)
        statics = self._statics(args)
        frozen = self._known.get(tuple(map(id, statics)))
        if frozen is None or list(map(_data_ptr, statics)) != frozen.pointers:
            frozen = self._freeze(statics)
            if frozen is None:
                return self._eager(*args)
        given = self._given(args)
        if self._layout.floats:
            floats = self._layout.floats
            given = [
                x.item() if i in floats else x
                for i, x in zip(self._layout.given, given, strict=True)
            ]
        return frozen.call(args, tuple(given))

    def _recorded(self, args: tuple[Any, ...]) -> Any:
        if not self._warned:
            self._warned = True
            warnings.warn(FallbackWarning(reason("grad"), self._name), stacklevel=2)
        return self._eager(*args)

    def _freeze(self, statics: Sequence[torch.Tensor]) -> _Frozen | None:
        """The graph with these weights; None where it is not worth it any more, for they change
        from call to call."""
        if not all(
            type(t) in (torch.Tensor, nn.Parameter) and t.layout is torch.strided for t in statics
        ):
            return None
        with self._lock:
            if self._wait > 0:
                self._wait -= 1
                return None
            self._met += 1
            if self._met > _MOST_SETS:
                self._wait = 2 ** (self._met - _MOST_SETS)
            key = tuple(map(id, statics))
            while len(self._known) >= _MOST_SETS and key not in self._known:
                self._known.popitem(last=False)
            frozen = _Frozen(self._name, self._graph, self._layout, self._options, statics)
            known = self._known

            def forget(_: Any) -> None:
                if known.get(key) is frozen:
                    known.pop(key, None)

            # Nobody can call it any more when a weight is gone, and another one may get its id.
            frozen.alive = [weakref.ref(tensor, forget) for tensor in statics]
            self._known[key] = frozen
            return frozen


class _Frozen:
    """A graph with a set of weights."""

    def __init__(
        self,
        name: str,
        graph: fx.GraphModule,
        layout: _Layout,
        options: Options,
        statics: Sequence[torch.Tensor],
    ) -> None:
        self.pointers = list(map(_data_ptr, statics))
        self.alive: list[weakref.ref[torch.Tensor]] = []
        module = _frozen_module(graph, layout, statics)
        self._current = threading.local()
        original = _Given(module, graph.forward, self._current)
        self._dispatcher = Dispatcher(module, "forward", original, options)
        self._dispatcher.tally.name = name

    def call(self, args: tuple[Any, ...], given: tuple[Any, ...]) -> Any:
        """What the graph answers.

        args, given: all its inputs, and those that are not frozen.
        """
        self._current.args = args
        try:
            return self._dispatcher.call(given, {})
        finally:
            self._current.args = None

    def report(self) -> Report:
        dispatcher = self._dispatcher
        return report_of(dispatcher.tally.name, dispatcher.options, [dispatcher])


class _Given(Original):
    """Runs the graph as it was given, on all the inputs of the call that this thread is in."""

    __slots__ = ("current", "run")

    def __init__(self, module: nn.Module, run: Callable[..., Any], current: Any) -> None:
        super().__init__(module, "forward")
        self.run = run
        self.current = current

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        return self.run(*self.current.args)

    def __deepcopy__(self, memo: dict[int, Any]) -> Original:
        return Original(copy.deepcopy(self.module, memo), "forward")


def _frozen_module(
    graph: fx.GraphModule, layout: _Layout, statics: Sequence[torch.Tensor]
) -> fx.GraphModule:
    """A module that holds these weights and takes the other inputs.

    They are aliases: the weights themselves may go, and take all of this along. An alias shares
    memory and the count of versions.
    """
    nodes = graph.graph.find_nodes(op="placeholder")
    copied = fx.Graph()
    at: dict[fx.Node, Any] = {}
    held: dict[str, Any] = {}
    for i in layout.given:
        at[nodes[i]] = copied.placeholder(nodes[i].name)
    for i, (place, d) in layout.sizes.items():
        if place not in layout.static:
            at[nodes[i]] = copied.call_method("size", (at[nodes[place]], d))
    with torch.inference_mode(False), torch.no_grad():
        for i, tensor in zip(layout.static, statics, strict=True):
            name, alias = nodes[i].name, tensor.detach()
            is_parameter = isinstance(tensor, nn.Parameter)
            held[name] = nn.Parameter(alias, requires_grad=False) if is_parameter else alias
            at[nodes[i]] = copied.get_attr(name)
    for node in graph.graph.nodes:
        if node.op == "placeholder":
            continue
        if node.op == "call_method" and node.target == "item" and _reads_number(node):
            at[node] = at[node.args[0]]
            continue
        if node.op in ("get_attr", "call_module"):
            held[node.target] = attrgetter(node.target)(graph)
        at[node] = copied.node_copy(node, lambda old: at[old])
        at[node].meta = {}
        if node.target in _OF_NUMBERS:
            at[node].target = _OF_NUMBERS[node.target]
        _leave_out_empty(node, at[node])
    return fx.GraphModule(held, copied).eval()


def _leave_out_empty(node: fx.Node, copied: fx.Node) -> None:
    """A cache of keys begins with `torch.cat([torch.tensor([]), keys])`: torch passes over tensors
    of that one shape, and OpenVINO does not take them."""
    if node.target is not torch.cat or not isinstance(node.args[0], (list, tuple)):
        return
    fakes = [part.meta.get("example_value") for part in node.args[0] if isinstance(part, fx.Node)]
    known = [fake for fake in fakes if isinstance(fake, torch.Tensor)]
    full = [i for i, fake in enumerate(known) if tuple(fake.shape) != (0,)]
    same = len(known) == len(node.args[0]) and len({fake.dtype for fake in known}) == 1
    if full and same and len(full) < len(known):
        parts: Any = copied.args[0]
        copied.args = ([parts[i] for i in full], *copied.args[1:])


def _reads_number(node: fx.Node) -> bool:
    source = node.args[0]
    return isinstance(source, fx.Node) and source.op == "placeholder" and _is_number(source)


_USERS_LINE = re.compile(r'File "(?:.*[/\\\\])?([^"]+)", line (\d+), in (\w+)')


def _name_of(graph: fx.GraphModule) -> str:
    """A name for reports: torch's own number of the graph, and the line that it begins at."""
    number = torch._guards.CompileContext.current_compile_id()
    for node in graph.graph.nodes:
        lines = _USERS_LINE.findall(node.stack_trace or "")
        if lines:
            file, line, function = lines[-1]
            return f"graph {number} ({file}:{line} in {function})"
    return f"graph {number}"


def _getter(places: Sequence[int]) -> Callable[[Sequence[Any]], Sequence[Any]]:
    if not places:
        return lambda args: ()
    if len(places) == 1:
        (only,) = places
        return lambda args: (args[only],)
    return itemgetter(*places)


_lock = threading.Lock()
_graphs: weakref.WeakValueDictionary[str, Graph] = weakref.WeakValueDictionary()
