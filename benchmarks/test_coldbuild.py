"""Seconds of a build in a new process, nothing cached, beside the steps that none can leave out."""

import shutil
import statistics
from typing import Any

import child
import pytest
import quiet
from board import Board
from replay import clock, play

pytestmark = pytest.mark.benchmark(timer=clock)

_WAYS = {"hand": "by hand", "ovshim": "ovshim"}
_PARTS = ("capture", "compile", "further", "proof", "race", "build")


@pytest.fixture(scope="module")
def builds(board: Board) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Samples by workload and way, filled when first asked for."""
    return {}


@pytest.mark.parametrize("way", _WAYS)
def test_coldbuild(
    built: str,
    way: str,
    builds: dict[str, dict[str, list[dict[str, Any]]]],
    board: Board,
    benchmark: Any,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    if built not in builds:
        directory = tmp_path_factory.mktemp("build")
        small = ["--small"] if board.small else []
        taken: dict[str, list[dict[str, Any]]] = {name: [] for name in _WAYS}
        for n in range(board.starts):
            quiet.wait(board.effort.patience / board.starts)
            for name in _WAYS if n % 2 else reversed(_WAYS):
                kept = directory / "kept"
                kept.mkdir()
                arguments = [name, built, str(kept), *small]
                taken[name].append(child.run("coldbuild.py", arguments, directory))
                shutil.rmtree(kept)  # a cache each, of some hundred megabytes
        builds[built] = taken
        hand = statistics.median(s["build"] for s in taken["hand"])
        for name, samples in taken.items():
            medians = [statistics.median(s[part] for s in samples) for part in _PARTS]
            columns = [f"{median:.2f}" for median in medians]
            board.add_build(built, _WAYS[name], *columns, f"{medians[-1] / hand:.2f}")
    samples = builds[built][way]
    benchmark.group = f"cold build: {built}"
    seconds = {name: statistics.median(s[name] for s in samples) for name in samples[0]}
    benchmark.extra_info.update({**board.machine, "seconds": seconds})
    play(benchmark, [sample["build"] for sample in samples])
