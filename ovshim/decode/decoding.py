"""A decoding: how the steps of one module are served. A plan like others, of many calls."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ovshim.cache import Entry
from ovshim.decode.engine import StatefulEngine
from ovshim.decode.long_steps import LongSteps
from ovshim.decode.step import Form
from ovshim.plan import Plan

__all__ = ["Decoding", "Ready", "compile_fits"]

# Whether a step of these sizes (batch, length, length with the past, the encoder's length) may be
# served.
Fits = Callable[[int, int, int, int], bool]


@dataclasses.dataclass(frozen=True)
class Ready:
    """What serves steps in OpenVINO.

    Attributes:
        fits: whether a step's sizes are such as the graph was captured for.
        conventions: what the module makes of arguments that a call leaves out.
    """

    engine: StatefulEngine
    form: Form
    fits: Fits
    conventions: Mapping[str, Any]


@dataclasses.dataclass
class Decoding(Plan):
    """A plan for steps.

    Attributes:
        ready: None where eager serves for good; where it is merely faster, `reason` says so.
        entry: where the graph and what was found out about it are kept.
        met: buckets of sizes at which the graph was compared with eager.
        long_steps: who is faster at steps of many tokens; None: OpenVINO is preferred.
    """

    ready: Ready | None = None
    entry: Entry | None = None
    met: set[tuple[int, ...]] = dataclasses.field(default_factory=set)
    long_steps: LongSteps | None = None

    @property
    def path(self) -> str:
        return "openvino" if self.ready is not None and self.reason is None else "eager"

    @property
    def counted_as(self) -> str | None:
        return "openvino"

    def to_dict(self) -> dict[str, Any]:
        kept = None if self.ready is None else self.ready.engine.keys_and_values
        told = {"signature": "decoding, step by step", "keys_and_values": kept}
        sizes = [] if self.long_steps is None else self.long_steps.to_list()
        return {**super().to_dict(), **told, "sizes": sizes}


def compile_fits(size_guards: Sequence[str], form: Form, most: int | None) -> Fits:
    """The size guards of a captured step as a function of the sizes that there are.

    A guard that tells one token from several is not asked of one token: attention takes another
    way there, and whether the graph is right all the same is what the proof finds out. Bounds of
    the whole length are asked.

    Args:
        most: the greatest length, the past included; None: there is none.
    """
    names = ", ".join(f"s{i}" for i in range(len(form.sizes_of(1, 1, 1, 1))))
    condition = " and ".join(f"({guard})" for guard in size_guards) or "True"
    scope = {"__builtins__": {"min": min, "max": max}}
    holds = eval(f"lambda {names}: {condition}", scope)

    def fits(batch: int, length: int, total: int, source: int) -> bool:
        if most is not None and total > most:
            return False
        length, total = max(length, 2), max(total, 2)
        return bool(holds(*form.sizes_of(batch, length, total - length, source)))

    return fits
