"""Results of integers that leave 32 bits though all that is given fits: OpenVINO keeps the lower
half. The proof tries wide values in one input at a time, so that it sees neither products of two
inputs nor sums over many elements. What is made of sizes and places alone is not asked about.

Each question computes the same in floats. Those are off by one percent in bfloat16, where that is
what runs, and by more in long sums, which have to stay below half of what fits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from ovshim.capture.magnitudes import Magnitude, magnitude, name_of
from ovshim.capture.rewrites.integers import product

__all__ = ["Question", "question"]

Question = tuple[Any, ...]

_FAR = 2.0**31
_MOST = 2.0**30
# Of what OpenVINO sums, multiplies and compares in float32.
_EXACT = 0.95 * 2.0**24


def question(node: fx.Node) -> Question | None:
    """A function that tells inside the graph whether the result of `node` fits, and what it is to
    be given; None where there is nothing to ask."""
    made = node.meta.get("example_value")
    made = made[0] if isinstance(made, tuple) and made else made
    if not isinstance(made, torch.Tensor) or made.dtype not in (torch.int64, torch.int32):
        return None
    name = name_of(node)
    if name in _ELEMENTS:
        fits, both = _ELEMENTS[name]
        operands = (*node.args[:2], *((2,) if name == "square" else ()))
        given = [magnitude(x) is Magnitude.GIVEN for x in operands]
        plain = len(operands) == 2 and not any(type(x) is int and abs(x) < 2 for x in operands)
        asked = plain and (all(given) if both else any(given))
        return (fits, *operands, node.kwargs.get("alpha", 1)) if asked else None
    if name in _BY_INDEX:
        return _by_index(node, name)
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    if name in _MANY and node.args and magnitude(node.args[0]) is Magnitude.GIVEN:
        return None if isinstance(dim, fx.Node) else (_MANY[name], node.args[0], dim)
    return None


def _by_index(node: fx.Node, name: str) -> Question | None:
    """Of what is added up, or multiplied, where an index says. All of it may go to one place."""
    position, argument = _BY_INDEX[name]
    into = node.args[0]
    values = node.args[position] if len(node.args) > position else node.kwargs.get(argument)
    given = any(magnitude(x) is Magnitude.GIVEN for x in (into, values))
    if not given or not isinstance(values, fx.Node):
        return None
    how = node.args[4] if len(node.args) > 4 else node.kwargs.get("reduce")
    return _product_of_both_fits if how == "prod" else _total_of_both_fits, into, values


def _float(x: Any) -> Any:
    return x.to(torch.float32) if isinstance(x, torch.Tensor) else float(x)


def _has_not_wrapped(result: torch.Tensor, unbounded: torch.Tensor) -> torch.Tensor:
    # What has is 2**32 away, or more.
    fits: torch.Tensor = ((_float(result) - unbounded).abs() < _FAR).all()
    return fits


def _all_below(sizes: torch.Tensor, most: float) -> torch.Tensor:
    return (sizes <= most).all()


def _sum_fits(a: Any, b: Any, alpha: int) -> torch.Tensor:
    return _has_not_wrapped(a + b * alpha, _float(a) + _float(b) * alpha)


def _difference_fits(a: Any, b: Any, alpha: int) -> torch.Tensor:
    return _has_not_wrapped(a - b * alpha, _float(a) - _float(b) * alpha)


def _product_fits(a: Any, b: Any, _: int) -> torch.Tensor:
    return _has_not_wrapped(a * b, _float(a) * _float(b))


def _power_fits(a: Any, b: Any, _: int) -> torch.Tensor:
    power = torch.pow(_float(a), _float(b))
    if type(b) is int and 1 < b <= 8:
        return _has_not_wrapped(product(a, b), power)
    return _all_below(power.abs(), _MOST)


def _shift_fits(a: Any, b: Any, _: int) -> torch.Tensor:
    return _has_not_wrapped(a << b, _float(a) * torch.pow(2.0, torch.as_tensor(_float(b))))


def _products_fit(a: torch.Tensor, b: torch.Tensor, _: int) -> torch.Tensor:
    return _all_below(_float(a).abs() @ _float(b).abs(), _EXACT)


def _is_exact(x: torch.Tensor, _: Any) -> torch.Tensor:
    return _all_below(_float(x).abs(), _EXACT)


def _total_fits(x: torch.Tensor, dim: Any, most: float = _EXACT) -> torch.Tensor:
    sizes = _float(x).abs()
    return _all_below(sizes.sum() if dim is None else sizes.sum(dim), most)


def _totals_fit(x: torch.Tensor, dim: Any) -> torch.Tensor:
    return _total_fits(x, dim, _MOST)


def _whole_product_fits(x: torch.Tensor, dim: Any) -> torch.Tensor:
    sizes = _float(x).abs().clamp(min=1.0)
    return _all_below(sizes.prod() if dim is None else sizes.prod(dim), _EXACT)


def _total_of_both_fits(*both: torch.Tensor) -> torch.Tensor:
    return _totals_fit(torch.cat([x.reshape(-1) for x in both]), None)


def _product_of_both_fits(*both: torch.Tensor) -> torch.Tensor:
    return _whole_product_fits(torch.cat([x.reshape(-1) for x in both]), None)


def _has_an_opposite(x: torch.Tensor, _: Any) -> torch.Tensor:
    return _all_below(-_float(x), _FAR - 256)


_Fits = Callable[..., torch.Tensor]
# By the name of the operator: how to ask, and whether both operands have to be given values: one
# alone the proof has seen.
_ELEMENTS: dict[str, tuple[_Fits, bool]] = {
    **dict.fromkeys(("add", "iadd", "add_"), (_sum_fits, True)),
    **dict.fromkeys(("sub", "isub", "sub_"), (_difference_fits, True)),
    **dict.fromkeys(("mul", "imul", "mul_", "multiply"), (_product_fits, False)),
    **dict.fromkeys(("pow", "square"), (_power_fits, False)),
    **dict.fromkeys(("lshift", "bitwise_left_shift"), (_shift_fits, False)),
    **dict.fromkeys(("matmul", "bmm", "mm", "mv", "dot"), (_products_fit, False)),
}
_MANY: dict[str, _Fits] = {
    **dict.fromkeys(("max", "min", "amax", "amin"), _is_exact),
    "sum": _total_fits,
    "cumsum": _totals_fit,
    "prod": _whole_product_fits,
    **dict.fromkeys(("abs", "absolute", "neg", "negative"), _has_an_opposite),
}
# Where the values lie among the arguments, and what they are called.
_BY_INDEX = {
    **dict.fromkeys(("index_add", "index_add_"), (3, "source")),
    **dict.fromkeys(("scatter_add", "scatter_add_"), (3, "src")),
    **dict.fromkeys(("scatter_reduce", "scatter_reduce_"), (3, "src")),
    **dict.fromkeys(("index_put", "index_put_"), (2, "values")),
}
