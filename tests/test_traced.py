"""The route that runs a module once and records what it did: nothing of that call is baked in."""

import logging
import time
import warnings
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from checks import check, plans, quietly
from torch import Tensor, nn

import ovshim

pytestmark = pytest.mark.filterwarnings("ignore:called")
LOG = logging.getLogger("tests")


def timed() -> None:
    time.perf_counter()


@torch.compiler.disable
def apart() -> None:
    pass


# What Dynamo cannot follow, and what a trace runs through.
HARMLESS: dict[str, Callable[[], object]] = {"clock": timed, "not compiled": apart}
SAYS: dict[str, Callable[[], object]] = {
    **HARMLESS,
    "log": lambda: LOG.debug("called"),
    "the root's log": lambda: logging.info("called"),  # noqa: LOG015
    "warning": lambda: warnings.warn("called", stacklevel=1),
}


def limited(x: Tensor, h: Tensor) -> Tensor:
    return h / x.abs().max() * 10 if x.abs().max() > 10 else h


def quantized(x: Tensor, h: Tensor) -> Tensor:
    scale = x.abs().max().item() / 127
    return (h / scale).round() * scale


def checked(x: Tensor, h: Tensor) -> Tensor:
    if x.min() < -50:
        raise ValueError("out of range")
    return h


def compared(x: Tensor, h: Tensor) -> Tensor:
    return h * 2 if torch.allclose(x, x * 0 + 1) else h


def listed(x: Tensor, h: Tensor) -> Tensor:
    return h * max(x[0].tolist())


READS = {read.__name__: read for read in (limited, quantized, checked, compared, listed)}


class Says(nn.Module):
    """Does something that Dynamo stops at, before what matters."""

    def __init__(
        self, says: Callable[[], object], then: Callable[[Tensor, Tensor], Tensor]
    ) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.says, self.then = says, then

    def forward(self, x: Tensor) -> Tensor:
        self.says()
        return self.then(x, self.linear(x))


@pytest.mark.parametrize("says", SAYS)
@pytest.mark.parametrize("reads", READS)
def test_no_value_is_baked_in(says: str, reads: str) -> None:
    torch.manual_seed(0)
    module, x = Says(SAYS[says], READS[reads]).eval(), torch.randn(4, 8)
    with quietly():
        fast = ovshim.accelerate(module, x, prefer="openvino", cache_dir=None)
        for given in (x, x * 20, x * 0.01, torch.ones(4, 8)):
            check(fast, module, given, path=None)
        if reads == "checked":
            with pytest.raises(ValueError, match="out of range"), torch.no_grad():
                fast(x * 100 - 100)
    assert plans(fast)[0]["reason"]["code"] == "value-dependent"


@pytest.mark.parametrize("says", SAYS)
def test_no_size_is_baked_in(says: str) -> None:
    torch.manual_seed(0)
    module = Says(SAYS[says], lambda x, h: h * (1 if x.shape[0] < 6 else 2))
    with quietly():
        fast = ovshim.accelerate(module.eval(), torch.randn(4, 8), prefer="openvino")
        for rows in (4, 6, 7, 5, 64, 4):
            check(fast, module, torch.randn(rows, 8), path=None)
    assert ovshim.explain(fast).to_dict()["calls"]["openvino"] >= 2


@pytest.mark.parametrize("says", SAYS)
def test_sizes_that_stay_in_the_graph_stay_open(says: str) -> None:
    module = Says(SAYS[says], lambda x, h: h.view(x.shape[0], 2, 4))
    fast = ovshim.accelerate(module.eval(), torch.randn(4, 8), prefer="openvino", cache_dir=None)
    assert plans(fast)[0]["route"] == ("traced" if says in HARMLESS else "dynamo")
    with quietly():
        for rows in (4, 6, 1, 9):
            check(fast, module, torch.randn(rows, 8))


ROUNDED: dict[str, Callable[[Tensor], Tensor]] = {
    "//": lambda x: x // 0.1,
    "%": lambda x: x % 0.1,
    "fmod": lambda x: torch.fmod(x, 0.3),
    "div": lambda x: torch.div(x, 0.1, rounding_mode="floor"),
    "in place": lambda x: x.clone().remainder_(0.1),
}


@pytest.mark.parametrize("name", ROUNDED)
def test_what_is_rounded_is_eagers(name: str) -> None:
    module = Says(HARMLESS["clock"], lambda x, h: ROUNDED[name](x)).eval()
    with quietly():
        fast = ovshim.accelerate(module, torch.randn(8), prefer="openvino", cache_dir=None)
        check(fast, module, torch.tensor([0.5, 1, 1.5, 2, 4.5, 9, 0.3, 0.6]), path=None)
    assert plans(fast)[0]["reason"]["code"] == "unsupported-op"


class Out(NamedTuple):
    hidden: Tensor
    more: Tensor


def test_a_named_tuple_of_the_users_is_no_reason_to_trace() -> None:
    class Gives(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.bins = nn.Linear(8, 8), nn.Embedding(16, 8)

        def forward(self, x: Tensor) -> Out:
            h = torch.relu(self.linear(x))
            h = h + self.bins((x[:, 0] * 3).abs().long())
            return Out(h * 2, h) if x.shape[0] > 5 else Out(h, h)

    module = Gives().eval()
    fast = ovshim.accelerate(module, torch.rand(4, 8), prefer="openvino", cache_dir=None)
    assert plans(fast)[0]["route"] == "dynamo"
    check(fast, module, torch.rand(3, 8))
    with quietly():
        check(fast, module, torch.rand(7, 8), path=None)
        with pytest.raises(IndexError), torch.no_grad():
            fast(torch.rand(3, 8) * 1000)
