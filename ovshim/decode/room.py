"""Who serves the steps of a causal language model: what the dispatcher asks before anything else.

A call that brings a cache, or asks for one, is a step. The first is answered by eager, and the
decoding is made; from then on a step runs in the request that its cache is bound to, where the
module is what it was and the call is of the kind that was proved. Otherwise eager answers: a bound
cache frees itself when eager looks into it.
"""

from __future__ import annotations

import copy
import inspect
import logging
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import DynamicCache

from ovshim.background import Work, pause
from ovshim.cache import Store
from ovshim.decode import NOT_OURS
from ovshim.decode.cache import StatefulCache, bind, refusal, session_of
from ovshim.decode.calls import Call, Reader
from ovshim.decode.decoding import Decoding, Ready
from ovshim.decode.probes import ProbeFailed, bucket, error_of, positions_of
from ovshim.decode.step import new_cache
from ovshim.generation import obstacle
from ovshim.infer import EngineDead
from ovshim.job import Job
from ovshim.lanes import later
from ovshim.options import Options
from ovshim.plan import OutOfRangeError
from ovshim.planner import Building, Family, building_here, unfit
from ovshim.reasons import Reason, reason
from ovshim.signature import flatten_call, kind_of
from ovshim.tally import Tally
from ovshim.values import compile_value_check

__all__ = ["Room"]

log = logging.getLogger("ovshim")

# A decoding that eager serves is looked at again every so often: what was in the way may be gone.
_LOOK_AGAIN = 8
_SPECIAL_VALUES = reason("special-values")
_OUT_OF_RANGE = reason("out-of-range")
_TOKENS = torch.zeros((1, 1), dtype=torch.int64)


class _LeftToEager(Exception):
    """A step that is not served, and why."""

    def __init__(self, why: Reason) -> None:
        super().__init__(str(why))
        self.reason = why


class Room:
    """Serves the steps of one module.

    Args:
        original: the user's own forward, run in eager; its `resolve()` gives the bound method.
        tally: counts and tells what became of the calls.
    """

    def __init__(
        self, module: nn.Module, original: Any, options: Options, store: Store, tally: Tally
    ) -> None:
        self.module = module
        self.original = original
        self.options = options
        self.store = store
        self.tally = tally
        self._decoding: Decoding | None = None
        self._family = Family()
        self._lock = threading.RLock()
        self._work: Work | None = None
        config: Any = module.config
        text = config.get_text_config(decoder=True)
        names = tuple(inspect.signature(original.resolve()).parameters)
        uses_cache = bool(getattr(text, "use_cache", False))
        self._reader = Reader(names, uses_cache, (DynamicCache, StatefulCache))
        embedded = module.get_input_embeddings()  # type: ignore[operator]
        self._vocabulary = int(embedded.weight.shape[0])
        self._longest = getattr(text, "max_position_embeddings", None)
        self._values_fit = compile_value_check([_TOKENS] * 3, {})

    @property
    def plans(self) -> Sequence[Decoding]:
        made = self._decoding
        return [] if made is None else [made]

    def answer(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The module's answer to a step; NOT_OURS for what is none."""
        call = self._reader.read(args, kwargs)
        if call is None:
            return NOT_OURS
        if isinstance(call, Reason):
            return self._in_eager(call, args, kwargs)
        made = self._decoding
        if made is None:
            return self._first(call, args, kwargs)
        ready, generation = made.ready, made.generation
        if ready is None or made.reason is not None:
            return self._left(made, call, args, kwargs)
        assert generation is not None  # a decoding that is ready has one
        if torch.is_grad_enabled() and generation.grad_wanted():
            return NOT_OURS
        if not generation.holds():
            return self._stale(made, args, kwargs)
        try:
            return self._served(made, ready, call, args, kwargs)
        except _LeftToEager as left:
            return self._in_eager(left.reason, args, kwargs)

    def takes(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether such a call is a step that can be served."""
        return isinstance(self._reader.read(args, kwargs), Call)

    def prepare(self, wait: bool = True) -> Decoding | None:
        """Make the decoding before any call.

        Args:
            wait: False: None, and the decoding later, where another thread makes it.
        """
        if self.options.background and not building_here():
            self._start()
            if not wait:
                return None
            self.wait(None)
        with self._lock:
            return self._decoding or self._build()

    def wait(self, timeout: float | None) -> bool:
        """Wait until no other thread makes the decoding; whether that was so in time."""
        work = self._work
        return work is None or not work.under_way or work.done.wait(timeout)

    def drop(self) -> None:
        """Forget the decoding: the next step makes a new one."""
        with self._lock:
            if self._decoding is not None:
                self.tally.retire([self._decoding])
            self._decoding, self._family = None, Family()

    # --- steps in OpenVINO --------------------------------------------------------------------

    def _served(
        self,
        made: Decoding,
        ready: Ready,
        call: Call,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        cache = call.cache
        if type(cache) is StatefulCache and session_of(cache).engine is not ready.engine:
            cache.layers  # noqa: B018 # frees it: it may be bound to this engine then
        past = 0 if cache is None else cache.get_seq_length()
        ids = call.input_ids
        mask = self._mask(ready, call, past)
        positions = self._positions(ready, call, mask, past)
        batch, length = ids.shape
        bound = type(cache) is StatefulCache
        if bound and session_of(cache).batch not in (0, batch):
            raise _LeftToEager(reason("decode-call", "another batch than the cache's"))
        columns = (session_of(cache).columns if bound else past) + length
        if not ready.fits(batch, length, columns):
            raise _LeftToEager(reason("decode-call", f"sizes {(batch, length, columns)}"))
        if not self._values_fit((ids, mask, positions)):
            raise _LeftToEager(_SPECIAL_VALUES)
        if not bound and cache is not None:
            refused = refusal(cache, ready.form)
            if refused is not None:
                raise _LeftToEager(reason("cache-unknown", refused))
        sizes = bucket(batch, length, columns)
        expected = None if sizes in made.met else self._by_eager(call, args, kwargs)
        try:
            if not bound:
                cache = new_cache(self.module) if cache is None else cache
                bind(cache, ready.engine, ready.form)
            logits = session_of(cache).step(ids, mask, positions, call.keep)
        except OutOfRangeError:
            raise _LeftToEager(_OUT_OF_RANGE) from None
        except (EngineDead, RuntimeError, ValueError) as error:
            raise _LeftToEager(self._failed(made, error)) from error
        if expected is not None:
            try:
                error_of(expected.logits, logits, made.tolerance, ids=False)
            except ProbeFailed as failed:
                why = reason("first-use-mismatch", f"{(batch, length, columns)}: {failed}")
                return self._condemned(made, why, call, cache, expected)
            made.met.add(sizes)
            self._keep(made, "met", [list(one) for one in sorted(made.met)])
        made.calls.add()
        return ready.output(logits, cache)

    def _mask(self, ready: Ready, call: Call, past: int) -> torch.Tensor:
        mask = call.attention_mask
        batch, length = call.input_ids.shape
        if mask is None:
            if not ready.fills_mask:
                raise _LeftToEager(reason("decode-call", "no attention_mask"))
            return torch.ones((batch, past + length), dtype=torch.int64)
        if mask.shape[1] != past + length:
            detail = f"an attention_mask of length {mask.shape[1]} for {past + length} tokens"
            raise _LeftToEager(reason("decode-call", detail))
        return mask

    def _positions(self, ready: Ready, call: Call, mask: torch.Tensor, past: int) -> torch.Tensor:
        length = call.input_ids.shape[1]
        if call.position_ids is not None:
            return call.position_ids
        padded = call.attention_mask is not None and not bool(mask.all())
        if padded and ready.form.positions and ready.fills_positions == "mask":
            return positions_of(mask)[:, -length:]
        if padded and ready.form.positions and not ready.fills_positions:
            raise _LeftToEager(reason("decode-call", "no position_ids"))
        return torch.arange(past, past + length).unsqueeze(0)

    def _by_eager(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Eager's answer to a step, with a copy of its cache."""
        given = {**dict(zip(self._reader.names, args, strict=False)), **kwargs}
        cache = new_cache(self.module) if call.cache is None else copy.deepcopy(call.cache)
        return self.original(**{**given, "past_key_values": cache})

    def _condemned(self, made: Decoding, why: Reason, call: Call, cache: Any, expected: Any) -> Any:
        """The graph is wrong: it never serves again, and the caller gets what eager answered."""
        self.tally.retire([made])
        made.ready, made.reason = None, why
        self._keep(made, "verdict", why.to_dict())
        self.tally.note(why)
        if call.cache is not None:
            # The caller's own object, with what eager has put into the copy.
            cache.layers = expected.past_key_values.layers
            expected["past_key_values"] = cache
        return expected

    def _failed(self, made: Decoding, error: Exception) -> Reason:
        """OpenVINO raised while it ran. If the engine died of it, for good."""
        log.debug("OpenVINO failed on %s", type(self.module).__qualname__, exc_info=error)
        why = reason("infer-failed", str(error))
        if isinstance(error, EngineDead):
            self.tally.retire([made])
            made.ready, made.reason = None, why
        return why

    def _keep(self, made: Decoding, section: str, value: Any) -> None:
        entry, store = made.entry, self.store
        if entry is not None:
            later(lambda: store.amend(entry, section, value))

    # --- eager --------------------------------------------------------------------------------

    def _in_eager(self, why: Reason, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.tally.note(why)
        return self.original(*args, **kwargs)

    def _left(
        self, made: Decoding, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """A step of a module that eager serves."""
        assert made.reason is not None
        made.eager_calls.add()
        generation = made.generation
        often = made.eager_calls.value % _LOOK_AGAIN == 0
        if often and generation is not None and not generation.holds():
            self._drop_stale(made)
        if call.cache is None:
            return NOT_OURS  # a plan for this call alone, or for its parts, may do
        return self._in_eager(made.reason, args, kwargs)

    def _stale(self, made: Decoding, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        why = obstacle(self.module)
        if why is None:  # else for the time being; the decoding may hold again
            assert made.generation is not None
            why = reason("stale", made.generation.change())
            self._drop_stale(made)
        return self._in_eager(why, args, kwargs)

    def _drop_stale(self, made: Decoding) -> None:
        with self._lock:
            if self._decoding is made:
                self._family.put_off(made.calls.value)
                self.tally.retire([made])
                self._decoding = None

    # --- making it ----------------------------------------------------------------------------

    def _first(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Eager answers, and the decoding is made, unless another thread is about it."""
        if self.options.prefer == "eager":
            return self._in_eager(reason("prefer-eager"), args, kwargs)
        tensors = [call.input_ids, call.attention_mask, call.position_ids]
        why = obstacle(self.module) or unfit(tensors, self.module, torch.is_grad_enabled())
        if why is not None:
            return NOT_OURS if call.cache is None else self._in_eager(why, args, kwargs)
        if not self._lock.acquire(blocking=False):
            return self._in_eager(reason("building"), args, kwargs)
        try:
            if self._family.wait > 0:
                self._family.wait -= 1
                return self._in_eager(reason("stale", "it keeps changing"), args, kwargs)
            output = self.original(*args, **kwargs)
            if self.options.background:
                self._start()
            made = self._decoding if self.options.background else self._build()
        finally:
            self._lock.release()
        self.tally.note((made and made.reason) or reason("building"))
        return output

    def _start(self) -> None:
        """Let another thread make the decoding."""
        if self._decoding is None and (self._work is None or not self._work.under_way):
            self._work = Work(self._build)
            self._work.start()

    def _build(self) -> Decoding:
        from ovshim.decode.build import build

        leaves, structure = flatten_call((_TOKENS,), {})
        job = Job(
            module=self.module,
            method="forward",
            call=self.original.resolve(),
            options=self.options,
            store=self.store,
            kind=kind_of(leaves, structure),
            leaves=leaves,
            dynamic=(frozenset(),),
            grad=False,
        )
        if self.options.background:
            job.pause = pause
        with Building():
            made = build(job, self.original, self._vocabulary, self._longest)
        if made.reason is not None and made.reason.code == "stale":
            self._family.put_off()  # it changed under the build: there is nothing to keep
        else:
            self._decoding = made
        return made
