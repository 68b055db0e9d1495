"""Rows of attention that are masked as a whole are eager's: NaN here, zeros there."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from checks import falls_back, same
from torch import Tensor, nn

import ovshim

Scores = Callable[[Tensor, Tensor], Tensor]
_WEIGHT = torch.randn(16, 16, generator=torch.Generator().manual_seed(0)) / 4


def added(scores: Tensor, mask: Tensor) -> Tensor:
    return scores + torch.zeros_like(scores).masked_fill(~mask[:, None], -torch.inf)


def added_twice(scores: Tensor, mask: Tensor) -> Tensor:
    """What either mask shows, the other may hide: a padded beginning, and what is to come."""
    to_come = torch.full((6, 6), -torch.inf).triu(1)
    return scores / 2 + to_come + torch.where(mask[:, None], 0.0, -torch.inf)


class Held(nn.Module):
    """As `added_twice`, with a mask that the module holds."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("to_come", torch.full((6, 6), -torch.inf).triu(1))

    def forward(self, scores: Tensor, mask: Tensor) -> Tensor:
        return added(scores + self.to_come, mask)


def filled_twice(scores: Tensor, mask: Tensor) -> Tensor:
    to_come = torch.ones(6, 6, dtype=torch.bool).triu(1)
    return scores.masked_fill(to_come, -torch.inf).masked_fill(~mask[:, None], -torch.inf)


FORMS: dict[str, Scores] = {
    "filled": lambda s, m: s.masked_fill(~m[:, None], -torch.inf),
    "filled in place": lambda s, m: (s * 2).masked_fill_(m[:, None] == 0, float("-inf")),
    "filled twice": filled_twice,
    "chosen": lambda s, m: torch.where(m[:, None], s, -torch.inf),
    "chosen otherwise": lambda s, m: torch.where(~m[:, None], torch.tensor(-torch.inf), s),
    "added": added,
    "added twice": added_twice,
    "added and held twice": Held(),
}


class Attention(nn.Module):
    """Attention without a residual: the ReLU behind it has nothing but what was attended to."""

    def __init__(self, scores: Scores) -> None:
        super().__init__()
        self.scores = scores
        self.last = nn.Linear(16, 8)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        scores = self.scores(F.linear(x, _WEIGHT) @ x.transpose(1, 2), mask)
        attended = torch.softmax(scores, -1) @ x
        return F.relu(self.last(attended))


class Pooled(nn.Module):
    """Attends from nowhere, by a softmax over what `form` says."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.score, self.last = nn.Linear(16, 1), nn.Linear(16, 8)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        scores = self.score(x).masked_fill(~mask[..., None], -torch.inf)
        if self.form == "another dimension":
            weights = F.softmax(scores, dim=1)
        elif self.form == "the last dimension":
            scores = self.score(x).squeeze(-1).masked_fill(~mask, -torch.inf)
            weights = scores.softmax(-1)[..., None]
        else:
            weights = scores.squeeze(-1).transpose(0, 1).softmax(0).transpose(0, 1)[..., None]
        return F.relu(self.last((weights * x).sum(1)))


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.inner = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        answer: Tensor = self.inner(x, src_key_padding_mask=~mask)
        return answer


class Heads(nn.Module):
    def __init__(self, weights: bool, causal: bool = False) -> None:
        super().__init__()
        self.inner, self.weights = nn.MultiheadAttention(16, 2, batch_first=True), weights
        self.causal = causal

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        hidden = ~mask
        to_come = torch.ones(6, 6, dtype=torch.bool).triu(1) if self.causal else None
        attended: Tensor = self.inner(
            x, x, x, key_padding_mask=hidden, need_weights=self.weights, attn_mask=to_come
        )[0]
        return attended


MODULES: dict[str, Callable[[], nn.Module]] = {
    **{form: lambda form=form: Attention(FORMS[form]) for form in FORMS},  # type: ignore[misc]
    "encoder": Encoder,
    "causal heads": lambda: Heads(False, causal=True),
    "causal heads with weights": lambda: Heads(True, causal=True),
    "heads": lambda: Heads(False),
    "heads with weights": lambda: Heads(True),
}


def make(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODULES[name]().eval()


def masks(*hidden: slice) -> Tensor:
    mask = torch.ones(3, 6, dtype=torch.bool)
    for row, what in enumerate(hidden):
        mask[row, what] = False
    return mask


PADDED = masks(slice(6, 6), slice(4, 6), slice(5, 6))
WHOLE = masks(slice(0, 6), slice(4, 6), slice(5, 6))
# Of these the causal forms hide whole rows.
BEGINNING = masks(slice(6, 6), slice(0, 2), slice(5, 6))


def x() -> Tensor:
    return torch.randn(3, 6, 16, generator=torch.Generator().manual_seed(1))


def reasons(fast: Any) -> dict[str, int]:
    return dict(ovshim.explain(fast).eager)


# The others with `nox -s full`: each is captured and compiled.
_OFTEN = ("filled", "chosen otherwise", "added and held twice", "encoder", "causal heads")
_NAMES = [n if n in _OFTEN else pytest.param(n, marks=pytest.mark.slow) for n in MODULES]


@pytest.mark.parametrize("name", _NAMES)
def test_a_row_that_is_masked_as_a_whole_is_eagers(name: str) -> None:
    module = make(name)
    fast: Any = ovshim.accelerate(module, (x(), PADDED), prefer="openvino")
    with torch.no_grad():
        same(fast(x(), PADDED), module(x(), PADDED))
        assert fast.ovshim.stats() == {"openvino": 1, "mixed": 0, "eager": 0}
        same(fast(x(), WHOLE), module(x(), WHOLE))
        assert reasons(fast) == {"out-of-range": 1}
        same(fast(x(), BEGINNING), module(x(), BEGINNING))
        causal = name.endswith("twice") or name.startswith("causal")
        assert reasons(fast) == {"out-of-range": 1 + causal}
        # Other sizes are asked about as well.
        same(fast(x()[:2, :, :], PADDED[1:]), module(x()[:2], PADDED[1:]))
    assert fast.ovshim.stats()["openvino"] == 3 - causal


@pytest.mark.parametrize("name", ["encoder", pytest.param("heads", marks=pytest.mark.slow)])
def test_torchs_own_ways_differ_by_grad_mode(name: str) -> None:
    module = make(name)
    fast: Any = ovshim.accelerate(module, (x(), PADDED), prefer="openvino")
    fast(x(), PADDED)
    answer = fast(x(), PADDED)
    assert fast.ovshim.stats()["openvino"] == 1
    same(answer.detach(), module(x(), PADDED).detach())
    expected = module(x(), WHOLE).detach()
    assert expected.isfinite().all()  # and NaN without grad
    same(fast(x(), WHOLE).detach(), expected)


def test_a_mask_of_floats_that_is_given() -> None:
    """Where the example holds infinities, calls may."""
    module = Attention(lambda scores, mask: scores + mask[:, None]).eval()
    floats = [torch.zeros(3, 6).masked_fill(~mask, -torch.inf) for mask in (PADDED, WHOLE)]
    fast: Any = ovshim.accelerate(module, (x(), floats[0]), prefer="openvino")
    with torch.no_grad():
        for mask in floats:
            same(fast(x(), mask), module(x(), mask))
    assert fast.ovshim.stats() == {"openvino": 1, "mixed": 0, "eager": 1}


def test_what_hides_nothing_or_gives_zeros_is_not_asked_about() -> None:
    lowest = torch.finfo(torch.float32).min
    module = Attention(lambda s, m: s.masked_fill(~m[:, None], lowest)).eval()
    fast: Any = ovshim.accelerate(module, (x(), PADDED), prefer="openvino")

    class Fused(nn.Module):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return F.relu(F.scaled_dot_product_attention(x, x, x, attn_mask=mask[:, None]))

    fused: Any = ovshim.accelerate(Fused().eval(), (x(), PADDED), prefer="openvino")
    with torch.no_grad():
        for mask in (PADDED, WHOLE):
            same(fast(x(), mask), module(x(), mask))
            same(fused(x(), mask), Fused()(x(), mask))
    assert fast.ovshim.stats() == fused.ovshim.stats() == {"openvino": 2, "mixed": 0, "eager": 0}


@pytest.mark.parametrize("form", ["another dimension", "by way of other operators"])
def test_a_softmax_over(form: str) -> None:
    torch.manual_seed(0)
    module = Pooled(form).eval()
    fast: Any = ovshim.accelerate(module, (x(), PADDED), prefer="openvino")
    with torch.no_grad():
        for mask in (PADDED, WHOLE):
            same(fast(x(), mask), module(x(), mask))
    assert reasons(fast) == {"out-of-range": 1}


def test_an_example_of_such_rows_costs_nobody_the_graph(tmp_path: Path) -> None:
    options: Any = {"prefer": "openvino", "cache_dir": tmp_path}
    module = make("filled")
    fast: Any = ovshim.accelerate(module, (x(), WHOLE), **options)
    with torch.no_grad():
        same(fast(x(), WHOLE), module(x(), WHOLE))
        for _ in range(9):
            same(fast(x(), PADDED), module(x(), PADDED))
        assert fast.ovshim.stats()["openvino"] > 0
        # Nor the next process, which has its entry.
        again: Any = ovshim.accelerate(make("filled"), (x(), WHOLE), **options)
        for _ in range(9):
            same(again(x(), PADDED), module(x(), PADDED))
    (plan,) = ovshim.explain(again).to_dict()["plans"]
    assert (plan["path"], plan["cache"]) == ("openvino", "hit")


def test_a_mask_that_is_cut_for_the_short_proof(tmp_path: Path) -> None:
    """Of the smallest sizes nothing is left to see; the example's are asked then."""

    def accelerated(mask: Tensor) -> Any:
        torch.manual_seed(0)
        return ovshim.accelerate(
            Pooled("the last dimension").eval(),
            (torch.randn(3, 12, 16), mask),
            prefer="openvino",
            cache_dir=tmp_path,
            dynamic_shapes={"x": {0: None, 1: None}, "mask": {0: None, 1: None}},
        )

    late = torch.zeros(3, 12, dtype=torch.bool)
    late[:, -2:] = True
    accelerated(torch.ones(3, 12, dtype=torch.bool))
    fast = accelerated(late)
    (plan,) = ovshim.explain(fast).to_dict()["plans"]
    assert (plan["path"], plan["cache"]) == ("openvino", "hit")


class LooksAtMask(nn.Module):
    """Goes another way where nothing is hidden, but not while it is compiled, as transformers does:
    of a graph nothing shows that there is another way."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y = self.linear(x)
        if not torch.compiler.is_compiling() and bool(mask.all()):
            return y * 2
        return y * mask[:, :, None]


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64])
def test_another_way_where_nothing_is_hidden_is_noticed(dtype: torch.dtype) -> None:
    module = LooksAtMask().eval()
    x, mask = torch.randn(2, 5, 8), torch.ones(2, 5, dtype=dtype)
    mask[0, 3:] = 0
    with falls_back("proof-failed"):
        fast = ovshim.accelerate(module, (x, mask), prefer="openvino")
    with torch.inference_mode():
        for one in (mask, torch.ones_like(mask)):
            same(fast(x, one), module(x, one))
