"""What `explain` shows: every plan, where it runs, why, how exactly and how fast."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["Report"]


@dataclasses.dataclass(frozen=True)
class Report:
    """A snapshot of how an accelerated module has been served so far.

    `print` it, or take `to_dict()`, whose form is a public promise.

    Attributes:
        module: name of the module's class.
        device, precision: as the options say ("own": the module's own precision).
        calls: number of calls by path: "openvino", "mixed", "eager".
        eager: number of calls that eager served, by reason code.
        plans: one record per plan, as `to_dict` gives it.
        encoder: how the encoder was served that `generate()` calls on its own; None without one.
    """

    module: str
    device: str
    precision: str
    calls: Mapping[str, int]
    eager: Mapping[str, int]
    plans: Sequence[Mapping[str, Any]]
    encoder: Report | None = None

    def to_dict(self) -> dict[str, Any]:
        """The same for programs: plain dicts, lists, strings and numbers."""
        return {
            "module": self.module,
            "device": self.device,
            "precision": self.precision,
            "calls": dict(self.calls),
            "eager_reasons": dict(self.eager),
            "plans": [dict(plan) for plan in self.plans],
            "encoder": None if self.encoder is None else self.encoder.to_dict(),
        }

    def __str__(self) -> str:
        calls = ", ".join(f"{count} {path}" for path, count in self.calls.items() if count)
        lines = [
            f"{self.module} on {self.device}, {self.precision}: calls: {calls or 'none yet'}",
            *(f"  eager, {code}: {count}" for code, count in self.eager.items()),
        ]
        for plan in self.plans:
            lines += ["", *_plan_lines(plan)]
        if not self.plans:
            lines.append("  no plan yet")
        if self.encoder is not None:
            lines += ["", f"with the encoder {self.encoder}"]
        return "\n".join(lines)

    def html(self) -> str:
        """The same as a fragment of HTML."""
        import html

        return f"<pre>{html.escape(str(self))}</pre>"

    _repr_html_ = html


def _plan_lines(plan: Mapping[str, Any]) -> list[str]:
    mode = ", in grad mode" if plan["grad"] else ""
    lines = [f"  {plan['signature'] or 'no arguments'}{mode}"]
    reason = plan["reason"]
    if plan["path"] == "mixed":
        lines.append(f"    eager, with {len(plan['parts'])} submodules in OpenVINO")
        lines += [f"      {part['module']} ({part['class']})" for part in plan["parts"]]
        lines.append(f"    not as a whole: {reason['message']}")
    elif reason is not None:
        lines.append(f"    eager: {reason['message']}")
        lines.append(f"    remedy: {reason['remedy']}")
    else:
        error = "" if plan["error"] is None else f", error {plan['error']:.1e}"
        route = f", captured by {plan['route']}" if plan["route"] else ""
        preset = f" ({plan['preset']})" if plan["preset"] else ""
        kept = plan.get("keys_and_values")
        kept = f", keys and values in {kept}" if kept else ""
        lines.append(f"    OpenVINO in {plan['precision_run']}{preset}{kept}{error}{route}")
        lines += [f"      {path or '(root)'}: {ran}" for path, ran in plan["modules"].items()]
    lines += [_candidate_line(row) for row in plan["candidates"]]
    if plan["speedup"] is not None:
        lines.append(f"    {plan['speedup']:.2f}x eager's speed")
    lines += [
        _step_line(row) for row in plan["sizes"] if "medians" in row and row["path"] == "eager"
    ]
    seconds = ", ".join(f"{stage} {spent:.2f}" for stage, spent in plan["seconds"].items())
    if seconds:
        lines.append(f"    built in s: {seconds}")
    if plan["cache"] != "off":
        lines.append(f"    cache {plan['cache']}: {plan['cache_path']}")
    if plan["given_back"]:
        lines.append(f"    {plan['given_back'] / 1e6:.0f} MB of weights given back")
    if plan["guards"]:
        lines.append(f"    {len(plan['guards'])} guards: {'; '.join(plan['guards'][:4])}")
    lines.append(f"    calls: {plan['calls']}")
    return lines


def _step_line(row: Mapping[str, Any]) -> str:
    """Which long steps of a decoding are eager's."""
    rows, tokens, whole, _ = ((1 << bits >> 1, (1 << bits) - 1) for bits in row["bucket"])
    texts = [f"{low} to {high}" if low < high else str(low) for low, high in (tokens, whole, rows)]
    after = "" if tokens == whole else f" ({texts[1]} with the past)"
    eager, ours = (seconds * 1e3 for seconds in row["medians"])
    took = f"{eager:.3g} ms against {ours:.3g} ms"
    return f"    eager at steps of {texts[0]} tokens{after}, batch {texts[2]}: {took}"


def _candidate_line(row: Mapping[str, Any]) -> str:
    """One row of the table of what was tried for `precision="auto"`."""

    def cell(value: Any, text: str) -> str:
        return "" if value is None else text.format(value)

    cells = [
        f"{row['precision']:<5}",
        f"{cell(row['error'], 'error {:.1e}'):<13}",
        f"{cell(row['p99'], 'p99 {:.1e}'):<11}",
        f"{cell(row['speedup'], '{:.2f}x'):>6}",
        f"{cell(row['bytes'] and row['bytes'] / 1e6, '{:.1f} MB'):>9}",
    ]
    chosen = "chosen" if row["chosen"] else f"not chosen: {row['why']}"
    return f"      {'  '.join(cells)}  {chosen}"
