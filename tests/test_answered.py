"""The example's answer, computed for its proof, is the first call's if that is the example's."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checks import same, standing
from torch import Tensor, nn

import ovshim
from ovshim import answered, blobs, tiny
from ovshim.infer import Engine
from ovshim.rival import Rival


class Net(nn.Module):
    """Looks at the sign of zeros, and hands an input through."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(64, 16)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"y": self.last(x), "sign": torch.where(x == 0, 1 / x, 0.0), "x": x}


class Inferences:
    """Counts what OpenVINO is asked: by this thread, for the proof asks in another one, and by
    all."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.here = self.everywhere = 0
        run, thread = Engine._run, threading.get_ident()

        def running(*given: Any) -> list[Tensor]:
            self.here += threading.get_ident() == thread
            self.everywhere += 1
            return run(*given)

        monkeypatch.setattr(Engine, "_run", running)


def example() -> Tensor:
    """Of one row: the proof of a hit takes no more of an open batch."""
    return torch.linspace(-1, 1, 64).reshape(1, 64)


@pytest.fixture
def accelerated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Of a module that the cache has compiled."""
    monkeypatch.setattr(blobs, "_LEAST_BYTES", 0)
    # Nobody finds out how so small a graph is best run, which calls it too.
    monkeypatch.setattr(tiny, "_TINY_BYTES", -1)

    def make(x: Tensor | None = None, **options: Any) -> Any:
        torch.manual_seed(0)
        options = {"prefer": "openvino", **options}
        return ovshim.accelerate(
            Net().eval(), example() if x is None else x, cache_dir=tmp_path, **options
        )

    make()
    return make


@pytest.fixture
def inferences(accelerated: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Inferences:
    return Inferences(monkeypatch)


def eager(x: Tensor) -> dict[str, Tensor]:
    torch.manual_seed(0)
    with torch.no_grad():
        answer: dict[str, Tensor] = Net().eval()(x)
    return answer


def check(fast: Any, x: Tensor, calls: int) -> dict[str, Tensor]:
    """Answered as by eager, and by OpenVINO: it has answered so many calls."""
    with torch.inference_mode():
        answer: dict[str, Tensor] = fast(x)
    same(answer, eager(x))
    assert answer["x"] is x
    assert answer["y"].is_inference()
    assert fast.ovshim.stats()["openvino"] == calls
    return answer


def test_the_first_call_has_it_once(
    accelerated: Callable[..., Any], inferences: Inferences
) -> None:
    fast = accelerated()
    first = check(fast, example(), 1)
    assert inferences.here == 0
    with torch.inference_mode():
        first["y"].fill_(7)
    second = check(fast, example(), 2)
    assert inferences.here == 1
    assert second["y"].data_ptr() != first["y"].data_ptr()


def test_its_tensors_are_of_the_callers_mode(
    accelerated: Callable[..., Any], inferences: Inferences
) -> None:
    with torch.no_grad():
        y = accelerated()(example())["y"]
    assert inferences.here == 0
    assert not y.is_inference()
    weight = torch.ones(16, requires_grad=True)
    (y * weight).sum().backward()
    same(weight.grad, eager(example())["y"].sum(0))


@pytest.mark.parametrize("other", ["values", "sizes", "a negative zero", "written to"])
def test_another_input_is_computed(
    accelerated: Callable[..., Any], inferences: Inferences, other: str
) -> None:
    x = example()
    x[0, 0] = 0.0
    fast = accelerated(x)
    inferences.here = 0
    if other == "values":
        x = x + 1
    elif other == "sizes":
        x = x.repeat(3, 1)
    elif other == "a negative zero":
        x = x.clone()
        x[0, 0] = -0.0
    else:
        x[0, 5] = 3.0
    check(fast, x, 1)
    assert inferences.here == 1


def test_another_input_first_and_it_is_gone(
    accelerated: Callable[..., Any], inferences: Inferences
) -> None:
    fast = accelerated()
    check(fast, example() + 1, 1)
    check(fast, example(), 2)
    assert inferences.here == 2


def test_a_changed_module_does_not_answer_with_it(accelerated: Callable[..., Any]) -> None:
    fast = accelerated()
    with torch.no_grad():
        fast.last.bias.add_(5)
        same(fast(example())["y"], eager(example())["y"] + 5)


def test_nobody_has_it_twice(accelerated: Callable[..., Any], inferences: Inferences) -> None:
    fast = accelerated()
    together, answers = threading.Barrier(8), []

    def call() -> None:
        with torch.no_grad():
            together.wait()
            answers.append(fast(example())["y"])

    threads = [threading.Thread(target=call) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({y.data_ptr() for y in answers}) == 8
    for y in answers:
        same(y, eager(example())["y"])
    assert fast.ovshim.stats()["openvino"] == 8


def test_much_is_not_kept(
    accelerated: Callable[..., Any], inferences: Inferences, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answered, "_MOST_BYTES", 100)
    check(accelerated(), example(), 1)
    assert inferences.here == 1


def test_large_batches_are_computed(
    accelerated: Callable[..., Any], inferences: Inferences
) -> None:
    x = example().repeat(5, 1)
    check(accelerated(x), x, 1)
    assert inferences.here == 1


@pytest.mark.parametrize("way", ["submit", "map"])
def test_who_takes_the_time_of_calls_has_them_computed(
    accelerated: Callable[..., Any], inferences: Inferences, way: str
) -> None:
    fast = accelerated()
    inferences.everywhere = 0
    with torch.no_grad():
        if way == "submit":
            answer = fast.ovshim.submit(example()).result()
        else:
            (answer,) = fast.ovshim.map([example()])
    same(answer, eager(example()))
    assert inferences.everywhere == 1
    assert fast.ovshim.stats()["openvino"] == 1


def test_who_competes_for_the_engine_comes_after_it(accelerated: Callable[..., Any]) -> None:
    fast = accelerated()
    (plan,) = standing(fast)
    engine = plan.served.engine
    assert isinstance(engine.rival, answered._Answered)
    assert fast.ovshim.wait(5)
    check(fast, example(), 1)
    assert isinstance(engine.rival, Rival)
