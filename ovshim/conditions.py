"""Many small conditions as one compiled function.

What is asked on every call is asked by one expression whose operands are its globals: a method that
goes through lists of its own spends half of its time on loops, generators and attributes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ovshim.signals import let_through

__all__ = ["Conditions"]

# Read at once in one expression, more nest too deeply for the compiler.
_AT_ONCE = 200


class Conditions:
    """Gathers conditions; they are asked in the order in which they were added.

    Args:
        false_if_raised: exceptions that mean that the conditions do not hold.
    """

    def __init__(self, *false_if_raised: type[Exception]) -> None:
        self._texts: list[str] = []
        self._scope: dict[str, Any] = {"raised": false_if_raised, "let_through": let_through}

    def add(self, text: str, *operands: Any) -> None:
        """A condition as a Python expression, in which `{0}`, `{1}` and so on are the operands."""
        names = [f"v{len(self._scope) + i}" for i in range(len(operands))]
        self._scope.update(zip(names, operands, strict=True))
        self._texts.append(text.format(*names))

    def compiled(self) -> Callable[[], bool]:
        """A function that tells whether all of them hold."""
        lines = ["def holds():", "    try:"]
        for start in range(0, len(self._texts), _AT_ONCE):
            together = " and ".join(f"({text})" for text in self._texts[start : start + _AT_ONCE])
            lines.append(f"        if not ({together}): return False")
        lines += ["        return True", "    except raised as error:"]
        lines += ["        let_through(error)", "        return False"]
        exec("\n".join(lines), self._scope)
        # Not left there: in a cycle it would keep tensors until Python's collector comes by.
        return self._scope.pop("holds")  # type: ignore[no-any-return]
