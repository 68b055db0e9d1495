"""What the caller of a decoded model holds: a `DynamicCache` whose keys and values are a state of
OpenVINO's.

transformers' caches are changed in place: whoever passes one to a call and keeps it expects to find
the new keys and values in it. So the caller's own object is *bound*: its class becomes a subclass,
and its layers are put aside. What generation does with a cache (ask for its length, reorder beams,
cut off rejected tokens) works on the state. Everything else looks at `layers`, and that *frees*
the cache: keys and values are copied into the layers that were put aside, and the object is the
plain `DynamicCache` again that eager would have left there. Nothing that anybody may do with a
cache needs to be known here to be right.
"""

from __future__ import annotations

import copy
import functools
import weakref
from collections.abc import Sequence
from sys import getrefcount
from typing import Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from ovshim.decode.engine import StatefulEngine
from ovshim.decode.step import Form
from ovshim.plan import OutOfRangeError
from ovshim.special_mode import outside_inference

__all__ = ["Session", "StatefulCache", "bind", "hand_over", "refusal", "session_of"]

_SESSION = "_ovshim_session"
_FREED = "_ovshim_freed"
# A cache that is freed more often than that, after so few steps each time, is looked into between
# them: copying it to and fro would cost more than is gained.
_MOST_FREED, _FEW_STEPS = 3, 8
# Tokens that were cut off stay where they are, masked, until they are so many, or this share.
_MOST_MASKED, _SHARE_MASKED = 64, 0.25


class Session:
    """One conversation: a slot of the engine, and where in its state the tokens are.

    Attributes:
        layers: the cache's own, while they hold nothing.
        batch, columns: rows and length of the state.
        steps: how many were made.
        order: for each row of the next step, the row of the state it goes on from; None: its own.
    """

    def __init__(self, engine: StatefulEngine, form: Form, layers: list[Any]) -> None:
        self.engine = engine
        self.form = form
        self.layers = layers
        self.batch = self.columns = self.steps = 0
        self.order: torch.Tensor | None = None
        # The columns of the tokens, where some others are masked.
        self._kept: torch.Tensor | None = None
        # What is being written; after an interrupt it is what holds, and not the state.
        self._written: Sequence[torch.Tensor] | None = None
        self._take_slot()

    def _take_slot(self) -> None:
        self.slot = self.engine.open()
        self._release = weakref.finalize(self, self.engine.release, self.slot)
        self._release.atexit = False

    @property
    def length(self) -> int:
        """How many tokens there are."""
        return self.columns if self._kept is None else len(self._kept)

    def step(self, given: Sequence[torch.Tensor], batch: int, length: int) -> torch.Tensor:
        """The logits of a step, after which its tokens belong to the past.

        Args:
            given: what the graph takes, less the rows to go on from.
            batch, length: of the step.

        Raises:
            OutOfRangeError: an index lies outside of its table; the past is as it was.
            EngineDead, ValueError: see `StatefulEngine.step`.
        """
        rows = self.numbers(0, batch, torch.int32) if self.order is None else self.order
        before = self._kept, self.batch, self.columns, self.order
        try:
            outputs = self.engine.step(self.slot, (*given, rows))
            self._grow(batch, length)
        except BaseException:  # of a signal handler, too: the program may go on
            self._kept, self.batch, self.columns, self.order = before
            self.slot.sound = False  # it may have the step behind it
            raise
        if len(outputs) > 1 and not outputs[1]:
            self.cut(length)
            raise OutOfRangeError
        return outputs[0]

    @staticmethod
    @functools.lru_cache(maxsize=256)
    def numbers(first: int, end: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        """Integers in a row; nobody may write to them."""
        return outside_inference(lambda: torch.arange(first, end, dtype=dtype))

    def _grow(self, batch: int, tokens: int) -> None:
        """A step has added so many tokens to so many rows."""
        if self._kept is not None:
            added = torch.arange(self.columns, self.columns + tokens)
            self._kept = torch.cat([self._kept, added])
        self.batch = batch
        self.columns += tokens
        self.steps += 1
        self.order = None

    def cut(self, tokens: int) -> None:
        """Forget the last tokens; they are masked from now on."""
        self._mend()
        if tokens == self.length:
            self.slot.sound = False  # until it is reset
            self.columns, self._kept, self.order = 0, None, None
            self.slot.request.reset_state()
            self.slot.sound = True
            return
        kept = torch.arange(self.columns) if self._kept is None else self._kept
        self._kept = kept[: len(kept) - tokens]

    def reorder(self, rows: torch.Tensor) -> None:
        """Go on from these rows."""
        self._mend()
        rows = rows.to(torch.int32)
        self.order = rows if self.order is None else self.order[rows]

    def mask(self, attention: torch.Tensor) -> torch.Tensor:
        """The mask over all columns for one over the tokens and those of the next step."""
        if self._kept is None:
            return attention
        tokens = attention.shape[1] - len(self._kept)
        mask = attention.new_zeros(attention.shape[0], self.columns + tokens)
        mask[:, self._kept] = attention[:, : len(self._kept)]
        mask[:, self.columns :] = attention[:, len(self._kept) :]
        return mask

    def tidy(self) -> None:
        """Drop the masked columns where they are many, or cannot be masked or left in a window; and
        what a step that ended halfway has left."""
        self._mend()
        if self._kept is None:
            return
        masked = self.columns - len(self._kept)
        can_stay = self.form.masks and self.form.window is None
        if not can_stay or masked > _MOST_MASKED + _SHARE_MASKED * self.columns:
            self.write(self.read())

    def _mend(self) -> None:
        """Undo what was done by halves: in another slot, for that one is not sound any more."""
        if self._written is None and self.slot.sound:
            return
        if self._written is None and self.columns:
            self._written = self.read()
        self.close()
        self._take_slot()
        if self._written is not None:
            self.write(self._written)

    def read(self) -> list[torch.Tensor]:
        """Copies of the keys and values of all tokens, [batch, heads, length, width] each."""
        if self._written is not None:
            return [tensor.clone() for tensor in self._written]
        return [self._tokens(tensor) for tensor in self.engine.read(self.slot)]

    def _tokens(self, state: torch.Tensor) -> torch.Tensor:
        # Where a step has failed half-way, some layers have it behind them: longer, and in order.
        if self.order is not None and state.shape[2] == self.columns:
            state = state.index_select(0, self.order.to(torch.int64))
        if self._kept is not None:
            return state.index_select(2, self._kept)
        return state[:, :, : self.columns]

    def write(self, tensors: Sequence[torch.Tensor]) -> None:
        """Replace the state by these keys and values, of as many tokens."""
        self._written = tensors
        self.engine.write(self.slot, tensors)
        self.batch, _, self.columns, _ = tensors[0].shape
        self._kept = self.order = self._written = None

    def close(self) -> None:
        """Give the slot back."""
        self._release()


class StatefulCache(DynamicCache):  # type: ignore[misc] # transformers is not looked into
    """A `DynamicCache` that is bound to a session. Made by `bind` alone."""

    @property
    def layers(self) -> list[Any]:
        """Frees the cache."""
        return _free(self)

    @layers.setter
    def layers(self, layers: list[Any]) -> None:
        _free(self)
        self.layers = layers  # it is another class by now

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return session_of(self).length

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        session = session_of(self)
        if session.batch == len(beam_idx):
            session.reorder(beam_idx)
        else:
            _free(self)
            self.reorder_cache(beam_idx)

    def crop(self, tokens_to_remove: int) -> None:
        session = session_of(self)
        fine = 0 <= -tokens_to_remove < session.length
        window = session.form.window
        if window is not None and session.length >= window:
            # What a window has let go of is there only for those who asked for it.
            fine = fine and all(getattr(layer, "record_past", True) for layer in session.layers)
        if not fine:
            _free(self)
            self.crop(tokens_to_remove)
        elif tokens_to_remove:
            session.cut(-tokens_to_remove)

    def activate_past_recording(self) -> None:
        for layer in session_of(self).layers:
            if hasattr(layer, "activate_past_recording"):
                layer.activate_past_recording()

    def __len__(self) -> int:
        return len(session_of(self).form.windows)

    def __repr__(self) -> str:
        return f"{DynamicCache.__name__}(layers={session_of(self).layers})"

    def get_max_length(self, layer_idx: int | None = None) -> int:
        layers = session_of(self).layers
        if layer_idx is not None:
            layers = layers[layer_idx : layer_idx + 1]
        return max((layer.get_max_length() for layer in layers), default=-1)

    @property
    def batch_size(self) -> int:
        return -1  # what layers that grow say

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_initialized(self) -> bool:
        return True

    @property
    def is_croppable(self) -> bool:
        return True

    def __copy__(self) -> Any:
        _free(self)
        return copy.copy(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        session = session_of(self)
        new = DynamicCache.__new__(DynamicCache)
        memo[id(self)] = new
        rest = {k: v for k, v in self.__dict__.items() if k not in (_SESSION, _FREED)}
        new.__dict__.update(copy.deepcopy(rest, memo))
        new.layers = copy.deepcopy(session.layers, memo)
        _fill(new.layers, session)
        return new

    def __reduce_ex__(self, protocol: Any) -> Any:
        _free(self)
        return self.__reduce_ex__(protocol)


def session_of(cache: StatefulCache) -> Session:
    """The conversation that a bound cache stands for."""
    session: Session = cache.__dict__[_SESSION]
    return session


def refusal(cache: Any, form: Form) -> str | None:
    """Why a cache cannot be bound; None where it can."""
    if type(cache) is not DynamicCache:
        return f"a {type(cache).__qualname__}"
    if _held_elsewhere(cache.__dict__):
        return "a cache whose layers somebody else holds"
    if cache.offloading:
        return "a cache with offloading"
    if cache.__dict__.get(_FREED, 0) > _MOST_FREED:
        return "a cache whose layers are looked into between steps"
    layers = cache.layers
    windows = tuple(getattr(layer, "sliding_window", None) for layer in layers)
    plain = cache.layer_class_to_replicate is DynamicLayer and not any(windows)
    if windows != form.windows and not (plain and len(layers) in (0, len(form.windows))):
        return "a cache with other layers"
    if any(type(x) not in (DynamicLayer, DynamicSlidingWindowLayer) for x in layers):
        return "a cache with layers of other types"
    if cache.get_seq_length() == 0:
        return None
    length = cache.get_seq_length()
    for i, layer in enumerate(layers):
        if not layer.is_initialized or layer.get_seq_length() != length:
            return "a cache with layers of different lengths"
        if layer.keys.shape[-2:-1] != layer.values.shape[-2:-1]:
            return "a cache in which a step has ended halfway"
        for tensor, (heads, width) in zip(
            (layer.keys, layer.values), form.sizes[2 * i : 2 * i + 2], strict=True
        ):
            sizes = (tensor.shape[1], tensor.shape[3]) if tensor.dim() == 4 else None
            alike = sizes == (heads, width) and tensor.shape[0] == layers[0].keys.shape[0]
            if not alike or tensor.dtype is not form.dtype or not tensor.is_cpu:
                return "a cache of other sizes or of another dtype"
            if tensor.requires_grad or type(tensor) is not torch.Tensor:
                return "a cache that requires grad"
    return None


def hand_over(cache: StatefulCache) -> None:
    """Free a bound cache for a step of eager's, into which nobody has looked."""
    freed = cache.__dict__.get(_FREED, 0)
    _free(cache)
    cache.__dict__[_FREED] = freed


def bind(cache: DynamicCache, engine: StatefulEngine, form: Form) -> None:
    """Bind a cache for which there is no `refusal`; what it holds becomes the state."""
    session = Session(engine, form, cache.layers)
    if cache.get_seq_length():
        session.write([t for layer in cache.layers for t in _whole(layer)])
    held = cache.__dict__
    # Nothing is called in between: a signal handler finds it plain or bound.
    del held["layers"]
    held[_SESSION] = session
    cache.__class__ = StatefulCache
    for layer in session.layers:
        layer.keys = layer.values = None


def _free(cache: StatefulCache) -> list[Any]:
    held = cache.__dict__
    session: Session = held[_SESSION]
    layers = session.layers
    length = session.length
    _fill(layers, session)
    del held[_SESSION]
    cache.__class__ = DynamicCache
    cache.layers = layers
    held[_FREED] = held.get(_FREED, 0) + (length > 0) if session.steps < _FEW_STEPS else 0
    session.close()
    return layers


def _fill(layers: list[Any], session: Session) -> None:
    """Put a session's keys and values into layers, as eager would have left them there."""
    if not session.length:
        return
    if not layers:  # made as they are needed, by a cache that was made without a config
        layers.extend(DynamicLayer() for _ in session.form.windows)
    found = session.read()
    for layer, keys, values in zip(layers, found[::2], found[1::2], strict=True):
        layer.lazy_initialization(keys, values)
        if isinstance(layer, DynamicSlidingWindowLayer):
            layer.cumulative_length = session.length
            if not layer.record_past:
                keys = keys[:, :, -layer.sliding_window + 1 :, :]
                values = values[:, :, -layer.sliding_window + 1 :, :]
        layer.keys, layer.values = keys, values


def _whole(layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """A layer's keys and values over its whole length: zeros for what a window has let go of."""
    missing = layer.get_seq_length() - layer.keys.shape[2]
    if missing == 0:
        return layer.keys, layer.values
    pad = torch.nn.functional.pad
    return pad(layer.keys, (0, 0, missing, 0)), pad(layer.values, (0, 0, missing, 0))


class _Probe:
    def __init__(self) -> None:
        self.layers = [object()]


def _counts(held: dict[str, Any]) -> set[int]:
    """How many references there are on a list under "layers", and on each of its items."""
    layers = held["layers"]
    return {getrefcount(layers), *(getrefcount(layers[i]) + 1 for i in range(len(layers)))}


# A list has one reference more here, that of the local variable.
_ALONE = _counts(vars(_Probe()))


def _held_elsewhere(held: dict[str, Any]) -> bool:
    """Whether somebody holds a cache's layers, and would look for new keys in them."""
    return not _counts(held) <= _ALONE
