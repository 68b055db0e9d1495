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
from ovshim.frozen import Layout, frozen_module
from ovshim.handle import report_of
from ovshim.options import Options, enabled_in_environment, resolve
from ovshim.properties import check_placement
from ovshim.reasons import reason
from ovshim.report import Report

__all__ = ["compile_graph", "reports"]

# Instances of a class, and repeated layers, share one graph: so many sets of weights are kept.
_MOST_SETS = 8
# What Dynamo says by itself, or what is of modules.
_NOT_OF_GRAPHS = ("inplace", "memory", "methods", "dynamic_shapes", "dynamic_batch")

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
    if enabled_in_environment():
        check_placement(chosen)
    layout = Layout.of(graph)
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


class Graph:
    """What Dynamo calls in the place of a graph, from any thread.

    Attributes:
        frozen: the graph with each set of weights that is known at the moment.
    """

    def __init__(self, graph: fx.GraphModule, layout: Layout, options: Options) -> None:
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
        layout: Layout,
        options: Options,
        statics: Sequence[torch.Tensor],
    ) -> None:
        self.pointers = list(map(_data_ptr, statics))
        self.alive: list[weakref.ref[torch.Tensor]] = []
        module = frozen_module(graph, layout, statics)
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
