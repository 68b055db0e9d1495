"""Plots as SVG: seconds, or bytes, over an axis, both by powers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

__all__ = ["plot"]

_WIDTH, _HEIGHT = 560, 340
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 20, 40, 50
_COLOURS = ("#c44e52", "#4c72b0", "#55a868")
_STEPS = (1, 2, 5)

# x, and the median with the quartiles around it
Curve = Sequence[tuple[float, float, float, float]]


def plot(title: str, x_label: str, y_label: str, curves: Mapping[str, Curve]) -> str:
    """The picture.

    Args:
        curves: by name; the points of each are (x, median, lower quartile, upper quartile), all
            above 0.
    """
    xs = [x for curve in curves.values() for x, *_ in curve]
    ys = [y for curve in curves.values() for _, *three in curve for y in three]
    across = _Scale(min(xs), max(xs), _LEFT, _WIDTH - _RIGHT)
    up = _Scale(min(ys), max(ys), _HEIGHT - _BOTTOM, _TOP)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
        f'<text x="{_LEFT}" y="20" font-size="14">{escape(title)}</text>',
        *_grid(across, up),
        *_labels(x_label, y_label),
    ]
    for n, (name, curve) in enumerate(curves.items()):
        parts += _drawn(curve, across, up, _COLOURS[n % len(_COLOURS)])
        parts += _legend(name, n, _COLOURS[n % len(_COLOURS)])
    return "\n".join([*parts, "</svg>"]) + "\n"


class _Scale:
    """Logarithms of values, laid between two places of the picture."""

    def __init__(self, low: float, high: float, begin: float, end: float) -> None:
        if high <= low:
            low, high = low / 2, high * 2
        room = (high / low) ** 0.04
        self.low, self.high = low / room, high * room
        self._begin, self._end = begin, end

    def __call__(self, value: float) -> float:
        share = math.log(value / self.low) / math.log(self.high / self.low)
        return self._begin + share * (self._end - self._begin)

    @property
    def ticks(self) -> list[float]:
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        fine = [step * 10.0**n for n in powers for step in _STEPS]
        found = [value for value in fine if self.low <= value <= self.high]
        return found if len(found) < 10 else [v for v in found if math.log10(v) % 1 < 1e-9]


def _grid(across: _Scale, up: _Scale) -> list[str]:
    lines = []
    for value in across.ticks:
        x = across(value)
        lines.append(_line(x, _TOP, x, _HEIGHT - _BOTTOM))
        lines.append(_text(x, _HEIGHT - _BOTTOM + 16, f"{value:g}", "middle"))
    for value in up.ticks:
        y = up(value)
        lines.append(_line(_LEFT, y, _WIDTH - _RIGHT, y))
        lines.append(_text(_LEFT - 6, y + 4, f"{value:g}", "end"))
    return lines


def _labels(x_label: str, y_label: str) -> list[str]:
    middle = (_TOP + _HEIGHT - _BOTTOM) / 2
    return [
        _text((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 12, x_label, "middle"),
        f'<text transform="translate(16 {middle:.0f}) rotate(-90)" text-anchor="middle">'
        f"{escape(y_label)}</text>",
    ]


def _drawn(curve: Curve, across: _Scale, up: _Scale, colour: str) -> list[str]:
    there = [f"{across(x):.1f},{up(high):.1f}" for x, _, _, high in curve]
    back = [f"{across(x):.1f},{up(low):.1f}" for x, _, low, _ in reversed(curve)]
    middle = [(across(x), up(y)) for x, y, _, _ in curve]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in middle)
    return [
        f'<polygon points="{" ".join([*there, *back])}" fill="{colour}" opacity="0.2"/>',
        f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>',
        *(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in middle),
    ]


def _legend(name: str, n: int, colour: str) -> list[str]:
    x, y = _LEFT + 12, _TOP + 16 + 18 * n
    return [
        f'<rect x="{x}" y="{y - 9}" width="12" height="10" fill="{colour}"/>',
        _text(x + 18, y, name, "start"),
    ]


def _line(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="#dddddd"/>'


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
