"""A key changes with everything that changes an answer, and with nothing else."""

import copy
import enum
import functools
import importlib.util
import itertools
import os
import re
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.parametrize as parametrize
import torch.nn.utils.prune as prune
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers.models.bert import modeling_bert

from ovshim.fingerprint import Fingerprint, Unkeyable, fingerprint

ENVIRONMENT = {"openvino": "1", "processor": "x"}


def record(module: nn.Module, method: str = "forward") -> Fingerprint:
    return fingerprint(module, method, inputs="i", options="o", environment=ENVIRONMENT)


def key(module: nn.Module, method: str = "forward") -> str:
    return record(module, method).key


# ------------------------------------------------------------------ changes in the source

HELPERS = """
SHIFT = 3

def deep(x):
    return x * 1.25

def scale(x, factor=2.0, *, offset=0.5):
    return deep(x) * factor + offset

def unrelated(x):
    return x * 7

class Curve:
    power = 2
    def __init__(self, gain):
        self.gain = gain + SHIFT
    def __call__(self, x):
        return self.gain * x ** self.power

TABLE = {"low": 0.1, "high": 0.9}
"""

MODEL = """
import enum
import functools
import torch
from torch import nn
import torch.nn.functional as F
import helpers_under_test as helpers
from helpers_under_test import TABLE, Curve

SLOPE = 0.1
SIZES = (4, 4)
NAMES = {"relu", "tanh"}
CONFIG = {"a": 1, "b": {"c": [1, 2.0, None]}}

class Mode(enum.Enum):
    PLAIN = 1
    OTHER = 2

def closure(power):
    exponent = power + 1
    def raised(x):
        return x ** exponent
    return raised

def leaky(x, slope=SLOPE):
    return torch.where(x > 0, x, x * slope)

def doubled(function):
    @functools.wraps(function)
    def wrapper(*args):
        return 2 * function(*args)
    return wrapper

class Base(nn.Module):
    floor = 1e-5
    def finish(self, x):
        return x + self.floor
    @property
    def bias(self):
        return 0.25
    @staticmethod
    def soft(x):
        return F.softplus(x, beta=1.5)

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(4, eps=1e-5)
        self.act = nn.ReLU()
    def forward(self, x):
        return self.act(self.norm(x))

class Net(Base):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(4, 4)
        self.block = Block()
        self.mode = Mode.PLAIN
        self.kind = "low"
        self.curve = Curve(1.0)
        self.power = closure(1)
        self.late = lambda x: x - 0.125
        self.part = functools.partial(torch.clamp, min=-4.0)
        self.config = CONFIG
        self.mask = torch.tensor([1.0, 0.0, 1.0, 0.0])
        self.variant = "first"
    def summed(self, x):
        return sum(x[..., i] * 0.5 for i in range(SIZES[0]))
    def first(self, x):
        return x * 1.0
    @doubled
    def wrapped(self, x):
        return x / 3.0
    def forward(self, x, extra=0.75):
        x = leaky(self.inner(x)) + extra
        x = helpers.scale(x)
        x = self.curve(x) + TABLE[self.kind]
        x = self.power(self.late(self.part(x)))
        if self.mode is Mode.PLAIN and len(NAMES) == 2:
            x = self.block(x * self.mask)
        x = getattr(self, self.variant)(x)
        for layer in (self.inner, self.inner):
            x = layer(x)
        total = self.summed(x)
        import helpers_under_test
        total = total + helpers_under_test.SHIFT
        return self.soft(self.finish(self.wrapped(x)) + self.bias) + total[..., None]

def build():
    return Net().eval()
"""


@pytest.fixture
def load(tmp_path: Path) -> Iterator[Callable[..., nn.Module]]:
    """Makes a module of the two sources, each time from a directory of its own."""
    count = itertools.count()

    def make(model: str = MODEL, helpers: str = HELPERS) -> nn.Module:
        directory = tmp_path / f"copy{next(count)}"
        directory.mkdir()
        found = None
        for name, text in (("helpers_under_test", helpers), ("model_under_test", model)):
            path = directory / f"{name}.py"
            path.write_text(text)
            spec = importlib.util.spec_from_file_location(name, path)
            assert spec is not None
            assert spec.loader is not None
            found = importlib.util.module_from_spec(spec)
            sys.modules[name] = found
            spec.loader.exec_module(found)
        assert found is not None
        built = found.build()
        assert isinstance(built, nn.Module)
        built(torch.ones(2, 4))
        return built

    yield make
    for name in ("helpers_under_test", "model_under_test"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("x * 1.25", "x * 1.5"),  # two calls below the forward
        ("factor=2.0", "factor=2.5"),
        ("offset=0.5", "offset=-0.5"),
        ("SHIFT = 3", "SHIFT = 4"),
        ("power = 2", "power = 3"),
        ("gain + SHIFT", "gain - SHIFT"),
        ('"low": 0.1', '"low": 0.2'),
        ("SLOPE = 0.1", "SLOPE = 0.01"),
        ("SIZES = (4, 4)", "SIZES = (3, 4)"),
        ('NAMES = {"relu", "tanh"}', 'NAMES = {"relu"}'),
        ("power + 1", "power + 2"),
        ("closure(1)", "closure(2)"),
        ("x > 0, x", "x >= 0, x"),
        ("2 * function", "4 * function"),
        ("floor = 1e-5", "floor = 1e-6"),
        ("return 0.25", "return 0.5"),
        ("beta=1.5", "beta=1.25"),
        ("eps=1e-5", "eps=1e-6"),
        ("nn.ReLU()", "nn.GELU()"),
        ("Mode.PLAIN\n", "Mode.OTHER\n"),
        ('self.kind = "low"', 'self.kind = "high"'),
        ("Curve(1.0)", "Curve(1.5)"),
        ("x - 0.125", "x - 0.25"),
        ("min=-4.0", "min=-2.0"),
        ("torch.clamp, min", "torch.clip, min"),
        ("2.0, None", "2, None"),
        ("[1.0, 0.0, 1.0, 0.0]", "[1.0, 0.0, 1.0, 1.0]"),
        ("x * 1.0", "x * -1.0"),  # found by the string in an attribute
        ("x / 3.0", "x // 3.0"),
        ("extra=0.75", "extra=0.5"),
        ("manual_seed(0)", "manual_seed(1)"),
        ("x[..., i] * 0.5", "x[..., i] * 0.25"),  # inside a generator expression
        ("F.softplus", "F.elu_"),
        (".eval()", ".train()"),
        ("return x + self", "return x - self"),
    ],
)  # fmt: skip
def test_a_change_of_the_source_changes_the_key(
    load: Callable[..., nn.Module], old: str, new: str
) -> None:
    before = key(load())
    assert (old in MODEL) + (old in HELPERS) == 1
    if new == "F.elu_":  # beta is not its argument
        new, old = "F.softplus(x, beta=1.5, threshold=10)", "F.softplus(x, beta=1.5)"
    assert key(load(MODEL.replace(old, new), HELPERS.replace(old, new))) != before


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("", "\n\n# moved down by three lines\n"),
        ("x * 7", "x * 8"),  # a function that nothing reaches
        ("def unrelated(x):", "def renamed(x):"),
        ('{"relu", "tanh"}', '{"tanh", "relu"}'),
        ('{"a": 1, "b": {"c": [1, 2.0, None]}}\n', '{"b": {"c": [1, 2.0, None]}, "a": 1}\n'),
        ('{"low": 0.1, "high": 0.9}', '{"high": 0.9, "low": 0.1}'),
    ],
)  # fmt: skip
def test_a_change_that_changes_no_answer_keeps_the_key(
    load: Callable[..., nn.Module], old: str, new: str
) -> None:
    module = load()
    before, said = record(module).parts, details(module)
    module = load(*(text.replace(old, new, 1) for text in (MODEL, HELPERS)))
    assert record(module).parts == before, differing(said, details(module))


def details(module: nn.Module) -> dict[tuple[str, str], str]:
    found = record(module).details(module, "forward")
    return {(part, at): text for part, places in found.items() for at, text in places.items()}


def differing(*records: dict[tuple[str, str], str]) -> dict[str, list[str | None]]:
    """By place what two records say there, where that is not the same."""
    both = {
        f"{part}.{place}": [found.get((part, place)) for found in records]
        for part, place in records[0].keys() | records[1].keys()
    }
    return {place: texts for place, texts in both.items() if texts[0] != texts[1]}


HELPER, NET = "code.helpers_under_test", "code.model_under_test"


@pytest.mark.parametrize(
    ("old", "new", "places"),
    [
        ("x * 1.25", "x * 1.5", {f"{HELPER}.deep"}),
        ("factor=2.0", "factor=2.5", {f"{HELPER}.scale defaults"}),
        ("power = 2", "power = 3", {f"{HELPER}.Curve.power"}),
        ("power + 1", "power + 2", {f"{NET}.closure.<locals>.raised closure exponent"}),
        ("eps=1e-5", "eps=1e-6", {"code.block.norm.eps", f"{NET}.Block.__init__"}),
        ("x - 0.125", "x - 0.25", {f"{NET}.Net.__init__", f"{NET}.Net.__init__.<locals>.<lambda>"}),
        ("x[..., i] * 0.5", "x[..., i] * 0.25", {f"{NET}.Net.summed"}),
        ("[1.0, 0.0, 1.0, 0.0]", "[1.0, 0.0, 1.0, 1.0]", {"code.mask", f"{NET}.Net.__init__"}),
        ("manual_seed(0)", "manual_seed(1)",
         {f"{NET}.Net.__init__", "weights.inner.weight", "weights.inner.bias"}),
    ],
)  # fmt: skip
def test_a_record_says_where_it_differs(
    load: Callable[..., nn.Module], old: str, new: str, places: set[str]
) -> None:
    one = details(load())
    assert differing(one, details(load())) == {}  # from another directory
    assert differing(one, details(load("\nAHEAD = object\n" + MODEL))) == {}
    other = details(load(MODEL.replace(old, new), HELPERS.replace(old, new)))
    assert differing(one, other).keys() == places


def test_a_record_shows_numbers_and_nothing_else() -> None:
    module, other = small(), small()
    module.scale, other.scale = 2.0, -3
    assert differing(details(module), details(other)) == {"code.scale": ["2.0", "-3"]}
    other.scale = True
    assert differing(details(module), details(other)) == {"code.scale": ["2.0", "True"]}
    other.scale = "password"
    (said,) = differing(details(module), details(other)).values()
    assert said[0] == "2.0"
    assert re.fullmatch("[0-9a-f]{8}", said[1] or "")


def test_another_directory_gives_the_same_key(load: Callable[..., nn.Module]) -> None:
    assert key(load()) == key(load())


SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
from ovshim.fingerprint import fingerprint
if sys.argv[2] == "main":
    exec(compile(open(sys.argv[1] + "/model_under_test.py").read(), "<text>", "exec"))
else:
    from model_under_test import build
    if sys.argv[2] == "renamed":  # as in a child made by spawn
        sys.modules["__mp_main__"] = sys.modules.pop("model_under_test")
        for value in vars(sys.modules["__mp_main__"]).values():
            if getattr(value, "__module__", "") == "model_under_test":
                value.__module__ = "__mp_main__"
module = build()
module(torch.ones(2, 4))
print(fingerprint(module, "forward", inputs="i", options="o", environment={}).key)
"""


def test_another_process_gives_the_same_key(tmp_path: Path) -> None:
    (tmp_path / "model_under_test.py").write_text(MODEL)
    (tmp_path / "helpers_under_test.py").write_text(HELPERS)
    found = set()
    for seed, how in (("1", "import"), ("2", "main"), ("3", "renamed")):
        result = subprocess.run(
            [sys.executable, "-c", SCRIPT, str(tmp_path), how],
            env=os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True, text=True, timeout=120, check=True,
        )  # fmt: skip
        found.add(result.stdout)
    assert len(found) == 1


# ------------------------------------------------------------------ changes of an object


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.second = nn.Linear(3, 3)
        self.drop = nn.Dropout(0.5)
        self.register_buffer("offset", torch.zeros(3))
        self.scale: Any = 2.0

    def change(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.change(self.drop(self.second(self.first(x)))) * self.scale


def small() -> Small:
    torch.manual_seed(0)
    return Small().eval()


class Doubled(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2


class Tripled(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 3


def hook_a(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
    return output + 1


def hook_b(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
    return output + 2


def _hooks(module: Small, *hooks: Any) -> None:
    for hook in hooks:
        module.first.register_forward_hook(hook)


def _parametrized(module: Small, kind: type[nn.Module]) -> None:
    parametrize.register_parametrization(module.first, "weight", kind())


def _bound(module: Small, factor: int) -> None:
    def change(self: Small, x: torch.Tensor) -> torch.Tensor:
        return x * factor

    module.change = types.MethodType(change, module)  # type: ignore[method-assign]


def _half(module: Small) -> None:
    module.first.weight.data = module.first.weight.data.half().float()


CHANGES: list[Callable[[Small], Any]] = [
    lambda m: None,
    lambda m: setattr(m, "scale", 3.0),
    lambda m: setattr(m, "scale", 2),
    lambda m: setattr(m, "scale", True),
    lambda m: setattr(m, "scale", torch.tensor(2.0)),
    lambda m: setattr(m, "scale", torch.tensor([2.0])),
    lambda m: setattr(m, "scale", np.float32(2)),
    lambda m: setattr(m, "scale", np.float64(2)),
    lambda m: setattr(m, "scale", -0.0),
    lambda m: setattr(m, "scale", 0.0),
    lambda m: setattr(m, "unused", None),
    lambda m: setattr(m, "first", nn.Linear(3, 3)),
    lambda m: setattr(m, "first", m.second),
    lambda m: setattr(m, "second", nn.Identity()),
    lambda m: setattr(m.drop, "p", 0.25),
    lambda m: m.train(),
    lambda m: m.drop.train(),
    lambda m: m.half(),
    lambda m: m.double(),
    _half,
    lambda m: m.offset.add_(1e-30),
    lambda m: m.register_buffer("offset", torch.zeros(1)),
    lambda m: m.register_buffer("offset", None),
    lambda m: m.register_buffer("more", torch.zeros(3)),
    lambda m: m.add_module("more", nn.Identity()),
    lambda m: setattr(m.first, "bias", None),
    lambda m: setattr(m.first, "bias", m.second.bias),
    lambda m: _hooks(m, hook_a),
    lambda m: _hooks(m, hook_b),
    lambda m: _hooks(m, hook_a, hook_b),
    lambda m: _hooks(m, hook_b, hook_a),
    lambda m: m.register_forward_hook(hook_a),
    lambda m: m.first.register_forward_hook(hook_a, always_call=True),
    lambda m: m.first.register_forward_pre_hook(lambda module, args: args),
    lambda m: _parametrized(m, Doubled),
    lambda m: _parametrized(m, Tripled),
    lambda m: _bound(m, 2),
    lambda m: _bound(m, 3),
    lambda m: setattr(m, "forward", lambda x: x),
    lambda m: setattr(m, "__class__", type("Small", (Small,), {"change": hook_a})),
    lambda m: nn.utils.parametrizations.weight_norm(m.first),
    lambda m: prune.l1_unstructured(m.first, "weight", 2),
]  # fmt: skip


def test_every_change_of_an_object_gives_a_key_of_its_own() -> None:
    found: dict[str, int] = {}
    for position, change in enumerate(CHANGES):
        module = small()
        change(module)
        other = found.setdefault(key(module), position)
        assert other == position, f"changes {other} and {position} have one key"


@pytest.mark.parametrize("position", range(len(CHANGES) - 2))  # torch cannot copy the last two
def test_a_deep_copy_has_the_same_key(position: int) -> None:
    module = small()
    CHANGES[position](module)
    assert key(copy.deepcopy(module)) == key(module)


def test_what_changes_no_answer_keeps_the_key() -> None:
    module = small()
    before = key(module)
    module(torch.ones(1, 3)).sum().backward()  # grad
    module.requires_grad_(False)
    module.register_full_backward_hook(lambda *a: None)
    module.register_state_dict_post_hook(lambda *a: None)
    handle = module.first.register_forward_hook(hook_a)
    handle.remove()
    module.to(memory_format=torch.channels_last)
    order = dict(reversed(module._parameters.items()))
    module._parameters.clear()
    module._parameters.update(order)
    assert key(module) == before


def test_hooks_are_told_by_their_order_not_by_their_number() -> None:
    first, second = small(), small()
    first.first.register_forward_hook(hook_b).remove()
    _hooks(first, hook_a)
    _hooks(second, hook_a)
    assert key(first) == key(second)


def test_hooks_for_all_modules_are_seen() -> None:
    before = key(small())
    with_hook = nn.modules.module.register_module_forward_hook(hook_a)
    try:
        assert key(small()) != before
    finally:
        with_hook.remove()
    assert key(small()) == before


@given(st.data())
def test_one_bit_of_a_weight_changes_the_key(data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.int8]))
    shape = data.draw(st.sampled_from([(), (1,), (3, 5), (2, 3, 4)]))
    module = nn.Module()
    module.register_buffer("w", torch.zeros(shape, dtype=dtype))
    if data.draw(st.booleans()) and len(shape) > 1:
        module.w = torch.zeros(shape, dtype=dtype).transpose(0, 1)  # not contiguous
    before = record(module).parts["weights"]
    raw = module.w.contiguous().reshape(-1).view(torch.uint8)
    position = data.draw(st.integers(0, raw.numel() - 1))
    raw[position] ^= 1 << data.draw(st.integers(0, 7))
    module.w = raw.view(dtype).reshape(module.w.shape)
    assert record(module).parts["weights"] != before


def test_large_weights_are_hashed_in_pieces_and_whole() -> None:
    torch.manual_seed(0)
    module = nn.Linear(3000, 3001)  # 36 MB: over the limit for threads, no multiple of a piece
    before = record(module).parts["weights"]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert record(module).parts["weights"] == before
        torch.set_num_threads(4)
        assert record(module).parts["weights"] == before
    finally:
        torch.set_num_threads(threads)
    raw = module.weight.data.view(-1)
    raw[[0, -1]] = raw[[-1, 0]]
    assert record(module).parts["weights"] != before


def test_pieces_cannot_change_places() -> None:
    piece = 8 << 20
    buffer = torch.zeros(5 * piece, dtype=torch.uint8)
    buffer[:piece] = 1
    module = nn.Module()
    module.register_buffer("w", buffer)
    before = key(module)
    module.w = torch.cat([buffer[piece : 2 * piece], buffer[:piece], buffer[2 * piece :]])
    assert key(module) != before


@pytest.mark.parametrize("dtype", [torch.bool, torch.complex64, torch.float8_e4m3fn, torch.int64,
                                   torch.float64, torch.uint16])  # fmt: skip
def test_every_data_type_has_bytes(dtype: torch.dtype) -> None:
    keys = set()
    for shape in ((), (0,), (0, 3), (1,), (2, 2)):
        for content in (torch.zeros, torch.ones):
            module = nn.Module()
            module.register_buffer("w", content(shape).to(dtype))
            keys.add(key(module))
    assert len(keys) == 8


def test_a_conjugate_view_is_what_it_shows() -> None:
    values = torch.tensor([1 + 2j, 3 - 1j])
    keys = []
    for tensor in (values, values.conj(), values.conj().resolve_conj(), values.conj().imag):
        module = nn.Module()
        module.register_buffer("w", tensor)
        keys.append(key(module))
    assert keys[1] == keys[2]
    assert len(set(keys)) == 3


def test_layout_is_no_part_of_a_weight() -> None:
    first, second = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)
    second.load_state_dict(first.state_dict())
    second.weight.data = second.weight.data.contiguous(memory_format=torch.channels_last)
    assert key(first) == key(second)


class Reading(nn.Module):
    """Reads something of a weight that is no value of it."""

    def __init__(self, read: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.arange(16.0).view(4, 4))
        self.read = read

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * float(self.read(self.weight))


def _strided(weight: torch.Tensor) -> None:
    weight.data = weight.data.t().contiguous().t()


READ = {
    "whether it requires grad": (lambda w: w.requires_grad, lambda w: w.requires_grad_(False)),
    "whether it has a gradient": (lambda w: w.grad is None, lambda w: setattr(w, "grad", w * 2)),
    "an attribute": (lambda w: getattr(w, "hi", 1.0), lambda w: setattr(w, "hi", 2.0)),
    "its layout": (lambda w: w.is_contiguous(), _strided),
    "its memory": (lambda w: w.as_strided((4,), (1,))[1], _strided),
}


@pytest.mark.parametrize("name", READ)
def test_what_code_reads_of_a_weight_besides_its_values_is_part_of_the_key(name: str) -> None:
    read, write = READ[name]
    for reading in (read, lambda w: w.sum()):
        first, second = Reading(reading), Reading(reading)
        with torch.no_grad():
            write(second.weight)
        assert (key(first) == key(second)) == (reading is not read)


def test_the_values_of_gradients_count_where_code_reads_them() -> None:
    first, second = (Reading(lambda w: w.grad.sum()) for _ in range(2))
    first.weight.grad, second.weight.grad = torch.ones(4, 4), torch.zeros(4, 4)
    assert key(first) != key(second)
    second.weight.grad = torch.ones(4, 4)
    assert key(first) == key(second)


def test_tied_and_equal_weights_differ() -> None:
    def pair(tied: bool) -> nn.Module:
        first, second = nn.Linear(2, 2), nn.Linear(2, 2)
        second.load_state_dict(first.state_dict())
        if tied:
            second.weight = first.weight
        return nn.Sequential(first, second)

    torch.manual_seed(0)
    tied = pair(True)
    torch.manual_seed(0)
    assert key(tied) != key(pair(False))


# ------------------------------------------------------------------ order, values


class Held(nn.Module):
    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.value["a"]


class Iterating(Held):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for factor in self.value.values():
            x = (x + 1) * factor
        return x


def test_the_order_of_a_dict_matters_where_it_is_iterated() -> None:
    one, other = {"a": 1.0, "b": 2.0}, {"b": 2.0, "a": 1.0}
    assert key(Held(one)) == key(Held(other))
    assert key(Iterating(one)) != key(Iterating(other))


def test_the_order_of_submodules_matters() -> None:
    a, b = nn.Linear(2, 2), nn.Linear(2, 2)
    one = nn.ModuleDict({"a": a, "b": b})
    other = nn.ModuleDict({"b": b, "a": a})
    assert key(one) != key(other)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=3)
    | st.binary(max_size=3) | st.sampled_from([torch.float16, torch.device("cpu"), F.relu, len]),
    lambda inner: st.lists(inner, max_size=3) | st.tuples(inner) | st.tuples(inner, inner)
    | st.dictionaries(st.text(max_size=2) | st.integers(), inner, max_size=3)
    | st.sets(st.integers() | st.text(max_size=2), max_size=3),
    max_leaves=6,
)  # fmt: skip


def typed(value: Any) -> Any:
    """`value` in a form whose equality tells types and signs of zero apart."""
    if isinstance(value, dict):
        return dict, {typed(k): typed(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value), [typed(v) for v in value]
    if isinstance(value, set):
        return set, {typed(v) for v in value}
    return type(value), repr(value)


@given(VALUES, VALUES)
def test_values_have_one_key_exactly_when_they_are_equal(one: Any, other: Any) -> None:
    assert (key(Held(one)) == key(Held(other))) == (typed(one) == typed(other))


def _shuffled(value: Any, data: st.DataObject) -> Any:
    if isinstance(value, dict):
        items = data.draw(st.permutations(list(value.items())))
        return {k: _shuffled(v, data) for k, v in items}
    if isinstance(value, list | tuple):
        return type(value)([_shuffled(v, data) for v in value])
    if isinstance(value, set):
        return set(data.draw(st.permutations(list(value))))
    return value


@given(VALUES, st.data())
def test_the_order_in_which_a_dict_was_filled_does_not_matter(
    value: Any, data: st.DataObject
) -> None:
    assert key(Held(value)) == key(Held(_shuffled(value, data)))


def test_cycles_end() -> None:
    value: dict[str, Any] = {"a": 1.0}
    value["self"] = [value]
    module = Held(value)
    module.__dict__["back"] = module
    assert key(module) == key(copy.deepcopy(module))


class Settings:
    __slots__ = ("a", "b")

    def __init__(self, a: int, b: int) -> None:
        self.a = a
        self.b = b


class Count(int):
    def __init__(self, _: int) -> None:
        self.unit = "s"


def test_objects_are_read_through() -> None:
    values: list[Any] = [
        Settings(1, 2), Settings(2, 1), Count(1), Count(2), 1,
        functools.partial(F.gelu, approximate="tanh"), functools.partial(F.gelu),
        np.arange(3), np.arange(3.0), np.arange(4), np.array([[1, "x"]], dtype=object),
        torch.Size([1]), (1,), slice(1), slice(2), range(3), range(4), 1j, 2j,
        types.SimpleNamespace(a=1), types.SimpleNamespace(a=2),
        torch.distributions.Normal(0.0, 1.0), torch.distributions.Normal(0.0, 2.0),
        enum.Enum("E", "A B").A, enum.Enum("E", "A B").B,
    ]  # fmt: skip
    keys = [key(Held({"a": value})) for value in values]
    assert len(set(keys)) == len(keys)
    again = [key(Held({"a": copy.deepcopy(value)})) for value in values]
    assert keys == again


# ------------------------------------------------------------------ patched code


@pytest.fixture
def patch(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any, str, Any], None]:
    return lambda owner, name, value: monkeypatch.setattr(owner, name, value)


def _other(*args: Any, **kwargs: Any) -> Any:
    return args[0]


@pytest.mark.parametrize(
    ("owner", "name"),
    [(nn.Linear, "forward"), (F, "linear"), (nn.Module, "__call__"), (Small, "change"),
     (torch, "add"), (torch.Tensor, "__mul__")],
)  # fmt: skip
def test_patched_functions_are_seen(
    patch: Callable[[Any, str, Any], None], owner: Any, name: str
) -> None:
    module = small()
    before = key(module)
    patch(owner, name, _other)
    assert key(module) != before


@pytest.mark.parametrize("name", ["compile", "load", "save"])
def test_patches_that_compute_nothing_are_no_part_of_it(
    patch: Callable[[Any, str, Any], None], name: str
) -> None:
    """Lightning puts another `torch.compile` in place: a process that has imported it would find
    no entry of one that has not."""
    module = small()
    before = key(module)
    patch(torch, name, _other)
    assert key(module) == before


def test_one_of_torchs_own_functions_in_place_of_another_is_seen(
    patch: Callable[[Any, str, Any], None],
) -> None:
    module = nn.Tanh()
    before = key(module)
    patch(torch, "tanh", torch.sigmoid)
    assert key(module) != before


def bert(**changes: Any) -> nn.Module:
    torch.manual_seed(0)
    config = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
              "intermediate_size": 64, "vocab_size": 64}  # fmt: skip
    return transformers.BertModel(transformers.BertConfig(**{**config, **changes})).eval()


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (modeling_bert, "eager_attention_forward"),
        (modeling_bert.BertSelfAttention, "forward"),
        (modeling_bert.BertIntermediate, "forward"),
        (modeling_bert, "create_bidirectional_mask"),
        (modeling_bert, "apply_chunking_to_forward"),
    ],
)
def test_patches_of_an_installed_library_are_seen(
    patch: Callable[[Any, str, Any], None], owner: Any, name: str
) -> None:
    module = bert()
    before = key(module)
    patch(owner, name, _other)
    assert key(module) != before


def test_a_registered_attention_is_seen_by_who_names_it() -> None:
    registry = transformers.AttentionInterface()

    def use(function: Callable[..., Any], implementation: str) -> str:
        registry.register("mine_under_test", function)
        module = bert(attn_implementation="sdpa")
        module.config._attn_implementation_internal = implementation
        return key(module)

    try:
        named = [use(f, "mine_under_test") for f in (hook_a, hook_b)]
        others = [use(f, "sdpa") for f in (hook_a, hook_b)]
    finally:
        registry._global_mapping.pop("mine_under_test")
    assert named[0] != named[1]
    assert others[0] == others[1]


# ------------------------------------------------------------------ kinds of modules


def vit() -> nn.Module:
    return transformers.ViTModel(transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        image_size=32, patch_size=8))  # fmt: skip


def resnet() -> nn.Module:
    return transformers.ResNetModel(
        transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])
    )


MODULES: dict[str, Callable[[], nn.Module]] = {
    "bert": bert,
    "vit": vit,
    "resnet": resnet,
    "lstm": lambda: nn.LSTM(3, 4, 2),
    "transformer": lambda: nn.TransformerEncoder(
        nn.TransformerEncoderLayer(8, 2, batch_first=True), 2
    ),
    "attention": lambda: nn.MultiheadAttention(8, 2),
    "graph": lambda: torch.fx.symbolic_trace(small()),
    "graph of functions": lambda: torch.fx.symbolic_trace(nn.Sequential(Doubled(), nn.ReLU())),
}


@pytest.mark.parametrize("name", MODULES)
def test_modules_as_people_have_them(name: str) -> None:
    torch.manual_seed(0)
    module = MODULES[name]()
    assert key(module) == key(module)
    torch.manual_seed(0)
    assert key(MODULES[name]()) == key(module)
    assert key(copy.deepcopy(module)) == key(module)
    before = record(module.eval()).parts
    with torch.no_grad():
        next(module.parameters(), torch.zeros(1)).add_(1.0)
    after = record(module).parts
    assert before["code"] == after["code"]
    assert (before["weights"] == after["weights"]) == (name == "graph of functions")


def test_a_graph_is_keyed_by_its_code() -> None:
    first, second = (torch.fx.symbolic_trace(m()) for m in (Doubled, Tripled))
    assert key(first) != key(second)


def test_the_history_of_the_process_is_no_part_of_the_key() -> None:
    module = bert()
    before = key(module)
    ids = torch.ones(1, 4, dtype=torch.long)
    module(ids)
    vit()
    config = transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64)
    transformers.GPT2LMHeadModel(config)
    assert key(module) == before
    torch.manual_seed(0)
    assert key(bert()) == before


def test_a_configuration_that_changes_the_answer_changes_the_key() -> None:
    keys = {key(bert(**changes)) for changes in (
        {}, {"hidden_act": "relu"}, {"layer_norm_eps": 1e-6}, {"attn_implementation": "eager"},
        {"num_attention_heads": 4},
    )}  # fmt: skip
    assert len(keys) == 5


def test_where_a_model_was_loaded_from_is_no_part_of_its_key() -> None:
    module = bert()
    before = key(module)
    module.config._name_or_path = module.name_or_path = "elsewhere"
    assert key(module) == before


def test_code_without_a_source() -> None:
    def make(expression: str) -> nn.Module:
        scope: dict[str, Any] = {"nn": nn}
        text = f"class Net(nn.Module):\n    def forward(self, x):\n        return {expression}"
        exec(text, scope)
        module = scope["Net"]()
        assert isinstance(module, nn.Module)
        return module

    assert key(make("x + 1")) == key(make("x + 1"))
    assert key(make("x + 1")) != key(make("x + 2"))


def test_classes_of_one_name_are_not_confused() -> None:
    def make(factor: float) -> nn.Module:
        class Layer(nn.Module):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return x * factor

        return Layer()

    one = nn.Sequential(make(1.0), make(2.0))
    assert key(one) == key(nn.Sequential(make(1.0), make(2.0)))
    assert key(one) != key(nn.Sequential(make(2.0), make(1.0)))


def test_other_methods_have_keys_of_their_own() -> None:
    module = small()
    assert key(module, "change") != key(module)


def test_the_environment_that_code_reads_is_part_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    class Reading(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * float(os.environ.get("FACTOR_UNDER_TEST", "1"))

    module = Reading()
    keys = {key(module)}
    for value in ("1", "2"):
        monkeypatch.setenv("FACTOR_UNDER_TEST", value)
        keys.add(key(module))
    assert len(keys) == 3


class Transparent:
    _ovshim_transparent = True


def test_what_acceleration_puts_on_a_module_is_not_part_of_it() -> None:
    module = small()
    before = key(module)
    module.__dict__["forward"] = Transparent()
    assert key(module) == before


def test_the_parts_of_a_record() -> None:
    module = small()
    parts = record(module).parts
    assert set(parts) == {"code", "weights", "inputs", "options", "environment"}
    keys = {key(module)}
    for changed in ({"inputs": "j"}, {"options": "p"}, {"environment": {"openvino": "2"}},
                    {"inputs": "o", "options": "i"}):  # fmt: skip
        given = {"inputs": "i", "options": "o", "environment": ENVIRONMENT, **changed}
        keys.add(fingerprint(module, "forward", **given).key)  # type: ignore[arg-type]
    assert len(keys) == 5
    assert all(len(k) == 32 and int(k, 16) >= 0 for k in keys)


# ------------------------------------------------------------------ what has no key


def _generator() -> Iterator[int]:
    yield 1


class Hostile:
    @property
    def __class__(self) -> Any:  # as of a proxy whose object is gone
        raise ReferenceError("gone")


def _deep() -> list[Any]:
    value: list[Any] = []
    for _ in range(100_000):
        value = [value]
    return value


UNKEYABLE: dict[str, Callable[[], Any]] = {
    "generator": _generator,
    "hostile": Hostile,
    "deep": _deep,
    "set of objects": lambda: {object(), object()},
    "sparse": lambda: torch.zeros(2).to_sparse(),
    "meta": lambda: torch.zeros(2, device="meta"),
    "nested": lambda: torch.nested.nested_tensor([torch.zeros(2)], layout=torch.jagged),
    "scripted": lambda: torch.jit.script(nn.ReLU()),
}


@pytest.mark.parametrize("name", UNKEYABLE)
@pytest.mark.filterwarnings("ignore")
def test_what_cannot_be_keyed_says_so_and_where(name: str) -> None:
    module = nn.Sequential(nn.Identity(), Held({"a": 1}))
    module[1].__dict__["value"] = UNKEYABLE[name]()  # nn.Module would look at it first
    with pytest.raises(Unkeyable) as caught:
        key(module)
    assert caught.value.where.startswith("1.value")
    assert caught.value.what in str(caught.value)


def test_a_module_whose_weights_are_nowhere_has_no_key() -> None:
    with pytest.raises(Unkeyable):
        key(nn.Linear(2, 2, device="meta"))
    with pytest.raises(Unkeyable):
        key(nn.LazyLinear(2))


def test_a_lock_is_no_obstacle() -> None:
    assert key(Held(threading.Lock())) == key(Held(threading.Lock()))


@pytest.mark.slow
def test_speed() -> None:
    """A warm start has half a second: hashing may take a tenth of it."""
    module = transformers.BertModel(transformers.BertConfig()).eval()
    key(module)
    best = min(_timed(lambda: key(module)) for _ in range(5))
    assert best < 0.25  # 0.06 s where nobody else computes


def _timed(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start
