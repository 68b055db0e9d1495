"""What one run of the benchmarks knows."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import machine
import workloads
from interleave import Effort, Turns
from measure import Finding, Group, measure
from precisions import Accuracy, Lowered
from rows import Row
from scaling import Axis

__all__ = ["Board"]


@dataclasses.dataclass
class Board:
    """What a run measures by, and what it has found so far.

    Attributes:
        axis_effort: for each point of an axis.
        load: the share of the processors that others took before the run.
        inductor: whether torch.compile is measured, which compiles for minutes.
        precision, accuracy: rows of docs/precision.md, by model.
        axes: curves of docs/performance.md, by axis.
    """

    small: bool
    inductor: bool
    effort: Effort
    axis_effort: Effort
    starts: int
    chosen: dict[workloads.Case, list[str]] = dataclasses.field(default_factory=dict)
    rows: list[Row] = dataclasses.field(default_factory=list)
    cold: list[tuple[str, ...]] = dataclasses.field(default_factory=list)
    built: list[tuple[str, ...]] = dataclasses.field(default_factory=list)
    precision: dict[str, list[Lowered]] = dataclasses.field(default_factory=dict)
    accuracy: dict[str, list[Accuracy]] = dataclasses.field(default_factory=dict)
    axes: dict[str, Axis] = dataclasses.field(default_factory=dict)
    load: float = 0.0
    _last: tuple[workloads.Case, Group] | None = None

    @property
    def machine(self) -> dict[str, Any]:
        return {**machine.hardware(), "versions": machine.versions()}

    def measured(self, case: workloads.Case) -> Group:
        """The group of a case. Its tests come one after the other: only the last is kept."""
        if self._last is None or self._last[0] != case:
            group = measure(case, self.chosen[case], self.effort, self.small)
            self._last = case, group
            self.add(group.rows.values())
        return self._last[1]

    def add(self, found: Iterable[Row]) -> None:
        self.rows.extend(found)

    def add_start(self, *cells: str) -> None:
        self.cold.append(cells)

    def add_build(self, *cells: str) -> None:
        self.built.append(cells)

    def facts(self, row: Row, finding: Finding | None, again: Row, turns: Turns) -> dict[str, Any]:
        """Everything that a figure needs beside it, for `extra_info`."""
        ratios = {"eager": row.eager, "openvino": row.raw, "eager_against_itself": again.eager}
        return {
            **self.machine,
            "precision": finding.precision if finding else "f32",
            "error": row.error,
            "remark": row.remark,
            "times_as_fast_as": {
                name: None if ratio is None else dataclasses.asdict(ratio)
                for name, ratio in ratios.items()
            },
            "rounds": {
                "disturbed": turns.disturbed,
                "dropped": turns.dropped,
                "attempts": turns.attempts,
            },
            "small": self.small,
        }
