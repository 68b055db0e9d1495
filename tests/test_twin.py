"""The twin: what works on a module works on its twin, and on either nothing of the other's changes.

The dispatcher here only counts and runs the original, so that these tests say nothing about
OpenVINO: a call that the twin would serve is one that the recorder counted.
"""

from __future__ import annotations

import copy
import functools
import gc
import inspect
import io
import os
import pickle
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import ovshim
from ovshim import bound
from ovshim.bound import BoundMethod, install, installed, uninstall
from ovshim.errors import OptionError
from ovshim.twin import make_twin

JIT_IS_DEPRECATED = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
TRACING_WARNS = pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")


class Recorder:
    """Stands where the dispatcher will; its class is the factory."""

    def __init__(self, module: nn.Module, original: Callable[..., Any]) -> None:
        self.module = module
        self.original = original
        self.calls = 0

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any], /) -> Any:
        self.calls += 1
        return self.original(*args, **kwargs)


def accelerated(module: nn.Module, *methods: str) -> Any:
    twin = make_twin(module)
    for method in methods or ("forward",):
        install(twin, method, Recorder)
    return twin


def calls(module: nn.Module, method: str = "forward") -> int:
    recorder = installed(module)[method].dispatcher
    assert isinstance(recorder, Recorder)
    assert recorder.module is module
    return recorder.calls


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
        self.head = nn.Linear(4, 4)
        self.scale = 2.0

    def forward(self, x: torch.Tensor, shift: float = 0.0) -> torch.Tensor:
        """The sentence that help() shows."""
        return self.head(self.body(x)) * self.scale + shift

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x) * self.scale

    def predict(self, x: torch.Tensor) -> torch.Tensor:
        return self(x).argmax(-1)


class Slotted(Net):
    __slots__ = ("__hidden", "offset")

    def __init__(self) -> None:
        super().__init__()
        self.offset = 3.0
        self.__hidden = 1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + self.offset + self.__hidden


class OwnCall(Net):
    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return super().__call__(x, shift=1.0) * 2


class Containers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.several = nn.ModuleList([nn.Linear(4, 4), nn.ReLU()])
        self.named = nn.ModuleDict({"norm": nn.LayerNorm(4), "act": nn.Tanh()})
        self.nothing: nn.Module | None
        self.register_module("nothing", None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.several:
            x = layer(x)
        return self.named["act"](self.named["norm"](x))


class Tied(nn.Module):
    """One weight in two modules, and one module in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.again = nn.Sequential(self.first, nn.ReLU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.again(self.first(x)))


class Attributes(nn.Module):
    """Modules and bound methods where `named_modules` does not look."""

    def __init__(self) -> None:
        super().__init__()
        self.listed = nn.Linear(4, 4)
        self.layers = [self.listed, nn.Linear(4, 4).requires_grad_(False)]
        self.stages = {"a": (nn.Linear(4, 4).requires_grad_(False), self.twice), "b": "text"}
        self.apply_scale = self.times
        self.partial = functools.partial(self.times, factor=0.5)
        self.scale = 3.0

    def twice(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2 * self.scale

    def times(self, x: torch.Tensor, factor: float = 1.0) -> torch.Tensor:
        return x * self.scale * factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        linear, double = self.stages["a"]
        return self.partial(self.apply_scale(double(linear(x))))


class Child(nn.Module):
    def __init__(self, parent: nn.Module) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 4)
        self.up = [parent]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin(x) * self.up[0].scale


class Cyclic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = 2.0
        self.child = Child(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.child(x)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 4, num_layers=2, bidirectional=True, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lstm(x[:, None])[0][:, 0]


class Positive(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.exp()


def parametrized() -> nn.Module:
    net = Net()
    parametrize.register_parametrization(net.head, "weight", Positive())
    return net


def parametrized_root() -> nn.Module:
    linear = nn.Linear(4, 4)
    parametrizations.weight_norm(linear)
    return linear


def weight_norm_by_hook() -> nn.Module:
    net = Net()
    net.head = torch.nn.utils.spectral_norm(net.head)
    return net


def graph_module() -> nn.Module:
    return torch.fx.symbolic_trace(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.BatchNorm1d(4)))


def traced() -> nn.Module:
    module = torch.jit.trace(Net().eval(), torch.ones(2, 4))
    assert isinstance(module, nn.Module)
    return module


def scripted() -> nn.Module:
    module = torch.jit.script(Containers2())
    assert isinstance(module, nn.Module)
    return module


class Containers2(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stack = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Dropout(), nn.ReLU()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.stack(x) * 2


def patched_instance() -> nn.Module:
    """An instance attribute `forward`, as accelerate's hooks and users put it there."""
    net = Net()
    inner = net.forward
    net.forward = functools.partial(inner, shift=5.0)
    return net


PYTHON: dict[str, Callable[[], nn.Module]] = {
    "net": Net,
    "slots": Slotted,
    "own call": OwnCall,
    "sequential": lambda: nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.GELU())),
    "containers": Containers,
    "tied": Tied,
    "attributes": Attributes,
    "cyclic": Cyclic,
    "lstm": Recurrent,
    "parametrized": parametrized,
    "weight norm": parametrized_root,
    "spectral norm by hooks": weight_norm_by_hook,
    "graph module": graph_module,
    "patched instance": patched_instance,
}
SCRIPTED: dict[str, Callable[[], nn.Module]] = {"traced": traced, "scripted": scripted}
python_modules = pytest.mark.parametrize("make", PYTHON.values(), ids=PYTHON)
all_modules = pytest.mark.parametrize(
    "make",
    [
        *(pytest.param(m, id=k) for k, m in PYTHON.items()),
        *(pytest.param(m, id=k, marks=JIT_IS_DEPRECATED) for k, m in SCRIPTED.items()),
    ],
)


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(3, 4)


@pytest.fixture
def module() -> Net:
    return Net().eval()


def state_of(module: nn.Module) -> dict[tuple[str, ...], Any]:
    """Every attribute, and every entry of the dicts among them, of every module of the tree."""
    found: dict[tuple[str, ...], Any] = {}
    for name, each in module.named_modules(remove_duplicate=False):
        for key, value in each.__dict__.items():
            found[name, key] = value
            if isinstance(value, dict):
                found |= {(name, key, str(k)): v for k, v in value.items()}
                found[name, key, "keys"] = tuple(value)
    return found


def changes(before: dict[tuple[str, ...], Any], after: dict[tuple[str, ...], Any]) -> list[Any]:
    return [
        key
        for key in before.keys() | after.keys()
        if before.get(key) is not after.get(key)
        and not (key[-1] == "keys" and before.get(key) == after.get(key))
    ]


# --- every kind of module ----------------------------------------------------------------------


@all_modules
def test_answers_as_the_module_does(make: Callable[[], nn.Module], x: torch.Tensor) -> None:
    module = make().eval()
    fast = accelerated(module)
    assert torch.equal(fast(x), module(x))
    assert calls(fast) == 1


@all_modules
def test_looks_as_the_module_does(make: Callable[[], nn.Module]) -> None:
    module = make()
    fast = accelerated(module)
    assert type(fast) is type(module)
    assert isinstance(fast, type(module))
    assert list(fast.state_dict()) == list(module.state_dict())
    assert [n for n, _ in fast.named_modules()] == [n for n, _ in module.named_modules()]
    assert [n for n, _ in fast.named_parameters()] == [n for n, _ in module.named_parameters()]
    assert [n for n, _ in fast.named_buffers()] == [n for n, _ in module.named_buffers()]
    assert repr(fast) == repr(module)


@python_modules
def test_shares_every_tensor_and_no_module(make: Callable[[], nn.Module]) -> None:
    module = make()
    fast = accelerated(module)
    tensors = zip(fast.parameters(), module.parameters(), strict=True)
    assert all(a is b for a, b in tensors)
    assert all(a is b for a, b in zip(fast.buffers(), module.buffers(), strict=True))
    assert not {id(m) for m in fast.modules()} & {id(m) for m in module.modules()}


@JIT_IS_DEPRECATED
@pytest.mark.parametrize("make", SCRIPTED.values(), ids=SCRIPTED)
def test_scripted_modules_share_memory_and_have_their_own_flags(
    make: Callable[[], nn.Module],
) -> None:
    module = make().eval()
    fast = accelerated(module)
    pairs = list(zip(fast.parameters(), module.parameters(), strict=True))
    assert pairs
    assert all(a.data_ptr() == b.data_ptr() for a, b in pairs)
    fast.train()
    assert not any(m.training for m in module.modules())
    assert all(m.training for m in fast.modules())
    module.double()
    assert all(p.dtype == torch.float64 for p in fast.parameters())


@all_modules
def test_leaves_the_original_alone(make: Callable[[], nn.Module], x: torch.Tensor) -> None:
    module = make().train()
    before = state_of(module)
    fast = accelerated(module).eval()
    if not isinstance(fast, torch.jit.ScriptModule):  # these refuse hooks
        fast.register_forward_hook(lambda *_: None)
        for child in fast.children():
            child.register_forward_pre_hook(lambda *_: None)
    fast(x)
    fast.note = "mine"
    assert changes(before, state_of(module)) == []


def refusal(action: Callable[[nn.Module], Any], module: nn.Module) -> Exception | None:
    """What `action` raises on the plain module, if it does not work there already."""
    try:
        action(module)
    except Exception as error:
        return error
    return None


def by_pickle(module: nn.Module) -> Any:
    return pickle.loads(pickle.dumps(module))


@python_modules
@pytest.mark.parametrize("copier", [copy.deepcopy, by_pickle])
def test_copies_are_accelerated_and_independent(
    make: Callable[[], nn.Module], copier: Callable[[nn.Module], Any], x: torch.Tensor
) -> None:
    module = make().eval()
    fast = accelerated(module)
    if refused := refusal(lambda m: copier(m)(x), module):
        with pytest.raises(type(refused)):
            copier(fast)(x)
        return
    copied = copier(fast)
    expected = module(x)
    with torch.no_grad():
        for tensor in module.parameters():
            tensor.zero_()
    assert torch.equal(copied(x), expected)
    if isinstance(module, torch.fx.GraphModule):
        assert not installed(copied)  # rebuilt from its graph alone: plain, and right
    else:
        assert calls(copied) == 1


@python_modules
def test_functional_call(make: Callable[[], nn.Module], x: torch.Tensor) -> None:
    torch.manual_seed(0)
    module = make().eval()
    fast = accelerated(module)
    weights = {name: p.detach() * 2 for name, p in module.named_parameters()}
    # Not of `module`: where one module stands in two places, torch does not put weights back.
    torch.manual_seed(0)
    expected = torch.func.functional_call(make().eval(), weights, (x,))
    assert torch.equal(torch.func.functional_call(fast, weights, (x,)), expected)


@JIT_IS_DEPRECATED
@TRACING_WARNS
@python_modules
def test_jit_trace_runs_the_original(make: Callable[[], nn.Module], x: torch.Tensor) -> None:
    module = make().eval()
    fast = accelerated(module)
    with torch.no_grad():
        traced = torch.jit.trace(fast, x, check_trace=False)
    assert calls(fast) == 0
    assert torch.allclose(traced(x), module(x))


@python_modules
def test_export_runs_the_original(make: Callable[[], nn.Module], x: torch.Tensor) -> None:
    module = make().eval()
    fast = accelerated(module)
    if refused := refusal(lambda m: torch.export.export(m, (x,)), module):
        with pytest.raises(type(refused)):
            torch.export.export(fast, (x,))
        return
    program = torch.export.export(fast, (x,))
    assert calls(fast) == 0
    assert torch.allclose(program.module()(x), module(x))


# --- torch over a twin -------------------------------------------------------------------------


@pytest.fixture
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_fresh_dynamo")
@pytest.mark.parametrize("name", ["net", "own call", "cyclic", "attributes", "tied"])
def test_compile_inlines_the_original(name: str, x: torch.Tensor) -> None:
    module = PYTHON[name]().eval()
    fast = accelerated(module)
    compiled = torch.compile(fast, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert torch.allclose(compiled(x), module(x))
        assert torch.allclose(compiled(x), module(x))
    assert calls(fast) == 0


@pytest.mark.usefixtures("_fresh_dynamo")
def test_compile_sees_a_twin_inside_and_beside(module: Net, x: torch.Tensor) -> None:
    fast = accelerated(module, "forward", "encode")

    def use(x: torch.Tensor) -> torch.Tensor:
        return fast.encode(x) + fast(x, shift=1.0)

    frames = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(use, fullgraph=True, backend=frames)
    for _ in range(3):
        assert torch.allclose(compiled(x), module.encode(x) + module(x, shift=1.0))
    assert frames.frame_count == 1
    model = nn.Sequential(fast, nn.ReLU())
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.allclose(compiled(x), module(x).relu())
    assert (calls(fast), calls(fast, "encode")) == (0, 0)
    fast.scale = 7.0
    module.scale = 7.0
    assert torch.allclose(compiled(x), module(x).relu())


@pytest.mark.usefixtures("_fresh_dynamo")
def test_strict_export(module: Net, x: torch.Tensor) -> None:
    program = torch.export.export(accelerated(module), (x,), strict=True)
    assert torch.allclose(program.module()(x), module(x))


def test_fx_runs_the_original(module: Net, x: torch.Tensor) -> None:
    fast = accelerated(module)
    graph = torch.fx.symbolic_trace(fast)
    assert torch.equal(graph(x), module(x))
    inner = nn.Sequential(fast, nn.ReLU())
    assert torch.equal(torch.fx.symbolic_trace(inner)(x), module(x).relu())
    assert calls(fast) == 0


@JIT_IS_DEPRECATED
def test_jit_script() -> None:
    module = Containers2().eval()
    x = torch.randn(2, 4)
    assert torch.equal(torch.jit.script(accelerated(module))(x), module(x))


def test_vmap_and_grad(module: Net, x: torch.Tensor) -> None:
    fast = accelerated(module)
    stacked = {n: torch.stack([p, p * 2]) for n, p in module.named_parameters()}

    def run(model: nn.Module) -> torch.Tensor:
        def one(weights: dict[str, torch.Tensor]) -> torch.Tensor:
            return torch.func.functional_call(model, weights, (x,))

        return torch.func.vmap(one)(stacked)

    assert torch.equal(run(fast), run(module))
    weights = {n: p.detach() for n, p in module.named_parameters()}

    def loss(model: nn.Module, weights: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.func.functional_call(model, weights, (x,)).sum()

    ours = torch.func.grad(functools.partial(loss, fast))(weights)
    theirs = torch.func.grad(functools.partial(loss, module))(weights)
    assert all(torch.equal(ours[n], theirs[n]) for n in weights)


def test_backward(module: Net, x: torch.Tensor) -> None:
    fast = accelerated(module.train())
    torch.manual_seed(1)
    module(x).sum().backward()
    expected = {n: p.grad for n, p in module.named_parameters()}
    module.zero_grad()
    torch.manual_seed(1)
    fast(x).sum().backward()
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name])


# --- what the method looks like ----------------------------------------------------------------


def test_the_method_looks_like_the_original(module: Net) -> None:
    fast = accelerated(module, "forward", "encode")
    for name in ("forward", "encode"):
        ours, theirs = getattr(fast, name), getattr(module, name)
        assert inspect.signature(ours) == inspect.signature(theirs)
        assert inspect.getfullargspec(ours) == inspect.getfullargspec(theirs)
        assert inspect.ismethod(ours)
        assert inspect.getsource(ours) == inspect.getsource(theirs)
        assert inspect.unwrap(ours) is ours
        assert ours.__self__ is fast
        for attribute in (
            "__func__",
            "__code__",
            "__globals__",
            "__closure__",
            "__defaults__",
            "__kwdefaults__",
            "__annotations__",
            "__doc__",
            "__name__",
            "__qualname__",
        ):
            assert getattr(ours, attribute) == getattr(theirs, attribute), attribute
        assert not hasattr(ours, "no_such_attribute")
    assert "Net.forward" in repr(fast.forward)


def test_marks_on_the_method_are_seen() -> None:
    class Marked(nn.Module):
        @torch.jit.ignore
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    module = Marked()
    fast = accelerated(module)
    marker = "_torchscript_modifier"
    assert getattr(fast.forward, marker) == getattr(module.forward, marker)


def test_a_forward_that_is_no_function(x: torch.Tensor) -> None:
    class Static(nn.Module):
        @staticmethod
        def forward(x: torch.Tensor) -> torch.Tensor:
            return x + 1

    class Decorated(nn.Module):
        forward = functools.partialmethod(Net.predict)

        def __call__(self, x: torch.Tensor) -> torch.Tensor:
            return x

    fast = accelerated(Static())
    assert torch.equal(fast(x), x + 1)
    assert calls(fast) == 1
    assert inspect.signature(fast.forward) == inspect.signature(Static().forward)
    assert "x" in inspect.signature(accelerated(Decorated()).forward).parameters


def test_a_forward_replaced_on_the_class_is_seen(x: torch.Tensor) -> None:
    class Changing(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    fast = accelerated(Changing())
    assert torch.equal(fast(x), x)

    def forward(self: Changing, x: torch.Tensor, by: int = 2) -> torch.Tensor:
        return x * by

    Changing.forward = forward
    assert torch.equal(fast(x, by=3), x * 3)
    assert "by" in inspect.signature(fast.forward).parameters
    assert calls(fast) == 2


def test_the_method_alone_keeps_its_module_alive(module: Net, x: torch.Tensor) -> None:
    forward = accelerated(module).forward
    gc.collect()
    assert torch.equal(forward(x), module(x))
    assert forward.dispatcher.calls == 1


def test_a_twin_is_collected(module: Net, x: torch.Tensor) -> None:
    fast = accelerated(module)
    fast(x)
    seen = weakref.ref(fast)
    del fast
    gc.collect()
    assert seen() is None


# --- each its own, and shared tensors ----------------------------------------------------------


def test_flags_are_each_ones_own(module: Net) -> None:
    fast = accelerated(module)
    fast.train()
    assert not any(m.training for m in module.modules())
    fast.eval()
    module.train()
    assert not any(m.training for m in fast.modules())


def test_hooks_are_each_ones_own(module: Net, x: torch.Tensor) -> None:
    fired: list[str] = []
    module.register_forward_hook(lambda *_: fired.append("before the twin"))
    fast = accelerated(module)
    fast.register_forward_hook(lambda *_: fired.append("twin"))
    fast.body.register_forward_pre_hook(lambda *_: fired.append("twin's body"))
    module.register_forward_hook(lambda *_: fired.append("original"))
    module.head.register_forward_hook(lambda *_: fired.append("original's head"))
    fast(x)
    assert fired == ["twin's body", "before the twin", "twin"]
    fired.clear()
    module(x)
    assert fired == ["original's head", "before the twin", "original"]


def test_hooks_with_kwargs_and_results(module: Net, x: torch.Tensor) -> None:
    def shifted(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, kwargs | {"shift": 10.0}

    module.register_forward_pre_hook(shifted, with_kwargs=True)
    module.register_forward_hook(lambda _, __, out: out * 2, always_call=True)
    fast = accelerated(module)
    assert torch.equal(fast(x), module(x))
    assert calls(fast) == 1


def test_hooks_bound_to_the_module_and_their_handles_move_along(x: torch.Tensor) -> None:
    class Hooked(Net):
        def __init__(self) -> None:
            super().__init__()
            self.seen = 0
            self.handle = self.register_forward_pre_hook(self.look)
            self._register_load_state_dict_pre_hook(self.loading, with_module=True)

        def look(self, *_: Any) -> None:
            self.seen += 1

        @staticmethod
        def loading(module: nn.Module, *_: Any) -> None:
            module.loaded = True

    module = Hooked().eval()
    fast = accelerated(module)
    fast(x)
    assert (fast.seen, module.seen) == (1, 0)
    fast.load_state_dict(module.state_dict())
    assert fast.loaded
    assert not hasattr(module, "loaded")
    fast.handle.remove()
    fast(x)
    module(x)
    assert (fast.seen, module.seen) == (1, 1)


def test_tensors_are_shared_through_either(module: Net, x: torch.Tensor) -> None:
    fast = accelerated(module)
    replaced = {name: torch.rand_like(t) for name, t in module.state_dict().items() if t.dim()}
    for loader, other in ((module, fast), (fast, module)):
        loader.load_state_dict(copy.deepcopy(replaced), strict=False, assign=True)
        assert other.head.weight is loader.head.weight
        assert torch.equal(other(x), loader(x))
    module.half()
    assert {p.dtype for p in fast.parameters()} == {torch.float16}
    fast.to(torch.float64)
    assert {p.dtype for p in module.parameters()} == {torch.float64}
    module.head.register_parameter("extra", nn.Parameter(torch.ones(1)))
    assert "head.extra" in fast.state_dict()
    fast.head.register_buffer("fleeting", torch.ones(1), persistent=False)
    assert "head.fleeting" in dict(module.named_buffers())
    assert "head.fleeting" not in module.state_dict()


def test_structure_is_each_ones_own(module: Net, x: torch.Tensor) -> None:
    fast = accelerated(module)
    expected = module(x)
    module.head = nn.Linear(4, 9)
    module.body.append(nn.Tanh())
    module.scale = 100.0
    assert torch.equal(fast(x), expected)
    fast.head = nn.Linear(4, 7)
    assert module(x).shape == (3, 9)


def test_a_twin_costs_no_memory_for_tensors(module: Net) -> None:
    pointers = {t.data_ptr() for t in module.state_dict().values()}
    fast = accelerated(module)
    assert {t.data_ptr() for t in fast.state_dict().values()} == pointers
    assert {id(t) for t in fast.parameters()} == {id(t) for t in module.parameters()}


def test_a_module_used_twice_is_one_module_in_the_twin() -> None:
    fast = accelerated(Tied())
    assert fast.again[0] is fast.first
    assert fast.second.weight is fast.first.weight
    assert len(list(fast.modules())) == len(list(Tied().modules()))


def test_plain_attributes_lead_into_the_twins_tree(x: torch.Tensor) -> None:
    module = Attributes()
    fast = accelerated(module)
    assert fast.layers[0] is fast.listed
    assert fast.layers[1] is not module.layers[1]
    assert fast.layers[1].weight is module.layers[1].weight
    assert fast.apply_scale.__self__ is fast
    fast.scale = 5.0
    assert torch.allclose(fast(x) * 27, module(x) * 125)
    cyclic = Cyclic()
    assert accelerated(cyclic).child.up[0] is not cyclic


def test_containers_without_modules_stay_shared() -> None:
    module = Net()
    module.log = log = []
    module.names = names = {"a": (1, 2)}
    fast = make_twin(module)
    assert fast.log is log
    assert fast.names is names


def test_weak_references_to_modules() -> None:
    class Aware(nn.Module):
        def __init__(self, parent: nn.Module) -> None:
            super().__init__()
            self.parent = weakref.ref(parent)

    module = Net()
    module.aware = Aware(module)
    fast = make_twin(module)
    assert fast.aware.parent() is fast
    stranger = Net()
    module.aware.parent = weakref.ref(stranger)
    assert make_twin(module).aware.parent() is stranger


def test_an_lstm_answers_with_the_weights_of_now(x: torch.Tensor) -> None:
    module = Recurrent().eval()
    fast = accelerated(module)
    fast(x)
    for loader in (module, fast, module):
        loader.double().float()
        weights = {n: torch.randn_like(t) for n, t in module.state_dict().items()}
        loader.load_state_dict(weights, assign=True)
        fresh = Recurrent()
        fresh.load_state_dict(weights)
        assert torch.equal(module(x), fresh(x))
        assert torch.equal(fast(x), fresh(x))
    lstm = fast.lstm
    flat = [getattr(lstm, name) for name in lstm._flat_weights_names]
    assert all(a is b for a, b in zip(lstm._flat_weights, flat, strict=True))
    assert all(ref() is w for ref, w in zip(lstm._flat_weight_refs, flat, strict=True))


def test_a_parametrization_on_one_of_them(module: Net, x: torch.Tensor) -> None:
    """The other has lost the parameter, and says so: nothing stale is used."""
    fast = accelerated(module)
    parametrizations.weight_norm(fast.head)
    fast(x)
    assert calls(fast) == 1
    with pytest.raises(AttributeError):
        module(x)


def test_compiled_in_place_modules_do_not_run_the_original(module: Net, x: torch.Tensor) -> None:
    module.compile(backend="eager")
    fast = accelerated(module)
    assert torch.equal(fast(x), Net.forward(module, x))
    assert calls(fast) == 1


def test_lazy_modules_are_refused_until_they_have_run(x: torch.Tensor) -> None:
    module = nn.Sequential(nn.LazyLinear(4), nn.LazyBatchNorm1d())
    with pytest.raises(OptionError, match="Run the module once"):
        make_twin(module)
    module.eval()(x)
    assert torch.equal(accelerated(module)(x), module(x))


@pytest.mark.parametrize("fields", [{}, {"memory": "lean"}])
def test_a_lazy_module_with_an_example_is_refused_in_place(
    fields: dict[str, Any], x: torch.Tensor
) -> None:
    module = nn.Sequential(nn.LazyLinear(4)).eval()
    with pytest.raises(OptionError, match="Run the module once"):
        ovshim.accelerate(module, x, inplace=True, **fields)
    assert not {"forward", "ovshim"} & set(vars(module))


def test_a_lazy_module_with_parameters_that_has_not_run(x: torch.Tensor) -> None:
    module = nn.LazyLinear(4)
    module.initialize_parameters(x)
    fast = accelerated(module)
    assert torch.equal(fast(x), fast(x))
    assert type(fast) is nn.Linear
    assert type(module) is nn.LazyLinear
    assert torch.equal(module(x), fast(x))


def test_a_class_that_cannot_be_made_without_its_constructor() -> None:
    class Listed(nn.Module, list):
        pass

    with pytest.raises(ValueError, match="inplace=True"):
        make_twin(Listed())


def test_deep_trees(x: torch.Tensor) -> None:
    module: nn.Module = nn.Linear(4, 4)
    for _ in range(200):
        module = nn.Sequential(module)
    assert torch.equal(accelerated(module)(x), module(x))


def test_a_twin_of_an_accelerated_module(module: Net, x: torch.Tensor) -> None:
    fast = accelerated(module)
    inner = nn.Sequential(fast, nn.ReLU())
    outer = accelerated(inner)
    assert torch.equal(outer(x), module(x).relu())
    assert (calls(outer), calls(outer[0]), calls(fast)) == (1, 1, 0)
    again = accelerated(fast)
    assert torch.equal(again(x), module(x))
    assert (calls(again), calls(fast)) == (1, 0)
    uninstall(again, "forward")
    assert "forward" not in again.__dict__


# --- methods -----------------------------------------------------------------------------------


def test_calls_of_itself_inside_methods_are_served(module: Net, x: torch.Tensor) -> None:
    fast = accelerated(module)
    assert torch.equal(fast.predict(x), module.predict(x))
    assert calls(fast) == 1


def test_several_methods(module: Net, x: torch.Tensor) -> None:
    fast = accelerated(module, "forward", "encode")
    assert torch.equal(fast.encode(x), module.encode(x))
    assert torch.equal(fast.encode(x=x), module.encode(x))
    assert torch.equal(fast.forward(x), module(x))
    assert (calls(fast), calls(fast, "encode")) == (1, 2)
    for copied in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast)), copy.copy(fast)):
        assert torch.equal(copied.encode(x), module.encode(x))
        assert (calls(copied), calls(copied, "encode")) == (0, 1)


def test_install_on_the_module_itself_and_uninstall(module: Net, x: torch.Tensor) -> None:
    before = dict(module.__dict__)
    install(module, "forward", Recorder)
    install(module, "encode", Recorder)
    install(module, "forward", Recorder)
    module(x)
    assert calls(module) == 1
    uninstall(module, "forward")
    uninstall(module, "predict")
    module.encode(x)
    assert calls(module, "encode") == 1
    uninstall(module, "encode")
    assert module.__dict__ == before
    with pytest.raises(AttributeError):
        install(module, "nothing", Recorder)
    assert module.__dict__ == before


def test_uninstall_gives_the_instances_own_forward_back(x: torch.Tensor) -> None:
    module = patched_instance()
    theirs = module.__dict__["forward"]
    install(module, "forward", Recorder)
    install(module, "forward", Recorder)
    uninstall(module, "forward")
    assert module.__dict__["forward"] is theirs


# --- copies ------------------------------------------------------------------------------------


def by_dict(module: nn.Module) -> Any:
    copied = object.__new__(type(module))
    copied.__dict__.update(module.__dict__)
    return copied


COPIES = {
    "copy.copy": copy.copy,
    "by __dict__": by_dict,
    "replica": lambda m: m._replicate_for_data_parallel(),
    "copy of a copy": lambda m: copy.copy(copy.copy(m)),
    "copy of a copy by __dict__": lambda m: copy.copy(by_dict(m)),
    "copy by __dict__ of a copy": lambda m: by_dict(copy.copy(m)),
    "deepcopy of a copy": lambda m: copy.deepcopy(copy.copy(m)),
    "pickle of a copy": lambda m: pickle.loads(pickle.dumps(copy.copy(m))),
    "deepcopy of a copy by __dict__": lambda m: copy.deepcopy(by_dict(m)),
    "copy of a deepcopy": lambda m: copy.copy(copy.deepcopy(m)),
}
copies = pytest.mark.parametrize("copier", COPIES.values(), ids=COPIES)


@copies
@pytest.mark.parametrize("used_before", [False, True])
@pytest.mark.parametrize("altered_first", [False, True])
def test_shallow_copies_answer_for_themselves(
    copier: Callable[[nn.Module], Any],
    used_before: bool,
    altered_first: bool,
    module: Net,
    x: torch.Tensor,
) -> None:
    fast = accelerated(module, "forward", "encode")
    expected = module(x)
    if used_before:
        fast(x)
    before = calls(fast)
    if altered_first:
        fast.scale = 6.0
        copied = copier(fast)
        fast.scale = 2.0
    else:
        copied = copier(fast)
        copied.scale = 6.0
    torch.testing.assert_close(copied(x), expected * 3)
    assert torch.equal(fast(x), expected)
    torch.testing.assert_close(copied.encode(x), module.encode(x) * 3)
    torch.testing.assert_close(copied(x), expected * 3)
    assert (calls(copied), calls(copied, "encode")) == (2, 1)
    assert (calls(fast), calls(fast, "encode")) == (before + 1, 0)


@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("copier", [copy.copy, by_dict])
def test_a_copy_first_called_with_hooks(
    copier: Callable[[nn.Module], Any], hooked: bool, module: Net, x: torch.Tensor
) -> None:
    fast = accelerated(module)
    if hooked:
        fast.register_forward_hook(lambda *_: None)
    copied = copier(fast)
    copied.scale = 6.0
    torch.testing.assert_close(copied(x), module(x) * 3)
    assert calls(copied) == 1


def test_a_copy_first_used_by_another_method(module: Net, x: torch.Tensor) -> None:
    fast = accelerated(module, "forward", "encode")
    copied = copy.copy(fast)
    copied.scale = 6.0
    encode = copied.encode
    torch.testing.assert_close(encode(x), module.encode(x) * 3)
    copied = copy.copy(fast)
    copied.scale = 6.0
    assert copied.forward.__self__ is copied
    assert copied.forward.dispatcher.module is copied


def test_a_copy_made_by_hand_is_told_apart_or_says_that_it_is_not(
    module: Net, x: torch.Tensor
) -> None:
    fast = accelerated(module, "encode")
    copied = by_dict(fast)
    copied.scale = 6.0
    with pytest.raises(RuntimeError, match="do the same again"):
        copied.encode(x)
    torch.testing.assert_close(copied.encode(x), module.encode(x) * 3)
    assert torch.equal(fast.encode(x), module.encode(x))


def test_pickling_a_copy_made_by_hand(module: Net, x: torch.Tensor) -> None:
    def pickled(obj: nn.Module) -> Any:
        return pickle.loads(pickle.dumps(obj))

    fast = accelerated(module)
    copied = by_dict(fast)
    copied.scale = 6.0
    torch.testing.assert_close(pickled(copied)(x), module(x) * 3)
    torch.testing.assert_close(pickled(fast)(x), module(x))


def test_a_copy_with_another_head(module: Net, x: torch.Tensor) -> None:
    fast = accelerated(module)
    fast(x)
    copied = copy.copy(fast)
    copied.__dict__["_modules"] = dict(copied._modules)
    copied.head = nn.Linear(4, 9)
    assert copied(x).shape == (3, 9)
    assert fast(x).shape == (3, 4)
    assert calls(copied) == 1


def test_ordinary_calls_never_search(
    monkeypatch: pytest.MonkeyPatch, module: Net, x: torch.Tensor
) -> None:
    """The collector is asked after a copy only: its answer takes milliseconds."""
    fast = accelerated(module, "forward", "encode")
    others = [copy.deepcopy(fast), pickle.loads(pickle.dumps(fast)), make_twin(fast)]

    def refuse(*_: object) -> list[nn.Module]:
        raise AssertionError("searched")

    monkeypatch.setattr(bound, "holders", refuse)
    for each in [fast, *others]:
        forward = each.forward
        for call in (each, forward, each.forward, each.encode, each.predict, each.__call__):
            call(x)
        each.register_forward_hook(lambda *_: None)
        each(x)
        threads = [threading.Thread(target=each, args=(x,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    with pytest.raises(AssertionError, match="searched"):
        by_dict(fast)(x)


def test_somebody_elses_reference_is_searched_for_once(
    monkeypatch: pytest.MonkeyPatch, module: Net, x: torch.Tensor
) -> None:
    fast = accelerated(module)
    kept = dict(vars(fast))
    searches = []
    holders = bound.holders
    monkeypatch.setattr(bound, "holders", lambda *a: searches.append(a) or holders(*a))
    for _ in range(3):
        fast(x)
    assert len(searches) == 1
    copied = by_dict(fast)
    copied.scale = 6.0
    torch.testing.assert_close(copied(x), module(x) * 3)
    kept.clear()
    assert torch.equal(fast(x), module(x))


def test_a_snapshot_with_the_stand_in_equals_the_attributes(module: Net) -> None:
    fast = accelerated(module)
    snapshot = {
        key: getattr(type(value), "_ovshim_stand_in", value) for key, value in vars(fast).items()
    }
    assert vars(fast) == snapshot
    assert snapshot == vars(fast)
    fast.scale = 9.0
    assert vars(fast) != snapshot
    assert vars(accelerated(module))[bound._SEAL] != vars(fast)[bound._SEAL]


def test_a_copy_that_the_collector_does_not_see(module: Net, x: torch.Tensor) -> None:
    fast = accelerated(module)
    copied = by_dict(fast)
    copied.scale = 6.0
    gc.freeze()
    try:
        torch.testing.assert_close(copied(x), module(x) * 3)
    finally:
        gc.unfreeze()
    assert calls(copied) == 1


def test_save_and_load_whole(module: Net, x: torch.Tensor) -> None:
    file = io.BytesIO()
    torch.save(accelerated(module), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert torch.equal(loaded(x), module(x))
    assert calls(loaded) == 1
    plain = io.BytesIO()
    torch.save(accelerated(module).state_dict(), plain)
    plain.seek(0)
    Net().load_state_dict(torch.load(plain))


def test_the_method_pickled_or_copied_alone(module: Net, x: torch.Tensor) -> None:
    fast = accelerated(module)
    for forward in (copy.deepcopy(fast.forward), pickle.loads(pickle.dumps(fast.forward))):
        assert type(forward) is BoundMethod
        assert forward.module is not fast
        assert torch.equal(forward(x), module(x))
        assert torch.equal(forward.module(x), module(x))
    assert calls(fast) == 0
    assert copy.deepcopy(fast.forward).module.forward.module is not fast
    assert copy.copy(fast.forward).module is fast


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_every_protocol_and_the_python_pickler(protocol: int, module: Net, x: torch.Tensor) -> None:
    fast = accelerated(module)
    file = io.BytesIO()
    pickle._Pickler(file, protocol).dump(fast)
    for data in (file.getvalue(), pickle.dumps(fast, protocol)):
        loaded = pickle.loads(data)
        assert torch.equal(loaded(x), module(x))
        assert calls(loaded) == 1


class Stateful(Net):
    """Has its own idea of its state, and none of ours."""

    def __getstate__(self) -> tuple[dict[str, torch.Tensor], float]:
        return self.state_dict(), self.scale

    def __setstate__(self, state: tuple[dict[str, torch.Tensor], float]) -> None:
        self.__init__()
        self.load_state_dict(state[0])
        self.scale = state[1]
        self.eval()


def test_a_class_with_its_own_state(x: torch.Tensor) -> None:
    module = Stateful().eval()
    fast = accelerated(module)
    for copied in (copy.deepcopy(fast), copy.copy(fast), pickle.loads(pickle.dumps(fast))):
        assert torch.equal(copied(x), module(x))
        assert not installed(copied)
    assert calls(fast) == 0


class CopiesItself(Net):
    """As people write it: without telling the memo."""

    def __deepcopy__(self, memo: dict[int, Any]) -> CopiesItself:
        new = type(self).__new__(type(self))
        for key, value in self.__dict__.items():
            new.__dict__[key] = copy.deepcopy(value, memo)
        return new


def test_a_class_with_its_own_deepcopy(x: torch.Tensor) -> None:
    module = CopiesItself().eval()
    fast = accelerated(module, "forward", "encode")
    copied = copy.deepcopy(fast)
    copied.scale = 6.0
    torch.testing.assert_close(copied(x), module(x) * 3)
    torch.testing.assert_close(copied.encode(x), module.encode(x) * 3)
    assert (calls(copied), calls(fast)) == (1, 0)


def test_a_module_given_its_own_state_again(module: Net, x: torch.Tensor) -> None:
    fast = accelerated(module)
    fast.__setstate__(fast.__getstate__())
    assert torch.equal(fast(x), module(x))
    assert calls(fast) == 1


def test_copies_of_a_module_in_a_module(module: Net, x: torch.Tensor) -> None:
    outer = nn.Sequential(accelerated(module), nn.ReLU())
    for copied in (copy.deepcopy(outer), pickle.loads(pickle.dumps(outer))):
        assert torch.equal(copied(x), module(x).relu())
        assert calls(copied[0]) == 1
        assert copied[0] is not outer[0]


class Handle:
    """What `fast.ovshim` must be for copies to carry it: its module and nothing else."""

    _ovshim_transparent = True

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def renewed(self, module: nn.Module) -> Handle:
        return Handle(module)


def test_handles_follow_their_module(module: Net, x: torch.Tensor) -> None:
    fast = accelerated(module)
    fast.__dict__["ovshim"] = Handle(fast)
    for copier in (copy.deepcopy, copy.copy, by_dict, make_twin):
        copied = copier(fast)
        copied(x)
        assert copied.ovshim.module is copied
        assert fast.ovshim.module is fast
    loaded = pickle.loads(pickle.dumps(fast))
    assert loaded.ovshim.module is loaded


def test_a_process_that_knows_nothing_unpickles_a_twin(
    module: Net, tmp_path: Path, x: torch.Tensor
) -> None:
    path = tmp_path / "twin.pkl"
    path.write_bytes(pickle.dumps((accelerated(module), x)))
    script = (
        "import pickle, sys; m, x = pickle.load(open(sys.argv[1], 'rb'));"
        "y = m(x); print(type(m).__name__, m.forward.dispatcher.calls, y.sum().item())"
    )
    importable = [Path(__file__).parent, Path(bound.__file__).parent.parent]
    done = subprocess.run(
        [sys.executable, "-c", script, str(path)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, importable))},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    name, count, total = done.stdout.split()
    assert (name, count) == ("Net", "1")
    assert float(total) == pytest.approx(module(x).sum().item(), rel=1e-4)


def test_threads_make_one_dispatcher(module: Net, x: torch.Tensor) -> None:
    fast = accelerated(module)
    gate = threading.Barrier(8)

    def run() -> None:
        gate.wait()
        fast(x)

    threads = [threading.Thread(target=run) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert calls(fast) == 8


def test_an_exception_of_the_users_reaches_the_user(module: Net) -> None:
    fast = accelerated(module)
    with pytest.raises(RuntimeError) as ours:
        fast(torch.ones(2, 5))
    with pytest.raises(RuntimeError) as theirs:
        module(torch.ones(2, 5))
    assert str(ours.value) == str(theirs.value)
    with pytest.raises(TypeError, match="forward"):
        fast(1, 2, 3, 4)


# --- transformers ------------------------------------------------------------------------------


def test_bert() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        vocab_size=50,
    )
    module = transformers.BertModel(config).eval()
    fast = accelerated(module)
    ids = torch.randint(0, 50, (2, 5))
    with torch.no_grad():
        ours, theirs = fast(input_ids=ids), module(input_ids=ids)
        assert type(ours) is type(theirs)
        assert torch.equal(ours.last_hidden_state, theirs.last_hidden_state)
        assert torch.equal(ours[1], theirs[1])
        copied = copy.deepcopy(fast)
        assert torch.equal(copied(input_ids=ids)[0], theirs[0])
    assert calls(fast) == calls(copied) == 1
    assert fast.config is module.config
    assert fast.get_input_embeddings() is fast.embeddings.word_embeddings


def test_generate() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_embd=16, n_layer=2, n_head=2, vocab_size=50, n_positions=32, eos_token_id=None
    )
    module = transformers.GPT2LMHeadModel(config).eval()
    fast = accelerated(module)
    ids = torch.randint(0, 50, (2, 5))
    options: dict[str, Any] = {
        "max_new_tokens": 6,
        "do_sample": False,
        "pad_token_id": 0,
        "attention_mask": torch.ones_like(ids),
    }
    assert torch.equal(fast.generate(ids, **options), module.generate(ids, **options))
    assert calls(fast) == 6
    assert fast.lm_head.weight is fast.transformer.wte.weight


class Features(nn.Module):
    """Takes out what a layer gives by a hook that holds the module itself."""

    def __init__(self, by_default: bool) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
        self.features: list[torch.Tensor] = []
        if by_default:
            hook = lambda m, args, out, keeper=self: keeper.features.append(out)  # noqa: E731
        else:
            hook = lambda m, args, out: self.features.append(out)  # noqa: E731
        self.body[1].register_forward_hook(hook)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.features = []
        y = self.body(x)
        return y, self.features[0]


@pytest.mark.parametrize("by_default", [False, True])
def test_a_hook_that_holds_the_module_holds_the_twin(by_default: bool) -> None:
    module = Features(by_default).eval()
    twin = make_twin(module)
    x = torch.randn(2, 8)
    with torch.inference_mode():
        expected = module(x)
        for actual, wanted in zip(twin(x), expected, strict=True):
            assert torch.equal(actual, wanted)
    assert len(module.features) == 1
    assert len(twin.features) == 1  # type: ignore[arg-type]
