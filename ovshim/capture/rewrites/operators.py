"""Operators that OpenVINO computes otherwise than eager: arguments that it ignores, types, ties,
edges, what is in place."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols, statically_known_true

from ovshim.capture import CaptureError
from ovshim.capture.rewrites.entry import (
    Function,
    Rewrite,
    always,
    argument,
    dtype_of,
    of_floats,
    tensor_of,
    value_of,
)
from ovshim.reasons import reason

__all__ = ["TABLE"]

_INDICES = (torch.int64, torch.int32)


# --- functions of one value -------------------------------------------------------------------


def rounded(x: torch.Tensor, *, decimals: int = 0) -> torch.Tensor:
    scale = float(10 ** abs(decimals))
    if decimals < 0:
        return torch.round(x / scale) * scale
    return torch.round(x * scale) / scale


def _round(node: Node) -> Function | None:
    floats = tensor_of(node)
    usual = not node.kwargs.get("decimals") or floats is None or "out" in node.kwargs
    return None if usual or not floats.dtype.is_floating_point else rounded  # type: ignore[union-attr]


def angle(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """`torch.atan2`: of -0 the lower end of the circle."""
    usual = torch.atan2(y, x)
    return torch.where((y == 0) & (y.reciprocal() < 0) & (x < 0), -usual.abs(), usual)


# --- reductions -------------------------------------------------------------------------------


def mean(
    x: torch.Tensor, dim: Any = None, keepdim: bool = False, *, dtype: Any = None
) -> torch.Tensor:
    """The mean as a quotient, which is NaN for no elements."""
    dims = range(x.dim()) if dim is None else [dim] if isinstance(dim, int) else dim
    count: Any = 1
    for each in dims:
        count = count * x.shape[each]
    total: torch.Tensor = x.sum(list(dims), keepdim=keepdim, dtype=dtype)
    made: torch.Tensor = total / count
    return made


def _mean(node: Node) -> Function | None:
    """Only where nothing may be left to average: a selection by values, or a slice as long as
    something that sizes leave over."""
    tensor, dim = tensor_of(node.args[0]), argument(node, 1, "dim")
    if tensor is None or "out" in node.kwargs:
        return None
    dims = range(tensor.dim()) if dim is None else [dim] if isinstance(dim, int) else dim
    sizes = [tensor.shape[each] for each in dims]
    return mean if any(_may_vanish(size) for size in sizes) else None


def _may_vanish(size: Any) -> bool:
    if not isinstance(size, torch.SymInt):
        return bool(size == 0)
    plain = size.node.expr.is_Symbol and not free_unbacked_symbols(size)
    return not plain and not statically_known_true(size > 0)


def _average_pool(dims: int) -> Any:
    pool = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[dims - 1]

    def pooled(
        x: torch.Tensor,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        ceil_mode: bool = True,
        count_include_pad: bool = True,
        divisor_override: None = None,
    ) -> torch.Tensor:
        """Of the padded input, cut to the size of the other: windows that begin in the padding at
        the far end are left out, and those that reach beyond it count less."""
        padded = F.pad(x, [pad for pad in reversed(_each(padding, dims)) for _ in range(2)])
        whole = pool(padded, kernel_size, stride, 0, True, False)
        like = pool(x, kernel_size, stride, padding, True, False)
        for dim in range(-dims, 0):
            whole = whole.narrow(dim, 0, like.shape[dim])
        return whole

    def choose(node: Node) -> Function | None:
        names = ("stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")
        defaults = (None, 0, False, True, None)
        found = [
            argument(node, 2 + i, name, default)
            for i, (name, default) in enumerate(zip(names, defaults, strict=True))
        ]
        stride, padding, ceil, include, divisor = found
        if not ceil or divisor is not None:
            return None
        if any(_each(padding, dims)):
            return pooled if include else None
        windows = argument(node, 1, "kernel_size")
        # Other steps leave no window at all of some sizes: eager raises.
        if stride and _each(stride, dims) != _each(windows, dims):
            return None
        covered = _covered(node, _each(windows, dims))
        return _spanning(pool, covered) if any(covered) else None

    return choose


def _spanning(pool: Function, covered: Sequence[bool]) -> Function:
    """A pool with windows that are cut to the input: where one covers a dimension, the mean."""
    whole = [dim for dim, all_of_it in enumerate(covered, -len(covered)) if all_of_it]

    def spanned(x: torch.Tensor, kernel_size: Any, *_: Any, **__: Any) -> torch.Tensor:
        sizes = _each(kernel_size, len(covered))
        left = [1 if covers else size for covers, size in zip(covered, sizes, strict=True)]
        x = x.mean(whole, keepdim=True)
        made: torch.Tensor = x if all(covered) else pool(x, left, left, 0, True)
        return made

    return spanned


def _each(given: Any, dims: int) -> list[Any]:
    """An argument of a pool for each of its dimensions."""
    return (
        list(given) * (dims // len(given)) if isinstance(given, (tuple, list)) else [given] * dims
    )


def _covered(node: Node, windows: Sequence[Any]) -> list[bool]:
    """Of which dimensions a window takes more than there is; by a guard where sizes may change."""
    tensor = tensor_of(node.args[0])
    if tensor is None:
        return [False] * len(windows)
    sizes = tensor.shape[-len(windows) :]
    return [
        not free_unbacked_symbols(size) and bool(size < window)
        for size, window in zip(sizes, map(value_of, windows), strict=True)
    ]


# --- indices ----------------------------------------------------------------------------------


def from_start(index: torch.Tensor, table: torch.Tensor, dim: int) -> torch.Tensor:
    """Indices from the end counted from the start; those out of range stay so."""
    size = table.shape[dim]
    return torch.where((index < 0) & (index >= -size), index + size, index)


def _subscript(node: Node) -> None:
    """Several index tensors together: OpenVINO takes negative ones for the first element."""
    table, key = node.args[:2]
    fake = tensor_of(table)
    if fake is None or not isinstance(key, tuple):
        return
    places = _index_places(fake, key)
    if len(places) < 2:
        return
    changed = list(key)
    for place, dim in places:
        index: Any = key[place]
        if index.target is not torch.arange:
            with node.graph.inserting_before(node):
                changed[place] = node.graph.call_function(from_start, (index, table, dim))
            changed[place].meta = dict(index.meta)
    node.args = (table, tuple(changed), *node.args[2:])


def _index_places(table: torch.Tensor, key: tuple[Any, ...]) -> list[tuple[int, int]]:
    """(place in the subscript, dimension) of each tensor of integers in it."""
    places = []
    dim = 0
    for place, item in enumerate(key):
        if item is Ellipsis:
            dim = table.dim() - sum(_dims_taken(other) for other in key[place + 1 :])
            continue
        if dtype_of(item) in _INDICES:
            places.append((place, dim))
        dim += _dims_taken(item)
    return places


def _dims_taken(item: Any) -> int:
    if item is None or item is Ellipsis:
        return 0
    tensor = tensor_of(item)
    return tensor.dim() if tensor is not None and tensor.dtype is torch.bool else 1


# --- in place ---------------------------------------------------------------------------------


def _written(name: str) -> Rewrite:
    def written(into: torch.Tensor, *args: Any) -> torch.Tensor:
        return into.copy_(getattr(torch, name)(into, *args))

    return Rewrite((f"{name}_",), always(written), "changes the type of what it writes to")


def _constant(node: Node) -> None:
    """The tracer runs what is written to a constant, and records it: it would happen twice."""
    if any(str(user.target).endswith("_") or user.target in _WRITE for user in node.users):
        with node.graph.inserting_after(node):
            copy = node.graph.call_method("clone", (node,))
        copy.meta = dict(node.meta)
        node.replace_all_uses_with(copy, delete_user_cb=lambda user: user is not copy)


_WRITE = (operator.setitem, operator.iadd, operator.isub, operator.imul, operator.itruediv)


# --- sizes of outputs -------------------------------------------------------------------------


def _interpolation(node: Node) -> None:
    """OpenVINO reads the first element where one is left of a dimension, eager the middle."""
    mode = argument(node, 3, "mode", "nearest")
    made, given = tensor_of(node), tensor_of(node.args[0])
    if made is None or given is None or mode in ("nearest", "area", "nearest-exact"):
        return
    if argument(node, 4, "align_corners"):
        return
    for size, before in zip(made.shape[2:], given.shape[2:], strict=True):
        if not statically_known_true(before == 1) and not bool(size > 1):
            raise CaptureError(reason("unsupported-op", f"interpolate to a size of 1 ({mode})"))


def rows_asked(x: torch.Tensor, dim: int, index: torch.Tensor) -> torch.Tensor:
    """What `torch.gather(x, dim, index)` can take of `x`: as many rows as there are of indices.

    Not as slices: OpenVINO drops those in front of a gather as needless, and refuses it then."""
    for d, n in enumerate(index.shape):
        if d != dim % x.dim():
            x = x.index_select(d, torch.arange(n))
    return x


def _gather(node: Node) -> None:
    """OpenVINO takes table and indices for equally many rows, and reads elsewhere where they are
    not. The gather itself stays: its indices are looked at later on."""
    x: Any = node.args[0]
    index = argument(node, 2, "index")
    dim, table, asked = argument(node, 1, "dim"), tensor_of(x), tensor_of(index)
    if table is None or asked is None or table.dim() == 0 or not isinstance(dim, int):
        return
    sizes = enumerate(zip(table.shape, asked.shape, strict=True))
    others = [pair for d, pair in sizes if d != dim % table.dim()]
    if not all(statically_known_true(mine == other) for mine, other in others):
        with node.graph.inserting_before(node):
            rows = node.graph.call_function(rows_asked, (x, dim, index))
        rows.meta = dict(x.meta)
        node.args = (rows, *node.args[1:])


def _negative_base(node: Node) -> Function | None:
    """The code of an FX graph reads `-2.0 ** x`, which is another number."""
    base = node.args[0]
    return torch.pow if isinstance(base, (int, float)) and base < 0 else None


_COMPARISONS = ("lt", "le", "gt", "ge", "eq", "ne", "less", "less_equal", "greater")
_LOGICAL = ("greater_equal", "not_equal", "logical_and", "logical_or", "logical_xor", "logical_not")

TABLE = (
    Rewrite((torch.round, "round"), _round, "ignores the number of decimals"),
    Rewrite(
        (torch.atan2, "atan2", torch.arctan2, "arctan2"),
        of_floats(angle),
        "of -0 beside a negative number is pi, eager's -pi",
    ),
    Rewrite((torch.mean, "mean"), _mean, "of nothing is 0, eager's NaN"),
    *(
        Rewrite(
            (pool,),
            _average_pool(dims),
            "counts padding that a last window does not cover, takes none larger than its input",
        )
        for dims, pool in enumerate((F.avg_pool1d, F.avg_pool2d, F.avg_pool3d), 1)
    ),
    Rewrite((operator.getitem,), _subscript, "takes negative ones of several indices for 0"),
    *(_written(name) for name in (*_COMPARISONS, *_LOGICAL)),
    Rewrite((torch.tensor, torch._refs.tensor), _constant, "is written to while it is traced"),
    Rewrite((torch.gather, "gather"), _gather, "reads elsewhere where there are fewer indices"),
    Rewrite((operator.pow,), _negative_base, "FX writes a negative base without parentheses"),
    Rewrite((F.interpolate,), _interpolation, "to a size of 1 takes the first element"),
)
