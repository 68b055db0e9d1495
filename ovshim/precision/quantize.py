"""Integers in the place of floats, by NNCF: activations and weights, or weights alone.

NNCF is imported here and nowhere else. It writes log lines and progress bars to stdout and changes
the class that `logging` makes loggers of: neither leaves this file.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import logging
import random
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch

from ovshim import runtime
from ovshim.errors import OptionError
from ovshim.imports import apart
from ovshim.precision import graphs

if TYPE_CHECKING:
    import openvino as ov

__all__ = ["Quantized", "compress", "parameters", "quantize", "require"]

log = logging.getLogger("ovshim")

# NNCF's algorithms and bars keep state of the process, and its output is held back for all of it.
_lock = threading.Lock()

# What `F.normalize` and other norms consist of. Quantized, it cost 30 points of nearest-neighbour
# accuracy, while the cosine said 5e-3.
_NORMALIZATION = ("ReduceL2", "NormalizeL2", "Divide", "Power", "Sqrt")
_GROUP_SIZE = 64
# NNCF's own choice of ranges with bias correction is best for most transformers, and was five times
# worse than plain minima and maxima on every small convolutional network: both are tried.
_PRESETS = ("default", "minmax")


@dataclass(frozen=True)
class Quantized:
    """A quantized graph and how it came about.

    Attributes:
        preset: the better of those tried.
        errors: of each preset on the samples held out, relative L2.
    """

    model: ov.Model
    preset: str
    errors: dict[str, float]


def require(value: Any) -> None:
    """Raise OptionError where NNCF is not installed. `value`: of the option that needs it."""
    if importlib.util.find_spec("nncf") is None:
        raise OptionError(
            "precision",
            value,
            "'fp32', 'bf16' or 'fp16' while NNCF is not installed",
            "Install it: pip install 'ovshim[int8]'.",
        )


def parameters() -> str:
    """What a quantized graph depends on besides its input: part of its key in the cache."""
    version = importlib.metadata.version("nncf")
    return f"nncf={version} presets={_PRESETS} group={_GROUP_SIZE} ignored={_NORMALIZATION}"


def compress(model: ov.Model, precision: str) -> ov.Model:
    """A graph with its weights in 8 or 4 bits; what is computed with them stays in floats.

    Args:
        model: is changed, and not to be used afterwards.
        precision: int8_weights or int4_weights.
    """
    with _quiet_nncf() as nncf:
        if precision == "int8_weights":
            return nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_ASYM)
        # Where a row does not divide into groups the largest size that fits is taken; the default
        # is an error for the whole model.
        return nncf.compress_weights(
            model,
            mode=nncf.CompressWeightsMode.INT4_ASYM,
            group_size=_GROUP_SIZE,
            ratio=1.0,
            advanced_parameters=nncf.AdvancedCompressionParameters(
                group_size_fallback_mode=nncf.GroupSizeFallbackMode.ADJUST
            ),
        )


def quantize(
    model: ov.Model,
    samples: Sequence[Sequence[torch.Tensor]],
    held_out: Sequence[Sequence[torch.Tensor]],
    ignored: Sequence[str],
    progress: Callable[[Iterable[Any], str], Iterable[Any]],
) -> Quantized:
    """A graph with its operations in int8: the better of the presets.

    Args:
        model: is left alone.
        samples: inputs of the model, in order, to take ranges from.
        held_out: others, on which presets are compared with the model itself in f32.
        ignored: names of operations that stay in floats.
        progress: shows a bar over an iterable, under a title.
    """
    inputs = [[graphs.array(tensor) for tensor in sample] for sample in samples]
    exact = graphs.run(model, held_out)
    made: dict[str, Any] = {}
    errors: dict[str, float] = {}
    with _quiet_nncf() as nncf:
        for preset in progress(_PRESETS, "int8"):
            made[preset] = _quantized(nncf, model, inputs, ignored, preset)
            errors[preset] = graphs.error(exact, graphs.run(made[preset], held_out))
            log.debug("int8, %s: error %.2g on samples held out", preset, errors[preset])
    best = min(errors, key=lambda preset: errors[preset])
    return Quantized(made[best], best, errors)


def _quantized(
    nncf: Any, model: ov.Model, inputs: Sequence[Any], ignored: Sequence[str], preset: str
) -> ov.Model:
    kinds = {node.get_type_name() for node in model.get_ops()}
    transformer = bool(kinds & {"MVN", "ScaledDotProductAttention"})
    grouped = "GroupConvolution" in kinds
    advanced = nncf.AdvancedQuantizationParameters()
    if preset == "minmax":
        from nncf.quantization.range_estimator import RangeEstimatorParametersSet

        advanced.activations_range_estimator_params = RangeEstimatorParametersSet.MINMAX
        advanced.disable_bias_correction = True
    return nncf.quantize(
        model,
        nncf.Dataset(inputs),
        subset_size=len(inputs),
        preset=nncf.QuantizationPreset.PERFORMANCE if grouped else nncf.QuantizationPreset.MIXED,
        # Without it norms and attention are quantized: ten times the error with outlier channels.
        model_type=nncf.ModelType.TRANSFORMER if transformer else None,
        ignored_scope=nncf.IgnoredScope(
            names=list(ignored), types=sorted(kinds & set(_NORMALIZATION)), validate=False
        ),
        advanced_parameters=advanced,
    )


class _ToOurLog(logging.Handler):
    """NNCF's log lines, at the level of details."""

    def emit(self, record: logging.LogRecord) -> None:
        log.debug("nncf: %s", record.getMessage())


@contextlib.contextmanager
def _quiet_nncf() -> Iterator[Any]:
    """NNCF, imported, with its log going to ours and its progress bars switched off."""
    with _lock, contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        nncf = _imported()
        from nncf.common.logging import track_progress

        theirs = logging.getLogger("nncf")
        stack.enter_context(patch.object(theirs, "handlers", [_ToOurLog()]))
        for name in ("Progress", "WeightedProgress"):
            shown = getattr(track_progress, name)
            stack.enter_context(patch.object(track_progress, name, _hidden(shown)))
        yield nncf


def _hidden(bar: Any) -> Any:
    return lambda *columns, **options: bar(*columns, **{**options, "disable": True})


def _imported() -> Any:
    # First, so that its telemetry finds the stub in the place of what calls out.
    runtime.openvino()
    if "nncf" in sys.modules or not apart(_import):
        _import()
    return importlib.import_module("nncf")


def _import() -> None:
    before, drawn = logging.getLoggerClass(), random.getstate()
    try:
        importlib.import_module("nncf")
    finally:
        logging.setLoggerClass(before)
        # One of the packages that it imports draws numbers for its names.
        random.setstate(drawn)
