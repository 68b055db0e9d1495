"""Sizes that keep coming: a graph for them alone, where it is faster, and never a wrong answer."""

import gc
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from checks import check, check_alone, run_python, standing
from modules import Mlp, make
from torch import nn

import ovshim
from ovshim import blobs, rival, runtime
from ovshim.deferred import later
from ovshim.infer import SpecialValuesError


class Compiled:
    """The sizes for which alone graphs are compiled; what is done to these."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sizes: list[Any] = []
        self.spoil: Callable[[], Any] | None = None
        compile_model = runtime.compile_model

        def compiling(source: Path, device: str, settings: Any, sizes: Any = None) -> Any:
            if sizes is None:
                return compile_model(source, device, settings)
            self.sizes.append([tuple(size) for size in sizes])
            if self.spoil is not None:
                return self.spoil()
            return compile_model(source, device, settings, sizes)

        monkeypatch.setattr(runtime, "compile_model", compiling)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Compiled:
    """No graph is too small or too fast for this, and the rival wins."""
    monkeypatch.setattr(rival, "_CALLS", 3)
    monkeypatch.setattr(rival, "_TIMES", 0)
    monkeypatch.setattr(rival, "_won", lambda finish: True)
    monkeypatch.setattr(rival.Finish, "decided", True)
    monkeypatch.setattr(blobs, "_LEAST_BYTES", 0)
    # Nor is it found out otherwise how so small a graph is best run.
    monkeypatch.setattr("ovshim.tiny._TINY_BYTES", -1)
    return Compiled(monkeypatch)


def accelerate(module: nn.Module, directory: Any = None, **options: Any) -> Any:
    options = {"prefer": "openvino", **options}
    return ovshim.accelerate(module, torch.randn(3, 8), cache_dir=directory, **options)


def plan_of(fast: nn.Module) -> Any:
    (plan,) = standing(fast)
    return plan


def settle(fast: Any, module: nn.Module, rows: int = 3, calls: int = 40) -> int:
    """Call until it is settled who serves; how many calls that took."""
    engine = plan_of(fast).served.engine
    for n in range(calls):
        if engine.rival is None:
            written = threading.Event()
            later(written.set)  # after the notes
            assert written.wait(10)
            return n
        check(fast, module, torch.randn(rows, 8))
        fast.ovshim.wait()
    raise AssertionError("it is not settled")


def test_sizes_that_keep_coming_have_a_graph_of_their_own(
    compiled: Compiled, tmp_path: Path
) -> None:
    module = make(Mlp)
    calls = []
    for cache in ("miss", "hit"):
        fast = accelerate(module, tmp_path)
        plan = plan_of(fast)
        assert (plan.cache, compiled.sizes) == (cache, [])
        calls.append(settle(fast, module, rows=5))  # not the example's
        assert compiled.sizes.pop() == [(5, 8)]
        assert plan.way == "usual, exact sizes"
        check_alone(fast, module, plan.served.engine.exact, rows=5)
    # What is known from the first time is not raced again.
    assert calls[1] < calls[0] - rival._PAIRS


def test_what_few_calls_do_not_tell_more_do(
    compiled: Compiled, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rival.Finish, "decided", False)
    module = make(Mlp)
    calls = []
    for seconds in (60.0, 0.0):  # what they may take together
        monkeypatch.setattr(rival, "_SECONDS", seconds)
        fast = accelerate(module)
        calls.append(settle(fast, module, calls=100))
        assert plan_of(fast).served.engine.exact is not None
    more = 2 * (rival._MOST_PAIRS - rival._PAIRS)
    assert abs(calls[0] - calls[1] - more) <= 1


def test_one_that_loses_is_not_tried_again(
    compiled: Compiled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rival, "_won", lambda finish: False)
    module = make(Mlp)
    for tried in ([[(3, 8)]], []):
        fast = accelerate(module, tmp_path)
        settle(fast, module)
        assert compiled.sizes == tried
        compiled.sizes.clear()
        assert plan_of(fast).served.engine.exact is None
        assert plan_of(fast).way is None or "exact" not in plan_of(fast).way
        check(fast, module, torch.randn(3, 8))


@pytest.mark.slow
@pytest.mark.parametrize("wins", [True, False])
def test_plans_of_both_grad_modes_have_one(
    compiled: Compiled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wins: bool
) -> None:
    monkeypatch.setattr(rival, "_won", lambda finish: wins)
    module = make(Mlp)
    fast = accelerate(module, tmp_path)
    settle(fast, module)
    for _ in range(20):
        check(fast, module, torch.randn(3, 8), path=None, under=torch.enable_grad)
    one, other = (plan.served.engine for plan in standing(fast))
    assert one is other
    assert one.rival is None
    assert (one.exact is not None) is wins
    assert compiled.sizes == [[(3, 8)]]


def test_one_that_cannot_be_compiled_or_is_wrong_does_not_serve(compiled: Compiled) -> None:
    def fails() -> Any:
        raise RuntimeError("no graph for these")

    def halved() -> Any:
        import openvino as ov

        model = runtime.core().read_model(str(plan_of(fast).graph.source))
        model.reshape({0: ov.PartialShape([3, 8])})
        result = model.get_results()[0]
        half = ov.opset15.multiply(result.input_value(0), ov.opset15.constant(0.5))
        result.input(0).replace_source_output(half.output(0))
        return runtime.core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

    for compiled.spoil in (fails, halved):
        module = make(Mlp)
        fast = accelerate(module)
        settle(fast, module)
        assert compiled.sizes.pop() == [(3, 8)]
        assert plan_of(fast).served.engine.exact is None
        check(fast, module, torch.randn(3, 8))


def test_one_that_another_thread_has_found_wrong_does_not_serve(
    compiled: Compiled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = make(Mlp)
    settle(accelerate(module, tmp_path), module)
    fast = accelerate(module, tmp_path)
    engine = plan_of(fast).served.engine
    check(fast, module, torch.randn(2, 8))  # not the example, whose answer would be at hand
    mine, compare = engine.rival, rival.compare

    def meanwhile(*args: Any) -> None:
        compare(*args)
        if mine._alike == rival._COMPARED - 1:
            mine._withdraw(engine)

    monkeypatch.setattr(rival, "compare", meanwhile)
    settle(fast, module)
    assert engine.exact is None
    check(fast, module, torch.randn(3, 8))


def test_what_is_looked_at_since_is_looked_at_there_too(compiled: Compiled) -> None:
    module = make(Mlp)
    fast = accelerate(module)
    engine = plan_of(fast).served.engine
    engine.checked = frozenset()
    while engine.rival._candidate is None:
        engine.run([torch.randn(3, 8)])
        fast.ovshim.wait()
    engine.check([0])
    for _ in range(8):
        with pytest.raises(SpecialValuesError):
            engine.run([torch.full((3, 8), float("nan"))])
        engine.run([torch.randn(3, 8)])


def test_the_open_one_rests_until_it_is_needed(
    compiled: Compiled, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = make(Mlp)
    fast = accelerate(module)
    settle(fast, module)
    engine = plan_of(fast).served.engine
    assert engine._compiled is None
    check(fast, module, torch.randn(3, 8))
    assert engine._compiled is None
    check(fast, module, torch.randn(2, 8))
    assert engine._compiled is not None

    fast = accelerate(module)
    settle(fast, module)

    def fails(*_: Any) -> Any:
        raise RuntimeError("no memory")

    monkeypatch.setattr(blobs, "compiled", fails)
    with pytest.warns(ovshim.FallbackWarning, match="no memory"):
        check(fast, module, torch.randn(2, 8), path="eager", reason="infer-failed")
    check(fast, module, torch.randn(3, 8), path="eager", reason="infer-failed")


def test_sizes_that_do_not_stay_are_let_be(
    compiled: Compiled, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rival, "_MOST_CALLS", 20)
    module = make(Mlp)
    fast = accelerate(module)
    for n in range(20):
        assert plan_of(fast).served.engine.rival is not None
        check(fast, module, torch.randn(2 + n % 3, 8))
    assert plan_of(fast).served.engine.rival is None
    assert compiled.sizes == []


def test_from_many_threads(compiled: Compiled) -> None:
    module = make(Mlp)
    fast = accelerate(module)
    xs = [torch.randn(rows, 8) for rows in (3, 3, 3, 5)]
    with torch.inference_mode():
        expected = [module(x) for x in xs]

        def calls(n: int) -> bool:
            with torch.inference_mode():
                return all(
                    torch.allclose(fast(x), y, atol=1e-5)
                    for _ in range(100)
                    for x, y in zip(xs[n:] + xs, expected[n:] + expected, strict=True)
                )

        with ThreadPoolExecutor(4) as threads:
            assert all(threads.map(calls, range(4)))
    assert ovshim.explain(fast).to_dict()["calls"]["eager"] == 0
    settle(fast, module)
    assert plan_of(fast).served.engine.exact is not None


@pytest.mark.parametrize(
    "options",
    [
        {"hint": "throughput"},
        {"memory": "lean", "inplace": True},
        {"dynamic_batch": False},
        {"precision": {"default": "fp32"}},
    ],
    ids=str,
)
def test_where_there_is_none(compiled: Compiled, options: dict[str, Any]) -> None:
    fast = accelerate(make(Mlp), **options)
    assert plan_of(fast).served.engine.rival is None


def test_an_engine_goes_with_its_module(compiled: Compiled) -> None:
    module = make(Mlp)
    fast = accelerate(module)
    settle(fast, module)
    plan = plan_of(fast)
    engines = [weakref.ref(plan.served.engine), weakref.ref(plan.served.engine.exact)]
    del plan
    fast.ovshim.refresh()
    gc.collect()
    assert [engine() for engine in engines] == [None, None]


_FORK = """
import os, torch, ovshim
from modules import Mlp, make
from ovshim import rival
rival._CALLS, rival._TIMES = 3, 0
module = make(Mlp)
fast = ovshim.accelerate(module, torch.randn(3, 8), prefer="openvino", cache_dir=False)
x = torch.randn(3, 8)
with torch.inference_mode():
    expected = module(x)  # in a child torch itself may hang: its threads are not there
    for n in range(60):
        if n in (4, 8, 30, 55):
            pid = os.fork()
            if not pid:
                right = [torch.allclose(fast(x), expected, atol=1e-5) for _ in range(60)]
                os._exit(not all(right))
            assert os.waitpid(pid, 0)[1] == 0
        assert torch.allclose(fast(x), expected, atol=1e-5)
print("right")
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="there is no fork here")
def test_forks_at_any_time() -> None:
    assert run_python(_FORK) == "right\n"
