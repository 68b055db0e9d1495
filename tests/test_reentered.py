"""Calls from within a call: a signal handler's, or of what is freed, at any place of it."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import pytest
import torch
from checks import check, counts, plans, same
from modules import Mlp, make

import ovshim
from ovshim import tiny
from ovshim.bound import installed
from ovshim.pool import Pool, ReenteredError


@pytest.fixture(autouse=True)
def one_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not another one for the example's sizes alone."""
    monkeypatch.setattr(tiny, "_seconds", lambda call: 1.0)


def engine_of(fast: Any) -> Any:
    (plan,) = installed(fast)["forward"].dispatcher.plans  # type: ignore[attr-defined]
    assert plan.served is not None
    return plan.served.engine


def within(work: Callable[[], Any], function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which does that work too at its end, once."""
    todo = [work]

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        if todo:
            todo.pop()()
        return result

    return wrapped


@pytest.mark.parametrize("rows", [3, 5])
def test_a_call_within_an_inference(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    module, x, other = make(Mlp), torch.randn(3, 8), torch.randn(rows, 8)
    fast = ovshim.accelerate(module, x, prefer="openvino")
    with torch.inference_mode():
        check(fast, module, x)
        check(fast, module, x)
        check(fast, module, other, path=None)
        before = counts(fast)
        engine, inner = engine_of(fast), []
        wrapped = within(lambda: inner.append(fast(other)), engine._infer)
        with monkeypatch.context() as patch:
            patch.setattr(engine, "_infer", wrapped)
            outer = fast(x)
        same([outer, *inner], [module(x), module(other)])
    served = counts(fast)
    assert served["openvino"] == before["openvino"] + 1
    assert served["eager"] == before["eager"] + 1
    assert ovshim.explain(fast).to_dict()["eager_reasons"]["reentered"] == 1
    for _ in range(2):
        check(fast, module, x)
    assert plans(fast)[0]["path"] == "openvino"


def test_a_call_while_a_request_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = make(Mlp), torch.randn(3, 8)
    fast = ovshim.accelerate(module, x, prefer="openvino")
    check(fast, module, x)
    engine, inner = engine_of(fast), []
    while engine._pool.free:  # as if other threads held them
        held = engine._pool.free.pop()
    with torch.inference_mode():
        wrapped = within(lambda: inner.append(fast(x)), engine._new_slot)
        monkeypatch.setattr(engine, "_new_slot", wrapped)
        engine._pool._all.discard(held)
        same([fast(x), *inner], [module(x), module(x)])
    assert len(inner) == 1
    check(fast, module, x)


class Held:
    """What a pool is of."""


class Holder:
    def __init__(self) -> None:
        self.pool: Pool[Held] = Pool(Holder.run.__code__)

    def run(self, work: Callable[[], Any]) -> Any:
        pool = self.pool
        try:
            held = pool.free.pop()
        except IndexError:
            held = pool.new(Held)
        try:
            return work()
        finally:
            pool.back.append(held)

    def alone(self) -> int:
        return self.pool.alone(len)


def test_within_a_call_nobody_waits_for_all_to_end() -> None:
    one, other = Holder(), Holder()
    for work in (one.alone, lambda: one.run(int)):
        with pytest.raises(ReenteredError):
            one.run(work)
    assert one.run(lambda: other.run(lambda: 7)) == 7
    assert one.run(other.alone) == len(other.pool.free)
    assert one.alone() == len(one.pool.free)


def test_who_has_all_refuses_itself_and_nothing_is_lost() -> None:
    one = Holder()
    one.run(int)

    def refused(held: list[Held]) -> list[Held]:
        with pytest.raises(ReenteredError):
            one.run(int)
        return list(held)

    assert one.pool.alone(refused) == one.pool.free
    assert one.pool.free is one.pool.back
    assert one.run(lambda: 7) == 7


def test_what_an_interrupt_has_left_gathered_is_given_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one = Holder()
    one.run(int)
    (before,) = one.pool.free

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(one.pool, "_give_back", interrupted)  # as a signal does on the way into it
        with pytest.raises(KeyboardInterrupt):
            one.alone()
    assert one.pool.back is not one.pool.free
    assert one.run(lambda: 7) == 7
    assert one.pool.back is one.pool.free
    assert before in one.pool.free


def test_what_an_interrupt_has_cost_is_not_waited_for() -> None:
    """Where an exception that somebody keeps, with its frames, keeps it alive."""
    one = Holder()
    one.run(int)
    kept = one.pool.free.pop()
    assert one.run(lambda: 7) == 7
    assert kept not in one.pool.free
    assert one.pool.busy() is False


def test_what_another_thread_holds_is_waited_for() -> None:
    one = Holder()
    one.run(int)
    begun, ends = threading.Event(), threading.Event()

    def work() -> int:
        begun.set()
        assert ends.wait(60)
        return 7

    with ThreadPoolExecutor(3) as threads:
        long = threads.submit(one.run, work)
        assert begun.wait(60)
        waiting = [threads.submit(one.run, int) for _ in range(2)]
        assert not wait(waiting, timeout=0.3).done
        assert len(one.pool) == 1
        ends.set()
        assert long.result() == 7
        assert [future.result() for future in waiting] == [0, 0]
