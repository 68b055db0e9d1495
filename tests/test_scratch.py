"""Graphs that the cache does not keep lie in directories that go with their process."""

import os
import signal
import tempfile
import time
from pathlib import Path

import pytest
from checks import run_python

from ovshim.cache import scratch as module
from ovshim.cache.files import Lease
from ovshim.cache.scratch import scratch

WITHOUT_FORK = pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")

ACCELERATED = """
import multiprocessing, os, sys
from pathlib import Path
import torch
import ovshim
from modules import Mlp, make
def built():
    fast = ovshim.accelerate(make(Mlp), torch.randn(3, 8), prefer="openvino", cache_dir=False)
    assert ovshim.explain(fast).to_dict()["plans"][0]["path"] == "openvino"
    return fast
def files():
    return sorted(map(str, Path(os.environ["TMPDIR"]).glob("ovshim-*/model.bin")))
"""


@pytest.fixture(autouse=True)
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    module._sweep.cache_clear()
    return tmp_path


def write(directory: Path) -> None:
    (directory / "model.bin").write_bytes(b"weights")


def left(room: Path) -> list[str]:
    return [path.name for path in room.glob("ovshim-*")]


def test_it_is_removed_once(room: Path) -> None:
    path, remove = scratch(write)
    assert (path / "model.bin").read_bytes() == b"weights"
    assert path.parent == room
    remove()
    remove()
    assert not left(room)


def test_of_a_writer_that_fails_nothing_is_left(room: Path) -> None:
    def fail(directory: Path) -> None:
        write(directory)
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        scratch(fail)
    assert not left(room)


def test_one_that_is_taken_at_once_is_made_again(
    room: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    takes = iter([lambda marker: None, Lease.take])
    monkeypatch.setattr(Lease, "take", lambda marker: next(takes)(marker))
    path, remove = scratch(write)
    assert (path / "model.bin").exists()
    remove()


def test_what_is_held_or_not_ours_stays(room: Path) -> None:
    unmarked, elsewhere = room / "ovshim-of-somebody", room / "elsewhere"
    for directory in (unmarked, elsewhere):
        directory.mkdir()
        write(directory)
    (elsewhere / "in-use").touch()
    link, file = room / "ovshim-link", room / "ovshim-file"
    link.symlink_to(elsewhere)
    file.touch()
    held, remove = scratch(write)
    died = room / "ovshim-died"
    died.mkdir()
    write(died)
    (died / "in-use").touch()
    module._sweep.cache_clear()
    _, remove_other = scratch(write)
    assert not died.exists()
    for path in (unmarked, elsewhere, held):
        assert (path / "model.bin").exists()
    assert link.is_symlink()
    assert file.exists()
    remove()
    remove_other()


@WITHOUT_FORK
def test_the_next_process_removes_what_a_signal_has_left(room: Path) -> None:
    def made_by_a_child() -> int:
        before, child = left(room), os.fork()
        if not child:
            scratch(write)
            signal.pause()
        while left(room) == before or not all(map(whole, left(room))):
            time.sleep(0.01)
        return child

    def whole(name: str) -> bool:
        return (room / name / "model.bin").exists()

    def end(child: int) -> None:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)

    first, second = made_by_a_child(), made_by_a_child()
    end(first)
    assert len(left(room)) == 2
    module._sweep.cache_clear()
    _, remove = scratch(write)
    remove()
    assert list(map(whole, left(room))) == [True]  # the second is alive
    end(second)
    module._sweep.cache_clear()
    _, remove = scratch(write)
    remove()
    assert not left(room)


@WITHOUT_FORK
def test_children_remove_their_own_and_no_other(room: Path) -> None:
    source = (
        ACCELERATED
        + """
fast = built()
mine = files()
assert mine
child = os.fork()
if not child:
    sys.exit()
os.waitpid(child, 0)
assert files() == mine, files()
def in_child():
    torch.set_num_threads(1)  # torch's threads are not there
    other = built()
    assert len(files()) > len(mine)
child = multiprocessing.get_context("fork").Process(target=in_child)
child.start()
child.join()
assert child.exitcode == 0
assert files() == mine, files()
"""
    )
    run_python(source, TMPDIR=str(room))
    assert not left(room)
