"""What each option may be: one function a field, which gives the value as it is stored.

Each takes the name and the value of an option, and raises OptionError for a value that cannot be
right: what was given, what is allowed, and the remedy.
"""

import itertools
import keyword
import math
import numbers
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from .errors import CalibrationError, OptionError

Scalar = str | int | float | bool

# Precisions in which a graph has integers; of the first set, in its weights alone.
COMPRESSED = frozenset({"int8_weights", "int4_weights"})
INTEGERS = COMPRESSED | {"int8"}

_PRECISIONS: Mapping[str, str] = MappingProxyType(
    {"fp32": "fp32", "f32": "fp32", "float32": "fp32", "float": "fp32", "single": "fp32"}
    | {"bf16": "bf16", "bfloat16": "bf16"}
    | {"fp16": "fp16", "f16": "fp16", "float16": "fp16", "half": "fp16"}
    | {"int8": "int8", "i8": "int8"}
    | {name: name for name in ("int8_weights", "int4_weights", "auto")}
)
# What a part of a module can be given: weights are compressed in the whole module or not at all.
_BY_RULE = ("fp32", "bf16", "fp16", "int8")
TOLERANCES: Mapping[str, float] = MappingProxyType(
    {"fp32": 1e-4, "bf16": 0.03, "fp16": 0.03, "auto": 0.02}
    | {"int8": 0.1, "int8_weights": 0.03, "int4_weights": 0.15}
)
_NAMED_TOLERANCES: Mapping[str, float] = MappingProxyType({"strict": 0.002, "loose": 0.05})

# So many items of calibration data are used at most: ten do nearly as well.
_MOST_SAMPLES = 300

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


class FrozenDict(Mapping[Any, Any]):
    """A read-only mapping that pickles, which `MappingProxyType` does not."""

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


def _precision(name: str, value: object) -> str | Mapping[str, str] | None:
    if value is None:
        return None
    if isinstance(value, Mapping):
        return _rules(name, value)
    known = _known_precision(value)
    if known is None:
        raise OptionError(
            name,
            value,
            "'fp32', 'bf16', 'fp16', 'int8', 'int8_weights', 'int4_weights', 'auto', rules by "
            "module path, or None",
            "Leave it out to keep the module's own precision.",
        )
    return known


def _known_precision(value: object) -> str | None:
    return _PRECISIONS.get(value.strip().lower()) if isinstance(value, str) else None


def _rules(name: str, value: Mapping[Any, Any]) -> Mapping[str, str]:
    """Rules in the order in which they were given: the last that matches a module wins."""
    rules: dict[str, str] = {}
    for pattern, item in value.items():
        known = _known_precision(item)
        if not isinstance(pattern, str) or not pattern or known not in _BY_RULE:
            raise OptionError(
                name,
                {pattern: item},
                f"rules from patterns of module paths, or 'default', to {', '.join(_BY_RULE)}",
                'Give for example {"default": "int8", "head": "fp32"}.',
            )
        rules[pattern] = known
    if not rules:
        raise OptionError(
            name, value, "one rule or more", "Leave it out to keep the module's own precision."
        )
    return FrozenDict(rules)


def _tolerance(name: str, value: object) -> float | Callable[..., Any] | None:
    if value is None or callable(value):
        return value
    if isinstance(value, str) and value in _NAMED_TOLERANCES:
        return _NAMED_TOLERANCES[value]
    number = _real(value)
    if number is None or not 0 < number < math.inf:
        raise OptionError(
            name,
            value,
            "a finite number above 0, 'strict', 'loose', a function (for 'auto') or None",
            "Give the largest relative L2 error that is acceptable, for example 1e-3.",
        )
    return number


def _calibration(name: str, value: object) -> object:
    """What gives the same items each time it is gone through; a generator is emptied here."""
    if value is None:
        return None
    iterable = hasattr(value, "__iter__")
    indexed = hasattr(value, "__getitem__") and hasattr(value, "__len__")
    tensor = hasattr(value, "shape") and hasattr(value, "dtype")
    if tensor or isinstance(value, str | bytes | Mapping) or not (iterable or indexed):
        raise CalibrationError(
            name,
            value,
            "a DataLoader, a dataset, or another iterable of example inputs",
            "Put the examples into a list, each a tensor, a tuple or a mapping.",
        )
    if isinstance(value, Iterator):
        value = tuple(itertools.islice(value, _MOST_SAMPLES))
    if isinstance(value, Sequence) and not value:
        raise CalibrationError(
            name, value, "one example input or more", "Give some ten inputs of the usual kind."
        )
    return value


def no_module(value: Any) -> OptionError:
    """What is raised of something that should have been a module."""
    remedy = "Give the model itself, not its class, a function or its output."
    return OptionError("module", value, "an instance of torch.nn.Module", remedy)


def first_items(source: Any, transform: Callable[[Any], Any] | None) -> Iterator[Any]:
    """The items of calibration data, as far as they are used, or what `transform` takes out of
    them."""
    # A dataset that is only indexed: its length ends it, for some never raise IndexError.
    indexed = not hasattr(source, "__iter__")
    items = (source[i] for i in range(len(source))) if indexed else iter(source)
    items = itertools.islice(items, _MOST_SAMPLES)
    return items if transform is None else map(transform, items)


def _transform(name: str, value: object) -> object:
    if value is not None and not callable(value):
        raise OptionError(
            name,
            value,
            "a function from an item of calibration= to an example input, or None",
            "Give for example transform=lambda item: item[0].",
        )
    return value


def check_together(precision: Any, tolerance: Any, calibration: Any) -> None:
    """Raise OptionError for options, each fine by itself, that cannot stand together."""
    asked = list(precision.values()) if isinstance(precision, Mapping) else [precision]
    if "int8" in asked and calibration is None:
        raise CalibrationError(
            "calibration",
            None,
            "example inputs, wherever precision= asks for int8",
            "Give some ten inputs of the usual kind: a DataLoader, a dataset or a list.",
        )
    if callable(tolerance) and precision != "auto":
        raise OptionError(
            "tolerance",
            tolerance,
            "a function with precision='auto' only",
            "Give the largest relative L2 error that is acceptable, for example 1e-3.",
        )


def check_memory(memory: Any, inplace: Any) -> None:
    """Raise OptionError for memory="lean" without inplace=True."""
    if memory == "lean" and not inplace:
        raise OptionError(
            "memory",
            memory,
            "'lean' with inplace=True only",
            "Give inplace=True as well: a twin shares its weights with the original, which would "
            "keep them in memory.",
        )


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


def _some(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
        raise OptionError(name, value, "a whole number above 0", "Leave it out for 16.")
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
    frozen: FrozenDict | tuple[Any, ...] = _frozen(value)
    return frozen


def _frozen(value: Any) -> Any:
    """A copy that a later change of the user's own dict or list cannot reach."""
    if isinstance(value, Mapping):
        return FrozenDict({key: _frozen(item) for key, item in value.items()})
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
    return FrozenDict(value)


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


CHECKS: Mapping[str, Callable[[str, object], object]] = MappingProxyType(
    {
        "device": _device,
        "precision": _precision,
        "tolerance": _tolerance,
        "calibration": _calibration,
        "transform": _transform,
        "dynamic_batch": _flag,
        "dynamic_shapes": _dynamic_shapes,
        "prefer": _choice("faster", "openvino", "eager"),
        "hint": _choice("latency", "throughput"),
        "streams": _count,
        "threads": _count,
        "properties": _properties,
        "memory": _choice("shared", "lean"),
        "background": _flag,
        "inplace": _flag,
        "methods": _methods,
        "strict": _flag,
        "cache_dir": _cache_dir,
        "max_plans": _some,
        "max_build_seconds": _seconds,
        "progress": _optional_flag,
    }
)
