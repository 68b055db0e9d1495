"""Calls that the compiled helper answers: nobody can tell them from those that Python answers."""

import gc
import os
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from checks import (
    ROOT,
    Seen,
    by_the_road,
    check,
    counts,
    eager_reasons,
    quietly,
    same,
    served,
    standing,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from modules import Mlp, make
from torch import nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import ovshim
from ovshim import helper, parts, shortcut, verdict
from ovshim.bound import installed
from ovshim.infer import Engine
from ovshim.race import Finish

pytestmark = [
    pytest.mark.skipif(helper.hot is None, reason="the helper was not built"),
    pytest.mark.filterwarnings("ignore::ovshim.errors.FallbackWarning"),
]

NAN, INF = float("nan"), float("inf")


class TwoIn(nn.Module):
    """Two inputs, one of them integers; two outputs with names."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(8, 4)

    def forward(self, n: torch.Tensor, x: torch.Tensor) -> dict[str, torch.Tensor]:
        y = self.last(n[:, None] * x)
        return {"sums": y.sum(-1), "all": y}


class Table(nn.Module):
    """An index may lie outside of its table."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.last = nn.Embedding(10, 8), nn.Linear(8, 4)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.last(self.table(ids))  # type: ignore[no-any-return]


@pytest.fixture
def by_python(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Gets an item for each inference of Python's."""
    bind, seen = Engine._bind_inputs, list[int]()

    def noted(engine: Engine, *given: Any) -> Any:
        seen.append(1)
        return bind(engine, *given)

    monkeypatch.setattr(Engine, "_bind_inputs", noted)
    return seen


def laying(fast: nn.Module) -> Any:
    return installed(fast)["forward"].dispatcher._laying  # type: ignore[attr-defined]


def engine_of(fast: nn.Module) -> Any:
    (plan,) = standing(fast)
    return plan.served.engine.exact or plan.served.engine


def on_its_way(*inputs: torch.Tensor, cls: type[nn.Module] = Mlp) -> tuple[nn.Module, nn.Module]:
    """A module, and what answers calls of these sizes in inference mode by a way."""
    module = make(cls)
    fast = ovshim.accelerate(module, inputs, cache_dir=None, prefer="openvino")
    for _ in range(2):
        check(fast, module, *inputs)
    assert laying(fast).shortcut.way is not None
    return module, fast


@pytest.mark.parametrize("dynamic", [True, False])
def test_calls_like_the_last_one(
    exact_wins: list[Any], by_python: list[int], dynamic: bool
) -> None:
    del exact_wins
    module, x = make(Mlp), torch.randn(3, 8)
    sizes = {} if dynamic else {"dynamic_shapes": {"x": {}}}
    fast = ovshim.accelerate(module, x, cache_dir=None, prefer="openvino", **sizes)
    check(fast, module, x)
    by_python.clear()
    for _ in range(20):
        check(fast, module, torch.randn(3, 8))
    assert not by_python
    check(fast, module, torch.randn(5, 8))
    assert by_python


def test_beside_calls_at_rest(
    exact_wins: list[Any], by_python: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eager is faster for some calls of a module, which have a glance of their own."""
    del exact_wins
    finishes = [Finish(2.0, 1.0, 2.0, 2.0), Finish(1.0, 2.0, 0.5, 0.5)]
    monkeypatch.setattr(verdict, "race", lambda *_: finishes.pop(0))
    monkeypatch.setattr(parts, "divide", lambda job, plan: plan)
    module, x, more = make(Mlp), torch.randn(3, 8), torch.randn(2, 3, 8)
    fast = ovshim.accelerate(module, x, cache_dir=None)
    for _ in range(2):
        check(fast, module, x)
        check(fast, module, more, path="eager", reason=None)
    by_python.clear()
    for _ in range(5):
        check(fast, module, torch.randn(3, 8))
        check(fast, module, torch.randn(2, 3, 8), path="eager", reason="slower")
    assert not by_python


class Fragile(Mlp):
    def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        if self.broken:
            raise ArithmeticError("broken")
        return super().forward(x) * scale


Fragile.broken = False  # type: ignore[attr-defined] # of the class: nobody watches it


@pytest.fixture
def resting(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[nn.Module, nn.Module]]:
    """A module, and its twin whose calls of three rows are at rest in inference mode."""
    monkeypatch.setattr(verdict, "race", lambda *_: Finish(1.0, 2.0, 0.5, 0.5))
    monkeypatch.setattr(parts, "divide", lambda job, plan: plan)
    module, x = make(Fragile), torch.randn(3, 8)
    fast = ovshim.accelerate(module, x, cache_dir=None)
    with torch.inference_mode():
        while type(laying(fast).shortcut.rest) is not helper.hot.Rest:
            fast(x)
    yield module, fast
    Fragile.broken = False  # type: ignore[attr-defined]


def test_calls_at_rest_go_to_the_module(resting: tuple[nn.Module, nn.Module]) -> None:
    module, fast = resting
    shortcut = laying(fast).shortcut
    fast.ovshim.reset_stats()  # type: ignore[union-attr, operator]
    with torch.inference_mode():
        fast(torch.randn(3, 8))  # by the road: what was reset is counted by others
    missed, left = shortcut.missed, shortcut.rest.left
    for _ in range(left):
        check(fast, module, torch.randn(3, 8), path="eager", reason="slower")
    assert (shortcut.missed, shortcut.rest.left) == (missed, 0)
    assert counts(fast)["eager"] == eager_reasons(fast)["slower"] == left + 1
    check(fast, module, torch.randn(3, 8), path="eager", reason="slower")
    assert (shortcut.missed, shortcut.rest.left) == (missed + 1, left)


class Doubled:
    """Wraps a method, and says that it is what it wraps, as tracers' proxies do."""

    def __init__(self, wrapped: Any) -> None:
        self.wrapped = wrapped

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return 2 * self.wrapped(*args, **kwargs)

    def __get__(self, instance: Any, owner: Any) -> Any:
        return Doubled(self.wrapped.__get__(instance, owner))

    def __eq__(self, other: object) -> bool:
        return bool(self.wrapped == other)

    def __hash__(self) -> int:
        return hash(self.wrapped)


def test_a_method_at_rest_that_is_replaced_by_an_equal_one(
    resting: tuple[nn.Module, nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    module, fast = resting
    x = torch.randn(3, 8)
    with torch.inference_mode():
        before = module(x)
        assert laying(fast).shortcut.rest.left > 2
        monkeypatch.setattr(Fragile, "forward", Doubled(Fragile.forward))
        for _ in range(3):
            assert torch.equal(fast(x), 2 * before)


OTHERS: Mapping[str, Callable[[], tuple[tuple[Any, ...], dict[str, Any]]]] = {
    "rows": lambda: ((torch.randn(2, 8),), {}),
    "rank": lambda: ((torch.randn(8),), {}),
    "class": lambda: ((nn.Parameter(torch.randn(3, 8)),), {}),
    "name": lambda: ((), {"x": torch.randn(3, 8)}),
    "more": lambda: ((torch.randn(3, 8), 2.0), {}),
    "more by name": lambda: ((torch.randn(3, 8),), {"scale": 2.0}),
}


@pytest.mark.parametrize("other", OTHERS)
def test_other_calls_are_not_at_rest(resting: tuple[nn.Module, nn.Module], other: str) -> None:
    module, fast = resting
    shortcut = laying(fast).shortcut
    args, kwargs = OTHERS[other]()
    missed = shortcut.missed
    with torch.inference_mode():
        same(fast(*args, **kwargs), module(*args, **kwargs))
    assert shortcut.missed > missed


@pytest.mark.parametrize("around", ["functions", "disabled"])
def test_in_a_mode_nothing_is_at_rest(resting: tuple[nn.Module, nn.Module], around: str) -> None:
    module, fast = resting
    shortcut, x = laying(fast).shortcut, torch.randn(3, 8)
    missed = shortcut.missed
    with torch.inference_mode(), quietly(), AROUND[around]():
        same(fast(x), module(x))
    assert shortcut.missed > missed
    with quietly():  # in grad mode
        same(fast(x).detach(), module(x).detach())
    assert shortcut.missed > missed + 1


def test_what_a_module_raises_at_rest(resting: tuple[nn.Module, nn.Module]) -> None:
    _, fast = resting
    left = laying(fast).shortcut.rest.left
    Fragile.broken = True  # type: ignore[attr-defined]
    with pytest.raises(ArithmeticError, match="broken"), torch.inference_mode():
        fast(torch.randn(3, 8))
    assert laying(fast).shortcut.rest.left == left - 1


def test_nothing_stays_of_calls_at_rest(resting: tuple[nn.Module, nn.Module]) -> None:
    _, fast = resting
    x = torch.randn(3, 8)
    ours, shared = [x, Fragile.forward, fast], [None, torch.float32, torch.Tensor]
    watched = [*ours, *shared]  # of the shared ones others may let go meanwhile
    with torch.inference_mode():
        fast(x)
        fast(x[:2])
        gc.collect()
        before = [sys.getrefcount(each) for each in watched]
        for _ in range(1000):
            fast(x)
            fast(x[:2])
        gc.collect()
        after = [sys.getrefcount(each) for each in watched]
    grown = [a - b for a, b in zip(after, before, strict=True)]
    assert all(abs(more) <= 3 for more in grown[: len(ours)]), (before, after)
    assert all(more <= 3 for more in grown), (before, after)


def test_a_module_at_rest_is_collected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verdict, "race", lambda *_: Finish(1.0, 2.0, 0.5, 0.5))
    monkeypatch.setattr(parts, "divide", lambda job, plan: plan)
    x = torch.randn(3, 8)
    fast = ovshim.accelerate(make(Mlp), x, cache_dir=None)
    with torch.inference_mode():
        while laying(fast).shortcut.rest is None:
            fast(x)
    gone = weakref.ref(fast)
    del fast
    gc.collect()
    assert gone() is None


def test_indices(exact_wins: list[Any], by_python: list[int]) -> None:
    del exact_wins
    ids = torch.tensor([[1, 2, 3]])
    module, fast = on_its_way(ids, cls=Table)
    by_python.clear()
    for _ in range(5):
        check(fast, module, torch.randint(0, 10, (1, 3)))
    assert not by_python
    for wrong in (ids + 2**33, ids + 8, ids - 2):  # beyond 32 bits, and beyond the table
        for each in (module, fast):
            with pytest.raises(IndexError), torch.inference_mode():
                each(wrong)
    check(fast, module, ids)


def test_integers_and_names(exact_wins: list[Any], by_python: list[int]) -> None:
    del exact_wins
    n, x = torch.tensor([1, 2, 3]), torch.randn(3, 8)
    module, fast = on_its_way(n, x, cls=TwoIn)
    by_python.clear()
    for _ in range(5):
        check(fast, module, torch.randint(0, 10, (3,)), torch.randn(3, 8))
    assert not by_python
    check(fast, module, n + 2**33, x, path="eager", reason="special-values")  # beyond 32 bits
    check(fast, module, n, x)


# --- what is otherwise than it was ------------------------------------------------------------


class NotedBelow(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


AROUND: Mapping[str, Callable[[], Any]] = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "functions": Seen,
    "operators": NotedBelow,
    "forward gradients": forward_ad.dual_level,
    "disabled": ovshim.disabled,
}


@pytest.mark.parametrize("around", AROUND)
def test_in_a_mode_it_does_not_answer(
    exact_wins: list[Any], by_python: list[int], around: str
) -> None:
    del exact_wins
    x = torch.randn(3, 8)
    module, fast = on_its_way(x)
    before = counts(fast)["openvino"]
    with torch.no_grad(), AROUND[around]():
        same(fast(x), module(x), 1e-5)
    assert counts(fast)["openvino"] == before
    by_python.clear()
    for _ in range(10):
        check(fast, module, x)
    assert len(by_python) < 10


def test_with_another_default_dtype(exact_wins: list[Any]) -> None:
    del exact_wins
    x = torch.randn(3, 8)
    module, fast = on_its_way(x)
    torch.set_default_dtype(torch.float64)
    try:
        check(fast, module, x, path="eager", reason="stale")
    finally:
        torch.set_default_dtype(torch.float32)


def test_under_vmap(exact_wins: list[Any]) -> None:
    del exact_wins
    x = torch.randn(3, 8)
    module, fast = on_its_way(x)
    with torch.no_grad(), served(fast, "eager", "special-mode"):
        same(torch.vmap(fast)(x[None]), module(x)[None])


CHANGES: Mapping[str, Callable[[Any], Any]] = {
    "in place": lambda m: m.first.weight.detach().mul_(2),
    "weight": lambda m: setattr(m, "last", nn.Linear(16, 4)),
    "data": lambda m: setattr(m.last.weight, "data", torch.randn(4, 16)),
    "training": lambda m: m.train(),
    "hook": lambda m: m.register_forward_hook(lambda _, __, y: y + 1),
    "inner hook": lambda m: m.norm.register_forward_hook(lambda _, __, y: y + 1),
    "epsilon": lambda m: setattr(m.norm, "eps", 0.5),
    "method": lambda m: setattr(m.norm, "forward", lambda x: x),
    "child": lambda m: setattr(m, "norm", nn.Identity()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_module_that_has_changed(exact_wins: list[Any], change: str) -> None:
    del exact_wins
    x = torch.randn(3, 8)
    module, fast = on_its_way(x)
    before = module(x)
    CHANGES[change](fast)
    if change != "in place":  # of which both have the same
        CHANGES[change](module)
    module.load_state_dict(fast.state_dict())
    for _ in range(6):
        check(fast, module, x, path=None)
    assert change == "training" or not torch.equal(module(x), before)


def test_code_that_has_changed(exact_wins: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    del exact_wins
    x = torch.randn(3, 8)
    module, fast = on_its_way(x)
    monkeypatch.setattr(Mlp, "forward", lambda self, x: self.first(x))
    for _ in range(3):
        check(fast, module, x, path=None)


OTHERWISE: Mapping[str, Callable[[], torch.Tensor]] = {
    "sizes": lambda: torch.randn(4, 8),
    "dtype": lambda: torch.randn(3, 8, dtype=torch.float64),
    "strides": lambda: torch.randn(8, 3).t(),
    "requires grad": lambda: torch.randn(3, 8, requires_grad=True),
    "class": lambda: nn.Parameter(torch.randn(3, 8), requires_grad=False),
    "rank": lambda: torch.randn(1, 3, 8),
    "negated": lambda: torch._neg_view(torch.randn(3, 8)),
    "NaN": lambda: torch.randn(3, 8).index_fill(1, torch.tensor([2]), NAN),
    "infinity": lambda: torch.randn(3, 8).index_fill(1, torch.tensor([7]), -INF),
    "large": lambda: torch.full((3, 8), 3e19),
}


@pytest.mark.parametrize("otherwise", OTHERWISE)
def test_other_inputs(exact_wins: list[Any], otherwise: str) -> None:
    del exact_wins
    x = torch.randn(3, 8)
    module, fast = on_its_way(x)
    other = OTHERWISE[otherwise]()
    with torch.no_grad():
        if otherwise == "dtype":
            with pytest.raises(RuntimeError, match="dtype"):
                fast(other)
        else:
            same(fast(other), module(other))
    for _ in range(2):
        check(fast, module, x)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values=st.lists(st.floats(width=32), min_size=8, max_size=8), at=st.integers(0, 2))
def test_any_values_are_answered_as_without_it(
    exact_wins: list[Any], values: list[float], at: int
) -> None:
    del exact_wins
    _, fast = _pair()
    x = torch.randn(3, 8)
    x[at] = torch.tensor(values)
    road = laying(fast).shortcut.road
    with torch.inference_mode():
        one, other = fast(x), road((x,), {})
    np.testing.assert_array_equal(one.numpy(), other.numpy())


_pairs: list[tuple[nn.Module, nn.Module]] = []


def _pair() -> tuple[nn.Module, nn.Module]:
    if not _pairs:
        _pairs.append(on_its_way(torch.randn(3, 8)))
    return _pairs[0]


# --- what becomes of outputs, slots and exceptions --------------------------------------------


def test_outputs_belong_to_the_caller(exact_wins: list[Any]) -> None:
    del exact_wins
    x = torch.randn(3, 8)
    module, fast = on_its_way(x)
    with torch.inference_mode():
        first = fast(x)
        kept = first.clone()
        second = fast(torch.randn(3, 8))
        assert torch.equal(first, kept)
        second.mul_(0)
        same(fast(x), kept)
    with torch.no_grad():
        for _ in range(3):
            y = fast(x)
    assert not y.is_inference()
    y += 1
    del fast
    gc.collect()
    same(y - 1, module(x).detach())


def failing(raised: BaseException | None, times: int = 1) -> Callable[[Any], Callable[..., Any]]:
    """Stands in for an `infer`: some calls raise, or do nothing where there is nothing to raise."""

    def instead_of(infer: Any) -> Callable[..., Any]:
        left = [times]

        def instead(request: Any, *given: Any) -> Any:
            if left[0] > 0:
                left[0] -= 1
                if raised is not None:
                    raise raised
                return {0: np.zeros((3, 4), np.float32)}
            return infer(request, *given)

        return instead

    return instead_of


@contextmanager
def infer_is(fast: nn.Module, instead_of: Callable[[Any], Callable[..., Any]]) -> Iterator[Any]:
    """Inside, the way of this module's calls goes by another `infer`."""
    engine, found = engine_of(fast), laying(fast)
    infer = engine._infer
    engine._infer = instead_of(infer)
    found.lift()
    (plan,) = standing(fast)
    x = torch.randn(3, 8)
    found.lay(plan, plan.served, (x,))
    engine._infer = infer
    assert found.shortcut.way is not None
    yield engine


def test_an_infer_that_raises(exact_wins: list[Any]) -> None:
    del exact_wins
    x = torch.randn(3, 8)
    module, fast = on_its_way(x)
    with torch.inference_mode(), infer_is(fast, failing(RuntimeError("broken"))) as engine:
        pass
    check(fast, module, x, path="eager", reason="infer-failed")
    assert "broken" in engine.dead
    check(fast, module, x, path="eager")


def test_an_infer_that_gives_no_output(exact_wins: list[Any]) -> None:
    del exact_wins
    x = torch.randn(3, 8)
    module, fast = on_its_way(x)
    with torch.inference_mode(), infer_is(fast, failing(None, times=2)) as engine:
        pass
    check(fast, module, x, path="eager", reason="infer-failed")
    assert "no output" in engine.dead


def test_an_output_that_looks_like_a_mark(exact_wins: list[Any]) -> None:
    """Once: the second mark is another one."""
    del exact_wins
    x = torch.randn(3, 8)
    module, fast = on_its_way(x)
    with torch.inference_mode(), infer_is(fast, failing(None)):
        pass
    check(fast, module, x)


def test_an_interrupt_is_the_programs(exact_wins: list[Any]) -> None:
    del exact_wins
    x = torch.randn(3, 8)
    module, fast = on_its_way(x)
    with torch.inference_mode(), infer_is(fast, failing(KeyboardInterrupt())) as engine:
        pass
    with pytest.raises(KeyboardInterrupt), torch.inference_mode():
        fast(x)
    assert engine.dead is None
    assert not engine._pool.busy()
    for _ in range(3):
        check(fast, module, x)


def test_a_call_from_within_a_call(exact_wins: list[Any]) -> None:
    """As out of a finalizer, which runs wherever something is freed."""
    del exact_wins
    x, inner = torch.randn(3, 8), list[Any]()
    module, fast = on_its_way(x)

    def instead_of(infer: Any) -> Callable[..., Any]:
        def instead(*given: Any) -> Any:
            if not inner:
                inner.append(None)
                inner[0] = fast(x)
            return infer(*given)

        return instead

    with torch.inference_mode(), infer_is(fast, instead_of):
        pass
    with torch.inference_mode():
        outer = fast(x)
    same(outer, module(x).detach())
    same(inner[0], module(x).detach())
    check(fast, module, x)
    assert not engine_of(fast)._pool.busy()


def test_threads(exact_wins: list[Any]) -> None:
    del exact_wins
    module, fast = on_its_way(torch.randn(3, 8))
    inputs = [torch.randn(3, 8) for _ in range(4)]
    wanted = [module(x).detach() for x in inputs]
    start = threading.Barrier(4)

    def calls(number: int) -> None:
        start.wait(30)
        with torch.inference_mode():
            for _ in range(300):
                same(fast(inputs[number]), wanted[number])

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(calls, number) for number in range(4)]:
            done.result(120)
    assert not engine_of(fast)._pool.busy()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child(exact_wins: list[Any]) -> None:
    del exact_wins
    x = torch.randn(3, 8)
    module, fast = on_its_way(x)
    wanted = module(x).detach()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            with torch.inference_mode():
                for _ in range(3):
                    same(fast(x), wanted)
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    check(fast, module, x)


def test_nothing_is_kept(exact_wins: list[Any]) -> None:
    del exact_wins
    x = torch.randn(3, 8)
    _, fast = on_its_way(x)
    engine, twin = weakref.ref(engine_of(fast)), weakref.ref(fast)
    slot = weakref.ref(engine()._pool.free[0])
    del fast
    gc.collect()
    assert twin() is None
    assert engine() is None
    assert slot() is None


def test_calls_leave_no_references(exact_wins: list[Any]) -> None:
    del exact_wins
    x = torch.randn(3, 8)
    _, fast = on_its_way(x)
    watched = [x, fast, engine_of(fast), x.dtype, torch.Size([3, 8]), laying(fast).shortcut.way]
    with torch.inference_mode():
        fast(x)
        gc.collect()
        objects = len(gc.get_objects())
        before = [sys.getrefcount(each) for each in watched]
        for _ in range(2000):
            fast(x)
            fast(x[:2])  # not its sizes
            fast(x.index_fill(1, torch.tensor([0]), NAN))
        gc.collect()
        after = [sys.getrefcount(each) for each in watched]
        assert all(abs(a - b) <= 3 for a, b in zip(after, before, strict=True)), (before, after)
        assert abs(len(gc.get_objects()) - objects) < 200


def test_what_a_shortcut_takes() -> None:
    made = helper.hot.Shortcut(lambda args, kwargs: (args, kwargs))
    assert made((1,), {"a": 2}) == ((1,), {"a": 2})
    assert made.missed == 1
    with pytest.raises(TypeError, match="a Way, or None"):
        made.way = 3
    with pytest.raises(TypeError, match="a Rest, or None"):
        made.rest = 3
    with pytest.raises(TypeError):
        helper.hot.Way(facts=())
    for wrong in ({"facts": (1,)}, {"facts": ((1, 2, 3),)}, {"questions": (5,)}, {"heads": (3,)}):
        with pytest.raises(TypeError):
            helper.hot.Way(**{**_way(), **wrong})
    with pytest.raises(ValueError, match="1 to 8"):
        helper.hot.Way(**{**_way(), "heads": ((0, 9),)})
    with pytest.raises(TypeError):
        made()
    for function in (helper.hot.read_words, helper.hot.same_words):
        with pytest.raises(TypeError):
            function(3)


def test_integers_that_are_not_there() -> None:
    within = helper.hot.all_within
    assert within(0, 0, 1, 2)
    assert not within(0, 5, 1, 2)  # of a tensor whose memory was taken away
    for wrong in ((), (0, 0, 1), ("a", 0, 1, 2), (0, None, 1, 2)):
        with pytest.raises(TypeError):
            within(*wrong)
    with pytest.raises(OverflowError):
        within(0, 0, 0, 2**63)


def test_what_a_rest_takes() -> None:
    for wrong in ({"facts": (1,)}, {"questions": (5,)}, {"sizes": 3}, {"counts": []}, {"name": 3}):
        with pytest.raises(TypeError):
            helper.hot.Rest(**{**_rest(), **wrong})
    with pytest.raises(ValueError, match="a dtype and sizes"):
        helper.hot.Rest(**{**_rest(), "sizes": (((3, 8),),)})
    made = helper.hot.Shortcut(lambda args, kwargs: "the road")
    made.rest = helper.hot.Rest(**_rest())
    assert [made((), {}) for _ in range(3)] == ["at rest", "at rest", "the road"]
    assert made.rest.left == 0
    for args, kwargs in (((1,), {}), ((), {"a": 1}), ([], {}), ((), None)):
        made.rest.left = 1
        assert made(args, kwargs) == "the road"
    made.rest = helper.hot.Rest(**{**_rest(), "glance": lambda args, kwargs: 1 / 0})
    with pytest.raises(ZeroDivisionError):
        made((), {})


def _rest() -> dict[str, Any]:
    """What a Rest takes of which no call has an argument."""
    module = Mlp()
    tuples = dict.fromkeys(("facts", "questions", "dtypes", "counts"), ())
    method = {"module": module, "name": "forward", "function": Mlp.forward}
    answer = {"method": lambda: "at rest", "tensor": torch.Tensor}
    return {"left": 2, "glance": None, "sizes": ((),), **tuples, **method, **answer}


def _way() -> dict[str, Any]:
    """What a Way takes, none of it of use."""
    names = "match holds fits engine pool slot infer as_tensor builder count raised left kept"
    tuples = "facts questions sizes looked_at heads"
    others = {"waiting": [], "slots": 1, "bound": 0, "checked": False, "marks": b""}
    return {**dict.fromkeys(names.split()), **dict.fromkeys(tuples.split(), ()), **others}


# --- while it is being laid -------------------------------------------------------------------


def in_another_thread(work: Callable[[], Any]) -> None:
    """Done, with its modes, while this thread waits in the middle of something."""

    def run() -> None:
        with torch.inference_mode():
            work()

    with ThreadPoolExecutor(1) as pool:
        pool.submit(run).result(60)


def test_plans_that_go_while_a_call_is_under_way(exact_wins: list[Any]) -> None:
    """What torch does not count, only `refresh` tells of."""
    del exact_wins
    x = torch.randn(3, 8)
    module, fast = on_its_way(x)
    engine, laid = engine_of(fast), laying(fast)
    laid.lift()
    infer, others = engine._infer, [1]

    def meanwhile(*given: Any) -> Any:
        if others:
            others.pop()
            fast.last.weight.data.mul_(100)  # type: ignore[operator, union-attr]
            in_another_thread(lambda: fast.ovshim.refresh())  # type: ignore[operator, union-attr]
        return infer(*given)

    engine._infer = meanwhile
    with torch.inference_mode():
        fast(x)
    assert not others
    assert laid.shortcut.way is None
    for _ in range(4):
        check(fast, module, x, path=None)


@pytest.mark.parametrize("step", ["_waits", "_is_usual", "_inference"])
def test_a_slot_that_another_thread_takes_meanwhile(
    monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    one, three = torch.randn(1, 8), torch.randn(3, 8)
    module = make(Mlp)
    fast = ovshim.accelerate(module, three, cache_dir=None, prefer="openvino", threads=2)
    for x in (one, three, one):
        check(fast, module, x)
    engine, laid = engine_of(fast), laying(fast)
    engine.rival = None
    original, others = getattr(shortcut, step), [1]

    def meanwhile(*given: Any) -> Any:
        found = original(*given)
        if others:
            others.pop()
            in_another_thread(lambda: laid.shortcut.road((three,), {}))
        return found

    monkeypatch.setattr(shortcut, step, meanwhile)
    laid.lift()
    with torch.inference_mode():
        same(fast(one), module(one))
    assert not others
    wrong = one.index_fill(1, torch.tensor([3]), NAN)
    for x in (one, wrong, three, one):
        check(fast, module, x, path=None)


def test_a_handler_that_raises_while_a_way_is_laid(
    exact_wins: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a signal: it comes out of whatever line is reached."""
    del exact_wins
    x = torch.randn(3, 8)
    module, fast = on_its_way(x)

    def late(number: int, frame: Any) -> None:
        raise TimeoutError("of the program's own")

    def raising(*given: Any) -> Any:
        signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGINT, late)
    try:
        monkeypatch.setattr(shortcut, "way_of", raising)
        laying(fast).lift()
        with pytest.raises(TimeoutError), torch.inference_mode():
            fast(x)
    finally:
        signal.signal(signal.SIGINT, before)
    monkeypatch.undo()
    for _ in range(3):
        check(fast, module, x)


def test_a_race_in_which_no_way_answers(exact_wins: list[Any]) -> None:
    x = torch.randn(3, 8)
    _, fast = on_its_way(x)
    del exact_wins
    (plan,) = standing(fast)
    asked: list[int] = []
    with torch.inference_mode():
        call = shortcut.raced(plan, (x,), {}, lambda: asked.append(1))
        assert call() is not None  # by the way
        assert not asked
        engine_of(fast).rival = object()  # it answers no more
        call()
        engine_of(fast).rival = None
    assert asked


def test_a_call_from_where_a_failure_is_told(exact_wins: list[Any]) -> None:
    del exact_wins
    x, inner = torch.randn(3, 8), list[Any]()
    module, fast = on_its_way(x)

    class BrokenError(RuntimeError):
        __module__ = "openvino"

        def __str__(self) -> str:
            if not inner:
                inner.append(None)
                inner[0] = fast(x)
            return "broken"

    with torch.inference_mode(), infer_is(fast, failing(BrokenError())):
        pass
    with torch.inference_mode():
        same(fast(x), module(x))
    same(inner[0], module(x).detach())


def test_counts_that_begin_anew(exact_wins: list[Any]) -> None:
    del exact_wins
    x = torch.randn(3, 8)
    module, fast = on_its_way(x)
    fast.ovshim.reset_stats()  # type: ignore[operator, union-attr]
    for _ in range(5):
        check(fast, module, x)
    assert counts(fast)["openvino"] == 5


def test_an_interrupt_in_a_modules_own_code(exact_wins: list[Any]) -> None:
    del exact_wins
    x = torch.randn(3, 8)
    _, fast = on_its_way(x)

    class Interrupted(type(fast)):  # type: ignore[misc]
        @property
        def training(self) -> bool:
            raise KeyboardInterrupt

    held = fast.__dict__.pop("training")
    cls, fast.__class__ = fast.__class__, Interrupted
    with pytest.raises(KeyboardInterrupt), torch.inference_mode():
        fast(x)
    fast.__class__ = cls
    fast.__dict__["training"] = held


def test_a_mode_sees_what_it_sees_without_it(exact_wins: list[Any]) -> None:
    del exact_wins
    x = torch.randn(3, 8)
    module, fast = on_its_way(x)

    with torch.no_grad(), Seen() as without:
        module(x)
    with torch.no_grad(), Seen() as with_it:
        fast(x)
    assert with_it.names == without.names
    with torch.device("cpu"):
        for _ in range(3):
            check(fast, module, x)


# --- without it -------------------------------------------------------------------------------


def test_without_the_helper_python_does_it(exact_wins: list[Any], by_python: list[int]) -> None:
    del exact_wins
    x = torch.randn(3, 8)
    module, fast = on_its_way(x)
    by_the_road(fast)
    by_python.clear()
    for _ in range(3):
        check(fast, module, torch.randn(3, 8))
    assert len(by_python) == 3


@pytest.mark.slow
@pytest.mark.parametrize("file", ["hot_path", "mutations", "threads_and_processes", "infer"])
def test_the_suite_without_it(file: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", f"tests/test_{file}.py"]
    environment = {**os.environ, "OVSHIM_HELPER": "0"}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=900)


def test_a_process_that_leaves_it_out() -> None:
    script = (
        "import torch, ovshim; from ovshim import helper; assert helper.hot is None\n"
        "m = torch.nn.Linear(8, 4).eval(); x = torch.randn(3, 8)\n"
        "fast = ovshim.accelerate(m, x, prefer='openvino', cache_dir=False)\n"
        "with torch.inference_mode():\n"
        "    for _ in range(3): torch.testing.assert_close(fast(x), m(x))\n"
        "assert fast.ovshim.stats()['openvino'] == 3\n"
    )
    environment = {**os.environ, "OVSHIM_HELPER": "0"}
    subprocess.run([sys.executable, "-c", script], env=environment, check=True, timeout=120)
