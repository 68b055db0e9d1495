"""What a process holds that serves a model, and what a build takes; one process for each."""

import statistics
import sys
from pathlib import Path
from typing import Any

import child
import pytest
from board import Board

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="asks /proc")

_WAYS = ("openvino", "eager", "shared", "lean")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_memory(
    cold: str,
    precision: str,
    board: Board,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "raw").mkdir()
    small = ["--small"] if board.small else []

    def run(way: str) -> dict[str, Any]:
        return child.run("memory.py", [way, cold, precision, str(tmp_path), *small], tmp_path)

    peaks = {}
    for way, title in (("prime", "a build"), ("hand", "conversion by hand")):
        built = run(way)
        # Torch's own weights, and the highest that is taken beside them.
        peaks[title] = (built["weights"] + built["peak"]) / built["weights"]
    taken: dict[str, list[dict[str, Any]]] = {way: [] for way in _WAYS}
    for _ in range(board.starts // 2):
        for way in _WAYS:
            taken[way].append(run(way))
    found = {
        way: {name: statistics.median(s[name] for s in samples) for name in ("rss", "pss")}
        for way, samples in taken.items()
    }
    with capsys.disabled():
        highest = ", ".join(f"{title} {peak:.2f}" for title, peak in peaks.items())
        print(f"\n{cold} in {precision}, at its highest, in weights: {highest}")
        for way, held in found.items():
            ratio = held["pss"] / found["openvino"]["pss"]
            cells = f"{held['rss'] / 1e6:6.0f} MB resident, {held['pss'] / 1e6:6.0f} its share"
            print(f"  {way:10} {cells}, {ratio:.2f} of raw OpenVINO's")
    assert all(sample["hit"] for way in ("shared", "lean") for sample in taken[way])
