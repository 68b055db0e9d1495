"""Settings of torch's that the whole program shares, and what a call does to them."""

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from checks import check, counts, quietly
from modules import Mlp
from torch import Tensor, nn

import ovshim
from ovshim.settings import Settings
from ovshim.watched import watched

SETS: dict[str, Callable[[], Any]] = {
    "set_grad_enabled": lambda: torch.set_grad_enabled(False),
    "set_num_threads": lambda: torch.set_num_threads(1),
    "set_default_dtype": lambda: torch.set_default_dtype(torch.float64),
    "set_float32_matmul_precision": lambda: torch.set_float32_matmul_precision("high"),
    "use_deterministic_algorithms": lambda: torch.use_deterministic_algorithms(True),
    "autograd.set_detect_anomaly": lambda: torch.autograd.set_detect_anomaly(True, False),
    "set_warn_always": lambda: torch.set_warn_always(True),
    "backends.cuda.enable_flash_sdp": lambda: torch.backends.cuda.enable_flash_sdp(False),
    "backends.cudnn.benchmark": lambda: setattr(torch.backends.cudnn, "benchmark", True),
    "backends.mkldnn.enabled": lambda: torch._C._set_mkldnn_enabled(False),  # type: ignore[attr-defined]
}
# The newer names: what they set may have none among the older ones.
PRECISIONS: dict[str, Callable[[], Any]] = {
    "all": lambda: setattr(torch.backends, "fp32_precision", "tf32"),
    "cuda": lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"),
    "mkldnn": lambda: setattr(torch.backends.mkldnn.matmul, "fp32_precision", "bf16"),
    "older": lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True),
}


@pytest.fixture(autouse=True)
def put_back() -> Iterator[None]:
    before = Settings()
    yield
    before.put_back(SETS)


@pytest.mark.parametrize("name", PRECISIONS)
def test_precisions_by_their_newer_names(name: str) -> None:
    before = Settings()
    with watched() as seen:
        PRECISIONS[name]()
    assert before.changed() == ["set_float32_matmul_precision"]
    assert seen.settings == {"set_float32_matmul_precision": True}
    before.put_back(before.changed())
    assert before.changed() == []


READ: dict[str, tuple[Callable[[], bool], Callable[[bool], Any]]] = {
    "deterministic": (
        lambda: torch.are_deterministic_algorithms_enabled(),
        torch.use_deterministic_algorithms,
    ),
    "tf32": (
        lambda: torch.backends.cuda.matmul.allow_tf32,
        lambda on: setattr(torch.backends.cuda.matmul, "allow_tf32", on),
    ),
    "autocast": (
        lambda: torch.get_autocast_dtype("cpu") is torch.float16,
        lambda on: torch.set_autocast_dtype("cpu", torch.float16 if on else torch.bfloat16),
    ),
    "cache": (lambda: torch.is_autocast_cache_enabled(), torch.set_autocast_cache_enabled),
}


class Asking(nn.Module):
    """Does otherwise by what is set."""

    def __init__(self, is_set: Callable[[], bool]) -> None:
        super().__init__()
        self.layer, self.is_set = nn.Linear(8, 8), is_set

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x)
        return out * 2 if self.is_set() else out


@pytest.mark.parametrize("name", READ)
def test_what_code_branches_on_is_seen_to_change(name: str) -> None:
    is_set, put = READ[name]
    before, x = is_set(), torch.randn(3, 8)
    module = Asking(is_set).eval()
    try:
        put(False)
        fast = ovshim.accelerate(module, x, prefer="openvino")
        check(fast, module, x)
        put(True)
        with torch.no_grad():
            torch.testing.assert_close(fast(x), module(x))
    finally:
        put(before)


@pytest.mark.parametrize("name", ["all", "cuda"])
def test_a_program_that_sets_them_is_served(name: str) -> None:
    module, x = Mlp().eval(), torch.randn(3, 8)
    PRECISIONS[name]()
    with quietly():
        check(ovshim.accelerate(module, x, prefer="openvino"), module, x)
        fast = ovshim.accelerate(module, prefer="openvino")
        check(fast, module, x, path=None)
        check(fast, module, x)


@pytest.mark.parametrize("name", SETS)
def test_what_is_set_is_seen_and_put_back(name: str) -> None:
    before = Settings()
    with watched() as seen:
        SETS[name]()
    assert before.changed() == [name]
    assert seen.settings == ({} if name == "set_grad_enabled" else {name: True})
    before.put_back([name])
    assert before.changed() == []
    assert seen.set_again() == []


@pytest.mark.parametrize("name", [name for name in SETS if name != "set_grad_enabled"])
def test_what_is_set_as_it_is_set_is_seen(name: str) -> None:
    SETS[name]()
    with watched() as seen:
        SETS[name]()
    assert seen.set_again() == [name]


@pytest.mark.filterwarnings("ignore:torch.set_default_tensor_type")
def test_the_type_of_tensors_by_its_older_name() -> None:
    before = Settings()
    with watched() as seen:
        torch.set_default_tensor_type(torch.DoubleTensor)
    assert seen.settings == {"set_default_dtype": True}
    before.put_back(before.changed())
    assert torch.get_default_dtype() is torch.float32


def test_a_block_that_sets_back_is_none() -> None:
    with watched() as seen:
        before = torch.get_num_threads()
        torch.set_num_threads(before + 1)
        torch.set_num_threads(before)
        with torch.no_grad(), torch.autograd.set_detect_anomaly(True):
            torch.ones(2)
    assert seen.set_again() == []


class Sets(Mlp):
    done: Callable[[], Any]

    def forward(self, x: Tensor) -> Tensor:
        self.done()
        return super().forward(x)


@pytest.mark.parametrize(
    "name",
    ["set_num_threads", "use_deterministic_algorithms", "backends.cudnn.benchmark"],
)
@pytest.mark.parametrize("shown", [True, False])
def test_a_module_that_sets_is_eagers(name: str, shown: bool) -> None:
    module, x, before = Sets().eval(), torch.randn(3, 8), Settings()
    module.done = SETS[name]
    with quietly():
        fast = ovshim.accelerate(module, *([x] if shown else []), prefer="openvino")
        assert before.changed() == []
        for _ in range(4):
            before.put_back([name])
            fast(x)
            assert before.changed() == [name]
    assert set(ovshim.explain(fast).eager) == {"mutates-setting"}


@pytest.mark.parametrize(
    ("seed", "draw"),
    [(torch.manual_seed, lambda: torch.rand(1).item()), (random.seed, random.random)],
    ids=["torch", "python"],
)
@pytest.mark.parametrize("shown", [True, False])
def test_a_module_that_seeds_is_eagers(
    seed: Callable[[int], Any], draw: Callable[[], float], shown: bool
) -> None:
    module, x = Sets().eval(), torch.randn(3, 8)
    module.done = lambda: seed(7)
    seed(7)
    expected = draw()
    with quietly():
        seed(1)
        fast = ovshim.accelerate(module, *([x] if shown else []), prefer="openvino")
        for number in range(4):
            seed(number)
            fast(x)
            assert draw() == expected
    assert counts(fast)["openvino"] == 0


class Forwarded(nn.Linear):
    """Its forward is a function that was put on it."""

    def __init__(self) -> None:
        super().__init__(8, 8)
        inner = self.forward
        self.forward = lambda x: inner(x).relu()  # type: ignore[method-assign]


def test_a_forward_that_is_a_function() -> None:
    module, x = Forwarded().eval(), torch.randn(3, 8)
    fast = ovshim.accelerate(module, x, prefer="openvino")
    check(fast, module, x)
    check(fast, module, torch.randn(5, 8))


def test_what_dynamo_puts_back_is_no_setting_of_the_modules() -> None:
    inner = torch.compile(nn.Linear(8, 8), backend="eager")
    module, x = nn.Sequential(inner, nn.ReLU()).eval(), torch.randn(3, 8)
    fast = ovshim.accelerate(module, x, prefer="openvino")
    check(fast, module, x)


def test_operators_of_higher_order_may_be_looked_at() -> None:
    from ovshim.modes import Operators

    def chosen(x: Tensor) -> Any:
        return torch.cond(x.sum() > 0, lambda y: y + 1, lambda y: y - 1, (x,))

    with Operators() as seen:
        assert torch.equal(chosen(torch.ones(3)), torch.full((3,), 2.0))
    assert not seen.drawn
