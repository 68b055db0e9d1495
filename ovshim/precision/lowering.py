"""What is to be made of a graph, as data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ovshim.guards import sizes_hold
from ovshim.precision.calibration import Samples
from ovshim.signature import Pattern, fits, sizes_of

__all__ = ["Lowering"]


@dataclass(frozen=True)
class Lowering:
    """What is to be made of a graph.

    Attributes:
        precision: int8, int8_weights, int4_weights, or "rules".
        modules: for rules, the precision of each module by its path.
        samples: example inputs, where something becomes int8.
        key: everything that decides the result, besides the graph.
    """

    precision: str
    modules: Mapping[str, str]
    samples: Samples | None
    key: str

    @property
    def marked(self) -> bool:
        """Whether the graph's operations have to say which module they come from."""
        return bool(self.modules)

    @property
    def has_islands(self) -> bool:
        """Whether operations get floating types of their own."""
        return bool({"bf16", "fp16"} & set(self.modules.values()))

    @property
    def hint(self) -> str:
        """The precision to compile with, for rules."""
        return "dynamic" if self.has_islands else "fp32"

    def to_prove_with(self, pattern: Pattern) -> list[Sequence[torch.Tensor]]:
        """Inputs on which a graph of these sizes has to be right, in the place of random ones: what
        was never seen in calibration may well be beyond the range of int8."""
        return [] if self.samples is None else self.inputs_that_fit(pattern, self.samples.held_out)

    def inputs_that_fit(
        self, pattern: Pattern, which: Sequence[int], size_guards: Sequence[str] = ()
    ) -> list[Sequence[torch.Tensor]]:
        """Those of the samples that a graph of these sizes takes."""
        tensors = [] if self.samples is None else [self.samples.tensors[i] for i in which]
        return [
            sample
            for sample in tensors
            if all(fits(mine, dims) for mine, dims in zip(sizes_of(sample), pattern, strict=True))
            and sizes_hold(size_guards, sizes_of(sample))
        ]
