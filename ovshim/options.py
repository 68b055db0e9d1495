"""Every option of ovshim, defined once and checked when it is given.

`Options` is the record, `OptionFields` the same names for
`**options: Unpack[OptionFields]`, `resolve` makes the one out of the other.
"""

import dataclasses
import difflib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypedDict

from .checks import (
    CHECKS,
    INTEGERS,
    TOLERANCES,
    FrozenDict,
    Scalar,
    check_memory,
    check_together,
    first_items,
)
from .errors import OptionError

Prefer = Literal["faster", "openvino", "eager"]
Hint = Literal["latency", "throughput"]
Memory = Literal["shared", "lean"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How a module is accelerated. Immutable; checked and normalised when it is made.

    Raises OptionError, naming the value, what is allowed and the remedy, for a value that cannot
    be right. Whether a named device exists, and whether a shape fits the example, is found out
    where OpenVINO and the example are at hand.
    """

    device: str = "CPU"
    """OpenVINO's name of the device: `CPU`, `GPU`, `GPU.1`, `NPU`, `AUTO`,
    `AUTO:GPU,CPU`, `HETERO:GPU,CPU`, `MULTI:GPU,CPU`. Stored in upper case."""

    precision: str | Mapping[str, str] | None = None
    """`fp32`, `bf16` or `fp16` (`float32`, `bfloat16`, `half`, ... are understood);
    `int8`, which needs `calibration`; `int8_weights` and `int4_weights`, which do not; what
    stays in floats with these three runs in bf16 where that is faster and exact enough;
    `auto`: the fastest within `tolerance`; or rules: a mapping from patterns of module paths
    to fp32, bf16, fp16 or int8, in which the last match wins and `default` is for the rest.
    None: the module's own."""

    tolerance: float | Literal["strict", "loose"] | Callable[..., Any] | None = None
    """Largest relative L2 error per output against eager, above 0; `strict` is 0.002, `loose`
    0.05. None: 1e-4 for fp32, 0.03 for bf16, fp16 and int8_weights, 0.1 for int8, 0.15 for
    int4_weights, 0.02 for auto. For auto also a function: it is called with the outputs of a
    candidate, those of eager, and the items of calibration data, three lists, and says whether
    the candidate will do."""

    calibration: Iterable[Any] | Sequence[Any] | None = dataclasses.field(
        default=None, compare=False, repr=False
    )
    """Example inputs for int8 and auto: a DataLoader, a dataset, a list or a generator (of which
    the first 300 items are kept). Each item is a tensor, a tuple or a mapping, as
    `example_input` is; entries of a mapping that are no arguments (labels) are left out."""

    transform: Callable[[Any], Any] | None = None
    """Takes an item of `calibration` and gives the example input in it."""

    dynamic_batch: bool = True
    """Whether dimension 0 of every tensor input is open from the start. If not, it is opened as
    other sizes are: by one rebuild, when a call of another batch comes."""

    dynamic_shapes: Mapping[str, Any] | Sequence[Any] | None = dataclasses.field(
        default=None, hash=False
    )
    """Which other sizes may change, in the forms of `torch.export` or by plain names:
    `{"x": {0: "batch", 2: "length"}}`. Stored as read-only mappings and tuples."""

    prefer: Prefer = "faster"
    """`faster`: whichever wins a race; `openvino`: OpenVINO where it is right; `eager`."""

    hint: Hint = "latency"
    """Whether OpenVINO arranges itself for one caller (`latency`) or many (`throughput`)."""

    streams: int | None = None
    """Number of inferences that OpenVINO runs side by side, above 0; None: as `hint` says."""

    threads: int | None = None
    """Number of threads that OpenVINO computes with, above 0; None: as many as torch."""

    properties: Mapping[str, Scalar] = FrozenDict()
    """Further properties for OpenVINO's `compile_model`, name to text, number or bool. Those
    that another option sets are refused."""

    memory: Memory = "shared"
    """`shared`: torch's weights stay in memory beside OpenVINO's; `lean`: once a plan serves,
    they lie in a file of the cache and are read from it when somebody asks for them. Needs
    `inplace`: a twin shares its tensors with the original."""

    background: bool = False
    """Make plans in another thread; eager answers until they are proved."""

    inplace: bool = False
    """Accelerate the module itself instead of a twin."""

    methods: Sequence[str] = ("forward",)
    """Names of the methods that are accelerated. Stored as a tuple."""

    strict: bool = False
    """Raise FallbackError where a call would run in eager. Not where that is how the module is
    used: in training, under gradients, for values or indices that only eager can take, while a plan
    is being made or tried, and because eager is faster."""

    cache_dir: str | os.PathLike[str] | Literal[False] | None = None
    """Directory of the cache; None: `OVSHIM_CACHE_DIR` or the user's cache directory; False:
    nothing is kept. Stored as an absolute `Path`."""

    max_plans: int = 16
    """How many plans each method keeps, above 0: a plan is for one structure, set of dtypes, ranks
    and constants. One more takes the place of that which was used longest ago."""

    max_build_seconds: float = 120.0
    """What one build may take, proof and race included, in seconds, above 0; over it: eager."""

    progress: bool | None = None
    """Whether progress bars are shown; None: on a terminal."""

    def __post_init__(self) -> None:
        for name, check in CHECKS.items():
            object.__setattr__(self, name, check(name, getattr(self, name)))
        check_together(self.precision, self.tolerance, self.calibration)
        check_memory(self.memory, self.inplace)

    def portable(self) -> "Options":
        """The same with the items of calibration data in the place of what gives them."""
        if self.calibration is None or (type(self.calibration) is tuple and not self.transform):
            return self
        items = first_items(self.calibration, self.transform)
        return dataclasses.replace(self, calibration=tuple(items), transform=None)

    def tolerance_for(self, precision: str) -> float:
        """Largest relative L2 error accepted of that precision (`fp32`, `bf16`, ...).

        Raises KeyError for a precision without a default where no number was given.
        """
        if self.tolerance is None or callable(self.tolerance):
            return TOLERANCES[precision]
        return float(self.tolerance)


class OptionFields(TypedDict, total=False):
    """The fields of `Options` as keyword arguments; their meaning is told there."""

    device: str
    precision: str | Mapping[str, str] | None
    tolerance: float | Literal["strict", "loose"] | Callable[..., Any] | None
    calibration: Iterable[Any] | Sequence[Any] | None
    transform: Callable[[Any], Any] | None
    dynamic_batch: bool
    dynamic_shapes: Mapping[str, Any] | Sequence[Any] | None
    prefer: Prefer
    hint: Hint
    streams: int | None
    threads: int | None
    properties: Mapping[str, Scalar]
    memory: Memory
    background: bool
    inplace: bool
    methods: Sequence[str]
    strict: bool
    cache_dir: str | os.PathLike[str] | Literal[False] | None
    max_plans: int
    max_build_seconds: float
    progress: bool | None


def resolve(options: Options | None, fields: Mapping[str, Any]) -> Options:
    """The options meant by `options=` and single fields together; a field beats the whole.

    Raises OptionError for an unknown field, for an `options` of another type, and for whatever
    `Options` refuses.
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


def quantizes(options: Options) -> bool:
    """Whether anything may become integers by these options: then NNCF is needed."""
    asked = options.precision
    wanted = set(asked.values()) if isinstance(asked, Mapping) else {asked}
    return bool(wanted & INTEGERS) or (asked == "auto" and options.calibration is not None)


def for_part(options: Options) -> Options | None:
    """The same for the `forward` of a submodule by itself; None where they are of the whole alone,
    as rules are. Calibration data are calls of the whole, and stay with it."""
    if options.precision not in (None, "fp32", "bf16", "fp16"):
        return None
    return dataclasses.replace(
        options,
        methods=("forward",),
        calibration=None,
        transform=None,
        dynamic_shapes=None,
        strict=False,
        inplace=False,
        memory="shared",
    )


def enabled_in_environment() -> bool:
    """Whether the environment leaves ovshim on; `OVSHIM=0` switches it off.

    Asked once for each module, by its example or else by its first call, and when a scope is
    entered. Not in every call, where it would cost 1 µs: modules that have been called go on.
    """
    return os.environ.get("OVSHIM", "").strip().lower() not in {"0", "off", "false", "no"}
