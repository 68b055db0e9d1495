"""Padding in bags of embeddings, which OpenVINO adds like everything else."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Node

from ovshim.capture.rewrites.entry import Function, Rewrite, tensor_of

__all__ = ["TABLE"]


def weighted(
    ids: torch.Tensor, table: torch.Tensor, padding: int, weights: torch.Tensor | None
) -> torch.Tensor:
    """What each id weighs in its bag: padding nothing."""
    given = torch.ones((), dtype=table.dtype) if weights is None else weights
    return torch.where(ids == padding, torch.zeros((), dtype=table.dtype), given)


def averaged(
    total: torch.Tensor, weights: torch.Tensor, offsets: torch.Tensor | None
) -> torch.Tensor:
    """The mean of bags, from their sums. One of padding alone is 0, as is an empty one."""
    counted = weights.to(torch.float32)
    if offsets is None:
        count = counted.sum(1, keepdim=True)
    else:
        # A bag of numbers that are their own table.
        places = torch.arange(weights.shape[0])
        count = F.embedding_bag(places, counted[:, None], offsets, mode="sum")
    return total / count.clamp(min=1).to(total.dtype)


def _bag(node: Node) -> Function | None:
    """The bag itself stays: its indices are looked at later on."""
    bound = inspect.signature(F.embedding_bag).bind(*node.args, **node.kwargs)
    bound.apply_defaults()
    given: dict[str, Any] = bound.arguments
    table, padding, mode = tensor_of(given["weight"]), given["padding_idx"], given["mode"]
    if table is None or padding is None or mode == "max" or given["include_last_offset"]:
        return None  # of the last two OpenVINO refuses either
    graph = node.graph
    ids, weights = given["input"], given["per_sample_weights"]
    with graph.inserting_before(node):
        asked = (ids, given["weight"], padding % int(table.shape[0]), weights)
        kept = graph.call_function(weighted, asked)
    given |= {"mode": "sum", "per_sample_weights": kept, "padding_idx": None}
    node.args, node.kwargs = tuple(given.values()), {}
    if mode == "mean":
        with graph.inserting_after(node):
            mean = graph.call_function(averaged, (node, kept, given["offsets"]))
        mean.meta = dict(node.meta)
        node.replace_all_uses_with(mean, delete_user_cb=lambda user: user is not mean)
    return F.embedding_bag


TABLE = (Rewrite((F.embedding_bag,), _bag, "counts padding like everything else"),)
