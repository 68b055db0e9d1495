"""Who serves the steps of a language model: what the dispatcher asks before anything else.

A call that brings a cache, or asks for one, is a step. The first is answered by eager, and the
decoding is made; from then on a step runs in the request that its cache is bound to, where the
module is what it was and the call is of the kind that was proved. Otherwise eager answers: a bound
cache frees itself when eager looks into it.
"""

from __future__ import annotations

import inspect
import logging
import time
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from ovshim.cache import Store
from ovshim.decode import NOT_OURS
from ovshim.decode.cache import StatefulCache, bind, hand_over, refusal, session_of
from ovshim.decode.calls import LeftToEager
from ovshim.decode.decoding import Decoding, Ready
from ovshim.decode.maker import TOKENS, Maker
from ovshim.decode.manner import Causal
from ovshim.decode.probes import ProbeFailed, bucket, error_of
from ovshim.decode.seq2seq import Seq2Seq
from ovshim.deferred import later
from ovshim.hooks import obstacle
from ovshim.infer import EngineDead
from ovshim.options import Options
from ovshim.plan import OutOfRangeError
from ovshim.planner import unfit
from ovshim.pool import ReenteredError
from ovshim.reasons import Reason, reason
from ovshim.signals import let_through
from ovshim.tally import Tally
from ovshim.values import compile_value_check

__all__ = ["Room"]

log = logging.getLogger("ovshim")

# A decoding that eager serves is looked at again every so often: what was in the way may be gone.
_LOOK_AGAIN = 8
_SLOWER = reason("slower")
_SPECIAL_VALUES = reason("special-values")
_OUT_OF_RANGE = reason("out-of-range")


class Room:
    """Serves the steps of one module.

    Args:
        original: the user's own forward, run in eager; its `resolve()` gives the bound method.
        tally: counts and tells what became of the calls.

    Attributes:
        maker: has the decoding.
    """

    def __init__(
        self, module: nn.Module, original: Any, options: Options, store: Store, tally: Tally
    ) -> None:
        self.module = module
        self.original = original
        self.options = options
        self.store = store
        self.tally = tally
        names = tuple(inspect.signature(original.resolve()).parameters)
        config: Any = module.config
        self._manner = (Seq2Seq if config.is_encoder_decoder else Causal)(module, names)
        self._values_fit = compile_value_check([TOKENS] * self._manner.numbers, {})
        self.maker = Maker(module, original, options, store, tally, self._manner)

    @property
    def plans(self) -> Sequence[Decoding]:
        made = self.maker.decoding
        return [] if made is None else [made]

    def answer(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The module's answer to a step; NOT_OURS for what is none."""
        call = self._manner.read(args, kwargs)
        if call is None:
            return NOT_OURS
        if isinstance(call, Reason):
            return self._in_eager(call, args, kwargs)
        made = self.maker.decoding
        if made is None:
            return self._first(call, args, kwargs)
        ready, generation = made.ready, made.generation
        if ready is None or made.reason is not None:
            return self._left(made, call, args, kwargs)
        assert generation is not None  # a decoding that is ready has one
        if torch.is_grad_enabled() and _any_wants_grad(generation.tensors):
            return NOT_OURS
        if not generation.holds():
            return self._stale(made, args, kwargs)
        try:
            return self._served(made, ready, call, args, kwargs)
        except LeftToEager as left:
            why = left.reason
        # Not above, where what was raised holds the cache, and is the context of what eager raises.
        return self._in_eager(why, args, kwargs)

    def takes(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether such a call is a step that can be served."""
        call = self._manner.read(args, kwargs)
        return call is not None and not isinstance(call, Reason)

    def prepare(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], wait: bool = True
    ) -> Decoding | None:
        """Make the decoding before any call but this example, a step that can be served.

        Args:
            wait: False: None, and the decoding later, where another thread makes it.

        Raises:
            CalibrationError: there is no calibration data that can be read, or it holds no tokens.
        """
        return self.maker.prepare(self._manner.read(args, kwargs), wait)

    # --- steps in OpenVINO --------------------------------------------------------------------

    def _served(
        self,
        made: Decoding,
        ready: Ready,
        call: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        manner = self._manner
        cache: Any = None if call.cache is None else manner.bindable(call.cache)
        bound = type(cache) is StatefulCache
        if bound and session_of(cache).engine is not ready.engine:
            cache.layers  # noqa: B018 # frees it: it may be bound to this engine then
            bound = False
        past = 0 if cache is None else cache.get_seq_length()
        batch, length = call.input_ids.shape
        if bound:
            if session_of(cache).batch not in (0, batch):
                raise LeftToEager(reason("decode-call", "another batch than the cache's"))
            self._tidied(made, cache)
        given = manner.given(ready.form, ready.conventions, call, past)
        columns = (session_of(cache).columns if bound else past) + length
        sizes = batch, length, columns, given[2].shape[1] if ready.form.cross else 0
        alike, timed = bucket(*sizes), made.long_steps
        if timed is not None and timed.lost(alike):
            if bound:
                hand_over(cache)
            raise LeftToEager(_SLOWER)
        if not ready.fits(*sizes):
            raise LeftToEager(reason("decode-call", f"sizes {sizes}"))
        if not self._values_fit(given):
            raise LeftToEager(_SPECIAL_VALUES)
        if not bound and cache is not None:
            refused = refusal(cache, ready.form)
            if refused is not None:
                raise LeftToEager(reason("cache-unknown", refused))
        expected = None
        if alike not in made.met or (timed is not None and timed.open(alike)):
            expected, eager_seconds = self._by_eager(call, past if bound else 0, args, kwargs)
        started = time.perf_counter()
        whole, logits = self._stepped(made, ready, call, given, bound)
        if expected is not None:
            seconds = time.perf_counter() - started
            why = self._mismatch(made, sizes, expected, logits)
            if why is not None:
                return self._by_eager_alone(made, why, call, expected)
            if timed is not None:
                timed.add(alike, eager_seconds, seconds)
        made.calls.add()
        return manner.output(ready.form, logits, call, whole)

    def _tidied(self, made: Decoding, cache: StatefulCache) -> None:
        try:
            session_of(cache).tidy()
        except RuntimeError as error:
            let_through(error)
            raise LeftToEager(self._failed(made, error)) from error

    def _stepped(
        self, made: Decoding, ready: Ready, call: Any, given: tuple[torch.Tensor, ...], bound: bool
    ) -> tuple[Any, torch.Tensor]:
        """The cache that a step's tokens are in then, and its logits."""
        manner, whole = self._manner, call.cache
        try:
            if whole is None:
                whole = manner.new_cache()
            cache = manner.bindable(whole)
            if not bound:
                bind(cache, ready.engine, ready.form)
            session = session_of(cache)
            physical = manner.over_columns(session, call, given)
            return whole, session.step(physical, *call.input_ids.shape)
        except OutOfRangeError:
            raise LeftToEager(_OUT_OF_RANGE) from None
        except (EngineDead, RuntimeError, ValueError) as error:
            let_through(error)
            raise LeftToEager(self._failed(made, error)) from error

    def _by_eager(
        self, call: Any, past: int, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, float]:
        """Eager's answer to a step, and the seconds it would take to leave the step to it: keys and
        values of so many tokens would be copied out of the state, and back."""
        begun = time.perf_counter()
        try:
            arguments = self._manner.eager_arguments(call, args, kwargs)
        except Exception as error:  # whatever a program's own attribute of a cache raises
            let_through(error)
            raise LeftToEager(
                reason("cache-unknown", f"a cache without copies: {error}")
            ) from error
        started = time.perf_counter()
        answer = self.original(**arguments)
        copying = 2 * (started - begun) if past else 0.0
        return answer, time.perf_counter() - started + copying

    def _mismatch(
        self, made: Decoding, sizes: tuple[int, ...], expected: Any, logits: torch.Tensor
    ) -> Reason | None:
        """Why a step of sizes that are met for the first time is wrong. If it is right, take note
        of them."""
        try:
            error_of(expected.logits, logits, made.tolerance, ids=False)
        except ProbeFailed as failed:
            return reason("first-use-mismatch", f"{sizes}: {failed}")
        made.met.add(bucket(*sizes))
        self._keep(made, "met", [list(one) for one in sorted(made.met)])
        return None

    def _by_eager_alone(self, made: Decoding, why: Reason, call: Any, expected: Any) -> Any:
        """Eager's answer to a step that both have answered. Unless the module has been changed
        meanwhile, the graph is wrong, and never serves again."""
        if made.generation is not None and not made.generation.holds():
            why = reason("stale", made.generation.change())
        else:
            self.tally.retire([made])
            made.ready, made.reason = None, why
            self._keep(made, "verdict", why.to_dict())
        self.tally.note(why)
        if call.cache is not None:
            # The caller's own object, with what eager has put into the copy.
            copied = self._manner.bindable(expected.past_key_values)
            self._manner.bindable(call.cache).layers = copied.layers
            expected["past_key_values"] = call.cache
        return expected

    def _failed(self, made: Decoding, error: Exception) -> Reason:
        """OpenVINO raised while it ran. If the engine died of it, for good."""
        log.debug("OpenVINO failed on %s", type(self.module).__qualname__, exc_info=error)
        reentered = isinstance(error, ReenteredError)
        why = reason("reentered") if reentered else reason("infer-failed", str(error))
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
        self, made: Decoding, call: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """A step of a module that eager serves."""
        assert made.reason is not None
        made.eager_calls.add()
        generation = made.generation
        often = made.eager_calls.value % _LOOK_AGAIN == 0
        if often and generation is not None and not generation.holds_but_for_values():
            self.maker.drop_stale(made)
        if call.cache is None:
            return NOT_OURS  # a plan for this call alone, or for its parts, may do
        return self._in_eager(made.reason, args, kwargs)

    def _stale(self, made: Decoding, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        why = obstacle(self.module)
        if why is None:  # else for the time being; the decoding may hold again
            assert made.generation is not None
            why = reason("stale", made.generation.change())
            self.maker.drop_stale(made)
        return self._in_eager(why, args, kwargs)

    def _first(self, call: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A step that comes before there is a decoding."""
        if self.options.prefer == "eager":
            return self._in_eager(reason("prefer-eager"), args, kwargs)
        tensors = [call.input_ids, call.attention_mask]
        grad = torch.is_grad_enabled()
        why = obstacle(self.module) or unfit(tensors, grad)
        if why is None and grad and _any_wants_grad(self.module.parameters()):
            why = reason("grad")
        if why is not None:
            return NOT_OURS if call.cache is None else self._in_eager(why, args, kwargs)
        return self.maker.behind(call, args, kwargs, lambda why: self._in_eager(why, args, kwargs))


def _any_wants_grad(tensors: Iterable[torch.Tensor]) -> bool:
    return any(tensor.requires_grad for tensor in tensors)
