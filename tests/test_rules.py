"""Rules: each module in the precision it was given, and overflow of float16 said by module."""

import time
import warnings
from typing import Any

import pytest
import torch
from checks import as_it_runs, check, falls_back, paths, plans, quietly
from modules import Attention, DigitsCnn, Recurrent, make, small_bert, small_resnet, small_vit
from torch import Tensor, nn

import ovshim
from ovshim import lowering, runtime
from ovshim.precision.overflow import overflow
from ovshim.precision.rules import by_module


def ran(precision: str) -> str:
    """What a part in that precision runs in on this processor."""
    (cpu,) = (device for device in runtime.devices() if device.name == "CPU")
    name = {"fp32": "f32", "bf16": "bf16", "fp16": "f16", "int8": "i8"}[precision]
    threads = torch.get_num_threads()
    placement: Any = {"device": "CPU", "hint": "latency", "streams": None, "threads": threads}
    if precision in ("bf16", "fp16") and runtime.safe_precision(precision, **placement) == "fp32":
        return "f32"
    return name if precision in {*cpu.precisions, "fp32", "int8"} else "f32"


def modules(fast: nn.Module) -> dict[str, str]:
    (plan,) = plans(fast)
    found: dict[str, str] = plan["modules"]
    return found


# Which rule is for which module

PATHS = ["", "body", "body.0", "body.10", "body.10.out", "head"]


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        ({"default": "bf16"}, "bbbbbb"),
        ({"head": "bf16"}, "fffffb"),
        ({"body": "bf16"}, "fbbbbf"),
        ({"body.*": "bf16"}, "ffbbbf"),
        ({"body.1?": "bf16"}, "fffbbf"),
        ({"*.out": "bf16"}, "ffffbf"),
        ({"*": "bf16"}, "bbbbbb"),
        ({"body": "bf16", "body.10": "fp32"}, "fbbfff"),
        ({"body.10": "fp32", "body": "bf16"}, "fbbbbf"),
        ({"head": "fp32", "default": "bf16"}, "bbbbbf"),
    ],
)
def test_the_last_match_wins_and_covers_what_is_below(rules: dict[str, str], expected: str) -> None:
    found = by_module(rules, PATHS, "fp32")
    assert "".join("b" if found[path] == "bf16" else "f" for path in PATHS) == expected


@pytest.mark.parametrize(
    ("pattern", "meant"),
    [("haed", "head"), ("body.O", "body.0"), ("5", "body.5"), ("nothing.*", "body.0")],
)
def test_a_pattern_that_matches_nothing_is_a_mistake(pattern: str, meant: str) -> None:
    with pytest.raises(ovshim.OptionError) as caught:
        ovshim.accelerate(make(DigitsCnn), precision={"default": "bf16", pattern: "fp32"})
    assert caught.value.value == {pattern: "fp32"}
    assert meant in str(caught.value)


# Exactly what was asked for


def test_a_convolution_with_folded_batch_norm() -> None:
    """Folding leaves nothing of the convolution's name."""
    module = make(DigitsCnn)
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.uniform_(-0.2, 0.2)  # type: ignore[union-attr]
    x = torch.rand(4, 1, 16, 16)
    data = [torch.rand(4, 1, 16, 16) for _ in range(6)]
    for exact, lower in (("body.0", "body.4"), ("body.4", "body.0")):
        fast = ovshim.accelerate(
            module,
            x,
            precision={"default": "int8", exact: "fp32"},
            calibration=data,
            prefer="openvino",
        )
        check(fast, module, torch.rand(3, 1, 16, 16), tolerance=0.1)
        found = modules(fast)
        assert (found[exact], found[lower], found["head"]) == ("f32", "i8", "i8")


@pytest.mark.slow
def test_islands_of_floats_in_a_transformer() -> None:
    module = small_bert()
    ids = torch.randint(0, 100, (2, 9))
    rules = {
        "default": "fp32",
        "encoder.layer.0": "bf16",
        "encoder.layer.0.output": "fp32",
        "encoder.layer.1.attention.*": "fp16",
    }
    with as_it_runs():
        fast = ovshim.accelerate(
            module, {"input_ids": ids}, precision=rules, prefer="openvino", tolerance=0.05
        )
    check(fast, module, input_ids=ids, tolerance=0.05)
    found = modules(fast)
    asked = by_module(rules, [path for path, _ in module.named_modules()], "fp32")
    assert {"encoder.layer.0.attention.self.query", "pooler.dense"} <= found.keys()
    assert found == {path: ran(asked[path]) for path in found}
    text = str(ovshim.explain(fast))
    assert f"encoder.layer.0.intermediate.dense: {ran('bf16')}" in text


def test_four_precisions_in_one_graph() -> None:
    module = make(lambda: nn.Sequential(*(nn.Linear(32, 32) for _ in range(4))))  # type: ignore[arg-type]
    data = [torch.randn(8, 32) for _ in range(6)]
    rules = {"0": "fp32", "1": "bf16", "2": "fp16", "3": "int8"}
    with as_it_runs():
        fast = ovshim.accelerate(
            module, data[0], precision=rules, calibration=data, prefer="openvino"
        )
    check(fast, module, torch.randn(5, 32), tolerance=0.1)
    assert modules(fast) == {path: ran(precision) for path, precision in rules.items()}


def test_what_the_processor_has_not_is_said() -> None:
    module = make(lambda: nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 8)))  # type: ignore[arg-type]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fast = ovshim.accelerate(
            module, torch.randn(4, 32), precision={"0": "fp16"}, prefer="openvino"
        )
    said = [str(entry.message) for entry in caught]
    if ran("fp16") == "f16":
        assert said == []
    else:
        (text,) = said
        assert "runs 0 in f32" in text
    assert modules(fast) == {"0": ran("fp16"), "1": "f32"}


def test_one_thread_to_a_stream_is_fp32_and_said() -> None:
    """Lower precision there has ended processes."""
    module = make(lambda: nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 8)))  # type: ignore[arg-type]
    x = torch.randn(4, 32)
    with pytest.warns(ovshim.PrecisionWarning, match="threads="):
        fast = ovshim.accelerate(module, x, precision={"0": "bf16"}, threads=1, prefer="openvino")
    check(fast, module, x, tolerance=2e-6)
    assert modules(fast) == {"0": "f32", "1": "f32"}
    # Nor is the graph taken that was made for two.
    with as_it_runs():
        other = ovshim.accelerate(module, x, precision={"0": "bf16"}, threads=2, prefer="openvino")
    assert plans(other)[0]["cache"] == "miss"


@pytest.mark.parametrize(
    ("make_module", "example"),
    [
        pytest.param(small_vit, torch.rand(2, 3, 32, 32), id="vit"),
        pytest.param(small_resnet, torch.rand(2, 3, 32, 32), id="resnet"),
        pytest.param(lambda: make(Recurrent), torch.randn(3, 5, 8), id="lstm"),
        pytest.param(lambda: make(Attention), torch.randn(2, 5, 16), id="attention"),
    ],
)
def test_islands_of_everything(make_module: Any, example: Tensor) -> None:
    """Every operation of the graph in bf16, but for those of one module."""
    module = make_module()
    *_, last = (path for path, inner in module.named_modules() if isinstance(inner, nn.Linear))
    with as_it_runs():
        fast = ovshim.accelerate(
            module, example, precision={"default": "bf16", last: "fp32"}, prefer="openvino"
        )
    check(fast, module, example, tolerance=0.03)
    found = modules(fast)
    assert found.pop(last) == "f32"
    assert set(found.values()) == {ran("bf16")}


def test_rules_that_say_one_thing_are_that() -> None:
    module = make(DigitsCnn)
    x = torch.rand(4, 1, 16, 16)
    fast = ovshim.accelerate(module, x, precision={"default": "fp32"}, prefer="openvino")
    check(fast, module, x, tolerance=2e-6)
    assert set(modules(fast).values()) == {"f32"}


def test_other_rules_are_another_entry() -> None:
    module = make(lambda: nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 8)))  # type: ignore[arg-type]
    caches = []
    with as_it_runs():
        for rules in ({"0": "bf16"}, {"1": "bf16"}, {"0": "bf16"}):
            fast = ovshim.accelerate(module, torch.randn(4, 32), precision=rules, prefer="openvino")
            caches.append(plans(fast)[0]["cache"])
            assert modules(fast) == {
                path: ran("bf16" if path in rules else "fp32") for path in ("0", "1")
            }
    assert caches == ["miss", "miss", "hit"]


def test_outputs_keep_their_dtypes_at_the_edge_of_an_island() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(16, 16)
            self.second = nn.Linear(16, 4)

        def forward(self, x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            hidden = self.first(x)
            return hidden, self.second(hidden), ids + hidden.argmax(-1)

    module = make(Two)
    with as_it_runs():
        fast = ovshim.accelerate(
            module,
            (torch.randn(4, 16), torch.arange(4)),
            precision={"default": "bf16", "second": "fp32"},
            prefer="openvino",
            tolerance=0.5,
        )
    check(fast, module, torch.randn(4, 16), torch.arange(4), tolerance=0.5)


def test_a_bfloat16_module_with_a_part_in_fp32() -> None:
    module = make(lambda: nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 8)))  # type: ignore[arg-type]
    module = module.bfloat16()
    x = torch.randn(4, 32).bfloat16()
    with as_it_runs():
        fast = ovshim.accelerate(module, x, precision={"2": "fp32"}, prefer="openvino")
    check(fast, module, torch.randn(3, 32).bfloat16(), tolerance=0.03)
    assert modules(fast) == {"0": ran("bf16"), "2": "f32"}


def test_a_graph_that_does_not_say_where_it_comes_from() -> None:
    """A bare trace, which is taken where Dynamo meets a clock, knows no modules."""

    class Timed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            time.perf_counter()
            y: Tensor = self.linear(x)
            return y

    with falls_back("no-module-paths"):
        fast = ovshim.accelerate(
            make(Timed), torch.randn(3, 8), precision={"linear": "bf16"}, prefer="openvino"
        )
    assert paths(fast) == ["eager"]


# float16's range


class Tall(nn.Module):
    """Its middle reaches some 1e6, its ends stay small."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 16)
        self.wide = nn.Linear(16, 16)
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 4)
        with torch.no_grad():
            self.wide.weight.mul_(4e6)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.norm(self.wide(self.first(x))))
        return out


def test_overflow_of_fp16_that_bf16_survives() -> None:
    module = make(Tall)
    x = torch.randn(4, 16)
    with falls_back("overflow") as told:
        fast = ovshim.accelerate(module, x, precision="fp16", prefer="openvino")
    reason = told[0].reason
    assert "wide reaches" in reason.message
    check(fast, module, x, path="eager", reason="overflow", tolerance=0.0)
    with as_it_runs():
        brain = ovshim.accelerate(module, x, precision="bf16", prefer="openvino")
    check(brain, module, x, tolerance=0.03)


def test_the_rules_that_are_named_cure_the_overflow() -> None:
    module = make(Tall)
    x = torch.randn(4, 16)
    with quietly():
        fast = ovshim.accelerate(module, x, precision="fp16", prefer="openvino")
    message = plans(fast)[0]["reason"]["message"]
    text = message.partition("precision=")[2].rstrip(".")
    assert text == str({"default": "fp16", "wide": "fp32", "norm": "fp32"})
    rules = {"default": "fp16", "wide": "fp32", "norm": "fp32"}
    with as_it_runs():
        cured = ovshim.accelerate(module, x, precision=rules, prefer="openvino")
    check(cured, module, x, tolerance=0.03)
    assert modules(cured)["wide"] == "f32"


def test_overflow_that_only_calibration_data_shows() -> None:
    module = make(Tall)
    with torch.no_grad():
        module.wide.weight.mul_(1e-3)  # type: ignore[operator, union-attr]
    x = torch.randn(4, 16)
    with falls_back("overflow"):
        ovshim.accelerate(module, x, precision="fp16", calibration=[x, x * 1e4], prefer="openvino")


def test_overflow_is_asked_about_where_the_cache_has_the_graph() -> None:
    """An entry was proved with other data than this process brings."""
    module = make(Tall)
    with torch.no_grad():
        module.wide.weight.mul_(1e-3)  # type: ignore[operator, union-attr]
    x = torch.randn(4, 16)
    options: Any = {"precision": "fp16", "prefer": "openvino"}
    with as_it_runs():
        assert plans(ovshim.accelerate(module, x, **options))[0]["cache"] == "miss"
    for data in ({"calibration": [x, x * 1e4]}, {}):
        example = x if data else x * 1e4
        with falls_back("overflow") as told:
            fast = ovshim.accelerate(module, example, **options, **data)
        assert "wide" in told[0].reason.message
        check(fast, module, example, path="eager", reason="overflow", tolerance=0.0)
    with as_it_runs():  # the entry is as good as before, for what it is good for
        fast = ovshim.accelerate(module, x, **options)
    assert plans(fast)[0]["cache"] == "hit"
    check(fast, module, x, tolerance=0.03)


@pytest.mark.slow
def test_data_is_looked_at_for_overflow_once(monkeypatch: pytest.MonkeyPatch) -> None:
    module, looks = make(Tall), []
    with torch.no_grad():
        module.wide.weight.mul_(1e-3)  # type: ignore[operator, union-attr]
    monkeypatch.setattr(lowering, "overflow", lambda *given: looks.append(given[2]))
    example, other = torch.randn(4, 16), torch.randn(4, 16)
    with as_it_runs():
        for x in (example, other, example, other):
            ovshim.accelerate(module, x, precision="fp16", prefer="openvino")
    assert [torch.equal(given[0], x) for given, x in zip(looks, (example, other), strict=True)]


def found_in(module: nn.Module, *inputs: Tensor) -> Any:
    return overflow(module, lambda: module(*inputs), inputs, lambda path: True)


def test_where_an_overflow_begins() -> None:
    module = make(Tall)
    found = found_in(module, torch.randn(4, 16))
    assert (found.path, found.paths) == ("wide", ("wide", "norm"))
    assert found.value > 65504
    assert not module._forward_hooks
    assert not torch.nn.modules.module._global_forward_hooks


def test_masks_are_no_overflow() -> None:
    class Masked(nn.Module):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            lowest = torch.finfo(x.dtype).min
            added = (1.0 - mask) * lowest
            filled = x.masked_fill(mask == 0, -1e9)
            return (x + added).softmax(-1) + filled.softmax(-1) + (x + mask.log()).softmax(-1)

    assert found_in(Masked(), torch.randn(2, 4), torch.tensor([1.0, 1.0, 0.0, 1.0])) is None


def test_weights_and_inputs_beyond_the_range() -> None:
    module = make(lambda: nn.Sequential(nn.Linear(4, 4)))  # type: ignore[arg-type]
    assert found_in(module, torch.ones(2, 4)) is None
    assert found_in(module, torch.full((2, 4), 1e5)).path == ""
    with torch.no_grad():
        module[0].bias.fill_(1e5)  # type: ignore[index, union-attr, operator]
    assert found_in(module, torch.ones(2, 4)).path == "0"
