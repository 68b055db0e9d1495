"""What the manifest of an entry says of a graph: its sizes, guards, proof and races."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ovshim.cache.entry import Entry
from ovshim.guards import ValueGuard, checked_size_guard, from_json, sizes_hold, to_json
from ovshim.reasons import TABLE, Reason
from ovshim.shapes import Dims
from ovshim.signature import Kind, Pattern, TensorLeaf, describe, fits
from ovshim.views import View, Views

if TYPE_CHECKING:
    from ovshim.capture import Captured
    from ovshim.proof import Proof

__all__ = ["LADDER", "Record", "Rung", "checked_rest"]


@dataclasses.dataclass(frozen=True)
class Rung:
    """One way of building, on the ladder that is climbed while proofs fail.

    Attributes:
        name: as reports show it; empty for the usual way.
        sizes: "asked": those dimensions open that the job wants; "all": every dimension; "none".
        properties: OpenVINO's, beside those of the options.
    """

    name: str = ""
    sizes: str = "asked"
    properties: tuple[tuple[str, str], ...] = ()


# Tried in this order while compiling or proving fails. Each has cured a miscompiled graph: a mask
# expanded into attention on dynamic shapes and a decoder's prefill (snippets off), a length equal
# to the width of a head (every size open).
LADDER = (
    Rung(),
    Rung("snippets off", properties=(("SNIPPETS_MODE", "DISABLE"),)),
    Rung("all sizes open", sizes="all"),
    Rung("static sizes", sizes="none"),
)
# Of the inputs of the small proof. No manifest of ours says more, and one of others must not make
# this process take all the memory there is.
_MOST_ELEMENTS = 1 << 28


@dataclasses.dataclass(frozen=True)
class Record:
    """A captured graph, as it is kept.

    Attributes:
        pattern: the sizes that it may be asked for: those captured, less those pinned by the proof.
        size_guards, value_guards: what the capture has taken for granted.
        route, rung: how it was captured, and by which rung of the ladder it was built.
        checked: whether the graph's last output says whether all indices were in range.
        any_mode: whether it would be the same with grad mode switched over.
        asks: what its code asks of tensors, strides and flags; None: not known.
        views: leaves of the output that are taken of computed ones.
        code: qualified names of the functions that were captured; None: not known.
        pinned: (tensor, dimension) whose other sizes the capture or the proof has refused.
        outputs, dtypes: of the computed tensors, in order: which leaves of the output they are, and
            their dtypes.
        limits: the smallest and the largest value that a tensor may hold, by its index.
        error, sizes: of the proof: largest relative L2 error, and the smallest sizes proved.
        met: all sizes at which it was found right.
        proved_in: what OpenVINO was told in whole proofs, and what it ran.
        verdict: why eager serves in its place, where that was found for good.
        processor: the only one for which the verdict holds; empty: it holds for all.
        race: how eager and the plan came out, as `Finish.to_json` gives it, by processor, threads
            and sizes; and in rows that say `alone`, the open graph and one for these sizes.
        lowered: what became of the captured graph by `lowering`, as reports show it.
        rest: where something is integers, what the rest is fastest in, by processor and threads.
        ways: for tiny graphs, how they run fastest, by processor, threads and sizes.
    """

    pattern: Pattern
    size_guards: tuple[str, ...]
    value_guards: tuple[ValueGuard, ...]
    route: str
    outputs: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]
    checked: bool = False
    any_mode: bool = False
    asks: tuple[str, ...] | None = None
    views: Views = dataclasses.field(default_factory=dict)
    code: tuple[str, ...] | None = None
    rung: Rung = Rung()
    pinned: frozenset[tuple[int, int]] = frozenset()
    limits: Mapping[int, tuple[int, int]] = dataclasses.field(default_factory=dict)
    error: float = 0.0
    sizes: tuple[tuple[int, ...], ...] = ()
    met: tuple[tuple[tuple[int, ...], ...], ...] = ()
    proved_in: tuple[str, ...] = ()
    verdict: Reason | None = None
    processor: str = ""
    race: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    lowered: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    rest: Mapping[str, str] = dataclasses.field(default_factory=dict)
    ways: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @staticmethod
    def of_capture(captured: Captured, leaves: Sequence[Any], rung: Rung, asked: Dims) -> Record:
        """The record of a graph that is not proved yet.

        Args:
            leaves: those of eager's output.
            asked: the dimensions that were to stay open; those that the capture has fixed all the
                same are pinned.
        """
        computed = [leaves[i] for i in captured.outputs]
        open_ = {(t, d) for t, dims in enumerate(asked) for d in dims}
        fixed = {(t, d) for t, d in open_ if captured.pattern[t][d] is not None}
        return Record(
            pattern=captured.pattern,
            size_guards=captured.size_guards,
            value_guards=captured.value_guards,
            route=captured.route,
            outputs=captured.outputs,
            dtypes=tuple(x.dtype if isinstance(x, torch.Tensor) else torch.int64 for x in computed),
            checked=captured.checked,
            any_mode=captured.any_mode,
            asks=captured.asks,
            views=captured.views,
            code=captured.code,
            pinned=frozenset(fixed),
            rung=rung,
        )

    def proved(
        self,
        found: Proof,
        example: Sequence[Sequence[int]],
        ran_as: str,
        limits: Mapping[int, tuple[int, int]],
    ) -> Record:
        """The record with what a proof at the sizes of `example` has found.

        Args:
            ran_as: what OpenVINO was told, and what it ran.
            limits: further ones, that nothing needs to be asked for.
        """
        return dataclasses.replace(
            self.pin(found.pinned, example),
            proved_in=(*self.proved_in, ran_as),
            error=max(found.error, self.error),
            sizes=found.sizes,
            met=found.met,
            limits={**limits, **found.limits},
        )

    def pin(self, places: frozenset[tuple[int, int]], example: Sequence[Sequence[int]]) -> Record:
        """The record with the example's sizes at these places, (tensor, dimension)."""
        pattern = tuple(
            tuple(example[t][d] if (t, d) in places else n for d, n in enumerate(dims))
            for t, dims in enumerate(self.pattern)
        )
        return dataclasses.replace(self, pattern=pattern, pinned=places | self.pinned)

    @property
    def computed(self) -> tuple[torch.dtype, ...]:
        """The dtypes of all that the graph computes: the outputs, and whether they may be used."""
        return (*self.dtypes, torch.bool) if self.checked else self.dtypes

    def opens(self, asked: Dims) -> bool:
        """Whether all the dimensions are open that should be, but for those that cannot."""
        return all(
            self.pattern[t][d] is None or (t, d) in self.pinned
            for t, dims in enumerate(asked)
            for d in dims
        )

    def fits(self, sizes: Sequence[Sequence[int]]) -> bool:
        """Whether a call of these sizes may be served."""
        exact = tuple(map(tuple, sizes))
        alike = all(fits(mine, dims) for mine, dims in zip(sizes, self.pattern, strict=True))
        return alike and sizes_hold(self.size_guards, exact)

    # --- as JSON ------------------------------------------------------------------------------

    def graph(self, kind: Kind) -> dict[str, Any]:
        """The section "graph" of a manifest: what is known when the graph is captured."""
        return {
            "signature": describe(kind, self.pattern),
            "pattern": [list(dims) for dims in self.pattern],
            "size_guards": list(self.size_guards),
            "value_guards": to_json(self.value_guards),
            "route": self.route,
            "code": None if self.code is None else list(self.code),
            "outputs": list(self.outputs),
            "checked": self.checked,
            "any_mode": self.any_mode,
            "asks": None if self.asks is None else list(self.asks),
            "views": [[leaf, *view.to_json()] for leaf, view in self.views.items()],
            "dtypes": [str(dtype).removeprefix("torch.") for dtype in self.dtypes],
            "rung": [self.rung.name, self.rung.sizes, [list(p) for p in self.rung.properties]],
            "lowered": dict(self.lowered),
            "processor": self.processor,
        }

    def variant(self, kind: Kind) -> str:
        """The name of the entry within its family."""
        text = json.dumps(self.graph(kind), sort_keys=True).encode()
        return hashlib.blake2b(text, digest_size=8).hexdigest()

    def proof(self, precision: str) -> dict[str, Any]:
        """The section "proof" of a manifest."""
        return {
            "error": self.error,
            "sizes": [list(dims) for dims in self.sizes],
            "met": [list(map(list, sizes)) for sizes in self.met],
            "pattern": [list(dims) for dims in self.pattern],
            "pinned": sorted(map(list, self.pinned)),
            "limits": {str(t): list(limit) for t, limit in self.limits.items()},
            "precision": precision,
            "proved_in": list(self.proved_in),
        }

    @staticmethod
    def of_entry(entry: Entry, kind: Kind) -> Record:
        """The record that a manifest holds.

        Raises where it holds none: whatever others may have written has no end of forms.
        """
        graph = entry.manifest["graph"]
        proof, verdict = entry.manifest.get("proof"), entry.manifest.get("verdict")
        proof = proof or {}
        ranks = [leaf.rank for leaf in kind.leaves if isinstance(leaf, TensorLeaf)]
        pattern = _pattern(proof.get("pattern", graph["pattern"]))
        if [len(dims) for dims in pattern] != ranks:
            raise ValueError("its sizes are not of this call")
        rungs = {rung.name: rung for rung in LADDER}
        return Record(
            pattern=pattern,
            size_guards=tuple(checked_size_guard(guard, ranks) for guard in graph["size_guards"]),
            value_guards=from_json(graph["value_guards"]),
            route=str(graph["route"]),
            code=None if graph["code"] is None else tuple(map(str, graph["code"])),
            checked=bool(graph["checked"]),
            any_mode=bool(graph["any_mode"]),
            asks=None if graph["asks"] is None else tuple(map(str, graph["asks"])),
            views={int(leaf): View.from_json(view) for leaf, *view in graph["views"]},
            outputs=tuple(map(int, graph["outputs"])),
            dtypes=tuple(_dtype(name) for name in graph["dtypes"]),
            rung=rungs[graph["rung"][0]],
            pinned=frozenset((int(t), int(d)) for t, d in proof.get("pinned", ())),
            limits=_limits(proof.get("limits", {})),
            error=float(proof.get("error", 0.0)),
            sizes=_small(_sizes(proof.get("sizes", ()), pattern)) if verdict is None else (),
            met=tuple(
                _sizes(m, pattern) for m in entry.manifest.get("met") or proof.get("met", ())
            ),
            proved_in=tuple(map(str, proof.get("proved_in", ()))),
            verdict=None if verdict is None else _reason(verdict),
            processor=str(graph["processor"]),
            race=dict(entry.manifest.get("race") or {}),
            lowered=dict(graph["lowered"]),
            rest=checked_rest(entry.manifest.get("rest")),
            ways=dict(entry.manifest.get("ways") or {}),
        )


def _pattern(stored: Sequence[Sequence[Any]]) -> Pattern:
    return tuple(tuple(None if n is None else int(n) for n in dims) for dims in stored)


def _limits(stored: Mapping[str, Sequence[Any]]) -> dict[int, tuple[int, int]]:
    limits = {int(t): (int(low), int(high)) for t, (low, high) in stored.items()}
    if any(not -(2**63) <= limit < 2**63 for both in limits.values() for limit in both):
        raise ValueError("its limits are no integers of 64 bits")
    return limits


def checked_rest(stored: Any) -> dict[str, str]:
    """What a manifest says of `floats`. Raises ValueError where it is nothing of the sort."""
    rest = dict(stored or {})
    if not set(rest.values()) <= {"fp32", "bf16"}:
        raise ValueError("its rest is in no precision")
    return rest


def _sizes(stored: Sequence[Sequence[Any]], pattern: Pattern) -> tuple[tuple[int, ...], ...]:
    sizes = tuple(tuple(map(int, dims)) for dims in stored)
    if not all(fits(mine, dims) for mine, dims in zip(sizes, pattern, strict=True)):
        raise ValueError("it was proved at sizes that are not its own")
    return sizes


def _small(sizes: tuple[tuple[int, ...], ...]) -> tuple[tuple[int, ...], ...]:
    if any(min(dims, default=0) < 0 or math.prod(dims) > _MOST_ELEMENTS for dims in sizes):
        raise ValueError("it was proved at sizes that cannot be")
    return sizes


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{name!r} is no dtype")
    return dtype


def _reason(stored: Mapping[str, Any]) -> Reason:
    if stored["code"] not in TABLE:
        raise ValueError(f"{stored['code']!r} is no reason")
    return Reason(stored["code"], str(stored["message"]), str(stored["remedy"]))
