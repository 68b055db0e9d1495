"""Which values of inputs may go to OpenVINO: the same of many as of few, and asked without waking
torch's threads."""

import math
from typing import Any

import pytest
import torch
from checks import share_of_other_threads
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ovshim.values import compile_value_check
from ovshim.waiting import SHARED_OUT

FEW, MANY = (10, 20), (SHARED_OUT // 128, 256)
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
RISKY = [0.0, 1e18, 9e18, -9e19, 3e38, 1e200, math.nan, -math.nan, math.inf, -math.inf]


def ones(sizes: tuple[int, int], special: Any, dtype: torch.dtype) -> Tensor:
    x = torch.ones(sizes, dtype=dtype)
    x[3, 5] = torch.tensor(special, dtype=torch.float64).to(dtype)
    return x


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("form", [Tensor.clone, Tensor.t, torch._neg_view, Tensor.requires_grad_])
def test_floats_are_judged_alike_however_many(dtype: torch.dtype, form: Any) -> None:
    for example in (0.0, -math.inf):  # a mask may hold infinities
        fits = compile_value_check([ones(FEW, example, dtype)], {})
        verdicts = []
        for value in RISKY:
            few, many = (fits([form(ones(sizes, value, dtype))]) for sizes in (FEW, MANY))
            assert few == many, value
            verdicts.append(few)
        assert True in verdicts
        assert False in verdicts


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.bool], ids=str)
def test_integers_are_judged_alike_however_many(dtype: torch.dtype) -> None:
    for low, high in ((-(2**31), 2**31 - 1), (0, 0), (1, 300)):
        fits = compile_value_check([torch.ones(1, dtype=dtype)], {0: (low, high)})
        for value in (0, 1, 2, 255, 2**31 - 1, 2**31, -(2**31), -(2**31) - 1):
            few, many = torch.ones(FEW, dtype=dtype), torch.ones(MANY, dtype=dtype)
            try:
                few[3, 5] = many[3, 5] = value
            except RuntimeError:
                continue  # not of this dtype
            value = int(few[3, 5])
            expected = low <= min(value, 1) and max(value, 1) <= high
            assert fits([few]) == fits([many]) == expected, value


INTEGERS = st.integers(-(2**63), 2**63 - 1)
FORMS: list[Any] = [
    Tensor.clone,
    torch._neg_view,
    lambda x: x[::2],
    lambda x: x[:1].expand(3),
    lambda x: x[1:],
    lambda x: x.view(-1, 1),
    lambda x: torch.frombuffer(bytearray(b"." + x.numpy().tobytes()), dtype=torch.int64, offset=1),
]


@given(st.lists(INTEGERS, max_size=40), st.sampled_from(FORMS), INTEGERS, INTEGERS)
def test_integers_in_any_form(held: list[int], form: Any, one: int, other: int) -> None:
    x = form(torch.tensor(held or [0], dtype=torch.int64))
    low, high = sorted((one, other))
    values = x.resolve_neg().flatten().tolist()
    for limits in ((low, high), (min(values, default=0), max(values, default=0)), (5, 4), (0, 0)):
        fits = compile_value_check([x], {0: limits})
        assert fits([x]) == all(limits[0] <= value <= limits[1] for value in values)


def test_integers_of_a_view_whose_memory_was_taken_away() -> None:
    x = torch.arange(10)[2:]
    fits = compile_value_check([x], {0: (0, 100)})
    x.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="not allocated"):  # as eager's own operations say
        fits([x])


@pytest.mark.skipif(torch.get_num_threads() == 1, reason="torch has no other threads")
@pytest.mark.parametrize("dtype", [*FLOATS, torch.int64], ids=str)
def test_the_check_does_not_wake_torchs_threads(dtype: torch.dtype) -> None:
    x = torch.ones(2_000_000, dtype=dtype)
    fits = compile_value_check([x], {})
    assert share_of_other_threads(lambda: fits([x])) < 0.1
