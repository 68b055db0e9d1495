"""What a plan is wanted for: a module, calls and options, and what follows from these alone."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import nn

from ovshim import runtime
from ovshim.cache.store import Store
from ovshim.checks import INTEGERS
from ovshim.onnx_module import OnnxModule
from ovshim.options import Options
from ovshim.signature import Kind

if TYPE_CHECKING:
    from ovshim.record import Record

__all__ = ["Placement", "Wanted", "own_dtype", "settings_of"]

_OWN_PRECISION = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


class Placement(TypedDict):
    """Where and how OpenVINO computes; streams: None leaves them to OpenVINO."""

    device: str
    hint: str
    streams: int | None
    threads: int


@dataclasses.dataclass(eq=False)
class Wanted:
    """What a plan is wanted for.

    Attributes:
        module, method: whose calls: the module, and the name of its method.
        options, store: how they are to be served, and the cache.
        kind, leaves: the example, flattened.
        grad: whether grad mode is on in the calls that the plan is for.
    """

    module: nn.Module
    method: str
    options: Options
    store: Store
    kind: Kind
    leaves: Sequence[Any]
    grad: bool

    @property
    def precision(self) -> str:
        """What was asked for, "rules" for rules; where nothing was, the module's own."""
        asked = self.options.precision
        if asked is None:
            return self.own_precision
        return asked if isinstance(asked, str) else "rules"

    @property
    def lowers(self) -> bool:
        """Whether a graph is to be made another one for its precision: for the other precisions a
        hint to OpenVINO does it."""
        return self.precision == "rules" or self.precision in INTEGERS

    @property
    def may_overflow(self) -> bool:
        """Whether what is of a wider type is to run in float16."""
        asked = self.options.precision
        wishes = asked.values() if isinstance(asked, Mapping) else (self.precision,)
        return "fp16" in wishes and self.own_precision != "fp16"

    @property
    def own_precision(self) -> str:
        """The module's, fp32 where it is in none that can be asked for."""
        return _OWN_PRECISION.get(self._own_dtype, "fp32")

    @functools.cached_property
    def _own_dtype(self) -> torch.dtype:
        return own_dtype(self.module)

    @property
    def placement(self) -> Placement:
        options = self.options
        return {
            "device": options.device,
            "hint": options.hint,
            "streams": options.streams,
            "threads": options.threads or torch.get_num_threads(),
        }

    @property
    def measured_on(self) -> str:
        """What a measurement of a graph that is placed so holds for."""
        return runtime.measured_on(self.placement["threads"])

    @property
    def tolerance(self) -> float | None:
        """None where the module runs in its own low precision and its upcast is the measure."""
        own = _OWN_PRECISION.get(self._own_dtype)
        upcast = not isinstance(self.module, OnnxModule)
        if self.options.tolerance is None and own == self.precision and own != "fp32" and upcast:
            return None
        asked = self.options.precision
        if isinstance(asked, Mapping):
            used = {asked.get("default", self.own_precision), *asked.values()}
            return max(self.options.tolerance_for(precision) for precision in used)
        return self.options.tolerance_for(self.precision)


def settings_of(
    wanted: Wanted, record: Record, precision: str, further: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """What OpenVINO is told of a graph, with a precision as the hint, and further properties."""
    safe = runtime.safe_precision(precision, **wanted.placement)
    properties = {**dict(record.rung.properties), **wanted.options.properties}
    settings = runtime.settings(precision=safe, **wanted.placement, properties=properties)
    return {**settings, **(further or {})}


def own_dtype(module: nn.Module) -> torch.dtype:
    """The dtype of most of the module's floating parameters; float32 where it has none."""
    if isinstance(module, OnnxModule):
        return module.dtype
    amounts: dict[torch.dtype, int] = {}
    for parameter in module.parameters():
        if parameter.dtype.is_floating_point:
            amounts[parameter.dtype] = amounts.get(parameter.dtype, 0) + parameter.numel()
    return max(amounts, key=lambda dtype: amounts[dtype]) if amounts else torch.float32
