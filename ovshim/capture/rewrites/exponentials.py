"""Exponentials and logarithms next to 1, where OpenVINO rounds away what is small beside it, or
takes a formula of the user's for a function that does not overflow."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Node

from ovshim.capture.magnitudes import is_of_floats, name_of
from ovshim.capture.rewrites.entry import Function, Rewrite, always, in_place, value_of

__all__ = ["EXPONENTIALS", "TABLE", "softplus"]


def log1p(x: torch.Tensor) -> torch.Tensor:
    """The logarithm of the rounded sum, and what was rounded off. Beyond 1 that is too little to
    matter, and of infinity no number."""
    total = 1 + x
    # OpenVINO would fold `(1 + x) - 1` to `x`, but for an absolute value in between.
    lost = x - (total.abs() - 1)
    return torch.log(total) + torch.where(x < 1, lost, 0.0)


def _log1p_of_share(x: torch.Tensor) -> torch.Tensor:
    """The same for values from 0 to 1, by `log1p(x) = 2 artanh(x / (x + 2))`: many times as fast as
    OpenVINO's logarithm, which it computes element by element."""
    ratio = x / (x + 2)
    square = ratio * ratio
    series = square * _ARTANH[0]
    for coefficient in _ARTANH[1:-1]:
        series = (series + coefficient) * square
    return ratio * (series + _ARTANH[-1])


# Of `2 artanh(s) / s` in `s * s` up to 1/9, right to 4e-9.
_ARTANH = (0.28178326, 0.279606047, 0.400249101, 0.666663147, 2.0)


def softplus(x: torch.Tensor, beta: float = 1, threshold: float = 20) -> torch.Tensor:
    if beta == 1 and threshold == 20:  # beyond which what is added to `x` is below its last bit
        return _softplus(x)
    scaled = x * beta
    return torch.where(scaled > threshold, x, _softplus(scaled) / beta)


def _softplus(x: torch.Tensor) -> torch.Tensor:
    # Not `relu`, which makes a number of NaN.
    above = torch.where(x < 0, 0.0, x)
    return above + _log1p_of_share(torch.exp(-x.abs()))


def log_sigmoid(x: torch.Tensor) -> torch.Tensor:
    return -_softplus(-x)


def expm1(x: torch.Tensor) -> torch.Tensor:
    """By the tangent, which is exact next to 0."""
    return torch.tanh(x / 2) * (torch.exp(x) + 1)


def _in_float32(function: Function) -> Function:
    """The same of half precision, rounded once, as eager does."""

    def computed(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if x.dtype not in (torch.bfloat16, torch.float16):
            made: torch.Tensor = function(x, *args, **kwargs)
        else:
            made = function(x.to(torch.float32), *args, **kwargs).to(x.dtype)
        return made

    return functools.wraps(function)(computed)


def _of_floats(function: Function) -> Any:
    choose = always(_in_float32(function))
    return lambda node: choose(node) if is_of_floats(node.args[0]) else None


def _log1p(node: Node) -> Function | None:
    function: Function | None = _of_floats(log1p)(node)
    if function is not None and name_of(node.args[0]) in EXPONENTIALS:  # type: ignore[arg-type]
        node.args = (_apart(node, node.args[0]), *node.args[1:])
    return function


def _log(node: Node) -> None:
    """Of a sum with an exponential, such as OpenVINO makes a SoftPlus of, which is finite where
    eager's overflows."""
    total: Any = node.args[0]
    if not isinstance(total, Node) or name_of(total) not in _SUMS:
        return
    if name_of(total) == "add" or all(len(x.users) == 1 for x in total.all_input_nodes):
        total.args = tuple(_apart(total, x) for x in total.args)


def _apart(node: Node, x: Any) -> Any:
    """An exponential that `node` takes, with an absolute value in between, which is the same."""
    if not isinstance(x, Node) or name_of(x) not in EXPONENTIALS:
        return x
    with node.graph.inserting_before(node):
        made = node.graph.call_function(torch.abs, (x,))
    made.meta = {"example_value": value_of(x)}
    return made


EXPONENTIALS = frozenset({"exp", "exp_"})
_SUMS = frozenset({"add", "iadd", "add_"})
_LOGARITHMS = (torch.log, "log", "log_", torch.log2, "log2", torch.log10, "log10")
_ROUNDS = "rounds small values away"

TABLE = (
    Rewrite((F.softplus,), _of_floats(softplus), "is off by 4e-6, and ignores beta and threshold"),
    Rewrite((F.logsigmoid,), _of_floats(log_sigmoid), "is off by 4e-6, and -inf from -88 down"),
    Rewrite((torch.log1p, torch.special.log1p, "log1p"), _log1p, _ROUNDS),
    Rewrite(("log1p_",), _of_floats(in_place(log1p)), _ROUNDS),
    Rewrite((torch.expm1, torch.special.expm1, "expm1"), _of_floats(expm1), _ROUNDS),
    Rewrite(("expm1_",), _of_floats(in_place(expm1)), _ROUNDS),
    Rewrite(_LOGARITHMS, _log, "becomes a SoftPlus, of 1 and an exponential"),
)
