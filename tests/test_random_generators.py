"""Generators that all threads share: who has drawn, this call or another thread during it."""

import random
import threading
from collections.abc import Callable

import numpy as np
import pytest
import torch
from checks import check, quietly
from modules import Mlp
from torch import Tensor

import ovshim
from ovshim import random_generators
from ovshim.random_generators import GeneratorStates, drawn_by, seeded

DRAWS: dict[str, Callable[[], object]] = {
    "torch": lambda: torch.rand(1),
    "python": random.random,
    "numpy": np.random.rand,
}


def elsewhere(draw: Callable[[], object]) -> None:
    thread = threading.Thread(target=draw)
    thread.start()
    thread.join()


@pytest.fixture(params=list(DRAWS))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_a_call_draws(name: str) -> None:
    assert drawn_by(lambda: DRAWS[name](), set(DRAWS)) == {name}


def test_another_thread_drew_once(name: str) -> None:
    assert drawn_by(lambda: None, {name}) == frozenset()


def test_another_thread_draws_in_every_call(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def draw(_: float = 0.0) -> None:
        elsewhere(DRAWS[name])

    monkeypatch.setattr(random_generators.time, "sleep", draw)
    assert drawn_by(draw, {name}) == frozenset()


@pytest.mark.parametrize("name", ["torch", "python"], indirect=True)
def test_both_draw(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def draw(_: float = 0.0) -> None:
        elsewhere(DRAWS[name])

    def call() -> None:
        DRAWS[name]()
        draw()

    monkeypatch.setattr(random_generators.time, "sleep", draw)
    assert drawn_by(call, {name}) == {name}


@pytest.mark.parametrize(
    ("name", "seed"), [("python", random.seed), ("numpy", np.random.seed)], indirect=["name"]
)
def test_a_call_that_seeds_leaves_other_numbers(name: str, seed: Callable[[int], None]) -> None:
    def call() -> None:
        seed(0)
        DRAWS[name]()

    call()
    assert drawn_by(call, {name}) == {name}


def test_what_is_seeded_is_put_back_and_nothing_else(name: str) -> None:
    before = GeneratorStates()
    with seeded({name}):
        one = [draw() for draw in DRAWS.values()]
    assert before.moved() == set(DRAWS) - {name}
    with seeded({name}):
        other = [draw() for draw in DRAWS.values()]
    assert [a == b for a, b in zip(one, other, strict=True)] == [known == name for known in DRAWS]


class Disturbed(Mlp):
    """Another thread draws while it is called for the first time."""

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling() and DISTURBING:
            elsewhere(DISTURBING.pop())
        return super().forward(x)


DISTURBING: list[Callable[[], object]] = []


def test_a_module_is_not_taken_for_what_another_thread_does(name: str) -> None:
    module, x = Disturbed().eval(), torch.randn(3, 8)
    before = GeneratorStates()
    DISTURBING.append(DRAWS[name])
    try:
        fast = ovshim.accelerate(module, x, prefer="openvino", cache_dir=False)
    finally:
        disturbed = not DISTURBING
        DISTURBING.clear()
    assert disturbed
    assert name in before.moved()  # its stream goes on
    check(fast, module, x)


class Rarely(Mlp):
    """Draws what mostly does not show."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + (1 if random.random() < 1e-12 else 0)


def test_in_the_background_this_thread_is_watched() -> None:
    module, x = Rarely().eval(), torch.randn(3, 8)
    fast = ovshim.accelerate(module, prefer="openvino", cache_dir=False, background=True)
    with torch.inference_mode(), quietly():
        fast(x)
        assert fast.ovshim.wait(300)
    with quietly():
        check(fast, module, x, path="eager", reason="random")
