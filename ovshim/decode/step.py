"""One step of a causal language model as a function of tensors alone, its past among them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    EncoderDecoderCache,
)

from ovshim.matcher import model_output_maker

__all__ = ["Form", "Past", "Step", "Unfit"]


class Unfit(Exception):
    """A module that cannot be decoded in this way, and why."""


@dataclasses.dataclass(frozen=True)
class Form:
    """What the steps of one module are like.

    Attributes:
        make_output: makes an object of the class of its outputs of the fields that are not None.
        windows: for each layer, its sliding window; None where it sees everything.
        sizes: for each layer, (heads, width) of its keys, then of its values.
        dtype: of keys, values and logits.
        positions, keeps: whether it takes `position_ids` and `logits_to_keep`.
        cross: as `sizes`, of the cross-attention of an encoder-decoder model.
        width: of its encoder's output.
    """

    make_output: Callable[[dict[str, Any]], Any]
    windows: tuple[int | None, ...]
    sizes: tuple[tuple[int, int], ...]
    dtype: torch.dtype
    positions: bool = False
    keeps: bool = False
    cross: tuple[tuple[int, int], ...] = ()
    width: int = 0

    @property
    def window(self) -> int | None:
        """The smallest sliding window."""
        return min((w for w in self.windows if w is not None), default=None)

    @property
    def masks(self) -> bool:
        """Whether a step takes a mask over its own past."""
        return not self.cross

    @staticmethod
    def of(call: Callable[..., Any], names: tuple[str, ...]) -> Form:
        """What a short call of eager shows.

        Args:
            call: the module's own forward; `names` are its parameters.

        Raises:
            Unfit: it answers with more than logits and a cache of plain or windowed layers.
        """
        ids, given = torch.zeros((2, 2), dtype=torch.long), {}
        if "attention_mask" in names:
            # transformers warns once in a process of padding without a mask: not on our account.
            given["attention_mask"] = torch.ones_like(ids)
        output = call(input_ids=ids, use_cache=True, **given)
        _check_fields(output, {"logits", "past_key_values"})
        dtype = output.logits.dtype
        return Form(
            make_output=model_output_maker(type(output)),
            windows=_windows(output.past_key_values),
            sizes=_sizes(output.past_key_values, dtype),
            dtype=dtype,
            positions="position_ids" in names,
            keeps="logits_to_keep" in names,
        )

    @staticmethod
    def of_decoder(output: Any, width: int) -> Form:
        """What an answer of an encoder-decoder model shows.

        Args:
            width: of the encoder's output.

        Raises:
            Unfit: as `of`.
        """
        _check_fields(output, {"logits", "past_key_values", "encoder_last_hidden_state"})
        cache, dtype = output.past_key_values, output.logits.dtype
        if type(cache) is not EncoderDecoderCache:
            raise Unfit(f"its cache is a {type(cache).__qualname__}")
        if any(_windows(cache.self_attention_cache)):
            raise Unfit("its decoder has sliding windows")
        return Form(
            make_output=model_output_maker(type(output)),
            windows=_windows(cache.self_attention_cache),
            sizes=_sizes(cache.self_attention_cache, dtype),
            dtype=dtype,
            cross=_sizes(cache.cross_attention_cache, dtype),
            width=width,
        )

    def sizes_of(self, batch: int, length: int, past: int, source: int) -> list[tuple[int, ...]]:
        """The sizes of all that a captured step takes, in order."""
        pasts = [(batch, heads, past, width) for heads, width in self.sizes]
        if not self.cross:
            step = (batch, length)
            return [step, (batch, past + length), step, (2,), *pasts]
        crossed = [(batch, heads, source, width) for heads, width in self.cross]
        inputs = [(batch, length), (batch, source), (batch, source, self.width)]
        return [*inputs, *crossed, *pasts]


def _check_fields(output: Any, wanted: set[str]) -> None:
    found = {name for name, value in output.items() if value is not None}
    if found != wanted:
        raise Unfit(f"its output has {', '.join(sorted(found))}")


def _windows(cache: Any) -> tuple[int | None, ...]:
    if type(cache) is not DynamicCache or not cache.layers:
        raise Unfit(f"its cache is a {type(cache).__qualname__}")
    for layer in cache.layers:
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise Unfit(f"its cache has a {type(layer).__qualname__}")
    return tuple(getattr(layer, "sliding_window", None) for layer in cache.layers)


def _sizes(cache: Any, dtype: torch.dtype) -> tuple[tuple[int, int], ...]:
    tensors = [t for layer in cache.layers for t in (layer.keys, layer.values)]
    if any(t is None or t.dim() != 4 for t in tensors):
        raise Unfit("not all layers of its cache hold keys and values")
    if any(t.dtype is not dtype or t.shape[0] != 2 for t in tensors):
        raise Unfit("keys, values and logits differ in dtype or batch")
    return tuple((t.shape[1], t.shape[3]) for t in tensors)


class Past(DynamicLayer):  # type: ignore[misc] # transformers is not looked into
    """All of a layer's past. A windowed layer's too: masks go by positions, and what lies outside
    of the window has no weight."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        super().__init__()
        self.keys, self.values = keys, values
        self.dtype, self.device = keys.dtype, keys.device
        self.is_initialized = True


class _WindowedPast(Past):
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
            (_WindowedPast if windowed else Past)(past[2 * i], past[2 * i + 1])
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
