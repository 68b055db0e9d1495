"""Seconds from `import ovshim` to the first output in a new process, everything cached."""

import statistics
from pathlib import Path
from typing import Any

import child
import pytest
import quiet
from board import Board
from replay import clock, play

pytestmark = pytest.mark.benchmark(timer=clock)

_WAYS = {
    "openvino": "raw OpenVINO",
    "ovshim": "ovshim",
    "otherwise": "ovshim, another input first",
    "at-call": "ovshim, no example",
    "background": "ovshim, background=True",
}


def _run(way: str, workload: str, directory: Path, small: bool) -> dict[str, Any]:
    arguments = [way, workload, str(directory), *(["--small"] if small else [])]
    return child.run("coldstart.py", arguments, directory)


def _seconds(samples: list[dict[str, Any]], name: str) -> str:
    return f"{statistics.median(sample[name] for sample in samples):.3f}"


@pytest.fixture(scope="module")
def starts(board: Board) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Samples by workload and way, filled when first asked for."""
    return {}


@pytest.mark.parametrize("way", _WAYS)
def test_coldstart(
    cold: str,
    way: str,
    starts: dict[str, dict[str, list[dict[str, Any]]]],
    board: Board,
    benchmark: Any,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    if cold not in starts:
        directory = tmp_path_factory.mktemp("cold")
        (directory / "raw").mkdir()
        _run("prime", cold, directory, board.small)
        taken: dict[str, list[dict[str, Any]]] = {name: [] for name in _WAYS}
        for n in range(board.starts):
            quiet.wait(board.effort.patience / board.starts)
            for name in _WAYS if n % 2 else reversed(_WAYS):
                taken[name].append(_run(name, cold, directory, board.small))
        starts[cold] = taken
        raw = statistics.median(s["total"] for s in taken["openvino"])
        loading = statistics.median(s["ready"] + s["first"] for s in taken["openvino"])
        for name, samples in taken.items():
            total = statistics.median(s["total"] for s in samples)
            columns = [_seconds(samples, part) for part in ("import", "ready", "first", "total")]
            over = f"{total - raw:+.3f}", f"{total - loading:+.3f}"
            by_openvino = _seconds(samples, "by OpenVINO")
            board.add_start(cold, _WAYS[name], *columns, *over, by_openvino)
    samples = starts[cold][way]
    assert way == "openvino" or all(sample["hit"] for sample in samples)
    benchmark.group = f"cold start: {cold}"
    medians = {name: statistics.median(s[name] for s in samples) for name in samples[0]}
    benchmark.extra_info.update({**board.machine, "seconds": medians})
    play(benchmark, [sample["total"] for sample in samples])
