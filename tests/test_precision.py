"""Precision: the module's own, what `precision=` asks for, what runs, and what is let pass."""

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from checks import as_it_runs, check, falls_back, paths, plans, quietly, same, served, settle
from modules import Attention, DigitsCnn, Mlp, Recurrent, make, small_bert
from torch import Tensor, nn

import ovshim
from ovshim.cache.entry import MANIFEST
from ovshim.cache.files import read_sealed

# What the hint of a lower precision may really run in: some processors have no f16 (or no bf16).
LOWER = {"bf16", "f16"}


class Wide(nn.Module):
    """Wide enough for lower precisions to show."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class OneLayer(nn.Module):
    """Nothing of it could run by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(64, 64))

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.gelu(x @ self.weight)


def plan(fast: nn.Module) -> dict[str, Any]:
    (only,) = plans(fast)
    return only


def error(actual: Tensor, expected: Tensor) -> float:
    """Relative L2 error."""
    difference = actual.double() - expected.double()
    return float(difference.norm() / expected.double().norm())


# fp32


def test_fp32_is_exact() -> None:
    module = make(Wide)
    fast = ovshim.accelerate(module, torch.randn(4, 64), prefer="openvino")
    for _ in range(3):
        check(fast, module, torch.randn(4, 64), tolerance=2e-6)
    told = plan(fast)
    assert told["precision_run"] == "f32"
    assert 0 <= told["error"] < 1e-5


def test_fp32_by_name_is_the_same() -> None:
    module = make(Wide)
    for precision in ("fp32", "f32", "float32", None):
        fast = ovshim.accelerate(module, torch.randn(4, 64), precision=precision, prefer="openvino")
        check(fast, module, torch.randn(4, 64), tolerance=2e-6)
        assert plan(fast)["precision_run"] == "f32"
        assert ovshim.explain(fast).to_dict()["precision"] == "fp32"


def test_weights_that_fp16_cannot_hold_stay_exact() -> None:
    """An IR compressed to fp16 would lose them."""
    module = nn.Sequential(nn.Linear(64, 64)).eval()
    with torch.no_grad():
        module[0].weight.mul_(1e-6)
        module[0].bias.fill_(1e5 + 1)
    fast = ovshim.accelerate(module, torch.randn(4, 64), prefer="openvino")
    with served(fast, "openvino"), torch.inference_mode():
        x = torch.randn(4, 64) * 1e5
        torch.testing.assert_close(fast(x), module(x), rtol=1e-6, atol=1e-3)


def test_a_tolerance_that_is_too_strict_is_eager() -> None:
    module = make(OneLayer)
    with falls_back("proof-failed") as told:
        fast = ovshim.accelerate(
            module, torch.randn(4, 64), precision="bf16", tolerance=1e-6, prefer="openvino"
        )
    reason = told[0].reason
    assert "tolerance" in reason.remedy
    assert plan(fast)["path"] == "eager"
    assert plan(fast)["reason"]["code"] == "proof-failed"
    check(fast, module, torch.randn(4, 64), path="eager", reason="proof-failed", tolerance=0.0)


@pytest.mark.parametrize("tolerance", [0.05, "loose", "strict", 1e-3])
def test_a_tolerance_that_suffices(tolerance: Any) -> None:
    module = make(Wide)
    fast = ovshim.accelerate(
        module, torch.randn(4, 64), precision="fp32", tolerance=tolerance, prefer="openvino"
    )
    check(fast, module, torch.randn(4, 64), tolerance=2e-6)


# Lower precision of an fp32 module


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_lower_precision_of_an_fp32_module(precision: str) -> None:
    module = make(Wide)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fast = ovshim.accelerate(
            module, torch.randn(16, 64), precision=precision, prefer="openvino"
        )
    x = torch.randn(16, 64)
    actual = check(fast, module, x, tolerance=0.03)
    assert actual.dtype == torch.float32
    told = plan(fast)
    report = ovshim.explain(fast).to_dict()
    assert report["precision"] == precision
    assert told["precision_run"] in {*LOWER, "f32"}
    said = [entry.message for entry in caught]
    if told["precision_run"] == {"bf16": "bf16", "fp16": "f16"}[precision]:
        assert said == []
    else:
        (warning,) = said
        assert isinstance(warning, ovshim.PrecisionWarning)
        assert warning.value == precision
        assert f"runs it in {told['precision_run']}" in str(warning)
    with torch.inference_mode():
        off = error(actual, module(x))
    if told["precision_run"] in LOWER:
        assert 1e-5 < off < 0.03
        assert 1e-5 < told["error"] < 0.03
    else:
        assert off < 1e-5


def test_what_one_thread_finds_is_not_taken_for_bf16() -> None:
    """With one thread to a stream bf16 runs in f32: a proof of that, or a refusal, is of f32."""
    if "bf16" not in {name for device in ovshim.devices() for name in device.precisions}:
        pytest.skip("this processor runs bf16 in f32 either way")
    module, x = make(Wide), torch.randn(16, 64)

    def made(threads: int, tolerance: float | None = None) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fast = ovshim.accelerate(
                copy.deepcopy(module),
                x,
                precision="bf16",
                prefer="openvino",
                threads=threads,
                tolerance=tolerance,
            )
        return plan(fast)

    first, second = made(1), made(2)
    assert (first["precision_run"], second["precision_run"]) == ("f32", "bf16")
    assert second["cache"] == "hit"
    manifest = read_sealed(Path(second["cache_path"]) / MANIFEST)
    assert manifest["proof"]["proved_in"] == ["bf16 as f32", "bf16 as bf16"]
    refused, taken = made(2, 1e-4), made(1, 1e-4)
    assert taken["path"] == "openvino"
    assert refused["reason"]["code"] == "proof-failed"


def test_nothing_is_said_where_nothing_is_multiplied() -> None:
    """A warning, which the tests take for an error, would be about what a hint is not for."""
    module = make(lambda: nn.Sequential(nn.Embedding(10, 8), nn.LayerNorm(8)))  # type: ignore[arg-type]
    ids = torch.randint(0, 10, (2, 5))
    for precision in ("bf16", "fp16"):
        fast = ovshim.accelerate(module, ids, precision=precision, prefer="openvino")
        check(fast, module, ids, tolerance=0.03)


def test_precision_is_part_of_the_plan_and_of_the_cache() -> None:
    """The same weights in another precision are another entry, in whatever order."""
    module = make(Wide)
    x = torch.randn(16, 64)
    with torch.inference_mode():
        expected = module(x)
    for _ in range(2):
        for precision, least, most in (("bf16", 1e-5, 0.03), ("fp32", 0.0, 2e-6)):
            fast = ovshim.accelerate(module, x, precision=precision, prefer="openvino")
            with torch.inference_mode():
                off = error(fast(x), expected)
            assert off <= most
            if plan(fast)["precision_run"] in LOWER:
                assert off >= least


def test_dtypes_and_integers_survive_lower_precision() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(64, 64)

        def forward(self, x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            y = self.linear(x)
            return y, ids * 1001, ids > 3

    module = make(Mixed)
    ids = torch.tensor([5, 300, 16_385, 30_003])
    fast = ovshim.accelerate(module, (torch.randn(4, 64), ids), precision="bf16", prefer="openvino")
    check(fast, module, torch.randn(4, 64), ids - 2, tolerance=0.03)


# Modules in lower precision


def upcast_error(module: nn.Module, x: Tensor) -> float:
    """Error of eager in its own dtype against its fp32 upcast."""
    with torch.inference_mode():
        return error(module(x).float(), copy.deepcopy(module).float()(x.float()))


def computes_in(hint: str) -> str:
    """What the processor makes of a module in fp32 with that precision asked for."""
    with quietly(), as_it_runs():
        fast = ovshim.accelerate(
            make(Wide), torch.randn(4, 64), precision=hint, prefer="openvino", cache_dir=False
        )
    return str(plan(fast)["precision_run"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("make_module", "size"),
    [
        pytest.param(lambda: make(Wide), (16, 64), id="mlp"),
        pytest.param(lambda: make(Attention), (2, 5, 16), id="attention"),
    ],
)
def test_a_module_in_lower_precision(
    make_module: Any, size: tuple[int, ...], dtype: torch.dtype
) -> None:
    module = make_module().to(dtype)
    name = {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    if dtype == torch.float16 and computes_in("fp16") == "bf16":
        # The processor has no f16: OpenVINO computes in bf16, which is not good enough for a
        # module in fp16.
        with quietly():
            fast = ovshim.accelerate(module, torch.randn(size).to(dtype), prefer="openvino")
        if paths(fast) == ["eager"]:
            assert plan(fast)["reason"]["code"] == "proof-failed"
            check(fast, module, torch.randn(size).to(dtype), path="eager", tolerance=0.0)
            return
    else:
        fast = ovshim.accelerate(module, torch.randn(size).to(dtype), prefer="openvino")
    for batch in (size[0], 5):
        x = torch.randn(batch, *size[1:]).to(dtype)
        with served(fast, "openvino"), torch.inference_mode():
            actual = fast(x)
        assert actual.dtype == dtype
        with torch.inference_mode():
            exact = copy.deepcopy(module).float()(x.float())
        assert error(actual.float(), exact) <= 1.5 * upcast_error(module, x) + 2e-3
    assert ovshim.explain(fast).to_dict()["precision"] == name
    assert plan(fast)["precision_run"] in {*LOWER, "f32"}


@pytest.mark.slow
def test_a_bfloat16_module_with_a_tolerance_of_its_own() -> None:
    module = make(Wide).bfloat16()
    x = torch.randn(16, 64).bfloat16()
    fast = ovshim.accelerate(module, x, tolerance=0.05, prefer="openvino")
    with served(fast, "openvino"), torch.inference_mode():
        assert fast(x).dtype == torch.bfloat16
    with quietly():
        strict = ovshim.accelerate(module, x, tolerance=1e-9, prefer="openvino")
    assert paths(strict) != ["openvino"]
    assert plans(strict)[0]["reason"]["code"] == "proof-failed"


def test_a_bert_in_bfloat16() -> None:
    module = small_bert().bfloat16()
    ids = torch.randint(0, 100, (2, 9))
    fast = ovshim.accelerate(module, {"input_ids": ids}, prefer="openvino")
    with served(fast, "openvino"), torch.inference_mode():
        output = fast(input_ids=ids)
        exact = copy.deepcopy(module).float()(input_ids=ids)
        own = module(input_ids=ids)
    assert output.last_hidden_state.dtype == torch.bfloat16
    allowed = 1.5 * error(own.last_hidden_state, exact.last_hidden_state) + 2e-3
    assert error(output.last_hidden_state, exact.last_hidden_state) <= allowed


def test_a_module_of_mixed_precision() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(64, 64).bfloat16()
            self.head = nn.Linear(64, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(x.bfloat16()).float())

    module = make(Mixed)
    x = torch.randn(8, 64)
    with quietly():
        fast = ovshim.accelerate(module, x, prefer="openvino")
        check(fast, module, x, path=None, tolerance=0.02)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_precision_fp32_for_a_module_in_lower_precision(dtype: torch.dtype) -> None:
    """Asked for more than the module has: its dtypes stay, its error shrinks or stays."""
    module = make(Wide).to(dtype)
    x = torch.randn(16, 64).to(dtype)
    with quietly():
        fast = ovshim.accelerate(module, x, precision="fp32", prefer="openvino")
        with torch.inference_mode():
            actual = fast(x)
            exact = copy.deepcopy(module).float()(x.float())
    assert actual.dtype == dtype
    assert error(actual.float(), exact) <= 1.1 * upcast_error(module, x)


# float64


def test_a_float64_module_is_not_lowered_in_silence() -> None:
    module = make(Mlp).double()
    with quietly():
        fast = ovshim.accelerate(module, torch.randn(3, 8).double(), prefer="openvino")
        check(fast, module, torch.randn(3, 8).double(), path=None, tolerance=1e-12)


def test_a_float64_input_of_an_fp32_module() -> None:
    class Casts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x.float())

    module = make(Casts)
    with quietly():
        fast = ovshim.accelerate(module, torch.randn(3, 8).double(), prefer="openvino")
        check(fast, module, torch.randn(3, 8).double(), path=None)


def test_float64_inside_an_fp32_module() -> None:
    """Cancellation that only float64 survives."""

    class Inside(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x.double()
            return ((y + 1e9) - 1e9).float() + x

    module = Inside().eval()
    with quietly():
        fast = ovshim.accelerate(module, torch.randn(3, 8), prefer="openvino")
        check(fast, module, torch.randn(3, 8), path=None)


def test_float64_asked_to_run_in_fp32() -> None:
    module = make(Mlp).double()
    x = torch.randn(3, 8).double()
    with quietly():
        fast = ovshim.accelerate(module, x, precision="fp32", prefer="openvino")
        check(fast, module, x, path=None, tolerance=1e-4)


# What is compared, and how


def test_an_output_of_zeros() -> None:
    class Zero(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 4)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.linear(x)
            return y, (y * 0)

    module = make(Zero)
    fast = ovshim.accelerate(module, torch.randn(3, 8), prefer="openvino")
    check(fast, module, torch.randn(3, 8))


def test_tiny_and_huge_outputs_are_compared_each_by_its_own_size() -> None:
    class Scales(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 4)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.linear(x)
            return y * 1e-12, y * 1e12

    module = make(Scales)
    fast = ovshim.accelerate(module, torch.randn(3, 8), prefer="openvino")
    check(fast, module, torch.randn(3, 8))


def test_an_output_that_overflows_fp16_is_not_served_in_it() -> None:
    module = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).eval()
    with torch.no_grad():
        module[0].weight.mul_(2e4)
        module[1].weight.mul_(1e-4)
    x = torch.randn(4, 64) * 100
    with quietly():
        fast = ovshim.accelerate(module, x, precision="fp16", prefer="openvino")
        with torch.inference_mode():
            for _ in range(2):
                same(fast(x), module(x), 0.03)


@pytest.mark.parametrize("given", ["fp16", {"default": "fp16"}], ids=["whole", "by rules"])
def test_later_calls_that_leave_float16_are_eagers(given: Any, tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.LayerNorm(64)).eval()
    fast: Any
    with quietly(), as_it_runs():
        fast = ovshim.accelerate(module, torch.randn(4, 64), precision=given, prefer="openvino")
        fast.ovshim.save(tmp_path / "saved")
        cached = ovshim.accelerate(
            copy.deepcopy(module), torch.randn(4, 64), precision=given, prefer="openvino"
        )
        loaded = ovshim.load(tmp_path / "saved")
    assert plans(cached)[0]["cache"] == "hit"
    for one in (fast, cached, loaded):
        for scale, path in ((1.0, "openvino"), (3e5, "eager"), (1e8, "eager"), (1.0, "openvino")):
            if one is loaded and path == "eager":
                with torch.no_grad(), pytest.raises(ovshim.FallbackError, match="float16"):
                    one(torch.randn(3, 64) * scale)
            else:
                check(one, module, torch.randn(3, 64) * scale, path=path, tolerance=0.03)


def test_a_later_output_that_float16_ends_is_eagers() -> None:
    module, x = nn.Linear(64, 64).eval(), torch.randn(4, 64)
    with torch.no_grad():
        module.weight.mul_(100)
    with quietly(), as_it_runs():
        fast = ovshim.accelerate(module, x, precision="fp16", prefer="openvino")
        check(fast, module, x, tolerance=0.03)
        # Where float16 does not run, this is nothing to give up.
        half = plans(fast)[0]["precision_run"] == "f16"
        check(fast, module, x * 1e4, path="eager" if half else "openvino", tolerance=0.03)


@pytest.mark.parametrize(
    ("make_module", "size"),
    [
        pytest.param(lambda: make(DigitsCnn), (4, 1, 16, 16), id="cnn"),
        pytest.param(lambda: make(Recurrent), (4, 5, 8), id="lstm"),
    ],
)
def test_real_layers_in_bf16(make_module: Any, size: tuple[int, ...]) -> None:
    module = make_module()
    with quietly():
        fast = ovshim.accelerate(module, torch.randn(size), precision="bf16", prefer="openvino")
        check(fast, module, torch.randn(size), path=None, tolerance=0.03)


def test_the_precision_of_the_process_is_left_alone() -> None:
    module = make(Mlp)
    before = torch.get_float32_matmul_precision()
    ovshim.accelerate(module, torch.randn(3, 8), precision="bf16", prefer="openvino")
    assert torch.get_float32_matmul_precision() == before
    tiny = torch.full((4,), 1e-39)
    assert (tiny * 0.5 != 0).all(), "denormals must not be flushed in the caller's thread"


def test_a_precision_that_moves_with_the_module() -> None:
    """`precision` left out means the module's own, also after it changed."""
    module = make(Wide)
    fast = ovshim.accelerate(module, torch.randn(4, 64), prefer="openvino")
    fast.bfloat16()
    x = torch.randn(4, 64).bfloat16()
    settle(fast, module, x, tolerance=0.02)
    fast.float()
    settle(fast, module, x.float(), tolerance=2e-6)
