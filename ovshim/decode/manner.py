"""How causal language models are decoded: what their steps are given, and what eager is asked.

`seq2seq` has the same for encoder-decoder models; whatever does not depend on which of them a
module is asks its manner.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import DynamicCache

from ovshim.decode.cache import Session, StatefulCache
from ovshim.decode.calls import Call, LeftToEager, Reader
from ovshim.decode.engine import StatefulEngine
from ovshim.decode.probes import Probe, all_probes, positions_of
from ovshim.decode.step import Form, Step
from ovshim.reasons import reason

__all__ = ["Causal", "Conventions"]

# Sizes of the step that is captured: batch, tokens, past, tokens that logits are kept of. All
# different, so that none is taken for another.
BATCH, LENGTH, PAST, KEPT = 3, 4, 7, 2

Conventions = Mapping[str, Any]


class Causal:
    """Args:
    names: the parameters of the module's forward, in order.
    """

    # Names of what a captured step takes before the past.
    inputs: tuple[str, ...] = ("input_ids", "attention_mask", "position_ids", "keep")
    # How many of a step's inputs are numbers of tokens, of masks and of positions.
    numbers = 3
    # The length of an encoder's output in probes; 0 where there is none.
    probed_source = 0

    def __init__(self, module: nn.Module, names: tuple[str, ...]) -> None:
        self.module = module
        config: Any = module.config
        self.text = config.get_text_config(decoder=True)
        uses_cache = bool(getattr(self.text, "use_cache", False))
        self.reader = Reader(names, uses_cache, (DynamicCache, StatefulCache))

    @property
    def vocabulary(self) -> int:
        """How many tokens there are."""
        return int(self.text.vocab_size)

    @property
    def longest(self) -> int | None:
        """How many positions there are; None: as many as one likes."""
        found: int | None = getattr(self.text, "max_position_embeddings", None)
        return found

    # --- calls --------------------------------------------------------------------------------

    def read(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """See `calls.Reader.read`."""
        return self.reader.read(args, kwargs)

    def new_cache(self) -> Any:
        """An empty cache as the module itself would make it."""
        return DynamicCache(config=self.module.config)

    def bindable(self, cache: Any) -> Any:
        """What of a call's cache is bound."""
        return cache

    def given(
        self, form: Form, known: Conventions, call: Call, past: int
    ) -> tuple[torch.Tensor, ...]:
        """What a step is given, by tokens.

        Raises:
            LeftToEager: the call leaves out what cannot be filled in.
        """
        mask = self._mask(known, call, past)
        return call.input_ids, mask, self._positions(form, known, call, mask, past)

    def over_columns(
        self, session: Session, call: Any, given: tuple[torch.Tensor, ...]
    ) -> tuple[torch.Tensor, ...]:
        """The same, over the columns of a session's state."""
        ids, mask, positions = given
        return causal_inputs(session, ids, mask, positions, call.keep)

    def _mask(self, known: Conventions, call: Call, past: int) -> torch.Tensor:
        mask = call.attention_mask
        batch, length = call.input_ids.shape
        if mask is None:
            if not known["fills_mask"]:
                raise LeftToEager(reason("decode-call", "no attention_mask"))
            return torch.ones((batch, past + length), dtype=torch.int64)
        if mask.shape[1] != past + length:
            detail = f"an attention_mask of length {mask.shape[1]} for {past + length} tokens"
            raise LeftToEager(reason("decode-call", detail))
        return mask

    def _positions(
        self, form: Form, known: Conventions, call: Call, mask: torch.Tensor, past: int
    ) -> torch.Tensor:
        length = call.input_ids.shape[1]
        if call.position_ids is not None:
            return call.position_ids
        padded = call.attention_mask is not None and not bool(mask.all())
        if padded and form.positions and known["fills_positions"] == "mask":
            return positions_of(mask)[:, -length:]
        if padded and form.positions and not known["fills_positions"]:
            raise LeftToEager(reason("decode-call", "no position_ids"))
        return torch.arange(past, past + length).unsqueeze(0)

    def output(self, form: Form, logits: torch.Tensor, call: Any, cache: Any) -> Any:
        """An output of the module's own class."""
        return form.make_output({"logits": logits, "past_key_values": cache})

    def shown(self, call: Any) -> dict[str, Any]:
        """The arguments of a call of eager for the same tokens, with no past: copies of them."""
        given = {"input_ids": call.input_ids, "use_cache": False}
        if call.attention_mask is not None and call.attention_mask.shape == call.input_ids.shape:
            given["attention_mask"] = call.attention_mask
        return copy.deepcopy(given)

    def eager_arguments(
        self, call: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> dict[str, Any]:
        """The arguments of the same step with a copy of its cache."""
        given = {**dict(zip(self.reader.names, args, strict=False)), **kwargs}
        cache = self.new_cache() if call.cache is None else copy.deepcopy(call.cache)
        return {**given, "past_key_values": cache}

    # --- builds -------------------------------------------------------------------------------

    def form(self, call: Callable[..., Any]) -> Form:
        """What a short call of eager shows. Raises Unfit."""
        return Form.of(call, self.reader.names)

    def example(
        self, form: Form, call: Any
    ) -> tuple[nn.Module, tuple[torch.Tensor, ...], list[set[int]]]:
        """The step to be captured, its arguments, and which of their dimensions are open."""
        whole = PAST + LENGTH
        generator = torch.Generator().manual_seed(0)  # the program's own stream is not touched

        def random(*sizes: int) -> torch.Tensor:
            return torch.randn(*sizes, dtype=form.dtype, generator=generator)

        given = (
            torch.arange(BATCH * LENGTH).reshape(BATCH, LENGTH) % self.vocabulary,
            torch.ones((BATCH, whole), dtype=torch.int64),
            torch.arange(PAST, whole).expand(BATCH, LENGTH).clone(),
            torch.arange(LENGTH - KEPT, LENGTH),
            *(random(BATCH, heads, PAST, size) for heads, size in form.sizes),
        )
        open_ = [{0, 1}, {0, 1}, {0, 1}, {0}, *({0, 2} for _ in form.sizes)]
        return Step(call.__self__, call, form), given, open_

    def probes(self, window: int | None) -> Iterable[Probe]:
        """What a proof asks."""
        return all_probes(window, self.longest)

    def eager(self, call: Callable[..., Any], form: Form, probe: Probe) -> Any:
        """Eager, as `probes.ask` takes it."""
        return CausalEager(call, self.new_cache(), form)

    def candidate(
        self, call: Callable[..., Any], form: Form, engine: StatefulEngine, probe: Probe
    ) -> Any:
        """The compiled graph, in the same form."""
        return CausalCandidate(engine, form)

    def conventions(self, call: Callable[..., Any], form: Form) -> Conventions:
        """What the module makes of a call without a mask or without positions."""
        ids = _ids_with_padding(call, self.vocabulary)
        given = {"input_ids": ids, "use_cache": True}
        places = torch.arange(5).expand(2, 5)

        def logits(mask: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
            more = {"position_ids": positions} if form.positions else {}
            found: torch.Tensor = call(**given, attention_mask=mask, **more).logits
            return found

        padded = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
        bare = call(**given, attention_mask=padded).logits
        rules = {"arange": places, "mask": positions_of(padded)}
        rule = next((name for name, p in rules.items() if alike(logits(padded, p), bare)), "")
        plain = alike(logits(torch.ones_like(ids), places), call(**given).logits)
        return {"fills_mask": plain, "fills_positions": rule}


def _ids_with_padding(call: Any, vocabulary: int) -> torch.Tensor:
    """Two rows of five tokens, among them that of padding, of which a module may make a mask by
    itself. Not at an end, where transformers warns of it: once in a process, and the program's own
    padding is to have that."""
    pad = getattr(getattr(call.__self__, "config", None), "pad_token_id", None)
    others = [token for token in range(min(vocabulary, 11)) if token != pad] or [0]
    ids = torch.tensor([others[i % len(others)] for i in range(10)]).reshape(2, 5)
    if isinstance(pad, int) and 0 <= pad < vocabulary:
        ids[0, 2] = pad
    return ids


def causal_inputs(
    session: Session, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, keep: int
) -> tuple[torch.Tensor, ...]:
    """`Causal.inputs`, of which the mask is over the columns of the session's state.

    Args:
        keep: of how many of the last tokens logits are wanted; 0: of all.
    """
    batch, length = ids.shape
    first = length - keep if 0 < keep < length else 0
    return ids, session.mask(mask), positions.expand(batch, length), session.numbers(first, length)


class CausalEager:
    """The module's own answers to a probe, step by step."""

    def __init__(self, call: Callable[..., Any], cache: Any, form: Form) -> None:
        self._call = call
        self._form = form
        self._cache = cache
        cache.activate_past_recording()  # so that tokens can be cut off beyond a window

    def step(self, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        more = {"position_ids": positions} if self._form.positions else {}
        given = {"input_ids": ids, "attention_mask": mask, "past_key_values": self._cache}
        logits: torch.Tensor = self._call(**given, use_cache=True, **more).logits
        return logits

    def reorder(self, rows: torch.Tensor) -> None:
        self._cache.reorder_cache(rows)

    def cut(self, tokens: int) -> None:
        self._cache.crop(-tokens)


class CausalCandidate:
    """The compiled graph's."""

    def __init__(self, engine: StatefulEngine, form: Form) -> None:
        self._session = Session(engine, form, [])

    def step(self, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        self._session.tidy()
        given = causal_inputs(self._session, ids, mask, positions, 0)
        return self._session.step(given, *ids.shape)

    def reorder(self, rows: torch.Tensor) -> None:
        self._session.reorder(rows)

    def cut(self, tokens: int) -> None:
        self._session.cut(tokens)


def alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two answers of eager are one but for rounding."""
    return one.shape == other.shape and torch.allclose(one, other, rtol=1e-4, atol=1e-4)
