"""The generators of random numbers that all threads share, torch's, Python's and NumPy's, and those
that a program keeps for itself: whether a call draws from them, or another thread did meanwhile."""

from __future__ import annotations

import contextlib
import logging
import pickle
import random
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from ovshim.modes import Operators
from ovshim.outside import own_generators
from ovshim.signals import let_through
from ovshim.watched import watched

__all__ = ["GeneratorStates", "drawn_by", "seeded"]

log = logging.getLogger("ovshim")

# Calls of which each was disturbed, and nobody seen who did it, until it is taken for their own.
_TRIES = 3


class GeneratorStates:
    """Where all of them stand.

    The shared ones go by names, "torch", "python", "numpy"; the program's own by themselves.
    """

    @staticmethod
    def of(module: nn.Module) -> GeneratorStates:
        """With the program's own generators that the module may draw from, where they can be
        found."""
        try:
            return GeneratorStates(own_generators(module))
        except Exception as error:  # whatever a program's own kind of generator does
            let_through(error)
            log.debug("no generators of the program's own are looked for", exc_info=True)
            return GeneratorStates()

    def __init__(self, own: Iterable[Any] = ()) -> None:
        self._own = [(generator, _state(generator)) for generator in own]
        self._torch, self._python = torch.get_rng_state(), random.getstate()
        self._numpy: Any = np.random.get_state()

    @property
    def has_own(self) -> bool:
        """Whether there are any of the program's own."""
        return bool(self._own)

    def moved(self) -> frozenset[Any]:
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
        own = (one for one, state in self._own if not _alike(_state(one), state))
        return frozenset((*(name for name, same in stayed.items() if not same), *own))

    def put_back(self, names: Collection[Any]) -> None:
        """Only what a call of ours has drawn from: others go on where others have left them."""
        if "torch" in names:
            torch.set_rng_state(self._torch)
        if "python" in names:
            random.setstate(self._python)
        if "numpy" in names:
            np.random.set_state(self._numpy)
        for generator, state in self._own:
            if generator in names:
                _set_state(generator, state)


def _state(generator: Any) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, random.Random):
        return generator.getstate()
    if isinstance(generator, np.random.RandomState):
        return generator.get_state(legacy=False)
    return generator.bit_generator.state


def _alike(mine: Any, other: Any) -> bool:
    if isinstance(mine, torch.Tensor):
        return torch.equal(mine, other)
    return pickle.dumps(mine) == pickle.dumps(other)


def _set_state(generator: Any, state: Any) -> None:
    if isinstance(generator, random.Random):
        generator.setstate(state)
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    else:
        generator.set_state(state)


@contextlib.contextmanager
def seeded(names: Collection[Any]) -> Iterator[None]:
    """Of these, the same numbers each time; they are left as they were."""
    before = GeneratorStates(_own(names))
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


def _own(names: Collection[Any]) -> list[Any]:
    return [name for name in names if not isinstance(name, str)]


def drawn_by(call: Callable[[], Any], moved: Collection[Any]) -> frozenset[Any]:
    """From which of the generators that have moved in a call it was the call that drew, or that
    seeded them. It is made again, more than once where nobody is seen to draw.

    Of torch's its operators tell. Python's functions are seen when Python calls them, as torch's
    seeding is; NumPy's are never. So a generator that a call leaves where it stood is not the
    call's, nor is one that moves as well while nothing is called.

    Raises whatever the call raises.
    """
    drawn: set[Any] = set()
    suspected = set(moved) - {"torch"}
    for _ in range(_TRIES):
        _step(suspected)
        before, started = GeneratorStates(_own(moved)), time.perf_counter()
        with Operators() as operators, watched() as seen:
            call()
        seconds = time.perf_counter() - started
        drawn.update(seen.generators, ("torch",) if operators.drawn else ())
        suspected = (suspected & before.moved()) - drawn
        before = GeneratorStates(_own(moved))
        if suspected:
            time.sleep(seconds)
            suspected -= before.moved()
        if not suspected:
            break
    return frozenset((drawn | suspected) & set(moved))


def _step(names: Collection[Any]) -> None:
    """A call that seeds would leave them where its last one has left them."""
    if "python" in names:
        random.random()
    for generator in _own(names):
        if isinstance(generator, torch.Generator):
            torch.rand((), generator=generator, device=generator.device)
        else:
            generator.random() if hasattr(generator, "random") else generator.random_sample()
    if "numpy" in names:
        np.random.random_sample()
