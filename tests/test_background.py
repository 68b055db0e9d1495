"""`background=True`: eager answers while another thread builds, and nothing else is different."""

import copy
import gc
import os
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from checks import (
    check,
    counts,
    eager_reasons,
    falls_back,
    paths,
    plans,
    run_python,
    same,
    served,
)
from modules import Branches, Mlp, Scaled, make
from torch import Tensor, nn

import ovshim
from ovshim import background
from ovshim import build as build_module
from ovshim.bound import Original
from ovshim.building import own_modes
from ovshim.capture.hush import hushed
from ovshim.job import Job


class Gate:
    """Stands before each build."""

    def __init__(self) -> None:
        self.builds: list[tuple[str, int]] = []
        self.reached = threading.Event()
        self.open = threading.Event()

    def pass_through(self, job: Job) -> None:
        self.builds.append((threading.current_thread().name, id(job.module)))
        self.reached.set()
        assert self.open.wait(60)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    """Builds wait until it is opened; after a test it is."""
    real, gate = build_module.build, Gate()

    def build(job: Job) -> Any:
        gate.pass_through(job)
        return real(job)

    monkeypatch.setattr(build_module, "build", build)
    yield gate
    gate.open.set()
    for thread in threading.enumerate():
        if thread.name == "ovshim-build":
            thread.join(60)


def late(module: nn.Module, example: Any = None, **options: Any) -> Any:
    return ovshim.accelerate(module, example, prefer="openvino", background=True, **options)


def ready(fast: Any) -> None:
    assert fast.ovshim.wait(60)


@pytest.mark.parametrize("wrong", ["x", float("nan"), True])
def test_what_is_no_time_is_told(wrong: Any) -> None:
    fast: Any = ovshim.accelerate(make(Mlp))
    with pytest.raises(ovshim.OptionError, match="timeout"):
        fast.ovshim.wait(wrong)
    assert fast.ovshim.wait(-1)  # what is left of a time that is over


def test_the_plan_is_made_meanwhile_and_takes_over(gate: Gate) -> None:
    module, x = make(Mlp), torch.randn(3, 8)
    fast = late(module, x)
    assert gate.reached.wait(30)
    for _ in range(3):
        check(fast, module, x, path="eager", reason="building")
    assert plans(fast) == []
    assert not fast.ovshim.wait(0)
    gate.open.set()
    ready(fast)
    for rows in (3, 5):
        check(fast, module, torch.randn(rows, 8))
    assert gate.builds == [("ovshim-build", id(fast))]


def test_without_an_example_the_first_call_is_it(gate: Gate) -> None:
    module, x = make(Mlp), torch.randn(3, 8)
    fast = late(module)
    ready(fast)
    assert gate.builds == []
    for _ in range(3):
        check(fast, module, x, path="eager", reason="building")
    gate.open.set()
    ready(fast)
    check(fast, module, x)
    assert len(gate.builds) == 1


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A build that an example asks for waits an hour for a first call."""
    monkeypatch.setattr(background, "_FIRST_CALL_SECONDS", 3600.0)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.enable_grad])
def test_a_first_call_that_comes_soon_has_the_processor_alone(
    mode: Any, patient: None, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, begun = Original.__call__, []

    def slow(self: Original, /, *args: Any, **kwargs: Any) -> Any:
        begun.append(gate.reached.wait(0.1))
        return real(self, *args, **kwargs)

    module, x = make(Mlp), torch.randn(3, 8)
    fast = late(module, x)
    with monkeypatch.context() as patch, mode():
        patch.setattr(Original, "__call__", slow)
        same(fast(x), module(x))
    assert begun == [False]
    assert gate.reached.wait(30)
    gate.open.set()
    ready(fast)
    check(fast, module, x)


def test_a_program_may_end_while_a_build_goes_on_that_no_call_has_let_go(
    tmp_path: Path,
) -> None:
    """The thread that builds is waited for, though a daemon has started it."""
    code = """if True:
        import sys, threading, time, torch, ovshim
        net = torch.nn.Sequential(*(torch.nn.Linear(1024, 1024) for _ in range(8))).eval()
        options = {"prefer": "openvino", "cache_dir": sys.argv[1]}
        fast = ovshim.accelerate(net, torch.ones(1, 1024), background=True, **options)
        while not (found := [t for t in threading.enumerate() if t.name == "ovshim-build"]):
            time.sleep(0.001)
        print(found[0].daemon)
    """
    assert run_python(code, str(tmp_path)).split() == ["False"]


def test_a_build_that_is_held_holds_no_other(patient: None, gate: Gate) -> None:
    gate.open.set()
    held, other, x = make(Mlp), make(Mlp), torch.randn(3, 8)
    first, second = late(held, x), late(other, x)
    ready(second)
    check(second, other, x)
    deep = torch.randn(2, 3, 8)
    first.ovshim.warm(deep)  # another kind
    check(first, held, deep)
    assert paths(first) == ["openvino"]


def test_a_first_call_that_fails_is_over_as_well(patient: None, gate: Gate) -> None:
    module, x = make(Mlp), torch.randn(3, 8)
    fast = late(module, x)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), torch.inference_mode():
        fast(torch.randn(3, 9))
    assert gate.reached.wait(30)
    gate.open.set()
    ready(fast)
    check(fast, module, x)


@pytest.mark.parametrize("asked", ["wait", "warm"])
def test_who_waits_for_a_plan_waits_for_no_first_call(
    asked: str, patient: None, gate: Gate
) -> None:
    module, x = make(Mlp), torch.randn(3, 8)
    fast = late(module, x)
    gate.open.set()
    if asked == "wait":
        ready(fast)
    else:
        fast.ovshim.warm(x)
    check(fast, module, x)


def test_many_threads_ask_for_one_build(gate: Gate) -> None:
    module, x = make(Mlp), torch.randn(3, 8)
    fast = late(module)
    together = threading.Barrier(6)

    def work(number: int) -> list[Tensor]:
        together.wait(30)
        with torch.inference_mode():
            return [fast(x) for _ in range(5)]

    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(work, range(6)))
    with torch.inference_mode():
        same(answers, [[module(x)] * 5] * 6)
    assert eager_reasons(fast) == {"building": 30}
    gate.open.set()
    ready(fast)
    assert len(gate.builds) == 1
    check(fast, module, x)


def test_kinds_are_built_one_after_the_other(gate: Gate) -> None:
    module = make(Mlp)
    flat, deep = torch.randn(3, 8), torch.randn(2, 3, 8)
    fast = late(module)
    for x in (flat, deep, flat, deep):
        check(fast, module, x, path="eager", reason="building")
    gate.open.set()
    ready(fast)
    assert len(gate.builds) == 2
    for x in (flat, deep):
        check(fast, module, x)


def test_warm_waits_for_what_is_being_built(gate: Gate) -> None:
    module, x = make(Mlp), torch.randn(3, 8)
    fast = late(module, x)
    assert gate.reached.wait(30)
    gate.open.set()
    fast.ovshim.warm(x, torch.randn(2, 3, 8))
    assert paths(fast) == ["openvino", "openvino"]
    assert len(gate.builds) == 2
    check(fast, module, x)


# What goes wrong


def test_a_reason_is_told_by_the_next_call() -> None:
    module, x = make(Branches), torch.randn(3, 8)
    with falls_back():
        fast = late(module, x)
        ready(fast)
    with falls_back("value-dependent"):
        check(fast, module, x, path="eager", reason="value-dependent")
        check(fast, module, x, path="eager", reason="value-dependent")


def test_strict_raises_at_the_next_call(gate: Gate) -> None:
    module, x = make(Branches), torch.randn(3, 8)
    fast = late(module, x, strict=True)
    check(fast, module, x, path="eager", reason="building")
    gate.open.set()
    ready(fast)
    with pytest.raises(ovshim.FallbackError) as caught, torch.inference_mode():
        fast(x)
    assert caught.value.reason.code == "value-dependent"


def test_a_mistake_in_the_options_raises_at_once() -> None:
    with pytest.raises(ovshim.OptionError, match="no argument"):
        late(make(Mlp), torch.randn(3, 8), dynamic_shapes={"y": {0: "batch"}})
    with pytest.raises(ovshim.OptionError, match="dimensions 0 to 1"):
        late(make(Mlp), torch.randn(3, 8), dynamic_shapes={"x": {5: "batch"}})


def test_an_example_that_the_module_refuses_spoils_no_other_call() -> None:
    module, x = make(Mlp), torch.randn(3, 8)
    fast = late(module, torch.randn(3, 9))
    ready(fast)
    with falls_back("eager-refuses"):
        check(fast, module, x, path="eager", reason="eager-refuses")
    check(fast, module, x, path="eager", reason="building")
    ready(fast)
    check(fast, module, x)


def test_a_call_that_raises_is_no_example(gate: Gate) -> None:
    module, x = make(Mlp), torch.randn(3, 8)
    fast = late(module)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), torch.inference_mode():
        fast(torch.randn(3, 9))
    ready(fast)
    assert gate.builds == []
    check(fast, module, x, path="eager", reason="building")
    gate.open.set()
    ready(fast)
    check(fast, module, x)


def write_weights(module: Any) -> None:
    with torch.no_grad():
        module.linear.bias.add_(1)


def set_attribute(module: Any) -> None:
    module.k = 5.0


@pytest.mark.parametrize("change", [write_weights, set_attribute])
@pytest.mark.parametrize("cached", [False, True])
def test_a_module_that_changes_meanwhile(
    gate: Gate, change: Callable[[Any], None], cached: bool
) -> None:
    """What was begun for the old module does not serve the new one."""
    module, x = make(Scaled), torch.randn(3, 8)
    if cached:
        gate.open.set()
        ovshim.accelerate(module, x, prefer="openvino")
        gate.open.clear()
        gate.reached.clear()
        gate.builds.clear()
    fast = late(module, x, inplace=True)
    assert gate.reached.wait(30)
    change(module)
    other = make(Scaled)
    change(other)
    gate.open.set()
    ready(fast)
    assert len(gate.builds) == 2
    check(fast, other, x)


def test_refresh_while_a_plan_is_built(gate: Gate) -> None:
    module, x = make(Mlp), torch.randn(3, 8)
    fast = late(module, x)
    assert gate.reached.wait(30)
    fast.ovshim.refresh()
    gate.open.set()
    check(fast, module, x, path="eager", reason="building")
    ready(fast)
    assert len(gate.builds) == 2
    assert len(plans(fast)) == 1
    check(fast, module, x)


# The module is in use meanwhile


class Counting(nn.Module):
    """Counts its calls in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 4)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)  # type: ignore[operator]
        return self.linear(x)


def test_looking_at_a_module_counts_for_nothing() -> None:
    module: Any = make(Counting)
    x = torch.randn(3, 8)
    fast = late(module)
    with falls_back("mutates-buffer"), torch.inference_mode():
        fast(x)
        ready(fast)
        assert module.calls.item() == 1
        fast(x)
    assert module.calls.item() == 2
    assert eager_reasons(fast) == {"building": 1, "mutates-buffer": 1}


class Noisy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        try:
            return x + torch.rand_like(x)
        except Exception:  # does not hide that it wants to draw
            return x


def test_looking_at_a_module_draws_no_random_numbers() -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    x = torch.randn(3, 8)
    torch.manual_seed(3)
    fast = late(Noisy().eval(), x)
    ready(fast)
    assert torch.equal(torch.rand(4), expected)
    assert [plan["reason"]["code"] for plan in plans(fast)] == ["random"]


class Attending(nn.Module):
    """Its operator could draw: for the dropout that it has none of."""

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.scaled_dot_product_attention(x, x, x)
        return nn.functional.dropout(y, 0.5, self.training)


def test_dropout_that_is_off_draws_nothing() -> None:
    module, x = Attending().eval(), torch.randn(2, 1, 5, 8)
    fast = late(module, x)
    ready(fast)
    check(fast, module, x)


def test_a_trace_takes_no_numbers_back_that_others_have_drawn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from torch._dynamo.symbolic_convert import InstructionTranslator

    run, drawn = InstructionTranslator.run, []

    def beside_a_thread_that_draws(self: InstructionTranslator) -> None:
        drawing = threading.Thread(target=lambda: drawn.append(torch.rand(2)))
        drawing.start()
        drawing.join()
        run(self)

    monkeypatch.setattr(InstructionTranslator, "run", beside_a_thread_that_draws)
    module, x = make(Mlp), torch.ones(3, 8)
    torch.manual_seed(5)
    expected = torch.rand(20)
    torch.manual_seed(5)
    ovshim.accelerate(module, x, cache_dir=False, prefer="openvino")
    assert drawn
    assert torch.equal(torch.cat([*drawn, torch.rand(2)]), expected[: 2 * len(drawn) + 2])


@pytest.mark.slow
def test_a_thread_that_draws_meanwhile_loses_nothing(gate: Gate) -> None:
    """Neither is its stream set back, nor is the module taken for one that draws."""
    import random

    module, x = make(Mlp), torch.ones(3, 8)
    stop = threading.Event()
    drawn: list[float] = []

    def draw() -> None:
        while not stop.is_set():
            drawn.append(random.random())

    drawing = threading.Thread(target=draw)
    drawing.start()
    gate.open.set()
    try:
        fast = late(module, x)
        ready(fast)
    finally:
        stop.set()
        drawing.join(30)
    assert len(set(drawn)) == len(drawn)
    check(fast, module, x)


class Tabled(nn.Module):
    """Makes a table at its first call."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 4)
        self.table: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.table is None:
            self.table = torch.arange(4.0)
        return self.linear(x) + self.table


def test_a_module_that_settles_at_its_first_call() -> None:
    module, x = make(Tabled), torch.randn(3, 8)
    with falls_back():
        fast = late(module, x)
        ready(fast)
        check(fast, module, x)


class Locked(nn.Module):
    """Cannot be copied."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 4)
        self.lock = threading.Lock()

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def test_what_cannot_be_copied_is_built_by_the_caller(gate: Gate) -> None:
    module, x = make(Locked), torch.randn(3, 8)
    gate.open.set()
    fast = late(module, x)
    ready(fast)
    assert gate.builds == []
    with torch.inference_mode(), served(fast, "eager", "building"):
        same(fast(x), module(x))
    assert gate.builds == [(threading.current_thread().name, id(fast))]
    with torch.inference_mode(), served(fast, "openvino"):
        same(fast(x), module(x))


def test_copies_build_for_themselves(gate: Gate) -> None:
    module, x = make(Mlp), torch.randn(3, 8)
    fast = late(module, x)
    assert gate.reached.wait(30)
    other = copy.deepcopy(fast)
    assert other.ovshim.wait(0)
    gate.open.set()
    for one in (fast, other):
        ready(one)
        if one is other:
            check(one, module, x, path="eager", reason="building")
            ready(one)
        check(one, module, x)


def test_a_module_that_is_gone_is_not_built_for(gate: Gate) -> None:
    first, second = make(Mlp), make(Scaled)
    x = torch.randn(3, 8)
    fast = late(first, x)
    assert gate.reached.wait(30)
    gone = late(second, x)
    reference = weakref.ref(gone)
    del gone
    gc.collect()
    assert reference() is None
    gate.open.set()
    ready(fast)
    check(fast, first, x)
    assert len(gate.builds) == 1


# Warnings are kept back in one thread


def test_only_this_threads_warnings_are_kept_back() -> None:
    inside, done = threading.Event(), threading.Event()
    texts: list[str] = []

    def capture() -> None:
        with hushed() as seen:
            warnings.warn("ours", stacklevel=1)
            inside.set()
            assert done.wait(30)
            warnings.warn("ours too", stacklevel=1)
        texts.extend(seen)

    before = list(warnings.filters)  # type: ignore[attr-defined]
    thread = threading.Thread(target=capture)
    thread.start()
    assert inside.wait(30)
    with pytest.warns(UserWarning, match="theirs"):
        warnings.warn("theirs", stacklevel=1)
    done.set()
    thread.join(30)
    assert texts == ["ours", "ours too"]
    after = [f for f in warnings.filters if f[2].__name__ != "_Nobody"]  # type: ignore[attr-defined]
    assert after == before


def test_what_was_warned_of_before_is_seen_again() -> None:
    def warn() -> None:
        warnings.warn("again", stacklevel=1)

    with warnings.catch_warnings():
        warnings.simplefilter("default")
        with pytest.warns(UserWarning, match="again"):
            warn()
        with hushed() as seen:
            warn()
    assert seen == ["again"]


# Processes

_STARTS = """
import os, sys, threading, torch, ovshim
from modules import Mlp, make
torch.set_num_threads(1)
module, x = make(Mlp), torch.linspace(-1, 1, 24).view(3, 8)
fast = ovshim.accelerate(module, x, prefer="openvino", background=True)
with torch.inference_mode():
    expected = module(x)
    torch.testing.assert_close(fast(x), expected)
"""


@pytest.mark.slow
def test_the_program_may_end_while_a_build_runs() -> None:
    """At each of several moments; with what it prints, and without a word on stderr."""
    for wait in ("0", "0.3", "1"):
        assert run_python(f"{_STARTS}\nfast.ovshim.wait({wait})\nprint('end')") == "end\n"


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_fork_while_a_build_runs() -> None:
    forks = """
children = []
for wait in (0, 0.3, 1):
    fast.ovshim.wait(wait)
    child = os.fork()
    if child == 0:
        with torch.inference_mode():
            for _ in range(2):
                torch.testing.assert_close(fast(x), expected, rtol=1e-4, atol=1e-5)
                assert fast.ovshim.wait(60)
            torch.testing.assert_close(fast(x), expected, rtol=1e-4, atol=1e-5)
        served = ovshim.explain(fast).to_dict()["calls"]["openvino"]
        os._exit(0 if served else 3)
    children.append(child)
print([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children])
assert fast.ovshim.wait(60)
with torch.inference_mode():
    torch.testing.assert_close(fast(x), expected, rtol=1e-4, atol=1e-5)
print(ovshim.explain(fast).to_dict()["calls"]["openvino"] > 0)
"""
    assert run_python(_STARTS + forks) == "[0, 0, 0]\nTrue\n"


def test_counts_are_whole() -> None:
    module, x = make(Mlp), torch.randn(3, 8)
    fast = late(module, x)
    with torch.inference_mode():
        for _ in range(20):
            fast(x)
        ready(fast)
        fast(x)
    assert sum(counts(fast).values()) == 21
    assert counts(fast)["openvino"] >= 1


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_a_build_leaves_the_modes_of_its_thread_as_they_were(grad: bool, inference: bool) -> None:
    def modes() -> tuple[bool, bool]:
        return torch.is_grad_enabled(), torch.is_inference_mode_enabled()

    with torch.inference_mode(inference), torch.set_grad_enabled(not grad):
        before = modes()
        with own_modes(grad):
            assert modes() == (grad, False)
        assert modes() == before
