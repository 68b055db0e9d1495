"""What a bare trace could have read beyond the module's tree, and edits of it."""

import collections
import contextvars
import functools
import threading
import types
import warnings
import weakref
from array import array
from collections.abc import Callable
from typing import Any, ClassVar
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from checks import check, paths, quietly, settle
from modules import make
from torch import Tensor, nn

import ovshim
from ovshim.generation import Generation
from ovshim.reached import UnwatchableError

TABLE: dict[str, Any] = {"a": {"b": [1.0]}}
SHIFT = torch.ones(4)
FACTOR = 2.0


class Holder:
    k = 2.0
    table: ClassVar = {"a": 1.0}

    def scaled(self, x: Tensor) -> Tensor:
        return x * self.k


class Slotted:
    __slots__ = ("k",)

    def __init__(self) -> None:
        self.k = 2.0


KNOWN = Holder()
CONTEXT = contextvars.ContextVar("CONTEXT", default=1.0)


def twice(x: Tensor) -> Tensor:
    return torch.square(x) * FACTOR + CONTEXT.get() * SHIFT * TABLE["a"]["b"][0]


@torch.compiler.disable
def wrapped(x: Tensor) -> Tensor:
    return twice(x)


class Reads(nn.Module):
    """Dynamo refuses it, for no harm to a trace."""

    __slots__ = ("own",)

    def __init__(self) -> None:
        super().__init__()
        self.own = 2.0
        self.linear = nn.Linear(8, 4)
        self.config = types.SimpleNamespace(scale=2.0, items=[1.0], tensor=torch.ones(4))
        self.nested = {"a": {"b": [Holder()]}}
        self.pair = (Holder(), [torch.ones(4)])
        self.queue = collections.deque([1.0])
        self.slotted = Slotted()
        self.part = functools.partial(F.leaky_relu, negative_slope=0.5)
        self.arrays = [np.ones(4), bytearray(4), array("f", [1.0])]
        self.known = weakref.ref(KNOWN)
        self.others = [nn.Linear(4, 4).eval()]
        self.odd = Odd([Holder()])
        self.config.hiding = Hiding([1.0])

    def forward(self, x: Tensor) -> Tensor:
        y = wrapped(self.linear(x)) * self.config.scale * self.config.items[0]
        y = self.nested["a"]["b"][0].scaled(y) + self.pair[1][0]
        return self.part(y) * self.slotted.k + self.queue[0]


EDITS: dict[str, Callable[[Any, pytest.MonkeyPatch], Any]] = {
    "object": lambda m, p: setattr(m.config, "scale", 3.0),
    "object's list": lambda m, p: m.config.items.append(3.0),
    "object's tensor": lambda m, p: m.config.tensor.add_(1),
    "new attribute": lambda m, p: setattr(m.config, "other", 3.0),
    "object in containers": lambda m, p: setattr(m.nested["a"]["b"][0], "k", 3.0),
    "key": lambda m, p: m.nested["a"].update(c=1),
    "object in a tuple": lambda m, p: setattr(m.pair[0], "k", 3.0),
    "tensor in a tuple": lambda m, p: m.pair[1][0].add_(1),
    "object in an odd tuple": lambda m, p: setattr(next(tuple.__iter__(m.odd)), "k", 3.0),
    "list that hides": lambda m, p: m.config.hiding.append(2.0),
    "queue": lambda m, p: m.queue.append(2.0),
    "slot": lambda m, p: setattr(m.slotted, "k", 3.0),
    "array": lambda m, p: m.arrays[0].fill(2),
    "bytes": lambda m, p: m.arrays[1].append(1),
    "array of Python's": lambda m, p: m.arrays[2].__setitem__(0, 2.0),
    "what is held weakly": lambda m, p: p.setattr(KNOWN, "k", 3.0),
    "context": lambda m, p: CONTEXT.set(2.0),
    "slot of a module": lambda m, p: setattr(m, "own", 3.0),
    "partial": lambda m, p: m.part.keywords.update(negative_slope=0.1),
    "weight of a module beside the tree": lambda m, p: m.others[0].weight.detach().add_(1),
    "hook of a module beside the tree": lambda m, p: m.others[0].register_forward_hook(print),
    "class": lambda m, p: p.setattr(Holder, "k", 3.0),
    "class's dict": lambda m, p: p.setitem(Holder.table, "a", 3.0),
    "method": lambda m, p: p.setattr(Holder, "scaled", lambda self, x: x),
    "global": lambda m, p: p.setitem(globals(), "FACTOR", 3.0),
    "global dict": lambda m, p: p.setitem(TABLE["a"], "b", [3.0]),
    "global tensor": lambda m, p: SHIFT.add_(1),
    "global function": lambda m, p: p.setitem(globals(), "twice", torch.sin),
    "code": lambda m, p: p.setattr(twice, "__code__", (lambda x: x).__code__),
    "library's function": lambda m, p: p.setattr(torch, "square", torch.sin),
    "what a layer of torch's calls": lambda m, p: p.setattr(F, "linear", lambda x, w, b: x @ w.T),
}


class Odd(tuple[Any, ...]):
    """As e3nn's Irrep."""

    def __len__(self) -> int:
        raise NotImplementedError


class Hiding(list[Any]):
    def __iter__(self) -> Any:
        return iter(())


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_an_edit_is_a_change(
    edit: Callable[[Any, pytest.MonkeyPatch], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = make(Reads)
    made = Generation(module, code=None, follow=True)
    with torch.inference_mode():
        module(torch.randn(3, 8))
    assert made.holds()
    assert made.holds()
    edit(module, monkeypatch)
    assert not made.holds()
    SHIFT.fill_(1)


def test_a_closure_is_reached() -> None:
    def around() -> tuple[Any, Any]:
        k = [2.0]

        def function(x: Tensor) -> Tensor:
            return x * k[0]

        def rebind() -> None:
            nonlocal k
            k = [3.0]

        return function, rebind

    module = make(Reads)
    module.function, rebind = around()
    made = Generation(module, follow=True)
    assert made.holds()
    rebind()
    assert not made.holds()


def test_a_traced_graph_goes_when_what_it_read_is_edited(monkeypatch: pytest.MonkeyPatch) -> None:
    module = make(Reads)
    x = torch.randn(3, 8)
    fast = ovshim.accelerate(module, x, prefer="openvino")
    assert ovshim.explain(fast).to_dict()["plans"][0]["route"] == "traced"
    check(fast, module, x)
    check(fast, module, x)
    for edit in ("object", "global"):
        EDITS[edit](module, monkeypatch)
        with quietly():
            settle(fast, module, x)


@pytest.mark.parametrize(
    ("held", "told"),
    [
        ([[float(n)] for n in range(6000)], "more than 5000 objects"),
        (np.zeros(10_000), "an array of 80000 bytes"),
        (threading.local(), "threading.local"),
        (mock.Mock(), "a mock counts its calls"),
    ],
    ids=["many", "large", "local", "mock"],
)
def test_what_cannot_be_watched(held: Any, told: str) -> None:
    module = make(Reads)
    module.config.other = held
    with pytest.raises(UnwatchableError, match=told):
        Generation(module, follow=True)


def test_a_mock_in_place_of_a_function_of_torchs_is_called_each_time() -> None:
    module, x = make(nn.Linear, 8, 4), torch.randn(3, 8)
    fast = ovshim.accelerate(module, x, prefer="openvino")
    patch = mock.patch.object(F, "linear", side_effect=lambda x, w, b: x @ w.T)
    with patch as patched, torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", ovshim.FallbackWarning)
        for _ in range(3):
            calls = patched.call_count
            assert torch.equal(fast(x), x @ module.weight.T)
            assert patched.call_count > calls
    with torch.no_grad(), quietly():
        torch.testing.assert_close(fast(x), module(x))


def test_what_cannot_be_watched_is_not_traced() -> None:
    module = make(Reads)
    module.config.other = threading.local()
    with pytest.warns(ovshim.FallbackWarning, match=r"traced, and .*threading\.local"):
        fast = ovshim.accelerate(module, torch.randn(3, 8), prefer="openvino")
    assert paths(fast) != ["openvino"]


class Counts(nn.Module):
    """Keeps a count where a look at its attributes does not see it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 4)
        self.state = types.SimpleNamespace(calls=0)

    def forward(self, x: Tensor) -> Tensor:
        y = wrapped(self.linear(x))
        self.state.calls += 1
        return y


@pytest.mark.parametrize("background", [False, True])
def test_what_changes_by_being_called_is_not_traced(background: bool) -> None:
    module = make(Counts)
    x = torch.randn(3, 8)
    with quietly():
        fast = ovshim.accelerate(module, x, prefer="openvino", background=background)
        assert fast.ovshim.wait()
        assert "openvino" not in paths(fast)
        for _ in range(3):
            before = fast.state.calls
            check(fast, module, x, path=None)
            assert fast.state.calls > before
