"""Mixtures of experts, in the form of which a graph can be made.

transformers runs the experts that a batch of tokens has chosen, one after the other or sorted into
groups: which operations run, and on how much, depends on values. In a graph every expert sees every
token, and what was not chosen counts for nothing. That is more work, the more the more experts
there are; who is faster is found out by the race.
"""

from __future__ import annotations

import types
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

__all__ = ["experts_of", "made_dense"]


def experts_of(module: nn.Module) -> list[str]:
    """The paths of the submodules that transformers runs as experts."""
    return [
        path
        for path, inner in module.named_modules()
        if all(hasattr(inner, name) for name in ("has_gate", "is_transposed", "_apply_gate"))
    ]


def made_dense(original: Any, paths: list[str]) -> Any:
    """A forward for which a graph can be made, over a copy of the module that shares its tensors.

    Args:
        original: the user's method, as `bound.Original`, whose `resolve()` gives it bound.
    """
    from ovshim.background import apart

    copied = apart(original)
    if copied is None:
        return original.resolve()
    for path in paths:
        inner = copied.module.get_submodule(path)
        inner.__dict__["forward"] = types.MethodType(_dense, inner)
    return copied.resolve()


def _dense(
    self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """What transformers' own experts answer. [tokens, width], [tokens, chosen] twice."""
    found = torch.zeros_like(hidden_states)
    # One after the other: of one product with all their weights, OpenVINO 2026.4 makes an
    # operation that fails on the first call.
    for number in range(self.down_proj.shape[0]):
        name = "gate_up_proj" if self.has_gate else "up_proj"
        one = _linear(self, name, number, hidden_states)
        one = self._apply_gate(one) if self.has_gate else self.act_fn(one)
        one = _linear(self, "down_proj", number, one)
        if self.has_post_expert_norm:
            one = self.post_expert_norm(one)
        chosen = (top_k_index == number).to(top_k_weights.dtype)
        found = found + (one * (chosen * top_k_weights).sum(-1, keepdim=True)).to(found.dtype)
    return found


def _linear(self: Any, name: str, number: int, x: torch.Tensor) -> torch.Tensor:
    weight = getattr(self, name)[number]
    bias = getattr(self, f"{name}_bias")[number] if self.has_bias else None
    return F.linear(x, weight.t() if self.is_transposed else weight, bias)
