"""Eager's threads spin while OpenVINO works: said once, where it matters."""

import warnings

import pytest
import torch
from torch import nn

import ovshim
from ovshim import waiting


@pytest.fixture(autouse=True)
def spinning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "_said", False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"):
        monkeypatch.delenv(name, raising=False)


def said(*paths: str) -> bool:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        waiting.look_at(paths)
    return any("OMP_WAIT_POLICY=passive" in str(warning.message) for warning in caught)


def test_it_is_said_once() -> None:
    assert not said()
    assert not said("openvino")
    assert not said("eager", "eager")
    assert said("openvino", "eager")
    assert not said("mixed")


def test_mixed_plans_take_turns() -> None:
    assert said("mixed")


@pytest.mark.parametrize("name", ["OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"])
def test_who_has_set_it_knows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "0")
    assert not said("mixed")


def test_one_thread_waits_for_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert not said("mixed")


class Chosen(nn.Module):
    """Of one kind of call eager alone knows the answer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, rounds: int = 1) -> torch.Tensor:
        x = self.linear(x)
        return x + torch.rand(()) if rounds > 1 else x


def test_a_module_of_both_kinds() -> None:
    x = torch.randn(2, 8)
    module = Chosen().eval()
    fast = ovshim.accelerate(module, x, prefer="openvino")
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        fast(x, 2)
    assert sum("OMP_WAIT_POLICY=passive" in str(warning.message) for warning in caught) == 1
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        assert torch.allclose(fast(x), module(x), atol=1e-5)
