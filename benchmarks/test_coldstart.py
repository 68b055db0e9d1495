"""Seconds from `import ovshim` to the first output in a new process, everything cached."""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import quiet
from board import Board
from replay import clock, play

import ovshim

pytestmark = pytest.mark.benchmark(timer=clock)

_WAYS = {"openvino": "raw OpenVINO", "ovshim": "ovshim"}
_SCRIPT = Path(__file__).with_name("coldstart.py")


def _run(way: str, workload: str, directory: Path, small: bool) -> dict[str, Any]:
    # A checkout on pytest's own path is not on that of a child.
    paths = [str(Path(ovshim.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    # Compiled by Python once, as what is installed is, wherever it lies.
    environment = {**os.environ, "PYTHONPYCACHEPREFIX": str(directory / "bytecode")}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(_SCRIPT), way, workload, str(directory)]
        + (["--small"] if small else []),
        env={**environment, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


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
        for name, samples in taken.items():
            total = statistics.median(s["total"] for s in samples)
            columns = [_seconds(samples, part) for part in ("import", "ready", "first", "total")]
            board.add_start(cold, _WAYS[name], *columns, f"{total - raw:+.3f}")
    samples = starts[cold][way]
    assert way != "ovshim" or all(sample["hit"] for sample in samples)
    benchmark.group = f"cold start: {cold}"
    medians = {name: statistics.median(s[name] for s in samples) for name in samples[0]}
    benchmark.extra_info.update({**board.machine, "seconds": medians})
    play(benchmark, [sample["total"] for sample in samples])
