"""A decoding: how the steps of one module are served. A plan like others, of many calls."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ovshim.cache import Entry
from ovshim.decode.engine import StatefulEngine
from ovshim.decode.step import Form
from ovshim.matcher import model_output_maker
from ovshim.plan import Plan

__all__ = ["Decoding", "Ready", "compile_fits"]

Sizes = tuple[int, int, int]
# Whether a step of these sizes (batch, length, length with the past) may be served.
Fits = Callable[[int, int, int], bool]


@dataclasses.dataclass(frozen=True)
class Ready:
    """What serves steps in OpenVINO.

    Attributes:
        fits: whether a step's sizes are such as the graph was captured for.
        fills_mask: whether a call without a mask is one with a mask of ones.
        fills_positions: what a call without positions means under a mask with zeros: "arange",
            "mask" (counted along it), or "" where neither was seen; without zeros both are one.
    """

    engine: StatefulEngine
    form: Form
    fits: Fits
    fills_mask: bool
    fills_positions: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "_output", model_output_maker(self.form.output))

    def output(self, logits: torch.Tensor, cache: Any) -> Any:
        """An output of the module's own class."""
        return self._output({"logits": logits, "past_key_values": cache})  # type: ignore[attr-defined]


@dataclasses.dataclass
class Decoding(Plan):
    """A plan for steps.

    Attributes:
        ready: None where eager serves for good; where it is merely faster, `reason` says so.
        entry: where the graph and what was found out about it are kept.
        met: buckets of sizes at which the graph was compared with eager.
    """

    ready: Ready | None = None
    entry: Entry | None = None
    met: set[Sizes] = dataclasses.field(default_factory=set)

    @property
    def path(self) -> str:
        return "openvino" if self.ready is not None and self.reason is None else "eager"

    @property
    def counted_as(self) -> str | None:
        return "openvino"


def compile_fits(
    size_guards: Sequence[str], sizes: Sequence[tuple[int, int]], most: int | None
) -> Fits:
    """The size guards of a captured step as a function of the three sizes that there are.

    A guard that tells one token from several is not asked of one token: attention takes another
    way there, and whether the graph is right all the same is what the proof finds out. Bounds of
    the whole length are asked.

    Args:
        sizes: (heads, width) of each tensor of the past.
        most: the greatest length, the past included; None: there is none.
    """
    names = ", ".join(f"s{i}" for i in range(4 + len(sizes)))
    condition = " and ".join(f"({guard})" for guard in size_guards) or "True"
    scope = {"__builtins__": {"min": min, "max": max}}
    holds = eval(f"lambda {names}: {condition}", scope)

    def fits(batch: int, length: int, total: int) -> bool:
        if most is not None and total > most:
            return False
        length, total = max(length, 2), max(total, 2)
        step, past = (batch, length), total - length
        pasts = [(batch, heads, past, width) for heads, width in sizes]
        return bool(holds(step, (batch, total), step, (2,), *pasts))

    return fits
