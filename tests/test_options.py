"""Options: what is understood, what is refused, and that the record is a value."""

import copy
import dataclasses
import enum
import itertools
import math
import pickle
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ovshim.errors import CalibrationError, OptionError
from ovshim.options import OptionFields, Options, enabled_in_environment, resolve


def stored(**fields: Any) -> Any:
    """What becomes of the one field given."""
    return getattr(Options(**fields), next(iter(fields)))


UNDERSTOOD = [
    ("device", "cpu", "CPU"),
    ("device", "gpu.1", "GPU.1"),
    ("device", "AUTO", "AUTO"),
    ("device", "Auto: gpu, cpu", "AUTO:GPU,CPU"),
    ("device", "AUTO:-GPU.0", "AUTO:-GPU.0"),
    ("device", "HETERO:GPU.1,CPU", "HETERO:GPU.1,CPU"),
    ("device", "MULTI:CPU(2),GPU(4)", "MULTI:CPU(2),GPU(4)"),
    ("precision", None, None),
    ("precision", "f32", "fp32"),
    ("precision", "FP32", "fp32"),
    ("precision", "float32", "fp32"),
    ("precision", "bfloat16", "bf16"),
    ("precision", "BF16", "bf16"),
    ("precision", "f16", "fp16"),
    ("precision", "half", "fp16"),
    ("precision", "int8_weights", "int8_weights"),
    ("precision", "INT4_WEIGHTS", "int4_weights"),
    ("precision", "auto", "auto"),
    ("precision", {"default": "FP16", "head": "f32"}, {"default": "fp16", "head": "fp32"}),
    ("tolerance", None, None),
    ("tolerance", "strict", 0.002),
    ("tolerance", "loose", 0.05),
    ("tolerance", 1, 1.0),
    ("tolerance", np.float64(0.25), 0.25),
    ("calibration", None, None),
    ("calibration", [1, 2], [1, 2]),
    ("calibration", range(3), range(3)),
    ("calibration", iter([1, 2]), (1, 2)),
    ("calibration", itertools.count(), tuple(range(300))),
    ("transform", None, None),
    ("transform", len, len),
    ("dynamic_batch", False, False),
    ("dynamic_shapes", [{0: "batch"}, None], ({0: "batch"}, None)),
    ("dynamic_shapes", {"x": ["batch", None]}, {"x": ("batch", None)}),
    ("prefer", "OpenVINO", "openvino"),
    ("hint", "THROUGHPUT", "throughput"),
    ("streams", np.int64(2), 2),
    ("threads", 3, 3),
    ("properties", {"ENABLE_MMAP": False}, {"ENABLE_MMAP": False}),
    ("methods", ["forward", "decode", "forward"], ("forward", "decode")),
    ("memory", "Shared", "shared"),
    ("background", True, True),
    ("strict", True, True),
    ("cache_dir", None, None),
    ("cache_dir", False, False),
    ("max_plans", np.int64(3), 3),
    ("max_build_seconds", 5, 5.0),
    ("max_build_seconds", math.inf, math.inf),
    ("progress", None, None),
    ("progress", False, False),
]


@pytest.mark.parametrize(("name", "given_value", "expected"), UNDERSTOOD)
def test_understood(name: str, given_value: Any, expected: Any) -> None:
    value = stored(**{name: given_value})
    assert value == expected
    # Equality takes 1 for True and 1.0; a key made of the options does not.
    assert isinstance(value, Mapping) or type(value) is type(expected)


REFUSED = [
    ("device", torch.device("cpu"), "as text"),
    ("device", "", "ovshim.devices()"),
    ("device", "my gpu!", "ovshim.devices()"),
    ("device", "CPÜ", "ovshim.devices()"),
    ("device", "cuda:0", "dot"),
    ("device", "AUTO:", "commas"),
    ("device", "AUTO:GPU;CPU", "commas"),
    ("device", "MULTI:CPU(two)", "commas"),
    ("device", "HETERO", "HETERO:GPU,CPU"),
    ("precision", "int3", "Leave it out"),
    ("precision", torch.float16, "Leave it out"),
    ("precision", "", "Leave it out"),
    ("precision", {}, "Leave it out"),
    ("precision", {"head": "int3"}, '"default"'),
    ("precision", {"head": "auto"}, '"default"'),
    ("precision", {"head": "int4_weights"}, '"default"'),
    ("precision", {"": "fp32"}, '"default"'),
    ("precision", {3: "fp32"}, '"default"'),
    ("tolerance", 0, "relative L2"),
    ("tolerance", -1e-3, "relative L2"),
    ("tolerance", math.nan, "relative L2"),
    ("tolerance", math.inf, "relative L2"),
    ("tolerance", True, "relative L2"),
    ("tolerance", "exact", "relative L2"),
    ("tolerance", max, "relative L2"),
    ("calibration", 3, "into a list"),
    ("calibration", "images", "into a list"),
    ("calibration", {"x": [1, 2]}, "into a list"),
    ("calibration", torch.ones(2, 3), "into a list"),
    ("calibration", [], "some ten inputs"),
    ("transform", 0, "item[0]"),
    ("dynamic_batch", 1, "dynamic_batch=True"),
    ("dynamic_batch", None, "dynamic_batch=True"),
    ("dynamic_shapes", "batch", "batch"),
    ("dynamic_shapes", 3, "batch"),
    ("prefer", "fast", "faster"),
    ("prefer", None, "faster"),
    ("hint", "low-latency", "latency"),
    ("streams", 0, "Leave it out"),
    ("streams", 2.0, "Leave it out"),
    ("streams", True, "Leave it out"),
    ("threads", -1, "Leave it out"),
    ("threads", "4", "Leave it out"),
    ("properties", [("ENABLE_MMAP", False)], "ENABLE_MMAP"),
    ("properties", {1: "x"}, "plain data"),
    ("properties", {"": "x"}, "plain data"),
    ("properties", {"X": None}, "plain data"),
    ("properties", {"X": {"nested": 1}}, "plain data"),
    ("properties", {"INFERENCE_PRECISION_HINT": "f16"}, "precision="),
    ("properties", {"PERFORMANCE_HINT": "LATENCY"}, "hint="),
    ("properties", {"NUM_STREAMS": 2}, "streams="),
    ("properties", {"INFERENCE_NUM_THREADS": 2}, "threads="),
    ("properties", {"CACHE_DIR": "x"}, "cache_dir="),
    ("properties", {"CPU_DENORMALS_OPTIMIZATION": True}, "set_flush_denormal"),
    ("memory", "thin", "'shared'"),
    ("background", 1, "background=True"),
    ("inplace", "yes", "inplace=True"),
    ("methods", "decode", "('decode',)"),
    ("methods", (), "forward"),
    ("methods", None, "forward"),
    ("methods", {"forward"}, "forward"),
    ("methods", ["not a name"], "not a name"),
    ("methods", ["class"], "class"),
    ("methods", [len], "built-in"),
    ("methods", ["__call__"], "__call__"),
    ("strict", 0, "strict=True"),
    ("cache_dir", True, "False"),
    ("cache_dir", "", "False"),
    ("cache_dir", b"bytes", "False"),
    ("cache_dir", 3, "False"),
    ("max_plans", 0, "16"),
    ("max_plans", None, "16"),
    ("max_plans", 2.5, "16"),
    ("max_build_seconds", 0, "120"),
    ("max_build_seconds", math.nan, "120"),
    ("max_build_seconds", None, "120"),
    ("progress", "auto", "progress=True"),
]


@pytest.mark.parametrize(("name", "value", "remedy"), REFUSED)
def test_refused_with_value_allowed_and_remedy(name: str, value: Any, remedy: str) -> None:
    with pytest.raises(OptionError) as caught:
        Options(**{name: value})
    error = caught.value
    assert error.name == name
    assert error.value is value or error.value == value
    assert error.allowed
    assert remedy in error.remedy
    assert str(error).startswith(f"{name}=")
    assert str(error).endswith(error.remedy)


@pytest.mark.parametrize("precision", ["int8", {"default": "fp32", "head": "int8"}])
def test_int8_needs_calibration_data(precision: Any) -> None:
    with pytest.raises(CalibrationError) as caught:
        Options(precision=precision)
    assert caught.value.name == "calibration"
    assert stored(precision=precision, calibration=[1]) == precision


def test_a_generator_without_items_is_no_calibration_data() -> None:
    with pytest.raises(CalibrationError):
        Options(calibration=iter(()))


def test_a_generator_is_gone_through_once() -> None:
    options = Options(calibration=(n for n in range(3)))
    assert dataclasses.replace(options, strict=True).calibration == (0, 1, 2)
    assert pickle.loads(pickle.dumps(options)).calibration == (0, 1, 2)


def test_a_function_as_tolerance_is_for_auto() -> None:
    assert stored(tolerance=max, precision="auto") is max


def test_rules_keep_their_order() -> None:
    """The last match wins, so that the order is half of what they say."""
    rules = {"b.*": "fp32", "default": "bf16", "a": "fp16"}
    assert list(stored(precision=rules).items()) == list(rules.items())


def test_every_field_has_cases() -> None:
    names = {field.name for field in dataclasses.fields(Options)}
    assert {row[0] for row in UNDERSTOOD} | {"inplace"} == names
    assert {row[0] for row in REFUSED} == names


def test_the_two_lists_of_fields_are_one() -> None:
    assert typing.get_type_hints(OptionFields) == typing.get_type_hints(Options)


def test_cache_dir_is_absolute_and_stays_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options = Options(cache_dir="here")
    monkeypatch.chdir(tmp_path.parent)
    assert options.cache_dir == tmp_path / "here"
    assert dataclasses.replace(options, strict=True).cache_dir == tmp_path / "here"


def test_cache_dir_knows_the_home_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(tmp_path))
    assert stored(cache_dir=Path("~/cache")) == tmp_path / "cache"


def test_what_the_user_changes_later_changes_nothing() -> None:
    shapes: dict[str, Any] = {"x": {0: "batch"}, "y": ["batch"]}
    properties: dict[str, str | int] = {"A": 1}
    options = Options(dynamic_shapes=shapes, properties=properties)
    shapes["x"][1] = "length"
    shapes["y"].append("length")
    properties["A"] = 2
    assert options.dynamic_shapes == {"x": {0: "batch"}, "y": ("batch",)}
    assert options.properties == {"A": 1}


def test_nothing_can_be_changed() -> None:
    options: Any = Options(properties={"A": 1}, dynamic_shapes={"x": {0: "batch"}})
    with pytest.raises(dataclasses.FrozenInstanceError):
        options.strict = True
    for mapping in (options.properties, options.dynamic_shapes):
        with pytest.raises(TypeError):
            mapping["A"] = 2


plain = st.fixed_dictionaries(
    {},
    optional={
        "device": st.sampled_from(["cpu", "GPU.1", "AUTO:GPU,CPU"]),
        "precision": st.sampled_from([None, "f32", "bf16", "half"]),
        "tolerance": st.sampled_from(["strict", "loose"]) | st.floats(1e-9, 10.0),
        "dynamic_shapes": st.dictionaries(
            st.text(), st.dictionaries(st.integers(0, 5), st.text()) | st.lists(st.none())
        ),
        "streams": st.none() | st.integers(1, 64),
        "properties": st.dictionaries(
            st.from_regex(r"X_[A-Z]+", fullmatch=True), st.text() | st.integers() | st.booleans()
        ),
        "methods": st.sampled_from([["forward"], ("encode", "decode")]),
        "cache_dir": st.sampled_from([None, False, "somewhere", Path("elsewhere")]),
        "max_plans": st.integers(1, 99),
        "max_build_seconds": st.floats(0.1, math.inf),
    },
)


@given(plain)
def test_options_are_values(fields: dict[str, Any]) -> None:
    """Equal ones hash alike, whichever way they were made; what is normal stays as it is."""
    options = Options(**fields)
    others = [
        Options(**fields),
        dataclasses.replace(options),
        pickle.loads(pickle.dumps(options)),
        copy.deepcopy(options),
        resolve(None, fields),
        resolve(Options(), fields),
        resolve(options, {}),
    ]
    for other in others:
        assert other == options
        assert hash(other) == hash(options)
        assert repr(other) == repr(options)


def test_an_enum_of_text_is_text() -> None:
    class Device(enum.StrEnum):
        FIRST = "cpu"

    assert type(stored(device=Device.FIRST)) is str


@pytest.mark.parametrize(
    ("precision", "expected"), [("fp32", 1e-4), ("bf16", 0.03), ("fp16", 0.03), ("int8", 0.1)]
)
def test_tolerance_by_precision(precision: str, expected: float) -> None:
    assert Options().tolerance_for(precision) == expected
    assert Options(tolerance="strict").tolerance_for(precision) == 0.002
    assert Options(tolerance=0.5).tolerance_for(precision) == 0.5


def test_resolve_lets_a_field_beat_the_whole() -> None:
    whole = Options(device="GPU", strict=True)
    assert resolve(whole, {}) is whole
    assert resolve(whole, {"device": "npu"}) == Options(device="NPU", strict=True)
    assert resolve(None, {}) == Options()
    assert whole.device == "GPU"


@pytest.mark.parametrize(
    ("name", "meant"), [("precison", "precision"), ("stream", "streams"), ("dynamic", "dynamic_")]
)
def test_a_misspelt_option_is_named_with_its_neighbours(name: str, meant: str) -> None:
    with pytest.raises(OptionError) as caught:
        resolve(None, {name: 1})
    assert caught.value.name == name
    assert meant in caught.value.remedy
    assert "max_build_seconds" in caught.value.allowed


def test_an_option_like_no_other() -> None:
    with pytest.raises(OptionError) as caught:
        resolve(Options(), {"zzz": 1})
    assert caught.value.remedy == "Leave it out."


def test_options_of_another_type() -> None:
    given_value: Any = {"device": "CPU"}
    with pytest.raises(OptionError) as caught:
        resolve(given_value, {})
    assert caught.value.name == "options"


@pytest.mark.parametrize(
    ("value", "expected"),
    [(None, True), ("", True), ("1", True), ("0", False), (" 0 ", False), ("Off", False)],
)
def test_the_environment_switches_off_and_on_again(
    value: str | None, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert enabled_in_environment()
    if value is not None:
        monkeypatch.setenv("OVSHIM", value)
    assert enabled_in_environment() is expected
