"""What a module reaches outside of its tree: generators of the program's own, what it writes to."""

import random
import warnings
from collections import deque
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from checks import check, counts, quietly, same
from modules import Mlp, make
from torch import Tensor, nn

import ovshim
from ovshim.outside import Written, own_generators

TORCHS = torch.Generator()
NUMPYS = np.random.default_rng(0)
OLDER = np.random.RandomState(0)
PYTHONS = random.Random(0)
HELD = SimpleNamespace(inner=np.random.default_rng(0))


class Draws(nn.Module):
    """[batch, 8] -> [batch, 8], more or less."""

    def __init__(self, draw: Callable[[], float]) -> None:
        super().__init__()
        self.first, self.second = Mlp(8, 16, 8), Mlp(8, 16, 8)
        self.draw = draw

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(self.first(x) + self.draw())
        return y


def helped() -> float:
    return PYTHONS.random()


DRAWS: dict[str, Callable[[], float]] = {
    "torch": lambda: float(torch.rand(1, generator=TORCHS)),
    "numpy": lambda: float(NUMPYS.random()),
    "numpy's older": lambda: float(OLDER.rand()),
    "python": lambda: PYTHONS.random(),
    "in an object": lambda: float(HELD.inner.random()),
    "by a function": lambda: helped(),
}


def start() -> None:
    TORCHS.manual_seed(7)
    PYTHONS.seed(7)
    OLDER.seed(7)
    for one in (NUMPYS, HELD.inner):
        one.bit_generator.state = np.random.default_rng(7).bit_generator.state


@pytest.mark.parametrize("name", DRAWS)
@pytest.mark.parametrize("background", [False, True])
def test_a_generator_of_the_programs_own_gives_it_the_same_numbers(
    name: str, background: bool
) -> None:
    module = make(Draws, DRAWS[name])
    assert len(own_generators(module)) == 1
    xs = [torch.randn(3, 8) for _ in range(4)]
    fast: Any
    with torch.no_grad(), quietly():
        start()
        expected = [module(x) for x in xs]
        fast = ovshim.accelerate(module, prefer="openvino", background=background)
        start()
        answers = []
        for x in xs:
            answers.append(fast(x))
            fast.ovshim.wait()
        same(answers, expected)


def test_the_shared_generators_are_known_by_name() -> None:
    module = make(Draws, lambda: random.random() + np.random.rand() + float(torch.rand(1)))
    assert own_generators(module) == []


COUNTS = {"calls": 0}
LISTED: list[float] = []
LAST: deque[int] = deque(maxlen=1)
OBJECT = SimpleNamespace(calls=0)


class Counts(nn.Module):
    """A branch on values keeps it in eager, but for its parts."""

    calls = 0

    def __init__(self, note: Callable[[nn.Module], Any]) -> None:
        super().__init__()
        self.first, self.second = Mlp(8, 16, 8), Mlp(8, 16, 8)
        self.note = note

    def forward(self, x: Tensor) -> Tensor:
        self.note(self)
        y: Tensor = self.first(x)
        return self.second(y) if y.sum() > -1e9 else y


def count(_: Any) -> None:
    COUNTS["calls"] += 1


def count_in_class(module: Any) -> None:
    type(module).calls += 1


def set_attribute(_: Any) -> None:
    OBJECT.calls += 1


NOTES: dict[str, tuple[Callable[[Any], Any], Callable[[], int]]] = {
    "a dict": (count, lambda: COUNTS["calls"]),
    "a list": (lambda _: LISTED.append(1.0), lambda: len(LISTED)),
    "an object": (set_attribute, lambda: OBJECT.calls),
    "the class": (count_in_class, lambda: Counts.calls),
}


@pytest.mark.parametrize("name", NOTES)
@pytest.mark.parametrize("prefer", ["openvino", "faster"])
def test_what_is_written_elsewhere_is_not_written_by_many_calls_more(
    name: str, prefer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ovshim.parts._WORTH_SERVING_SECONDS", 0.0)
    note, written = NOTES[name]
    module, before = make(Counts, note), written()
    with torch.no_grad(), quietly():
        fast = ovshim.accelerate(module, prefer=prefer)
        for _ in range(5):
            check(fast, module, torch.randn(3, 8), path="eager")
    assert 10 <= written() - before <= 10 + 2


def test_files_are_not_written_by_many_calls_more(tmp_path: Path) -> None:
    log = tmp_path / "log"

    def note(_: Any) -> None:
        with log.open("a") as file:
            file.write("x")

    module = make(Counts, note)
    with torch.no_grad(), quietly():
        fast = ovshim.accelerate(module, prefer="openvino")
        for _ in range(5):
            check(fast, module, torch.randn(3, 8), path="eager")
    assert 10 <= len(log.read_text()) <= 10 + 4


def test_a_module_that_reads_elsewhere_is_divided() -> None:
    module = make(Counts, lambda _: len(LISTED) + COUNTS["calls"])
    with torch.no_grad(), quietly():
        fast = ovshim.accelerate(module, torch.randn(3, 8), prefer="openvino")
        check(fast, module, torch.randn(3, 8), path="mixed")
    assert counts(fast)["mixed"] == 1


@pytest.mark.parametrize(
    "write",
    [
        lambda: COUNTS.update(calls=COUNTS["calls"] + 1),
        lambda: COUNTS.update(other=1),
        lambda: LISTED.append(2.0),
        lambda: LAST.append(3),
        lambda: setattr(OBJECT, "other", 1),
        lambda: setattr(Counts, "calls", Counts.calls + 1),
    ],
)
def test_what_was_written_is_seen(write: Callable[[], Any]) -> None:
    LAST.append(0)
    module = make(Counts, lambda _: (COUNTS, LISTED, LAST, OBJECT))
    written = Written(module)
    assert not written.anything()
    write()
    assert written.anything()


COUNTED = torch.zeros(1)
PLACES = np.zeros(3)
DEEP = {"a": {"b": {"c": 0}}}
NUMBER = 0


def _count() -> None:
    global NUMBER
    NUMBER += 1


WRITES: dict[str, Callable[[], Any]] = {
    "a number": lambda: _count(),
    "a tensor": lambda: COUNTED.add_(1),
    "an array": lambda: PLACES.__iadd__(1),
    "three levels down": lambda: DEEP["a"]["b"].update(c=DEEP["a"]["b"]["c"] + 1),
}


class Notes(nn.Module):
    def __init__(self, write: Callable[[], Any]) -> None:
        super().__init__()
        self.write = write

    def forward(self, x: Tensor) -> Tensor:
        self.write()
        return x


@pytest.mark.parametrize("name", WRITES)
def test_what_is_written_to_names_tensors_and_deep_down_is_seen(name: str) -> None:
    module = make(Notes, WRITES[name])
    written = Written(module)
    assert not written.anything()
    module(torch.ones(3))
    assert written.anything()


class Unready(dict[str, Any]):
    def items(self) -> Any:
        raise RuntimeError("not loaded")

    def __len__(self) -> int:
        raise RuntimeError("not loaded")


class Proxy:
    @property
    def __class__(self) -> Any:
        raise RuntimeError("outside of a request")


class Odd(random.Random):
    def getstate(self) -> Any:
        raise NotImplementedError


UNREADY, PROXY, ODD = Unready(a=NUMPYS), Proxy(), Odd(0)


class Names(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        return y if UNREADY is not None and PROXY is not None and ODD is not None else -y


def test_what_the_programs_objects_raise_stays_out_of_its_calls() -> None:
    module, x = make(Names), torch.randn(3, 8)
    found = own_generators(module)
    assert len(found) == 2
    assert any(one is NUMPYS for one in found)
    assert not Written(module).anything()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", ovshim.FallbackWarning)
        same(ovshim.accelerate(module, x, prefer="openvino")(x), module(x))


SEEDED = torch.Generator()


class Seeds(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        SEEDED.manual_seed(0)
        return x + torch.rand(8, generator=SEEDED)


def test_a_generator_that_each_call_seeds_is_left_where_it_was() -> None:
    SEEDED.manual_seed(5)
    before = SEEDED.get_state()
    with quietly():
        ovshim.accelerate(make(Seeds), torch.randn(3, 8), prefer="openvino")
    assert torch.equal(SEEDED.get_state(), before)
