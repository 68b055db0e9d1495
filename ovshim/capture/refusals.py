"""What Dynamo refuses, and what is refused of a graph that it gives: as reasons."""

from __future__ import annotations

import types
from typing import Any

import torch

from ovshim.capture import CaptureError
from ovshim.capture.rewrites.entry import argument, value_of
from ovshim.capture.sources import Sources
from ovshim.classes import is_users
from ovshim.reasons import reason

__all__ = [
    "ESCAPES",
    "SizesRefusedError",
    "placeholders",
    "refusal",
    "refuse_contents",
    "refuse_effects",
]

# What Dynamo refuses as a matter of principle. A trace would bake one outcome in.
_VALUE_DEPENDENT = (
    "Data-dependent",
    "Data dependent",
    "Dynamic shape operator",
    "Dynamic slicing",
    "Unsupported Tensor.item",
    "Tensor.tolist",
    "Tensor.numpy",
    "Indexing list with non-scalar",
    "Attempted to use `torch.nn.functional.one_hot`",
    "unsupported index(Tensor)",
    "torch.fx.experimental.symbolic_shapes",
    "attempted to trace numpy",
    "call `torch.from_numpy`",
    "Unsupported ndarray",
    "repr() on tensor",
    "Cannot check Tensor object identity",
)
# What it merely cannot follow: code that a trace runs through without harm to the graph.
_HARMLESS = (
    "torch.jit.script/freeze modules unsupported",
    "UnspecializedNNModuleVariable wrapped around ScriptModules",
    "wrap_jit_function",
    "Weird method call on TorchScript object",
    "logging.Logger method not supported",
    "attempted to reorder a debugging function",
    "Attempted to call function marked as skipped",
    "Attempted to inline function marked as skipped",
    "can't handle functions not implemented in python",
    "Skip calling `torch.compiler.disable()`d function",
    "Skip inlining `torch.compiler.disable()`d function",
    "Unsupported context manager",
)
# Side effects that no caller can see: the callee's own dictionary of keywords, and a variable of
# transformers' that is back at its old value when the call ends.
_HARMLESS_EFFECTS = ("L['kwargs']", "_active_collector")
_SIZES = (
    "RuntimeError when making fake tensor call",
    "Fake tensor propagation exception",
    "TypeError when making fake tensor call",
    "Assertion failed on symbolic shapes",
)
# Converted without a word, and wrong: the lengths of packed sequences are those of the example.
_WRONG_IN_OPENVINO = frozenset({"_pack_padded_sequence", "_pad_packed_sequence"})
ESCAPES = frozenset({"item", "tolist", "numpy", "__bool__", "__int__", "__float__"})
"""Methods by which a value of a tensor leaves a graph for Python."""


class SizesRefusedError(CaptureError):
    """Dynamo cannot work with these sizes left open; with fewer it might."""


def refusal(error: Any) -> CaptureError:
    """Why Dynamo has raised this, and whether a trace may be tried all the same."""
    # Most refusals carry the name of their kind; some have it as the first line of their text.
    text = str(getattr(error, "gb_type", None) or "") or str(error).partition("\n")[0]
    at = _user_line(error)
    detail = f"{text}{f' at {at}' if at else ''}"
    if text.startswith(_VALUE_DEPENDENT) or "data-dependent" in str(error).lower():
        return CaptureError(reason("value-dependent", detail))
    why = reason("capture-failed", f"Dynamo: {detail}")
    if text.startswith(_SIZES):
        return SizesRefusedError(why)
    return CaptureError(why, text.startswith(_HARMLESS))


def _user_line(error: Any) -> str:
    stack = getattr(error, "real_stack", None)
    if not stack:
        return ""
    frame = stack[-1]
    return (
        f"{frame.filename.replace(chr(92), '/').rsplit('/', 1)[-1]}:{frame.lineno} ({frame.line})"
    )


def refuse_effects(effects: list[str]) -> None:
    """Raise CaptureError for side effects that Dynamo told of and a caller could see."""
    for text in effects:
        places = text.partition("double check: ")[2].strip("[]").split(", ")
        for place in places:
            if not any(fine in place for fine in _HARMLESS_EFFECTS):
                raise CaptureError(reason("mutates-attribute", place.strip("\"'")))


def refuse_contents(graph: torch.fx.GraphModule, sources: Sources) -> None:
    """Raise CaptureError for a graph that holds what must not be converted."""
    _refuse_opaque(graph)
    _refuse_escapes(graph)
    _refuse_writes(graph, sources)
    _refuse_sizes_by_values(graph)
    _refuse_padded_transforms(graph)
    _refuse_cut_edges(graph)


def _refuse_opaque(graph: torch.fx.GraphModule) -> None:
    """Users' functions that Dynamo was told not to look into: nothing says what those read."""
    for inner in graph.modules():
        for node in inner.graph.nodes if isinstance(inner, torch.fx.GraphModule) else ():
            if isinstance(node.target, types.FunctionType) and is_users(node.target):
                text = f"{node.target.__qualname__} is allowed in graphs as it is"
                raise CaptureError(reason("capture-failed", text), harmless=True)


def _refuse_sizes_by_values(graph: torch.fx.GraphModule) -> None:
    """Where `nonzero` or a mask decides how many rows there are, there may be none, and kernels of
    OpenVINO 2026.4 end the process on those."""
    from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

    for node in graph.graph.nodes:
        fake = node.meta.get("example_value")
        if isinstance(fake, torch.Tensor) and free_unbacked_symbols(fake):
            text = f"the size of a tensor does, at {node.name}"
            raise CaptureError(reason("value-dependent", text))


def _refuse_padded_transforms(graph: torch.fx.GraphModule) -> None:
    """A Fourier transform of `n` points over another number: OpenVINO 2026.4 reads what lies behind
    the tensor."""
    for node in graph.graph.nodes:
        name = str(getattr(node.target, "__name__", ""))
        n = node.kwargs.get("n", node.args[1] if len(node.args) > 1 else None)
        if not name.startswith("fft_") or name.endswith(("freq", "shift")) or n is None:
            continue
        fake = node.args[0].meta.get("example_value")
        size = fake.shape[node.kwargs.get("dim", node.args[2] if len(node.args) > 2 else -1)]
        inverse = name in ("fft_irfft", "fft_hfft")
        if not isinstance(size, int):
            raise SizesRefusedError(reason("unsupported-op", f"{name} over a size that may change"))
        if size != (n // 2 + 1 if inverse else n):
            raise CaptureError(reason("unsupported-op", f"{name} of {n} points over {size}"))


def _refuse_cut_edges(graph: torch.fx.GraphModule) -> None:
    """Padding with what is at the edges, and less than nothing of it, where little or nothing may
    remain to be repeated: OpenVINO 2026.4 cuts first, and ends the process on what is empty."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    for node in graph.graph.nodes:
        mode = argument(node, 2, "mode", "constant")
        if node.target is not torch._C._nn.pad or mode == "constant":
            continue
        pad = list(map(value_of, argument(node, 1, "pad")))
        shape = value_of(argument(node, 0, "input")).shape
        for size, before, after in zip(reversed(shape), pad[::2], pad[1::2], strict=False):
            if all(statically_known_true(n >= 0) for n in (before, after)):
                continue
            why = reason("unsupported-op", f"pad by {before} and {after}, {mode}")
            if not all(isinstance(n, int) for n in (size, before, after)):
                raise SizesRefusedError(why)
            if size + min(before, 0) + min(after, 0) <= max(before, after, 0):
                raise CaptureError(why)


def _refuse_escapes(graph: torch.fx.GraphModule) -> None:
    """Values that leave the graph for Python."""
    for node in graph.graph.nodes:
        name = str(getattr(node.target, "__name__", node.target))
        if (node.op == "call_method" and node.target in ESCAPES) or "_assert" in name:
            raise CaptureError(reason("value-dependent", _where(node)))
        if name in _WRONG_IN_OPENVINO:
            raise CaptureError(reason("unsupported-op", _where(node)))


def _refuse_writes(graph: torch.fx.GraphModule, sources: Sources) -> None:
    """Tensors given from outside that it writes to. Not the module's own, of which the look has
    seen it: Dynamo itself writes to its images of those that share their memory, as
    `vector_to_parameters` leaves them."""
    for node in placeholders(graph):
        fake = node.meta.get("example_value")
        if isinstance(fake, torch.Tensor) and fake._version > 0 and not sources.owns(node):
            raise CaptureError(reason("mutates-input", str(node.target)))


def placeholders(graph: torch.fx.GraphModule) -> list[torch.fx.Node]:
    """What is given to the graph when it is called."""
    return [node for node in graph.graph.nodes if node.op == "placeholder"]


def _where(node: torch.fx.Node) -> str:
    """The module's path and the user's source line of a node, as far as torch knows them."""
    stack = node.meta.get("nn_module_stack") or {}
    module = list(stack.values())[-1][0] if stack else ""
    lines = [line.strip() for line in (node.stack_trace or "").splitlines() if line.strip()]
    return f"{node.target} in {module} {lines[-2] if len(lines) > 1 else ''}".strip()
