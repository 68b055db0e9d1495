"""What a call costs beyond OpenVINO's own work: `fast(x)` beside a bare `infer` of its model."""

import functools
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import quiet
import torch
import workloads
from backends import raw_request, settle_sizes
from board import Board
from interleave import Turns, compare
from measure import AGAIN, settle
from replay import clock, play
from rows import Row, noise

import ovshim

pytestmark = pytest.mark.benchmark(timer=clock)

_CASE = workloads.Case("MLP 256-256-10", 1)
_GROUP = f"hot path: {_CASE}"
_TITLES = {"eager": "eager", "bare": "bare infer of the same compiled model", "fast": "fast(x)"}


@pytest.fixture(scope="module")
def overhead(
    board: Board, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Row], Turns]:
    """Rows by way, and how the measurement went."""
    quiet.wait(board.effort.patience)
    module, (args, _) = workloads.make(_CASE, small=False)
    cache: Path = tmp_path_factory.mktemp("cache")
    fast = ovshim.accelerate(module, args, prefer="openvino", cache_dir=cache)
    with torch.inference_mode():
        plan = settle_sizes(fast, functools.partial(fast, *args))
        engine = plan.served.engine.exact or plan.served.engine
        ways: dict[str, Callable[[], Any]] = {
            "eager": functools.partial(module, *args),
            # Not compiled anew: the same settings may have led to another variant.
            "bare": raw_request(engine._compiled, args),
            "fast": functools.partial(fast, *args),
        }
        turns = settle({**ways, AGAIN: ways["eager"]}, board.effort)
    made = {name: _row(name, turns) for name in turns.samples}
    board.add(made.values())
    return made, turns


def _row(name: str, turns: Turns) -> Row:
    samples = turns.samples
    mine, bare = samples[name], samples["bare"]
    against_eager = compare(samples["eager"], mine)
    over = (statistics.median(mine) - statistics.median(bare)) * 1e6
    return Row(
        group=_GROUP,
        backend=_TITLES.get(name, name),
        samples=tuple(mine),
        eager=None if name == "eager" else against_eager,
        raw=None if name == "bare" else compare(bare, mine),
        remark=noise(against_eager, turns) if name == AGAIN else f"{over:+.1f} µs over bare",
        ours=name == "fast",
        overhead=True,
    )


@pytest.mark.parametrize("way", _TITLES)
def test_hotpath(
    way: str, overhead: tuple[dict[str, Row], Turns], board: Board, benchmark: Any
) -> None:
    rows, turns = overhead
    benchmark.group = _GROUP
    benchmark.extra_info.update(board.facts(rows[way], None, rows[AGAIN], turns))
    play(benchmark, rows[way].samples)
