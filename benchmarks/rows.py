"""What was found, as rows, and the tables made of them."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterable, Sequence

from interleave import Ratio, Turns

__all__ = ["Row", "duration", "markdown", "noise", "text"]

HEAD = ("group", "backend", "per call", "× eager", "× raw OpenVINO", "error", "remark")
LOSES = "▼"
# Beyond this ratio a program differs from itself by more than most rows differ.
QUIET = 1.05


@dataclasses.dataclass(frozen=True)
class Row:
    """One backend in one group.

    Attributes:
        samples: seconds a call; empty where it was not timed, and `remark` says why.
        error: largest relative L2 error over the outputs, against eager.
        against: how many times as fast as eager, as raw OpenVINO.
        ours: whether it is ovshim: rows in which it loses are marked.
        overhead: whether `raw` is a bare `infer` of the very same compiled model.
    """

    group: str
    backend: str
    samples: tuple[float, ...] = ()
    error: float | None = None
    eager: Ratio | None = None
    raw: Ratio | None = None
    remark: str = ""
    ours: bool = False
    overhead: bool = False

    @property
    def seconds(self) -> float | None:
        return statistics.median(self.samples) if self.samples else None

    def cells(self) -> tuple[str, ...]:
        return (
            self.group,
            self.backend,
            duration(self.seconds),
            self._ratio(self.eager),
            self._ratio(self.raw),
            "" if self.error is None else f"{self.error:.0e}" if self.error else "0",
            self.remark,
        )

    def _ratio(self, ratio: Ratio | None) -> str:
        if ratio is None:
            return ""
        return f"{ratio} {LOSES}" if self.ours and round(ratio.median, 2) < 1 else str(ratio)


def duration(seconds: float | None) -> str:
    """Seconds in the unit that suits them."""
    if seconds is None:
        return "–"
    for unit, factor in (("s", 1.0), ("ms", 1e3)):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"


def noise(ratio: Ratio, turns: Turns) -> str:
    """The remark on a row that compares eager with itself."""
    remark = "noise"
    if not 1 / QUIET <= ratio.median <= QUIET:
        remark += ": the machine was disturbed"
    if turns.disturbed:
        remark += f", {turns.disturbed} of {len(turns.samples['eager'])} rounds beside others"
    return remark


def _grouped(lines: Iterable[Sequence[str]]) -> list[list[str]]:
    """The lines, the first column written only where it changes."""
    grouped, last = [], ""
    for first, *rest in lines:
        grouped.append(["" if first == last else first, *rest])
        last = first
    return grouped


def text(head: Sequence[str], lines: Iterable[Sequence[str]]) -> list[str]:
    """A table for the terminal."""
    table = [list(head), *_grouped(lines)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in table
    ]


def markdown(head: Sequence[str], lines: Iterable[Sequence[str]]) -> list[str]:
    """The same for a page."""
    rows = [head, ["---"] * len(head), *_grouped(lines)]
    return ["| " + " | ".join(row) + " |" for row in rows]
