"""What a graph of Dynamo's read beyond the module's tree: after an edit the next call is right."""

import enum
import functools
import gc
import os
import types
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from checks import check, plans, settle
from torch import Tensor, nn

import ovshim
from ovshim.guards import BadGuardError, ValueGuard, from_json, to_json

NS = types.SimpleNamespace


class Mode(enum.Enum):
    A = 1
    B = 2


class Twice:
    def act(self, h: Tensor) -> Tensor:
        return h * 2


class Negative:
    def act(self, h: Tensor) -> Tensor:
        return -h


class Ranks(OrderedDict[str, float]):
    """What its own methods answer is not asked."""

    def keys(self) -> Any:
        return sorted(super().keys())


def in_turn(h: Tensor, ranks: dict[str, float]) -> Tensor:
    for rank in ranks.values():
        h = torch.tanh(h * rank)
    return h


class Slotted:
    __slots__ = ("k",)


class Meta(type):
    k = 2.0


class OfMeta(metaclass=Meta):
    pass


class Environment:
    @property
    def k(self) -> float:
        return float(os.environ.get("TESTED_FACTOR", "2"))


def helper(h: Tensor, o: Any = NS(k=2.0)) -> Tensor:  # noqa: B008
    return h * o.k


def passing(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def passes(*args: Any) -> Any:
        return function(*args)

    return passes


@passing
def decorated(h: Tensor) -> Tensor:
    return h * 2


@torch.compiler.allow_in_graph
def opaque(h: Tensor) -> Tensor:
    return h * FACTOR


@torch.compiler.assume_constant_result
def constant() -> float:
    return FACTOR


FACTOR = 2.0
STRATEGY: Any = Twice()
TABLE: dict[Any, Any] = {Mode.A: [lambda h: h * 2]}
LAYERS: dict[str, nn.Module] = {"leaky": nn.LeakyReLU(0.1)}
ENVIRONMENT = Environment()
VARIABLES = os.environ
REFERRED = Twice()
SPACE: dict[str, Any] = {"__name__": __name__, "OF_SPACE": 2.0}
exec("def of_space(h): return h * OF_SPACE", SPACE)
of_space = SPACE["of_space"]


def frozen(module: nn.Module) -> nn.Module:
    return module.eval().requires_grad_(False)


class Runs(nn.Module):
    def __init__(self, body: Callable[[Any, Tensor], Tensor], attributes: dict[str, Any]) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.body = body
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, self.linear(x))


Edit = Callable[[Any, pytest.MonkeyPatch], Any]
CASES: dict[str, tuple[Callable[[Any, Tensor], Tensor], Callable[[], dict[str, Any]], Edit]] = {
    "another object without a state": (
        lambda s, h: s.cfg.act.act(h),
        lambda: {"cfg": NS(act=Twice())},
        lambda m, p: setattr(m.cfg, "act", Negative()),
    ),
    "another global object without a state": (
        lambda s, h: STRATEGY.act(h),
        dict,
        lambda m, p: p.setitem(globals(), "STRATEGY", Negative()),
    ),
    "another class of an object": (
        lambda s, h: s.cfg.act.act(h),
        lambda: {"cfg": NS(act=Twice())},
        lambda m, p: setattr(m.cfg.act, "__class__", Negative),
    ),
    "an object is gone": (
        lambda s, h: h if s.cfg.extra is None else h * 2,
        lambda: {"cfg": NS(extra=NS())},
        lambda m, p: setattr(m.cfg, "extra", None),
    ),
    "a class asked for": (
        lambda s, h: h * 2 if isinstance(s.cfg.act, Twice) else h,
        lambda: {"cfg": NS(act=Twice())},
        lambda m, p: setattr(m.cfg, "act", Negative()),
    ),
    "an attribute that was not there": (
        lambda s, h: h * getattr(s.cfg, "k", 1.0),
        lambda: {"cfg": NS()},
        lambda m, p: setattr(m.cfg, "k", 3.0),
    ),
    "a slot that was empty": (
        lambda s, h: h * getattr(s.cfg.slotted, "k", 1.0),
        lambda: {"cfg": NS(slotted=Slotted())},
        lambda m, p: setattr(m.cfg.slotted, "k", 3.0),
    ),
    "an attribute of a parameter": (
        lambda s, h: h * getattr(s.linear.weight, "k", 1.0),
        dict,
        lambda m, p: setattr(m.linear.weight, "k", 3.0),
    ),
    "a method of the object's own": (
        lambda s, h: s.cfg.act.act(h),
        lambda: {"cfg": NS(act=Twice())},
        lambda m, p: setattr(m.cfg.act, "act", lambda h: -h),
    ),
    "a method of the class": (
        lambda s, h: STRATEGY.act(h),
        dict,
        lambda m, p: p.setattr(Twice, "act", Negative.act),
    ),
    "an attribute of the metaclass": (
        lambda s, h: h * OfMeta.k,  # type: ignore[attr-defined]
        dict,
        lambda m, p: p.setattr(Meta, "k", 3.0),
    ),
    "a set emptied": (
        lambda s, h: h * 2 if s.cfg.flags else h,
        lambda: {"cfg": NS(flags={"a"})},
        lambda m, p: m.cfg.flags.clear(),
    ),
    "a set's length": (
        lambda s, h: h * len(s.cfg.flags),
        lambda: {"cfg": NS(flags={"a"})},
        lambda m, p: m.cfg.flags.add("b"),
    ),
    **{
        f"the order of an {kind.__name__}": (
            lambda s, h: in_turn(h, s.ranks),
            lambda kind=kind: {"ranks": kind(a=1.0, b=5.0)},  # type: ignore[misc]
            lambda m, p: m.ranks.move_to_end("a"),
        )
        for kind in (OrderedDict, Ranks)
    },
    "the order of an OrderedDict in an object": (
        lambda s, h: in_turn(h, s.cfg.ranks),
        lambda: {"cfg": NS(ranks=OrderedDict(a=1.0, b=5.0))},
        lambda m, p: m.cfg.ranks.move_to_end("a"),
    ),
    "the order of an OrderedDict that a trace may have read": (
        lambda s, h: in_turn(h, s.cfg.ranks) * float(s.array.shape[0]),
        lambda: {"array": np.ones(4), "cfg": NS(ranks=OrderedDict(a=1.0, b=5.0))},
        lambda m, p: m.cfg.ranks.move_to_end("a"),
    ),
    "a member of a list": (
        lambda s, h: h * 2 if Mode.A in s.cfg.modes else h,
        lambda: {"cfg": NS(modes=[Mode.A])},
        lambda m, p: m.cfg.modes.__setitem__(0, Mode.B),
    ),
    "a global before a builtin": (
        lambda s, h: h * max(2.0, 3.0),
        dict,
        lambda m, p: p.setitem(globals(), "max", min),
    ),
    **{
        f"an item under {key!r}": (
            lambda s, h, key=key: h * s.cfg["inner"][key],  # type: ignore[misc]
            lambda key=key: {"cfg": {"inner": {key: 2.0}}},  # type: ignore[misc]
            lambda m, p, key=key: m.cfg["inner"].__setitem__(key, 3.0),  # type: ignore[misc]
        )
        for key in (Mode.A, (1, 2), 1.5, True, b"k", None, int, torch.float32)
    },
    "what is behind a key that is an object": (
        lambda s, h: TABLE[Mode.A][0](h),
        dict,
        lambda m, p: p.setitem(TABLE, Mode.A, [lambda h: -h]),
    ),
    "a layer in a global dict": (
        lambda s, h: LAYERS["leaky"](h),
        dict,
        lambda m, p: p.setattr(LAYERS["leaky"], "negative_slope", 0.9),
    ),
    "a layer in a list has another forward": (
        lambda s, h: s.cfg.layers[0](h),
        lambda: {"cfg": NS(layers=[nn.ReLU()])},
        lambda m, p: setattr(m.cfg.layers[0], "forward", torch.neg),
    ),
    "a layer appended in an object": (
        lambda s, h: s.cfg.layers(h),
        lambda: {"cfg": NS(layers=frozen(nn.Sequential(nn.Linear(8, 8))))},
        lambda m, p: m.cfg.layers.append(nn.Tanh()),
    ),
    "an object in a default": (
        lambda s, h: helper(h),
        dict,
        lambda m, p: p.setattr(helper.__defaults__[0], "k", 3.0),  # type: ignore[index]
    ),
    "what is held weakly": (
        lambda s, h: s.weak().act(h),
        lambda: {"weak": weakref.ref(REFERRED)},
        lambda m, p: p.setattr(REFERRED, "act", lambda h: -h, raising=False),
    ),
    "what a decorator holds": (
        lambda s, h: decorated(h),
        dict,
        lambda m, p: p.setattr(decorated.__closure__[0], "cell_contents", torch.neg),  # type: ignore[attr-defined]
    ),
    "the environment in a property": (
        lambda s, h: h * ENVIRONMENT.k,
        dict,
        lambda m, p: p.setenv("TESTED_FACTOR", "3"),
    ),
    "the environment by another name": (
        lambda s, h: h * float(VARIABLES.get("TESTED_FACTOR", "2")),
        dict,
        lambda m, p: p.setenv("TESTED_FACTOR", "3"),
    ),
    "what a function that Dynamo does not look into reads": (
        lambda s, h: opaque(h),
        dict,
        lambda m, p: p.setitem(globals(), "FACTOR", 3.0),
    ),
    "what a function taken for constant reads": (
        lambda s, h: h * constant(),
        dict,
        lambda m, p: p.setitem(globals(), "FACTOR", 3.0),
    ),
    "a name in another space than its module's": (
        lambda s, h: of_space(h),
        dict,
        lambda m, p: p.setitem(SPACE, "OF_SPACE", 3.0),
    ),
    "whether algorithms are deterministic": (
        lambda s, h: h * (3 if torch.are_deterministic_algorithms_enabled() else 2),
        dict,
        lambda m, p: torch.use_deterministic_algorithms(True),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_an_edit_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    body, attributes, edit = CASES[name]
    module = Runs(body, attributes()).eval()
    fast = ovshim.accelerate(module, torch.randn(3, 8), prefer="openvino")
    check(fast, module, torch.randn(3, 8))
    check(fast, module, torch.randn(3, 8))
    try:
        edit(module, monkeypatch)
        settle(fast, module, torch.randn(3, 8))
        check(fast, module, torch.randn(3, 8))
    finally:
        torch.use_deterministic_algorithms(False)


def test_hooks_and_flags_of_modules_beside_the_tree() -> None:
    module = Runs(
        lambda s, h: s.cfg.layers[0](h), {"cfg": NS(layers=[frozen(nn.BatchNorm1d(8))])}
    ).eval()
    fast = ovshim.accelerate(module, torch.randn(3, 8), prefer="openvino")
    check(fast, module, torch.randn(3, 8))
    handle = module.cfg.layers[0].register_forward_hook(lambda _m, _a, output: output * 3)
    check(fast, module, torch.randn(3, 8), path="eager")
    handle.remove()
    module.cfg.layers[0].train()
    check(fast, module, torch.randn(3, 8), path="eager")


def test_what_is_held_weakly_may_go() -> None:
    held = Twice()
    module = Runs(lambda s, h: s.weak().act(h), {"weak": weakref.ref(held)}).eval()
    fast = ovshim.accelerate(module, torch.randn(3, 8), prefer="openvino")
    check(fast, module, torch.randn(3, 8))
    reference = weakref.ref(held)
    del held
    gc.collect()  # of what Dynamo leaves
    assert reference() is None
    with pytest.raises(AttributeError):
        fast(torch.randn(3, 8))


def test_a_graph_with_what_nobody_could_watch_is_not_served() -> None:
    """The shape of an array is written to in place; Dynamo guards nothing of it."""
    module = Runs(lambda s, h: h * float(s.array.shape[0]), {"array": np.ones(4)}).eval()
    fast = ovshim.accelerate(module, torch.randn(3, 8), prefer="openvino")
    check(fast, module, torch.randn(3, 8))
    assert plans(fast)[0]["route"] == "traced"  # all that its code reads is watched
    module.array.shape = (2, 2)
    settle(fast, module, torch.randn(3, 8))


def test_steps_and_tests_as_they_are_stored() -> None:
    objects = {Mode.A: 1.0, 1.5: 2.0}
    held = NS(objects=objects, weak=weakref.ref(REFERRED))
    steps: dict[tuple[Any, ...], Any] = {
        (("attr", "objects"), ("nth", 0)): 1.0,
        (("own", "objects"), ("key", "1.5")): 2.0,
    }
    roots = {"module": held}
    for path, value in steps.items():
        guard = ValueGuard.now("module", path, "value", roots)
        assert from_json(to_json([guard])) == (guard,)
        assert guard.expected == f"float:{value}"
        assert guard.holds(roots)
    there = ValueGuard.now("module", (("attr", "weak"), ("weak", 0)), "found", roots)
    missing = ValueGuard.now("module", (("own", "other"),), "found", roots)
    assert (there.expected, missing.expected) == (1, 0)
    assert missing.holds(roots)
    held.other = 1
    assert not missing.holds(roots)
    with pytest.raises(BadGuardError):
        ValueGuard.now("module", (("attr", "objects"), ("key", "open")), "value", roots)
