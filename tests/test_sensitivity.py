"""`ovshim.precision.sensitivity`: who suffers from a lower precision, and rules that spare them."""

from typing import Any

import pytest
import torch
from checks import as_it_runs, check, plans
from modules import DigitsCnn, UsesHistc, make
from torch import Tensor, nn

import ovshim
from ovshim.precision import sensitivity


class Outlier(nn.Module):
    """Before `hurt` one feature is a thousand times as large as the others, which decide."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 32)
        self.hurt = nn.Linear(33, 32)
        self.last = nn.Linear(32, 8)
        with torch.no_grad():
            self.hurt.weight[:, 32] = 0.0

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x))
        spike = 1000.0 * x[:, :1].abs()
        out: Tensor = self.last(torch.tanh(self.hurt(torch.cat([hidden, spike], 1))))
        return out


DATA = [torch.randn(16, 16, generator=torch.Generator().manual_seed(n)) for n in range(10)]


@pytest.mark.slow
def test_who_suffers_stays_in_fp32() -> None:
    module = make(Outlier)
    found = sensitivity(module, DATA[0], calibration=DATA, tolerance=0.03)
    assert next(iter(found.errors)) == "hurt"
    assert found.errors["hurt"] > 3 * found.errors["last"]
    assert found.rules == {"default": "fp32", "first": "int8", "last": "int8"}
    assert 0 < found.error <= 0.03
    text = str(found)
    assert "hurt" in text.splitlines()[1]
    assert text.count("stays in fp32") == 1


def test_the_rules_do_what_is_said_of_them() -> None:
    module = make(Outlier)
    found = sensitivity(module, DATA[0], calibration=iter(DATA), tolerance=0.03)
    fast = ovshim.accelerate(
        module, DATA[0], precision=found.rules, calibration=DATA, prefer="openvino", tolerance=0.05
    )
    check(fast, module, DATA[9], tolerance=0.05)
    assert plans(fast)[0]["modules"] == {"first": "i8", "hurt": "f32", "last": "i8"}
    assert plans(fast)[0]["error"] < 2 * found.error


@pytest.mark.parametrize(
    ("tolerance", "lowered"), [pytest.param(1.0, 3, marks=pytest.mark.slow), (1e-7, 0)]
)
def test_tolerances_at_both_ends(tolerance: float, lowered: int) -> None:
    module = make(DigitsCnn)
    x = torch.rand(4, 1, 16, 16)
    data = [(torch.rand(4, 1, 16, 16), 0) for _ in range(4)]
    found = sensitivity(
        module, x, calibration=data, transform=lambda item: item[0], tolerance=tolerance
    )
    assert set(found.errors) == {"body.0", "body.4", "head"}
    assert list(found.rules.values()).count("int8") == lowered
    assert found.error <= tolerance


def test_floats() -> None:
    module = make(Outlier)
    with as_it_runs():
        found = sensitivity(module, DATA[0], calibration=DATA, precision="bf16", tolerance=0.5)
    assert set(found.errors) == {"first", "hurt", "last"}
    assert all(0 < error < 0.05 for error in found.errors.values())
    assert set(found.rules.values()) == {"fp32", "bf16"}


@pytest.mark.slow
def test_the_module_is_left_as_it_was() -> None:
    module = make(Outlier)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    sensitivity(module, DATA[0], calibration=DATA[:3])
    assert all(torch.equal(module.state_dict()[name], before[name]) for name in before)
    assert not hasattr(module, "ovshim")


class Counting(nn.Linear):
    def __init__(self) -> None:
        super().__init__(16, 8)
        self.calls = [0]

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append(1)
        return super().forward(x)


@pytest.mark.parametrize(
    ("module", "code"),
    [
        (nn.Sequential(nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Dropout()), "training"),
        (Counting().eval(), "mutates-attribute"),
    ],
)
def test_a_module_that_a_call_changes(module: Any, code: str) -> None:
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    state = torch.get_rng_state()
    with pytest.raises(ovshim.FallbackError) as caught:
        sensitivity(module, DATA[0], calibration=DATA, precision="bf16")
    assert caught.value.reason.code == code
    assert all(torch.equal(module.state_dict()[name], before[name]) for name in before)
    assert torch.equal(torch.get_rng_state(), state)
    assert getattr(module, "calls", [0]) == [0]


def test_calibration_of_other_sizes() -> None:
    with pytest.raises(ovshim.CalibrationError, match="sizes"):
        sensitivity(make(Outlier), DATA[0], calibration=[torch.randn(4, 9)], precision="bf16")


@pytest.mark.parametrize("precision", ["fp32", "auto", "int8_weights"])
def test_precisions_that_make_no_sense(precision: Any) -> None:
    with pytest.raises(ovshim.OptionError) as caught:
        sensitivity(make(Outlier), DATA[0], calibration=DATA, precision=precision)
    assert caught.value.name == "precision"


@pytest.mark.parametrize("tolerance", ["strict", None, True, 0, -1.0])
def test_tolerances_that_are_no_numbers(tolerance: Any) -> None:
    with pytest.raises(ovshim.OptionError) as caught:
        sensitivity(make(Outlier), DATA[0], calibration=DATA, tolerance=tolerance)
    assert caught.value.name == "tolerance"


def test_what_is_no_module_or_no_example() -> None:
    with pytest.raises(ovshim.OptionError) as caught:
        sensitivity(Outlier, DATA[0], calibration=DATA)  # type: ignore[arg-type]
    assert caught.value.name == "module"
    with pytest.raises(ovshim.FallbackError) as fallen:
        sensitivity(make(Outlier), (object(),), calibration=DATA, precision="bf16")
    assert fallen.value.reason.code == "unknown-leaf"


def test_a_module_that_cannot_be_captured() -> None:
    with pytest.raises(ovshim.FallbackError) as caught:
        sensitivity(make(UsesHistc), torch.randn(3, 8), calibration=[torch.randn(3, 8)])
    assert caught.value.reason.code == "unsupported-op"
