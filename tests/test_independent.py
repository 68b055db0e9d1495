"""What somebody who had not read the implementation found wrong: modules, calls and edits."""

import collections
import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from checks import check, counts, quietly, same
from modules import Mlp, make
from torch import Tensor, nn

import ovshim


class Of(nn.Module):
    def __init__(self, init: Callable[[Any], Any], function: Callable[..., Any]) -> None:
        super().__init__()
        init(self)
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self, *args, **kwargs)


def plain(function: Callable[..., Any]) -> nn.Module:
    return make(Of, lambda self: None, function)


def accelerated(module: nn.Module, *example: Any) -> nn.Module:
    with quietly():
        return ovshim.accelerate(module, example, prefer="openvino")


# Calls


@pytest.mark.slow
def test_the_order_of_a_dicts_keys_matters() -> None:
    module = plain(lambda self, d: torch.cat([x.sin() for x in d.values()], -1))
    a, b = torch.randn(2, 3), torch.randn(2, 4)
    fast = accelerated(module, {"a": a, "b": b})
    check(fast, module, {"a": a, "b": b})
    check(fast, module, {"b": b, "a": a}, path="eager")
    check(fast, module, {"b": b, "a": a})
    check(fast, module, {"a": b, "b": a}, path=None)


def test_the_order_of_keywords_matters_to_who_goes_through_them() -> None:
    module = plain(lambda self, **kw: torch.cat([x.sin() for x in kw.values()], -1))
    a, b = torch.randn(2, 3), torch.randn(2, 4)
    with quietly():
        fast = ovshim.accelerate(module, {"a": a, "b": b}, prefer="openvino")
    check(fast, module, b=b, a=a, path=None)
    check(fast, module, a=a, b=b)


@pytest.mark.parametrize(
    "function",
    [
        lambda self, x: F.pad(x, (2, 1), mode="reflect") + 1,
        lambda self, x: x + torch.arange(8.0) * torch.arange(float(x.shape[1]))[:, None],
        lambda self, x: F.pixel_shuffle(F.pad(x[:, None], (1, 1, 1, 1), mode="replicate"), 1),
    ],
    ids=["reflect", "arange", "replicate"],
)
def test_tensors_without_elements_are_eagers(function: Any) -> None:
    module = plain(function)
    fast = accelerated(module, torch.randn(3, 8, 8))
    for shape in ((0, 8, 8), (3, 8, 8), (0, 12, 8)):
        path = "eager" if 0 in shape else None
        check(fast, module, torch.randn(shape), path=path)
    assert counts(fast)["openvino"] >= 1


def test_bags_without_ids_are_eagers() -> None:
    module = make(
        Of,
        lambda self: setattr(self, "bags", nn.EmbeddingBag(20, 8, mode="sum")),
        lambda self, ids, offsets: self.bags(ids, offsets),
    )
    fast = accelerated(module, torch.randint(0, 20, (24,)), torch.arange(3) * 8)
    empty = torch.zeros(0, dtype=torch.int64)
    check(fast, module, empty, torch.zeros(3, dtype=torch.int64), path="eager")


@pytest.mark.parametrize("seed", range(4))
def test_experts_that_nobody_is_sent_to(seed: int) -> None:
    def route(self: Any, x: Tensor) -> Tensor:
        weight, chosen = self.gate(x).softmax(-1).max(-1)
        out = torch.zeros_like(x)
        for n, expert in enumerate(self.experts):
            rows = (chosen == n).nonzero().squeeze(-1)
            if rows.numel():
                out[rows] = expert(x[rows]) * weight[rows, None]
        return out

    def init(self: Any) -> None:
        self.gate = nn.Linear(16, 4)
        experts = (nn.Sequential(nn.Linear(16, 8), nn.GELU(), nn.Linear(8, 16)) for _ in range(4))
        self.experts = nn.ModuleList(experts)

    torch.manual_seed(seed)
    module = make(Of, init, route)
    fast = accelerated(module, torch.randn(8, 16))
    for size in (8, 2, 1):
        check(fast, module, torch.randn(size, 16), path=None)
    assert counts(fast)["openvino"] == 0


@pytest.mark.parametrize("length", [8, 1, 12])
def test_a_transform_of_more_points_than_there_are(length: int) -> None:
    module = plain(lambda self, x: torch.fft.irfft(torch.fft.rfft(x, n=8, dim=1), n=8, dim=1))
    fast = accelerated(module, torch.randn(3, 8, 4))
    for _ in range(2):
        with quietly():
            check(fast, module, torch.randn(3, length, 4), path=None)


def test_integers_out_of_floats_beyond_32_bits() -> None:
    module = plain(lambda self, x: (x * 1e6).long() % 1024)
    fast = accelerated(module, torch.rand(3, 8))
    check(fast, module, torch.rand(3, 8))
    check(fast, module, torch.rand(3, 8) * 1e4, path="eager", reason="out-of-range")


def test_an_infinite_float_that_is_not_taken_does_no_harm() -> None:
    """As in T5's buckets of relative positions: the logarithm of 0 is for others than 0."""

    def bucket(self: Any, x: torch.Tensor) -> torch.Tensor:
        far = 4 + torch.log(x.float() / 4).long()
        far = torch.min(far, torch.full_like(far, 7))
        return torch.where(x < 4, x, far)

    module = plain(bucket)
    fast = accelerated(module, torch.arange(24).reshape(3, 8))
    check(fast, module, torch.arange(24).flip(0).reshape(3, 8))
    taken = plain(lambda self, x: torch.where(x > 4, x, torch.log(x.float()).long()))
    fast = accelerated(taken, torch.arange(1, 25).reshape(3, 8))
    check(fast, taken, torch.arange(1, 25).flip(0).reshape(3, 8))
    check(fast, taken, torch.arange(24).reshape(3, 8), path="eager", reason="special-values")


@pytest.mark.parametrize(
    "divide",
    [
        lambda self, x, y: x // y,
        lambda self, x, y: x % y,
        lambda self, x, y: torch.div(x, y, rounding_mode="trunc"),
    ],
    ids=["floor", "modulo", "trunc"],
)
def test_a_division_of_integers_by_zero_raises(divide: Any) -> None:
    module = plain(divide)
    x, y = torch.randint(0, 20, (3, 8)), torch.randint(1, 7, (3, 8))
    fast = accelerated(module, x, y)
    check(fast, module, x, y)
    with torch.inference_mode(), pytest.raises(RuntimeError, match="ZeroDivision"):
        fast(x, torch.zeros_like(y))


@pytest.mark.parametrize("holes", [False, True])
def test_a_transformer_with_a_padding_mask(holes: bool) -> None:
    """Its fast way leaves out padded rows, for masks of one form."""
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    module = make(
        Of,
        lambda self: setattr(self, "encoder", nn.TransformerEncoder(copy.deepcopy(layer), 2)),
        lambda self, x, mask: self.encoder(x, src_key_padding_mask=mask),
    )
    mask = torch.zeros(3, 8, dtype=torch.bool)
    mask[0, 3] = holes
    fast = accelerated(module, torch.randn(3, 8, 16), mask)
    padded = torch.zeros(3, 8, dtype=torch.bool)
    padded[0, 4:], padded[1, 6:] = True, True
    with quietly():
        for given in (padded, mask, padded):
            check(fast, module, torch.randn(3, 8, 16), given, path=None)


def test_a_bfloat16_module_whose_values_overflow() -> None:
    module = nn.Sequential(nn.Linear(8, 32), nn.LayerNorm(32), nn.Linear(32, 8)).bfloat16().eval()
    fast = accelerated(module, torch.randn(3, 8).bfloat16())
    x = torch.randn(3, 8).bfloat16() * 1e25
    with torch.inference_mode():
        same(fast(x), module(x), 0.0)


# Edits


class Config:
    scale = 1.0


@dataclasses.dataclass
class Unequal:
    scale: float = dataclasses.field(default=2.0, compare=False)


class Helper:
    factor = 2.0

    def __len__(self) -> int:
        return 3

    @property
    def offset(self) -> float:
        return 4.0

    def scaled(self, x: Tensor) -> Tensor:
        return x * 5

    @staticmethod
    def doubled(x: Tensor) -> Tensor:
        return x * 2

    @classmethod
    def known(cls) -> float:
        return cls.factor


def shifted(x: Tensor, *, by: float = 1.0) -> Tensor:
    return x + by


def lifted(x: Tensor, by: list[float] = [1.0]) -> Tensor:  # noqa: B006, that is the point
    return x + by[0]


def set_(name: str, value: Callable[[], Any]) -> Callable[[Any], None]:
    return lambda self: setattr(self, name, value())


def shared_list(self: Any) -> None:
    self.inner = nn.Linear(8, 8)
    self.listed = [self.inner]


EDITS: dict[str, tuple[Any, Any, Any]] = {
    "set": (set_("held", lambda: {1}), lambda s, x: x.sin() + len(s.held), lambda m: m.held.add(2)),
    "counter": (
        set_("held", lambda: collections.Counter("aab")),
        lambda s, x: x.sin() + s.held["a"],
        lambda m: m.held.update("aaaa"),
    ),
    "list of modules": (
        shared_list,
        lambda s, x: s.inner(x) + s.listed[0](x),
        lambda m: m.listed.__setitem__(0, nn.Tanh()),
    ),
    "order of modules": (
        set_("parts", lambda: nn.ModuleDict({"a": nn.Linear(8, 2), "b": nn.Linear(8, 2)})),
        lambda s, x: torch.cat([part(x) for part in s.parts.values()], -1),
        lambda m: m.parts.update({"a": m.parts.pop("a")}),
    ),
    "shadowed default": (
        set_("config", Config),
        lambda s, x: F.gelu(x) * s.config.scale,
        lambda m: setattr(m.config, "scale", 3.0),
    ),
    "field that is not compared": (
        set_("config", Unequal),
        lambda s, x: x.cos() * s.config.scale,
        lambda m: setattr(m, "config", Unequal(3.0)),
    ),
    "requires_grad": (
        set_("linear", lambda: nn.Linear(8, 8)),
        lambda s, x: s.linear(x) * (2 if s.linear.weight.requires_grad else 3),
        lambda m: m.requires_grad_(False),
    ),
}
CLASS_EDITS: dict[str, tuple[Any, str, Any]] = {
    "method": (lambda s, x: s.helper.scaled(x).sin(), "scaled", lambda self, x: x * 50),
    "property": (lambda s, x: x.sin() + s.helper.offset, "offset", property(lambda self: 40.0)),
    "length": (lambda s, x: x.sin() + len(s.helper), "__len__", lambda self: 30),
    "static": (lambda s, x: Helper.doubled(x.sin()), "doubled", staticmethod(lambda x: x * 7)),
    "class": (lambda s, x: x.sin() * Helper.known(), "known", classmethod(lambda cls: 11.0)),
    "added": (lambda s, x: x.sin() + (5 if hasattr(Helper, "extra") else 0), "extra", 1),
}


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_is_seen_by_the_next_call(name: str) -> None:
    init, function, edit = EDITS[name]
    module = make(Of, init, function)
    fast = accelerated(module, torch.randn(3, 8))
    check(fast, module, torch.randn(3, 8))
    edit(module)
    if fast.__dict__.get("held") is not module.__dict__.get("held", 0):
        edit(fast)
    with quietly():
        for _ in range(2):
            check(fast, module, torch.randn(3, 8), path=None)


@pytest.mark.parametrize("name", CLASS_EDITS)
def test_an_edit_of_a_class_is_seen_by_the_next_call(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    function, attribute, value = CLASS_EDITS[name]
    module = make(Of, set_("helper", Helper), function)
    fast = accelerated(module, torch.randn(3, 8))
    check(fast, module, torch.randn(3, 8))
    monkeypatch.setattr(Helper, attribute, value, raising=False)
    with quietly():
        for _ in range(2):
            check(fast, module, torch.randn(3, 8), path=None)


def test_defaults_that_are_edited_are_seen() -> None:
    module = plain(lambda self, x: lifted(shifted(x.sin())))
    fast = accelerated(module, torch.randn(3, 8))
    check(fast, module, torch.randn(3, 8))
    try:
        shifted.__kwdefaults__["by"] = 9.0
        check(fast, module, torch.randn(3, 8), path=None)
        lifted.__defaults__[0][0] = 7.0  # type: ignore[index]
        check(fast, module, torch.randn(3, 8), path=None)
    finally:
        shifted.__kwdefaults__["by"] = 1.0
        lifted.__defaults__[0][0] = 1.0  # type: ignore[index]


def test_a_method_of_the_users_own_over_ours() -> None:
    fast = accelerated(make(Mlp), torch.randn(3, 8))
    fast.forward = lambda x: x * 5  # type: ignore[method-assign]
    same(fast(torch.ones(3)), torch.ones(3) * 5)
    assert fast.ovshim.stats() == {"openvino": 0, "mixed": 0, "eager": 0}  # type: ignore[operator, union-attr]
    assert "Mlp" in str(ovshim.explain(fast))
