"""`precision="auto"`: what is tried, what is taken, and that it is decided once."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from checks import check, falls_back, paths, plans
from modules import DigitsCnn, UsesHistc, make
from torch import Tensor, nn

import ovshim
from ovshim import auto, runtime
from ovshim.precision import quantize


def images(count: int, seed: int = 0) -> Tensor:
    return torch.rand(count, 1, 16, 16, generator=torch.Generator().manual_seed(seed))


DATA = [(images(4, n), torch.arange(4)) for n in range(10)]


def accelerated(module: nn.Module, **changes: Any) -> nn.Module:
    options: dict[str, Any] = {"calibration": DATA, "prefer": "openvino", **changes}
    return ovshim.accelerate(module, images(4), precision="auto", **options)


def table(fast: nn.Module) -> dict[str, dict[str, Any]]:
    (plan,) = plans(fast)
    return {row["precision"]: row for row in plan["candidates"]}


def chosen(fast: nn.Module) -> str:
    (name,) = (name for name, row in table(fast).items() if row["chosen"])
    return name


@pytest.fixture
def speeds(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Seconds a call by what a graph runs in, in the place of measured ones."""
    seconds = {"f32": 1.0, "bf16": 1.0, "f16": 1.0, "i8": 1.0}
    current: list[str] = []
    call_of = auto._call_of

    def remember(plan: Any, tensors: Sequence[Tensor]) -> Any:
        current.append(str(plan.precision_run))
        return call_of(plan, tensors)

    def rounds(ways: Sequence[Callable[[], Any]], *_: Any) -> list[list[float]]:
        ran = current[-len(ways) :]
        return [[seconds[name]] * 3 for name in ran]

    # Which ranges are better is not the subject.
    monkeypatch.setattr(quantize, "_PRESETS", ("minmax",))
    monkeypatch.setattr(auto, "_call_of", remember)
    monkeypatch.setattr(auto, "rounds", rounds)
    return seconds


def has(precision: str) -> bool:
    return any(d.name == "CPU" and precision in d.precisions for d in runtime.devices())


def test_every_candidate_is_in_the_table() -> None:
    module = make(DigitsCnn)
    fast = accelerated(module, tolerance=0.1)
    check(fast, module, images(3, 20), tolerance=0.1)
    rows = table(fast)
    assert list(rows) == ["fp32", "fp16", "bf16", "int8"]
    assert rows["fp32"]["error"] < 1e-5 < rows["int8"]["error"] < 0.1
    assert rows["fp32"]["p99"] < 1e-5 < rows["int8"]["p99"] < 0.1
    assert rows["int8"]["bytes"] < rows["fp32"]["bytes"]
    assert rows["fp32"]["speedup"] == 1.0
    assert rows["int8"]["seconds"] > 0
    for name, row in rows.items():
        assert row["chosen"] is (name == chosen(fast))
        assert (row["why"] is None) is row["chosen"]
    if not has("fp16"):
        assert "runs it in" in rows["fp16"]["why"]
    report = ovshim.explain(fast)
    assert report.precision == "auto"
    for name in rows:
        assert f"\n      {name} " in str(report)


def test_the_fastest_is_taken(speeds: dict[str, float]) -> None:
    speeds["i8"] = 0.4
    module = make(DigitsCnn)
    fast = accelerated(module, tolerance=0.1)
    assert chosen(fast) == "int8"
    assert plans(fast)[0]["precision_run"] == "i8"
    assert table(fast)["int8"]["speedup"] == 2.5
    assert table(fast)["fp32"]["why"] == "int8 takes 0.40 times as long"


@pytest.mark.slow
def test_a_tenth_in_favour_of_the_more_exact(speeds: dict[str, float]) -> None:
    speeds["i8"] = 0.92
    assert chosen(accelerated(make(DigitsCnn), tolerance=0.1)) == "fp32"
    speeds["i8"] = 0.90
    assert chosen(accelerated(make(DigitsCnn), tolerance=0.11)) == "int8"


@pytest.mark.slow
def test_what_is_not_exact_enough_is_not_taken(speeds: dict[str, float]) -> None:
    speeds["i8"] = 0.1
    fast = accelerated(make(DigitsCnn), tolerance=1e-5)
    assert chosen(fast) == "fp32"
    assert "off by" in table(fast)["int8"]["why"]
    assert "off by" in table(fast)["bf16"]["why"] or not has("bf16")


def test_without_calibration_data_there_is_no_int8(speeds: dict[str, float]) -> None:
    fast = accelerated(make(DigitsCnn), calibration=None)
    assert list(table(fast)) == ["fp32", "fp16", "bf16"]
    assert table(fast)["fp32"]["p99"] < 1e-5


@pytest.mark.slow
def test_a_function_judges_with_labels(speeds: dict[str, float]) -> None:
    speeds["i8"] = 0.1
    module = make(DigitsCnn)
    judged: list[float] = []

    def holds(outputs: list[Tensor], expected: list[Tensor], items: list[Any]) -> bool:
        assert len(outputs) == len(expected) == len(items)
        for exact, (image, labels) in zip(expected, items, strict=True):
            assert torch.equal(labels, torch.arange(4))
            with torch.inference_mode():
                torch.testing.assert_close(exact, module(image))
        pairs = zip(outputs, expected, strict=True)
        judged.append(max(float((a - b).abs().max()) for a, b in pairs))
        return judged[-1] < 1e-4

    fast = accelerated(module, tolerance=holds)
    assert chosen(fast) == "fp32"
    assert table(fast)["int8"]["why"] == "the function of tolerance= says no"
    assert min(judged) < 1e-4 < max(judged)
    assert chosen(accelerated(module, tolerance=lambda *_: True)) == "int8"


@pytest.mark.slow
def test_it_is_decided_once(speeds: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    speeds["i8"] = 0.5
    module = make(DigitsCnn)
    first = accelerated(module, tolerance=0.1)
    speeds["i8"] = 2.0
    second = accelerated(module, tolerance=0.1)
    assert chosen(first) == chosen(second) == "int8"
    assert table(second) == table(first)
    assert plans(second)[0]["cache"] == "hit"
    # Another machine, another tolerance, other data: not what was decided.
    assert chosen(accelerated(module, tolerance=0.11)) == "fp32"
    assert chosen(accelerated(module, tolerance=0.1, calibration=DATA[1:])) == "fp32"
    monkeypatch.setattr(runtime, "processor", lambda: "another")
    assert chosen(accelerated(module, tolerance=0.1)) == "fp32"


def test_a_module_that_eager_has_to_serve_is_tried_once() -> None:
    with falls_back("unsupported-op"):
        fast = ovshim.accelerate(
            make(UsesHistc), torch.randn(3, 8), precision="auto", prefer="openvino"
        )
    assert paths(fast) == ["eager"]


@pytest.mark.slow
def test_without_a_cache() -> None:
    module = make(DigitsCnn)
    fast = accelerated(module, cache_dir=False, tolerance=0.1)
    check(fast, module, images(2, 9), tolerance=0.1)
    assert table(fast)["fp32"]["bytes"] is None
