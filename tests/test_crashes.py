"""Builds that kill their process, and what the next process makes of it."""

import contextlib
import signal
import sys
import warnings
from pathlib import Path

import filelock
import pytest
import torch
from checks import check, start_python
from torch import nn

import ovshim
from ovshim.cache import marks

SCRIPT = """
import os, sys, signal, warnings
import torch, ovshim
from ovshim.capture import frontend
from modules import Mlp, make

warnings.simplefilter("ignore")
convert = frontend.convert
how = sys.argv[1]

def dying(*args):
    os.kill(os.getpid(), getattr(signal, how))

if how != "none":
    frontend.convert = dying
module = make(Mlp)
fast = ovshim.accelerate(module, torch.ones(3, 8), prefer="openvino", cache_dir=sys.argv[2])
with torch.inference_mode():
    assert torch.allclose(fast(torch.ones(3, 8)), module(torch.ones(3, 8)), atol=1e-5)
plan = ovshim.explain(fast).to_dict()["plans"][0]
print((plan["reason"] or {"code": plan["path"]})["code"], plan["cache"])
"""

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="there is no fork")


def run(how: str, cache: Path) -> tuple[int, str]:
    """Exit status (a signal as a negative number), and what was printed."""
    process = start_python(SCRIPT, how, str(cache))
    output, _ = process.communicate(timeout=120)
    return process.returncode, output.strip()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["SIGSEGV", "SIGABRT"])
def test_a_build_that_crashes_is_not_tried_a_third_time(tmp_path: Path, how: str) -> None:
    assert run(how, tmp_path)[0] == -getattr(signal, how)
    assert run(how, tmp_path) == (0, "crashed-before off")  # a child died in its place
    assert run("none", tmp_path) == (0, "crashed-before hit")  # and nobody tries again
    for path in sorted(tmp_path.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    assert run("none", tmp_path) == (0, "openvino miss")


@pytest.mark.slow
def test_a_builder_that_was_killed_costs_nothing(tmp_path: Path) -> None:
    assert run("SIGKILL", tmp_path)[0] == -signal.SIGKILL
    assert run("none", tmp_path) == (0, "openvino hit")  # built by a child, to be sure
    assert run("none", tmp_path) == (0, "openvino hit")
    assert not list(tmp_path.glob("v1/marks/*"))


def test_a_mark_is_never_found_before_it_is_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread that builds the same thing would take it for one that was left by the dead."""
    acquire = filelock.FileLock.acquire

    def slowly(self: filelock.BaseFileLock, *args: object, **options: object) -> object:
        monkeypatch.undo()
        Path(self.lock_file).touch()
        assert not marks.left_behind(tmp_path, "ab")
        return acquire(self, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(filelock.FileLock, "acquire", slowly)
    with marks.marked(tmp_path, "ab"):
        assert not marks.left_behind(tmp_path, "ab")
        assert len(list(tmp_path.glob("ab.*"))) == 1
    assert not list(tmp_path.iterdir())


def test_a_mark_that_its_owner_has_just_taken_away_was_not_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = marks.children

    def taken_away(directory: Path) -> list[Path]:
        paths = listed(directory)
        building.close()
        return paths

    monkeypatch.setattr(marks, "children", taken_away)
    with contextlib.ExitStack() as building:
        building.enter_context(marks.marked(tmp_path, "ab"))
        assert not marks.left_behind(tmp_path, "ab")
    assert not list(tmp_path.iterdir())


def test_a_mark_that_was_left_is_told_of_once(tmp_path: Path) -> None:
    (tmp_path / "ab.0").touch()
    (tmp_path / "abc.0").touch()
    assert marks.left_behind(tmp_path, "ab")
    assert not marks.left_behind(tmp_path, "ab")
    assert [path.name for path in tmp_path.iterdir()] == ["abc.0"]


RESIDUAL = """
import sys, warnings
import torch, ovshim
from torch import nn

warnings.simplefilter("ignore")

class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))

class Gated(Residual):
    def forward(self, x):
        return torch.sigmoid(x) * self.down(nn.functional.gelu(self.up(x)))

class Pooled(Residual):
    def forward(self, x):
        return super().forward(x.mean(0, keepdim=True))

torch.manual_seed(0)
device, rows, threads = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
for blocks in (
    [Residual(), Residual()], [Gated(), Residual(), Gated()], [Pooled(), Residual(), Residual()]
):
    module, x = nn.Sequential(*blocks).eval(), torch.randn(rows, 16)
    for sizes in ({}, None):
        fast = ovshim.accelerate(
            module, x, prefer="openvino", cache_dir=False, device=device,
            threads=threads or None, dynamic_shapes=sizes,
        )
        with torch.inference_mode():
            for _ in range(3):
                torch.testing.assert_close(fast(x), module(x), atol=1e-5, rtol=1e-5)
        print(ovshim.explain(fast).to_dict()["plans"][0]["path"])
"""


EMPTY_INDEX = """
import sys
import torch, ovshim
from modules import Function
module = Function(lambda x: x[:, torch.arange(x.shape[1] - 1)] * 2).eval()
with torch.no_grad():
    for _ in range(2):
        fast = ovshim.accelerate(module, torch.randn(2, 12, 8), prefer="openvino")
        for length in (12, 1, 1, 7, 2, 1):
            x = torch.randn(2, length, 8)
            assert torch.equal(fast(x), module(x))
        print(fast.ovshim.stats()["openvino"])
"""


def test_an_index_that_is_known_to_have_no_elements() -> None:
    """OpenVINO 2026.4 ends the process over one."""
    process = start_python(EMPTY_INDEX)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0
    assert all(int(count) >= 3 for count in output.split())


def test_a_product_over_no_elements_is_zero() -> None:
    """OpenVINO 2026.4 leaves what was in memory."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = nn.Sequential(nn.Linear(8, 0, bias=False), nn.Linear(0, 4, bias=False)).eval()
        fast = ovshim.accelerate(module, torch.randn(3, 8), prefer="openvino")
    check(fast, module, torch.randn(5, 8), path="eager", reason="compile-failed", tolerance=0.0)


@pytest.mark.parametrize(("rows", "threads"), [(1, 1), (4, 0), (8, 2)])
def test_residual_blocks_of_known_sizes(rows: int, threads: int) -> None:
    """OpenVINO 2026.4 ends the process over those, on some processors."""
    process = start_python(RESIDUAL, "CPU", str(rows), str(threads))
    output, _ = process.communicate(timeout=240)
    assert (process.returncode, output.split()) == (0, ["openvino"] * 6)


@pytest.mark.slow
@pytest.mark.parametrize("device", ["AUTO", "AUTO:CPU", "HETERO:CPU", "MULTI:CPU"])
def test_residual_blocks_on_devices_that_hand_on(device: str) -> None:
    process = start_python(RESIDUAL, device, "1", "1")
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0
    # Where OpenVINO would end the process over the whole, its parts are served.
    assert len(output.split()) == 6
    assert set(output.split()) <= {"openvino", "mixed"}
