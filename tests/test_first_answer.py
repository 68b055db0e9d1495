"""Of what the cache has, the first call has eager's answer while OpenVINO compiles, and the next
one goes on with the plan."""

import asyncio
import copy
import gc
import os
import pickle
import subprocess
import sys
import threading
import time
import types
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checks import same
from modules import Scaled
from modules import two_layers as net
from torch import Tensor, nn

import ovshim
from ovshim import blobs, early, planner, runtime, tiny


@pytest.fixture(autouse=True)
def not_tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody finds out how so small a graph is best run, which compiles it too."""
    monkeypatch.setattr(tiny, "_TINY_BYTES", -1)


def pixels(rows: int = 3) -> Tensor:
    return torch.linspace(-1, 1, 64 * rows).reshape(rows, 64)


def accelerated(module: nn.Module, directory: Path, **options: Any) -> Any:
    options = {"prefer": "openvino", **options}
    return ovshim.accelerate(module, cache_dir=directory, **options)


class Gate:
    """Stands before each import of a compiled graph."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached, self.open = threading.Event(), threading.Event()
        importing = runtime.import_model

        def waiting(*given: Any) -> Any:
            self.reached.set()
            assert self.open.wait(60)
            return importing(*given)

        monkeypatch.setattr(runtime, "import_model", waiting)


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache that has the net, compiled, for three rows and others."""
    monkeypatch.setattr(blobs, "_LEAST_BYTES", 0)
    fast = accelerated(net(), tmp_path)
    with torch.inference_mode():
        fast(pixels())
        fast(pixels(5))
    assert fast.ovshim.stats() == {"openvino": 1, "mixed": 0, "eager": 1}
    return tmp_path


@pytest.fixture
def gate(cached: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate(monkeypatch)
    yield gate
    gate.open.set()
    for thread in threading.enumerate():
        if thread.name == "ovshim-compile":
            thread.join(60)


def counts(fast: Any) -> tuple[int, int]:
    stats = fast.ovshim.stats()
    return stats["openvino"], stats["eager"]


def the_plan(fast: Any) -> dict[str, Any]:
    (plan,) = ovshim.explain(fast).to_dict()["plans"]
    return plan  # type: ignore[no-any-return]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_the_first_call_does_not_wait(cached: Path, gate: Gate, mode: Callable[[], Any]) -> None:
    x = pixels()
    if mode is torch.enable_grad:  # what is recorded is another graph, and has another hint
        gate.open.set()
        accelerated(net(), cached)(x)
        gate.open.clear()
    fast = accelerated(net(), cached)
    with mode():
        first = fast(x)
        assert not gate.open.is_set()
        gate.open.set()
        second = fast(x)
        for answer in (first, second):
            same(answer, net()(x))
            assert answer.requires_grad is (mode is torch.enable_grad)
    assert counts(fast) == (1, 1)
    assert ovshim.explain(fast).eager == {"building": 1}
    plan = the_plan(fast)
    assert (plan["path"], plan["cache"]) == ("openvino", "hit")


def test_its_tensors_are_the_callers(cached: Path, gate: Gate) -> None:
    fast, x = accelerated(net(), cached), pixels()
    with torch.no_grad():
        fast(x).fill_(7)
        x.mul_(-3)
        gate.open.set()
        same(fast(x), net()(x))
    assert counts(fast) == (1, 1)
    assert the_plan(fast)["cache"] == "hit"


@pytest.mark.parametrize("how", ["wait", "warm", "submit", "map", "save"])
def test_who_needs_it_goes_on_with_it(cached: Path, gate: Gate, tmp_path: Path, how: str) -> None:
    fast, x = accelerated(net(), cached), pixels()
    with torch.no_grad():
        fast(x)
        gate.open.set()
        if how == "wait":
            assert fast.ovshim.wait()
        elif how == "warm":
            fast.ovshim.warm(x)
        elif how == "save":
            fast.ovshim.save(tmp_path / "saved")
        elif how == "submit":
            same(fast.ovshim.submit(x).result(), net()(x))
        else:
            (answer,) = fast.ovshim.map([x])
            same(answer, net()(x))
        before = counts(fast)
        assert before == (1 if how in ("submit", "map") else 0, 1)
        assert the_plan(fast)["path"] == "openvino"
        same(fast(x), net()(x))
    assert counts(fast) == (before[0] + 1, 1)


def test_reports_make_nothing(cached: Path, gate: Gate) -> None:
    fast = accelerated(net(), cached)
    with torch.no_grad():
        fast(pixels())
        assert counts(fast) == (0, 1)
        assert not ovshim.explain(fast).plans
        gate.open.set()
        with torch.device("meta"):
            assert not fast.ovshim.wait() or not ovshim.explain(fast).plans
        fast(pixels())
    assert counts(fast) == (1, 1)


def test_the_loop_goes_on_meanwhile(cached: Path, gate: Gate) -> None:
    fast = accelerated(net(), cached)

    async def calls() -> Tensor:
        with torch.no_grad():
            await fast.ovshim.acall(pixels())
            asking = asyncio.ensure_future(fast.ovshim.acall(pixels()))
            await asyncio.sleep(0.05)
            gate.open.set()  # who asks has not kept it shut
            answer: Tensor = await asking
            return answer

    same(asyncio.run(calls()), net()(pixels()))


def test_to_wait_takes_no_longer_than_was_said(cached: Path, gate: Gate) -> None:
    fast = accelerated(net(), cached)
    with torch.no_grad():
        fast(pixels())
        assert not fast.ovshim.wait(0.05)
        assert not gate.open.is_set()
        gate.open.set()
        assert fast.ovshim.wait(60)
        fast(pixels())
    assert counts(fast) == (1, 1)


@pytest.mark.parametrize("rows", [1, 5])
def test_the_next_call_may_be_of_other_sizes(cached: Path, gate: Gate, rows: int) -> None:
    fast = accelerated(net(), cached)
    with torch.no_grad():
        fast(pixels())
        gate.open.set()
        same(fast(pixels(rows)), net()(pixels(rows)))
    assert counts(fast) == (1, 1)


def test_the_next_call_may_be_of_another_kind(cached: Path, gate: Gate) -> None:
    fast = accelerated(net(), cached)
    with torch.no_grad():
        fast(pixels())
        gate.open.set()
        same(fast(pixels()[0]), net()(pixels()[0]))
        same(fast(pixels()), net()(pixels()))
    assert ovshim.explain(fast).to_dict()["calls"]["openvino"] == 1


def test_weights_that_change_meanwhile(cached: Path, gate: Gate) -> None:
    fast = accelerated(net(), cached, inplace=True)
    other = net()
    with torch.no_grad():
        fast(pixels())
        for module in (fast, other):
            module[2].bias.add_(1)
        gate.open.set()
        for _ in range(3):
            same(fast(pixels()), other(pixels()))
    again = accelerated(net(), cached)
    with torch.no_grad():  # the entry is what it was
        again(pixels())
        same(again(pixels()), net()(pixels()))
    assert the_plan(again)["cache"] == "hit"


def test_attributes_that_change_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blobs, "_LEAST_BYTES", 0)
    x = torch.randn(3, 8)

    def scaled() -> Any:
        torch.manual_seed(0)
        return accelerated(Scaled().eval(), tmp_path, inplace=True)

    first = scaled()
    with torch.no_grad():
        first(x), first(x)
        fast = scaled()
        before = fast(x)
        fast.k = fast.k * 2
        for _ in range(3):
            same(fast(x), 2 * before)
        again = scaled()
        again(x)
        same(again(x), before)
    assert the_plan(again)["cache"] == "hit"


def test_a_module_in_training_is_none_of_its_business(cached: Path, gate: Gate) -> None:
    fast = accelerated(net(), cached)
    with torch.no_grad():
        fast(pixels())
        fast.train()
        same(fast(pixels()), net()(pixels()))
        fast.eval()
        gate.open.set()
        same(fast(pixels()), net()(pixels()))
    assert counts(fast)[0] == 1


def test_what_computes_something_else_never_serves(
    cached: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = accelerated(net(3.0), tmp_path / "other")
    with torch.no_grad():
        other(pixels())
    wrong = runtime.core().compile_model(
        str(next((tmp_path / "other").glob("v1/*/*/model.xml"))),
        "CPU",
        {"INFERENCE_PRECISION_HINT": "f32"},
    )
    with monkeypatch.context() as patched, torch.no_grad():
        patched.setattr(runtime, "import_model", lambda *given: wrong)
        fast = accelerated(net(), cached)
        for _ in range(3):
            same(fast(pixels()), net()(pixels()))
    assert counts(fast) == (2, 1)
    assert the_plan(fast)["cache"] == "miss"


def test_what_cannot_be_imported_is_compiled(cached: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*given: Any) -> Any:
        raise RuntimeError("another version's")

    monkeypatch.setattr(runtime, "import_model", refuses)
    fast = accelerated(net(), cached)
    with torch.no_grad():
        for _ in range(2):
            same(fast(pixels()), net()(pixels()))
    assert counts(fast) == (1, 1)


def test_many_threads(cached: Path, gate: Gate) -> None:
    fast, answers = accelerated(net(), cached), []
    together = threading.Barrier(8)

    def call() -> None:
        with torch.no_grad():
            together.wait()
            answers.extend(fast(pixels()) for _ in range(4))

    with torch.no_grad():
        fast(pixels())
    threads = [threading.Thread(target=call) for _ in range(8)]
    for thread in threads:
        thread.start()
    gate.open.set()
    for thread in threads:
        thread.join()
    for answer in answers:
        same(answer, net()(pixels()))
    openvino, eager = counts(fast)
    assert openvino > 0
    assert openvino + eager == 33
    assert len(ovshim.explain(fast).plans) == 1


def test_gradients_that_are_wanted_meanwhile(cached: Path) -> None:
    x = pixels(2)  # what the proof of a hit is asked
    for wanted in (True, False):
        fast = accelerated(net().requires_grad_(wanted), cached)
        fast(x), fast(x)
    fast = accelerated(net().requires_grad_(False), cached, inplace=True)
    assert not fast(x).requires_grad
    fast.requires_grad_(True)
    for _ in range(3):
        answer = fast(x)
        assert answer.requires_grad
        same(answer.detach(), net()(x).detach())


class Tagged(nn.Module):
    """Reads what no module holds."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.config = nn.Linear(8, 4), types.SimpleNamespace(k=1.0, tag="a")

    def forward(self, x: Tensor) -> dict[str, Any]:
        return {self.config.tag: self.linear(x) * self.config.k}


@pytest.mark.parametrize(("name", "value"), [("k", 2.0), ("tag", "b")])
def test_what_is_read_elsewhere_changes_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: Any
) -> None:
    monkeypatch.setattr(blobs, "_LEAST_BYTES", 0)
    x = torch.randn(2, 8)

    def changed(fast: Any) -> Any:
        setattr(fast.config, name, value)
        return fast

    with torch.no_grad():
        for module in (Tagged(), changed(Tagged())):
            primed = accelerated(module.eval(), tmp_path)
            primed(x), primed(x)
        fast = accelerated(Tagged().eval(), tmp_path, inplace=True)
        same(fast(x), Tagged()(x))
        changed(fast)
        for _ in range(3):
            same(fast(x), changed(Tagged())(x))
        assert fast.ovshim.stats()["openvino"] > 0
        again = accelerated(Tagged().eval(), tmp_path)
        again(x)
        same(again(x), Tagged()(x))
    assert the_plan(again)["cache"] == "hit"


def test_nothing_of_the_call_is_held(cached: Path, gate: Gate) -> None:
    fast, x = accelerated(net(), cached), pixels()
    with torch.no_grad():
        held = [weakref.ref(x), weakref.ref(answer := fast(x))]
    del x, answer
    gc.collect()
    assert [ref() for ref in held] == [None, None]


def test_an_interrupted_start_holds_up_no_fork(
    cached: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*given: Any) -> Any:
        raise KeyboardInterrupt

    for where in ("_is_still", "_small_call"):
        with monkeypatch.context() as patched:
            patched.setattr(early, where, interrupted)
            with pytest.raises(KeyboardInterrupt):
                ovshim.accelerate(net(), pixels(), cache_dir=cached, threads=2, prefer="openvino")
        for thread in threading.enumerate():
            if thread.name == "ovshim-compile":
                thread.join(60)
                assert not thread.is_alive()


def test_reports_wait_for_no_build(cached: Path, gate: Gate) -> None:
    """Of another thread."""
    fast = accelerated(net(), cached)
    with torch.no_grad():
        fast(pixels())
    other = threading.Thread(target=fast.ovshim.wait)
    fast.forward.dispatcher._planner._lock.acquire()
    try:
        other.start()
        assert counts(fast) == (0, 1)
        gate.open.set()
    finally:
        fast.forward.dispatcher._planner._lock.release()
    other.join(60)
    assert the_plan(fast)["path"] == "openvino"


@pytest.mark.parametrize("how", ["copy", "pickle", "refresh"])
def test_copies_begin_for_themselves(cached: Path, gate: Gate, how: str) -> None:
    fast = accelerated(net(), cached)
    with torch.no_grad():
        fast(pixels())
        if how == "refresh":
            fast.ovshim.refresh()
        else:
            fast = copy.deepcopy(fast) if how == "copy" else pickle.loads(pickle.dumps(fast))
        same(fast(pixels()), net()(pixels()))
        gate.open.set()
        same(fast(pixels()), net()(pixels()))
    assert counts(fast) == (1, 2 if how == "refresh" else 1)


def test_much_is_not_held(cached: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner, "_MOST_HELD", 100)
    fast = accelerated(net(), cached)
    with torch.no_grad():
        fast(pixels())
        assert [plan.path for plan in fast.forward.dispatcher.plans] == ["openvino"]
        fast(pixels())
    assert counts(fast) == (1, 1)


def test_what_the_cache_has_not_is_made_by_the_first_call(cached: Path, tmp_path: Path) -> None:
    fast = accelerated(net(3.0), tmp_path / "other")
    with torch.no_grad():
        fast(pixels())
        assert [plan.path for plan in fast.forward.dispatcher.plans] == ["openvino"]


def test_nobody_waits_in_strict_mode_either(cached: Path, gate: Gate) -> None:
    fast = accelerated(net(), cached, strict=True)
    with torch.no_grad():
        fast(pixels())
        gate.open.set()
        same(fast(pixels()), net()(pixels()))
    assert counts(fast) == (1, 1)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_fork_waits_for_the_compilation(cached: Path, gate: Gate) -> None:
    fast = accelerated(net(), cached)
    with torch.no_grad():
        fast(pixels())
    assert gate.reached.wait(60)
    threading.Timer(0.2, gate.open.set).start()
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)  # torch's own threads are not there
            assert gate.open.is_set()
            with torch.no_grad():
                for _ in range(2):
                    same(fast(pixels()), net()(pixels()))
            os._exit(0 if counts(fast)[0] > 0 else 2)
        finally:
            os._exit(1)
    deadline = time.monotonic() + 60
    while (ended := os.waitpid(child, os.WNOHANG))[0] == 0 and time.monotonic() < deadline:
        time.sleep(0.05)
    if ended[0] == 0:
        os.kill(child, 9)
        os.waitpid(child, 0)
    assert ended == (child, 0)
    with torch.no_grad():
        same(fast(pixels()), net()(pixels()))
    assert counts(fast) == (1, 1)


_ONCE = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
import torch
from ovshim import blobs
from test_first_answer import accelerated, net, pixels
blobs._LEAST_BYTES = 0
fast = accelerated(net(), Path({cache!r}))
with torch.no_grad():
    print(fast(pixels()).sum().item())
"""


def test_a_program_of_one_call_ends_well(cached: Path) -> None:
    code = _ONCE.format(tests=str(Path(__file__).parent), cache=str(cached))
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    expected = net()(pixels()).sum().item()
    assert float(done.stdout) == pytest.approx(expected, rel=1e-4)
    fast = accelerated(net(), cached)
    with torch.no_grad():
        fast(pixels()), fast(pixels())
    assert the_plan(fast)["cache"] == "hit"  # no process has died of it
