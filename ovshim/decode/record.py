"""What the manifest of an entry says of a captured step."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ovshim.cache import Entry
from ovshim.guards import ValueGuard, checked_size_guard, from_json, to_json
from ovshim.reasons import TABLE, Reason
from ovshim.record import checked_rest

__all__ = ["StepRecord"]

# From the module that was captured to the user's.
_TO_MODULE = (("attr", "run"), ("attr", "__self__"))


@dataclasses.dataclass(frozen=True)
class StepRecord:
    """A captured step, as it is kept.

    Attributes:
        size_guards, value_guards, code, route, checked: see `capture.Captured`; value guards lead
            from the user's module, not from the step.
        properties: OpenVINO's, beside those of the options.
        most: the greatest length, the past included, for which it was proved; None: no end.
        conventions: see `decoding.Ready`.
        error: the largest relative L2 error found.
        met: buckets of sizes at which it was found right.
        race: medians and quartiles, by processor and threads.
        long_steps: what `LongSteps` keeps, by the same.
        rest: for compressed weights, what is fastest around them, by processor and threads.
        proved_in: what OpenVINO was told in whole proofs, and what it ran.
        verdict: why eager serves in its place, where that was found for good.
        processor: the only one for which the verdict holds; empty: it holds for all.
    """

    size_guards: tuple[str, ...] = ()
    value_guards: tuple[ValueGuard, ...] = ()
    code: tuple[str, ...] | None = None
    asks: tuple[str, ...] | None = None
    route: str = ""
    checked: bool = False
    properties: tuple[tuple[str, str], ...] = ()
    most: int | None = None
    conventions: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    error: float = 0.0
    met: tuple[tuple[int, ...], ...] = ()
    race: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    long_steps: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    rest: Mapping[str, str] = dataclasses.field(default_factory=dict)
    proved_in: tuple[str, ...] = ()
    verdict: Reason | None = None
    processor: str = ""

    @staticmethod
    def of_module(guards: Iterable[ValueGuard], replaced: Sequence[str]) -> tuple[ValueGuard, ...]:
        """The guards of a captured step that speak of the user's module and of what it reads.

        Left out are those on the step itself, and how many entries the registries of a library
        have: they grow whenever another class is used for the first time.

        Args:
            replaced: paths of submodules whose forward was another in the capture; what they hold
                in attributes the generation knows of itself.
        """
        kept = []
        for guard in guards:
            if guard.root == "module" and guard.path[:2] == _TO_MODULE:
                guard = dataclasses.replace(guard, path=guard.path[2:])
                if not any(_leads_into(guard, path) for path in replaced):
                    kept.append(guard)
            elif guard.root.startswith("import:") and not _counts(guard):
                kept.append(guard)
        return tuple(kept)

    def to_json(self) -> dict[str, Any]:
        """The section "graph" of a manifest: what is known when the step is captured."""
        return {
            "signature": "a step of decoding",
            "size_guards": list(self.size_guards),
            "value_guards": to_json(self.value_guards),
            "code": None if self.code is None else list(self.code),
            "asks": None if self.asks is None else list(self.asks),
            "route": self.route,
            "checked": self.checked,
            "processor": self.processor,
        }

    def proof_to_json(self) -> dict[str, Any]:
        """The section "proof"."""
        return {
            "properties": [list(pair) for pair in self.properties],
            "most": self.most,
            "conventions": dict(self.conventions),
            "error": self.error,
            "proved_in": list(self.proved_in),
            "met": [list(sizes) for sizes in self.met],
        }

    @staticmethod
    def of_entry(entry: Entry, ranks: Sequence[int]) -> StepRecord:
        """The record that a manifest holds.

        Args:
            ranks: of all that the captured step takes.

        Raises KeyError, TypeError, ValueError or BadGuardError where it holds none.
        """
        graph, verdict = entry.manifest["graph"], entry.manifest.get("verdict")
        if verdict is not None:
            return StepRecord(verdict=_reason(verdict), processor=str(graph.get("processor", "")))
        proof = entry.manifest["proof"]  # without one it was never proved
        most = proof["most"]
        return StepRecord(
            size_guards=tuple(checked_size_guard(text, ranks) for text in graph["size_guards"]),
            value_guards=from_json(graph["value_guards"]),
            code=None if graph["code"] is None else tuple(map(str, graph["code"])),
            asks=None if graph["asks"] is None else tuple(map(str, graph["asks"])),
            route=str(graph["route"]),
            checked=bool(graph["checked"]),
            properties=tuple((str(k), str(v)) for k, v in proof["properties"]),
            most=None if most is None else int(most),
            conventions=dict(proof["conventions"]),
            error=float(proof["error"]),
            proved_in=tuple(map(str, proof.get("proved_in", ()))),
            met=tuple(tuple(map(int, one)) for one in entry.manifest.get("met") or proof["met"]),
            race=dict(entry.manifest.get("race") or {}),
            long_steps=dict(entry.manifest.get("long_steps") or {}),
            rest=checked_rest(entry.manifest.get("rest")),
        )


def _leads_into(guard: ValueGuard, path: str) -> bool:
    # Children are reached by attribute, by item, or through `_modules`.
    names = [str(key) for _, key in guard.path if key != "_modules"]
    return names[: path.count(".") + 1] == path.split(".")


def _reason(stored: Mapping[str, Any]) -> Reason:
    if stored["code"] not in TABLE:
        raise ValueError(f"{stored['code']!r} is no reason")
    return Reason(stored["code"], str(stored["message"]), str(stored["remedy"]))


def _counts(guard: ValueGuard) -> bool:
    """Whether it speaks of how many entries there are, or of their places."""
    return guard.test in ("length", "keys") or any(how == "nth" for how, _ in guard.path)
