"""Sizes that change from call to call: which are served, at what cost, and how they are named."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from checks import check, counts, paths, plans, quietly, run_python, settle
from modules import Attention, Function, Mlp, Pooled, Recurrent, make, small_bert
from torch import Tensor, nn
from torch.export import Dim

import ovshim


class Add(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.linear(x) + y


class TwoLengths(nn.Module):
    """[batch, 5] and [batch, 3, 6], whatever the last sizes."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x.sum(-1) * y.amax((1, 2)) + x.shape[1] * 10 + y.shape[2]


class BranchesOnSize(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] > 4:
            return self.linear(x) * 100
        return self.linear(x)


class Loops(nn.Module):
    """A Python loop over the length."""

    def forward(self, x: Tensor) -> Tensor:
        state = x[:, 0] * 0.5
        for step in range(1, x.shape[1]):
            state = (state + x[:, step]).tanh()
        return state


class OnlyThree(nn.Module):
    """Eager refuses any batch but 3."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).view(3, 4) + torch.zeros(3, 4)


class Table(nn.Module):
    """Broadcasts against a table of 6 rows: a batch of 1 or 6 only."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(6, 8))

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.table).tanh()


# The batch


@pytest.mark.parametrize("example", [1, 3], ids=["from 1", "from 3"])
@pytest.mark.parametrize(
    ("make_module", "size"),
    [
        pytest.param(lambda: make(Mlp), (8,), id="mlp"),
        pytest.param(lambda: make(Pooled), (3, 8, 8), id="conv"),
        pytest.param(lambda: make(Attention), (5, 16), id="attention"),
    ],
)
def test_any_batch_is_served_by_one_plan(
    make_module: Any, size: tuple[int, ...], example: int
) -> None:
    module = make_module()
    fast = ovshim.accelerate(module, torch.randn(example, *size), prefer="openvino")
    for batch in (1, 2, 7, example, 33):
        check(fast, module, torch.randn(batch, *size))
    assert paths(fast) == ["openvino"]


@pytest.mark.parametrize("example", [1, 3], ids=["from 1", "from 3"])
def test_any_batch_of_an_lstm_is_served(example: int) -> None:
    """torch itself treats a batch of 1 in its own way here: a plan by itself is allowed."""
    module = make(Recurrent)
    fast = ovshim.accelerate(module, torch.randn(example, 5, 8), prefer="openvino")
    check(fast, module, torch.randn(example, 5, 8))
    for batch in (1, 2):
        settle(fast, module, torch.randn(batch, 5, 8))
    for batch in (1, 7, 3, 33):
        check(fast, module, torch.randn(batch, 5, 8))
    assert len(plans(fast)) <= 2


@pytest.mark.parametrize(
    ("make_module", "size"),
    [
        pytest.param(lambda: make(Mlp), (8,), id="mlp"),
        pytest.param(lambda: make(Pooled), (3, 8, 8), id="conv"),
        pytest.param(lambda: make(Attention), (5, 16), id="attention"),
        pytest.param(lambda: make(Recurrent), (5, 8), id="lstm"),
    ],
)
def test_an_empty_batch_is_right(make_module: Any, size: tuple[int, ...]) -> None:
    module = make_module()
    fast = ovshim.accelerate(module, torch.randn(3, *size), prefer="openvino")
    for batch in (0, 2, 0, 1):
        check(fast, module, torch.randn(batch, *size), path=None)
    check(fast, module, torch.randn(2, *size))


def test_an_empty_batch_that_eager_refuses_is_refused() -> None:
    class Largest(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.amax(0)

    fast = ovshim.accelerate(Largest().eval(), torch.randn(3, 8), prefer="openvino")
    with torch.inference_mode(), pytest.raises(IndexError, match="amax"):
        fast(torch.randn(0, 8))
    check(fast, Largest(), torch.randn(2, 8))


def test_an_empty_example() -> None:
    module = make(Mlp)
    with quietly():
        fast = ovshim.accelerate(module, torch.randn(0, 8), prefer="openvino")
        for batch in (0, 1, 5):
            check(fast, module, torch.randn(batch, 8), path=None)
    settle(fast, module, torch.randn(5, 8))


def test_batches_of_several_inputs() -> None:
    module = make(Add)
    fast = ovshim.accelerate(module, (torch.randn(3, 8), torch.randn(3, 8)), prefer="openvino")
    for batch in (1, 2, 7):
        check(fast, module, torch.randn(batch, 8), torch.randn(batch, 8))
    assert len(plans(fast)) == 1


@pytest.mark.parametrize("sizes", [(3, 1), (1, 3), (3, 3), (1, 1)], ids=str)
def test_batches_that_broadcast(sizes: tuple[int, int]) -> None:
    module = make(Add)
    x, y = (torch.randn(size, 8) for size in sizes)
    fast = ovshim.accelerate(module, (x, y), prefer="openvino")
    check(fast, module, x, y)
    for one, other in ((3, 1), (1, 3), (5, 5), (1, 1), (4, 1)):
        settle(fast, module, torch.randn(one, 8), torch.randn(other, 8))
    with torch.inference_mode(), pytest.raises(RuntimeError, match="must match"):
        fast(torch.randn(3, 8), torch.randn(2, 8))


def test_batches_that_eager_refuses_to_combine() -> None:
    """A length of the second input that was the batch in the example."""

    class Outer(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x @ y

    module = Outer().eval()
    fast = ovshim.accelerate(module, (torch.randn(3, 3), torch.randn(3, 3)), prefer="openvino")
    check(fast, module, torch.randn(3, 3), torch.randn(3, 3))
    settle(fast, module, torch.randn(5, 3), torch.randn(3, 3))
    settle(fast, module, torch.randn(5, 4), torch.randn(4, 2))
    with torch.inference_mode(), pytest.raises(RuntimeError):
        fast(torch.randn(5, 4), torch.randn(3, 2))


def by_regions(x: Tensor, regions: Tensor) -> Tensor:
    if regions.shape[0] == 0:
        return x.new_zeros(0, 4)
    return x.reshape(regions.shape[0], -1, 4).mean(1) + regions


def but_one(x: Tensor, y: Tensor) -> Tensor:
    return x.reshape(y.shape[0] - 1, -1, 4).mean(1) + y[1:]


@pytest.mark.parametrize(("function", "none"), [(by_regions, 0), (but_one, 1)])
def test_a_size_that_others_are_divided_by_may_be_nothing(function: Any, none: int) -> None:
    module, x = make(Function, function), torch.randn(6, 4)
    some = torch.randn(none + 2, 4)
    fast = ovshim.accelerate(module, (x, some), prefer="openvino", cache_dir=None)
    check(fast, module, x, some)
    with quietly(), torch.inference_mode():
        for _ in range(2):
            try:
                expected = module(x, some[:none])
            except RuntimeError as error:
                with pytest.raises(RuntimeError, match=re.escape(str(error))):
                    fast(x, some[:none])
            else:
                assert torch.equal(fast(x, some[:none]), expected)
    assert sum(counts(fast).values()) == (3 if none == 0 else 1)
    check(fast, module, x, some)


def test_without_a_dynamic_batch_another_one_is_right() -> None:
    module = make(Mlp)
    fast = ovshim.accelerate(module, torch.randn(3, 8), dynamic_batch=False, prefer="openvino")
    check(fast, module, torch.randn(3, 8))
    check(fast, module, torch.randn(5, 8), path=None)
    check(fast, module, torch.randn(5, 8), path=None)
    check(fast, module, torch.randn(3, 8))


def test_a_module_whose_eager_refuses_another_batch() -> None:
    module = make(OnlyThree)
    fast = ovshim.accelerate(module, torch.randn(3, 8), prefer="openvino")
    check(fast, module, torch.randn(3, 8))
    for batch in (2, 4, 6):
        with torch.inference_mode(), pytest.raises(RuntimeError, match="shape"):
            fast(torch.randn(batch, 8))
    check(fast, module, torch.randn(3, 8))
    assert "openvino" in paths(fast)


@pytest.mark.parametrize("example", [1, 6])
def test_a_module_that_takes_two_batch_sizes(example: int) -> None:
    module = make(Table)
    fast = ovshim.accelerate(module, torch.randn(example, 8), prefer="openvino")
    check(fast, module, torch.randn(example, 8))
    for batch in (6, 1):
        settle(fast, module, torch.randn(batch, 8))
    with torch.inference_mode(), pytest.raises(RuntimeError, match="must match"):
        fast(torch.randn(4, 8))
    for batch in (6, 1):
        check(fast, module, torch.randn(batch, 8))


# Other sizes


def test_another_size_makes_that_dimension_dynamic_by_one_rebuild() -> None:
    module = make(Pooled)
    fast = ovshim.accelerate(module, torch.randn(2, 3, 8, 8), prefer="openvino")
    settle(fast, module, torch.randn(2, 3, 8, 12))
    known = len(plans(fast))
    assert known <= 2
    for width in (9, 16, 31, 8, 12):
        check(fast, module, torch.randn(3, 3, 8, width))
    assert len(plans(fast)) == known


def test_each_dimension_costs_one_rebuild() -> None:
    module = make(Pooled)
    fast = ovshim.accelerate(module, torch.randn(2, 3, 8, 8), prefer="openvino")
    settle(fast, module, torch.randn(2, 3, 8, 12))
    settle(fast, module, torch.randn(2, 3, 10, 8))
    known = len(plans(fast))
    assert known <= 3
    for height, width in ((8, 8), (9, 13), (20, 7), (10, 12)):
        check(fast, module, torch.randn(2, 3, height, width))
    assert len(plans(fast)) == known


def test_the_length_of_a_bert_is_built_for_once() -> None:
    module = small_bert()
    fast = ovshim.accelerate(module, {"input_ids": ids(2, 9)}, prefer="openvino")
    check(fast, module, input_ids=ids(3, 9))
    settle(fast, module, input_ids=ids(2, 12))
    known = len(plans(fast))
    assert known <= 2
    eager = counts(fast)["eager"]
    # Not 1: a mask of one column broadcasts, and Dynamo captures that case by itself.
    for length in (7, 3, 33, 16, 9, 12, 2):
        settle(fast, module, input_ids=ids(2, length), within=2)
        check(fast, module, input_ids=ids(2, length))
    assert len(plans(fast)) == known
    assert counts(fast)["eager"] - eager <= 2, "lengths 0 and 1 may be by themselves"


def ids(batch: int, length: int) -> Tensor:
    return torch.randint(0, 100, (batch, length))


_NEXT_PROCESS = """
import json, sys, torch, ovshim
from modules import Pooled, make
module = make(Pooled)
fast = ovshim.accelerate(module, torch.ones(2, 3, 8, 8), prefer="openvino")
with torch.inference_mode():
    for width in map(int, sys.argv[1:]):
        x = torch.linspace(-1, 1, 2 * 3 * 8 * width).view(2, 3, 8, width)
        torch.testing.assert_close(fast(x), module(x), rtol=1e-4, atol=1e-5)
print(json.dumps(ovshim.explain(fast).to_dict()))
"""


@pytest.mark.slow
def test_the_next_process_begins_where_this_one_ended() -> None:
    first = json.loads(run_python(_NEXT_PROCESS, "8", "12", "12", "9"))
    assert first["calls"]["openvino"] >= 2
    second = json.loads(run_python(_NEXT_PROCESS, "8", "12", "9", "31", "8"))
    assert second["calls"] == {"openvino": 5, "mixed": 0, "eager": 0}
    assert {plan["cache"] for plan in second["plans"]} == {"hit"}
    assert all("capture" not in plan["seconds"] for plan in second["plans"])


@pytest.mark.parametrize(
    "function",
    [
        pytest.param(lambda x: x / math.sqrt(x.shape[1]), id="math.sqrt"),
        pytest.param(lambda x: x / x.shape[1] ** 0.5, id="power"),
        pytest.param(lambda x: x + torch.arange(x.shape[1]), id="arange"),
        pytest.param(lambda x: torch.cat([x.new_zeros(len(x), x.shape[1] * 2), x], 1), id="cat"),
        pytest.param(lambda x: x.reshape(-1, 1) * float(x.numel()), id="numel"),
        pytest.param(lambda x: x[:, : (x.shape[1] + 1) // 2] * 2, id="half"),
        pytest.param(lambda x: x[:, -min(3, x.shape[1]) :] * 2, id="min"),
        pytest.param(lambda x: (x + 1, x.shape[0] * x.shape[1], tuple(x.shape)), id="returned"),
    ],
)
def test_sizes_read_in_python(function: Any) -> None:
    module = Function(function).eval()
    fast = ovshim.accelerate(module, torch.randn(3, 5), prefer="openvino")
    for shape in ((3, 5), (4, 5), (2, 7), (6, 7), (2, 16)):
        settle(fast, module, torch.randn(shape))
    known = len(plans(fast))
    for shape in ((4, 11), (3, 9), (2, 4)):
        check(fast, module, torch.randn(shape))
    for shape in ((1, 3), (1, 1), (2, 1), (0, 3)):
        check(fast, module, torch.randn(shape), path=None)
    assert known <= 3


def test_a_branch_on_a_size() -> None:
    module = make(BranchesOnSize)
    fast = ovshim.accelerate(module, torch.randn(3, 8), prefer="openvino")
    for batch in (3, 5, 4, 7, 1, 12):
        settle(fast, module, torch.randn(batch, 8))
    for batch in (2, 9):
        check(fast, module, torch.randn(batch, 8))


@pytest.mark.slow
def test_a_loop_over_a_size() -> None:
    module = make(Loops)
    fast = ovshim.accelerate(module, torch.randn(2, 3, 8), prefer="openvino")
    with quietly():
        for length in (3, 4, 2, 5, 3, 4, 1):
            check(fast, module, torch.randn(2, length, 8), path=None)
            check(fast, module, torch.randn(2, length, 8), path=None)
    check(fast, module, torch.randn(4, 3, 8))


@pytest.mark.slow
def test_many_sizes_of_a_loop_build_a_bounded_number_of_plans() -> None:
    module = make(Loops)
    fast = ovshim.accelerate(module, torch.randn(2, 3, 8), prefer="openvino")
    with quietly():
        for length in range(1, 25):
            check(fast, module, torch.randn(1, length, 8), path=None)
    assert len(plans(fast)) <= 20
    check(fast, module, torch.randn(4, 3, 8), path=None)


@pytest.mark.slow
def test_the_lengths_of_an_lstm() -> None:
    module = make(Recurrent)
    fast = ovshim.accelerate(module, torch.randn(2, 5, 8), prefer="openvino")
    for length in (7, 5, 3, 1, 12):
        settle(fast, module, torch.randn(3, length, 8))
    check(fast, module, torch.randn(2, 9, 8))
    settle(fast, module, torch.randn(1, 9, 8))


@pytest.mark.slow
def test_the_mask_and_the_length_move_together() -> None:
    module = make(Attention)
    fast = ovshim.accelerate(
        module, (torch.randn(2, 5, 16), torch.rand(2, 5) > 0.3), prefer="openvino"
    )
    for batch, length in ((2, 5), (3, 7), (1, 2), (4, 11)):
        mask = torch.rand(batch, length) > 0.3
        mask[:, 0] = True
        settle(fast, module, torch.randn(batch, length, 16), mask)
    with torch.inference_mode(), pytest.raises(RuntimeError):
        fast(torch.randn(2, 5, 16), torch.ones(2, 4, dtype=torch.bool))


def test_a_size_that_weights_fix_stays_refused() -> None:
    module = make(Mlp)
    fast = ovshim.accelerate(module, torch.randn(3, 8), prefer="openvino")
    for _ in range(3):
        with torch.inference_mode(), pytest.raises(RuntimeError, match="shapes"):
            fast(torch.randn(3, 9))
    check(fast, module, torch.randn(4, 8))


def test_an_input_smaller_than_the_kernel_is_refused() -> None:
    class Valid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(2, 3, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x).sum(-1)

    module = Valid().eval()
    fast = ovshim.accelerate(module, torch.randn(2, 2, 16), prefer="openvino")
    settle(fast, module, torch.randn(2, 2, 20))
    for length in (4, 1, 0):
        with torch.inference_mode(), pytest.raises(RuntimeError) as refused:
            module(torch.randn(2, 2, length))
        with torch.inference_mode(), pytest.raises(RuntimeError) as told:
            fast(torch.randn(2, 2, length))
        assert str(told.value) == str(refused.value)
    check(fast, module, torch.randn(3, 2, 5))


# Said beforehand


@pytest.mark.parametrize(
    "spec",
    [
        pytest.param({"x": {0: "batch", 1: "length"}}, id="names"),
        pytest.param({"x": {0: Dim("batch"), 1: Dim("length")}}, id="Dim"),
        pytest.param({"x": {0: Dim("batch", min=1, max=64), 1: Dim("length", max=32)}}, id="range"),
        pytest.param({"x": {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}}, id="DYNAMIC"),
        pytest.param({"x": {0: Dim.AUTO, 1: Dim.AUTO}}, id="AUTO"),
        pytest.param({"x": (Dim.DYNAMIC, Dim.DYNAMIC, None)}, id="sequence of sizes"),
        pytest.param({"x": [Dim.DYNAMIC, Dim.DYNAMIC, Dim.STATIC]}, id="list of sizes"),
        pytest.param({"x": {1: "length"}}, id="batch by default"),
        pytest.param(({0: "batch", 1: "length"},), id="positional"),
    ],
)
def test_shapes_said_beforehand_need_no_rebuild(spec: Any) -> None:
    module = make(Attention)
    fast = ovshim.accelerate(module, torch.randn(2, 5, 16), dynamic_shapes=spec, prefer="openvino")
    for batch, length in ((2, 5), (3, 9), (1, 2), (2, 16)):
        check(fast, module, torch.randn(batch, length, 16))
    assert len(plans(fast)) == 1


def test_shapes_of_several_arguments_by_name() -> None:
    module = make(TwoLengths)
    fast = ovshim.accelerate(
        module,
        (torch.randn(2, 5), torch.randn(2, 3, 6)),
        dynamic_shapes={"x": {0: "batch", 1: "a"}, "y": {0: "batch", 2: "b"}},
        prefer="openvino",
    )
    for batch, a, b in ((2, 5, 6), (3, 4, 7), (1, 2, 3), (4, 6, 6)):
        check(fast, module, torch.randn(batch, a), torch.randn(batch, 3, b))
    assert len(plans(fast)) == 1


@pytest.mark.slow
def test_shapes_of_keyword_arguments() -> None:
    module = small_bert()
    fast = ovshim.accelerate(
        module,
        {"input_ids": ids(2, 9), "attention_mask": torch.ones(2, 9, dtype=torch.int64)},
        dynamic_shapes={
            "input_ids": {0: "batch", 1: "length"},
            "attention_mask": {0: "batch", 1: "length"},
        },
        prefer="openvino",
    )
    for batch, length in ((2, 9), (3, 4), (1, 17)):
        mask = torch.ones(batch, length, dtype=torch.int64)
        mask[0, : length // 2] = 0
        check(fast, module, input_ids=ids(batch, length), attention_mask=mask)
    assert len(plans(fast)) == 1


def test_shapes_inside_structures() -> None:
    class Sums(nn.Module):
        def forward(self, batch: dict[str, Any], scale: float = 2.0) -> Tensor:
            return batch["a"].sum(1) * scale + batch["b"][0].mean(1)

    module = Sums().eval()
    fast = ovshim.accelerate(
        module,
        ({"a": torch.randn(2, 5), "b": (torch.randn(2, 4), None)},),
        dynamic_shapes={"batch": {"a": {1: "n"}, "b": ({1: "m"}, None)}},
        prefer="openvino",
    )
    for n, m in ((5, 4), (7, 3), (2, 9)):
        check(fast, module, {"a": torch.randn(3, n), "b": (torch.randn(3, m), None)})
    assert len(plans(fast)) == 1


def test_an_argument_left_out_of_the_spec_is_as_by_default() -> None:
    module = make(TwoLengths)
    fast = ovshim.accelerate(
        module,
        (torch.randn(2, 5), torch.randn(2, 3, 6)),
        dynamic_shapes={"x": {1: "a"}},
        prefer="openvino",
    )
    check(fast, module, torch.randn(3, 9), torch.randn(3, 3, 6))
    settle(fast, module, torch.randn(3, 9), torch.randn(3, 3, 8))


def test_one_name_for_two_sizes_that_differ() -> None:
    """In the example the lengths are 5 and 6: one name cannot stand for both."""
    with pytest.raises(ovshim.OptionError) as told:
        ovshim.accelerate(
            make(TwoLengths),
            (torch.randn(2, 5), torch.randn(2, 3, 6)),
            dynamic_shapes={"x": {1: "length"}, "y": {2: "length"}},
            prefer="openvino",
        )
    assert told.value.name == "dynamic_shapes"


@pytest.mark.parametrize(
    ("spec", "named"),
    [
        pytest.param({"nothing": {0: "batch"}}, "nothing", id="no such argument"),
        pytest.param({"x": {5: "length"}}, "x", id="no such dimension"),
        pytest.param({"x": {-4: "length"}}, "x", id="no such negative dimension"),
        pytest.param({"x": {0: 3.5}}, "x", id="no such form"),
        pytest.param({"x": {"0": "batch"}}, "x", id="a dimension by name"),
        pytest.param({"x": ("batch",)}, "x", id="too few sizes"),
        pytest.param({"x": "batch"}, "x", id="a name for a whole argument"),
        pytest.param(({0: "batch"}, {0: "batch"}), "dynamic_shapes", id="too many arguments"),
        pytest.param({"x": {1: Dim("length", max=4)}}, "x", id="example out of range"),
    ],
)
def test_mistakes_in_the_spec_raise_at_once(spec: Any, named: str) -> None:
    with pytest.raises(ovshim.OptionError) as told:
        ovshim.accelerate(
            make(Attention), torch.randn(2, 5, 16), dynamic_shapes=spec, prefer="openvino"
        )
    assert told.value.name == "dynamic_shapes"
    assert named in str(told.value)
    assert told.value.allowed
    assert told.value.remedy
    assert str(told.value).endswith(told.value.remedy)


def test_an_argument_that_is_no_tensor_in_the_spec() -> None:
    class Times(nn.Module):
        def forward(self, x: Tensor, k: float) -> Tensor:
            return x * k

    module = Times().eval()
    fast = ovshim.accelerate(
        module,
        (torch.randn(2, 4), 2.0),
        dynamic_shapes={"x": {1: "n"}, "k": None},
        prefer="openvino",
    )
    check(fast, module, torch.randn(3, 9), 2.0)
    with pytest.raises(ovshim.OptionError, match="k"):
        ovshim.accelerate(module, (torch.randn(2, 4), 2.0), dynamic_shapes={"k": {0: "n"}})


def test_a_spec_whose_size_eager_fixes_still_answers() -> None:
    """A size said to be dynamic that the weights fix: static, or refused as eager refuses."""
    module = make(Mlp)
    with quietly():
        fast = ovshim.accelerate(
            module, torch.randn(3, 8), dynamic_shapes={"x": {1: "width"}}, prefer="openvino"
        )
        check(fast, module, torch.randn(4, 8), path=None)
        with torch.inference_mode(), pytest.raises(RuntimeError, match="shapes"):
            fast(torch.randn(4, 9))


def test_a_static_batch_said_in_the_spec() -> None:
    module = make(Mlp)
    fast = ovshim.accelerate(
        module, torch.randn(3, 8), dynamic_shapes={"x": {0: Dim.STATIC}}, prefer="openvino"
    )
    check(fast, module, torch.randn(3, 8))
    check(fast, module, torch.randn(5, 8), path=None)
    check(fast, module, torch.randn(3, 8))


def test_a_range_is_kept_to() -> None:
    """Beyond what the user said, the answer is right all the same."""
    module = make(Attention)
    fast = ovshim.accelerate(
        module,
        torch.randn(2, 5, 16),
        dynamic_shapes={"x": {1: Dim("length", min=2, max=8)}},
        prefer="openvino",
    )
    check(fast, module, torch.randn(2, 8, 16))
    check(fast, module, torch.randn(2, 9, 16), path=None)
    check(fast, module, torch.randn(2, 1, 16), path=None)


def test_a_spec_without_an_example_is_checked_by_the_first_call() -> None:
    module = make(Attention)
    fast = ovshim.accelerate(module, dynamic_shapes={"x": {1: "length"}}, prefer="openvino")
    settle(fast, module, torch.randn(2, 5, 16))
    check(fast, module, torch.randn(2, 7, 16))
    assert len(plans(fast)) == 1


def test_a_spec_that_names_nothing_is_told_without_an_example() -> None:
    with pytest.raises(ovshim.OptionError, match="nothing"):
        ovshim.accelerate(make(Attention), dynamic_shapes={"nothing": {1: "length"}})


def test_a_cache_entry_of_other_sizes_is_no_hit_for_wrong_ones(tmp_path: Path) -> None:
    module = make(BranchesOnSize)
    for batch in (3, 6, 3, 6):
        fast = ovshim.accelerate(
            module, torch.randn(batch, 8), prefer="openvino", cache_dir=tmp_path
        )
        check(fast, module, torch.randn(batch, 8))


def test_first_use_of_odd_sizes_is_right() -> None:
    """Sizes around powers of two and around the kernels' blocks."""
    module = make(Pooled)
    fast = ovshim.accelerate(
        module,
        torch.randn(2, 3, 8, 8),
        dynamic_shapes={"x": {2: "height", 3: "width"}},
        prefer="openvino",
    )
    for size in (1, 2, 3, 7, 15, 16, 17, 31, 33, 63, 65):
        check(fast, module, torch.randn(1, 3, size, 70 - size), path=None)
    assert len(plans(fast)) == 1


def test_an_example_that_the_module_refuses_is_a_mistake() -> None:
    with pytest.raises(ovshim.OptionError) as told:
        ovshim.accelerate(make(Mlp), torch.randn(3, 9), prefer="openvino")
    assert told.value.name == "example_input"
    assert "mat1 and mat2" in str(told.value)
    assert isinstance(told.value.__cause__, RuntimeError)


class WritesConstants(nn.Module):
    """OpenVINO makes of the constant as many rows as the example has, and raises on others."""

    def forward(self, x: Tensor) -> Tensor:
        y = x * 1
        y[:, -2:] = torch.tensor([1.0, 2.0])
        return y


def test_a_graph_that_dies_of_a_size_serves_the_example() -> None:
    module = WritesConstants().eval()
    fast = ovshim.accelerate(module, torch.randn(2, 8), prefer="openvino")
    for rows in (2, 2, 3, 3):
        check(fast, module, torch.randn(rows, 8), path=None)
    assert counts(fast)["openvino"] >= 2
    assert "infer-failed" not in ovshim.explain(fast).to_dict()["eager_reasons"]
