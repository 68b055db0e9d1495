"""What the garbage collector looks at while a graph is captured, and that nobody can tell."""

import copy
import gc
import os
import sys
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import ovshim
from ovshim import capture, garbage


class Cycle:
    def __init__(self) -> None:
        self.own = self


OLD = Cycle()


@pytest.fixture(autouse=True)
def nothing_is_put_aside() -> Iterator[None]:
    for thread in threading.enumerate():
        if thread.name == "ovshim-build":
            thread.join(60)  # what another test has left to be built
    assert _is_seen(OLD)
    yield
    assert _is_seen(OLD)


def test_it_looks_at_nothing_else_and_at_what_was_made() -> None:
    kept, before = Cycle(), gc.get_threshold()
    with garbage.apart():
        assert not _is_seen(kept)
        made = weakref.ref(Cycle())
        with garbage.apart():  # of a capture within
            pass
        assert not _is_seen(kept)
    assert made() is None
    assert _is_seen(kept)
    assert gc.get_threshold() == before


def test_it_is_as_the_program_has_set_it() -> None:
    """By what is seen and not by counts: what is frozen may die of another thread meanwhile."""
    frozen = Cycle()
    gc.disable()
    gc.freeze()
    try:
        free = Cycle()
        for block in (garbage.apart, garbage.whole):
            with block():
                assert _is_seen(free)
                assert not _is_seen(frozen)
            assert not _is_seen(frozen)
        gc.unfreeze()
        with garbage.apart():
            made = weakref.ref(Cycle())
        assert made() is not None
        assert not gc.isenabled()
    finally:
        gc.unfreeze()
        gc.enable()


def _is_seen(thing: object) -> bool:
    """Whether the collector looks at it."""
    return any(one is thing for one in gc.get_objects())


def test_who_looks_for_referrers_finds_them_meanwhile() -> None:
    thing = Cycle()
    holder = [thing]
    with garbage.apart():
        assert not any(one is holder for one in gc.get_referrers(thing))
        with garbage.whole():
            assert any(one is holder for one in gc.get_referrers(thing))
    assert holder


class Net(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.factor = factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) * self.factor


def test_a_copy_answers_for_itself_while_another_thread_captures() -> None:
    """It finds out whose it is by its referrers."""
    fast = ovshim.accelerate(Net(2.0).eval(), torch.randn(2, 4), prefer="openvino", cache_dir=False)
    held = {"copied": copy.copy(fast)}
    held["copied"].factor = 5.0
    inside, over = threading.Event(), threading.Event()

    def captures() -> None:
        with garbage.apart():
            inside.set()
            over.wait(60)

    thread = threading.Thread(target=captures)
    thread.start()
    try:
        inside.wait(60)
        x = torch.randn(2, 4)
        with torch.inference_mode():
            # Not within an assertion, whose rewriting makes it a local, by which it is known.
            answer = held["copied"].forward(x)
            assert torch.allclose(answer, fast.linear(x) * 5.0, atol=1e-5)
    finally:
        over.set()
        thread.join()


def test_a_capture_is_made_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from ovshim.capture import dynamo

    seen = []
    captured = dynamo.capture

    def looking(request: capture.Request) -> capture.Captured:
        seen.append(_is_seen(OLD))
        return captured(request)

    monkeypatch.setattr(dynamo, "capture", looking)
    ovshim.accelerate(Net(3.0).eval(), torch.randn(2, 4), cache_dir=False)
    assert seen
    assert not any(seen)


@pytest.mark.skipif(not hasattr(os, "fork") or sys.platform == "darwin", reason="forks")
def test_a_child_that_forks_meanwhile_has_a_collector_of_its_own() -> None:
    with garbage.apart():
        child = os.fork()
        if child == 0:
            os._exit(0 if _is_seen(OLD) else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert not _is_seen(OLD)


class Held:
    pass


def test_modules_that_come_and_go_are_given_back() -> None:
    """Python's own look is not waited for: there may be nothing to set it off."""
    known: list[weakref.ref[Any]] = []
    gc.collect()
    for _ in range(60):
        module = nn.Linear(4, 4)
        known.append(weakref.ref(module.weight))
        ovshim.accelerate(module, prefer="eager")
    del module
    assert sum(one() is not None for one in known) <= 2 * garbage._FEW


def test_looks_are_as_many_as_modules_that_may_be_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[int] = []
    monkeypatch.setattr(garbage, "_accelerated", garbage._Accelerated())
    monkeypatch.setattr(gc, "collect", lambda: looks.append(1))
    in_use = [Held() for _ in range(1000)]
    for one in in_use:
        garbage.note(one, 10)
    assert 4 <= len(looks) <= 8  # behind 16, 32, 64 and so on
    del looks[:]
    large = Held(), Held()
    for one in large:
        garbage.note(one, garbage._SMALL + 10_000)
    assert len(looks) == 1


def test_no_look_where_the_program_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(garbage, "_accelerated", garbage._Accelerated())
    monkeypatch.setattr(gc, "collect", None)
    kept = [Held() for _ in range(40)]
    gc.disable()
    try:
        for one in kept:
            garbage.note(one, garbage._SMALL)
    finally:
        gc.enable()
