"""Properties, devices and what a compiled model really runs in."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import openvino.opset13 as ops
import pytest

from ovshim import executed, runtime
from ovshim.errors import OptionError
from ovshim.options import Options
from ovshim.properties import check_placement

VIRTUAL = ["AUTO", "AUTO:CPU", "HETERO:CPU", "MULTI:CPU"]


def settings(**changed: Any) -> dict[str, Any]:
    given: dict[str, Any] = {
        "precision": "fp32",
        "hint": "latency",
        "streams": None,
        "threads": None,
        "properties": {},
    }
    return runtime.settings(**{**given, **changed})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    x = ops.parameter([-1, 64], ov.Type.f32, name="x")
    weights = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    model = ov.Model([ops.matmul(x, ops.constant(weights), False, True)], [x], "linear")
    ov.save_model(model, tmp_path / "model.xml", compress_to_fp16=False)
    return tmp_path / "model.xml"


def test_the_core_is_one() -> None:
    assert runtime.core() is runtime.core()


def test_every_setting_that_decides_values_is_explicit(monkeypatch: pytest.MonkeyPatch) -> None:
    assert settings() == {
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
        "KV_CACHE_PRECISION": "f32",
    }
    monkeypatch.setattr(runtime, "_usable_cores", lambda: 4)
    given = settings(precision="bf16", hint="throughput", streams=2, threads=4)
    assert given == {
        "INFERENCE_PRECISION_HINT": "bf16",
        "PERFORMANCE_HINT": "THROUGHPUT",
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
        "NUM_STREAMS": 2,
        "INFERENCE_NUM_THREADS": 4,
    }
    assert settings(precision="fp16")["INFERENCE_PRECISION_HINT"] == "f16"


@pytest.mark.parametrize(("cores", "threads", "free"), [(2, 1, True), (2, 2, False), (2, 4, False)])
def test_workers_are_not_pinned(
    cores: int, threads: int, free: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of them would be, to the same cores."""
    monkeypatch.setattr(runtime, "_usable_cores", lambda: cores)
    given = settings(threads=threads)
    assert given.get("ENABLE_CPU_PINNING", True) is not free
    assert settings(threads=threads, properties={"ENABLE_CPU_PINNING": True})["ENABLE_CPU_PINNING"]
    assert "ENABLE_CPU_PINNING" not in settings()


def test_cores_are_counted_and_not_their_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 1 <= runtime._usable_cores() <= runtime._usable_cpus()
    if not hasattr(os, "sched_getaffinity"):
        return
    read = {
        f"/sys/devices/system/cpu/cpu{n}/topology/thread_siblings_list": n // 2 for n in range(8)
    }
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(Path, "read_text", lambda path: f"{read[str(path)]}\n")
    assert runtime._usable_cores() == 4


def test_the_users_properties_win() -> None:
    own = {"DYNAMIC_QUANTIZATION_GROUP_SIZE": 32, "ENABLE_CPU_PINNING": False}
    given = settings(properties=own)
    assert {key: given[key] for key in own} == own
    given = settings(device="AUTO:CPU", properties=own)
    assert given["DEVICE_PROPERTIES"]["CPU"]["DYNAMIC_QUANTIZATION_GROUP_SIZE"] == 32
    assert given["ENABLE_CPU_PINNING"] is False


def test_a_device_that_is_not_there_still_gets_its_precision() -> None:
    given = settings(device="HETERO:NOSUCH,CPU", precision="fp16", threads=2)
    assert given["DEVICE_PROPERTIES"]["NOSUCH"] == {
        "INFERENCE_PRECISION_HINT": "f16",
        "PERFORMANCE_HINT": "LATENCY",
    }
    assert given["DEVICE_PROPERTIES"]["CPU"]["INFERENCE_NUM_THREADS"] == 2


@pytest.mark.parametrize("device", ["CPU", "BATCH:CPU", *VIRTUAL])
def test_each_kind_of_device_obeys_the_settings(path: Path, device: str) -> None:
    given = settings(device=device, threads=1, streams=1)
    own = given.get("DEVICE_PROPERTIES", {"CPU": given})["CPU"]
    assert own.get("ENABLE_CPU_PINNING", True) is (runtime._usable_cores() == 1)
    compiled = runtime.compile_model(path, device, given)
    found = executed.precision_run(compiled)
    assert found == "f32"
    if device in VIRTUAL:
        properties = compiled.get_property("DEVICE_PROPERTIES")["CPU"]
    else:
        properties = {
            name: compiled.get_property(name)
            for name in (*given, "INFERENCE_NUM_THREADS", "NUM_STREAMS", "ENABLE_CPU_PINNING")
        }
    assert properties["INFERENCE_PRECISION_HINT"] == ov.Type.f32
    assert properties["KV_CACHE_PRECISION"] == ov.Type.f32
    assert int(properties["DYNAMIC_QUANTIZATION_GROUP_SIZE"]) == 0
    assert int(properties["INFERENCE_NUM_THREADS"]) == 1
    assert int(properties["NUM_STREAMS"]) == 1
    assert bool(properties["ENABLE_CPU_PINNING"]) is own.get("ENABLE_CPU_PINNING", True)
    assert "LATENCY" in str(properties["PERFORMANCE_HINT"])
    x = np.ones((3, 64), np.float32)
    assert ov.CompiledModel(compiled)(x)[0].shape == (3, 64)


def test_a_property_that_does_not_exist_is_refused(path: Path) -> None:
    with pytest.raises(RuntimeError):
        runtime.compile_model(path, "CPU", settings(properties={"NO_SUCH_PROPERTY": 1}))


def test_precision_run_is_read_from_the_graph(path: Path) -> None:
    capabilities = runtime.devices()[0].precisions
    for precision, hint in (("bf16", "bf16"), ("fp16", "f16")):
        compiled = runtime.compile_model(path, "CPU", settings(precision=precision))
        # A processor without the instructions for one may run another, but says so.
        expected = {hint} if precision in capabilities else {"f32", "bf16", "f16"}
        assert executed.precision_run(compiled) in expected


def test_precision_run_of_a_model_without_products() -> None:
    x = ops.parameter([2], ov.Type.i32)
    model = ov.Model([ops.add(x, ops.constant(np.int32(1)))], [x], "add")
    compiled = runtime.core().compile_model(model, "CPU", settings(precision="bf16"))
    assert executed.precision_run(compiled) == "i32"


def test_precision_run_without_a_graph() -> None:
    class Compiled:
        def get_runtime_model(self) -> None:
            raise RuntimeError("not implemented")

    assert executed.precision_run(Compiled()) == "unknown"


def test_devices_name_what_is_there() -> None:
    found = {device.name: device for device in runtime.devices()}
    assert list(found) == runtime.core().available_devices
    assert "fp32" in found["CPU"].precisions
    assert found["CPU"].to_dict()["full_name"] == found["CPU"].full_name != ""


@pytest.mark.parametrize(
    ("device", "stands_for"),
    [
        ("CPU", ["CPU"]),
        ("GPU.1", ["GPU.1"]),
        ("HETERO:GPU,CPU", ["GPU", "CPU"]),
        ("MULTI:GPU.1(4),CPU(2)", ["GPU.1", "CPU"]),
        ("AUTO:GPU,-CPU", ["GPU"]),
        ("AUTO:-CPU", []),
        ("AUTO", ["CPU"]),
    ],
)
def test_members(device: str, stands_for: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    class Core:
        available_devices = ("CPU",)

    monkeypatch.setattr(runtime, "_bare_core", Core)
    assert runtime.members(device) == stands_for


@pytest.mark.parametrize("device", ["CPU", *VIRTUAL, "BATCH:CPU", "AUTO:CPU,-GPU"])
def test_devices_that_are_there_pass(device: str) -> None:
    runtime.check_device(device)


@pytest.mark.parametrize("device", ["NOSUCH", "CPU.0", "HETERO:NOSUCH,CPU", "AUTO:-CPU"])
def test_devices_that_are_not_there_raise(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Core:
        available_devices = ("CPU",)

    monkeypatch.setattr(runtime, "_bare_core", Core)
    with pytest.raises(OptionError) as caught:
        runtime.check_device(device)
    assert caught.value.value == device
    assert "CPU" in caught.value.allowed


@pytest.mark.parametrize(
    ("available", "device", "there"),
    [
        (("CPU", "GPU"), "GPU.0", True),
        (("CPU", "GPU"), "GPU.1", False),
        (("CPU", "GPU.0", "GPU.1"), "GPU", True),
        (("CPU", "GPU.0", "GPU.1"), "GPU.1", True),
        (("CPU", "GPU.0", "GPU.1"), "GPU.2", False),
    ],
)
def test_numbered_devices(
    available: tuple[str, ...], device: str, there: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Core:
        available_devices = available

    monkeypatch.setattr(runtime, "_bare_core", Core)
    if there:
        runtime.check_device(device)
    else:
        with pytest.raises(OptionError):
            runtime.check_device(device)


@pytest.mark.parametrize(
    ("device", "properties"),
    [
        ("CPU", {"SNIPPETS_MODE": "DISABLE", "ENABLE_MMAP": False}),  # in no list of OpenVINO's
        ("HETERO:CPU", {"SNIPPETS_MODE": "DISABLE", "PERF_COUNT": True}),
        ("AUTO:CPU", {"SCHEDULE_POLICY": "ROUND_ROBIN", "KV_CACHE_PRECISION": "u8"}),
    ],
)
def test_properties_that_openvino_takes(device: str, properties: dict[str, Any]) -> None:
    check_placement(Options(device=device, properties=properties))


@pytest.mark.parametrize("device", ["CPU", "AUTO:CPU", "HETERO:CPU"])
@pytest.mark.parametrize(
    "properties", [{"NO_SUCH_PROPERTY": 1}, {"enable_mmap": True}, {"ENABLE_CPU_PINNING": "maybe"}]
)
def test_properties_that_openvino_does_not_take(device: str, properties: dict[str, Any]) -> None:
    with pytest.raises(OptionError) as caught:
        check_placement(Options(device=device, properties=properties))
    assert caught.value.value == properties
    assert next(iter(properties)) in caught.value.remedy


def test_a_value_is_known_with_its_type() -> None:
    for _ in range(2):
        check_placement(Options(properties={"ENABLE_CPU_PINNING": True}))
        with pytest.raises(OptionError, match="ENABLE_CPU_PINNING"):
            check_placement(Options(properties={"ENABLE_CPU_PINNING": 1.0}))


def test_properties_are_not_blamed_for_what_cannot_be_compiled_anyway(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def compile_text(*_: Any) -> None:
        raise RuntimeError("no driver")

    monkeypatch.setattr(runtime, "compile_text", compile_text)
    check_placement(Options(properties={"NO_SUCH_PROPERTY": 2}))


@pytest.mark.parametrize(
    ("cpus", "hint", "streams", "threads", "safe"),
    [
        (8, "latency", None, None, True),
        (8, "latency", None, 2, True),
        (8, "latency", None, 1, False),
        (1, "latency", None, 4, False),
        (8, "latency", 4, 8, True),
        (8, "latency", 5, 8, False),
        (4, "latency", 4, 8, False),
        (8, "throughput", None, 8, False),
        (8, "throughput", 4, 8, True),
    ],
)
def test_low_precision_needs_two_threads_a_stream(
    cpus: int,
    hint: str,
    streams: int | None,
    threads: int | None,
    safe: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(runtime, "_usable_cpus", lambda: cpus)

    def chosen(precision: str, device: str) -> str:
        return runtime.safe_precision(
            precision, device=device, hint=hint, streams=streams, threads=threads
        )

    for device in ("CPU", "HETERO:GPU,CPU"):
        for precision in ("bf16", "fp16"):
            assert chosen(precision, device) == (precision if safe else "fp32")
        assert chosen("fp32", device) == "fp32"
    assert chosen("bf16", "GPU") == "bf16"


def in_a_process(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    return done.stdout.strip()


def test_the_processors_name_is_the_same_in_every_process() -> None:
    code = "from ovshim.runtime import processor; print(processor())"
    name = runtime.processor()
    assert in_a_process(code) == name
    assert in_a_process(code, ONEDNN_MAX_CPU_ISA="AVX2") != name
    assert name.replace("-", "").isalnum()


def test_importing_loads_no_openvino_and_telemetry_stays_away() -> None:
    code = (
        "import sys, ovshim.runtime as r, ovshim.infer; print('openvino' in sys.modules);"
        "r.core(); print(sys.modules['openvino_telemetry'])"
    )
    assert in_a_process(code).split() == ["False", "None"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_makes_its_own_core(path: Path) -> None:
    # The parent keeps its compiled model. (One that is let go of before a fork:
    # test_threads_and_processes.)
    code = f"""
import faulthandler, os, numpy as np, openvino as ov
from pathlib import Path
from ovshim import runtime
def compiled():
    given = runtime.settings(
        precision="fp32", hint="latency", streams=1, threads=1, properties={{}}
    )
    return ov.CompiledModel(runtime.compile_model(Path({str(path)!r}), "CPU", given))
def answer(model):
    return float(model(np.ones((1, 64), np.float32))[0].sum())
model, core = compiled(), runtime.core()
first = answer(model)
runtime._core_lock.acquire()  # as another thread would hold it at that moment
child = os.fork()
if not child:
    faulthandler.dump_traceback_later(60, exit=True)
    own = compiled()
    os._exit(0 if answer(own) == first and runtime.core() is not core else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert in_a_process(code) == "0"


def test_the_version_has_a_number() -> None:
    assert runtime.version()[0].isdigit()
