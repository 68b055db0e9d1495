"""What Dynamo found out about sizes: which stayed open, and what it assumed of those."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from ovshim.guards import BadGuardError, checked_size_guard
from ovshim.signature import Pattern

if TYPE_CHECKING:
    from ovshim.capture import Request
    from ovshim.capture.sources import Sources

__all__ = ["read_sizes"]

log = logging.getLogger("ovshim")


def read_sizes(env: Any, sources: Sources, request: Request) -> tuple[Pattern, tuple[str, ...]]:
    """The pattern and the size guards of a capture.

    A size that Dynamo fixed is static. Two sizes that it found equal, or bound by arithmetic, are
    so by a guard. A guard that cannot be written in plain integer arithmetic pins the sizes it
    speaks of to those of the example: fewer calls are served, none wrongly.
    """
    reader = _Reader(env, sources, request)
    return reader.pattern(), tuple(dict.fromkeys(reader.guards))


class _Reader:
    def __init__(self, env: Any, sources: Sources, request: Request) -> None:
        self.env = env
        self.request = request
        self.ranks = [tensor.dim() for tensor in request.tensors]
        self.places = sources.size_places(env.var_to_sources)
        self.guards: list[str] = []
        self.pinned: set[tuple[int, int]] = set()
        self.names: dict[Any, Any] = {}
        self._name_symbols()
        self._relate_sizes()
        self._read_guards()

    def pattern(self) -> Pattern:
        sizes = []
        for t, tensor in enumerate(self.request.tensors):
            dims = self.request.dynamic[t]
            open_ = [d in dims and (t, d) not in self.pinned for d in range(tensor.dim())]
            sizes.append(
                tuple(None if free else n for free, n in zip(open_, tensor.shape, strict=True))
            )
        return tuple(sizes)

    def _name_symbols(self) -> None:
        """Each symbol that stands for itself is named after the first size that it is."""
        import sympy

        for (t, d), symbol in self.places.items():
            canonical = self.env.replace(symbol)
            if isinstance(canonical, sympy.Symbol) and canonical not in self.names:
                self.names[canonical] = sympy.Symbol(f"s{t}[{d}]", integer=True)

    def _relate_sizes(self) -> None:
        for (t, d), symbol in self.places.items():
            canonical = self.env.replace(symbol)
            if canonical.is_number:
                self.pinned.add((t, d))
            elif self.names.get(canonical) is None or str(self.names[canonical]) != f"s{t}[{d}]":
                self._add(canonical, lambda text, t=t, d=d: f"s{t}[{d}] == {text}", (t, d))
            self._bound(canonical, t, d)

    def _bound(self, canonical: Any, t: int, d: int) -> None:
        """Limits that torch keeps as a range instead of a guard."""
        known = self.env.var_to_range.get(canonical)
        if known is None or canonical.is_number:
            return
        lower, upper = known.lower, known.upper
        if lower.is_Integer and int(lower) > 0:
            self.guards.append(f"s{t}[{d}] >= {int(lower)}")
        if upper.is_Integer and int(upper) < 2**31:
            self.guards.append(f"s{t}[{d}] <= {int(upper)}")

    def _read_guards(self) -> None:
        for guard in self.env.guards:
            expression = self.env.replace(guard.expr)
            if not expression.is_Boolean or expression.free_symbols:
                self._add(expression, lambda text: text)

    def _add(self, expression: Any, form: Any, *also: tuple[int, int]) -> None:
        """Write a condition down, or pin every size that it speaks of."""
        from torch.utils._sympy.printers import PythonPrinter

        try:
            if not expression.free_symbols <= self.names.keys():
                raise BadGuardError("a symbol that is no size of an input")
            text = form(PythonPrinter().doprint(expression.xreplace(self.names)))
            self.guards.append(checked_size_guard(text, self.ranks))
        except (BadGuardError, NotImplementedError, TypeError) as error:
            log.debug("sizes of %s are pinned: %s", expression, error)
            self.pinned.update(also)
            self.pinned.update(
                place
                for place, symbol in self.places.items()
                if self.env.replace(symbol).free_symbols & expression.free_symbols
            )
