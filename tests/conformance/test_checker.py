"""That the checker sees what it is there to see: each test plants one deviation."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ovshim
from conformance.check import check
from conformance.compare import differences, sharing
from conformance.drawing import draw, normal
from conformance.entries import Edit, Entry
from conformance.worker import Worker
from ovshim.report import Report

X = torch.arange(6.0).view(2, 3)


@pytest.mark.parametrize(
    ("actual", "expected"),
    [
        (X, X.double()),
        (X, X[:1]),
        (X, X + 0.01),
        (X, X.clone().fill_(float("nan"))),
        (X.clone().fill_(float("inf")), -X.clone().fill_(float("inf"))),
        ([X], (X,)),
        ({"a": X}, {"b": X}),
        ({"a": X, "b": X}, {"b": X, "a": X}),
        (3, torch.tensor(3)),
        (True, 1),
        (None, X),
        ([X, X], [X]),
    ],
    ids=str,
)
def test_what_differs_is_told(actual: Any, expected: Any) -> None:
    assert differences(actual, expected, 1e-4)
    assert not differences(copy.deepcopy(expected), expected, 1e-4)


def test_rounding_is_no_difference() -> None:
    assert not differences(X * (1 + 1e-6), X, 1e-4)
    assert not differences(torch.full((4,), 1e-9), torch.zeros(4), 1e-4)


def test_shared_memory_is_told() -> None:
    given = X.clone()
    assert sharing((given, given[0]), (given,), {}) == {
        "[0]": ("argument[0]", "argument[0]"),
        "[1]": ("[1]", "argument[0]"),
    }
    rows = X.clone().unbind()
    assert sharing(rows, (), {}) == {"[0]": ("[0]", "[0]"), "[1]": ("[1]", "[1]")}


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.scale = 1.0

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] > 4:
            raise IndexError("too many")
        return self.linear(x) * self.scale


class Lying(nn.Module):
    """In place of an accelerated module: right but for what a subclass adds."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module = module
        self.scale = 1.0

    def forward(self, x: Tensor) -> Any:
        self.module.scale = self.scale
        return self.module(x)


class Frozen(Lying):
    first: Tensor | None = None

    def forward(self, x: Tensor) -> Any:
        if self.first is None or self.first.shape[0] != x.shape[0]:
            self.first = super().forward(x)
        return self.first


class OneBuffer(Lying):
    buffer = torch.empty(4, 3)

    def forward(self, x: Tensor) -> Any:
        return self.buffer[: x.shape[0]].copy_(super().forward(x))


class WritesInput(Lying):
    def forward(self, x: Tensor) -> Any:
        y = super().forward(x)
        x.zero_()
        return y


class OldWeights(Lying):
    def __init__(self, module: Any) -> None:
        super().__init__(copy.deepcopy(module))
        self.shared = module


class DeafToEdits(Lying):
    def forward(self, x: Tensor) -> Any:
        return self.module(x)


class AnswersAlways(Lying):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x) if x.shape[0] < 5 else self.module.linear(x)


class RaisesAnother(Lying):
    def forward(self, x: Tensor) -> Any:
        try:
            return super().forward(x)
        except IndexError as error:
            raise ValueError(str(error)) from error


class Draws(Lying):
    def forward(self, x: Tensor) -> Any:
        torch.rand(1)
        return super().forward(x)


class Listed(Lying):
    def forward(self, x: Tensor) -> Any:
        return [super().forward(x)]


@pytest.mark.parametrize(
    ("liar", "told"),
    [
        (Frozen, "draw 1: output: off by"),
        (OneBuffer, "looked at again later"),
        (WritesInput, "example: argument.args[0]"),
        (OldWeights, "after a weight edit: output: off by"),
        (DeafToEdits, "after the scale: output: off by"),
        (AnswersAlways, "an answer for IndexError: too many"),
        (RaisesAnother, "ValueError: too many for IndexError: too many"),
        (Draws, "example: random state"),
        (Listed, "list for Tensor"),
    ],
)
def test_what_an_accelerated_module_does_wrong_is_told(
    liar: type[Lying], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert any(told in wrong for wrong in _checked(liar, tmp_path, monkeypatch))


def test_a_right_module_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not _checked(Lying, tmp_path, monkeypatch)


def _checked(liar: type[Lying], tmp_path: Path, patch: pytest.MonkeyPatch) -> list[str]:
    patch.setattr(ovshim, "accelerate", lambda module, *args, **kwargs: liar(module))
    told = Report("Plain", "CPU", "own", {"openvino": 1}, {}, [])
    patch.setattr(ovshim, "explain", lambda fast: told)
    edit = Edit("the scale", lambda module: setattr(module, "scale", 2.0))
    entry = Entry("test/plain", Plain, draw(normal("B", 3)), edits=[edit])
    return check(entry, str(tmp_path)).wrong


@pytest.mark.slow
def test_a_dead_process_is_told_and_the_next_entry_runs() -> None:
    worker = Worker(timeout=120.0)
    try:
        assert worker.run("no such entry").path == "crashed"
        assert not worker.run("shapes/mean-by-hand").wrong
    finally:
        worker.close()
