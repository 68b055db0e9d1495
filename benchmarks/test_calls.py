"""Seconds a call, every backend in turns with the others: `interleave` says how."""

from typing import Any

import pytest
from board import Board
from measure import AGAIN
from replay import clock, play
from workloads import Case

pytestmark = pytest.mark.benchmark(timer=clock)


def test_call(case: Case, backend: str, board: Board, benchmark: Any) -> None:
    group = board.measured(case)
    row, finding = group.rows[backend], group.findings[backend]
    benchmark.group = str(case)
    benchmark.extra_info.update(board.facts(row, finding, group.rows[AGAIN], group.turns))
    if finding.wrong or (row.ours and not row.samples):
        pytest.fail(f"{row.backend}: {row.remark}, error {row.error}")
    if not row.samples:
        pytest.skip(f"{row.backend}: {row.remark}")
    play(benchmark, row.samples)
