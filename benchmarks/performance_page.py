"""docs/performance.md and its plots, made from one run."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path

from page import busy, facts_of
from plot import plot
from rows import markdown
from scaling import Axis, Point, head_of

__all__ = ["write"]

_TOP = """# Performance

Made by `nox -s bench -- performance --write-docs`; nobody edits it.

How the cost of a call grows: eager beside ovshim (`prefer="openvino"`, fp32, all guards of a call
included), in `torch.inference_mode()`, both in turns within one process. Lines are medians, bands
around them the quartiles of the rounds; the ratio says how many times as fast as eager ovshim is,
by medians, with the quartiles of the ratios round by round. One plan serves all sizes of an axis,
for batch and length are open. Models of full size are on the page of [benchmarks](benchmarks.md).
"""

_OF_MEMORY = """
Memory is that of the process, beyond what it had after the first plan. Kinds of calls have plans of
their own, of which the option `max_plans` (by default 16) keeps those that were used last.
"""


def write(axes: Mapping[str, Axis], load: float, docs: Path) -> Path:
    """Write the page, and its plots beside it in `plots`; returns the page's path.

    Args:
        load: the share of the processors that other programs took before the run.
    """
    plots = docs / "plots"
    plots.mkdir(exist_ok=True)
    lines = [_TOP, *busy(load), *markdown(("measured on", ""), facts_of(load))]
    for axis in axes.values():
        picture = plots / f"{axis.name}.svg"
        picture.write_text(_picture(axis), encoding="utf-8")
        lines += ["", f"## By {axis.name}", "", f"{axis.model}; {axis.title}.", ""]
        lines += [f"![{axis.title}](plots/{picture.name})", ""]
        if axis.name == "kinds":
            lines += [_OF_MEMORY.strip(), ""]
        lines += _table(axis)
    path = docs / "performance.md"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _table(axis: Axis) -> list[str]:
    cells = [point.cells() for point in axis.points]
    head = head_of(axis)
    kept = [n for n in range(len(head)) if any(row[n] for row in cells)]
    return markdown([head[n] for n in kept], ([row[n] for n in kept] for row in cells))


def _picture(axis: Axis) -> str:
    if not axis.points[0].eager:
        grown = [(point.x, max(1.0, (point.memory or 0) / 1e6)) for point in axis.points]
        curve = {"ovshim": [(x, y, y, y) for x, y in grown]}
        return plot(axis.model, axis.title, "MB more than with one plan", curve)
    curves = {
        "eager": [_spot(point, point.eager) for point in axis.points],
        "ovshim": [_spot(point, point.ovshim) for point in axis.points],
    }
    return plot(axis.model, axis.title, "ms a call", curves)


def _spot(point: Point, samples: tuple[float, ...]) -> tuple[float, float, float, float]:
    low, middle, high = (1e3 * q for q in statistics.quantiles(samples, n=4, method="inclusive"))
    return point.x, middle, low, high
