"""When the decoding of a module is made, and when it is given up: a step that eager answers has it
made behind it, unless it was asked for before, and a module that has changed loses it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import nn

from ovshim.builder import Work, pause
from ovshim.building import Building, building_here
from ovshim.cache import Store
from ovshim.decode import NOT_OURS
from ovshim.decode.decoding import Decoding
from ovshim.decode.manner import Causal
from ovshim.families import Family
from ovshim.job import Job
from ovshim.options import Options
from ovshim.reasons import Reason, reason
from ovshim.signals import heard
from ovshim.signature import flatten_call, kind_of
from ovshim.tally import Tally

__all__ = ["TOKENS", "Maker", "Patience"]

TOKENS = torch.zeros((1, 1), dtype=torch.int64)
"""The tokens of a step, for who asks nothing but their kind."""


class Patience(Protocol):
    """Where nobody has asked for a decoding: whether it pays to make one, and to use it."""

    def before_decoding(self, args: tuple[Any, ...], kwargs: dict[str, Any], /) -> Any:
        """Eager's answer to a step while no decoding is due; NOT_OURS where it is to be made."""

    def made_decoding(self, made: Decoding, /) -> None:
        """Take note of a decoding; where it gains too little it is left to eager."""


class Maker:
    """Makes the decoding of one module.

    Args:
        original: the user's own forward, run in eager; its `resolve()` gives the bound method.
        tally: told what became of the calls.

    Attributes:
        decoding: None: there is none yet, or none any more.
        patience: asked before and after a decoding is made; None: it is made at once.
    """

    patience: Patience | None = None

    def __init__(
        self,
        module: nn.Module,
        original: Any,
        options: Options,
        store: Store,
        tally: Tally,
        manner: Causal,
    ) -> None:
        self.decoding: Decoding | None = None
        self._module = module
        self._original = original
        self._options = options
        self._store = store
        self._tally = tally
        self._manner = manner
        self._family = Family()
        self._lock = threading.RLock()
        self._work: Work | None = None

    def prepare(self, call: Any, wait: bool) -> Decoding | None:
        """Make the decoding before any call but this example, a step that can be served.

        Args:
            wait: False: None, and the decoding later, where another thread makes it.

        Raises:
            CalibrationError: there is no calibration data that can be read, or it holds no tokens.
        """
        shown = self._shown(call)
        if self._options.background and not building_here():
            self._start(shown)
            if not wait:
                return None
            self.wait(None)
        with self._lock:
            return self.decoding or self._build(shown)

    def behind(
        self,
        call: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        in_eager: Callable[[Reason], Any],
    ) -> Any:
        """Eager's answer to a step; the decoding is made behind it, unless it is not due or another
        thread is about it.

        Args:
            in_eager: eager's answer, counted for a reason.
        """
        if self.patience is not None:
            answer = self.patience.before_decoding(args, kwargs)
            if answer is not NOT_OURS:
                return answer
        if not self._lock.acquire(blocking=False):
            return in_eager(reason("building"))
        try:
            if self._family.wait > 0:
                self._family.wait -= 1
                return in_eager(reason("stale", "it keeps changing"))
            shown = self._shown(call)  # before it is called: it may write to the tokens
            output = self._original(*args, **kwargs)
            if self._options.background:
                self._start(shown)
            made = self.decoding
            if made is None and not self._options.background:
                made = self._build(shown, lenient=True)
        finally:
            self._lock.release()
        self._tally.tell_precision()
        self._tally.note((made and made.reason) or reason("building"))
        return output

    def wait(self, timeout: float | None) -> bool:
        """Wait until no other thread makes the decoding; whether that was so in time."""
        work = self._work
        return work is None or not work.under_way or work.done.wait(timeout)

    def drop(self) -> None:
        """Forget the decoding: the next step makes a new one."""
        with self._lock:
            if self.decoding is not None:
                self._tally.retire([self.decoding])
            self.decoding, self._family = None, Family()

    def drop_stale(self, made: Decoding) -> None:
        """The module is not any more what this one was made of."""
        with self._lock:
            if self.decoding is made:
                self._family.put_off(made.calls.value)
                self._tally.retire([made])
                self.decoding = None

    def is_cached(self) -> bool:
        """Whether the cache has a decoding. Raises whatever a build meets."""
        from ovshim.decode.key import is_cached

        with Building():
            return is_cached(self._job(), self._manner)

    def _shown(self, call: Any) -> dict[str, Any]:
        """What the proof may look at of a call, where it looks at any."""
        return self._manner.shown(call) if self._options.precision == "fp16" else {}

    def _start(self, shown: Mapping[str, Any]) -> None:
        """Let another thread make the decoding."""
        if self.decoding is None and (self._work is None or not self._work.under_way):
            self._work = Work(lambda: self._build(shown, lenient=True))
            self._work.start()

    def _build(self, shown: Mapping[str, Any], lenient: bool = False) -> Decoding:
        from ovshim.decode.build import build

        job = self._job()
        job.lenient = lenient
        if self._options.background:
            job.pause = pause
        with heard(), Building():
            made = build(job, self._original, self._manner, shown)
        if made.reason is not None and made.reason.code == "stale":
            self._family.put_off()  # it changed under the build: there is nothing to keep
        else:
            if self.patience is not None:
                self.patience.made_decoding(made)
            self.decoding = made
        return made

    def _job(self) -> Job:
        leaves, structure = flatten_call((TOKENS,), {})
        return Job(
            module=self._module,
            method="forward",
            call=self._original.resolve(),
            options=self._options,
            store=self._store,
            kind=kind_of(leaves, structure),
            leaves=leaves,
            dynamic=(frozenset(),),
            grad=False,
            backward=None,  # an answer without gradients is reached by none
        )
