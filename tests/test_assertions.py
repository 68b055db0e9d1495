"""What a module asserts of values: the graph asks for it, and where it fails eager raises."""

from pathlib import Path
from typing import Any

import pytest
import torch
from checks import check, eager_reasons, falls_back, plans, served
from modules import make
from torch import Tensor, nn

import ovshim


class Placed(nn.Module):
    """Features in the place of certain tokens, of which there have to be as many."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 4)
        self.features = nn.Linear(3, 4)

    def forward(self, ids: Tensor, pixels: Tensor) -> Tensor:
        states, features, here = self.table(ids), self.features(pixels), ids == 9
        torch._check_tensor_all(here.sum() * states.shape[-1] == features.numel())
        return states.masked_scatter(here[..., None], features).tanh()


def call(*places: int) -> tuple[Tensor, Tensor]:
    """A call in which the features of two pixels are to be at these places."""
    ids = torch.randint(0, 9, (2, 6))
    ids.view(-1)[list(places)] = 9
    return ids, torch.randn(2, 3)


def test_what_holds_is_served() -> None:
    module = make(Placed)
    fast = ovshim.accelerate(module, call(1, 8), prefer="openvino")
    assert [plan["reason"] for plan in plans(fast)] == [None]
    for places in ((1, 8), (0, 11), (3, 4), (5, 6)):
        check(fast, module, *call(*places))


@pytest.mark.parametrize("places", [(), (3,), (1, 2, 3), tuple(range(12))])
def test_what_does_not_hold_is_eagers_to_raise(places: tuple[int, ...]) -> None:
    module = make(Placed)
    fast = ovshim.accelerate(module, call(1, 8), prefer="openvino")
    given = call(*places)
    with pytest.raises(RuntimeError) as expected:
        module(*given)
    with pytest.raises(RuntimeError) as met, torch.inference_mode():
        fast(*given)
    assert str(met.value) == str(expected.value)
    assert eager_reasons(fast) == {"out-of-range": 1}
    check(fast, module, *call(2, 7))


@pytest.mark.parametrize("used", ["returned", "added"])
def test_what_is_asserted_and_used_stays_eagers(used: str) -> None:
    class Used(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Any:
            positive = (x > 0).all().item()
            torch._check(positive)
            y = self.linear(x)
            return (y, positive) if used == "returned" else y + int(positive)

    module = make(Used)
    with falls_back("value-dependent"):
        fast = ovshim.accelerate(module, torch.rand(3, 4) + 0.1, prefer="openvino")
        check(fast, module, torch.rand(3, 4) + 0.1, path="mixed")


class Scattered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor, mask: Tensor, source: Tensor) -> Tensor:
        return self.linear(x).masked_scatter(mask, source)


@pytest.mark.parametrize("shape", [(3, 5, 4), (3, 5, 1), (5, 1), (4,), (2, 3, 5, 4)])
def test_masked_scatter(shape: tuple[int, ...]) -> None:
    module = make(Scattered)
    x, source = torch.randn(3, 5, 4), torch.randn(31, 4)
    mask = torch.rand(shape) > 0.5
    fast = ovshim.accelerate(module, (x, mask, source), prefer="openvino")
    for other in (mask, ~mask, torch.zeros_like(mask), torch.ones_like(mask)):
        check(fast, module, x, other, source)


def test_masked_scatter_of_too_few() -> None:
    module = make(Scattered)
    x, mask = torch.randn(3, 5, 4), torch.rand(3, 5, 4) > 0.5
    fast = ovshim.accelerate(module, (x, mask, torch.randn(60)), prefer="openvino")
    check(fast, module, x, mask, torch.randn(60))
    few = (x, torch.ones_like(mask), torch.randn(59))
    for _ in range(3):
        with pytest.raises(RuntimeError, match="source"), torch.inference_mode():
            fast(*few)
    check(fast, module, x, mask, torch.randn(60))


class Filled(nn.Module):
    def forward(self, x: Tensor, source: Tensor) -> Tensor:
        return x.masked_scatter(x > 0, source)


@pytest.mark.slow
def test_masked_scatter_of_more_than_float32_counts() -> None:
    """OpenVINO counts in it, and takes 2 ** 24 + 1 for 2 ** 24."""
    module = make(Filled)
    both = {"x": {0: "places"}, "source": {0: "values"}}
    example = torch.ones(3), torch.randn(4)
    fast = ovshim.accelerate(module, example, prefer="openvino", dynamic_shapes=both)
    check(fast, module, torch.ones(5), torch.randn(7))
    many, source = torch.ones(2**24 + 1), torch.zeros(2**24)
    check(fast, module, -many, source, path=None)
    with pytest.raises(RuntimeError, match="source"), torch.inference_mode():
        fast(many, source)


class Remembering(nn.Module):
    """Notes its first call, and refuses some values after that, as models with images do."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.called = False

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            self.called = True
            if ids.tolist() != [0, 3, 0, 4]:
                raise ValueError("not these")
        return self.linear(x) * ids


def test_a_trial_that_raises_leaves_attributes_as_they_were(tmp_path: Path) -> None:
    module = make(Remembering)
    given = torch.randn(3, 4), torch.tensor([0, 3, 0, 4])
    fast = ovshim.accelerate(module, given, prefer="openvino", cache_dir=tmp_path)
    assert [plan["reason"] for plan in plans(fast)] == [None]
    with served(fast, "openvino"), torch.inference_mode():
        fast(torch.randn(3, 4), given[1])


class Looking(nn.Module):
    """Takes a shorter way where nothing is masked, which should be the same and is not."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y = self.linear(x)
        if not torch.compiler.is_compiling() and bool(mask.all()):
            return y.mean(1)
        return (y * mask[..., None]).sum(1)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64])
def test_the_proof_asks_where_nothing_is_masked(dtype: torch.dtype) -> None:
    module = make(Looking)
    x, mask = torch.randn(2, 3, 4), torch.tensor([[1, 1, 1], [1, 1, 0]]).to(dtype)
    with falls_back("proof-failed"):
        fast = ovshim.accelerate(module, (x, mask), prefer="openvino")
    check(fast, module, x, mask, path=None)
    check(fast, module, x, torch.ones_like(mask), path=None)
