"""Integers that leave 32 bits inside of a graph, or what float32 tells apart, go to eager."""

import pytest
import torch
from checks import check, plans
from modules import Function

import ovshim

ONES = torch.ones(3, 4, dtype=torch.int64)
PLACES = torch.zeros(3, dtype=torch.int64)


OVERFLOWS = {
    "product": (lambda x, y: x * y, 100000),
    "sum": (lambda x, y: x + y, 2**31 - 1),
    "difference": (lambda x, y: x - -y, 2**30),
    "scaled sum": (lambda x, y: torch.add(x, y, alpha=5), 2**29),
    "matrix product": (lambda x, y: x @ y.T, 2**15),
    "whole product": (lambda x, y: (x + y).prod(1), 2**8),
    "total": (lambda x, y: (x + y).sum(), 2**29),
    "running total": (lambda x, y: (x + y).cumsum(1), 2**29),
    "power": (lambda x, y: (x * y) ** 2, 2**9),
    "shift": (lambda x, y: (x + y) << 4, 2**28),
    "total by index": (lambda x, y: (x * 0).index_add(0, PLACES, x * y), 2**15),
    "scattered total": (lambda x, y: (x * 0).scatter_add(0, x * 0, x * y), 2**15),
    "opposite": (lambda x, y: abs(x + y), -(2**30)),
}


@pytest.mark.parametrize("name", OVERFLOWS)
def test_what_leaves_32_bits_goes_to_eager(name: str) -> None:
    function, large = OVERFLOWS[name]
    module = Function(function).eval()
    fast = ovshim.accelerate(module, (ONES, ONES.clone()), prefer="openvino", cache_dir=False)
    check(fast, module, ONES * 3, ONES * 2)
    with torch.no_grad():
        assert torch.equal(fast(ONES * large, ONES * large), module(ONES * large, ONES * large))
    assert fast.ovshim.stats()["eager"] == 1


def test_positions_and_products_that_fit_stay_in_openvino() -> None:
    module = Function(lambda x, y: (x * y, x.cumsum(1) - 1, torch.arange(4) * x)).eval()
    fast = ovshim.accelerate(module, (ONES, ONES.clone()), prefer="openvino", cache_dir=False)
    for value in (2, 40000, -40000):
        check(fast, module, ONES * value, ONES * 40000)


def test_neighbours_of_16777216_are_told_apart() -> None:
    module = Function(lambda x: (x > 2**24, x == 2**24, x.roll(1, 0) != 2**24)).eval()
    fast = ovshim.accelerate(module, ONES, prefer="openvino", cache_dir=False)
    for value in (2**24 - 1, 2**24, 2**24 + 1):
        check(fast, module, ONES * value)


def test_neighbours_of_67108864_are_told_from_those_asked_for() -> None:
    module = Function(lambda x: (torch.isin(x, torch.tensor([2**26, 5])), torch.isin(x, 2**26)))
    fast = ovshim.accelerate(module.eval(), ONES, prefer="openvino", cache_dir=False)
    for value in (2**26 - 1, 2**26, 2**26 + 1):
        check(fast, module, ONES * value)


def test_a_maximum_that_float32_does_not_hold_goes_to_eager() -> None:
    module = Function(lambda x: (x.amax(1) != 2**24, x.max(1)[0] != 2**24)).eval()
    fast = ovshim.accelerate(module, ONES, prefer="openvino", cache_dir=False)
    check(fast, module, ONES * 2**23)
    with torch.no_grad():
        assert all(found.all() for found in fast(ONES * (2**24 + 1)))
    assert fast.ovshim.stats()["eager"] == 1


def test_a_question_about_a_size_leaves_it_open() -> None:
    module = Function(lambda ids: ids * ids.shape[1]).eval()
    fast = ovshim.accelerate(module, torch.arange(16).reshape(2, 8), prefer="openvino")
    check(fast, module, torch.arange(33).reshape(3, 11), path=None)
    check(fast, module, torch.arange(26).reshape(2, 13))  # what has changed once is open
    assert len(plans(fast)) == 1
    with torch.no_grad():
        large = torch.full((3, 11), 2**30)
        assert torch.equal(fast(large), module(large))
