"""Arguments and outputs of any structure: what goes in and what comes out is eager's."""

import copy
import dataclasses
import enum
import types
from collections import OrderedDict, defaultdict, deque, namedtuple
from typing import Any, NamedTuple

import pytest
import torch
from checks import check, counts, falls_back, paths, plans, quietly, same, served, settle
from modules import Detections, DictToDataclass, Nest, Points, ToNamedTuple, by, make
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import ovshim
from ovshim.signature import describe, flatten_call, kind_of, sizes_of

Pair = namedtuple("Pair", ["left", "right"])


class Colour(enum.Enum):
    RED = 1
    BLUE = 2


@dataclasses.dataclass
class Batch:
    x: Tensor
    mask: Tensor | None = None
    name: str = "batch"
    more: "Batch | None" = None


@dataclasses.dataclass(frozen=True)
class Frozen:
    x: Tensor
    inner: tuple[Tensor, int] = (torch.zeros(()), 0)


@dataclasses.dataclass(slots=True)
class Slotted:
    x: Tensor
    kind: Colour = Colour.RED


class Of(nn.Module):
    """forward is the given function of the linear layer's output and the arguments."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 4)
        self.function = function

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        return self.function(self, x, *args, **kwargs)


def of(function: Any, *example: Any, **options: Any) -> tuple[nn.Module, nn.Module]:
    """The module and its acceleration with that example, by default one tensor [3, 8]."""
    module = make(Of, function)
    example = example or (torch.randn(3, 8),)
    return module, ovshim.accelerate(module, example, prefer="openvino", **options)


# Inputs


class Registered:
    """A type that pytree knows without the names of its parts."""

    def __init__(self, x: Any) -> None:
        self.x = x


pytree.register_pytree_node(
    Registered, lambda r: ([r.x], None), lambda parts, _: Registered(*parts)
)


def test_leaves_of_a_registered_type_are_told_by_number() -> None:
    leaves, structure = flatten_call((Registered(torch.randn(4, 8)), 1), {"y": torch.randn(2)})
    text = describe(kind_of(leaves, structure), sizes_of(leaves))
    assert text == "0: float32[4, 8], 1=1, 2: float32[2]"


def test_dict_in_dataclass_out() -> None:
    module = make(DictToDataclass)

    def batch(size: int) -> dict[str, Tensor]:
        return {"features": torch.randn(size, 8), "weight": torch.rand(size)}

    fast = ovshim.accelerate(module, (batch(3),), prefer="openvino")
    for size in (3, 5):
        result = check(fast, module, batch(size))
        assert type(result) is Detections
    reverse = dict(reversed(batch(3).items()))
    settle(fast, module, reverse)


@pytest.mark.slow
def test_nested_in_and_out_with_none_and_constants_between() -> None:
    module = make(Nest)
    pairs = ((torch.randn(2, 8), torch.randn(2, 8)), {"c": torch.randn(2, 3)})
    fast = ovshim.accelerate(
        module, (pairs,), example_kwargs={"mode": "mean", "bias": None}, prefer="openvino"
    )
    check(fast, module, copy.deepcopy(pairs), mode="mean", bias=None)
    settle(fast, module, copy.deepcopy(pairs), mode="sum", bias=None)
    settle(fast, module, copy.deepcopy(pairs), mode="mean", bias=torch.randn(4))
    settle(fast, module, copy.deepcopy(pairs), mode="mean", bias=2.0)
    check(fast, module, copy.deepcopy(pairs), mode="mean", bias=None)
    assert len(plans(fast)) == 4


class Seconds(float):
    def __repr__(self) -> str:
        return f"{int(self)} s"


class Shown(enum.Enum):
    ONE = 1.0
    TWO = 2.0

    def __repr__(self) -> str:
        return "a number"


@pytest.mark.parametrize(("given", "other"), [(Seconds(2.2), Seconds(2.9)), (Shown.ONE, Shown.TWO)])
def test_constants_are_told_apart_by_their_values(given: Any, other: Any) -> None:
    def scaled(self: Any, x: Tensor, by: Any) -> Any:
        return self.linear(x) * (by.value if isinstance(by, Shown) else by)

    module, fast = of(scaled, torch.randn(3, 8), given)
    check(fast, module, torch.randn(3, 8), given)
    settle(fast, module, torch.randn(3, 8), other)
    check(fast, module, torch.randn(3, 8), given)


def test_a_list_is_not_a_tuple() -> None:
    def tell(self: Any, x: Any) -> Any:
        return self.linear(x[0]) + (1.0 if isinstance(x, list) else 2.0)

    module, fast = of(tell, [torch.randn(3, 8)])
    check(fast, module, [torch.randn(3, 8)])
    settle(fast, module, (torch.randn(3, 8),))
    check(fast, module, [torch.randn(3, 8)])


@pytest.mark.parametrize(
    "argument",
    [
        pytest.param(lambda: Pair(torch.randn(3, 8), torch.randn(3, 4)), id="namedtuple"),
        pytest.param(lambda: Points(torch.randn(3, 8), torch.randn(3, 4), 2), id="NamedTuple"),
        pytest.param(lambda: [torch.randn(3, 8), torch.randn(3, 4)], id="list"),
        pytest.param(lambda: (torch.randn(3, 8), torch.randn(3, 4), "text", None), id="constants"),
    ],
)
def test_sequences_in(argument: Any) -> None:
    module, fast = of(lambda self, x: self.linear(x[0]) + x[1], argument())
    check(fast, module, argument())


@pytest.mark.parametrize(
    "argument",
    [
        pytest.param(lambda: Batch(torch.randn(3, 8)), id="None inside"),
        pytest.param(lambda: Batch(torch.randn(3, 8), torch.rand(3, 4) > 0.5), id="mask"),
        pytest.param(
            lambda: Batch(torch.randn(3, 8), more=Batch(torch.randn(3, 8), name="inner")),
            id="nested",
        ),
        pytest.param(lambda: Frozen(torch.randn(3, 8), (torch.randn(3, 4), 7)), id="frozen"),
        pytest.param(lambda: Slotted(torch.randn(3, 8), Colour.BLUE), id="slots"),
    ],
)
def test_dataclasses_in(argument: Any) -> None:
    def read(self: Any, batch: Any) -> Any:
        y = self.linear(batch.x)
        if getattr(batch, "mask", None) is not None:
            y = y.masked_fill(batch.mask, 0.5)
        if getattr(batch, "more", None) is not None:
            y = y - self.linear(batch.more.x)
        if hasattr(batch, "inner"):
            y = y * batch.inner[0] + batch.inner[1]
        if getattr(batch, "kind", None) is Colour.BLUE:
            y = -y
        return y

    module, fast = of(read, argument())
    check(fast, module, argument())


def test_a_dataclass_by_keyword_beside_a_tensor() -> None:
    module = make(Of, lambda self, x, batch: self.linear(x) + self.linear(batch.x))
    fast = ovshim.accelerate(
        module,
        torch.randn(3, 8),
        example_kwargs={"batch": Batch(torch.randn(3, 8))},
        prefer="openvino",
    )
    check(fast, module, torch.randn(3, 8), batch=Batch(torch.randn(3, 8)))


@pytest.mark.parametrize(
    "argument",
    [
        pytest.param(lambda: OrderedDict(b=torch.randn(3, 4), a=torch.randn(3, 8)), id="ordered"),
        pytest.param(
            lambda: defaultdict(int, a=torch.randn(3, 8), b=torch.randn(3, 4)), id="default"
        ),
        pytest.param(lambda: {"b": torch.randn(3, 4), "a": torch.randn(3, 8), 3: None}, id="keys"),
    ],
)
def test_mappings_in(argument: Any) -> None:
    module, fast = of(lambda self, x: self.linear(x["a"]) + x["b"], argument())
    check(fast, module, argument())


@pytest.mark.parametrize(
    ("one", "other"),
    [
        pytest.param(2, 3, id="int"),
        pytest.param(0.5, 0.25, id="float"),
        pytest.param(True, False, id="bool"),
        pytest.param("a", "b", id="str"),
        pytest.param(None, 1, id="None"),
        pytest.param(torch.float64, torch.int64, id="dtype"),
        pytest.param(Colour.RED, Colour.BLUE, id="enum"),
        pytest.param(slice(0, 2), slice(1, 3), id="slice"),
        pytest.param((1, (2, "x")), (1, (2, "y")), id="nested"),
        pytest.param(b"a", b"b", id="bytes"),
        pytest.param(torch.Size([1]), torch.Size([2]), id="Size"),
    ],
)
def test_a_constant_belongs_to_the_signature(one: Any, other: Any) -> None:
    def choose(self: Any, x: Tensor, constant: Any) -> Tensor:
        return self.linear(x) * (2.0 if constant == one else 3.0)

    module, fast = of(choose, torch.randn(3, 8), one)
    check(fast, module, torch.randn(3, 8), one)
    settle(fast, module, torch.randn(3, 8), other)
    check(fast, module, torch.randn(3, 8), one)
    assert counts(fast)["eager"] <= 2


def test_a_constant_may_choose_the_dtype() -> None:
    module, fast = of(
        lambda self, x, dtype: self.linear(x).to(dtype), torch.randn(3, 8), torch.int32
    )
    check(fast, module, torch.randn(3, 8), torch.int32)
    settle(fast, module, torch.randn(3, 8) * 4, torch.int64)


def test_nan_as_a_constant_makes_no_plan_per_call() -> None:
    module, fast = of(
        lambda self, x, fill: self.linear(x).masked_fill(x[:, :4] > 0, fill),
        torch.randn(3, 8),
        float("nan"),
    )
    for _ in range(5):
        check(fast, module, torch.randn(3, 8), float("nan"), path=None)
    assert len(plans(fast)) == 1


class Unknown:
    def __init__(self, x: Tensor) -> None:
        self.x = x


def test_an_argument_of_an_unknown_type_is_eagers() -> None:
    module = make(Of, lambda self, holder: self.linear(holder.x))
    with falls_back("unknown-leaf"):
        fast = ovshim.accelerate(module, (Unknown(torch.randn(3, 8)),), prefer="openvino")
        for _ in range(2):
            check(fast, module, Unknown(torch.randn(3, 8)), path="eager", reason="unknown-leaf")


def test_an_output_of_an_unknown_type_is_eagers() -> None:
    module = make(Of, lambda self, x: Unknown(self.linear(x)))
    with falls_back("unknown-leaf"):
        fast = ovshim.accelerate(module, torch.randn(3, 8), prefer="openvino")
        check(fast, module, torch.randn(3, 8), path="eager")


def test_arrays_of_numpy_as_arguments_are_right() -> None:
    module = make(Of, lambda self, x, array: self.linear(x) + float(array.sum()))
    arrays = [torch.randn(2).numpy(), torch.randn(2).numpy()]
    with falls_back("unknown-leaf"):
        fast = ovshim.accelerate(module, (torch.randn(3, 8), arrays[0]), prefer="openvino")
        for array in arrays:
            check(fast, module, torch.randn(3, 8), array, path=None)


def test_nothing_is_registered_globally() -> None:
    known = set(pytree.SUPPORTED_NODES)
    module, fast = of(
        lambda self, batch: Batch(self.linear(batch.x), name="out"), Batch(torch.randn(3, 8))
    )
    check(fast, module, Batch(torch.randn(3, 8)))
    assert set(pytree.SUPPORTED_NODES) == known
    leaves, _ = pytree.tree_flatten(Batch(torch.randn(3, 8)))
    assert len(leaves) == 1
    assert isinstance(leaves[0], Batch)


# The same tensor twice


def test_the_same_tensor_passed_twice() -> None:
    module = make(Of, lambda self, x, y: self.linear(x) - 2 * self.linear(y))
    x = torch.randn(3, 8)
    fast = ovshim.accelerate(module, (x, x), prefer="openvino")
    check(fast, module, x, x)
    settle(fast, module, x, torch.randn(3, 8))
    check(fast, module, x, x)
    check(fast, module, torch.randn(3, 8), torch.randn(3, 8))


def test_two_tensors_first_and_then_one_twice() -> None:
    module = make(Of, lambda self, x, y: self.linear(x if x is y else x + y))
    fast = ovshim.accelerate(module, (torch.randn(3, 8), torch.randn(3, 8)), prefer="openvino")
    x = torch.randn(3, 8)
    check(fast, module, torch.randn(3, 8), torch.randn(3, 8))
    settle(fast, module, x, x)
    check(fast, module, torch.randn(3, 8), torch.randn(3, 8))


def test_two_views_of_one_storage() -> None:
    module = make(Of, lambda self, x, y: self.linear(x) - 2 * self.linear(y))
    fast = ovshim.accelerate(module, (torch.randn(3, 8), torch.randn(3, 8)), prefer="openvino")
    base = torch.randn(6, 8)
    check(fast, module, base[:3], base[3:])
    check(fast, module, base[:3], base[1:4])


# Outputs


@pytest.mark.parametrize(
    "build",
    [
        pytest.param(lambda self, x: (self.linear(x),), id="tuple of one"),
        pytest.param(lambda self, x: [self.linear(x), x + 1], id="list"),
        pytest.param(lambda self, x: {"b": self.linear(x), "a": x + 1}, id="dict order"),
        pytest.param(lambda self, x: {1: self.linear(x), None: x + 1}, id="dict keys"),
        pytest.param(lambda self, x: OrderedDict(b=self.linear(x), a=x + 1), id="OrderedDict"),
        pytest.param(lambda self, x: Pair(self.linear(x), (x + 1, None)), id="namedtuple"),
        pytest.param(lambda self, x: Points(self.linear(x), None, 3), id="NamedTuple"),
        pytest.param(lambda self, x: Batch(self.linear(x), None, "made"), id="dataclass"),
        pytest.param(lambda self, x: Frozen(self.linear(x), (x + 1, 4)), id="frozen dataclass"),
        pytest.param(lambda self, x: Slotted(self.linear(x), Colour.BLUE), id="slotted dataclass"),
        pytest.param(
            lambda self, x: [Batch(self.linear(x), more=Batch(x * 2, name="inner"))],
            id="nested dataclass",
        ),
        pytest.param(lambda self, x: torch.topk(self.linear(x), 2), id="return type of torch"),
        pytest.param(lambda self, x: (self.linear(x), "text", 3, 2.5, True, None), id="constants"),
        pytest.param(lambda self, x: (self.linear(x), torch.float32, Colour.RED), id="objects"),
        pytest.param(lambda self, x: self.linear(x).sum(), id="0-d"),
        pytest.param(lambda self, x: self.linear(x)[:, :0], id="empty"),
        pytest.param(lambda self, x: self.linear(x) > 0, id="bool"),
        pytest.param(lambda self, x: self.linear(x).argsort(-1), id="int64"),
        pytest.param(lambda self, x: self.linear(x).to(torch.int32), id="int32"),
        pytest.param(lambda self, x: self.linear(x).to(torch.float16), id="float16"),
        pytest.param(lambda self, x: self.linear(x).to(torch.bfloat16), id="bfloat16"),
        pytest.param(lambda self, x: (self.linear(x), torch.arange(4)), id="constant tensor"),
        pytest.param(lambda self, x: (self.linear(x), x.shape), id="shape"),
        pytest.param(lambda self, x: (self.linear(x), x.shape[0], x.numel()), id="sizes"),
    ],
)
def test_outputs_have_eagers_structure(build: Any) -> None:
    module, fast = of(build)
    tolerance = 1e-2
    check(fast, module, torch.randn(3, 8), tolerance=tolerance)
    check(fast, module, torch.randn(5, 8), path=None, tolerance=tolerance)
    check(fast, module, torch.randn(5, 8), tolerance=tolerance)
    assert set(paths(fast)) == {"openvino"}


def test_a_named_tuple_output() -> None:
    module = make(ToNamedTuple)
    fast = ovshim.accelerate(module, torch.randn(3, 8), prefer="openvino")
    result = check(fast, module, torch.randn(3, 8))
    assert type(result) is Points


def test_model_output() -> None:
    from transformers.modeling_outputs import BaseModelOutput, SequenceClassifierOutput

    module, fast = of(
        lambda self, x: SequenceClassifierOutput(
            logits=self.linear(x), hidden_states=(x * 2, x * 3)
        )
    )
    result = check(fast, module, torch.randn(3, 8))
    assert type(result) is SequenceClassifierOutput
    assert list(result.keys()) == ["logits", "hidden_states"]
    assert result.loss is None
    assert result[0] is result.logits
    inner = make(Of, lambda self, outputs: self.linear(outputs.last_hidden_state))
    example = BaseModelOutput(last_hidden_state=torch.randn(2, 8))
    taker = ovshim.accelerate(inner, (example,), prefer="openvino")
    check(taker, inner, BaseModelOutput(last_hidden_state=torch.randn(3, 8)))


def test_every_call_makes_new_containers() -> None:
    module, fast = of(lambda self, x: {"y": [self.linear(x)], "z": {}, "list": []})
    first = check(fast, module, torch.randn(3, 8))
    first["y"].append("mine")
    first["z"]["mine"] = 1
    first["list"].append(2)
    check(fast, module, torch.randn(3, 8))


def test_a_mutable_dataclass_output_is_made_anew() -> None:
    module, fast = of(lambda self, x: Batch(self.linear(x), name="made"))
    first = check(fast, module, torch.randn(3, 8))
    first.name = "changed"
    check(fast, module, torch.randn(3, 8))


def test_an_object_of_the_modules_own_in_the_output_stays_it() -> None:
    def forward(self: Any, x: Tensor) -> Any:
        return by(self.linear, x), self.settings

    module = make(Of, forward)
    module.settings = {"a": 1}
    with pytest.warns(ovshim.FallbackWarning, match="memory"):
        fast = ovshim.accelerate(module, torch.randn(3, 8), prefer="openvino")
    with torch.inference_mode():
        for _ in range(3):
            assert fast(torch.randn(3, 8))[1] is fast.settings
        fast.settings["a"] = 2
        for _ in range(3):
            assert fast(torch.randn(3, 8))[1] == {"a": 2}


def test_an_output_that_is_an_input_stays_it() -> None:
    module, fast = of(lambda self, x: (self.linear(x), x))
    for size in (3, 5):
        x = torch.randn(size, 8)
        with served(fast, "openvino"), torch.inference_mode():
            y, back = fast(x)
        assert back is x
        same(y, module.linear(x).detach())


def test_a_module_that_returns_its_only_input() -> None:
    with quietly():  # there is nothing to accelerate
        fast = ovshim.accelerate(nn.Identity().eval(), torch.randn(3, 8), prefer="openvino")
        x = torch.randn(3, 8)
        with served(fast, None), torch.inference_mode():
            assert fast(x) is x


@pytest.mark.parametrize("make_own", [list, dict, deque, lambda: Batch(torch.zeros(1))])
def test_what_a_module_keeps_is_handed_out_itself(make_own: Any) -> None:
    own = make_own()
    with falls_back("aliases-input"):
        module, fast = of(lambda self, x: (self.linear(x), own))
    x = torch.randn(3, 8)
    with torch.inference_mode():
        assert fast(x)[1] is module(x)[1] is own


@pytest.mark.parametrize("make_own", [lambda y: [y], lambda y: deque([y]), Batch])
def test_one_object_twice_stays_one(make_own: Any) -> None:
    def twice(self: Any, x: Tensor) -> Any:
        made = make_own(self.linear(x))
        return made, made

    with falls_back("aliases-input"):
        _, fast = of(twice)
    with torch.inference_mode():
        one, other = fast(torch.randn(3, 8))
    assert one is other


def test_frozen_objects_may_stand_twice() -> None:
    def twice(self: Any, x: Tensor) -> Any:
        made = Frozen(self.linear(x), (x * 2, 1))
        return made, made

    module, fast = of(twice)
    check(fast, module, torch.randn(3, 8))


def test_a_view_of_an_input_is_not_owned_by_another() -> None:
    """What is written to the output of `x.t()` is written to `x`."""
    module = make(Of, lambda self, x: (by(self.linear, x), x.t()))
    with falls_back("aliases-input"):
        fast = ovshim.accelerate(module, torch.randn(3, 8), prefer="openvino")
        x = torch.randn(3, 8)
        with served(fast, "eager"), torch.inference_mode():
            view = fast(x)[1]
    view[0, 0] = 42
    assert x[0, 0] == 42


def test_a_weight_in_the_output_stays_it() -> None:
    module = make(Of, lambda self, x: (self.linear(x), self.linear.weight))
    with quietly():
        fast = ovshim.accelerate(module, torch.randn(3, 8), prefer="openvino")
        with torch.inference_mode():
            for _ in range(2):
                assert fast(torch.randn(3, 8))[1] is module.linear.weight


def test_the_same_tensor_twice_in_the_output_stays_it() -> None:
    def forward(self: Any, x: Tensor) -> Any:
        y = self.linear(x)
        return {"y": y, "again": (y, y + 1)}

    module, fast = of(forward)
    for size in (3, 5):
        result = check(fast, module, torch.randn(size, 8))
        assert result["y"] is result["again"][0]
        assert result["y"].data_ptr() != result["again"][1].data_ptr()


def test_equal_but_separate_outputs_stay_separate() -> None:
    _, fast = of(lambda self, x: (self.linear(x), self.linear(x), self.linear(x) * 1))
    with served(fast, "openvino"), torch.no_grad():
        a, b, c = fast(torch.randn(3, 8))
    kept = c.clone()
    a.zero_()
    same(b, kept)
    same(c, kept)


def test_nothing_but_none_comes_back() -> None:
    module = make(Of, lambda self, x: None)
    with quietly():  # there is nothing to accelerate
        fast = ovshim.accelerate(module, torch.randn(3, 8), prefer="openvino")
        check(fast, module, torch.randn(3, 8), path=None)


def test_a_module_without_tensor_arguments() -> None:
    module = make(Of, lambda self, n: self.linear.weight * n)
    fast = ovshim.accelerate(module, (3,), prefer="openvino")
    check(fast, module, 3, path=None)
    check(fast, module, 4, path=None)
    with torch.no_grad():
        module.linear.weight.add_(1)
    check(fast, module, 3, path=None)


def test_a_module_without_arguments() -> None:
    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3))

        def forward(self) -> Tensor:
            return self.weight * 2

    module = Constant().eval()
    fast = ovshim.accelerate(module, (), prefer="openvino")
    for _ in range(3):
        check(fast, module, path=None)


def test_an_iterator_is_not_used_up() -> None:
    def forward(self: Any, x: Tensor, scales: Any) -> Tensor:
        for scale in scales:
            x = x * scale
        return self.linear(x)

    module = make(Of, forward)
    scales = iter([2.0, 3.0])
    with falls_back("unknown-leaf"):
        fast = ovshim.accelerate(module, prefer="openvino")
        x = torch.randn(3, 8)
        with torch.inference_mode():
            same(fast(x, scales), module(x, [2.0, 3.0]))
            assert list(scales) == []


def test_keyword_arguments_are_left_as_they_were() -> None:
    def forward(self: Any, x: Tensor, **options: Any) -> Tensor:
        scale = options.pop("scale", 1.0)
        return self.linear(x) * scale

    module = make(Of, forward)
    fast = ovshim.accelerate(
        module, torch.randn(3, 8), example_kwargs={"scale": 2.0}, prefer="openvino"
    )
    given = {"scale": 2.0}
    with torch.inference_mode():
        for _ in range(3):
            same(fast(x := torch.randn(3, 8), **given), module(x, scale=2.0))
    assert given == {"scale": 2.0}
    assert counts(fast) == {"openvino": 3, "mixed": 0, "eager": 0}


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.bool,
    ],
    ids=str,
)
def test_inputs_of_every_dtype(dtype: torch.dtype) -> None:
    module = make(Of, lambda self, x: (self.linear(x.float()), x.clone()))
    x = (torch.randn(3, 8) * 5).abs().to(dtype)
    fast = ovshim.accelerate(module, x, prefer="openvino")
    check(fast, module, (torch.randn(3, 8) * 5).abs().to(dtype))
    check(fast, module, torch.zeros(1, 8, dtype=dtype))


def test_float64_beside_float32_is_right() -> None:
    """OpenVINO would compute it in float32: eager may have it, and nobody loses digits."""
    module = make(
        Of, lambda self, x: (self.linear(x.float()), x / 3, self.linear(x.float()).double())
    )
    with quietly():
        fast = ovshim.accelerate(module, torch.randn(3, 8).double(), prefer="openvino")
        with served(fast, None), torch.inference_mode():
            x = torch.randn(3, 8).double()
            _, third, cast = fast(x)
    assert torch.equal(third, x / 3)
    assert cast.dtype == torch.float64


@pytest.mark.parametrize("where", ["input", "output"])
def test_float64_stays_in_eager_unless_asked_for(where: str) -> None:
    dtype = torch.float64 if where == "input" else torch.float32
    x = torch.randn(3, 8, dtype=dtype)
    module = make(Of, lambda self, x: self.linear(x.float()).double())
    with falls_back("double-precision"):
        fast = ovshim.accelerate(module, x, prefer="openvino")
        check(fast, module, x, path="eager")
    asked = ovshim.accelerate(module, x, precision="fp32", prefer="openvino")
    check(asked, module, x)


def test_modules_as_simple_namespaces() -> None:
    module = make(Of, lambda self, x: types.SimpleNamespace(y=by(self.linear, x)))
    with falls_back("unknown-leaf"):
        fast = ovshim.accelerate(module, torch.randn(3, 8), prefer="openvino")
        check(fast, module, torch.randn(3, 8), path="eager")


class Wrapped(NamedTuple):
    inner: Any


def test_structures_in_structures() -> None:
    def forward(self: Any, tree: Wrapped) -> Wrapped:
        batch, others = tree.inner
        return Wrapped([Batch(self.linear(batch.x)), {"o": Pair(others["o"][0] * 2, "end")}])

    def tree(size: int) -> Wrapped:
        return Wrapped([Batch(torch.randn(size, 8)), {"o": (torch.randn(size, 2), None)}])

    module, fast = of(forward, tree(3))
    check(fast, module, tree(3))
    check(fast, module, tree(4))
