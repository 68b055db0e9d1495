"""What signal handlers of the program raise ends the call that they come upon,
and cuts no import short."""

import faulthandler
import functools
import gc
import importlib
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checks import check, eager_reasons, plans, run_python, standing
from modules import Mlp, make

import ovshim
from ovshim.conditions import Conditions
from ovshim.imports import apart, import_apart
from ovshim.signals import heard, let_through, let_through_inference, raise_heard
from ovshim.special_mode import outside_inference, without_grad

# There is one on every system.
SIGNAL = signal.SIGTERM


class TooLateError(Exception):
    pass


def too_late(number: int, frame: Any) -> None:
    raise TooLateError


@pytest.fixture(autouse=True)
def handler() -> Iterator[None]:
    before = signal.signal(SIGNAL, too_late)
    yield
    assert signal.getsignal(SIGNAL) is too_late  # the program's own again
    signal.signal(SIGNAL, before)


def signal_in(monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    """Have the signal come once, when that function is called."""
    module, _, name = place.rpartition(".")
    owner = importlib.import_module(module)
    original, left = getattr(owner, name), iter((1,))

    def function(*args: Any, **kwargs: Any) -> Any:
        if next(left, 0):
            signal.raise_signal(SIGNAL)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, function)


@pytest.mark.parametrize(
    "place",
    [
        "ovshim.trial.look",
        "ovshim.build.fingerprint",
        "ovshim.capture.frontend.convert",
        "ovshim.proof.prove_values",
        "ovshim.runtime.compile_model",
    ],
)
def test_what_a_handler_raises_ends_the_first_call(
    place: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    module, x = make(Mlp), torch.randn(3, 8)
    fast = ovshim.accelerate(module, prefer="openvino", cache_dir=tmp_path)
    signal_in(monkeypatch, place)
    with torch.inference_mode(), pytest.raises(TooLateError):
        fast(x)
    assert not plans(fast)
    with torch.inference_mode():
        fast(x)
    check(fast, module, x)
    assert set(eager_reasons(fast)) == {"building"}


def test_an_entry_is_not_to_blame(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module, x = make(Mlp), torch.randn(3, 8)
    ovshim.accelerate(module, x, prefer="openvino", cache_dir=tmp_path)
    signal_in(monkeypatch, "ovshim.hit.served_by")
    with pytest.raises(TooLateError):
        ovshim.accelerate(module, x, prefer="openvino", cache_dir=tmp_path)
    fast = ovshim.accelerate(module, x, prefer="openvino", cache_dir=tmp_path)
    assert plans(fast)[0]["cache"] == "hit"
    check(fast, module, x)


def test_a_handler_that_returns_is_none_the_wiser(tmp_path: Path) -> None:
    seen: list[int] = []
    signal.signal(SIGNAL, lambda number, frame: seen.append(number))
    with heard():
        signal.raise_signal(SIGNAL)
        raise_heard()
    assert seen == [SIGNAL]
    signal.signal(SIGNAL, too_late)


def test_a_handler_that_is_installed_meanwhile_stays() -> None:
    def other(number: int, frame: Any) -> None: ...

    with heard():
        signal.signal(SIGNAL, other)
    assert signal.getsignal(SIGNAL) is other
    signal.signal(SIGNAL, too_late)


def test_what_the_system_calls_stays(tmp_path: Path) -> None:
    told = list[int]()
    signal.signal(SIGNAL, lambda number, frame: told.append(number))
    with (tmp_path / "dump").open("w+") as dump:
        faulthandler.register(SIGNAL, dump, chain=True)
        try:
            with heard():
                signal.raise_signal(SIGNAL)
            signal.raise_signal(SIGNAL)
        finally:
            faulthandler.unregister(SIGNAL)
            signal.signal(SIGNAL, too_late)
        dump.seek(0)
        assert dump.read().count("test_what_the_system_calls_stays") == 2
    assert told == [SIGNAL] * 2


def test_it_is_the_first_that_counts() -> None:
    caught: list[Exception] = []

    def swallow() -> None:
        with heard():
            for _ in range(2):
                try:
                    signal.raise_signal(SIGNAL)
                except TooLateError as error:
                    caught.append(error)

    with pytest.raises(TooLateError) as raised:
        swallow()
    assert raised.value is caught[0]


class TooLateRuntimeError(RuntimeError):
    """Of a kind that OpenVINO's own failures are."""


class Handlers:
    def method(self, number: int, frame: Any) -> None:
        raise TooLateError

    __call__ = method


FORMS = [too_late, Handlers().method, Handlers(), functools.partial(Handlers().method)]


@pytest.mark.parametrize("form", FORMS)
def test_it_is_told_from_other_exceptions(form: Any) -> None:
    signal.signal(SIGNAL, form)
    with pytest.raises(TooLateError) as raised:
        signal.raise_signal(SIGNAL)
    with pytest.raises(TooLateError):
        let_through(raised.value)
    let_through(TooLateError())
    try:
        int("no number")
    except ValueError as error:
        let_through(error)
    signal.signal(SIGNAL, too_late)


def once(number: int, frame: Any) -> None:
    signal.signal(number, too_late)
    raise TooLateError


def once_of_any(*given: Any) -> None:
    once(*given)


@pytest.mark.parametrize("form", [once, once_of_any, lambda number, frame: once(number, frame)])
def test_a_handler_that_takes_itself_out_is_told_too(form: Any) -> None:
    signal.signal(SIGNAL, form)
    with pytest.raises(TooLateError) as raised:
        signal.raise_signal(SIGNAL)
    assert signal.getsignal(SIGNAL) is too_late
    with pytest.raises(TooLateError):
        let_through(raised.value)


def test_an_inference_raises_nothing_of_the_programs() -> None:
    for kind in (RuntimeError, ValueError, torch.OutOfMemoryError):
        let_through_inference(kind())
    for kind in (TooLateError, TooLateRuntimeError, TimeoutError):
        with pytest.raises(kind):
            let_through_inference(kind())


def test_within_a_build_the_noted_one_is_let_through() -> None:
    def inferred() -> None:
        with heard():
            with pytest.raises(TooLateError) as raised:
                signal.raise_signal(SIGNAL)
            let_through(raised.value)
            pytest.fail("it was taken for an engine's")

    with pytest.raises(TooLateError):
        inferred()


@pytest.mark.parametrize("threads", [None, 1])
def test_an_inference_that_it_comes_upon_ends_no_graph(
    threads: int | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    module, x = make(Mlp), torch.randn(3, 8)
    fast = ovshim.accelerate(module, x, prefer="openvino", cache_dir=tmp_path, threads=threads)
    (plan,) = standing(fast)
    left = iter((1,))
    with monkeypatch.context() as patch, torch.inference_mode():
        for engine in filter(None, (plan.served.engine, plan.served.engine.exact)):

            def interrupted(*args: Any, infer: Any = engine._infer) -> Any:
                if next(left, 0):
                    signal.raise_signal(SIGNAL)
                return infer(*args)

            patch.setattr(engine, "_infer", interrupted)
        with pytest.raises(TooLateError):
            fast(torch.randn(3, 8))
    check(fast, module, x)
    assert not eager_reasons(fast)


WAYS: dict[str, Callable[[Any], Any]] = {
    "plain": lambda fast: fast(torch.randn(3, 8)),
    "both answer": lambda fast: fast(torch.randn(40, 8)),
    "map": lambda fast: list(fast.ovshim.map([torch.randn(3, 8)])),
    "submit": lambda fast: fast.ovshim.submit(torch.randn(3, 8)).result(),
    "a batch": lambda fast: ovshim.serve.Batcher(fast, max_batch=4)(torch.randn(1, 8)),
}


@pytest.mark.parametrize("way", WAYS)
def test_it_comes_out_of_every_way_to_be_answered(
    way: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def late(number: int, frame: Any) -> None:
        raise TooLateRuntimeError

    module, x = make(Mlp), torch.randn(3, 8)
    fast = ovshim.accelerate(module, x, prefer="openvino", cache_dir=tmp_path)
    (plan,) = standing(fast)
    with torch.inference_mode():
        for _ in range(20):
            fast.ovshim.submit(x).result()  # known to be quick: answered in this thread
    left = iter((1,))
    with monkeypatch.context() as patch, torch.inference_mode():
        for engine in filter(None, (plan.served.engine, plan.served.engine.exact)):

            def interrupted(*args: Any, infer: Any = engine._infer) -> Any:
                found = infer(*args)
                if next(left, 0):
                    signal.raise_signal(SIGNAL)
                return found

            patch.setattr(engine, "_infer", interrupted)
        signal.signal(SIGNAL, late)
        with pytest.raises(TooLateRuntimeError):
            WAYS[way](fast)
        signal.signal(SIGNAL, too_late)
    check(fast, module, x)
    assert "infer-failed" not in eager_reasons(fast)


def test_what_is_let_through_is_freed_with_its_frames() -> None:
    class Big:
        pass

    def held() -> Any:
        big = Big()
        try:
            signal.raise_signal(SIGNAL)
        except TooLateError as error:
            let_through(error)
        return big

    gc.collect()
    gc.disable()
    try:
        with pytest.raises(TooLateError):
            held()
        assert not [one for one in gc.get_objects() if type(one) is Big]
    finally:
        gc.enable()


def test_a_handler_that_raises_within_a_question_is_no_answer() -> None:
    conditions = Conditions(Exception)
    conditions.add("{0}()", functools.partial(signal.raise_signal, SIGNAL))
    with pytest.raises(TooLateError):
        conditions.compiled()()
    conditions = Conditions(Exception)
    conditions.add("{0} / 0", 1)
    assert not conditions.compiled()()


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="there are no such timers")
@pytest.mark.parametrize("change", [outside_inference, without_grad])
@pytest.mark.parametrize("grad", [True, False])
def test_a_mode_of_a_moment_ends_with_it(change: Any, grad: bool) -> None:
    """Wherever in it a handler raises."""
    before, ended = signal.signal(signal.SIGALRM, too_late), 0
    with torch.set_grad_enabled(grad):
        for n in range(600):
            try:
                signal.setitimer(signal.ITIMER_REAL, 1e-4 + n * 1e-7)
                while True:
                    change(int)
            except TooLateError:
                ended += 1
            assert torch.is_grad_enabled() is grad
            assert not torch.is_inference_mode_enabled()
    signal.signal(signal.SIGALRM, before)
    assert ended == 600


# Imports

POSIX = pytest.mark.skipif(sys.platform == "win32", reason="no signal is sent to a thread there")

INTERRUPTED = """
import signal, sys, threading
def interrupted(number, frame):
    raise KeyboardInterrupt
class Strike:
    def find_spec(self, name, path=None, target=None):
        if name == sys.argv[1]:
            sys.meta_path.remove(self)
            signal.pthread_kill(threading.main_thread().ident, signal.SIGTERM)
signal.signal(signal.SIGTERM, interrupted)
import torch, ovshim
from modules import Mlp, make
fast, x = ovshim.accelerate(make(Mlp), prefer="openvino"), torch.randn(3, 8)
sys.meta_path.insert(0, Strike())
with torch.inference_mode():
    try:
        fast(x)
        print("not raised")
    except KeyboardInterrupt:
        print("raised", end=" ")
    compiled = torch.compile(torch.nn.Linear(8, 2), backend="eager")
    print(*compiled(x).shape, end=" ")
    for _ in range(3):
        fast(x)
print(ovshim.explain(fast).to_dict()["calls"]["openvino"])
"""


@POSIX
def test_an_interrupt_leaves_no_package_half_imported() -> None:
    told = run_python(INTERRUPTED, "torch._dynamo.output_graph")
    assert told.split() == ["raised", "3", "2", "2"]


@POSIX
def test_an_import_apart_comes_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "interrupted_here.py").write_text(
        "import signal, threading, time\n"
        f"signal.pthread_kill(threading.main_thread().ident, {int(SIGNAL)})\n"
        "time.sleep(0.1)\n"
        "whole = True\n"
    )
    with pytest.raises(TooLateError):
        import_apart("interrupted_here")
    assert sys.modules.pop("interrupted_here").whole


@POSIX
def test_a_signal_before_the_thread_is_known_to_run() -> None:
    ended = []

    def work() -> None:
        signal.pthread_kill(threading.main_thread().ident or 0, SIGNAL)
        time.sleep(0.01)
        ended.append(True)

    for _ in range(5):
        ended.clear()
        with pytest.raises(TooLateError):
            apart(work)
        assert ended


def test_what_an_import_apart_raises_is_left_to_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "broken_here.py").write_text("raise ValueError\n")
    import_apart("broken_here", "json.decoder")
    assert "broken_here" not in sys.modules


def test_a_package_that_is_being_imported_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the same thread: it would wait for itself."""
    monkeypatch.syspath_prepend(tmp_path)
    package = tmp_path / "beginning_here"
    package.mkdir()
    (package / "inner.py").write_text("")
    (package / "__init__.py").write_text(
        "from ovshim.imports import import_apart\n"
        "import_apart('beginning_here.inner', 'beginning_here')\n"
    )
    __import__("beginning_here")
    for name in ("beginning_here", "beginning_here.inner"):
        sys.modules.pop(name, None)
