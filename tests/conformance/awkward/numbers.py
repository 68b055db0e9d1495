"""Values at the edges: NaN, infinity, ties, rounding, empty reductions, parameters ignored."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conformance.awkward.dtypes import Apply
from conformance.awkward.registering import awkward
from conformance.drawing import Part, draw, integers, normal, of, uniform
from conformance.entries import Call, call

NAN, INF = float("nan"), float("inf")


def odd(batch: int = 2) -> Tensor:
    """[batch, 8] with NaN, infinities, zeros of both signs and a denormal."""
    row = torch.tensor([NAN, INF, -INF, 0.0, -0.0, 1e-40, 3.5, -2.5])
    return torch.stack([row.roll(k) for k in range(batch)])


def odds(*without: str) -> dict[str, Callable[[], Call]]:
    """Further calls of a module of [batch, 8], but for some of them."""
    every: dict[str, Callable[[], Call]] = {
        "odd values": lambda: call(odd()),
        "all NaN": lambda: call(torch.full((2, 8), NAN)),
        "endless": lambda: call(torch.full((2, 8), -INF)),
        "zeros": lambda: call(torch.zeros(2, 8)),
        "ties": lambda: call(torch.ones(2, 8)),
        "huge": lambda: call(torch.full((2, 8), 1e18)),
    }
    return {name: make for name, make in every.items() if name not in without}


def applied(name: str, function: Callable[..., Any], *parts: Part, **fields: Any) -> None:
    given = parts or (normal("B", 8),)
    if not parts:
        fields.setdefault("others", odds())
    awkward(f"numbers/{name}", draw(*given), **fields)(lambda: Apply(function))


applied(
    "relu-and-clamp",
    lambda x: (x.relu(), x.clamp(-1, 1), x.clamp(min=0), F.relu6(x), F.hardtanh(x)),
)
applied("softmax", lambda x: (x.softmax(-1), x.log_softmax(0), x.logsumexp(1), F.softmin(x, -1)))
applied("maximum", lambda x: (x.max(), x.max(1), x.amax(0), x.maximum(x.flip(1))))
applied("minimum", lambda x: (x.min(1), x.amin(), torch.minimum(x, x * 0), x.aminmax(dim=1)))
applied("arguments-of-maxima", lambda x: (x.argmax(1), x.argmin(1), x.argmax()))
applied(
    "sorted",
    lambda x: (x.sort(dim=1, stable=True), x.sort(dim=0, descending=True, stable=True).indices),
)
# Which of equal values are named torch leaves open, and says so.
applied(
    "top-k",
    lambda x: (x.topk(3, 1), x.topk(2, 1, largest=False), x.kthvalue(2, 1)),
    others=odds("zeros", "ties", "all NaN", "endless", "huge"),
)
applied(
    "ties",
    lambda x: (x.topk(3), x.sort(dim=-1, stable=True).indices, x.argmax(-1)),
    of(lambda t: (t * 2).round(), normal("B", 8)),
)
applied(
    "median", lambda x: (x.median(), x.median(1), x.nanmedian(1), x.mode(1), x.quantile(0.3, 1))
)
# The variance of equal values of 1e18 is 0 or 1e13 (of their square: 1e-23), by the order of sums.
applied(
    "moments",
    lambda x: (x.var(), x.std(1), x.var(1, correction=0), torch.var_mean(x, 0)),
    others=odds("huge"),
)
applied("of-one-element", lambda x: (x[:1].std(0), x[:, :1].var(1), x[:0].sum(0), x[:0].prod()))
applied("cumulated", lambda x: (x.cumsum(1), x.cumsum(0)))
applied(
    "norms",
    lambda x: (x.norm(), x.norm(p=1, dim=1), x.norm(p=INF), F.normalize(x)),
)
applied("comparisons", lambda x: (x > 0, x == x, x != x, x >= x.flip(0), x.sign()))
applied("classified", lambda x: (x.isnan(), x.isinf(), x.isfinite()))
applied("rounded", lambda x: (x.round(), x.floor(), x.ceil(), (x * 2).round() / 2))
applied("rounded-to-decimals", lambda x: (x.round(decimals=2), (x * 100).round(decimals=-1)))
applied("halves", lambda x: x.round(), of(lambda t: t.float() + 0.5, integers(-6, 6, "B", 8)))
applied("zeros-of-both-signs", lambda x: (1 / (x * 0), torch.atan2(x * 0, -x.abs())))
applied(
    "logarithms",
    lambda x: (x.log(), x.log1p(), x.sqrt(), x.rsqrt(), x.abs().log2(), x.abs().log10()),
)
applied("exponentials", lambda x: (x.exp(), x.expm1(), (x * 50).exp(), (x * 100).sigmoid()))
applied(
    "trigonometry", lambda x: (x.sin(), x.tan(), x.asin(), x.acosh(), x.atan(), x.sinh(), x.atanh())
)
applied("trigonometry-far-out", lambda x: (x * 1e5).sin(), normal("B", 8))
applied("special", lambda x: (x.erf(), x.erfinv(), x.erfc()))
applied("reciprocals", lambda x: (1 / x, x.reciprocal(), x / x.flip(1), x / 0, x.fmod(x.flip(1))))
applied("hypotenuse", lambda x: (x.logaddexp(x.flip(0)), x * x.flip(0).sqrt()))
applied("where-NaN", lambda x: (torch.where(x > 0, x.log(), 0.0), x.masked_fill(x < 0, INF) * 0))
applied(
    "activations",
    lambda x: (
        F.gelu(x),
        F.gelu(x, approximate="tanh"),
        F.silu(x),
        F.mish(x),
        F.elu(x, 0.5),
        F.selu(x),
        F.celu(x, 0.3),
        F.hardswish(x),
        F.hardsigmoid(x),
        F.leaky_relu(x, 0.2),
        F.softsign(x),
    ),
)
applied(
    "activations-with-parameters",
    lambda x: (
        F.softplus(x, beta=3, threshold=2),
        F.softplus(x * 30),
        F.hardtanh(x, -0.3, 0.4),
        F.logsigmoid(x),
        F.rrelu(x, 0.1, 0.3),
        F.tanhshrink(x),
        F.glu(x, -1),
    ),
)
applied(
    "losses",
    lambda x: (
        F.mse_loss(x, x.flip(0)),
        F.l1_loss(x, x * 2, reduction="none"),
        F.huber_loss(x, x + 1, delta=0.4),
        F.smooth_l1_loss(x, x * 0, beta=0.3),
        F.kl_div(x.log_softmax(1), x.softmax(1), reduction="batchmean"),
    ),
)
applied(
    "cross-entropy",
    lambda x, y: (
        F.cross_entropy(x, y, ignore_index=3),
        F.cross_entropy(x, y, label_smoothing=0.1, reduction="none"),
        F.nll_loss(x.log_softmax(1), y),
        F.multi_margin_loss(x, y),
    ),
    normal("B", 8),
    integers(0, 8, "B"),
    others={
        "class out of range": lambda: call(torch.randn(2, 8), torch.tensor([1, 8])),
        "all ignored": lambda: call(torch.randn(2, 8), torch.tensor([3, 3])),
    },
)
applied(
    "binary-losses",
    lambda x, y: (
        F.binary_cross_entropy_with_logits(x, y, pos_weight=torch.full((8,), 2.0)),
        F.binary_cross_entropy(x.sigmoid(), y, reduction="sum"),
    ),
    normal("B", 8),
    uniform("B", 8),
)
applied(
    "distances",
    lambda x: (
        torch.cdist(x, x.flip(0)),
        torch.cdist(x, x + 1, p=1),
        F.pairwise_distance(x, x + 1, p=3),
    ),
    normal("B", 8),
    size=(3, 5),
    batches=(2, 3, 5),
)
applied(
    "cancelling",
    lambda x: ((x + 1000).var(1), (x + 4096) - 4096, (x * 1e6 + 1).sum() - x.sum() * 1e6),
    normal("B", 8),
    tolerance=1e-2,
)
applied(
    "histograms",
    lambda x: (
        torch.bucketize(x, torch.linspace(-1, 1, 5)),
        torch.searchsorted(torch.linspace(-1, 1, 5), x, right=True),
    ),
)
applied(
    "lerp-and-friends",
    lambda x: (
        torch.lerp(x, x.flip(0), 0.3),
        torch.addcmul(x, x, x, value=2),
        torch.addcdiv(x, x, x.exp(), value=0.5),
        torch.baddbmm(x[:, None], x[:, None, :4], x[:, :4, None] * x[:, None], beta=0.5, alpha=2),
    ),
    normal("B", 8),
)


# Operators without a counterpart in OpenVINO, each for itself: a fallback of one hides the others.
for name, lone in {
    "fmax": lambda x: torch.fmax(x, -x),
    "cumprod": lambda x: x.cumprod(0),
    "cummax": lambda x: x.cummax(1),
    "logcumsumexp": lambda x: x.logcumsumexp(1),
    "renorm": lambda x: x.renorm(2, 0, 1),
    "isclose": lambda x: x.isclose(x + 1e-9),
    "nan-to-num": lambda x: x.nan_to_num(1.0),
    "signbit": lambda x: x.signbit(),
    "trunc": lambda x: x.trunc(),
    "frac": lambda x: x.frac(),
    "copysign": lambda x: x.copysign(-x),
    "exp2": lambda x: x.exp2(),
    "lgamma": lambda x: (x.lgamma(), x.digamma(), torch.special.i0(x)),
    "hypot": lambda x: x.hypot(x.flip(1)),
    "xlogy": lambda x: torch.xlogy(x.abs(), x),
    "threshold": lambda x: F.threshold(x, 0.1, 5.0),
    "hardshrink": lambda x: F.hardshrink(x, 0.7),
    "softshrink": lambda x: F.softshrink(x, 0.2),
    "cosine-similarity": lambda x: F.cosine_similarity(x, x.flip(1)),
    "histc": lambda x: torch.histc(x.clamp(-2, 2), 5, -2, 2),
}.items():
    applied(name, lone)


POOLS: dict[str, Callable[[], nn.Module]] = {
    "ceiling": lambda: nn.AvgPool2d(3, 2, padding=1, ceil_mode=True),
    "ceiling-uncounted": lambda: nn.AvgPool2d(
        3, 2, padding=1, ceil_mode=True, count_include_pad=False
    ),
    "divisor": lambda: nn.AvgPool2d(2, 2, ceil_mode=True, divisor_override=3),
    "uneven": lambda: nn.AvgPool2d((3, 2), (2, 1), padding=(1, 0), count_include_pad=False),
    "power": lambda: nn.LPPool2d(2, 3, 2),
}
for name, pool in POOLS.items():
    awkward(
        f"numbers/average-pool-{name}",
        draw(normal("B", 2, 8, 7)),
        others={
            "another size": lambda: call(torch.randn(2, 2, 9, 10)),
            "NaN": lambda: call(torch.full((1, 2, 8, 7), NAN)),
        },
    )(pool)


class MaxPools(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pools = nn.ModuleList(
            [
                nn.MaxPool2d(3, 2, padding=1, ceil_mode=True),
                nn.MaxPool2d(2, 2, dilation=2),
                nn.MaxPool2d(3, 1, return_indices=True),
                nn.AdaptiveMaxPool2d((3, 5)),
                nn.AdaptiveAvgPool2d((3, None)),
            ]
        )

    def forward(self, x: Tensor) -> list[Any]:
        return [pool(x) for pool in self.pools]


awkward(
    "numbers/max-pools",
    draw(normal("B", 2, 8, 7)),
    others={
        "another size": lambda: call(torch.randn(2, 2, 9, 10)),
        "NaN": lambda: call(torch.full((1, 2, 8, 7), NAN)),
        "endless": lambda: call(torch.full((1, 2, 8, 7), -INF)),
    },
)(MaxPools)
