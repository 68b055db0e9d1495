"""Scaled dot product attention."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Node

from ovshim.capture.rewrites.entry import Function, Rewrite, argument, dtype_of, tensor_of

__all__ = ["TABLE"]


def sees(mask: torch.Tensor) -> torch.Tensor:
    """Which rows of a mask see anything, as booleans of shape [..., rows, 1]."""
    seen = mask if mask.dtype is torch.bool else mask > -math.inf
    return seen.any(-1, keepdim=True)


def opened(mask: torch.Tensor, seen: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The mask to be added to scores of this dtype, with rows that see nothing made to see
    everything."""
    if mask.dtype is torch.bool:
        # OpenVINO takes booleans as well, but where it keeps keys and values it is slow at them: a
        # prompt of 900 tokens took it three times as long (2026.4).
        return torch.where(mask | ~seen, 0.0, torch.finfo(dtype).min).to(dtype)
    return torch.where(seen, mask, torch.zeros((), dtype=mask.dtype))


def blanked(attended: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """The attention's output, with zeros where a row saw nothing."""
    return attended * seen


def blanked_across(attended: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """The same behind `transpose(1, 2)`, which OpenVINO fuses with what is before it."""
    return attended * seen.transpose(1, 2)


def _attention(node: Node) -> Function | None:
    mask = argument(node, 3, "attn_mask")
    if not isinstance(mask, Node):
        return None
    graph = node.graph
    with graph.inserting_before(node):
        seen = _once(sees, mask)
        dtype = dtype_of(argument(node, 0, "query")) or torch.float32
        whole = _once(opened, mask, seen, dtype)
    node.replace_input_with(mask, whole)
    after = _transposed(node) if _rank(mask) == 4 else None
    last = after or node
    with graph.inserting_after(last):
        blank = graph.call_function(blanked if after is None else blanked_across, (last, seen))
    blank.meta = dict(last.meta)
    last.replace_all_uses_with(blank, delete_user_cb=lambda user: user is not blank)
    return F.scaled_dot_product_attention


def _once(function: Function, mask: Node, *others: Any) -> Node:
    """One node for all layers that share a mask, unless somebody writes to it in between."""
    users = list(mask.users)
    if not any(str(user.target).endswith("_") or user.target is operator.setitem for user in users):
        for user in users:
            if user.target is function and user.args[1:] == others:
                return user
    made = mask.graph.call_function(function, (mask, *others))
    made.meta = dict(mask.meta)
    return made


def _transposed(node: Node) -> Node | None:
    users = list(node.users)
    if len(users) == 1 and users[0].target == "transpose":
        dims: Any = users[0].args[1:]
        if sorted(dim % 4 for dim in dims) == [1, 2]:
            return users[0]
    return None


def _rank(node: Node) -> int | None:
    tensor = tensor_of(node)
    return None if tensor is None else tensor.dim()


TABLE = (
    Rewrite(
        (F.scaled_dot_product_attention,),
        _attention,
        "a row of the mask that hides everything gives NaN where eager gives zeros",
    ),
)
