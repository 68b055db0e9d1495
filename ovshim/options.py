"""Every option of ovshim, defined once and checked when it is given.

:class:`Options` is the record, :class:`OptionFields` the same names for
``**options: Unpack[OptionFields]``, :func:`resolve` makes the one out of the other.
"""

import dataclasses
import difflib
import keyword
import math
import numbers
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, TypedDict

from .errors import OptionError

Scalar = str | int | float | bool
Prefer = Literal["faster", "openvino", "eager"]
Hint = Literal["latency", "throughput"]

_PRECISIONS: Mapping[str, str] = MappingProxyType(
    {"fp32": "fp32", "f32": "fp32", "float32": "fp32", "float": "fp32", "single": "fp32"}
    | {"bf16": "bf16", "bfloat16": "bf16"}
    | {"fp16": "fp16", "f16": "fp16", "float16": "fp16", "half": "fp16"}
)
_TOLERANCES: Mapping[str, float] = MappingProxyType(
    {"fp32": 1e-4, "bf16": 0.03, "fp16": 0.03, "int8": 0.1}
)
_NAMED_TOLERANCES: Mapping[str, float] = MappingProxyType({"strict": 0.002, "loose": 0.05})

_DEVICE = re.compile(r"[A-Z][A-Z0-9_]*(\.[A-Z0-9_]+)*")
# In a list a device may be left out with a minus and may carry its number of requests.
_LISTED_DEVICE = re.compile(rf"-?{_DEVICE.pattern}(\([0-9]+\))?")
_VIRTUAL_DEVICES = ("AUTO", "HETERO", "MULTI", "BATCH")

# Properties with a meaning that ovshim relies on, and what to write instead.
_OWNED_PROPERTIES: Mapping[str, str] = MappingProxyType(
    {
        "INFERENCE_PRECISION_HINT": "Give precision= instead.",
        "PERFORMANCE_HINT": "Give hint= instead.",
        "NUM_STREAMS": "Give streams= instead.",
        "INFERENCE_NUM_THREADS": "Give threads= instead.",
        # OpenVINO's own cache leaves the precision out of its key: it would answer a request for
        # f32 with a model compiled for f16.
        "CACHE_DIR": "Give cache_dir= instead.",
        # It switches denormals off in the calling thread as well, for the user's own arithmetic.
        "CPU_DENORMALS_OPTIMIZATION": "Call torch.set_flush_denormal(True) yourself instead.",
    }
)


class _FrozenDict(Mapping[Any, Any]):
    """A read-only mapping that pickles, which ``MappingProxyType`` does not."""

    __slots__ = ("_data",)

    def __init__(self, data: Mapping[Any, Any] = MappingProxyType({})) -> None:
        self._data = dict(data)

    def __getitem__(self, key: Any) -> Any:
        return self._data[key]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._data)

    def __len__(self) -> int:
        return len(self._data)

    def __hash__(self) -> int:
        return hash(frozenset(self._data.items()))

    def __repr__(self) -> str:
        return repr(self._data)


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How a module is accelerated. Immutable; checked and normalised when it is made.

    Raises OptionError, naming the value, what is allowed and the remedy, for a value that cannot
    be right. Whether a named device exists, and whether a shape fits the example, is found out
    where OpenVINO and the example are at hand.
    """

    device: str = "CPU"
    """OpenVINO's name of the device: ``CPU``, ``GPU``, ``GPU.1``, ``NPU``, ``AUTO``,
    ``AUTO:GPU,CPU``, ``HETERO:GPU,CPU``, ``MULTI:GPU,CPU``. Stored in upper case."""

    precision: str | None = None
    """``fp32``, ``bf16`` or ``fp16`` (``float32``, ``bfloat16``, ``half``, ... are understood);
    None: the module's own."""

    tolerance: float | Literal["strict", "loose"] | None = None
    """Largest relative L2 error per output against eager, above 0; ``strict`` is 0.002, ``loose``
    0.05. None: 1e-4 for fp32, 0.03 for bf16 and fp16."""

    dynamic_batch: bool = True
    """Whether dimension 0 of every tensor input may change from call to call."""

    dynamic_shapes: Mapping[str, Any] | Sequence[Any] | None = dataclasses.field(
        default=None, hash=False
    )
    """Which other sizes may change, in the forms of ``torch.export`` or by plain names:
    ``{"x": {0: "batch", 2: "length"}}``. Stored as read-only mappings and tuples."""

    prefer: Prefer = "faster"
    """``faster``: whichever wins a race; ``openvino``: OpenVINO where it is right; ``eager``."""

    hint: Hint = "latency"
    """Whether OpenVINO arranges itself for one caller (``latency``) or many (``throughput``)."""

    streams: int | None = None
    """Number of inferences that OpenVINO runs side by side, above 0; None: as ``hint`` says."""

    threads: int | None = None
    """Number of threads that OpenVINO computes with, above 0; None: as many as torch."""

    properties: Mapping[str, Scalar] = _FrozenDict()
    """Further properties for OpenVINO's ``compile_model``, name to text, number or bool. Those
    that another option sets are refused."""

    background: bool = False
    """Make plans in another thread; eager answers until they are proved."""

    inplace: bool = False
    """Accelerate the module itself instead of a twin."""

    methods: Sequence[str] = ("forward",)
    """Names of the methods that are accelerated. Stored as a tuple."""

    strict: bool = False
    """Raise FallbackError where a call would run in eager (except in training, under gradients,
    or because eager is faster)."""

    cache_dir: str | os.PathLike[str] | Literal[False] | None = None
    """Directory of the cache; None: ``OVSHIM_CACHE_DIR`` or the user's cache directory; False:
    nothing is kept. Stored as an absolute ``Path``."""

    max_build_seconds: float = 120.0
    """What one build may take, proof and race included, in seconds, above 0; over it: eager."""

    progress: bool | None = None
    """Whether progress bars are shown; None: on a terminal."""

    def __post_init__(self) -> None:
        for name, check in _CHECKS.items():
            object.__setattr__(self, name, check(name, getattr(self, name)))

    def tolerance_for(self, precision: str) -> float:
        """Largest relative L2 error accepted of that precision (``fp32``, ``bf16``, ...).

        Raises KeyError for a precision without a default where none was given.
        """
        return _TOLERANCES[precision] if self.tolerance is None else float(self.tolerance)


class OptionFields(TypedDict, total=False):
    """The fields of :class:`Options` as keyword arguments; their meaning is told there."""

    device: str
    precision: str | None
    tolerance: float | Literal["strict", "loose"] | None
    dynamic_batch: bool
    dynamic_shapes: Mapping[str, Any] | Sequence[Any] | None
    prefer: Prefer
    hint: Hint
    streams: int | None
    threads: int | None
    properties: Mapping[str, Scalar]
    background: bool
    inplace: bool
    methods: Sequence[str]
    strict: bool
    cache_dir: str | os.PathLike[str] | Literal[False] | None
    max_build_seconds: float
    progress: bool | None


def resolve(options: Options | None, fields: Mapping[str, Any]) -> Options:
    """The options meant by ``options=`` and single fields together; a field beats the whole.

    Raises OptionError for an unknown field, for an ``options`` of another type, and for whatever
    :class:`Options` refuses.
    """
    known = [field.name for field in dataclasses.fields(Options)]
    for name, value in fields.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=2)
            meant = f"Did you mean {' or '.join(near)}?" if near else "Leave it out."
            raise OptionError(name, value, f"one of the options {', '.join(known)}", meant)
    if options is None:
        return Options(**fields)
    if not isinstance(options, Options):
        raise OptionError(
            "options",
            options,
            "an ovshim.Options or None",
            "Give ovshim.Options(...), or the options by name.",
        )
    return dataclasses.replace(options, **fields) if fields else options


def enabled_in_environment() -> bool:
    """Whether the environment leaves ovshim on; ``OVSHIM=0`` switches it off.

    Read on every call, so that a running program can be switched.
    """
    return os.environ.get("OVSHIM", "").strip().lower() not in {"0", "off", "false", "no"}


def _device(name: str, value: object) -> str:
    def wrong(remedy: str) -> OptionError:
        allowed = "a device name of OpenVINO such as CPU, GPU, GPU.1, NPU, AUTO or HETERO:GPU,CPU"
        return OptionError(name, value, allowed, remedy)

    if not isinstance(value, str):
        raise wrong("Give the name as text, for example device='CPU'.")
    device = "".join(value.split()).upper()
    kind, colon, listed = device.partition(":")
    if not _DEVICE.fullmatch(kind):
        raise wrong("Give a name that ovshim.devices() lists.")
    if colon and kind not in _VIRTUAL_DEVICES:
        raise wrong("Separate the number of a device by a dot, as in 'GPU.1'.")
    if colon and not all(_LISTED_DEVICE.fullmatch(item) for item in listed.split(",")):
        raise wrong("Separate the devices after the colon by commas, as in 'AUTO:GPU,CPU'.")
    if not colon and kind in _VIRTUAL_DEVICES and kind != "AUTO":
        raise wrong(f"Say which devices, as in '{kind}:GPU,CPU'.")
    return device


def _precision(name: str, value: object) -> str | None:
    if value is None:
        return None
    known = _PRECISIONS.get(value.strip().lower()) if isinstance(value, str) else None
    if known is None:
        raise OptionError(
            name,
            value,
            "'fp32', 'bf16', 'fp16' or None",
            "Leave it out to keep the module's own precision.",
        )
    return known


def _tolerance(name: str, value: object) -> float | None:
    if value is None:
        return None
    if isinstance(value, str) and value in _NAMED_TOLERANCES:
        return _NAMED_TOLERANCES[value]
    number = _real(value)
    if number is None or not 0 < number < math.inf:
        raise OptionError(
            name,
            value,
            "a finite number above 0, 'strict', 'loose' or None",
            "Give the largest relative L2 error that is acceptable, for example 1e-3.",
        )
    return number


def _seconds(name: str, value: object) -> float:
    number = _real(value)
    if number is None or not number > 0:
        raise OptionError(
            name, value, "a number of seconds above 0", "Give for example 120, or math.inf."
        )
    return number


def _real(value: object) -> float | None:
    """The value as a float if it is a number; a bool is a number to Python only."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return None
    return float(value)


def _count(name: str, value: object) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
        raise OptionError(
            name, value, "a whole number above 0 or None", "Leave it out to let ovshim choose."
        )
    return int(value)


def _flag(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise OptionError(name, value, "True or False", f"Give {name}=True or {name}=False.")
    return value


def _optional_flag(name: str, value: object) -> bool | None:
    return None if value is None else _flag(name, value)


def _choice(*choices: str) -> Callable[[str, object], str]:
    def check(name: str, value: object) -> str:
        if not isinstance(value, str) or value.lower() not in choices:
            allowed = " or ".join(repr(choice) for choice in choices)
            raise OptionError(name, value, allowed, f"Leave it out for {choices[0]!r}.")
        return value.lower()

    return check


def _dynamic_shapes(name: str, value: object) -> Mapping[Any, Any] | tuple[Any, ...] | None:
    if value is None:
        return None
    if not isinstance(value, Mapping | Sequence) or isinstance(value, str | bytes):
        raise OptionError(
            name,
            value,
            "a mapping from argument names or a sequence in the order of the arguments, or None",
            'Give for example {"x": {0: "batch", 2: "length"}}.',
        )
    frozen: _FrozenDict | tuple[Any, ...] = _frozen(value)
    return frozen


def _frozen(value: Any) -> Any:
    """A copy that a later change of the user's own dict or list cannot reach."""
    if isinstance(value, Mapping):
        return _FrozenDict({key: _frozen(item) for key, item in value.items()})
    if isinstance(value, list | tuple):
        return tuple(_frozen(item) for item in value)
    return value


def _properties(name: str, value: object) -> Mapping[str, Scalar]:
    allowed = "a mapping from names of OpenVINO's properties to text, numbers or bools"
    if not isinstance(value, Mapping):
        raise OptionError(name, value, allowed, "Give for example {'ENABLE_MMAP': False}.")
    for key, item in value.items():
        if not isinstance(key, str) or not key or not isinstance(item, str | int | float):
            raise OptionError(name, {key: item}, allowed, "Give each name and value as plain data.")
        if key in _OWNED_PROPERTIES:
            allowed = "any property that no other option sets"
            raise OptionError(name, {key: item}, allowed, _OWNED_PROPERTIES[key])
    return _FrozenDict(value)


def _methods(name: str, value: object) -> tuple[str, ...]:
    def wrong(remedy: str) -> OptionError:
        return OptionError(name, value, "a sequence of one or more names of methods", remedy)

    if isinstance(value, str):
        raise wrong(f"Put the name into a tuple: ({value!r},).")
    if not isinstance(value, Sequence) or not value:
        raise wrong("Give for example ('forward',).")
    for item in value:
        if not isinstance(item, str) or not item.isidentifier() or keyword.iskeyword(item):
            raise wrong(f"Replace {item!r} by the name of a method.")
        if item.startswith("__"):
            # Python looks special methods up on the class, where nothing may be put.
            raise wrong(f"Give 'forward' or another plain method instead of {item!r}.")
    return tuple(dict.fromkeys(value))


def _cache_dir(name: str, value: object) -> Path | Literal[False] | None:
    if value is None or value is False:
        return value
    path = os.fspath(value) if isinstance(value, str | os.PathLike) else None
    if not isinstance(path, str) or not path:
        raise OptionError(
            name, value, "a directory, None or False", "Give False to keep nothing on disk."
        )
    # Absolute, so that neither os.chdir nor a worker elsewhere moves the cache.
    return Path(os.path.expanduser(path)).absolute()


_CHECKS: Mapping[str, Callable[[str, object], object]] = MappingProxyType(
    {
        "device": _device,
        "precision": _precision,
        "tolerance": _tolerance,
        "dynamic_batch": _flag,
        "dynamic_shapes": _dynamic_shapes,
        "prefer": _choice("faster", "openvino", "eager"),
        "hint": _choice("latency", "throughput"),
        "streams": _count,
        "threads": _count,
        "properties": _properties,
        "background": _flag,
        "inplace": _flag,
        "methods": _methods,
        "strict": _flag,
        "cache_dir": _cache_dir,
        "max_build_seconds": _seconds,
        "progress": _optional_flag,
    }
)
