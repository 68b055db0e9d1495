"""Attention under a mask, so that rows in which everything is masked come out as in torch.

torch answers 0 for such a row, OpenVINO's kernel NaN, which then spreads to every token. Replaced,
until OpenVINO does as torch (found in 2026.4): the mask becomes an additive one whose minimum is
finite, which the kernel takes well, and the rows are set to 0 afterwards.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

__all__ = ["apply"]


def apply(module: fx.GraphModule) -> None:
    """Replace masked attention in a captured graph, in place."""
    for node in module.graph.nodes:
        if node.target in (
            F.scaled_dot_product_attention,
            torch._C._nn.scaled_dot_product_attention,
        ):
            mask = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
            if mask is not None:
                node.target = masked_attention
    module.recompile()


def masked_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor,
    *args: Any,
    **kwargs: Any,
) -> torch.Tensor:
    """`scaled_dot_product_attention` with a mask, boolean or additive, that may mask whole rows."""
    lowest = torch.finfo(query.dtype).min
    if attn_mask.dtype is torch.bool:
        seen = attn_mask.any(-1, keepdim=True)
        added = torch.where(attn_mask, 0.0, lowest).to(query.dtype)
    else:
        seen = (attn_mask > lowest).any(-1, keepdim=True)
        added = torch.clamp(attn_mask, min=lowest)
    attended = F.scaled_dot_product_attention(query, key, value, added, *args, **kwargs)
    # Not a product with the rows' flags: what a kernel made of a masked row may be a NaN.
    return torch.where(seen, attended, 0.0)
