"""Several threads with one module, several processes with one cache."""

import copy
import json
import multiprocessing
import os
import pickle
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from checks import (
    check,
    counts,
    falls_back,
    plans,
    quietly,
    run_python,
    same,
    settle,
    start_python,
)
from modules import Attention, Branches, Mlp, Towers, make
from torch import Tensor, nn

import ovshim
from ovshim.cache import Store

# Threads


def in_threads(work: Callable[[int], Any], count: int = 6) -> list[Any]:
    """What each of that many threads returned, all let go at once."""
    barrier = threading.Barrier(count)

    def run(number: int) -> Any:
        barrier.wait(30)
        return work(number)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))


@pytest.mark.parametrize("width", [8, 40_000], ids=["small", "large"])
def test_threads_share_one_module(width: int) -> None:
    module = make(Mlp, width)
    fast = ovshim.accelerate(module, torch.randn(3, width), prefer="openvino")
    inputs = [[torch.randn(1 + n % 4, width) for n in range(25)] for _ in range(6)]

    def work(number: int) -> list[Tensor]:
        with torch.inference_mode():
            return [fast(x) for x in inputs[number]]

    answers = in_threads(work)
    with torch.inference_mode():
        same(answers, [[module(x) for x in xs] for xs in inputs])
    assert counts(fast) == {"openvino": 150, "mixed": 0, "eager": 0}


def test_threads_that_call_while_one_builds() -> None:
    module = make(Attention)
    fast = ovshim.accelerate(module, prefer="openvino")
    inputs = [torch.randn(2, 5, 16) for _ in range(6)]

    def work(number: int) -> list[Tensor]:
        with torch.inference_mode():
            return [fast(inputs[number]) for _ in range(10)]

    with falls_back():
        answers = in_threads(work)
    with torch.inference_mode():
        same(answers, [[module(x)] * 10 for x in inputs])
    assert len(plans(fast)) == 1
    assert sum(counts(fast).values()) == 60
    check(fast, module, inputs[0])


@pytest.mark.slow
def test_threads_with_calls_of_their_own_kinds() -> None:
    module = make(Attention)
    fast = ovshim.accelerate(module, prefer="openvino")

    def work(number: int) -> Any:
        generator = torch.Generator().manual_seed(number)
        pairs = []
        for step in range(8):
            x = torch.randn(1 + step % 3, 3 + number % 3, 16, generator=generator)
            mask = torch.ones(x.shape[:2], dtype=torch.bool) if number % 2 else None
            with torch.inference_mode():
                pairs.append((fast(x, mask), module(x, mask)))
        return pairs

    for pairs in in_threads(work):
        for actual, expected in pairs:
            same(actual, expected)
    assert sum(counts(fast).values()) == 48


def test_threads_that_accelerate_the_same_module() -> None:
    module = make(Mlp)
    x = torch.randn(3, 8)
    twins = in_threads(lambda _: ovshim.accelerate(module, x, prefer="openvino"))
    for fast in twins:
        check(fast, module, torch.randn(3, 8))


@pytest.mark.slow
def test_threads_that_accelerate_different_modules() -> None:
    modules = [make(Mlp, outputs=3 + number) for number in range(4)]
    x = torch.randn(3, 8)
    twins = in_threads(lambda number: ovshim.accelerate(modules[number], x, prefer="openvino"), 4)
    for fast, module in zip(twins, modules, strict=True):
        check(fast, module, torch.randn(3, 8))


def test_a_thread_that_draws_random_numbers_meanwhile() -> None:
    """The random state of the process moves, and it is not the module that moves it."""
    module = make(Mlp)
    stop = threading.Event()

    def draw() -> None:
        while not stop.is_set():
            torch.rand(16)

    drawing = threading.Thread(target=draw)
    drawing.start()
    try:
        fast = ovshim.accelerate(module, torch.ones(3, 8), prefer="openvino")
    finally:
        stop.set()
        drawing.join(30)
    check(fast, module, torch.ones(3, 8))


def test_threads_while_weights_change() -> None:
    """Each answer is of the weights before or after, never of neither."""
    module = make(Mlp)
    fast = ovshim.accelerate(module, torch.randn(3, 8), prefer="openvino")
    x = torch.randn(3, 8)
    values = [float(number) for number in range(4)]

    def expected(value: float) -> Tensor:
        other = copy.deepcopy(module)
        with torch.no_grad():
            other.last.bias.fill_(value)
        with torch.inference_mode():
            return other(x)

    with torch.no_grad():
        module.last.bias.fill_(0)
    allowed = [expected(value) for value in values]
    stop = threading.Event()
    wrong: list[Tensor] = []

    def call() -> None:
        with torch.inference_mode():
            while not stop.is_set():
                y = fast(x)
                if not any(torch.allclose(y, one, atol=1e-4) for one in allowed):
                    wrong.append(y)

    callers = [threading.Thread(target=call) for _ in range(3)]
    with quietly():  # a build that meets a change says so
        for caller in callers:
            caller.start()
        for value in values:
            with torch.no_grad():
                module.last.bias.fill_(value)
            time.sleep(0.2)
        stop.set()
        for caller in callers:
            caller.join(30)
        assert not wrong
        fast.ovshim.refresh()  # a verdict met while another thread was writing says nothing now
        settle(fast, module, x)


def test_a_fallback_of_many_threads_warns_once() -> None:
    module = make(Branches)
    inputs = [torch.randn(3, 8) for _ in range(6)]
    fast = ovshim.accelerate(module, prefer="openvino")

    def work(number: int) -> Tensor:
        with torch.inference_mode():
            return fast(inputs[number])

    with falls_back("value-dependent"):
        answers = in_threads(work)
    with torch.inference_mode():
        same(answers, [module(x) for x in inputs])


@pytest.mark.slow
def test_modes_are_each_threads_own() -> None:
    """Grad mode in one thread, inference in another."""
    module = make(Mlp)
    fast = ovshim.accelerate(module, torch.randn(3, 8), prefer="openvino")

    def work(number: int) -> bool:
        for _ in range(20):
            if number % 2:
                with torch.inference_mode():
                    ok = not fast(torch.randn(3, 8)).requires_grad
            else:
                ok = fast(torch.randn(3, 8)).requires_grad
            if not ok:
                return False
        return True

    with falls_back():
        assert all(in_threads(work))
        assert fast(torch.randn(3, 8)).requires_grad
    calls = counts(fast)
    assert calls["openvino"] > 60  # those in grad mode too, once their plan is made
    assert sum(calls.values()) == 121


# Processes that share a cache

_BUILDS = """
import json, os, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
import ovshim
from modules import Attention, make
place = Path(sys.argv[1])
(place / f"ready-{os.getpid()}").touch()
deadline = time.monotonic() + 60
while len(list(place.glob("ready-*"))) < int(sys.argv[2]) and time.monotonic() < deadline:
    time.sleep(0.005)
module = make(Attention)
fast = ovshim.accelerate(module, torch.ones(2, 5, 16), prefer="openvino")
x = torch.linspace(-1, 1, 160).view(2, 5, 16)
with torch.inference_mode():
    torch.testing.assert_close(fast(x), module(x), rtol=1e-4, atol=1e-5)
print(json.dumps(ovshim.explain(fast).to_dict()))
"""


def entries() -> list[Path]:
    """The published entries of the cache."""
    return list(Path(os.environ["OVSHIM_CACHE_DIR"]).rglob("*.xml"))


def test_two_processes_that_start_together_convert_once(tmp_path: Path) -> None:
    processes = [start_python(_BUILDS, str(tmp_path), "2") for _ in range(2)]
    told = []
    for process in processes:
        output, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        told.append(json.loads(output))
    assert [report["calls"]["openvino"] for report in told] == [1, 1]
    assert sorted(report["plans"][0]["cache"] for report in told) == ["hit", "miss"]
    captured = [report for report in told if report["plans"][0]["seconds"].get("capture", 0)]
    assert len(captured) == 1
    assert len(entries()) == 1


def test_the_next_process_hits_the_cache_without_what_capture_needs() -> None:
    script = """
import json, sys, torch, ovshim
from modules import Mlp, make
module = make(Mlp)
fast = ovshim.accelerate(module, torch.ones(3, 8), prefer="openvino")
with torch.inference_mode():
    x = torch.linspace(-1, 1, 40).view(5, 8)
    torch.testing.assert_close(fast(x), module(x), rtol=1e-4, atol=1e-5)
print(json.dumps([ovshim.explain(fast).to_dict(), "torch._dynamo" in sys.modules]))
"""
    (first, _), (second, imported) = (json.loads(run_python(script)) for _ in range(2))
    assert first["plans"][0]["cache"] == "miss"
    assert second["plans"][0]["cache"] == "hit"
    assert second["plans"][0]["cache_path"] == first["plans"][0]["cache_path"]
    assert second["calls"]["openvino"] == 1
    assert second["plans"][0]["seconds"].get("capture", 0) == 0
    assert not imported
    assert len(entries()) == 1


def test_a_builder_that_was_killed_is_no_obstacle(tmp_path: Path) -> None:
    script = _BUILDS.replace(
        "module = make(Attention)",
        "import signal, threading\n"
        "threading.Timer(0.4, os.kill, (os.getpid(), 9)).start()\n"
        "module = make(Attention)",
    )
    process = start_python(script, str(tmp_path), "1")
    process.communicate(timeout=120)
    assert process.returncode != 0
    other = tmp_path / "other"
    other.mkdir()
    told = json.loads(run_python(_BUILDS, str(other), "1"))
    assert told["calls"]["openvino"] == 1
    assert len(entries()) == 1


# A module that goes to another process


def answer_in_child(pickled: bytes, queue: Any) -> None:
    fast = pickle.loads(pickled)
    x = torch.linspace(-1, 1, 24).view(3, 8)
    with torch.inference_mode():
        fast(x)
        y = fast(x)
    queue.put((y.numpy(), ovshim.explain(fast).to_dict()))


def test_a_pickled_module_goes_to_a_spawned_process() -> None:
    module = make(Mlp)
    fast = ovshim.accelerate(module, torch.randn(3, 8), prefer="openvino")
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=answer_in_child, args=(pickle.dumps(fast), queue))
    process.start()
    y, told = queue.get(timeout=120)
    process.join(60)
    assert process.exitcode == 0
    with torch.inference_mode():
        same(torch.from_numpy(y), module(torch.linspace(-1, 1, 24).view(3, 8)))
    assert told["calls"]["openvino"] >= 1
    assert told["plans"][0]["cache"] == "hit"


_FORKS = """
import json, os, sys, torch, ovshim
from modules import Mlp, make
module = make(Mlp)
fast = ovshim.accelerate(module, torch.ones(3, 8), prefer="openvino")
x = torch.linspace(-1, 1, 24).view(3, 8)
with torch.inference_mode():
    expected = module(x)
    torch.testing.assert_close(fast(x), expected, rtol=1e-4, atol=1e-5)
    torch.set_num_threads(1)
    child = os.fork()
    for _ in range(5):
        torch.testing.assert_close(fast(x), expected, rtol=1e-4, atol=1e-5)
    if child == 0:
        sys.exit(0)
_, status = os.waitpid(child, 0)
print(os.waitstatus_to_exitcode(status), ovshim.explain(fast).to_dict()["calls"]["openvino"])
"""


_BUILDS_IN_A_CHILD = """
import gc, os, torch, ovshim
from modules import Mlp, make
x = torch.ones(3, 8)
options = {"prefer": "openvino", "cache_dir": False, "threads": 2}
kept, gone = (ovshim.accelerate(make(Mlp), x, **options) for _ in range(2))
module = make(Mlp)
with torch.inference_mode():
    expected = module(x)
    gone(x)
    del gone
    gc.collect()
    child = os.fork()
    torch.set_num_threads(1)
    if child == 0:
        fast = ovshim.accelerate(module, x, **options)
        torch.testing.assert_close(fast(x), expected, rtol=1e-4, atol=1e-5)
        os._exit(ovshim.explain(fast).to_dict()["calls"]["openvino"])
    _, status = os.waitpid(child, 0)
    torch.testing.assert_close(kept(x), expected, rtol=1e-4, atol=1e-5)
print(os.waitstatus_to_exitcode(status), ovshim.explain(kept).to_dict()["calls"]["openvino"])
"""


def kill_tree(process: subprocess.Popen[str]) -> None:
    """A child that hangs keeps the pipes open, so that the parent's death alone ends nothing."""
    for child in psutil.Process(process.pid).children(recursive=True):
        child.kill()
    process.kill()
    process.communicate()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.parametrize(
    ("script", "printed"),
    [
        pytest.param(_FORKS, ["0", "6"], id="calls"),
        # OpenVINO hands it threads of what the parent has let go of, which are not in the child.
        pytest.param(_BUILDS_IN_A_CHILD, ["1", "1"], id="builds"),
    ],
)
def test_a_forked_process_is_right_and_ends(script: str, printed: list[str]) -> None:
    process = start_python(script)
    try:
        output, errors = process.communicate(timeout=30)
    except subprocess.TimeoutExpired:
        kill_tree(process)
        pytest.fail("the child hangs")
    assert process.returncode == 0, errors
    assert output.split() == printed


def test_workers_of_a_data_loader() -> None:
    """The module inside a dataset that worker processes carry."""
    if sys.platform == "win32":
        context = "spawn"
    else:
        context = "forkserver"
    module = make(Mlp)
    fast = ovshim.accelerate(module, torch.randn(3, 8), prefer="openvino")
    loader = torch.utils.data.DataLoader(
        Embedded(fast), batch_size=2, num_workers=1, multiprocessing_context=context
    )
    answers = torch.cat([batch.clone() for batch in loader])
    with torch.inference_mode():
        same(answers, module(torch.eye(8)[:4]))


class Embedded(torch.utils.data.Dataset[Tensor]):
    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Tensor:
        with torch.no_grad():
            return self.module(torch.eye(8)[index : index + 1])[0]


# Life and death


@pytest.mark.slow
def test_modules_come_and_go() -> None:
    """What a module held is let go with it."""
    import gc
    import weakref

    module = make(Mlp)
    fast = ovshim.accelerate(module, torch.randn(3, 8), prefer="openvino")
    with torch.inference_mode():
        y = fast(torch.randn(3, 8))
    kept = y.clone()
    references = [weakref.ref(fast), weakref.ref(module), weakref.ref(module.first.weight)]
    del fast, module
    gc.collect()
    assert [reference() for reference in references] == [None, None, None]
    same(y, kept, 0.0)


@pytest.mark.slow
def test_a_module_with_methods_in_threads() -> None:
    module = make(Towers)
    fast = ovshim.accelerate(module, methods=["encode_image", "encode_text"], prefer="openvino")
    image, text = torch.randn(2, 8), torch.randn(2, 6)

    def work(number: int) -> list[Tensor]:
        with torch.inference_mode():
            if number % 2:
                return [fast.encode_image(image) for _ in range(10)]
            return [fast.encode_text(text) for _ in range(10)]

    answers = in_threads(work, 4)
    with torch.inference_mode():
        pair = [[module.encode_text(text)] * 10, [module.encode_image(image)] * 10]
    same(answers, pair * 2)


def test_an_interrupted_build_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while the module is being looked at, and then once more without it."""

    class Interrupted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return interrupt(self.linear(x))

    def strike(x: Tensor) -> Tensor:
        raise KeyboardInterrupt

    monkeypatch.setitem(globals(), "interrupt", strike)
    module = make(Interrupted)
    with pytest.raises(KeyboardInterrupt):
        ovshim.accelerate(module, torch.randn(3, 8), prefer="openvino")
    assert entries() == []
    monkeypatch.setitem(globals(), "interrupt", torch.relu)
    fast = ovshim.accelerate(module, torch.randn(3, 8), prefer="openvino")
    check(fast, module, torch.randn(3, 8))


def interrupt(x: Tensor) -> Tensor:
    return x


def test_a_call_does_not_wait_long_for_a_build_of_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, x = make(Mlp), torch.randn(3, 8)
    options: Any = {"prefer": "openvino", "cache_dir": tmp_path}
    (plan,) = plans(ovshim.accelerate(module, x, **options))
    family = Path(plan["cache_path"]).parent.name
    shutil.rmtree(plan["cache_path"])
    monkeypatch.setattr("ovshim.build._PATIENCE_SECONDS", 0.2)
    fast = ovshim.accelerate(module, **options)
    with Store(tmp_path).lock(family, 5) as held, torch.inference_mode():
        assert held
        for _ in range(3):
            same(fast(x), module(x))
    assert ovshim.explain(fast).to_dict()["eager_reasons"] == {"building": 3}
    with torch.inference_mode():
        for _ in range(6):
            same(fast(x), module(x))
    assert counts(fast)["openvino"] > 0
    assert plans(fast)[0]["cache"] == "miss"
