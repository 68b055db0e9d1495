"""What a call's tensors are besides values: how they lie in memory, and which they are."""

from typing import Any

import pytest
import torch
from checks import check, counts, quietly, standing
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import ovshim
from ovshim import verdict
from ovshim.race import Finish
from ovshim.signature import ODD, layout_of
from ovshim.views import copied

LAST = torch.channels_last
IMAGE = torch.randn(2, 3, 6, 6)


@pytest.mark.parametrize(
    ("tensor", "layout"),
    [
        (IMAGE, ""),
        (IMAGE[:1], ""),
        (IMAGE.to(memory_format=LAST), "0-2-3-1"),
        (torch.randn(2, 3, 9, 9)[:, :, 1:7, 1:7], "0-1 2 3"),
        (torch.randn(4, 6).T, "1-0"),
        (torch.randn(4, 6)[:, ::2], "0-1/"),
        (torch.randn(4, 6)[:, :3], "0 1"),
        (torch.randn(1, 3).expand(4, 3), "1 0/"),
        (torch.randn(2, 1, 6, 6).to(memory_format=LAST), ODD),
        (torch.randn(1, 8)[:, :4], ODD),
        (torch.randn(()), ""),
        (torch.randn(0, 3), ""),
    ],
)
def test_layouts(tensor: Tensor, layout: str) -> None:
    assert layout_of(tensor) == layout
    assert (layout in ("", ODD)) is tensor.is_contiguous()


@given(st.permutations(range(4)), st.lists(st.integers(1, 3), min_size=4, max_size=4))
def test_a_copy_in_the_same_strides_has_the_same_layout(order: list[int], sizes: list[int]) -> None:
    tensor = torch.empty(sizes).permute(order)
    like = torch.empty_strided(tensor.shape, tensor.stride())
    assert layout_of(tensor) == layout_of(like)
    assert (layout_of(tensor) in ("", ODD)) is tensor.is_contiguous()


def strided(kind: str) -> Tensor:
    whole = torch.randn(6, 8)
    return {
        "transposed": whole.T,
        "crop": whole[1:4, 2:5],
        "expanded": whole[:1].expand(4, 8),
        "odd": whole[:1, :3],
        "windows": torch.randn(20).unfold(0, 4, 2),
    }[kind]


@pytest.mark.parametrize("kind", ["transposed", "crop", "expanded", "odd", "windows"])
def test_a_copy_lies_in_memory_as_the_tensor_does(kind: str) -> None:
    tensor = strided(kind)
    made = copied(tensor)
    assert torch.equal(made, tensor)
    assert (made.stride(), layout_of(made)) == (tensor.stride(), layout_of(tensor))
    made.zero_() if kind not in ("expanded", "windows") else made.select(-1, 0)
    assert tensor.any()


@pytest.mark.parametrize("kind", ["transposed", "crop", "expanded", "windows"])
def test_an_example_is_raced_as_it_lies_in_memory(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    raced = list[Any]()
    monkeypatch.setattr(
        verdict, "race", lambda eager, ours, _: raced.append(ours()) or Finish(2.0, 1.0, 1.9, 2.1)
    )
    x = strided(kind)
    module = nn.Linear(x.shape[1], 4).eval()
    with quietly():
        fast = ovshim.accelerate(module, x, cache_dir=None)
    (answer,) = raced
    with torch.no_grad():
        assert torch.allclose(answer, module(x), atol=1e-5)
    assert standing(fast)[0].path == "openvino"


class Asks(nn.Module):
    """Does otherwise for other strides."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.stride = 2

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        return y * self.stride if x.is_contiguous(memory_format=LAST) else y


class Strides(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2.0 + x.stride(0)


def test_other_strides_than_the_examples_are_not_answered_by_its_graph() -> None:
    module = Asks().eval()
    crop = torch.randn(2, 3, 9, 9)[:, :, 1:7, 1:7]
    with quietly():
        fast = ovshim.accelerate(module, IMAGE, prefer="openvino")
        for _ in range(3):
            check(fast, module, IMAGE)
            check(fast, module, IMAGE.to(memory_format=LAST), path=None)
            check(fast, module, crop, path=None)
    assert counts(fast)["openvino"] == 3


def test_strides_of_sizes_of_1() -> None:
    module = Strides().eval()
    with quietly():
        fast = ovshim.accelerate(module, torch.randn(1, 4), prefer="openvino")
        for _ in range(3):
            check(fast, module, torch.randn(1, 4))
            check(fast, module, torch.randn(1, 8)[:, :4], path="eager")


class Views(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.relu(), x.flatten()


def test_a_copy_of_one_layout_is_a_view_of_another() -> None:
    module = Views().eval()
    fast: Any
    with quietly(), torch.no_grad():
        fast = ovshim.accelerate(module, torch.randn(4, 6).T, prefer="openvino")
        check(fast, module, torch.randn(4, 6).T)
        x = torch.randn(4, 6)[:, ::2]
        fast(x)[1].zero_()
    assert not x.any()


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x.as_strided((2, 8), (8, 1), 8))
        return y


def test_an_offset_counts_from_the_storage() -> None:
    module = Counts().eval()
    with quietly(), torch.no_grad():
        fast = ovshim.accelerate(module, torch.randn(4, 8), prefer="openvino")
        x = torch.randn(6, 8)[2:]
        assert torch.allclose(fast(x), module(x), atol=1e-5)


class Passes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        return self.linear(x), state


@pytest.mark.parametrize("kind", [list, tuple])
@pytest.mark.parametrize("shown", [True, False])
def test_a_container_that_comes_back_is_the_one_that_was_given(kind: Any, shown: bool) -> None:
    module, x, state = Passes().eval(), torch.randn(3, 4), kind([torch.randn(2)])
    fast: Any
    with quietly(), torch.no_grad():
        fast = ovshim.accelerate(module, *([(x, state)] if shown else []), prefer="openvino")
        for _ in range(3):
            assert kind is tuple or fast(x, state)[1] is state
            assert fast(x, state)[1][0] is state[0]
    assert (counts(fast)["openvino"] == 0) is (kind is list)
