"""What OpenVINO may not serve: eager does, with a reason, told once."""

import copy
import gc
import itertools
import random
import traceback
import warnings
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from checks import (
    check,
    counts,
    eager_reasons,
    falls_back,
    paths,
    plans,
    quietly,
    same,
    served,
    settle,
)
from modules import (
    AlwaysDrops,
    Attention,
    Branches,
    CountsInAttribute,
    CountsInBuffer,
    CountsInNamed,
    KeepsLast,
    Mlp,
    ReadsItem,
    UsesHistc,
    WritesInput,
    by,
    make,
)
from torch import Tensor, nn

import ovshim
from ovshim.reasons import TABLE


class Of(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 4)
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self, *args, **kwargs)


@pytest.fixture
def fast() -> nn.Module:
    return ovshim.accelerate(make(Mlp), torch.randn(3, 8), prefer="openvino")


@pytest.fixture
def module(fast: nn.Module) -> nn.Module:
    """A plain module with the weights of `fast`."""
    other = make(Mlp)
    other.load_state_dict(fast.state_dict())
    return other


# torch's forward-mode differentiation compiles its decompositions with torch.jit.script.
TORCHS_OWN = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")


# What the module does


def in_place_on_a_view(self: Any, x: Tensor) -> Tensor:
    x[:, 0].zero_()
    return by(self.linear, x)


def uniform_noise(self: Any, x: Tensor) -> Tensor:
    return by(self.linear, x) + torch.rand(4)


def numpy_inside(self: Any, x: Tensor) -> Tensor:
    import numpy as np

    return by(self.linear, x) + torch.from_numpy(np.sort(x.detach().numpy(), axis=-1))[:, :4]


def loops_on_values(self: Any, x: Tensor) -> Tensor:
    y = by(self.linear, x)
    while y.abs().sum() > 1:
        y = y / 2
    return y


def nonzero_size(self: Any, x: Tensor) -> Tensor:
    return by(self.linear, x)[x[:, 0] > 0]


def with_its_weight_turned(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    return by(self.linear, x), self.linear.weight.t()


def holds_sparse() -> nn.Module:
    module = make(Of, lambda self, x: by(self.linear, x))
    module.register_buffer("held", torch.eye(4).to_sparse())
    return module


MODULES = [
    pytest.param(lambda: make(Of, with_its_weight_turned), {"aliases-input"}, id="weight's view"),
    pytest.param(holds_sparse, {"special-tensor"}, id="sparse buffer"),
    pytest.param(lambda: make(UsesHistc), {"unsupported-op"}, id="unsupported operator"),
    pytest.param(lambda: make(Branches), {"value-dependent"}, id="branch"),
    pytest.param(lambda: make(ReadsItem), {"value-dependent"}, id="item"),
    pytest.param(lambda: make(Of, loops_on_values), {"value-dependent"}, id="while"),
    pytest.param(lambda: make(Of, numpy_inside), None, id="numpy"),
    pytest.param(lambda: make(AlwaysDrops), {"random"}, id="dropout"),
    pytest.param(lambda: make(Of, uniform_noise), {"random"}, id="rand"),
    pytest.param(lambda: make(WritesInput), {"mutates-input"}, id="writes input"),
    pytest.param(lambda: make(Of, in_place_on_a_view), {"mutates-input"}, id="writes view"),
    pytest.param(lambda: make(CountsInBuffer), {"mutates-buffer"}, id="buffer counter"),
    pytest.param(lambda: make(CountsInNamed), {"mutates-buffer"}, id="buffer by name alone"),
    pytest.param(lambda: make(KeepsLast), {"mutates-buffer"}, id="buffer by data"),
    pytest.param(lambda: make(CountsInAttribute), {"mutates-attribute"}, id="Python counter"),
    pytest.param(lambda: make(Of, nonzero_size), None, id="size by values"),
]


@pytest.mark.parametrize(("make_module", "codes"), MODULES)
def test_awkward_modules_are_right(
    make_module: Callable[[], nn.Module], codes: set[str] | None
) -> None:
    """Right on other values, other batches and in a row; `codes=None`: by whichever path."""
    module = make_module()
    reference = copy.deepcopy(module)
    with quietly():
        fast = ovshim.accelerate(module, torch.randn(3, 8), prefer="openvino")
        path = None if codes is None else "eager"
        for x in (torch.ones(3, 8), -torch.ones(3, 8), torch.randn(5, 8), torch.randn(3, 8)):
            check(fast, reference, x, path=path)
    same(fast.state_dict(), reference.state_dict())
    if codes is not None:
        found = set(eager_reasons(fast)) | {
            plan["reason"]["code"] for plan in plans(fast) if plan["reason"]
        }
        assert found == codes


@pytest.mark.parametrize(
    ("make_module", "codes"), [row for row in MODULES if row.values[1] is not None]
)
def test_awkward_modules_warn_once(make_module: Callable[[], nn.Module], codes: set[str]) -> None:
    (code,) = codes
    with falls_back(code) as told:
        fast = ovshim.accelerate(make_module(), torch.randn(3, 8), prefer="openvino")
        with torch.inference_mode():
            for _ in range(3):
                fast(torch.randn(3, 8))
            fast(torch.randn(4, 8))
    (warning,) = told
    assert isinstance(warning, UserWarning)
    assert warning.reason.remedy in str(warning)
    assert warning.reason.message in str(warning)
    assert type(fast).__name__ in str(warning)
    assert warning.reason.message.startswith(TABLE[code].message.removesuffix("."))


def test_the_warning_points_at_the_users_line() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ovshim.accelerate(make(UsesHistc), torch.randn(3, 8), prefer="openvino")
    assert [entry.filename for entry in caught] == [__file__]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fast = ovshim.accelerate(make(UsesHistc), prefer="openvino")
        with torch.inference_mode():
            fast(torch.randn(3, 8))
    assert [entry.filename for entry in caught] == [__file__]


def test_the_unsupported_operator_is_named() -> None:
    with falls_back("unsupported-op") as told:
        ovshim.accelerate(
            nn.Sequential(nn.Identity(), make(UsesHistc)).eval(),
            torch.randn(3, 8),
            prefer="openvino",
        )
    assert "histc" in told[0].reason.message


class WritesWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.linear.weight.mul_(0.9)
        return self.linear(x)


@pytest.mark.parametrize("max_norm", [None, 0.5])
def test_weights_are_written_by_calls_alone(max_norm: float | None) -> None:
    """Not by what accelerating asks of the module."""
    renormed = nn.Embedding(10, 8, max_norm=max_norm)
    module = make(WritesWeight) if max_norm is None else renormed.eval()
    x = torch.randn(2, 8) if max_norm is None else torch.arange(6)
    before = copy.deepcopy(module.state_dict())
    with falls_back("mutates-buffer"):
        fast = ovshim.accelerate(module, x, prefer="openvino")
    same(dict(module.state_dict()), dict(before), 0.0)
    plain = copy.deepcopy(module)
    with torch.no_grad():
        same(fast(x), plain(x), 0.0)
    same(dict(module.state_dict()), dict(plain.state_dict()), 0.0)


class KeepsOfFirst(nn.Module):
    """Remembers something of its first call: of its data, or of its sizes alone."""

    def __init__(self, of_data: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.of_data = of_data

    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self, "first"):
            self.first = x.mean().detach() if self.of_data else torch.arange(8.0)
        return self.linear(x) - self.first


def test_what_is_kept_of_the_first_call_is_of_the_users() -> None:
    module = make(KeepsOfFirst, of_data=True)
    plain = copy.deepcopy(module)
    with falls_back("mutates-attribute"):
        fast = ovshim.accelerate(module, torch.randn(2, 8), prefer="openvino")
    x, y = torch.randn(2, 8), torch.randn(2, 8)
    with torch.inference_mode():
        assert torch.equal(fast(x), plain(x))
        assert torch.equal(fast(y), plain(y))


def test_what_is_kept_of_any_call_is_no_obstacle() -> None:
    module = make(KeepsOfFirst, of_data=False)
    fast = ovshim.accelerate(module, torch.randn(2, 8), prefer="openvino")
    check(fast, module, torch.randn(2, 8))


class FillsAtFirst(nn.Module):
    """Keeps something of its first call in what it has already."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.where = where
        self.cache: dict[str, Any] = {}
        self.rows: list[Any] = []
        self.inner = nn.Module()
        self.register_buffer("place", None)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        if self.where == "dict":
            if not self.cache:
                self.cache["first"] = y.detach().mean(0)
            return y - self.cache["first"]
        if self.where == "list":
            if not self.rows:
                self.rows.append(x.shape[0])
            return y * self.rows[0]
        if self.where == "buffer":
            if self.place is None:
                self.place = y.detach().mean(0)
            return y - self.place
        if not hasattr(self.inner, "rows"):
            self.inner.rows = x.shape[0]
        return y * self.inner.rows


@pytest.mark.parametrize("where", ["dict", "list", "buffer", "sizes"])
@pytest.mark.parametrize("inplace", [False, True])
def test_what_a_first_call_fills_is_filled_by_the_users(where: str, inplace: bool) -> None:
    module = make(FillsAtFirst, where)
    plain, untouched = copy.deepcopy(module), copy.deepcopy(module)
    with torch.no_grad():
        with falls_back("mutates-attribute"):
            fast = ovshim.accelerate(
                module, torch.randn(4, 8) * 9 + 5, prefer="openvino", inplace=inplace
            )
        assert (module.cache, module.rows, module.place) == ({}, [], None)
        assert not hasattr(module.inner, "rows")
        assert list(module.state_dict()) == list(untouched.state_dict())
        for rows in (3, 4, 3):
            x = torch.randn(rows, 8)
            assert torch.equal(fast(x), plain(x))
        settle(fast, plain, torch.randn(3, 8), within=20)


class DrawsAndKeeps(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        self.noise = torch.rand(3)
        return x + self.noise


def test_an_example_draws_nothing_where_attributes_change() -> None:
    module = make(DrawsAndKeeps)
    before = torch.get_rng_state()
    with falls_back("mutates-attribute"):
        ovshim.accelerate(module, torch.randn(2, 3, generator=torch.Generator()))
    assert torch.equal(torch.get_rng_state(), before)


class TakesPlaces(nn.Module):
    """Remembers at its first call that it had one, and refuses other places than it has."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.called = False

    def forward(self, x: Tensor, places: Tensor) -> Any:
        self.called = True
        if (places == 63).sum() != x.shape[0]:
            raise ValueError("other places than rows")
        return self.linear(x), places, {1, 2}


def test_a_first_call_whose_values_go_together_is_not_to_blame() -> None:
    module, places = make(TakesPlaces), torch.tensor([63, 63, 5, 7, 9])
    with falls_back("unknown-leaf"):
        fast = ovshim.accelerate(module, (torch.randn(2, 8), places), prefer="openvino")
    with quietly():
        check(fast, module, torch.randn(2, 8), places, path=None)


class Jacobian(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.func.vmap(torch.func.jacrev(lambda row: self.linear(row).tanh()))(x)


def test_a_capture_that_fails_inside_a_transform_leaves_none_behind() -> None:
    module, x = make(Jacobian), torch.randn(2, 8)
    expected = module(x)
    with falls_back("capture-failed"):
        fast = ovshim.accelerate(module, x, prefer="openvino")
    assert torch._C._functorch.peek_interpreter_stack() is None
    assert torch.equal(module(x), expected)
    with torch.inference_mode():
        assert torch.equal(fast(x), expected)


class Applies(nn.Module):
    """Applies a function that PyTorch has and its modules have not."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Tensor) -> Any:
        return self.function(*args)


@pytest.mark.parametrize(
    ("function", "example"),
    [
        (torch.linalg.det, (torch.randn(2, 3, 3),)),
        (torch.svd, (torch.randn(4, 3),)),
        (lambda a, b: torch.linspace(a, b, 0), (torch.tensor(0.0), torch.tensor(1.0))),
    ],
    ids=["det", "svd", "linspace"],
)
def test_what_ends_the_process_never_reaches_openvino(
    function: Callable[..., Any], example: tuple[Tensor, ...]
) -> None:
    module = Applies(function).eval()
    with falls_back("unsupported-op"):
        fast = ovshim.accelerate(module, example, prefer="openvino")
    with torch.inference_mode():
        for actual, expected in zip(fast(*example), module(*example), strict=True):
            assert torch.equal(actual, expected)


def test_a_buffer_is_not_counted_up_by_building() -> None:
    module = make(CountsInBuffer)
    with falls_back("mutates-buffer"):
        fast = ovshim.accelerate(module, torch.randn(3, 8), prefer="openvino")
    assert module.calls == 0
    with torch.inference_mode():
        fast(torch.randn(3, 8))
        fast(torch.randn(3, 8))
    assert module.calls == 2


def test_a_python_counter_is_not_counted_up_by_building() -> None:
    module = make(CountsInAttribute)
    with falls_back("mutates-attribute"):
        fast = ovshim.accelerate(module, torch.randn(3, 8), prefer="openvino")
    assert (module.calls, fast.calls) == (0, 0)
    with torch.inference_mode():
        fast(torch.randn(3, 8))
        fast(torch.randn(3, 8))
    assert (module.calls, fast.calls) == (0, 2)


def test_a_list_of_the_module_is_not_filled_by_building() -> None:
    class Remembers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 4)
            self.seen: list[Tensor] = []

        def forward(self, x: Tensor) -> Tensor:
            y = self.linear(x)
            self.seen.append(y)
            return y

    module = make(Remembers)
    with falls_back("mutates-attribute"):
        fast = ovshim.accelerate(module, torch.randn(3, 8), prefer="openvino")
        assert fast.seen == []
        with torch.inference_mode():
            outputs = [fast(torch.randn(3, 8)) for _ in range(3)]
    assert len(fast.seen) == 3
    assert all(one is other for one, other in zip(fast.seen, outputs, strict=True))


def test_inner_hooks_before_the_build() -> None:
    module = make(Mlp)
    seen: list[Tensor] = []
    module.first.register_forward_hook(lambda _m, _a, output: seen.append(output))
    with falls_back("inner-hooks"):
        fast = ovshim.accelerate(module, torch.randn(3, 8), prefer="openvino")
        seen.clear()
        with torch.inference_mode():
            for _ in range(2):
                fast(torch.randn(3, 8))
    assert len(seen) == 2
    assert counts(fast) == {"openvino": 0, "mixed": 0, "eager": 2}


def test_printing_in_forward_is_no_reason_to_print_differently(capsys: Any) -> None:
    def chatty(self: Any, x: Tensor) -> Tensor:
        print("called")
        return self.linear(x)

    module = make(Of, chatty)
    with quietly():
        fast = ovshim.accelerate(module, torch.randn(3, 8), prefer="openvino")
        capsys.readouterr()
        for _ in range(2):
            check(fast, module, torch.randn(3, 8), path=None)
    assert capsys.readouterr().out.count("called") in {2, 4}  # eager's own two, and ours or none


# How it is called


def test_training_mode_is_eager_and_silent(fast: nn.Module, module: nn.Module) -> None:
    fast.train()
    module.train()
    for under in (torch.enable_grad, torch.no_grad):
        check(fast, module, torch.randn(3, 8), path="eager", reason="training", under=under)
    fast.eval()
    module.eval()
    settle(fast, module, torch.randn(3, 8))


def test_an_input_that_requires_grad_is_eager_and_silent(
    fast: nn.Module, module: nn.Module
) -> None:
    fast.requires_grad_(False)
    x = torch.randn(3, 8, requires_grad=True)
    with served(fast, None):
        y = fast(x)
    assert counts(fast)["openvino"] == 0
    y.sum().backward()
    other = x.detach().clone().requires_grad_()
    module(other).sum().backward()
    same(x.grad, other.grad)


def test_grad_mode_without_parameters_that_require_it(fast: nn.Module, module: nn.Module) -> None:
    fast.requires_grad_(False)
    module.requires_grad_(False)
    with falls_back():
        settle(fast, module, torch.randn(3, 8), under=torch.enable_grad)
        check(fast, module, torch.randn(3, 8), under=torch.enable_grad)


def test_the_example_may_be_prepared_in_grad_mode() -> None:
    """accelerate itself is called outside inference_mode, which is no mistake of the user's."""
    with falls_back():
        fast = ovshim.accelerate(make(Mlp), torch.randn(3, 8), prefer="openvino")
    assert paths(fast) == ["openvino"]


def test_autocast(fast: nn.Module, module: nn.Module) -> None:
    with quietly():
        for _ in range(2):
            check(
                fast,
                module,
                torch.randn(3, 8),
                path="eager",
                reason="autocast",
                under=lambda: torch.autocast("cpu", torch.bfloat16),
                tolerance=0.0,
            )
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            assert fast(torch.randn(3, 8)).dtype == torch.bfloat16
    check(fast, module, torch.randn(3, 8))


def test_accelerating_inside_autocast() -> None:
    module = make(Mlp)
    with quietly(), torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        fast = ovshim.accelerate(module, torch.randn(3, 8), prefer="openvino")
    with quietly():
        settle(fast, module, torch.randn(3, 8))


class Tagged(Tensor):
    """A subclass that notes which functions it met."""

    met: ClassVar[list[str]] = []

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        cls.met.append(getattr(function, "__name__", "?"))
        return super().__torch_function__(function, types, args, kwargs or {})


def special(kind: str) -> Tensor:
    x = torch.randn(3, 8)
    match kind:
        case "subclass":
            return x.as_subclass(Tagged)
        case "parameter":
            return nn.Parameter(x, requires_grad=False)
        case "sparse":
            return x.relu().to_sparse()
        case "csr":
            return x.relu().to_sparse_csr()
        case "complex":
            return torch.complex(x, x)
        case "meta":
            return x.to("meta")
        case "mkldnn":
            return x.to_mkldnn()
        case "conj":
            return torch.complex(x, x).conj().imag
        case "negative":
            return torch._neg_view(x)
    raise AssertionError(kind)


def sums(self: Any, x: Tensor) -> Tensor:
    return x.sum()


@pytest.mark.parametrize(
    "kind",
    ["subclass", "parameter", "sparse", "csr", "complex", "meta", "mkldnn", "conj", "negative"],
)
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_special_tensors_are_right(kind: str) -> None:
    module = make(Mlp) if kind in {"subclass", "parameter", "conj", "negative"} else of_kind(kind)
    fast = ovshim.accelerate(module, torch.randn(3, 8), prefer="openvino")
    with quietly(), torch.no_grad():
        for _ in range(2):
            x = special(kind)
            expected = module(x)
            with served(fast, None):
                actual = fast(x)
            assert type(actual) is type(expected)
            same(actual, expected)
    check(fast, module, torch.randn(3, 8))


def of_kind(kind: str) -> nn.Module:
    """Something that eager can do with such a tensor."""
    return make(Of, lambda self, x: x.relu() if kind in {"mkldnn", "sparse", "csr"} else x * 2)


@pytest.mark.parametrize("kind", ["subclass", "sparse", "complex", "meta"])
def test_special_tensors_have_their_reason(kind: str) -> None:
    module = make(Of, sums)
    fast = ovshim.accelerate(module, torch.randn(3, 8), prefer="openvino")
    with quietly(), served(fast, "eager"), torch.no_grad():
        fast(special(kind))
    assert set(eager_reasons(fast)) <= {"special-tensor", "not-on-cpu"}


def test_a_subclass_keeps_meeting_its_functions(fast: nn.Module) -> None:
    Tagged.met.clear()
    with quietly(), torch.no_grad():
        fast(special("subclass"))
    assert "linear" in Tagged.met


def test_fake_tensors(fast: nn.Module) -> None:
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    with quietly(), torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True) as mode:
        y = fast(mode.from_tensor(torch.randn(3, 8)))
    assert isinstance(y, FakeTensor)
    assert y.shape == (3, 4)


@pytest.mark.slow
@TORCHS_OWN
def test_functorch(fast: nn.Module, module: nn.Module) -> None:
    xs = torch.randn(5, 3, 8)
    with quietly(), torch.no_grad():
        same(torch.vmap(fast)(xs), torch.vmap(module)(xs))
    with quietly():
        one = torch.func.jvp(fast, (xs[0],), (xs[1],))
        same(one, torch.func.jvp(module, (xs[0],), (xs[1],)))
        same(torch.func.jacrev(fast)(xs[0]), torch.func.jacrev(module)(xs[0]))
        same(
            torch.func.functional_call(fast, {"last.bias": torch.ones(4)}, (xs[0],)),
            torch.func.functional_call(module, {"last.bias": torch.ones(4)}, (xs[0],)),
        )
    settle(fast, module, torch.randn(3, 8))


@TORCHS_OWN
def test_forward_mode_differentiation(fast: nn.Module, module: nn.Module) -> None:
    import torch.autograd.forward_ad as forward_ad

    x, tangent = torch.randn(3, 8), torch.randn(3, 8)

    def differentiate(function: nn.Module) -> Tensor:
        with quietly(), torch.no_grad(), forward_ad.dual_level():
            dual = function(forward_ad.make_dual(x, tangent))
            return forward_ad.unpack_dual(dual).tangent

    same(differentiate(fast), differentiate(module))


def test_function_and_dispatch_modes(fast: nn.Module, module: nn.Module) -> None:
    from torch.overrides import TorchFunctionMode
    from torch.utils._python_dispatch import TorchDispatchMode

    met: list[str] = []

    class Functions(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
            met.append(getattr(function, "__name__", "?"))
            return function(*args, **(kwargs or {}))

    class Dispatches(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
            met.append(str(function))
            return function(*args, **(kwargs or {}))

    for mode, name in ((Functions, "linear"), (Dispatches, "aten.addmm.default")):
        met.clear()
        with quietly(), torch.no_grad(), served(fast, "eager", "special-mode"), mode():
            fast(torch.randn(3, 8))
        assert name in met
    check(fast, module, torch.randn(3, 8))


def test_a_default_device_is_no_special_mode(fast: nn.Module, module: nn.Module) -> None:
    with torch.device("cpu"):
        check(fast, module, torch.randn(3, 8))


def test_other_tools_see_the_original(fast: nn.Module, module: nn.Module) -> None:
    x = torch.randn(3, 8)
    before = counts(fast)["openvino"]
    with torch.inference_mode():
        expected = module(x)
    exported = torch.export.export(fast, (x,))
    names = {str(node.target) for node in exported.graph.nodes}
    assert "aten.linear.default" in names
    with torch.no_grad():
        same(exported.module()(x), expected)
        graph = torch.fx.symbolic_trace(fast)
        same(graph(x), expected)
    assert {node.target for node in graph.graph.nodes} >= {"first", "norm", "last"}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        with torch.no_grad():
            # Without the check: that is an ordinary call of the module beside the trace.
            traced = torch.jit.trace(fast, x, check_trace=False)
            same(traced(torch.ones(5, 8)), module(torch.ones(5, 8)))
        scripted = torch.jit.script(fast)
        with torch.no_grad():
            same(scripted(x), expected)
    assert counts(fast)["openvino"] == before
    settle(fast, module, x)


def test_torch_compile_sees_the_original(fast: nn.Module, module: nn.Module) -> None:
    seen: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _inputs: Any) -> Any:
        seen.append(graph)
        return graph.forward

    compiled = torch.compile(fast, backend=backend, fullgraph=True)
    before = counts(fast)
    with falls_back(), torch.no_grad():
        x = torch.randn(3, 8)
        same(compiled(x), module(x))
    assert len(seen) == 1
    assert counts(fast)["openvino"] == before["openvino"]
    settle(fast, module, torch.randn(3, 8))
    torch._dynamo.reset()


def test_what_torch_compile_has_made_is_not_taken_from_it() -> None:
    module = make(Mlp)
    x = torch.randn(3, 8)
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    with torch.inference_mode():
        expected = compiled(x)
        check(ovshim.accelerate(module, x, prefer="openvino"), module, x)
        same(compiled(x), expected)


def test_torch_compile_around_the_call(fast: nn.Module, module: nn.Module) -> None:
    @torch.compile(backend="eager", fullgraph=True)
    def twice(x: Tensor) -> Tensor:
        return fast(x) * 2

    with falls_back(), torch.no_grad():
        x = torch.randn(3, 8)
        same(twice(x), module(x) * 2)
        with torch.no_grad():
            module.last.bias.add_(1)
            fast.last.bias.add_(1)
        same(twice(x), module(x) * 2)
    torch._dynamo.reset()


def test_state_on_another_device(fast: nn.Module) -> None:
    fast.to("meta")
    with quietly(), torch.no_grad(), served(fast, None):
        y = fast(torch.randn(3, 8, device="meta"))
    assert y.is_meta
    assert counts(fast)["openvino"] == 0


# Exceptions


class Picky(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 4)
        self.limit = 100

    def forward(self, x: Tensor, kind: str = "plain") -> Tensor:
        if kind == "bad":
            raise KeyError("kind", kind)
        if x.shape[0] > self.limit:
            raise NotImplementedError(f"at most {self.limit} at once")
        return self.linear(x)


def test_the_users_exception_reaches_the_user() -> None:
    module = make(Picky)
    fast = ovshim.accelerate(module, torch.randn(3, 8), prefer="openvino")
    for arguments, kind, words in (
        ((torch.randn(3, 8), "bad"), KeyError, ("kind", "bad")),
        ((torch.randn(101, 8),), NotImplementedError, ("at most 100 at once",)),
    ):
        for _ in range(2):
            with falls_back(), torch.inference_mode(), pytest.raises(kind) as raised:
                fast(*arguments)
            assert type(raised.value) is kind
            assert raised.value.args == words
            last = traceback.extract_tb(raised.value.__traceback__)[-1]
            assert (last.filename, last.name) == (__file__, "forward")
            assert raised.value.__cause__ is None
            assert raised.value.__context__ is None
    check(fast, module, torch.randn(3, 8))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_views_of_weights_in_and_out_of_a_first_call(mode: Any) -> None:
    """Made without grad they say that they require it, and have no place in autograd's graph."""
    module = make(Of, with_its_weight_turned)
    with quietly(), mode():
        fast = ovshim.accelerate(module, prefer="openvino")
        for x in (module.linear.weight[:3], torch.randn(5, 8), module.linear.weight):
            same(fast(x), with_its_weight_turned(module, x))


def test_a_fault_of_ours_behind_the_first_call_is_not_the_users(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(*given: Any) -> Any:
        raise AssertionError("a fault")

    monkeypatch.setattr("ovshim.preflight.sources", fails)
    module = make(Mlp)
    with falls_back("build-failed"):
        fast = ovshim.accelerate(module, prefer="openvino")
        check(fast, module, torch.randn(3, 8), path="eager")
    assert "a fault" in plans(fast)[0]["reason"]["message"]


def test_the_first_calls_exception_reaches_the_user() -> None:
    fast = ovshim.accelerate(make(Picky), prefer="openvino")
    with falls_back(), torch.inference_mode(), pytest.raises(KeyError) as raised:
        fast(torch.randn(3, 8), "bad")
    last = traceback.extract_tb(raised.value.__traceback__)[-1]
    assert (last.filename, last.name) == (__file__, "forward")
    assert raised.value.__context__ is None
    settle(fast, make(Picky), torch.randn(3, 8))


def test_a_forward_that_always_raises_is_called_once_a_call() -> None:
    class Raises(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            raise ValueError("always")

    fast = ovshim.accelerate(Raises().eval(), prefer="openvino")
    for _ in range(3):
        with torch.inference_mode(), pytest.raises(ValueError, match="always"):
            fast(torch.ones(3))


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(((), {}), id="missing"),
        pytest.param(((torch.ones(3, 8), torch.ones(3, 8)), {}), id="too many"),
        pytest.param(((torch.ones(3, 8),), {"nothing": 1}), id="unknown keyword"),
        pytest.param(((torch.ones(3, 8),), {"x": torch.ones(3, 8)}), id="twice"),
        pytest.param((("text",), {}), id="no tensor"),
        pytest.param(((None,), {}), id="None"),
        pytest.param(((torch.ones(3, 8, dtype=torch.int64),), {}), id="dtype"),
        pytest.param(((torch.ones(3, 8, dtype=torch.float64),), {}), id="float64"),
        pytest.param(((torch.ones(3, 9),), {}), id="size"),
        pytest.param(((torch.ones(8, 0),), {}), id="empty"),
        pytest.param(((torch.ones(()),), {}), id="0-d"),
    ],
)
def test_wrong_arguments_are_refused_as_eager_refuses_them(
    arguments: Any, fast: nn.Module, module: nn.Module
) -> None:
    args, kwargs = arguments
    with torch.inference_mode():
        with pytest.raises(Exception) as refused:
            module(*args, **kwargs)
        for _ in range(2):
            with falls_back(), pytest.raises(type(refused.value)) as told:
                fast(*args, **kwargs)
            assert told.value.args == refused.value.args
    check(fast, module, torch.randn(3, 8))


class Embeds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 4, padding_idx=0)

    def forward(self, ids: Tensor) -> Tensor:
        return self.embedding(ids).sum(1)


class Gathers(nn.Module):
    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        return x.gather(1, index) + x[:, index[0]] + x.index_select(1, index[0])


class TakesAlong(nn.Module):
    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        return torch.take_along_dim(x, index, 1) + x.take_along_dim(index[:1], dim=1)


def test_ids_beyond_the_vocabulary_are_refused() -> None:
    module = make(Embeds)
    fast = ovshim.accelerate(module, torch.randint(0, 10, (2, 5)), prefer="openvino")
    for _ in range(2):
        for bad in (10, -1, 2**40):
            ids = torch.randint(0, 10, (2, 5))
            ids[1, 3] = bad
            with torch.inference_mode(), pytest.raises(IndexError, match="out of range"):
                fast(ids)
    check(fast, module, torch.randint(0, 10, (2, 5)))
    check(fast, module, torch.tensor([[0, 9, 0, 9, 5]]))


def test_indices_out_of_range_are_refused() -> None:
    module = Gathers().eval()
    index = torch.randint(0, 6, (3, 4))
    fast = ovshim.accelerate(module, (torch.randn(3, 6), index), prefer="openvino")
    check(fast, module, torch.randn(3, 6), torch.randint(0, 6, (3, 4)))
    for bad in (6, 100, -7):
        wrong = index.clone()
        wrong[2, 1] = bad
        with torch.inference_mode(), pytest.raises((IndexError, RuntimeError)):
            fast(torch.randn(3, 6), wrong)


def test_indices_that_eager_wraps() -> None:
    module = TakesAlong().eval()
    index = torch.randint(0, 6, (3, 4))
    fast = ovshim.accelerate(module, (torch.randn(3, 6), index), prefer="openvino")
    check(fast, module, torch.randn(3, 6), torch.randint(0, 6, (3, 4)))
    for beyond in (6, 100, -7, -1):
        other = index.clone()
        other[2, 1] = beyond
        check(fast, module, torch.randn(3, 6), other, path="eager")


def test_negative_indices_that_eager_takes() -> None:
    class Takes(nn.Module):
        def forward(self, x: Tensor, index: Tensor) -> Tensor:
            return x[:, index] * 2

    module = Takes().eval()
    fast = ovshim.accelerate(
        module, (torch.randn(3, 6), torch.tensor([0, 5, 2])), prefer="openvino"
    )
    check(fast, module, torch.randn(3, 6), torch.tensor([0, 1, 4]))
    for index in ([-1, -6, 3], [5, -2, 0]):
        check(fast, module, torch.randn(3, 6), torch.tensor(index), path=None)
    with torch.inference_mode(), pytest.raises(IndexError):
        fast(torch.randn(3, 6), torch.tensor([0, 6, 1]))
    with torch.inference_mode(), pytest.raises(IndexError):
        fast(torch.randn(3, 6), torch.tensor([0, -7, 1]))


class BehindFour(nn.Module):
    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        return x[4:][index] * 2


class SelectsBehindFour(nn.Module):
    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        return x[4:].index_select(0, index) * 2


@pytest.mark.parametrize("cls", [BehindFour, SelectsBehindFour])
def test_nothing_is_in_the_range_of_an_empty_table(cls: type[nn.Module]) -> None:
    module, index = cls().eval(), torch.tensor([0, 0])
    fast = ovshim.accelerate(module, (torch.randn(7, 8), index), prefer="openvino")
    for rows in (7, 9, 5):
        check(fast, module, torch.randn(rows, 8), index, path=None)
    assert counts(fast)["openvino"] > 0
    for rows in (4, 3, 0):
        for wrong in (0, -1):
            for each in (module, fast):
                with torch.inference_mode(), pytest.raises((IndexError, RuntimeError)):
                    each(torch.randn(rows, 8), torch.tensor([wrong, wrong]))


def test_labels_in_one_hot_and_scatter() -> None:
    class Scatters(nn.Module):
        def forward(self, index: Tensor) -> Tensor:
            zeros = torch.zeros(index.shape[0], 6)
            return zeros.scatter(1, index, 1.0) + F.one_hot(index[:, 0], 6)

    module = Scatters().eval()
    with quietly():
        fast = ovshim.accelerate(module, torch.randint(0, 6, (3, 2)), prefer="openvino")
        check(fast, module, torch.randint(0, 6, (3, 2)), path=None)
        for bad in (6, -1):
            with torch.inference_mode(), pytest.raises((IndexError, RuntimeError)):
                fast(torch.tensor([[0, 1], [bad, 2], [3, 3]]))


# Values that are not ordinary


ODD = [float("nan"), float("inf"), float("-inf")]


def odd_batches(*size: int) -> list[Tensor]:
    batches = []
    for value in ODD:
        x = torch.randn(*size)
        x.view(-1)[3] = value
        batches.append(x)
    batches.append(torch.full(size, float("nan")))
    batches.append(torch.zeros(size))
    batches.append(torch.full(size, 1e30))
    return batches


@pytest.mark.parametrize(
    "function",
    [
        pytest.param(lambda self, x: torch.relu(self.linear(x)), id="relu"),
        pytest.param(lambda self, x: self.linear(x).clamp(-1, 1), id="clamp"),
        pytest.param(lambda self, x: self.linear(x).softmax(-1), id="softmax"),
        pytest.param(lambda self, x: self.linear(x).amax(-1), id="amax"),
        pytest.param(lambda self, x: torch.maximum(x, x.flip(1)), id="maximum"),
        pytest.param(lambda self, x: self.linear(x).sigmoid(), id="sigmoid"),
        pytest.param(lambda self, x: F.gelu(x), id="gelu"),
        pytest.param(lambda self, x: F.hardtanh(x) + F.relu6(x), id="relu6"),
        pytest.param(lambda self, x: F.layer_norm(x, (8,)), id="layer_norm"),
        pytest.param(lambda self, x: F.max_pool1d(x, 2), id="max_pool"),
        pytest.param(lambda self, x: x.isnan(), id="isnan"),
        pytest.param(lambda self, x: torch.where(x > 0, x, -x), id="where"),
        pytest.param(lambda self, x: x.nan_to_num(), id="nan_to_num"),
        pytest.param(lambda self, x: x.log_softmax(-1), id="log_softmax"),
        pytest.param(lambda self, x: x.sign(), id="sign"),
        pytest.param(lambda self, x: F.elu(x) + F.leaky_relu(x), id="elu"),
        pytest.param(lambda self, x: x * 0, id="times zero"),
    ],
)
def test_nan_and_infinity_give_what_eager_gives(function: Any) -> None:
    module = make(Of, function)
    with quietly():
        fast = ovshim.accelerate(module, torch.randn(3, 8), prefer="openvino")
        for x in odd_batches(3, 8):
            check(fast, module, x, path=None)
        check(fast, module, torch.randn(3, 8), path=paths(fast)[0])


def test_nan_in_a_large_input() -> None:
    module = nn.ReLU().eval()
    fast = ovshim.accelerate(module, torch.randn(4, 30_000), prefer="openvino")
    x = torch.randn(4, 30_000)
    x[-1, -1] = float("nan")
    check(fast, module, x, path=None)
    check(fast, module, torch.randn(4, 30_000))


def test_fully_masked_rows() -> None:
    class Masked(nn.Module):
        def forward(self, q: Tensor, mask: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, q, q, attn_mask=mask[:, None])

    module = Masked().eval()
    q, mask = torch.randn(2, 2, 5, 8), torch.rand(2, 5, 5) > 0.5
    mask[:, 0] = True
    with quietly():
        fast = ovshim.accelerate(
            module, (q, mask | torch.eye(5, dtype=torch.bool)), prefer="openvino"
        )
        for row in (0, 4):
            masked = mask.clone()
            masked[0, row] = False
            check(fast, module, torch.randn(2, 2, 5, 8), masked, path=None)
            check(fast, module, torch.randn(2, 2, 5, 8), masked, path=None)


@pytest.mark.parametrize("lowest", [torch.finfo(torch.float32).min, -torch.inf])
def test_rows_whose_additive_mask_is_lowest(lowest: float) -> None:
    """Where it is finite eager sees everything alike; at minus infinity nothing."""

    class Biased(nn.Module):
        def forward(self, q: Tensor, bias: Tensor, mask: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, q, q, torch.where(mask, bias, lowest))

    module = Biased().eval()
    q, bias = torch.randn(2, 2, 5, 8), torch.randn(2, 5, 5)
    mask = torch.rand(2, 1, 5, 5) > 0.5
    mask[..., 0] = True
    fast = ovshim.accelerate(module, (q, bias, mask), prefer="openvino")
    for row in (0, 4):
        masked = mask.clone()
        masked[0, :, row] = False
        check(fast, module, torch.randn(2, 2, 5, 8), bias, masked)


def test_integers_wrap_as_in_eager() -> None:
    class Wraps(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x * 3 + 100, x // 3

    module = Wraps().eval()
    for dtype in (torch.uint8, torch.int8, torch.int32, torch.int64):
        with quietly():
            fast = ovshim.accelerate(module, torch.arange(6, dtype=dtype), prefer="openvino")
            big = torch.iinfo(dtype).max
            for values in ([1, 2, 3], [big, big - 1, 0], [big // 2, 7, 9]):
                check(fast, module, torch.tensor(values, dtype=dtype), path=None)
            if dtype.is_signed:
                check(fast, module, torch.tensor([-1, -7, -big], dtype=dtype), path=None)


@pytest.mark.slow
def test_integers_beyond_32_bits() -> None:
    class Adds(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x + y

    module = Adds().eval()
    x = torch.arange(4)
    with quietly():
        fast = ovshim.accelerate(module, (x, x), prefer="openvino")
        for base in (2**31, 2**40, -(2**35)):
            check(fast, module, x + base, x - 3, path=None)


# The warning


def test_each_module_warns_for_itself() -> None:
    with falls_back("unsupported-op", "unsupported-op"):
        for _ in range(2):
            ovshim.accelerate(make(UsesHistc), torch.randn(3, 8), prefer="openvino")


def test_each_reason_warns_for_itself() -> None:
    fast = ovshim.accelerate(make(Mlp), torch.randn(3, 8), prefer="openvino")
    with falls_back("special-tensor", "autocast"), torch.no_grad():
        for _ in range(2):
            fast(torch.randn(3, 8).to_sparse())
            with torch.autocast("cpu", torch.bfloat16):
                fast(torch.randn(3, 8))


def test_a_fallback_does_not_latch() -> None:
    """One call in eager, for whatever reason, costs only itself."""
    module = make(Mlp)
    fast = ovshim.accelerate(module, torch.randn(3, 8), prefer="openvino")
    with quietly():
        fast(torch.randn(3, 8))
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            fast(torch.randn(3, 8))
        with torch.no_grad():
            fast(special("subclass"))
        with torch.no_grad(), pytest.raises(RuntimeError):
            fast(torch.randn(3, 9))
        fast.train()
        fast(torch.randn(3, 8))
        fast.eval()
    settle(fast, module, torch.randn(3, 8), within=3)
    check(fast, module, torch.randn(3, 8))


def test_warnings_raised_as_errors_leave_a_module_that_works() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fast = ovshim.accelerate(make(Branches), prefer="openvino")
        with torch.inference_mode(), pytest.raises(ovshim.FallbackWarning):
            fast(torch.randn(3, 8))
    reference = make(Branches)
    check(fast, reference, torch.randn(3, 8), path="eager")


# The same, put together


def test_outputs_of_eager_and_openvino_in_turn() -> None:
    module = make(Attention)
    fast = ovshim.accelerate(module, torch.randn(2, 5, 16), prefer="openvino")
    outputs, expected = [], []
    for number in range(8):
        x = torch.randn(2, 5, 16)
        if number % 3 == 2:
            x[0, 0, 0] = float("nan")
        with torch.inference_mode():
            outputs.append(fast(x))
            expected.append(module(x))
    gc.collect()
    same(outputs, expected)


@pytest.mark.slow
def test_a_verdict_of_one_processor_binds_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    from ovshim import runtime

    module, x = make(Mlp), torch.randn(3, 8)

    def refuse(*args: Any) -> Any:
        raise RuntimeError("no kernel for it")

    def cached() -> tuple[str, str]:
        with quietly():
            (plan,) = plans(ovshim.accelerate(module, x, prefer="openvino"))
        return plan["path"], plan["cache"]

    with monkeypatch.context() as patch:
        patch.setattr(runtime, "compile_model", refuse)
        assert cached() == ("eager", "off")
    assert cached() == ("eager", "hit")
    with monkeypatch.context() as patch:
        patch.setattr(runtime, "processor", lambda: "another")
        assert cached() == ("openvino", "miss")
        assert cached() == ("openvino", "hit")


class Draws(nn.Module):
    """Takes a step of what it holds in each call."""

    def __init__(self, held: Any, step: Callable[[Any], Any]) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.held = held
        self.step = step

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x) * float(self.step(self.held))
        return y


@pytest.mark.parametrize(
    ("make_held", "step"),
    [
        (lambda: itertools.count(1), next),
        (lambda: [iter(range(1, 99))], lambda held: next(held[0])),
        (lambda: random.Random(0), lambda held: held.random()),
        (lambda: torch.Generator().manual_seed(0), lambda held: torch.rand((), generator=held)),
    ],
)
def test_what_a_look_would_use_up_is_left_alone(
    make_held: Callable[[], Any], step: Callable[[Any], Any]
) -> None:
    module, alone = make(lambda: Draws(make_held(), step)), make(lambda: Draws(make_held(), step))
    x = torch.randn(2, 4)
    with falls_back("mutates-attribute"), torch.inference_mode():
        fast = ovshim.accelerate(module, x, prefer="openvino")
        same([fast(x) for _ in range(3)], [alone(x) for _ in range(3)])


class Enlarges(nn.Module):
    """By a size, which is a tensor while the graph is traced."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = (float(x.shape[0]),)
        larger: torch.Tensor = torch._C._nn.upsample_nearest1d(x[None, None], None, scale)
        return larger


def test_a_trace_that_fails_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    with falls_back("capture-failed"):
        fast = ovshim.accelerate(
            make(Enlarges), torch.rand(4), prefer="openvino", dynamic_shapes=[{0: "length"}]
        )
    assert "torch.jit.trace" in plans(fast)[0]["reason"]["message"]
    assert capfd.readouterr() == ("", "")


class Compared(nn.Linear):
    """No set takes it: a class with `__eq__` has no `__hash__` of its own."""

    def __eq__(self, other: object) -> bool:
        return self is other


def test_a_module_that_no_set_takes_is_eagers() -> None:
    module = Compared(8, 4).eval()
    x = torch.randn(3, 8)
    with falls_back("capture-failed"):
        fast = ovshim.accelerate(module, x)
    check(fast, module, x, path="eager", reason="capture-failed")
