"""How cost grows along each axis: the plots of docs/performance.md."""

import statistics
from typing import Any

import pytest
import scaling
from board import Board
from replay import clock, play

import ovshim

pytestmark = pytest.mark.benchmark(timer=clock)


@pytest.mark.parametrize("name", scaling.AXES)
def test_scaling(name: str, board: Board, benchmark: Any) -> None:
    axis = scaling.measured(name, board.axis_effort, board.small)
    board.axes[name] = axis
    last = axis.points[-1]
    benchmark.group = f"scaling: {name}"
    benchmark.extra_info.update({**board.machine, "points": [p.cells() for p in axis.points]})
    if name == "kinds":
        plans = [int(point.remark.split()[0]) for point in axis.points]
        assert plans[-1] == ovshim.Options().max_plans, "the number of plans is bounded"
        pytest.skip("memory alone")
    assert statistics.median(last.ovshim) > 0
    play(benchmark, last.ovshim)
