"""Every precision, beside eager in less than fp32 and the compiler: speed, error, size, hits."""

from pathlib import Path
from typing import Any

import precisions
import pytest
from board import Board
from measure import AGAIN, Group
from replay import clock, play

pytestmark = pytest.mark.benchmark(timer=clock)


@pytest.fixture(scope="module", params=precisions.SUBJECTS)
def group(request: pytest.FixtureRequest, board: Board) -> Group:
    name: str = request.param
    found = precisions.SUBJECTS[name].measured(board.effort, board.small, board.inductor)
    board.precision[name] = precisions.lowered(found)
    return found


def test_speed(group: Group, board: Board, benchmark: Any) -> None:
    row = group.rows['ovshim, "int8"']
    benchmark.group = row.group
    finding = group.findings['ovshim, "int8"']
    benchmark.extra_info.update(board.facts(row, finding, group.rows[AGAIN], group.turns))
    failed = [
        f"{row.backend}: {row.remark}, error {row.error}"
        for row in group.rows.values()
        # What is not exact enough is left to eager, as it should: weights drawn at random, in int4.
        if row.ours and not row.samples and "eager serves" not in row.remark
    ]
    if failed:
        pytest.fail("\n".join(failed))
    play(benchmark, row.samples)


@pytest.mark.parametrize("name", precisions.ACCURACY_OF)
def test_accuracy(name: str, board: Board, tmp_path: Path) -> None:
    found = precisions.accuracies(name, tmp_path)
    board.accuracy[name] = found
    worst = min(row.points for row in found if row.way.startswith('ovshim, "int8"'))
    assert worst >= -0.3
