"""How encoder-decoder models are decoded.

Eager encodes, and answers the first step, which fills the cache of the cross-attention. From the
second step on the decoder's own keys and values are a state, as a causal model's are; those of the
encoder go in with each step, from where they lie.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from ovshim.decode.cache import Session, StatefulCache
from ovshim.decode.calls import LeftToEager, is_whole, widened
from ovshim.decode.engine import StatefulEngine
from ovshim.decode.manner import BATCH, LENGTH, PAST, Causal, Conventions, alike
from ovshim.decode.probes import Probe, small_probe
from ovshim.decode.step import Form, Past
from ovshim.reasons import reason

__all__ = ["Seq2Seq"]

_SOURCE = 5
_KNOWN = frozenset(
    {"decoder_input_ids", "attention_mask", "encoder_outputs", "past_key_values"}
    | {"use_cache", "return_dict"}
)
_ENCODED = {"last_hidden_state", "pooler_output"}


class Encoded(BaseModelOutput):  # type: ignore[misc]
    """An encoder's output as decoders take it; mixtures of experts hand on what theirs was of."""

    router_logits = None


@dataclasses.dataclass(slots=True)
class SeqCall:
    """A step.

    Attributes:
        input_ids: int64 [batch, length], of the decoder.
        attention_mask: int64 [batch, source], of the encoder, or None for all ones.
        hidden: the encoder's output, [batch, source, width].
        cache: an EncoderDecoderCache whose cross-attention is filled.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor | None
    hidden: torch.Tensor
    cache: Any


class DecoderStep(nn.Module):
    """`forward(ids, mask, hidden, *cross, *past)`: the logits and the decoder's past made longer.

    [batch, length] and [batch, source] of int64, [batch, source, width]; keys and values of each
    layer in turn, [batch, heads, source, width], [batch, heads, past, width].
    """

    def __init__(self, module: nn.Module, run: Callable[..., Any], form: Form) -> None:
        super().__init__()
        self.training = False  # not by eval(), which would reach into the module
        self.model = module
        self.run = run
        self.crossing = len(form.cross)

    def forward(
        self,
        ids: torch.Tensor,
        mask: torch.Tensor,
        hidden: torch.Tensor,
        *tensors: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        cross, past = tensors[: self.crossing], tensors[self.crossing :]
        layers = [Past(past[i], past[i + 1]) for i in range(0, len(past), 2)]
        filled = [Past(cross[i], cross[i + 1]) for i in range(0, len(cross), 2)]
        output = self.run(
            decoder_input_ids=ids,
            attention_mask=mask,
            encoder_outputs=Encoded(last_hidden_state=hidden),
            past_key_values=EncoderDecoderCache(Cache(layers=layers), Cache(layers=filled)),
            use_cache=True,
        )
        return (output.logits, *(t for layer in layers for t in (layer.keys, layer.values)))


class Seq2Seq(Causal):
    """See `manner.Causal`."""

    inputs = ("decoder_input_ids", "attention_mask", "encoder_hidden_states")
    numbers = 2
    # Of the encoder's output; known by the first call.
    width = 0
    probed_source = _SOURCE + 4

    @property
    def longest(self) -> int | None:
        target: int | None = getattr(self.text, "max_target_positions", None)
        return target or super().longest

    # --- calls --------------------------------------------------------------------------------

    def read(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        cache = kwargs.get("past_key_values")
        if cache is None or args:
            return None
        if type(cache) is not EncoderDecoderCache:
            return reason("cache-unknown", f"a {type(cache).__qualname__}")
        inner, cross = cache.self_attention_cache, cache.cross_attention_cache
        if type(inner) not in (DynamicCache, StatefulCache) or type(cross) is not DynamicCache:
            kinds = f"{type(inner).__qualname__} and {type(cross).__qualname__}"
            return reason("cache-unknown", f"an EncoderDecoderCache of {kinds}")
        found = self._step(kwargs, cache)
        if not isinstance(found, str):
            self.width = found.hidden.shape[2]
            if inner.get_seq_length() == 0 or not all(cache.is_updated.values()):
                return reason("first-step")
            return found
        return reason("decode-call", found)

    def _step(self, given: Mapping[str, Any], cache: Any) -> SeqCall | str:
        for name, value in given.items():
            if name not in _KNOWN and value is not None and value is not False:
                return name
        for name in ("use_cache", "return_dict"):
            if given.get(name) is False:
                return name
        ids, mask = widened(given.get("decoder_input_ids")), widened(given.get("attention_mask"))
        if not is_whole(ids) or ids.numel() == 0:
            return "decoder_input_ids"
        if mask is not None and not (is_whole(mask) and mask.shape[0] == ids.shape[0]):
            return "attention_mask"
        encoded = given.get("encoder_outputs")
        # Of anything else that an encoder answers, something would be due in the output.
        if not isinstance(encoded, dict) or not encoded.keys() <= _ENCODED:
            return "encoder_outputs"
        hidden = encoded.get("last_hidden_state")
        if type(hidden) is not torch.Tensor or hidden.dim() != 3 or not hidden.is_cpu:
            return "encoder_outputs"
        return SeqCall(ids, mask, hidden, cache)

    def new_cache(self) -> Any:
        config = self.text
        return EncoderDecoderCache(DynamicCache(config=config), DynamicCache(config=config))

    def bindable(self, cache: Any) -> Any:
        return cache.self_attention_cache

    def given(
        self, form: Form, known: Conventions, call: Any, past: int
    ) -> tuple[torch.Tensor, ...]:
        cross = _tensors(call.cache.cross_attention_cache)
        batch, source, width = call.hidden.shape
        mask = call.attention_mask
        if mask is None and not known["fills_mask"]:
            raise LeftToEager(reason("decode-call", "no attention_mask"))
        if mask is None or not known["reads_mask"]:
            mask = torch.ones((batch, source), dtype=torch.int64)
        sizes = [(batch, heads, source, size) for heads, size in form.cross]
        fits = (
            batch == call.input_ids.shape[0]
            and width == form.width
            and mask.shape == (batch, source)
            and [t.shape for t in cross] == sizes
            and all(t.dtype is form.dtype and t.is_cpu for t in (call.hidden, *cross))
        )
        if not fits:
            raise LeftToEager(reason("decode-call", "encoder_outputs of other sizes"))
        return call.input_ids, mask, call.hidden, *cross

    def over_columns(
        self, session: Session, call: Any, given: tuple[torch.Tensor, ...]
    ) -> tuple[torch.Tensor, ...]:
        return given

    def output(self, form: Form, logits: torch.Tensor, call: Any, cache: Any) -> Any:
        return form.make_output(
            {
                "logits": logits,
                "past_key_values": cache,
                "encoder_last_hidden_state": call.hidden,
            }
        )

    def shown(self, call: Any) -> dict[str, Any]:
        given = {"decoder_input_ids": call.input_ids, "use_cache": False}
        if call.attention_mask is not None:
            given["attention_mask"] = call.attention_mask
        encoded = Encoded(last_hidden_state=call.hidden.detach().clone())
        return {**copy.deepcopy(given), "encoder_outputs": encoded}

    def eager_arguments(
        self, call: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> dict[str, Any]:
        return {**kwargs, "past_key_values": copy.deepcopy(call.cache)}

    # --- builds -------------------------------------------------------------------------------

    def form(self, call: Callable[..., Any]) -> Form:
        dtype = next(self.module.parameters()).dtype
        generator = torch.Generator().manual_seed(0)  # the program's own stream is not touched
        hidden = torch.randn(2, _SOURCE, self.width, dtype=dtype, generator=generator)
        encoded = Encoded(last_hidden_state=hidden)
        ids = torch.zeros((2, 2), dtype=torch.long)
        output = call(decoder_input_ids=ids, encoder_outputs=encoded, use_cache=True)
        return Form.of_decoder(output, self.width)

    def example(
        self, form: Form, call: Any
    ) -> tuple[nn.Module, tuple[torch.Tensor, ...], list[set[int]]]:
        generator = torch.Generator().manual_seed(0)

        def random(*sizes: int) -> torch.Tensor:
            return torch.randn(*sizes, dtype=form.dtype, generator=generator)

        given = (
            torch.arange(BATCH * LENGTH).reshape(BATCH, LENGTH) % self.vocabulary,
            torch.ones((BATCH, _SOURCE), dtype=torch.int64),
            random(BATCH, _SOURCE, form.width),
            *(random(BATCH, heads, _SOURCE, size) for heads, size in form.cross),
            *(random(BATCH, heads, PAST, size) for heads, size in form.sizes),
        )
        open_ = [{0, 1}, {0, 1}, {0, 1}, *({0, 2} for _ in (*form.cross, *form.sizes))]
        return DecoderStep(call.__self__, call, form), given, open_

    def probes(self, window: int | None) -> Iterable[Probe]:
        asked = [
            small_probe(),
            Probe((1, 1, 1)),
            Probe((3, 1, 1, 3, 1), (0, 2, 0), reorders=2, cuts=3),
            Probe((2, 40, 1)),
        ]
        return [p for p in asked if self.longest is None or p.length <= self.longest]

    def eager(self, call: Callable[..., Any], form: Form, probe: Probe) -> Any:
        return _Eager(self, call, form, probe)

    def candidate(
        self, call: Callable[..., Any], form: Form, engine: StatefulEngine, probe: Probe
    ) -> Any:
        return _Candidate(self, call, form, engine, probe)

    def conventions(self, call: Callable[..., Any], form: Form) -> Conventions:
        ids = torch.arange(6).reshape(2, 3) % self.vocabulary
        hidden, padded = _encoded(form, Probe((1,), (0, 3)))
        given = {"decoder_input_ids": ids, "use_cache": True}
        encoded = Encoded(last_hidden_state=hidden)
        bare, plain, masked = (
            call(**given, encoder_outputs=encoded, attention_mask=mask).logits
            for mask in (None, torch.ones_like(padded), padded)
        )
        # Whisper's is over frames of sound, and for the encoder alone.
        return {"fills_mask": alike(plain, bare), "reads_mask": not alike(plain, masked)}


class _Eager:
    """The module's own answers to a probe, whose padding is the encoder's."""

    def __init__(self, manner: Seq2Seq, call: Callable[..., Any], form: Form, probe: Probe) -> None:
        self.cache = manner.new_cache()
        self.hidden, self.mask = _encoded(form, probe)
        self._call = call

    def step(self, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        output = self._call(
            decoder_input_ids=ids,
            attention_mask=self.mask,
            encoder_outputs=Encoded(last_hidden_state=self.hidden),
            past_key_values=self.cache,
            use_cache=True,
        )
        logits: torch.Tensor = output.logits
        return logits

    def reorder(self, rows: torch.Tensor) -> None:
        self.cache.reorder_cache(rows)

    def cut(self, tokens: int) -> None:
        self.cache.crop(-tokens)


class _Candidate(_Eager):
    """The compiled graph's, after eager's first."""

    def __init__(
        self,
        manner: Seq2Seq,
        call: Callable[..., Any],
        form: Form,
        engine: StatefulEngine,
        probe: Probe,
    ) -> None:
        super().__init__(manner, call, form, probe)
        self._session = Session(engine, form, [])

    def step(self, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        if not self._session.length:
            logits = super().step(ids, mask, positions)
            self._session.write(_tensors(self.cache.self_attention_cache))
            return logits
        self._session.tidy()
        cross = _tensors(self.cache.cross_attention_cache)
        return self._session.step((ids, self.mask, self.hidden, *cross), *ids.shape)

    def reorder(self, rows: torch.Tensor) -> None:
        self.cache.cross_attention_cache.reorder_cache(rows)
        self._session.reorder(rows)

    def cut(self, tokens: int) -> None:
        self._session.cut(tokens)


def _tensors(cache: Any) -> list[torch.Tensor]:
    return [t for layer in cache.layers for t in (layer.keys, layer.values)]


def _encoded(form: Form, probe: Probe) -> tuple[torch.Tensor, torch.Tensor]:
    """What an encoder might have answered, and its mask."""
    generator = torch.Generator().manual_seed(len(probe.pieces))
    batch, source = len(probe.pads), Seq2Seq.probed_source
    hidden = torch.randn(batch, source, form.width, generator=generator).to(form.dtype)
    mask = torch.ones((batch, source), dtype=torch.int64)
    for row, pad in enumerate(probe.pads):
        mask[row, source - pad :] = 0
    return hidden, mask
