"""Up to which integers a plan serves, as its proof can tell."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from ovshim.limits import integer_limits
from ovshim.plan import OutOfRangeError
from ovshim.verify import Mismatch


class Measure:
    """Eager, which refuses what `accepts` does not."""

    def __init__(self, accepts: Callable[[Tensor], bool] = lambda x: True) -> None:
        self.accepts = accepts

    def answer_or_none(self, given: Sequence[Tensor]) -> Any:
        return given[0] if self.accepts(given[0]) else None

    def judge(self, answer: Tensor, other: Tensor) -> float:
        if not torch.equal(answer, other):
            raise Mismatch("off")
        return 0.0


class Within:
    """Right up to `end`; beyond it is wrong, or says that it has no answer."""

    def __init__(self, end: int, checked: bool = False, tells: bool = False) -> None:
        self.end, self.checked, self.tells = end, checked, tells

    def answer(self, given: Sequence[Tensor]) -> Tensor:
        fits = int(given[0].abs().max()) <= self.end
        if not fits and self.tells:
            raise OutOfRangeError
        return given[0] if fits else given[0] + 1


def found(
    candidate: Within, example: Tensor, measure: Measure | None = None
) -> dict[int, tuple[int, int]]:
    generator = torch.Generator().manual_seed(0)
    eager: Any = measure or Measure()
    return integer_limits(eager, candidate, [example], [], generator)


@pytest.mark.parametrize("example", [torch.tensor([3]), torch.tensor([3, 1, 2])])
@pytest.mark.parametrize(
    ("end", "limit"),
    [(2**40, None), (2**22, 2**20), (70_000, 2**16), (5000, 2**12), (100, 12), (3, 3)],
)
def test_what_is_wrong_far_out_is_right_as_far_as_can_be(
    end: int, limit: int | None, example: Tensor
) -> None:
    limits = found(Within(end), example)
    if limit is None:
        assert limits == {}
    else:
        low, high = limits[0]
        assert high == limit
        assert low == (int(example.min()) if limit == 3 else -limit)


def test_what_the_graph_refuses_itself_has_no_limit() -> None:
    assert found(Within(100, tells=True), torch.tensor([3, 1])) == {}


def test_an_index_has_no_limit_where_the_graph_looks_after_it() -> None:
    table = Measure(lambda x: bool((x >= 0).all() and (x < 50).all()))
    assert found(Within(2**40, checked=True), torch.tensor([3, 1]), table) == {}
    assert found(Within(2**40), torch.tensor([3, 1]), table) == {0: (0, 4)}


def test_what_is_wrong_at_one_end_is_not_forgotten_for_the_other() -> None:
    table = Measure(lambda x: bool((x >= 0).all()))
    assert found(Within(1000, checked=True), torch.tensor([3]), table) == {0: (2, 4)}


def test_both_ends_are_asked_of_a_single_one() -> None:
    class NotBelow(Within):
        def answer(self, given: Sequence[Tensor]) -> Tensor:
            return given[0] if int(given[0].min()) >= -100 else given[0] + 1

    assert found(NotBelow(0), torch.tensor([30])) == {0: (22, 38)}
