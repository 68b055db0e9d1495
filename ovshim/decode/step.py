"""One step of a causal language model as a function of tensors alone, its past among them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

__all__ = ["Form", "Step", "Unfit", "new_cache"]


class Unfit(Exception):
    """A module that cannot be decoded in this way, and why."""


@dataclasses.dataclass(frozen=True)
class Form:
    """What the steps of one module are like.

    Attributes:
        output: the class of its outputs.
        windows: for each layer, its sliding window; None where it sees everything.
        sizes: for each layer, (heads, width) of its keys, then of its values.
        dtype: of keys, values and logits.
        positions, keeps: whether it takes `position_ids` and `logits_to_keep`.
    """

    output: type
    windows: tuple[int | None, ...]
    sizes: tuple[tuple[int, int], ...]
    dtype: torch.dtype
    positions: bool
    keeps: bool

    @property
    def window(self) -> int | None:
        """The smallest sliding window."""
        return min((w for w in self.windows if w is not None), default=None)

    @staticmethod
    def of(module: nn.Module, call: Callable[..., Any], names: tuple[str, ...]) -> Form:
        """What a short call of eager shows.

        Args:
            call: the module's own forward; `names` are its parameters.

        Raises:
            Unfit: it answers with more than logits and a cache of plain or windowed layers.
        """
        output = call(input_ids=torch.zeros((2, 2), dtype=torch.long), use_cache=True)
        found = {k: v for k, v in output.items() if v is not None}
        cache: Any = found.get("past_key_values")
        if set(found) != {"logits", "past_key_values"}:
            raise Unfit(f"its output has {', '.join(sorted(found))}")
        if type(cache) is not DynamicCache or not cache.layers:
            raise Unfit(f"its cache is a {type(cache).__qualname__}")
        tensors = []
        for layer in cache.layers:
            if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
                raise Unfit(f"its cache has a {type(layer).__qualname__}")
            if not layer.is_initialized or layer.keys.dim() != 4 or layer.values.dim() != 4:
                raise Unfit("not all layers of its cache hold keys and values")
            tensors += [layer.keys, layer.values]
        logits = found["logits"]
        if any(t.dtype is not logits.dtype or t.shape[:3:2] != (2, 2) for t in tensors):
            raise Unfit("keys, values and logits differ in dtype or sizes")
        return Form(
            output=type(output),
            windows=tuple(getattr(layer, "sliding_window", None) for layer in cache.layers),
            sizes=tuple((t.shape[1], t.shape[3]) for t in tensors),
            dtype=logits.dtype,
            positions="position_ids" in names,
            keeps="logits_to_keep" in names,
        )


def new_cache(module: nn.Module) -> DynamicCache:
    """An empty cache as the module itself would make it."""
    return DynamicCache(config=module.config)


class _Past(DynamicLayer):  # type: ignore[misc] # transformers is not looked into
    """All of a layer's past. A windowed layer's too: masks go by positions, and what lies outside
    of the window has no weight."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        super().__init__()
        self.keys, self.values = keys, values
        self.dtype, self.device = keys.dtype, keys.device
        self.is_initialized = True


class _WindowedPast(_Past):
    is_sliding = True


class Step(nn.Module):
    """`forward(input_ids, attention_mask, position_ids, keep, *past)`: the logits at the places
    `keep` and the past made longer. [batch, length], [batch, past + length], [batch, length],
    [kept] of int64; keys and values of each layer in turn, [batch, heads, past, width].

    Args:
        run: the module's own forward.
    """

    def __init__(self, module: nn.Module, run: Callable[..., Any], form: Form) -> None:
        super().__init__()
        self.training = False  # not by eval(), which would reach into the module
        self.model = module
        self.run = run
        self.windowed = tuple(window is not None for window in form.windows)
        self.positions = form.positions
        self.keeps = form.keeps

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        keep: torch.Tensor,
        *past: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        layers = [
            (_WindowedPast if windowed else _Past)(past[2 * i], past[2 * i + 1])
            for i, windowed in enumerate(self.windowed)
        ]
        more = {}
        if self.positions:
            more["position_ids"] = position_ids
        if self.keeps:
            more["logits_to_keep"] = keep
        output = self.run(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=Cache(layers=layers),
            use_cache=True,
            **more,
        )
        logits = output.logits if self.keeps else output.logits[:, keep]
        return (logits, *(t for layer in layers for t in (layer.keys, layer.values)))
