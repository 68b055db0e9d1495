"""Eager and OpenVINO in turns within one module, with threads that spin and threads that sleep."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from board import Board
from interleave import Turns, compare
from replay import clock, play
from rows import Row

import ovshim

pytestmark = pytest.mark.benchmark(timer=clock)

_GROUP = "six layers with an eager operator between them"
_SCRIPT = Path(__file__).with_name("coexistence.py")
_POLICIES = {"as it comes": None, "OMP_WAIT_POLICY=passive": "passive"}


def _run(policy: str | None, small: bool, cache: Path) -> dict[str, Any]:
    paths = [str(Path(ovshim.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    environment.pop("OMP_WAIT_POLICY", None)
    if policy is not None:
        environment["OMP_WAIT_POLICY"] = policy
    done = subprocess.run(
        [sys.executable, "-W", "ignore", _SCRIPT, "--small" if small else "--whole", cache],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("policy", _POLICIES)
def test_coexistence(policy: str, board: Board, tmp_path: Path, benchmark: Any) -> None:
    found = _run(_POLICIES[policy], board.small, tmp_path)
    assert found["path"] == "mixed"
    assert found["error"] < 1e-4
    samples: dict[str, list[float]] = found["samples"]
    rows = {
        name: Row(
            group=_GROUP,
            backend=f"{name}, {policy}",
            samples=tuple(samples[name]),
            error=found["error"] if name == "ovshim" else None,
            eager=compare(samples["eager"], samples[name]) if name == "ovshim" else None,
            ours=name == "ovshim",
        )
        for name in ("eager", "ovshim")
    }
    board.add(rows.values())
    benchmark.group = _GROUP
    benchmark.extra_info.update(board.facts(rows["ovshim"], None, rows["eager"], Turns(samples)))
    play(benchmark, samples["ovshim"])
