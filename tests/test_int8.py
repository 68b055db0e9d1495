"""int8 and compressed weights: as exact as is promised, kept in the cache, silent on stdout."""

import copy
import importlib
import logging
import pickle
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from checks import check, falls_back, paths, plans, quietly, same, served
from modules import DigitsCnn, make, small_bert
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import ovshim
from ovshim import floats, proof, runtime, tiny
from ovshim.cli import digits
from ovshim.precision import graphs, quantize
from ovshim.progress import bar
from ovshim.race import Finish


def images(count: int, seed: int = 0) -> Tensor:
    return torch.rand(count, 1, 16, 16, generator=torch.Generator().manual_seed(seed))


def plan(fast: nn.Module) -> dict[str, Any]:
    (only,) = plans(fast)
    return only


def weights_in_bytes(fast: nn.Module) -> int:
    return (Path(plan(fast)["cache_path"]) / "model.bin").stat().st_size


def make_int8(module: nn.Module, **changes: Any) -> nn.Module:
    options: dict[str, Any] = {"calibration": [images(4, n) for n in range(6)], **changes}
    options = {"precision": "int8", "prefer": "openvino", **options}
    return ovshim.accelerate(module, images(4), **options)


def test_int8() -> None:
    module = make(DigitsCnn)
    fast = make_int8(module)
    for batch in (4, 1, 9):
        check(fast, module, images(batch, 7), tolerance=0.1)
    told = plan(fast)
    assert told["precision_run"] == "i8"
    assert told["preset"] in ("default", "minmax")
    assert 1e-4 < told["error"] < 0.1
    assert ovshim.explain(fast).to_dict()["precision"] == "int8"
    assert told["preset"] in str(ovshim.explain(fast))


def test_a_trained_network_keeps_its_accuracy() -> None:
    """Within 0.3 points on 500 digits that neither training nor calibration has seen."""
    seen, held_out = digits.glyphs(seed=0)
    net = digits.train(seen, seed=0, progress=False)
    labelled = TensorDataset(seen.images, seen.labels)
    fast = ovshim.accelerate(
        net,
        held_out.images[:50],
        precision="int8",
        calibration=DataLoader(labelled, batch_size=20),
        prefer="openvino",
    )
    with served(fast, "openvino", calls=10), torch.inference_mode():
        answers = torch.cat([fast(part).argmax(1) for part in held_out.images.split(50)])
        exact = net(held_out.images).argmax(1)
    right, right_in_int8 = (
        (found == held_out.labels).float().mean().item() for found in (exact, answers)
    )
    assert right > 0.95
    assert right_in_int8 >= right - 0.003
    assert plan(fast)["precision_run"] == "i8"


@pytest.mark.slow
def test_int8_is_a_quarter_of_the_size() -> None:
    module = make(DigitsCnn)
    exact = ovshim.accelerate(module, images(4), prefer="openvino")
    assert weights_in_bytes(make_int8(module)) < 0.35 * weights_in_bytes(exact)


def labelled() -> Iterator[tuple[Tensor, Tensor]]:
    for n in range(6):
        yield images(4, n), torch.arange(4)


@pytest.mark.parametrize(
    "calibration",
    [
        pytest.param(lambda: (image for image, _ in labelled()), id="generator"),
        pytest.param(labelled, id="generator with labels"),
        pytest.param(lambda: DataLoader(TensorDataset(images(24), torch.arange(24))), id="loader"),
        pytest.param(
            lambda: [{"x": image, "labels": label} for image, label in labelled()], id="by name"
        ),
    ],
)
def test_calibration_data_of_every_kind(calibration: Any) -> None:
    module = make(DigitsCnn)
    fast = make_int8(module, calibration=calibration())
    check(fast, module, images(3, 8), tolerance=0.1)
    assert plan(fast)["precision_run"] == "i8"


def test_data_of_sizes_that_the_graph_does_not_take() -> None:
    class Single(nn.Module):
        """Goes another way for a batch of one."""

        def __init__(self) -> None:
            super().__init__()
            self.one, self.many = nn.Linear(16, 32), nn.Linear(16, 32)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = (self.one if x.shape[0] == 1 else self.many)(x)
            return y

    module, data = make(Single), [torch.randn(2, 16) for _ in range(12)]
    with quietly():
        fast = ovshim.accelerate(
            module, torch.randn(1, 16), precision="int8", calibration=data, prefer="openvino"
        )
        assert plan(fast)["reason"]["code"] == "calibration-unfit"
        assert "s0[0] == 1" in plan(fast)["reason"]["message"]
        check(fast, module, torch.randn(1, 16), path="eager")


def test_an_embedding_that_is_normalized_keeps_its_neighbours() -> None:
    """A cosine of 0.995 may have lost them: what is asserted is who is next to whom."""

    class Embeds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64))

        def forward(self, x: Tensor) -> Tensor:
            return F.normalize(self.body(x), dim=-1)

    module = make(Embeds)
    points = torch.randn(400, 32) * torch.logspace(0, 1, 400)[torch.randperm(400), None]
    with torch.inference_mode():
        exact = nearest(module(points))
    example, data = points[:8], points.split(8)
    kept = ovshim.accelerate(
        module, example, precision="int8", calibration=data, prefer="openvino", tolerance=1.0
    )
    with served(kept, "openvino"), torch.inference_mode():
        agreement = (nearest(kept(points)) == exact).float().mean().item()
    assert plan(kept)["precision_run"] == "i8"
    assert agreement > 0.8, agreement
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantize, "_NORMALIZATION", ())
        lost = ovshim.accelerate(
            module, example, precision="int8", calibration=data, prefer="openvino", tolerance=1.0
        )
    with served(lost, "openvino"), torch.inference_mode():
        assert (nearest(lost(points)) == exact).float().mean().item() < agreement - 0.15


def nearest(points: Tensor) -> Tensor:
    near = points @ points.T
    return near.fill_diagonal_(-2).argmax(1)


@pytest.mark.slow
def test_a_transformer() -> None:
    module = small_bert(hidden_size=64, intermediate_size=128)
    generator = torch.Generator().manual_seed(0)
    data = [
        {
            "input_ids": torch.randint(0, 100, (2, length), generator=generator),
            "attention_mask": torch.ones(2, length, dtype=torch.int64),
            "labels": torch.zeros(2),
        }
        for length in (9, 9, 12, 7, 9, 9)
    ]
    example = {name: data[0][name] for name in ("input_ids", "attention_mask")}
    fast = ovshim.accelerate(
        module, example, precision="int8", calibration=data, prefer="openvino", tolerance=0.15
    )
    # Lengths that calibration data shows to change are open.
    for item in data[:4]:
        call = {name: item[name] for name in example}
        with served(fast, "openvino"), torch.inference_mode():
            same(fast(**call), module(**call), 0.15)
    assert plan(fast)["precision_run"] == "i8"


@pytest.mark.parametrize("better", ["default", "minmax"])
def test_the_better_preset_is_kept(better: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Judged by samples that no range was taken from."""
    learned, judged = [[torch.zeros(1)]] * 3, [[torch.ones(1)]]
    seen: list[Any] = []

    def quantized(nncf: Any, model: str, inputs: Any, ignored: Any, preset: str) -> str:
        seen.append([given.item() for (given,) in inputs])
        return preset

    monkeypatch.setattr(quantize, "_quantized", quantized)
    monkeypatch.setattr(graphs, "run", lambda model, inputs: (model, inputs))
    monkeypatch.setattr(graphs, "error", lambda exact, other: 0.01 if other[0] == better else 0.02)
    made = quantize.quantize("exact", learned, judged, [], lambda items, title: items)  # type: ignore[arg-type]
    assert seen == [[0.0] * 3] * 2
    assert (made.model, made.preset) == (better, better)
    assert sorted(made.errors.values()) == [0.01, 0.02]


# The rest of the graph


def wins(monkeypatch: pytest.MonkeyPatch, slow: float, fast: float, low: float) -> list[Finish]:
    """Let bf16 have these seconds beside fp32. Gives the races that are run."""
    if not any(d.name == "CPU" and "bf16" in d.precisions for d in runtime.devices()):
        pytest.skip("the processor has no bf16")
    races: list[Finish] = []

    def race(*_: Any) -> Finish:
        races.append(Finish(slow, fast, low, low + 0.1))
        return races[-1]

    monkeypatch.setattr(floats, "race", race)
    return races


def hints(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The precisions that OpenVINO is told of graphs that it compiles from now on."""
    told: list[str] = []
    compile_model = runtime.compile_model

    def noted(source: Path, device: str, settings: Any, sizes: Any = None) -> Any:
        told.append(settings["INFERENCE_PRECISION_HINT"])
        return compile_model(source, device, settings, sizes)

    monkeypatch.setattr(runtime, "compile_model", noted)
    return told


@pytest.mark.parametrize(
    ("precision", "slow", "fast", "low", "rest"),
    [
        ("int8", 1.0, 0.5, 1.8, "bf16"),
        ("int8", 1.0, 0.95, 1.02, "f32"),
        ("int8", 1.0, 2.0, 0.4, "f32"),
        ("int8_weights", 1.0, 0.5, 1.8, "bf16"),
        ("int8_weights", 1.0, 2.0, 0.4, "f32"),
        pytest.param("int4_weights", 1.0, 0.5, 1.8, "bf16", marks=pytest.mark.slow),
    ],
)
def test_what_is_not_int8_runs_in_bf16_where_that_is_faster(
    precision: str,
    slow: float,
    fast: float,
    low: float,
    rest: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Measured once; the verdict is kept with the entry."""
    races, told = wins(monkeypatch, slow, fast, low), hints(monkeypatch)
    monkeypatch.setattr(tiny, "_is_small", lambda source: False)  # which is tried in more ways
    module = make(DigitsCnn)
    make_int8(module, precision=precision)
    assert told == ["f32", "bf16", rest]
    fast_one = make_int8(module, precision=precision)
    check(fast_one, module, images(3), tolerance=0.15)
    assert told[3:] == [rest]
    assert len(races) == 1
    if precision != "int8":
        assert plan(fast_one)["precision_run"] == rest


class OnAGrid(nn.Module):
    """Its weights lose nothing in eight bits."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 256))
        with torch.no_grad():
            for layer in self.layers:
                layer.weight.copy_(torch.randint(-128, 128, (256, 256)) / 2048)  # type: ignore[operator, union-attr]
                layer.weight[:, 0], layer.weight[:, 1] = -128 / 2048, 127 / 2048  # type: ignore[index, operator]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.layers(x)
        return out


def test_bf16_that_is_not_exact_enough_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    wins(monkeypatch, 1.0, 0.5, 1.8)
    told = hints(monkeypatch)
    module, x = make(OnAGrid), torch.randn(4, 256)
    asked: Any = {"precision": "int8_weights", "prefer": "openvino", "tolerance": 2e-4}
    first = ovshim.accelerate(module, x, **asked)
    assert told.index("bf16") == 1  # the race
    assert told[-1] == "f32"
    tried = len(told)
    assert plan(first)["precision_run"] == "f32"
    check(first, module, torch.randn(7, 256), tolerance=2e-4)
    second = ovshim.accelerate(module, x, **asked)  # nobody tries again
    assert caches(second) == "hit"
    assert set(told[tried:]) == {"f32"}


def test_bf16_is_proved_wholly_where_an_entry_was_made_without(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wins(monkeypatch, 1.0, 0.9, 0.95)  # nothing is decided, nothing kept
    module, x = make(OnAGrid), torch.randn(4, 256)
    asked: Any = {"precision": "int8_weights", "prefer": "openvino"}
    first = ovshim.accelerate(module, x, **asked)
    assert (caches(first), plan(first)["precision_run"]) == ("miss", "f32")
    wins(monkeypatch, 1.0, 0.5, 1.8)
    asked_of: list[Any] = []
    prove = proof.prove

    def noted(*given: Any) -> Any:
        asked_of.append(given)
        return prove(*given)

    monkeypatch.setattr(proof, "prove", noted)
    for whole in (1, 1):
        fast = ovshim.accelerate(module, x, **asked)
        assert (caches(fast), plan(fast)["precision_run"]) == ("hit", "bf16")
        assert plan(fast)["error"] > 1e-3
        assert len(asked_of) == whole
    check(fast, module, torch.randn(7, 256), tolerance=0.03)


@pytest.mark.parametrize(
    "properties", [{"DYNAMIC_QUANTIZATION_GROUP_SIZE": 32}, {"KV_CACHE_PRECISION": "f32"}]
)
def test_what_acts_in_fp32_alone_keeps_floats_there(
    properties: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    races, told = wins(monkeypatch, 1.0, 0.5, 1.8), hints(monkeypatch)
    module, x = make(OnAGrid), torch.randn(4, 256)
    ovshim.accelerate(module, x, precision="int8_weights", properties=properties, prefer="openvino")
    assert (set(told), races) == ({"f32"}, [])


# The cache


def caches(fast: nn.Module) -> str:
    return str(plan(fast)["cache"])


def test_the_second_process_quantizes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    module = make(DigitsCnn)
    first = make_int8(module)
    assert caches(first) == "miss"
    monkeypatch.delattr(quantize, "quantize")
    second = make_int8(module)
    assert caches(second) == "hit"
    assert plan(second)["preset"] == plan(first)["preset"]
    with torch.inference_mode():
        same(second(images(5)), first(images(5)), 1e-6)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"calibration": [images(4, n) for n in range(5)]}, id="fewer samples"),
        pytest.param({"calibration": [images(4, n) for n in (1, 0, 2, 3, 4, 5)]}, id="order"),
        pytest.param({"transform": lambda x: x * 0.99}, id="transform"),
    ],
)
def test_other_calibration_data_is_another_entry(changes: dict[str, Any]) -> None:
    module = make(DigitsCnn)
    make_int8(module)
    assert caches(make_int8(module, **changes)) == "miss"


@pytest.mark.slow
def test_other_parameters_are_another_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    module = make(DigitsCnn)
    make_int8(module)
    monkeypatch.setattr(quantize, "_PRESETS", ("minmax",))
    other = make_int8(module)
    assert (caches(other), plan(other)["preset"]) == ("miss", "minmax")


def test_a_cache_filled_in_one_precision_and_read_in_another() -> None:
    module = make(DigitsCnn)
    with torch.inference_mode():
        expected = module(images(4))
    for _ in range(2):
        errors = {}
        for precision in ("int8", "int8_weights", "fp32", "int4_weights", None):
            fast = ovshim.accelerate(
                module, images(4), precision=precision, calibration=[images(4)], prefer="openvino"
            )
            with served(fast, "openvino"), torch.inference_mode():
                errors[precision] = float((fast(images(4)) - expected).norm() / expected.norm())
        assert errors["fp32"] < 1e-6
        assert errors[None] < 1e-6
        assert min(errors[p] for p in ("int8", "int8_weights", "int4_weights")) > 1e-4


# Weights alone


@pytest.mark.parametrize(("precision", "share"), [("int8_weights", 0.3), ("int4_weights", 0.2)])
def test_compressed_weights(precision: str, share: float) -> None:
    module = make(lambda: nn.Sequential(*(nn.Linear(256, 256) for _ in range(4))))  # type: ignore[arg-type]
    x = torch.randn(4, 256)
    exact = ovshim.accelerate(module, x, prefer="openvino")
    fast = ovshim.accelerate(module, x, precision=precision, prefer="openvino")
    check(fast, module, torch.randn(7, 256), tolerance=0.2)
    told = plan(fast)
    assert told["precision_run"] in ("f32", "bf16")
    assert told["error"] > 1e-4
    # Half a byte each, but for the last layer's, which stay in 8 bits.
    assert weights_in_bytes(fast) < (share + 0.1) * weights_in_bytes(exact)
    graph = runtime.core().read_model(Path(told["cache_path"]) / "model.xml")
    constants = [node for node in graph.get_ops() if node.get_type_name() == "Constant"]
    of = {"int8_weights": ("u8", [256, 256]), "int4_weights": ("u4", [256, 4, 64])}[precision]
    packed = [(c.get_element_type().get_type_name(), list(c.shape)) for c in constants]
    assert packed.count(of) >= 3, "groups are of 64 weights, whatever NNCF's default is"


def test_activations_are_not_quantized_behind_ones_back() -> None:
    """OpenVINO's default does so where weights are compressed: asked for, the error grows."""
    module = make(lambda: nn.Sequential(nn.Linear(512, 512), nn.Linear(512, 8)))  # type: ignore[arg-type]
    x = torch.randn(4, 512) * torch.logspace(-2, 2, 512)
    plain = ovshim.accelerate(module, x, precision="int8_weights", prefer="openvino")
    asked = ovshim.accelerate(
        module,
        x,
        precision="int8_weights",
        properties={"DYNAMIC_QUANTIZATION_GROUP_SIZE": 512},
        tolerance=1.0,
        prefer="openvino",
    )
    assert plan(plain)["error"] < plan(asked)["error"]


def test_compressed_weights_of_a_bfloat16_module() -> None:
    module = make(lambda: nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 8)))  # type: ignore[arg-type]
    module = module.bfloat16()
    x = torch.randn(4, 64).bfloat16()
    fast = ovshim.accelerate(module, x, precision="int8_weights", prefer="openvino")
    with served(fast, "openvino"), torch.inference_mode():
        same(fast(x), module(x), 0.03)


# What can go wrong


def test_data_that_is_no_call_of_the_module() -> None:
    with pytest.raises(ovshim.CalibrationError, match="float64") as caught:
        make_int8(make(DigitsCnn), calibration=[images(4).double()])
    assert type(caught.value) is ovshim.CalibrationError


def test_a_call_that_the_data_says_nothing_of() -> None:
    """Not a mistake at that moment: eager answers it, with the reason."""

    class Masks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            y: Tensor = self.linear(x)
            return y if mask is None else y * mask

    module = make(Masks)
    data = [torch.randn(4, 8) for _ in range(5)]
    fast = ovshim.accelerate(
        module, data[0], precision="int8", calibration=data, prefer="openvino", tolerance=0.2
    )
    with falls_back("calibration-unfit"):
        check(fast, module, data[0], torch.ones(4, 8), path="eager", reason="calibration-unfit")


def test_without_an_example_the_first_call_is_one() -> None:
    module = make(DigitsCnn)
    fast = ovshim.accelerate(
        module, precision="int8", calibration=[images(4, n) for n in range(5)], prefer="openvino"
    )
    check(fast, module, images(4), path="eager", tolerance=0.0)
    check(fast, module, images(4), tolerance=0.1)


def test_data_that_cannot_be_read_is_a_mistake_at_any_time() -> None:
    fast = ovshim.accelerate(
        make(DigitsCnn), precision="int8", calibration=TensorDataset(images(4)[:0])
    )
    with pytest.raises(ovshim.CalibrationError), torch.inference_mode():
        fast(images(4))


def test_a_tolerance_that_int8_cannot_meet() -> None:
    module = make(DigitsCnn)
    with falls_back("proof-failed"):
        fast = make_int8(module, tolerance=1e-6)
    check(fast, module, images(4), path="eager", reason="proof-failed", tolerance=0.0)


def test_what_has_no_kernels_in_integers_is_told() -> None:
    module = make(lambda: nn.LSTM(16, 32, batch_first=True))  # type: ignore[arg-type]
    data = [torch.randn(2, 8, 16) for _ in range(8)]
    with pytest.warns(ovshim.PrecisionWarning, match="int8: OpenVINO runs it in") as told:
        fast = ovshim.accelerate(
            module, data[0], precision="int8", calibration=data, prefer="openvino"
        )
    assert len(told) == 1
    assert paths(fast) == ["openvino"]
    assert plan(fast)["precision_run"] != "i8"


@pytest.mark.parametrize("precision", ["int8", "int4_weights", "auto", {"head": "int8"}])
def test_without_nncf(precision: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ovshim.OptionError, match=r"pip install 'ovshim\[int8\]'"):
        ovshim.accelerate(make(DigitsCnn), precision=precision, calibration=[images(4)])


# Manners


def test_the_import_of_nncf_moves_no_generator(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[float] = []
    monkeypatch.setattr(importlib, "import_module", lambda name: drawn.append(random.random()))
    before = random.getstate()
    quantize._import()
    assert drawn
    assert random.getstate() == before


def test_nncf_neither_prints_nor_leaves_anything_behind(capfd: pytest.CaptureFixture[str]) -> None:
    loggers = logging.getLoggerClass()
    module = make(DigitsCnn)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    fast = make_int8(module, progress=False)
    ovshim.accelerate(module, images(4), precision="int4_weights", prefer="openvino")
    assert paths(fast) == ["openvino"]
    assert capfd.readouterr() == ("", "")
    assert logging.getLoggerClass() is loggers
    assert logging.getLogger("nncf").handlers
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize(
    ("asked", "terminal", "shown"),
    [(None, True, True), (None, False, False), (False, True, False), (True, False, True)],
)
def test_bars_are_for_terminals(
    asked: bool | None,
    terminal: bool,
    shown: bool,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    assert list(bar([1, 2], "auto", ovshim.Options(progress=asked))) == [1, 2]
    out, err = capsys.readouterr()
    assert out == ""
    assert ("ovshim: auto" in err) is shown


def test_a_bar_where_one_is_asked_for(capfd: pytest.CaptureFixture[str]) -> None:
    make_int8(make(DigitsCnn), progress=True)
    out, err = capfd.readouterr()
    assert out == ""
    assert "ovshim: int8" in err


@pytest.mark.slow
def test_copies_and_pickles_take_their_data_along() -> None:
    module = make(DigitsCnn)
    fast = make_int8(
        module,
        calibration=DataLoader(TensorDataset(images(12)), collate_fn=lambda rows: rows[0][0]),
        transform=lambda row: row[None],
    )
    for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        with quietly(), torch.inference_mode():
            other(images(4))
        check(other, module, images(4), tolerance=0.1)
        assert caches(other) == "hit"
