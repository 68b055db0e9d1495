"""Signal handlers of the program that raise while a plan is made: the call ends with that."""

import importlib
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checks import check, eager_reasons, plans
from modules import Mlp, make

import ovshim
from ovshim.signals import heard, raise_heard

SIGNAL = signal.SIGUSR1


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
