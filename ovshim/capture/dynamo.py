"""The first route: torch's own full-graph capture, and its guards as data.

Dynamo runs the module's Python symbolically. It either gives the whole graph together with every
assumption that the graph rests on, or refuses and says why: on 281 modules it was never wrong
beyond its example, where a bare trace was on 22 and torch.export on 18. Its own guard manager
takes 29 to 110 µs a call, so its guards are read here and kept as data (`ovshim.guards`).

The private interfaces of torch that this stands on are those of torch 2.13:
`tests/test_dynamo_interface.py` fails when one of them moves.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import re
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from types import MethodType
from typing import Any

import torch

from ovshim.capture import (
    Captured,
    CaptureError,
    FlatModule,
    Request,
    frontend,
    handed_out,
    questions,
    readers,
    recurrent,
    rewrites,
)
from ovshim.capture.assertions import are_asked, ask_instead
from ovshim.capture.domains import check_domains
from ovshim.capture.hush import hushed
from ovshim.capture.overlaps import Overlaps
from ovshim.capture.ranges import check_ranges
from ovshim.capture.refusals import (
    SizesRefusedError,
    placeholders,
    refusal,
    refuse_contents,
    refuse_effects,
)
from ovshim.capture.sizes import read_sizes
from ovshim.capture.sources import Sources
from ovshim.capture.spared import spared
from ovshim.reasons import reason

__all__ = ["capture"]

log = logging.getLogger("ovshim")

# Names by which code asks whether gradients are recorded. They need not be exact: what has one of
# them is captured for each mode.
_OF_MODES = re.compile("grad_enabled|requires_grad|input_grad|grad_fn|is_leaf|inference")


def capture(request: Request) -> Captured:
    """Capture `request` with Dynamo. The caller holds `capture.TRACE_LOCK`.

    Where Dynamo cannot leave all the sizes open that are asked for (two tensors that broadcast have
    sizes 3 and 1, and as symbols they fit nothing), fewer are.

    Raises:
        CaptureError: Dynamo or OpenVINO refuses.
    """
    if not isinstance(request.call, MethodType):  # a `forward` that was put on the instance
        raise CaptureError(reason("capture-failed", "forward is not a method"), harmless=True)
    broader = [
        frozenset(d for d in dims if tensor.shape[d] != 1)
        for tensor, dims in zip(request.tensors, request.dynamic, strict=True)
    ]
    none: list[frozenset[int]] = [frozenset()] * len(broader)
    attempts = dict.fromkeys([request.dynamic, tuple(broader), tuple(none)])
    refused: SizesRefusedError | None = None
    for dynamic in attempts:
        try:
            with _forgetting_tensors():
                return _capture(request.with_open(dynamic))
        except SizesRefusedError as error:
            log.debug("Dynamo refuses the sizes %s: %s", dynamic, error)
            refused = refused or error
    assert refused is not None
    raise refused


def _capture(request: Request) -> Captured:
    import torch._dynamo.exc
    from torch._dynamo import convert_frame

    args, kwargs = _marked_call(request)
    with (
        _configured() as effects,
        handed_out.noted() as handed,
        questions.noted() as questioned,
    ):
        try:
            output = convert_frame.fullgraph_capture(request.call, args, kwargs)
        except torch._dynamo.exc.TorchDynamoException as error:
            raise refusal(error) from error
        except Exception as error:  # Dynamo runs users' code and its own; both can raise anything
            log.debug("Dynamo failed", exc_info=True)
            if "DataDependent" in type(error).__name__:  # a size that a value decides
                text = str(error).partition("\n")[0]
                raise CaptureError(reason("value-dependent", text)) from error
            text = f"Dynamo: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
            raise CaptureError(reason("capture-failed", text), harmless=True) from error
    refuse_effects(effects)
    if output.backend_input is None:
        raise CaptureError(reason("capture-failed", "no tensor is computed"))
    try:
        return _finish(request, output, args, kwargs, handed, questioned)
    finally:
        _forget_code(request.call, output.backend_input.backend_id)


def _finish(
    request: Request,
    output: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    handed: Sequence[Any],
    questioned: questions.Questions,
) -> Captured:
    graph = output.backend_input.graph_module
    common = output.graph_capture_output.output_graph
    imports = output.graph_capture_output.import_sources
    sources = Sources(request, args, kwargs, imports)
    questioned.refuse(sources)
    asked = ask_instead(graph)
    refuse_contents(graph, sources)
    overlaps = Overlaps(graph, request)
    check_domains(graph, sources.owns)
    rewrites.apply(graph)
    if not are_asked(common.shape_env.deferred_runtime_asserts, asked):
        # A number taken out of a tensor was used as if it were known: torch.compile would check it
        # while the graph runs.
        raise CaptureError(reason("value-dependent", "a value is read out of a tensor"))
    pattern, size_guards = read_sizes(common.shape_env, sources, request)
    value_guards = sources.read_guards(common.guards)
    value_guards += sources.read_tensors(placeholders(graph))
    value_guards = tuple(dict.fromkeys((*value_guards, *sources.read_handed_out(handed))))
    # What Dynamo's bytecode refers to (classes of outputs among it) it finds in these globals.
    known = dict(output.graph_capture_output.f_globals)
    checked = check_ranges(graph)
    replay = output.forward_callable(compiled_fn=checked, extra_globals=known)
    run = functools.partial(replay, request.call.__self__)  # type: ignore[attr-defined]
    inputs = request.kind.distinct
    tensors = [request.leaves[i] for i in inputs]
    places = [request.kind.tensors.index(i) for i in inputs]
    views_among = functools.partial(overlaps.views_among, checked)
    flat = FlatModule(request, run, lambda: checked.in_range, views_among)
    traced = frontend.trace(flat, tensors)
    origin = _origins(request, graph) if request.marked else None
    model, reader = readers.read(traced, tensors, [pattern[t] for t in places], origin)
    traced_code = output.graph_capture_output.traced_code
    code = tuple(sorted({c.co_qualname for c in traced_code} | {_qualname(request.call)}))
    return Captured(
        model,
        f"dynamo{reader}",
        flat.outputs,
        pattern,
        size_guards,
        value_guards,
        code,
        checked=checked.in_range is not None,
        any_mode=not any(map(_asks_for_mode, traced_code)),
        asks=tuple(sorted(questioned.asks)),
        views=flat.views,
    )


def _asks_for_mode(code: Any) -> bool:
    """Whether code may do otherwise where gradients are recorded."""
    return any(_OF_MODES.search(name) for name in code.co_names)


def _marked_call(request: Request) -> tuple[tuple[Any, ...], dict[str, Any]]:
    from torch._dynamo.decorators import maybe_mark_dynamic

    from ovshim.signature import unflatten_call

    for tensor, dims in zip(request.tensors, request.dynamic, strict=True):
        for dim in dims:
            maybe_mark_dynamic(tensor, dim)
    return unflatten_call(request.leaves, request.kind.structure)


_LEVELS = ("debug", "info", "warning", "error", "critical", "exception", "log")
_LOGGING = frozenset(
    {
        *(getattr(where, name) for where in (logging.Logger, logging) for name in _LEVELS),
        warnings.warn,
    }
)


@contextlib.contextmanager
def _configured() -> Iterator[list[str]]:
    """Dynamo set up for one whole graph; gives the side effects that it says it saw.

    `backed_size_oblivious` lets an example of batch 1 stand for every batch. NNPACK is off because
    ATen asks for `batch < 16` when it chooses between it and other convolutions, and Dynamo would
    take that for a condition of the graph. All of it is undone on leaving: the user's own
    torch.compile keeps its configuration."""
    import torch._dynamo.config
    import torch.fx.experimental._config
    from torch._dynamo.utils import get_metrics_context

    effects: list[str] = []
    with contextlib.ExitStack() as stack:
        stack.enter_context(spared())
        stack.enter_context(recurrent.in_one_step())
        stack.enter_context(_generator_left_alone())
        stack.enter_context(get_metrics_context())
        stack.enter_context(torch.backends.nnpack.flags(enabled=False))
        stack.enter_context(
            torch._dynamo.config.patch(
                allow_rnn=True,
                capture_dynamic_output_shape_ops=True,
                assume_static_by_default=True,
                automatic_dynamic_shapes=False,
                trace_numpy=False,
                capture_scalar_outputs=False,
                side_effect_replay_policy="warn",
                # Served calls log nothing, as graphs give outputs and do nothing else.
                ignore_logging_functions=_LOGGING,
            )
        )
        stack.enter_context(
            torch.fx.experimental._config.patch(backed_size_oblivious=True)  # type: ignore[attr-defined]
        )
        seen = stack.enter_context(hushed())
        yield effects
        effects += [text for text in seen if "side effects" in text]


@contextlib.contextmanager
def _generator_left_alone() -> Iterator[None]:
    """After a trace Dynamo puts torch's generator back to where it stood before, over all that
    other threads have drawn meanwhile. A trace computes nothing, and so draws nothing."""
    put_back, tracing = torch.random.set_rng_state, threading.get_ident()

    def unless_traced(new_state: torch.Tensor) -> None:
        if threading.get_ident() != tracing:
            put_back(new_state)

    torch.random.set_rng_state = unless_traced
    try:
        yield
    finally:
        torch.random.set_rng_state = put_back


def _qualname(call: Callable[..., Any]) -> str:
    return str(getattr(call, "__func__", call).__code__.co_qualname)


_ROOT = re.compile(r"L\['\w+'\]\.?")


def _origins(request: Request, graph: torch.fx.GraphModule) -> frontend.Origin:
    """Tells from which of the user's modules a traced node comes: its source range names the line
    of the graph's generated code, that line the node that Dynamo recorded, and this its modules."""
    known = {path for path, _ in request.module.named_modules(remove_duplicate=False)}
    first, lines = graph._prologue_start, graph._lineno_map
    nodes = list(graph.graph.nodes)
    file = re.escape(graph.forward.__code__.co_filename)
    frame = re.compile(rf"^{file}\((\d+)\)", re.MULTILINE)

    def origin(traced: Any) -> str | None:
        found = frame.search(traced.sourceRange())
        place = lines.get(int(found[1]) - first) if found else None
        stack = None if place is None else nodes[place].meta.get("nn_module_stack")
        if stack is None:
            return None
        path = _ROOT.sub("", list(stack.values())[-1][0], count=1) if stack else ""
        while path not in known:  # a module that is kept in a plain list has no path of its own
            path = path.rpartition(".")[0]
        return path

    return origin


def _forget_code(call: Callable[..., Any], name: str) -> None:
    """Dynamo leaves the graph in the globals of the user's function, and with it every weight.
    Others of like names are torch.compile's and in use."""
    function = getattr(call, "__func__", call)
    getattr(function, "__globals__", {}).pop(name, None)


@contextlib.contextmanager
def _forgetting_tensors() -> Iterator[None]:
    """Clear the tables of weak references to the user's tensors that Dynamo fills meanwhile.

    They belong to fake modes that live on in cycles through C++, one for every restart of its
    analysis. Nothing of ours leads to them, and to look through all objects that there are takes a
    tenth of a second: so they are noted when they are made. With them alive
    `torch.utils.swap_tensors`, and so some ways of `.to()`, refuses the user's own parameters."""
    from torch._subclasses.meta_utils import MetaTensorDescriber

    made: list[weakref.ref[Any]] = []
    initial = MetaTensorDescriber.__init__

    @functools.wraps(initial)
    def noting(self: Any, *args: Any, **kwargs: Any) -> None:
        initial(self, *args, **kwargs)
        made.append(weakref.ref(self))

    MetaTensorDescriber.__init__ = noting  # type: ignore[method-assign]
    try:
        yield
    finally:
        MetaTensorDescriber.__init__ = initial  # type: ignore[method-assign]
        for describer in filter(None, (one() for one in made)):
            describer.lookup_tensor.clear()
            describer.lookup_storage.clear()
