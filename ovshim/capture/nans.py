"""NaNs and infinities that arise inside of a graph from finite inputs, and that OpenVINO loses: its
ReLU makes 0 of a NaN, and its maximum the lowest number there is of -inf.

Asked is where they arise, which is seldom, and only if something behind it loses them. About what a
softmax makes of a row that is masked as a whole `masked_rows` asks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx

from ovshim.capture.magnitudes import is_of_floats, name_of
from ovshim.capture.rewrites.entry import argument, dtype_of, tensor_of

__all__ = [
    "LOGARITHMS",
    "carried",
    "chosen",
    "domain",
    "has_no_zero",
    "is_infinite",
    "is_lost",
    "is_not_below",
    "is_number",
    "lost_infinity",
    "may_be_infinite",
    "names",
]


def names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_LOSE = names(
    "relu relu_ relu6 clamp clamp_ clamp_min clamp_max clip hardtanh hardswish hardsigmoid maximum"
    " minimum max min amax amin aminmax argmax argmin sort argsort topk sign sgn softmax threshold"
    " bool lt le gt ge eq ne max_pool1d max_pool2d max_pool3d adaptive_max_pool1d"
    " adaptive_max_pool2d adaptive_max_pool3d normalize logsumexp log_softmax softmin celu celu_"
    " exp exp_ expm1 expm1_ cross_entropy clamp_min_ clamp_max_ clip_ hardtanh_ greater"
    " greater_equal logical_not logical_and logical_or logical_xor all any searchsorted bucketize"
    " scatter_reduce scatter_reduce_ logaddexp kthvalue special_softmax special_log_softmax"
    " special_expm1"
)
_NORMS = names("norm vector_norm linalg_norm linalg_vector_norm")
# They choose what goes on: as often as not, what is a number.
_CHOOSE = frozenset({"where", "masked_fill", "masked_fill_", "nan_to_num", "isnan", "isfinite"})
_DIVIDE = names(
    "div div_ divide divide_ truediv itruediv true_divide true_divide_ mod imod remainder"
    " remainder_ fmod fmod_ floordiv ifloordiv floor_divide floor_divide_ addcdiv addcdiv_"
)
_MULTIPLY = names("mul mul_ imul multiply matmul bmm einsum linear conv1d conv2d conv3d")
# An infinity there becomes NaN inside of them.
_NORMALIZE = names("softmax log_softmax softmin normalize cross_entropy")
_COMPARE = names("eq ne lt le gt ge isinf isnan isfinite")
_NOT_BELOW_ZERO = _NORMS | names("abs square exp sigmoid softmax relu var std softplus relu6")
_KEEP_SIGN = names(
    "mean sum sqrt rsqrt view reshape unsqueeze squeeze expand to float getitem flatten avg_pool1d"
    " avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d pow mul add contiguous"
)
_CARRY = names(
    "view reshape unsqueeze squeeze expand transpose permute flatten contiguous clone to float"
    " getitem add sub mul truediv div neg cat stack iadd isub imul triu tril repeat"
)
_PASS = names(
    "view reshape unsqueeze squeeze expand transpose permute flatten contiguous to float neg"
    " getitem"
)


def _at_least(low: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def fits(x: torch.Tensor) -> torch.Tensor:
        return (x >= low).all()

    return fits


def _within_one(x: torch.Tensor) -> torch.Tensor:
    return (x.abs() <= 1).all()


def has_no_zero(x: torch.Tensor) -> torch.Tensor:
    return (x != 0).all()


def _is_positive(x: torch.Tensor) -> torch.Tensor:
    return (x > 0).all()


def _is_share(x: torch.Tensor) -> torch.Tensor:
    return ((x >= 0) & (x <= 1)).all()


_POWERS = names("pow pow_ ipow")
LOGARITHMS = names("log log_ log2 log2_ log10 log10_")
_RECIPROCALS = names("rsqrt rsqrt_ reciprocal reciprocal_") | _POWERS
_ROOTS = names("sqrt sqrt_ rsqrt rsqrt_") | LOGARITHMS | _POWERS
_ARCS = names("acos asin atanh arccos arcsin arctanh erfinv erfinv_ special_erfinv")
_DOMAINS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    **dict.fromkeys(_ROOTS, _at_least(0)),
    **dict.fromkeys(("log1p", "log1p_", "special_log1p"), _at_least(-1)),
    "acosh": _at_least(1),
    **dict.fromkeys(_ARCS, _within_one),
    **dict.fromkeys(("logit", "logit_", "special_logit"), _is_share),
}
_UNBOUNDED = (_within_one, _is_share, _DOMAINS["acosh"])


def domain(node: fx.Node) -> tuple[Any, ...] | None:
    """A function that tells inside the graph whether `node` gives numbers, and what to give it."""
    name = name_of(node)
    if not is_of_floats(node):
        return None
    if name in _DIVIDE:
        divisor = _doubtful_divisor(node)
        return None if divisor is None or not is_lost(node) else (has_no_zero, divisor)
    x = argument(node, 0, "input")
    if not isinstance(x, fx.Node):
        return None
    return _of_infinities(node, name, x) or _of_numbers(node, name, x)


def _doubtful_divisor(node: fx.Node) -> fx.Node | None:
    """What a division divides by, where that is a tensor that may hold 0."""
    of_three = name_of(node).startswith("addcdiv")
    divisor = argument(node, 2, "tensor2") if of_three else argument(node, 1, "other")
    return None if tensor_of(divisor) is None or _is_above(divisor) else divisor


def _of_infinities(node: fx.Node, name: str, x: fx.Node) -> tuple[Any, ...] | None:
    """The same where 0 gives an infinity, which times 0 is NaN."""
    power = argument(node, 1, "exponent") if name in _POWERS else -0.5
    if name in LOGARITHMS:
        asked = any(is_lost(user) for user in _multiplications(node))
    else:
        below = isinstance(power, (int, float)) and power < 0
        asked = name in _RECIPROCALS and below and _makes_nan(node)
    if not asked or _is_above(x):
        return None
    whole = name.startswith("reciprocal") or _is_whole(power)
    return (has_no_zero if whole else _is_positive), x


def _of_numbers(node: fx.Node, name: str, x: fx.Node) -> tuple[Any, ...] | None:
    if name not in _DOMAINS:
        return None
    if name in _POWERS and _is_whole(argument(node, 1, "exponent")):
        return None
    if "logit" in name and argument(node, 1, "eps") is not None:
        return None
    fits = _DOMAINS[name]
    safe = fits not in _UNBOUNDED and is_not_below(x)
    return None if safe or not is_lost(node) else (fits, x)


def _makes_nan(node: fx.Node) -> bool:
    """Whether a NaN that an infinity of `node` becomes may be lost; not where infinities are
    replaced in place."""
    if any(name_of(u) in ("masked_fill_", "setitem") and u.args[0] is node for u in node.users):
        return False
    users = [user for user in node.users if name_of(user) not in _CHOOSE | _COMPARE]
    return any(name_of(user) in _NORMALIZE or is_lost(user) for user in users)


def _multiplications(node: fx.Node, depth: int = 8) -> Iterator[fx.Node]:
    """Products of what `node` gives with other tensors. The rest of a sum, which may be a mask's,
    is not followed."""
    for user in node.users if depth else ():
        several = len(user.all_input_nodes) > 1 or user.args[:2] == (node, node)
        if name_of(user) in _MULTIPLY and several:
            yield user
        elif name_of(user) in _PASS or (name_of(user) in _MULTIPLY and not several):
            yield from _multiplications(user, depth - 1)


def chosen(node: fx.Node) -> list[fx.Node]:
    """The results of `torch.where` that may hold a NaN of this division, which is lost behind them;
    to be asked themselves, as most choose something else in its place."""
    if name_of(node) not in _DIVIDE or not is_of_floats(node) or is_lost(node):
        return []
    if _doubtful_divisor(node) is None:
        return []
    return [user for user in _behind(node) if name_of(user) == "where" and is_lost(user)]


def is_number(x: torch.Tensor) -> torch.Tensor:
    return (x == x).all()


def lost_infinity(node: fx.Node) -> tuple[Any, ...] | None:
    """The same of a maximum or minimum over what may be infinite; to be asked of its result."""
    lowest = name_of(node) in ("amax", "max") or "max_pool" in name_of(node)
    if not (lowest or name_of(node) in ("amin", "min")) or not node.args:
        return None
    if not is_of_floats(node):  # of relative positions, which were cast
        return None
    return (_is_finite, node) if may_be_infinite(node.args[0]) else None


def may_be_infinite(x: Any) -> bool:
    """Whether an infinite constant, or a logarithm of 0, may be among these values."""
    return any(map(is_infinite, carried(x, 8)))


def _is_finite(made: Any) -> torch.Tensor:
    values = made if isinstance(made, torch.Tensor) else made[0]
    return (values.abs() < torch.finfo(values.dtype).max).all()


def _is_whole(number: Any) -> bool:
    return isinstance(number, (int, float)) and float(number).is_integer()


def is_lost(node: fx.Node) -> bool:
    """Whether a NaN that `node` gives may come to an operator that makes a number of it."""
    return any(name_of(user) in _LOSE or _is_lost_in(user) for user in _behind(node))


def _behind(node: fx.Node) -> Iterator[fx.Node]:
    """What uses `node`, and what uses that, to where something is chosen."""
    seen, waiting = {node}, [node]
    while waiting:
        for user in waiting.pop().users:
            if user not in seen:
                seen.add(user)
                yield user
                if name_of(user) not in _CHOOSE:
                    waiting.append(user)


def _is_lost_in(user: fx.Node) -> bool:
    """Whether an operator that mostly carries a NaN makes a number of it, for what it is given."""
    name = name_of(user)
    if name in ("to", "type", "type_as"):
        return dtype_of(user) is torch.bool
    power = argument(user, 1, "ord" if "linalg" in name else "p")
    return name in _NORMS and isinstance(power, (int, float)) and math.isinf(power)


def is_not_below(x: Any, depth: int = 8) -> bool:
    """Whether all values are known to be 0 or more."""
    if not isinstance(x, fx.Node):
        return isinstance(x, (int, float)) and x >= 0
    if depth == 0 or not x.args:
        return False
    name, first = name_of(x), x.args[0]
    if name in _NOT_BELOW_ZERO or (name == "pow" and len(x.args) > 1 and x.args[1] == 2):
        return True
    if name in ("clamp", "clamp_min", "clamp_"):
        low = argument(x, 1, "min")
        return isinstance(low, (int, float)) and low >= 0
    if name == "mul" and first is argument(x, 1, "other"):
        return True
    others = x.args[1:2] if name in ("mul", "add") else ()
    return name in _KEEP_SIGN and all(is_not_below(y, depth - 1) for y in (first, *others))


def _is_above(x: fx.Node) -> bool:
    """Whether all values are known to be above 0: limited from below, or not below 0 and more."""
    name = name_of(x)
    if name in ("clamp", "clamp_min", "clamp_"):
        low = argument(x, 1, "min")
        return isinstance(low, (int, float)) and low > 0
    if name == "add":
        number = any(isinstance(y, (int, float)) and y > 0 for y in x.args)
        return number and is_not_below(x)
    carries = name in ("sqrt", "expand", "unsqueeze", "view", "reshape", "expand_as")
    if name == "full" and len(x.args) > 1:
        return isinstance(x.args[1], (int, float)) and x.args[1] > 0
    first = argument(x, 0, "input")
    return name == "exp" or (carries and isinstance(first, fx.Node) and _is_above(first))


def carried(x: Any, depth: int) -> Iterator[fx.Node]:
    """What gives its values to `x`."""
    if isinstance(x, fx.Node):
        yield x
        if depth and name_of(x) in _CARRY:
            for given in x.all_input_nodes:
                yield from carried(given, depth - 1)


def is_infinite(node: fx.Node) -> bool:
    """Whether a node puts an infinite constant among other values, or may be a logarithm of 0."""
    if name_of(node) in ("log", "log_", "log2", "log10", "log1p"):
        return True
    if name_of(node) not in ("masked_fill", "masked_fill_", "where", "full", "full_like", "pad"):
        return False
    held = [*node.args, *node.kwargs.values()]
    held += [x for each in held if isinstance(each, fx.Node) for x in each.args]
    return any(isinstance(x, float) and math.isinf(x) for x in held)
