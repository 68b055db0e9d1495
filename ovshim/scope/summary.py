"""What became of a program's modules: one table, and the same for programs."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ovshim.plan import Plan
from ovshim.reasons import Reason, reason
from ovshim.scope.patient import Patient

__all__ = ["Row", "Summary", "row_of"]

_MOST_SHOWN = 20


@dataclasses.dataclass(frozen=True)
class Row:
    """One module.

    Attributes:
        module: name of its class.
        calls: number of calls by path: "openvino", "mixed", "eager", "training".
        eager_reasons: calls that eager served, by reason code.
        speedup: of the plan that served most, against eager; None where no race was run.
        saved: seconds that the calls would have taken longer in eager, by the races at the sizes
            of the plans' examples; None where there was no race. Builds are not counted in.
        built: seconds that its plans took.
        why: why eager served where it did: the last reason (of the steps of `generate()`, the one
            that was met most often) as text; None where there was none but calls before the plan.
        plans: each plan, as `explain(...).to_dict()` has it.
    """

    module: str
    calls: Mapping[str, int]
    eager_reasons: Mapping[str, int]
    speedup: float | None
    saved: float | None
    built: float
    why: str | None
    plans: Sequence[Mapping[str, Any]]

    def to_dict(self) -> dict[str, Any]:
        """The row for programs: plain dicts, lists, strings and numbers."""
        return {
            "module": self.module,
            "calls": dict(self.calls),
            "eager_reasons": dict(self.eager_reasons),
            "speedup": self.speedup,
            "saved": self.saved,
            "built": self.built,
            "why": self.why,
            "plans": [dict(plan) for plan in self.plans],
        }


def row_of(
    cls: type, dispatcher: Patient | None, early: int, rested: int, trained: int
) -> Row | None:
    """The row of a module; None where it was never called but in training.

    Takes no lock: it may be asked for in the middle of anything, by the garbage collector.

    Args:
        early, rested, trained: calls that eager served before there was a dispatcher, past it, and
            in training mode.
    """
    plans: list[Plan] = []
    eager = {"seldom": early} if early else {}
    served = {"openvino": 0, "mixed": 0}
    why: Reason | None = reason("seldom")
    if dispatcher is not None:
        plans = dispatcher.standing
        served = {path: dispatcher.tally.served(path, plans) for path in served}
        for code, count in dispatcher.tally.eager.items():
            eager[code] = eager.get(code, 0) + count
        why = dispatcher.why
    if why is not None and why.code == "seldom" and any(served.values()):
        why = None  # it was called often enough since
    calls = {**served, "eager": sum(eager.values()) + rested, "training": trained}
    if sum(calls.values()) == trained:
        return None
    best = max(plans, key=lambda plan: plan.calls.value, default=None)
    return Row(
        module=cls.__qualname__,
        calls=calls,
        eager_reasons=eager,
        speedup=None if best is None else best.speedup,
        saved=_saved(plans),
        built=sum(sum(plan.seconds.values()) for plan in plans),
        why=None if why is None else why.message,
        plans=[plan.to_dict() for plan in plans],
    )


def _saved(plans: Sequence[Plan]) -> float | None:
    known = [
        plan.calls.value * (plan.medians[0] - plan.medians[1])
        for plan in plans
        if plan.medians is not None and plan.counted_as is not None
    ]
    return sum(known) if known else None


@dataclasses.dataclass(frozen=True)
class Summary:
    """What a scope has found, at one moment.

    `print` it, or take `to_dict()`.

    Attributes:
        rows: the modules, those that OpenVINO served most first.
        seconds: how long the scope has been there.
    """

    device: str
    rows: Sequence[Row]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """The same for programs: plain dicts, lists, strings and numbers."""
        return {
            "device": self.device,
            "seconds": self.seconds,
            "saved": self._total("saved"),
            "built": self._total("built"),
            "modules": [row.to_dict() for row in self.rows],
        }

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write `to_dict()` as JSON. Raises OSError."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2, default=str), encoding="utf-8")

    def _total(self, name: str) -> float:
        return float(sum(getattr(row, name) or 0.0 for row in self.rows))

    def __str__(self) -> str:
        served = sum(row.calls["openvino"] + row.calls["mixed"] for row in self.rows)
        every = sum(sum(row.calls.values()) for row in self.rows)
        lines = [
            f"ovshim: {served} of {every} calls in OpenVINO on {self.device}, "
            f"{self._total('saved'):.1f} s saved, {self._total('built'):.1f} s building"
        ]
        if not self.rows:
            return "ovshim: no module was called in evaluation mode"
        lines += _table(self.rows[:_MOST_SHOWN])
        if len(self.rows) > _MOST_SHOWN:
            lines.append(f"  and {len(self.rows) - _MOST_SHOWN} more")
        return "\n".join(lines)


def _table(rows: Sequence[Row]) -> list[str]:
    head = ("module", "openvino", "mixed", "eager", "speedup", "saved s", "build s", "how, or why")
    cells = [head, *(_cells(row) for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head) - 1)]
    lines = []
    for row in cells:
        numbers = [text.rjust(width) for text, width in zip(row[1:-1], widths[1:], strict=True)]
        lines.append("  " + "  ".join([row[0].ljust(widths[0]), *numbers, row[-1]]).rstrip())
    return lines


def _cells(row: Row) -> tuple[str, ...]:
    served = [plan for plan in row.plans if plan["path"] != "eager"]
    how = {_how(plan) for plan in served}
    eager = row.calls["eager"] + row.calls["training"]
    return (
        row.module,
        str(row.calls["openvino"]),
        str(row.calls["mixed"]),
        str(eager),
        "-" if row.speedup is None else f"{row.speedup:.2f}x",
        "-" if row.saved is None or not served else f"{row.saved:.1f}",
        f"{row.built:.1f}",
        ", ".join(sorted(how)) or row.why or "in training mode",
    )


def _how(plan: Mapping[str, Any]) -> str:
    if plan["path"] == "mixed":
        return f"{len(plan['parts'])} submodules"
    found = "cached" if plan["cache"] == "hit" else "built now"
    return f"{plan['precision_run']}, {found}"
