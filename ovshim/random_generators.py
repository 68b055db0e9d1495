"""The generators of random numbers that all threads share, torch's, Python's and NumPy's: whether a
call draws from them, or another thread did meanwhile."""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable, Collection, Iterator
from typing import Any

import numpy as np
import torch

from ovshim.modes import Operators
from ovshim.watched import watched

__all__ = ["GeneratorStates", "drawn_by", "seeded"]

# Calls of which each was disturbed, and nobody seen who did it, until it is taken for their own.
_TRIES = 3


class GeneratorStates:
    """Where all of them stand."""

    def __init__(self) -> None:
        self._torch, self._python = torch.get_rng_state(), random.getstate()
        self._numpy: Any = np.random.get_state()

    def moved(self) -> frozenset[str]:
        """Those that stand elsewhere by now, whoever drew."""
        now = GeneratorStates()
        stayed = {
            "torch": torch.equal(now._torch, self._torch),
            "python": now._python == self._python,
            # A dict of texts and numbers where the program has set another sort of generator.
            "numpy": repr(now._numpy) == repr(self._numpy)
            if isinstance(self._numpy, dict)
            else all(map(np.array_equal, now._numpy, self._numpy)),
        }
        return frozenset(name for name, same in stayed.items() if not same)

    def put_back(self, names: Collection[str]) -> None:
        """Only what a call of ours has drawn from: others go on where others have left them."""
        if "torch" in names:
            torch.set_rng_state(self._torch)
        if "python" in names:
            random.setstate(self._python)
        if "numpy" in names:
            np.random.set_state(self._numpy)


@contextlib.contextmanager
def seeded(names: Collection[str]) -> Iterator[None]:
    """Of these, the same numbers each time; they are left as they were."""
    before = GeneratorStates()
    if "torch" in names:
        torch.default_generator.manual_seed(0)
    if "python" in names:
        random.seed(0)
    if "numpy" in names:
        np.random.seed(0)
    try:
        yield
    finally:
        before.put_back(names)


def drawn_by(call: Callable[[], Any], moved: Collection[str]) -> frozenset[str]:
    """From which of the generators that have moved in a call it was the call that drew, or that
    seeded them. It is made again, more than once where nobody is seen to draw.

    Of torch's its operators tell. Python's functions are seen when Python calls them, as torch's
    seeding is; NumPy's are never. So a generator that a call leaves where it stood is not the
    call's, nor is one that moves as well while nothing is called.

    Raises whatever the call raises.
    """
    drawn: set[str] = set()
    suspected = set(moved) - {"torch"}
    for _ in range(_TRIES):
        _step(suspected)
        before, started = GeneratorStates(), time.perf_counter()
        with Operators() as operators, watched() as seen:
            call()
        seconds = time.perf_counter() - started
        drawn.update(seen.generators, ("torch",) if operators.drawn else ())
        suspected = (suspected & before.moved()) - drawn
        before = GeneratorStates()
        if suspected:
            time.sleep(seconds)
            suspected -= before.moved()
        if not suspected:
            break
    return frozenset((drawn | suspected) & set(moved))


def _step(names: Collection[str]) -> None:
    """A call that seeds would leave them where its last one has left them."""
    if "python" in names:
        random.random()
    if "numpy" in names:
        np.random.random_sample()
