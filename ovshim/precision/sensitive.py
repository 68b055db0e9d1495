"""Which modules a lower precision hurts, and rules that keep those out of it."""

from __future__ import annotations

import dataclasses
import html
import math
import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ovshim.capture import CaptureError, Request, capture, names
from ovshim.checks import no_module
from ovshim.errors import CalibrationError, FallbackError, OptionError
from ovshim.example import as_call
from ovshim.hooks import obstacle
from ovshim.options import Options
from ovshim.precision import calibration as calibrations
from ovshim.precision import graphs, islands, quantize
from ovshim.preflight import look
from ovshim.progress import bar
from ovshim.reasons import reason
from ovshim.signature import UnknownLeafError, flatten_call, kind_of, unflatten_call

__all__ = ["Sensitivity", "sensitivity"]

_PRECISIONS = ("int8", "bf16", "fp16")
# Ranges of single modules are found well enough from so many samples, and each module takes its
# turn with them.
_ENOUGH = 10
_WEIGHTED = ("MatMul", "Convolution", "GroupConvolution", "ConvolutionBackpropData")


@dataclasses.dataclass(frozen=True)
class Sensitivity:
    """What lowering each module alone costs. `print` it for a table.

    Attributes:
        precision: that to which each was lowered.
        errors: relative L2 error of the worst output on samples held out, by module path, the most
            sensitive first.
        rules: for `precision=`: as many modules lowered as keep within `tolerance` together.
        error: with these rules.
    """

    precision: str
    tolerance: float
    errors: Mapping[str, float]
    rules: Mapping[str, str]
    error: float

    def __str__(self) -> str:
        width = max([len(path) for path in self.errors] + [6])
        lines = [f"{'module':<{width}}  error of {self.precision} alone"]
        for path, error in self.errors.items():
            kept = "" if self.rules.get(path) == self.precision else "  stays in fp32"
            lines.append(f"{path:<{width}}  {error:.1e}{kept}")
        lines.append(f"together: {self.error:.1e} (tolerance {self.tolerance:g})")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"


def sensitivity(
    module: nn.Module,
    example_input: Any = None,
    *,
    calibration: Any,
    example_kwargs: Mapping[str, Any] | None = None,
    transform: Callable[[Any], Any] | None = None,
    precision: str = "int8",
    tolerance: float = 0.02,
    progress: bool | None = None,
) -> Sensitivity:
    """Lower each module with weights alone, and see what that does to the outputs.

    Args:
        example_input, example_kwargs, calibration, transform, progress: as `accelerate` takes them.
        precision: "int8", "bf16" or "fp16".
        tolerance: the largest relative L2 error that the rules may cost.

    Raises:
        OptionError: a value that cannot be right, or no module.
        CalibrationError: calibration data that cannot be read, or is of other calls.
        FallbackError: the module cannot be captured, is in training mode or does something besides
            (counts, draws random numbers), its graph does not say which module an operation comes
            from, or the example holds something of an unknown type.
    """
    if not isinstance(module, nn.Module):
        raise no_module(module)
    given: Any = tolerance
    number = isinstance(given, numbers.Real) and not isinstance(given, bool)
    if not number or not given > 0:
        raise OptionError("tolerance", tolerance, "a number above 0", "Give for example 0.01.")
    options = Options(
        precision=precision,
        tolerance=tolerance,
        calibration=calibration,
        transform=transform,
        progress=progress,
    )
    if options.precision not in _PRECISIONS:
        allowed = " or ".join(map(repr, _PRECISIONS))
        raise OptionError("precision", precision, allowed, "Leave it out for 'int8'.")
    if options.precision == "int8":
        quantize.require(precision)
    model, learned, judged = _captured(module, as_call(example_input, example_kwargs), options)
    try:
        measure = _Measure(model, learned, judged, str(options.precision))
    except RuntimeError as failed:
        kind = type(calibration).__qualname__
        text = "It is not of the sizes that the module takes."
        raise CalibrationError("calibration", kind, "calls of this module", text) from failed
    paths = dict.fromkeys(
        path
        for node in model.get_ordered_ops()
        if node.get_type_name() in _WEIGHTED and (path := names.path_of(node))
    )
    if not paths:
        raise FallbackError(reason("no-module-paths"))
    found = {path: measure.error([path]) for path in bar(list(paths), "sensitivity", options)}
    ranked = dict(sorted(found.items(), key=lambda item: -item[1]))
    lowered, error = _together(measure, ranked, tolerance)
    rules = {"default": "fp32", **dict.fromkeys(lowered, str(options.precision))}
    return Sensitivity(str(options.precision), tolerance, ranked, rules, error)


def _together(
    measure: _Measure, ranked: Mapping[str, float], tolerance: float
) -> tuple[list[str], float]:
    """The modules that can be lowered together, and the error that it costs."""
    lowered = list(ranked)
    # Errors of single modules add up as if they had nothing to do with each other, nearly.
    while lowered and math.hypot(*(ranked[path] for path in lowered)) > tolerance:
        lowered.pop(0)
    while lowered:
        error = measure.error(lowered)
        if error <= tolerance:
            return lowered, error
        # The most sensitive first, a tenth of them at a time: each look at the rest is a build.
        del lowered[: max(1, len(lowered) // 10)]
    return [], 0.0


class _Measure:
    """Lowers parts of one graph and compares it with itself in fp32."""

    def __init__(
        self, model: Any, learned: Sequence[Any], judged: Sequence[Any], precision: str
    ) -> None:
        self._model = model
        self._learned = learned
        self._judged = judged
        self._precision = precision
        self._exact = graphs.run(model, judged)

    def error(self, paths: Iterable[str]) -> float:
        """What lowering these modules costs."""
        chosen = set(paths)
        if self._precision == "int8":
            ignored = [
                node.get_friendly_name()
                for node in self._model.get_ops()
                if names.path_of(node) not in chosen
            ]
            data = self._learned, self._judged
            made = quantize.quantize(self._model, *data, ignored, lambda items, title: items)
            return min(made.errors.values())
        lowered = self._model.clone()
        islands.lower(
            lowered, lambda node: self._precision if names.path_of(node) in chosen else "fp32"
        )
        return graphs.error(self._exact, graphs.run(lowered, self._judged))


def _looked_at(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """The leaves of the module's answer, after which it is as it was. Raises FallbackError."""
    why = obstacle(module)
    if why is None:
        leaves, structure = flatten_call(args, kwargs)
        copies = [x.detach().clone() if isinstance(x, torch.Tensor) else x for x in leaves]
        args, kwargs = unflatten_call(copies, structure)
        tensors = [x for x in copies if isinstance(x, torch.Tensor)]
        with torch.no_grad():
            seen = look(module, lambda: module(*args, **kwargs), tensors, restore=True)
        seen.undo()
        why = seen.reason
    if why is not None:
        raise FallbackError(why)
    return seen.leaves


def _captured(
    module: nn.Module, call: tuple[tuple[Any, ...], dict[str, Any]], options: Options
) -> tuple[Any, list[Any], list[Any]]:
    """The module's graph with its operations marked, and inputs of it: to learn from, and others
    to judge by."""
    args, kwargs = call
    leaves, structure = flatten_call(args, kwargs)
    try:
        kind = kind_of(leaves, structure)
    except UnknownLeafError as error:
        raise FallbackError(reason("unknown-leaf", str(error))) from error
    given = options.calibration, options.transform
    samples = calibrations.collect(*given, module.forward, args, kwargs, kind)
    wanted = tuple(
        i
        for i, leaf in enumerate(_looked_at(module, args, kwargs))
        if isinstance(leaf, torch.Tensor)
    )
    dims = tuple(
        frozenset(range(tensor.dim())) for tensor in leaves if isinstance(tensor, torch.Tensor)
    )
    copies = [x.detach().clone() if isinstance(x, torch.Tensor) else x for x in leaves]
    try:
        with torch.no_grad():
            captured = capture(Request(module, module.forward, kind, copies, dims, wanted, True))
    except CaptureError as error:
        raise FallbackError(error.reason) from error
    graphs.prepare(captured.model)
    places = [kind.tensors.index(i) for i in kind.distinct]
    learned, judged = (
        [[samples.tensors[i][t] for t in places] for i in which]
        for which in (samples.learned_from[:_ENOUGH], samples.held_out)
    )
    return captured.model, learned, judged
