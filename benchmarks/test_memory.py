"""What a process holds that serves a model, and what a build takes; one process for each."""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from board import Board

import ovshim

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="asks /proc")

_WAYS = ("openvino", "eager", "shared", "lean")
_SCRIPT = Path(__file__).with_name("memory.py")


def _run(way: str, workload: str, precision: str, directory: Path, small: bool) -> dict[str, Any]:
    paths = [str(Path(ovshim.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(_SCRIPT), way, workload, precision, str(directory)]
        + (["--small"] if small else []),
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_memory(
    cold: str,
    precision: str,
    board: Board,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "raw").mkdir()
    built = _run("prime", cold, precision, tmp_path, board.small)
    taken: dict[str, list[dict[str, Any]]] = {way: [] for way in _WAYS}
    for _ in range(board.starts // 2):
        for way in _WAYS:
            taken[way].append(_run(way, cold, precision, tmp_path, board.small))
    found = {
        way: {name: statistics.median(s[name] for s in samples) for name in ("rss", "pss")}
        for way, samples in taken.items()
    }
    # Torch's own weights, and what a build takes beside them.
    peak = (built["weights"] + built["peak"]) / built["weights"]
    with capsys.disabled():
        print(f"\n{cold} in {precision}: a build takes {peak:.2f} of the weights at its highest")
        for way, held in found.items():
            ratio = held["pss"] / found["openvino"]["pss"]
            cells = f"{held['rss'] / 1e6:6.0f} MB resident, {held['pss'] / 1e6:6.0f} its share"
            print(f"  {way:10} {cells}, {ratio:.2f} of raw OpenVINO's")
    assert all(sample["hit"] for way in ("shared", "lean") for sample in taken[way])
