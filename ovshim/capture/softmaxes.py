"""Softmaxes written by hand, `exp(x) / exp(x).sum(-1, keepdim=True)`, asked about inside the graph.

OpenVINO makes a softmax of its own of them, which does not overflow: where eager divides by 0 or
infinity, it gives other numbers. Where the sums are finite and not 0, both are the same. The usual
form, of what the maximum was subtracted from, is not asked about.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from ovshim.capture.magnitudes import is_of_floats, name_of
from ovshim.capture.rewrites.entry import argument, tensor_of
from ovshim.capture.rewrites.exponentials import EXPONENTIALS

__all__ = ["DIVIDE", "MAXIMA", "SUBTRACT", "question"]

DIVIDE = frozenset({"div", "div_", "divide", "truediv", "itruediv", "true_divide"})
_MULTIPLY = frozenset({"mul", "mul_", "imul", "multiply"})
_INVERT = frozenset({"reciprocal", "pow"})
SUBTRACT = frozenset({"sub", "sub_", "isub", "subtract"})
MAXIMA = frozenset({"max", "amax", "logsumexp"})
_PASS = frozenset(
    {"getitem", "getattr", "unsqueeze", "view", "reshape", "expand", "expand_as", "detach"}
)


def question(node: fx.Node) -> tuple[Any, ...] | None:
    """A function that tells inside the graph whether `node` divides exponentials by sums of the
    same that are finite and not 0, and what to give it; None where there is nothing to ask."""
    name = name_of(node)
    if name not in DIVIDE | _MULTIPLY or not is_of_floats(node):
        return None
    pair = argument(node, 0, "input"), argument(node, 1, "other")
    for above, below in (pair, pair[::-1]) if name in _MULTIPLY else (pair,):
        scores = _exponent(above)
        total = next((x for x in _sources(below) if name_of(x) == "sum"), None)
        if scores is None or total is None:
            continue
        if not _is_same(_exponent(argument(total, 0, "input")), scores):
            continue
        dim = argument(total, 1, "dim")
        if not isinstance(dim, fx.Node) and not _is_limited(scores, dim):
            return _has_sums, scores, dim
    return None


def _exponent(x: Any) -> fx.Node | None:
    """What `x` is the exponential of."""
    of = argument(x, 0, "input") if isinstance(x, fx.Node) and name_of(x) in EXPONENTIALS else None
    return of if isinstance(of, fx.Node) else None


def _is_same(x: Any, other: Any, depth: int = 8) -> bool:
    """Whether both are one expression, be it written twice: OpenVINO computes it once."""
    if not isinstance(x, fx.Node) or not isinstance(other, fx.Node):
        return type(x) is type(other) and x == other
    if x is other:
        return True
    if depth == 0 or x.op != other.op or x.op == "placeholder" or x.target != other.target:
        return False
    mine, others = ((*n.args, *n.kwargs.values()) for n in (x, other))
    return len(mine) == len(others) and all(
        _is_same(a, b, depth - 1) for a, b in zip(mine, others, strict=True)
    )


def _sources(x: Any) -> Iterator[fx.Node]:
    """`x`, and what it was made of by operators that keep its values or invert them."""
    while isinstance(x, fx.Node):
        yield x
        name = name_of(x)
        one = name in DIVIDE and not isinstance(x.args[0], fx.Node)
        kept = name in _PASS | _INVERT
        x = argument(x, 1, "other") if one else argument(x, 0, "input") if kept else None


def _is_limited(scores: fx.Node, dim: Any) -> bool:
    """Whether the maximum along `dim` was subtracted."""
    if name_of(scores) not in SUBTRACT:
        return False
    sources = _sources(argument(scores, 1, "other"))
    return any(name_of(x) in MAXIMA and _is_along(x, dim) for x in sources)


def _is_along(node: fx.Node, dim: Any) -> bool:
    fake, own = tensor_of(argument(node, 0, "input")), argument(node, 1, "dim")
    if fake is None or isinstance(own, fx.Node) or own is None or dim is None:
        return own is dim
    dims = [{d % fake.dim() for d in ([x] if isinstance(x, int) else x)} for x in (own, dim)]
    return dims[0] == dims[1]


def _has_sums(scores: torch.Tensor, dim: Any) -> torch.Tensor:
    # The absolute value keeps OpenVINO from taking this sum for that of its softmax.
    values = torch.exp(scores).abs()
    total = values.sum() if dim is None else values.sum(dim)
    limits = torch.finfo(scores.dtype)
    return ((total >= limits.tiny) & (total <= limits.max)).all()
