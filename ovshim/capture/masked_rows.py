"""Rows of attention that are masked as a whole, asked about inside the graph.

A softmax over nothing but -inf is NaN. OpenVINO makes a number of it again in the next ReLU; and
torch itself does not agree with itself: `nn.MultiheadAttention` gives NaN on its fast way and zeros
on the other, and which it takes, grad mode decides. So such rows go to eager.

Asked are the masks, which are small, and not the scores: another user of those would keep OpenVINO
from fusing attention. Not asked is `F.scaled_dot_product_attention` by itself, which gives zeros in
both (`rewrites.attention`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from ovshim.capture.magnitudes import is_of_floats, name_of
from ovshim.capture.nans import carried, is_lost, may_be_infinite
from ovshim.capture.rewrites.entry import argument, tensor_of

__all__ = ["question"]

_CHANGE_NO_ROW = frozenset({"to", "float", "contiguous", "clone", "mul", "imul", "truediv", "div"})
_ADD = frozenset({"add", "add_", "iadd", "baddbmm"})
# Where the mask stands among the arguments.
_FUSED = {"_transformer_encoder_layer_fwd": 18, "_native_multi_head_attention": 9}
_KEYS_AT, _MASK_AT = 14, 16

# A mask, and what hides in it: True, or False.
_Mask = tuple[Any, bool]


def question(node: fx.Node, owns: Callable[[fx.Node], bool]) -> tuple[Any, ...] | None:
    """A function that tells inside the graph whether each row of `node` sees something, and what to
    give it; None where there is nothing to ask.

    Args:
        owns: whether a placeholder is a tensor of the module's.
    """
    name = name_of(node)
    if node.target is F.multi_head_attention_forward:
        keys = argument(node, _KEYS_AT, "key_padding_mask")
        mask = argument(node, _MASK_AT, "attn_mask")
        held = [m for m in (keys, mask) if tensor_of(m) is not None]
        return (_sees_of_both, keys, mask) if len(held) == 2 else _alone(*held)
    if name in _FUSED:
        return _alone(argument(node, _FUSED[name], "mask"))
    if name not in ("softmax", "log_softmax"):
        return None
    scores, dim = argument(node, 0, "input"), argument(node, 1, "dim")
    shape = tensor_of(scores)
    if shape is None or not isinstance(dim, int) or not is_lost(node):
        return None
    dim = dim if dim < 0 else dim - shape.dim()
    masks, rest = _masks_of(scores)
    if may_be_infinite(rest):  # by way of other operators than these
        return _sees_anything, scores, dim
    if all(_is_held(mask, owns) for mask, _ in masks):  # what is the same in each call hides no row
        return None
    return _sees, dim, *(item for mask in masks for item in mask)


def _alone(*masks: Any) -> tuple[Any, ...] | None:
    known = [mask for mask in masks if tensor_of(mask) is not None]
    return (_sees, -1, known[0], True) if known else None


def _masks_of(scores: Any) -> tuple[list[_Mask], Any]:
    """The masks that have come to some scores, and what they have come to; that is None where all
    of it are masks."""
    found: list[_Mask] = []
    while isinstance(scores, fx.Node) and scores.args:
        put = _put_on(scores)
        if put is None or any(tensor_of(mask) is None for mask, _ in put[0]):
            break
        found, scores = found + put[0], put[1]
    return found, scores


def _put_on(scores: fx.Node) -> tuple[list[_Mask], Any] | None:
    """The masks that an operator puts on something, and this; None of other operators."""
    name, args = name_of(scores), scores.args
    if name in ("masked_fill", "masked_fill_") and len(args) > 2:
        return [(args[1], True)] if _is_lowest(args[2]) else [], args[0]
    if name == "where" and len(args) == 3 and (_is_lowest(args[1]) or _is_lowest(args[2])):
        hides = _is_lowest(args[1])
        return [(args[0], hides)], args[2] if hides else args[1]
    if name in _ADD and len(args) > 1:
        terms = args[:1] if name == "baddbmm" else args[:2]
        masks = [x for x in terms if may_be_infinite(x) or _given(x)]
        others = [x for x in args[:2] if x not in masks]
        return ([(x, True) for x in masks], (*others, None)[0]) if len(others) < 2 else None
    return ([], args[0]) if name in _CHANGE_NO_ROW else None


def _given(mask: Any) -> list[fx.Node]:
    """The tensors, not made in the graph, of which it is a view or a sum."""
    nodes = [x for x in carried(mask, 4) if x.op in ("placeholder", "get_attr")]
    return nodes if all(map(is_of_floats, nodes)) else []


def _is_held(mask: fx.Node, owns: Callable[[fx.Node], bool]) -> bool:
    """Whether it is but what the module holds."""
    known = [x.op == "get_attr" or owns(x) for x in _given(mask)]
    return bool(known) and all(known) and not may_be_infinite(mask)


def _is_lowest(value: Any) -> bool:
    """Whether it is -inf, as a number or as a tensor of one."""
    if isinstance(value, fx.Node):
        return any(isinstance(x, float) and x == -math.inf for x in value.args)
    return isinstance(value, float) and value == -math.inf


# --- inside the graph -----------------------------------------------------------------------------


def _hidden(mask: torch.Tensor, hides: bool = True) -> torch.Tensor:
    if mask.dtype is not torch.bool:
        return mask == -math.inf
    return mask if hides else torch.logical_not(mask)


def _sees(dim: int, *masks: Any) -> torch.Tensor:
    """Whether no row along `dim`, counted from the end, is hidden by these masks together."""
    hidden = _hidden(masks[0], masks[1])
    for mask, hides in zip(masks[2::2], masks[3::2], strict=True):
        hidden = hidden | _hidden(mask, hides)
    whole = hidden.all(dim) if hidden.dim() >= -dim else hidden
    return torch.logical_not(whole.any())


def _sees_anything(scores: torch.Tensor, dim: int) -> torch.Tensor:
    """Whether no row of these scores is hidden."""
    # OpenVINO's maximum of -inf alone is the lowest number there is.
    return (scores.amax(dim) > torch.finfo(scores.dtype).min).all()


def _sees_of_both(keys: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The same of a mask of keys, (batch, keys) or (keys), and one of (queries, keys), which may be
    of each head of each batch, as `nn.MultiheadAttention` takes them."""
    keys, mask = _hidden(keys), _hidden(mask)
    if keys.dim() == 2:
        keys = keys[:, None, None, :]
    if mask.dim() == 3 and keys.dim() == 4:
        mask = mask.reshape(keys.shape[0], -1, mask.shape[-2], mask.shape[-1])
    return torch.logical_not((keys | mask).all(-1).any())
