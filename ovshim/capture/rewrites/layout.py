"""Ways to arrange elements that OpenVINO has no counterpart for, made of such as it has."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ovshim.capture.rewrites.entry import Function, Rewrite, always, argument, dtype_of, tensor_of

__all__ = ["TABLE"]


def transposed(x: torch.Tensor, _: str) -> torch.Tensor:
    return x.transpose(-2, -1)


def _attribute(node: Node) -> Function | None:
    """Properties of a tensor that swap its last two dimensions."""
    x, name = tensor_of(node.args[0]), node.args[1]
    conjugates = x is None or x.dtype.is_complex
    return transposed if name == "mT" or (name == "mH" and not conjugates) else None


def fliplr(x: torch.Tensor) -> torch.Tensor:
    return x.flip(1)


def flipud(x: torch.Tensor) -> torch.Tensor:
    return x.flip(0)


def column_stack(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    columns = [x.reshape(-1, 1) if x.dim() < 2 else x for x in tensors]
    return torch.cat(columns, 1)


def select_scatter(x: torch.Tensor, src: torch.Tensor, dim: int, index: int) -> torch.Tensor:
    made = x.clone()
    made[(*_all(dim, x), index)] = src
    return made


def slice_scatter(
    x: torch.Tensor,
    src: torch.Tensor,
    dim: int = 0,
    start: int | None = None,
    end: int | None = None,
    step: int = 1,
) -> torch.Tensor:
    made = x.clone()
    made[(*_all(dim, x), slice(start, end, step))] = src
    return made


def _all(dim: int, x: torch.Tensor) -> tuple[Any, ...]:
    return (slice(None),) * (dim % x.dim())


def diag_embed(x: torch.Tensor) -> torch.Tensor:
    places = torch.arange(x.shape[-1])
    # Not as a product: infinity beside the diagonal would be NaN.
    return torch.where(places[:, None] == places, x.unsqueeze(-1), torch.zeros((), dtype=x.dtype))


def _diag_embed(node: Node) -> Function | None:
    usual = len(node.args) == 1 and not node.kwargs
    return diag_embed if usual else None


def _without_empty(node: Node) -> None:
    """Beside tensors of any rank one of shape (0,) counts for nothing: a cache's start."""
    tensors = argument(node, 0, "tensors")
    if not isinstance(tensors, (list, tuple)) or len({dtype_of(x) for x in (node, *tensors)}) != 1:
        return
    kept = [x for x in tensors if not _is_nothing(tensor_of(x))]
    if 0 < len(kept) < len(tensors):
        given = {name: value for name, value in node.kwargs.items() if name != "tensors"}
        node.args, node.kwargs = (kept, *node.args[1:]), given


def _is_nothing(fake: torch.Tensor | None) -> bool:
    return fake is not None and fake.dim() == 1 and statically_known_true(fake.shape[0] == 0)


def msort(x: torch.Tensor) -> torch.Tensor:
    return x.sort(0)[0]


def unfold(x: torch.Tensor, dimension: int, size: int, step: int) -> torch.Tensor:
    dim = dimension % x.dim()
    starts = torch.arange(0, x.shape[dim] - size + 1, step)
    places = starts[:, None] + torch.arange(size)
    windows = x.index_select(dim, places.reshape(-1))
    return torch.unflatten(windows, dim, (-1, size)).movedim(dim + 1, -1)


def _unfold(node: Node) -> Function | None:
    given = [argument(node, n, name) for n, name in enumerate(("dimension", "size", "step"), 1)]
    x = tensor_of(node.args[0])
    usual = all(isinstance(n, int) for n in given) and min(given[1:], default=0) > 0
    return unfold if usual and x is not None and x.dim() > 0 else None


def flat(x: torch.Tensor) -> torch.Tensor:
    return x.flatten()


def _take(node: Node) -> Function | None:
    """A subscript of the flat tensor: it is looked at there whether it is in range."""
    x: Any = node.args[0]
    fake = tensor_of(x)
    index = argument(node, 1, "index")
    if fake is None or "out" in node.kwargs:
        return None
    with node.graph.inserting_before(node):
        made = node.graph.call_function(flat, (x,))
    made.meta = dict(node.meta) | {"example_value": fake.flatten()}
    node.args, node.kwargs = (made, index), {}
    return operator.getitem


def _nearest_exact(node: Node) -> None:
    """Where each element is repeated a whole number of times, both kinds of nearest are one."""
    made, given = tensor_of(node), tensor_of(node.args[0])
    if made is None or given is None or argument(node, 3, "mode") != "nearest-exact":
        return
    pairs = zip(made.shape[2:], given.shape[2:], strict=True)
    if all(statically_known_true(after % before == 0) for after, before in pairs):
        if len(node.args) > 3:
            node.args = (*node.args[:3], "nearest", *node.args[4:])
        else:
            node.kwargs = {**node.kwargs, "mode": "nearest"}


def pad_around(x: torch.Tensor, pad: Sequence[int], *_: Any) -> torch.Tensor:
    """Circular padding, from the last dimension on; less than nothing cuts off."""
    made = x
    for n, (before, after) in enumerate(zip(pad[::2], pad[1::2], strict=True)):
        dim = x.dim() - 1 - n
        made = made[(*_all(dim, x), slice(max(0, -before), min(0, after) or None))]
        parts = [made]
        if before > 0:
            parts.insert(0, made[(*_all(dim, x), slice(-before, None))])
        if after > 0:
            parts.append(made[(*_all(dim, x), slice(None, after))])
        made = torch.cat(parts, dim) if len(parts) > 1 else made
    return made


def _circular(node: Node) -> Function | None:
    pad: Any = argument(node, 1, "pad")
    plain = isinstance(pad, (tuple, list)) and all(isinstance(size, int) for size in pad)
    return pad_around if plain and argument(node, 2, "mode") == "circular" else None


_NONE = "has no counterpart"
_BY_VALUES = "takes no mask that is larger, and fails where there are too few values"


def masked_scatter(x: torch.Tensor, mask: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    whole = torch.logical_or(mask, torch.zeros_like(x, dtype=torch.bool))
    place = torch.cumsum(whole.reshape(-1).to(torch.int32), 0, dtype=torch.int32) - 1
    values = source.reshape(-1)
    # Where there are fewer values than places, the call goes to eager (`domains`).
    taken = values[place.clamp(min=0).clamp(max=values.shape[0] - 1)]
    return torch.where(whole, taken.reshape(whole.shape), x)


def _masked_scatter(node: Node) -> Function | None:
    source = tensor_of(argument(node, 2, "source"))
    some = source is not None and statically_known_true(source.numel() > 0)
    return masked_scatter if some else None


TABLE = (
    Rewrite((getattr,), _attribute, _NONE),
    Rewrite((torch.fliplr, "fliplr"), always(fliplr), _NONE),
    Rewrite((torch.flipud, "flipud"), always(flipud), _NONE),
    Rewrite((torch.cat,), _without_empty, "concatenates what is of one rank"),
    Rewrite((torch.column_stack,), always(column_stack), _NONE),
    Rewrite((torch.select_scatter, "select_scatter"), always(select_scatter), _NONE),
    Rewrite((torch.slice_scatter, "slice_scatter"), always(slice_scatter), _NONE),
    Rewrite((torch.diag_embed, "diag_embed"), _diag_embed, _NONE),
    Rewrite((torch.msort, "msort"), always(msort), _NONE),
    Rewrite((torch.take, "take"), _take, _NONE),
    Rewrite(("unfold",), _unfold, _NONE),
    Rewrite((torch.masked_scatter, "masked_scatter"), _masked_scatter, _BY_VALUES),
    # By way of ONNX, torch's exporter damages memory where there is no batch.
    Rewrite((torch._C._nn.pad,), _circular, "has no counterpart for circular"),
    Rewrite((F.interpolate,), _nearest_exact, "has no counterpart for nearest-exact"),
)
