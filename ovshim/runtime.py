"""OpenVINO itself: the core, its devices, the properties a model is compiled with.

OpenVINO is imported inside the functions: `import ovshim` must not pay for it.
"""

import functools
import hashlib
import logging
import os
import platform
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .binding import binding, package
from .errors import OptionError
from .unfused import properties_for

_log = logging.getLogger("ovshim")

# Of weights: to copy so many takes 4 ms.
_SMALL_BYTES = 16 << 20

_HINTS = {"fp32": "f32", "bf16": "bf16", "fp16": "f16", "dynamic": "dynamic"}
_CAPABILITIES = {"FP32": "fp32", "BF16": "bf16", "FP16": "fp16", "INT8": "int8"}

# These hand properties on to the devices they stand for; BATCH takes them itself.
HANDING_ON = ("AUTO", "HETERO", "MULTI")

_ISA = (
    *("avx2", "fma", "f16c", "avx_vnni", "avx_vnni_int8", "avx512f", "avx512_vnni", "avx512_bf16"),
    *("avx512_fp16", "amx_tile", "amx_bf16", "amx_int8", "amx_fp16"),
    *("asimd", "asimdhp", "asimddp", "bf16", "i8mm", "sve", "sve2"),
)

_core: Any = None
_bare: Any = None
_core_lock = threading.Lock()
_inherited: list[Any] = []


def openvino() -> Any:
    """The package itself, imported at the first call."""
    return package()


def core() -> Any:
    """The process's one `openvino.Core`, which takes the models that the package makes."""
    global _core
    if _core is None:
        with _core_lock:
            if _core is None:
                _core = openvino().Core()
    return _core


def _bare_core() -> Any:
    """A core for files, devices and properties: the package is not imported for it."""
    global _bare
    if _bare is None:
        with _core_lock:
            if _bare is None:
                _bare = binding().Core()
    return _bare


def _end_idle_threads() -> None:
    """Before a fork: OpenVINO keeps the threads of compiled models that are gone, and hands them to
    the next one of the same settings. In a child they are not there, and to compile hangs for good
    (2026.4). The end of any CPU plugin ends those that idle, also of other plugins; those of live
    models stay. 2 ms."""
    if _core is None and _bare is None:
        return
    try:
        passing = binding().Core()
        passing.get_property("CPU", "FULL_DEVICE_NAME")  # loads the plugin
        passing.unload_plugin("CPU")
    except Exception:  # no fork is to fail of it
        _log.debug("idle threads were not ended", exc_info=True)


def _forget_after_fork() -> None:
    global _core, _bare, _core_lock
    # Destroying what the parent made hangs in the child, and the lock may have been held by a
    # thread that is not here any more.
    _inherited.extend(made for made in (_core, _bare) if made is not None)
    _core = _bare = None
    _core_lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_end_idle_threads, after_in_child=_forget_after_fork)


def version() -> str:
    """OpenVINO's version with its build number."""
    return str(binding().get_version())


@dataclass(frozen=True)
class Device:
    """A device OpenVINO can use here.

    `name`: as options take it; `full_name`: the maker's; `precisions`: those the plugin says
    it is fast in, which is a claim (a plugin went on saying bf16 with the instructions switched
    off): what a compiled model really runs in is `precision_run`'s answer.
    """

    name: str
    full_name: str
    precisions: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "full_name": self.full_name,
            "precisions": list(self.precisions),
        }


def devices() -> list[Device]:
    """The devices that can be used, in OpenVINO's order."""
    found = []
    for name in _bare_core().available_devices:
        capabilities = _bare_core().get_property(name, "OPTIMIZATION_CAPABILITIES")
        found.append(
            Device(
                name=name,
                full_name=str(_bare_core().get_property(name, "FULL_DEVICE_NAME")).strip(),
                precisions=tuple(_CAPABILITIES[c] for c in _CAPABILITIES if c in capabilities),
            )
        )
    return found


def members(device: str) -> list[str]:
    """The devices that a name stands for: `HETERO:GPU,CPU` is GPU and CPU, `AUTO` is all."""
    kind, colon, listed = device.partition(":")
    named = [item.partition("(")[0] for item in listed.split(",")] if colon else []
    wanted = [item for item in named if not item.startswith("-")]
    if wanted:
        return wanted
    if kind == "AUTO":
        left_out = {item[1:] for item in named}
        return [name for name in _bare_core().available_devices if name not in left_out]
    return [device]


def check_device(device: str) -> None:
    """OptionError when a device that was named is not there."""
    available = list(_bare_core().available_devices)
    # One GPU is listed without its number and answers to GPU.0 too; of several, GPU is the first.
    numbered = {f"{name}.0" for name in available if "." not in name and name != "CPU"}
    known = {*available, *numbered, *(name.partition(".")[0] for name in available)}
    missing = [name for name in members(device) if name not in known]
    if missing or not members(device):
        raise OptionError(
            "device",
            device,
            f"what OpenVINO finds on this machine: {', '.join(available) or 'nothing'}",
            "Name one of those, or install the driver of the device that is missing.",
        )


def safe_precision(
    precision: str, *, device: str, hint: str, streams: int | None, threads: int | None
) -> str:
    """`precision`, or fp32 where running it could end the process.

    Gated feed-forward layers in bf16 or f16 raise SIGFPE in the CPU plugin when a stream has a
    single thread: one thread in all, a throughput hint on few cores, an affinity of one core.
    `threads`: what is given to OpenVINO; None: as many as the process may use.
    """
    if precision == "fp32" or not any(name == "CPU" for name in members(device)):
        return precision
    # OpenVINO takes no more threads than there are cores for the process to run on.
    usable = min(threads or _usable_cpus(), _usable_cpus())
    if streams is None:
        # By the throughput hint the plugin chooses up to one stream per thread.
        streams = usable if hint == "throughput" else 1
    return precision if usable // streams >= 2 else "fp32"


def _usable_cpus() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def leaves_cores(threads: int) -> bool:
    """Whether so many threads leave cores of this machine to others.

    Pinned threads of a process would then be in the way of those of the next: each process pins to
    the first cores there are, and two workers of one thread each take turns on one core. Not known
    of a worker by its parent or its engine: there are too many kinds of both.
    """
    return threads < _usable_cores()


def _usable_cores() -> int:
    """The cores that this process may run on; where it is not known which of the processors are
    threads of one core, those."""
    if not hasattr(os, "sched_getaffinity"):
        return _usable_cpus()
    siblings = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
    try:
        return len({Path(siblings.format(n)).read_text() for n in os.sched_getaffinity(0)})
    except OSError:
        return _usable_cpus()


def settings(
    *,
    device: str = "CPU",
    precision: str,
    hint: str,
    streams: int | None,
    threads: int | None,
    properties: Mapping[str, Any],
) -> dict[str, Any]:
    """OpenVINO's properties for `compile_model`, by name.

    `precision`: fp32, bf16, fp16, or dynamic (each operation in its own type); `hint`: latency
    or throughput; `streams`, `threads`: None leaves them to OpenVINO, and threads are pinned to
    cores as it likes unless they leave some free; `properties`: the user's own, which win.
    CACHE_DIR is never set: the key of that cache leaves the precision out,
    and its blobs carry no checksum.
    """
    ours: dict[str, Any] = {
        # Never left to the default, which is bf16 without a word wherever the CPU has it.
        "INFERENCE_PRECISION_HINT": _HINTS[precision],
        "PERFORMANCE_HINT": hint.upper(),
        # The default quantizes activations of compressed layers, silently, under the f32 hint.
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
    }
    if precision == "fp32":
        # The default keeps keys and values in u8: token ids then differ from eager's.
        ours["KV_CACHE_PRECISION"] = "f32"
    if streams is not None:
        ours["NUM_STREAMS"] = streams
    if threads is not None:
        ours["INFERENCE_NUM_THREADS"] = threads
        if leaves_cores(threads):
            ours["ENABLE_CPU_PINNING"] = False
    kind = device.partition(":")[0]
    if kind not in HANDING_ON:
        return {**_accepted(members(device)[0], ours), **properties}
    # AUTO accepts any name, misspelt ones too, and MULTI turns the hint into THROUGHPUT unless it
    # is given per device. So each device gets its own set.
    nested = {
        name: {
            **_accepted(name, ours),
            **{key: value for key, value in properties.items() if key in ours},
        }
        for name in members(device)
    }
    rest = {key: value for key, value in properties.items() if key not in ours}
    return {"PERFORMANCE_HINT": ours["PERFORMANCE_HINT"], **rest, "DEVICE_PROPERTIES": nested}


def _accepted(device: str, ours: Mapping[str, Any]) -> dict[str, Any]:
    """Those of our properties that a device knows; the precision always, so that it may refuse."""
    if device == "CPU":
        return dict(ours)
    try:
        known = supported(device)
    except RuntimeError as error:
        # The device is not there, or says nothing of itself: compiling will tell.
        _log.debug("No list of properties from %s: %s", device, error)
        return {key: ours[key] for key in ("INFERENCE_PRECISION_HINT", "PERFORMANCE_HINT")}
    return {
        key: value
        for key, value in ours.items()
        if key in known or key == "INFERENCE_PRECISION_HINT"
    }


def supported(device: str) -> Sequence[str]:
    """The properties that a device says it knows; some that it takes are not among them.
    RuntimeError where it is not there."""
    return tuple(_bare_core().get_property(device, "SUPPORTED_PROPERTIES"))


def fold(model: Any) -> None:
    """Do to a graph once what every compilation does first: BatchNorm goes into convolutions.

    What is compiled then takes its weights as they lie in the file. A compiled graph that has to
    bring its own is 94 MB of ResNet-50 to write and to read, and 0.1 MB of one that was folded.
    """
    openvino()
    from openvino._offline_transformations import apply_moc_transformations

    apply_moc_transformations(model, cf=False, smart_reshape=False)


def compile_model(
    source: Path,
    device: str,
    settings: Mapping[str, Any],
    sizes: Sequence[Sequence[int]] | None = None,
) -> Any:
    """Compile the IR at `source` (an `.xml` with its `.bin` beside it).

    From the path, so that the weights are mapped from the file: by way of `read_model` or a model
    in memory a second copy of them stays. So it does with `sizes`, one for each input, for which
    alone the graph is compiled then, and of small files: what is mapped is read in each inference,
    and whoever cuts the file changes the answers. RuntimeError when OpenVINO cannot.
    """
    small = _is_small(source)
    model = _bare_core().read_model(str(source), config={"ENABLE_MMAP": not small})
    if sizes is not None:
        model.reshape({i: binding().PartialShape(list(size)) for i, size in enumerate(sizes)})
    settings = {**settings, **properties_for(model, device)}
    if small or sizes is not None:
        return _bare_core().compile_model(model, device, settings)
    del model  # which was only looked at
    return _bare_core().compile_model(str(source), device, settings)


def compile_text(graph: bytes, device: str, settings: Mapping[str, Any]) -> Any:
    """Compile the text of an IR without weights. RuntimeError when OpenVINO cannot."""
    return _bare_core().compile_model(_bare_core().read_model(graph, b""), device, settings)


def _is_small(source: Path) -> bool:
    try:
        return source.with_suffix(".bin").stat().st_size < _SMALL_BYTES
    except OSError:  # it has gone, and OpenVINO will say so
        return False


def export_model(compiled: Any) -> bytes:
    """A compiled model as `import_model` takes it. RuntimeError where the device cannot."""
    return bytes(compiled.export_model().getvalue())


def import_model(blob: bytes, weights: Path, device: str, settings: Mapping[str, Any]) -> Any:
    """A compiled model again. `weights`: the `.bin` of the IR; `settings`: those that it was
    compiled with. RuntimeError when OpenVINO cannot."""
    told = {"WEIGHTS_PATH": str(weights)} if "CACHE_MODE" in settings else {}
    return _bare_core().import_model(blob, device, {**settings, **told})


def hides_failures(compiled: Any, threads: int | None) -> bool:
    """Whether `infer` may fail without a word: on a CPU, in one stream of one thread.

    `threads`: what was given to OpenVINO, for devices that hand on to others and do not tell.
    """
    try:
        return int(compiled.get_property("INFERENCE_NUM_THREADS")) <= 1
    except RuntimeError as error:
        _log.debug("No number of threads: %s", error)
        return min(threads or _usable_cpus(), _usable_cpus()) <= 1


@functools.cache
def processor() -> str:
    """A short name for the CPU: what was measured on one holds on another with the same name.

    Letters, digits and dashes; the same in every process of a machine. In it: the model, the
    instruction sets that matter, and oneDNN's cap on them.
    """
    name = str(_bare_core().get_property("CPU", "FULL_DEVICE_NAME")).strip()
    facts = {"name": name, "machine": platform.machine(), **_cpuinfo()}
    for variable in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        facts[variable] = os.environ.get(variable, "").upper()
    record = "\n".join(f"{key}={facts[key]}" for key in sorted(facts))
    digest = hashlib.sha256(record.encode()).hexdigest()[:10]
    words = "".join(c if c.isascii() and c.isalnum() else " " for c in name.lower()).split()
    return "-".join([*words, digest])


def measured_on(threads: int) -> str:
    """What a measurement holds for, as entries keep it: this sort of processor, so many threads."""
    return f"{processor()} threads={threads}"


def _cpuinfo() -> dict[str, str]:
    """Model numbers and instruction sets as Linux tells them; elsewhere the name must do."""
    found: dict[str, str] = {}
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
            for line in lines:
                key, _, value = (part.strip() for part in line.partition(":"))
                if key.lower() in ("flags", "features"):
                    flags = set(value.split())
                    found.setdefault("isa", " ".join(flag for flag in _ISA if flag in flags))
                elif key in ("vendor_id", "cpu family", "model", "CPU part", "CPU variant"):
                    found.setdefault(key, value)
                elif not line.strip() and found:
                    break  # the first processor tells; the others are its like
    except OSError:
        return {}
    return found
