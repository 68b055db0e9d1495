"""Ways of doing the same work, timed in turns, as a group of rows: what is no single call."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from board import Board
from interleave import Turns, compare
from measure import AGAIN, settle
from replay import play
from rows import Row, noise

__all__ = ["Ways", "measure_ways"]


@dataclasses.dataclass(frozen=True)
class Ways:
    """A measured group: its rows by way, eager again among them, and how the measurement went."""

    group: str
    rows: Mapping[str, Row]
    turns: Turns

    def show(self, way: str, board: Board, benchmark: Any) -> None:
        """Hand the samples of one way to pytest-benchmark's fixture."""
        row = self.rows[way]
        benchmark.group = self.group
        benchmark.extra_info.update(board.facts(row, None, self.rows[AGAIN], self.turns))
        play(benchmark, row.samples)


def measure_ways(
    group: str,
    ways: Mapping[str, Callable[[], Any]],
    titles: Mapping[str, str],
    board: Board,
    *,
    ours: frozenset[str],
    raw: str | None = None,
    remark: Callable[[float], str] | None = None,
) -> Ways:
    """Time the ways in turns; "eager" is one of them, and is timed twice.

    Args:
        ours: the ways that are ovshim's: rows in which they lose are marked.
        raw: the way that the others are compared with beside eager.
        remark: what is said of a way that takes so many seconds.
    """
    turns = settle({**ways, AGAIN: ways["eager"]}, board.effort)
    samples, made = turns.samples, {}
    for name, mine in samples.items():
        against_eager = compare(samples["eager"], mine)
        row = Row(
            group=group,
            backend=titles.get(name, name),
            samples=tuple(mine),
            eager=None if name == "eager" else against_eager,
            raw=None if raw in (None, name) else compare(samples[raw], mine),
            remark=noise(against_eager, turns) if name == AGAIN else "",
            ours=name in ours,
        )
        if remark is not None and name != AGAIN and row.seconds is not None:
            row = dataclasses.replace(row, remark=remark(row.seconds))
        made[name] = row
    board.add(made.values())
    return Ways(group, made, turns)
