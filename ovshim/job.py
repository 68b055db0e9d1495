"""A job: what is to be built, for which calls, how long it may take, and what was found so far."""

from __future__ import annotations

import contextlib
import dataclasses
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ovshim import runtime
from ovshim.attributes import tensors_of
from ovshim.cache.entry import Entry, write_details
from ovshim.errors import PrecisionWarning
from ovshim.fingerprint import Fingerprint, Unkeyable
from ovshim.generation import Generation
from ovshim.preflight import Look, place_of
from ovshim.reasons import Reason, reason
from ovshim.shapes import Dims
from ovshim.signals import raise_heard
from ovshim.signature import Pattern, unflatten_call
from ovshim.stamps import stamp
from ovshim.version import exact_version
from ovshim.views import copied
from ovshim.wanted import Wanted

if TYPE_CHECKING:
    from ovshim.child import Outcome
    from ovshim.plan import Plan
    from ovshim.precision.lowering import Lowering

__all__ = ["MOVED", "BuildStopped", "Job", "versions"]

MOVED = reason("stale", "weights changed while the plan was made")
"""Of a build whose module is not what it was when the job was made."""

_RACE_SECONDS = 0.5


class BuildStopped(Exception):
    """A build ends in eager, for this reason."""

    def __init__(self, why: Reason) -> None:
        super().__init__(str(why))
        self.reason = why


@dataclasses.dataclass(eq=False)
class Job(Wanted):
    """What is to be built. The tensors in `leaves` are copies that nobody else holds.

    Attributes:
        call: the user's own method, bound to `module`.
        dynamic: the dimensions of each tensor that should be able to change.
        backward: told when a backward pass reaches an answer (see `building.Backward`).
        siblings: plans of the module for the other grad mode, whose graphs may do for this one.
        look: what was seen of a call of the user's own, where there was one.
        apart: the user's method over a copy of the module, for calls of our own, where the module
            itself is in use by other threads meanwhile.
        began: the state of the module when the job was made, where other threads may change it.
        pause: called between stages; may wait, or raise BuildStopped.
        lenient: whether a call of the user's began it, who then gets eager and not an error.
        candidate: whether it is one of several between which is decided afterwards.
        lowering: what is to be made of the graph, beyond a hint to OpenVINO.
        ahead: what was begun before it was known what to build (`early.Ahead`); None: nobody has
            tried yet.

    Found on the way:
        fingerprint: all that decides the graph; None where nothing is cached.
        details: of the fingerprint, once it is known to be a miss.
        source, hint: the IR that was compiled, and the precision that OpenVINO was told.
        imported: whether the compiled graph was in the cache as well (`blobs`); settings, what it
            was compiled with; model, itself, until it is kept.
        in_range: the data that float16 was seen to hold; None where nothing runs in it.
        precision_run, modules_run: what the compiled graph runs in, most of it and by module.
        warnings: where that is not what was asked for.
        way: how a small graph is run, where other ways than the usual may have been tried.
        tiny: whether they were now.
        seconds: what each stage took; started, when the job was made.
    """

    call: Callable[..., Any]
    dynamic: Dims
    backward: Any
    siblings: Sequence[Plan] = ()
    look: Look | None = None
    apart: Any = None
    began: Generation | None = None
    pause: Callable[[], None] | None = None
    lenient: bool = False
    candidate: bool = False
    lowering: Lowering | None = None
    ahead: Any = None
    # What is found on the way:
    fingerprint: Fingerprint | None = None
    details: Mapping[str, Mapping[str, str]] | None = None
    source: Path | None = None
    hint: str = ""
    imported: bool = False
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    model: Any = None
    in_range: str | None = None
    precision_run: str | None = None
    modules_run: Mapping[str, str] = dataclasses.field(default_factory=dict)
    warnings: Sequence[PrecisionWarning] = ()
    way: str | None = None
    tiny: bool = False
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    started: float = dataclasses.field(default_factory=time.perf_counter)

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [leaf for leaf in self.leaves if isinstance(leaf, torch.Tensor)]

    def __post_init__(self) -> None:
        self._weights = self._versions()

    def weights_moved(self) -> bool:
        """Whether a weight or a buffer was written to or replaced since the job was made (or, where
        `began` tells, anything else of the module): what was captured is then neither of what the
        fingerprint says nor of what stands now."""
        changed = self.began is not None and not self.began.holds()
        return changed or self._versions() != self._weights

    @contextlib.contextmanager
    def proving(self, entry: Entry | None, let_go: Callable[[], None]) -> Iterator[None]:
        """A published graph is proved inside. Where that raises, its file is let go of; where it
        ends in BuildStopped, and where weights have moved meanwhile, its entry goes again."""
        try:
            yield
            if self.weights_moved():
                raise BuildStopped(MOVED)
        except BaseException as error:
            let_go()
            if isinstance(error, BuildStopped) and entry is not None:
                self.store.discard(entry)
            raise

    def _versions(self) -> list[tuple[int, int, int | bytes | None]]:
        held = chain(*tensors_of(self.module))
        return [(id(t), place_of(t), stamp(t)) for _, t in held]

    @property
    def identity(self) -> dict[str, Any]:
        """What a manifest says of the module from the beginning."""
        parts = {} if self.fingerprint is None else dict(self.fingerprint.parts)
        name = type(self.module).__qualname__
        return {"module": name, "method": self.method, "fingerprint": parts}

    def note_details(self) -> None:
        """Note of what the fingerprint was made, before calls of our own change any of it."""
        if self.fingerprint is not None:
            with contextlib.suppress(Unkeyable):  # changed meanwhile
                self.details = self.fingerprint.details(self.module, self.method)

    def keep_details(self, directory: Path) -> None:
        """Write into an entry what `ovshim.cache.why_miss` looks differences up in."""
        if self.details is not None:
            write_details(directory, self.details)

    @property
    def ran_as(self) -> str:
        """What OpenVINO was told, and what it ran then: where the processor has no unit for bf16,
        or a stream has one thread, that is f32, and a proof of it says nothing of bf16."""
        return f"{self.hint} as {self.precision_run}"

    @property
    def hurried(self) -> bool:
        """Whether somebody waits for the answer to a call until this is built."""
        return self.lenient and self.awaited

    @property
    def awaited(self) -> bool:
        """Whether somebody waits for this very plan: not where another thread makes it, and not
        for one of several candidates."""
        return self.apart is None and not self.candidate

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Times a stage, and ends the build before one that has no time left."""
        self.check_time()
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started

    def check_time(self) -> None:
        """Raises BuildStopped where no time is left, and what a signal handler has raised."""
        raise_heard()
        if self.pause is not None:
            self.pause()
        if self.seconds_left() == 0.0:
            raise BuildStopped(reason("build-too-slow", f"{self.options.max_build_seconds:g} s"))

    def seconds_left(self) -> float:
        """What is left of `max_build_seconds`, 0 at least."""
        spent = time.perf_counter() - self.started
        return max(0.0, self.options.max_build_seconds - spent)

    def tried_in_child(self, build: Callable[[], Any]) -> Outcome:
        """How a child process fares with the job's build, within the time that is left."""
        from ovshim.child import try_in_child

        threads = self.placement["threads"]

        def build_as_here() -> Any:
            # The child has one thread of torch's; OpenVINO is to do there what it would do here.
            self.options = dataclasses.replace(self.options, threads=threads)
            return build()

        return try_in_child(build_as_here, self.seconds_left())

    def race_seconds(self) -> float:
        """What a race may take: a quarter of what is left, and never long."""
        return min(_RACE_SECONDS, self.seconds_left() / 4)

    def arguments(
        self, leaves: Sequence[Any] | None = None
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of the call that these leaves, or the example's, are."""
        given = self.kind.requiring(self.leaves if leaves is None else leaves)
        return unflatten_call(given, self.kind.structure)

    def call_with(self, leaves: Sequence[Any]) -> Any:
        """Eager's answer to these leaves."""
        args, kwargs = self.arguments(leaves)
        return self.call(*args, **kwargs)

    def leaves_with(self, tensors: Sequence[torch.Tensor]) -> list[Any]:
        """The example's leaves with other tensors in the place of its own."""
        given = iter(tensors)
        return [next(given) if isinstance(x, torch.Tensor) else x for x in self.leaves]

    def copies(self) -> list[Any]:
        """The example's leaves with copies of their tensors, that lie in memory as these do; what
        is one object stays one."""
        made = {id(t): copied(t) for t in self.tensors}
        copies = [made[id(x)] if isinstance(x, torch.Tensor) else x for x in self.leaves]
        return self.kind.requiring(copies)

    def open_sizes(self, pattern: Pattern, pinned: frozenset[tuple[int, int]]) -> None:
        """Open the sizes in which this job differs from an entry: somebody has built for the same
        module with others, so they do change. Not those that the entry's proof has refused."""
        dynamic = [set(dims) for dims in self.dynamic]
        for t, (tensor, known) in enumerate(zip(self.tensors, pattern, strict=True)):
            for d, (mine, other) in enumerate(zip(tensor.shape, known, strict=True)):
                if other != mine and (t, d) not in pinned:
                    dynamic[t].add(d)
        self.dynamic = tuple(frozenset(dims) for dims in dynamic)


def versions() -> dict[str, str]:
    """Of everything that has a part in what is built."""
    return {
        "numpy": np.__version__,
        "openvino": runtime.version(),
        "ovshim": exact_version(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
