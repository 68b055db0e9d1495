"""Layers of torch.nn whose options converters get wrong or leave out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, weight_norm

from conformance.awkward.registering import LENGTHS, awkward, sequences
from conformance.drawing import Part, constant, draw, integers, mask, normal, of, uniform
from conformance.entries import call

IMAGES = draw(normal("B", 4, 9, 8))
SERIES = draw(normal("B", 4, "L"))
VOLUMES = draw(normal("B", 2, 5, 6, 4))


def layer(name: str, make: Callable[[], nn.Module], redraw: Any = IMAGES, **fields: Any) -> None:
    if redraw is IMAGES:
        fields.setdefault("others", {"another size": lambda: call(torch.randn(2, 4, 11, 10))})
    awkward(f"layers/{name}", redraw, **fields)(make)


layer("conv-same", lambda: nn.Conv2d(4, 6, 3, padding="same", dilation=2), path="openvino")
layer("conv-grouped", lambda: nn.Conv2d(4, 8, (3, 2), stride=(2, 1), groups=2, bias=False))
for padding in ("reflect", "replicate", "circular"):
    layer(f"conv-{padding}", lambda p=padding: nn.Conv2d(4, 6, 3, padding=2, padding_mode=p))
layer(
    "conv-transposed",
    lambda: nn.ConvTranspose2d(
        4, 6, 3, stride=2, padding=1, output_padding=1, groups=2, dilation=2
    ),
)
layer("conv-transposed-1d", lambda: nn.ConvTranspose1d(4, 6, 4, stride=3), SERIES, lengths=LENGTHS)
layer("conv-3d", lambda: nn.Sequential(nn.Conv3d(2, 3, 3, padding=1), nn.BatchNorm3d(3)), VOLUMES)
layer(
    "conv-1d-causal",
    lambda: nn.Sequential(nn.ConstantPad1d((2, 0), 0.5), nn.Conv1d(4, 4, 3)),
    SERIES,
    lengths=LENGTHS,
)
layer("shuffled", lambda: nn.Sequential(nn.PixelShuffle(2), nn.ChannelShuffle(1)))
layer("unshuffled", lambda: nn.PixelUnshuffle(2), draw(normal("B", 2, 8, 6)))
layer("group-norm", lambda: nn.GroupNorm(2, 4), path="openvino")
layer("instance-norm", lambda: nn.InstanceNorm2d(4))
layer("local-response-norm", lambda: nn.LocalResponseNorm(3, alpha=0.5))
layer("batch-norm-without-statistics", lambda: nn.BatchNorm2d(4, track_running_stats=False))
layer("batch-norm-plain", lambda: nn.BatchNorm2d(4, affine=False))
layer("layer-norm-over-three", lambda: nn.LayerNorm((4, 9, 8), elementwise_affine=False), others={})
layer("rms-norm", lambda: nn.RMSNorm(8), others={}, path="openvino")
layer("unfolded", lambda: nn.Unfold((3, 2), dilation=2, padding=1, stride=2))
layer("folded", lambda: nn.Fold((5, 5), (2, 2)), draw(normal("B", 12, 16)))
layer("upsampled-nearest", lambda: nn.Upsample(scale_factor=1.7, mode="nearest"))
layer("upsampled-bilinear", lambda: nn.Upsample(scale_factor=(2, 1.5), mode="bilinear"))
layer("upsampled-corners", lambda: nn.Upsample((13, 7), mode="bilinear", align_corners=True))
layer("upsampled-bicubic", lambda: nn.Upsample((13, 17), mode="bicubic"))
layer("padded-reflecting", lambda: nn.ReflectionPad2d((1, 2, 3, 0)))
layer("padded-negative", lambda: nn.ZeroPad2d((-1, 2, 1, -2)))
layer("padded-circular", lambda: nn.CircularPad2d((1, 2, 2, 1)))
layer("softmax-2d", nn.Softmax2d)
layer("prelu", lambda: nn.PReLU(4, init=0.3), path="openvino")
layer("alpha-dropout", lambda: nn.Sequential(nn.AlphaDropout(), nn.Dropout2d(), nn.Conv2d(4, 2, 1)))
layer("bilinear", lambda: nn.Bilinear(8, 5, 6), draw(normal("B", 8), normal("B", 5)))
layer(
    "adaptive-log-softmax",
    lambda: nn.AdaptiveLogSoftmaxWithLoss(8, 12, [4, 8]),
    draw(normal("B", 8), integers(0, 12, "B")),
    seeds=4,
)


class Function(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


def function(name: str, made: Callable[..., Any], *parts: Part, **fields: Any) -> None:
    awkward(f"layers/{name}", draw(*parts), **fields)(lambda: Function(made))


PIXELS = normal("B", 3, 7, 6)
function(
    "resized-to-another",
    lambda x, y: F.interpolate(x, size=y.shape[-2:], mode="bilinear"),
    PIXELS,
    normal("B", 1, 10, 9),
    others={
        "another size": lambda: call(torch.randn(2, 3, 7, 6), torch.randn(2, 1, 5, 12)),
    },
)
function(
    "resized-smoothly", lambda x: F.interpolate(x, (4, 3), mode="bilinear", antialias=True), PIXELS
)
function("resized-exactly", lambda x: F.interpolate(x, (10, 4), mode="nearest-exact"), PIXELS)
function("resized-by-area", lambda x: F.interpolate(x, (4, 3), mode="area"), PIXELS)
function(
    "resized-by-factor",
    lambda x: F.interpolate(x, scale_factor=1.3, mode="bilinear", recompute_scale_factor=True),
    PIXELS,
)
for how in ("bilinear", "nearest", "bicubic"):
    for border in ("zeros", "border", "reflection"):
        function(
            f"grid-sampled-{how}-{border}",
            lambda x, g, how=how, border=border: F.grid_sample(
                x, g, mode=how, padding_mode=border, align_corners=border == "border"
            ),
            PIXELS,
            uniform("B", 4, 5, 2, low=-1.4, high=1.4),
        )
function(
    "grid-out-of-an-affine",
    lambda x, t: F.grid_sample(
        x, F.affine_grid(t, list(x.shape), align_corners=False), align_corners=False
    ),
    PIXELS,
    normal("B", 2, 3),
)
function(
    "unpooled",
    lambda x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2),
    normal("B", 3, 8, 6),
)


class Attention(nn.Module):
    """torch's own, by one tensor or by three, with what else it is given."""

    def __init__(self, *, weights: bool = False, cross: bool = False, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **options)
        self.weights = weights
        self.cross = cross

    def forward(self, x: Tensor, other: Tensor | None = None, **given: Any) -> Any:
        memory = x if other is None else other
        answer = self.attention(x, memory, memory, need_weights=self.weights, **given)
        return answer if self.weights else answer[0]


TOKENS = normal("B", "L", 8)
PADDING = of(lambda m: m == 0, mask())
ALL_PADDING = of(lambda m: torch.cat([m[:-1] == 0, m[-1:] >= 0]), mask())

sequences("layers/attention", path="openvino")(Attention)
sequences("layers/attention-weights")(lambda: Attention(weights=True, add_bias_kv=True))
sequences("layers/attention-padded", redraw=draw(TOKENS, key_padding_mask=PADDING))(Attention)
sequences("layers/attention-padded-weights", redraw=draw(TOKENS, key_padding_mask=PADDING))(
    lambda: Attention(weights=True)
)
sequences("layers/attention-fully-padded", redraw=draw(TOKENS, key_padding_mask=ALL_PADDING))(
    Attention
)
sequences(
    "layers/attention-causal",
    redraw=draw(
        TOKENS,
        attn_mask=lambda b, n: nn.Transformer.generate_square_subsequent_mask(n),
        is_causal=constant(True),
    ),
)(Attention)
sequences("layers/attention-across", redraw=draw(TOKENS, normal("B", 3, 8)))(
    lambda: Attention(add_zero_attn=True)
)


def attended(name: str, made: Callable[..., Any], *parts: Part, **fields: Any) -> None:
    fields.setdefault("lengths", LENGTHS)
    awkward(f"layers/{name}", draw(*parts), "attention", **fields)(lambda: Function(made))


SDPA = F.scaled_dot_product_attention
HEADS = normal("B", 2, "L", 4)
MASKED = of(lambda t: t > 0.8, normal("B", 1, "L", "L"))
attended("sdpa-causal", lambda q: SDPA(q, q, q, is_causal=True), HEADS, path="openvino")
attended("sdpa-scaled", lambda q: SDPA(q, q, q, scale=0.7), HEADS)
attended(
    "sdpa-float-mask", lambda q, m: SDPA(q, q, q, attn_mask=m), HEADS, normal("B", 1, "L", "L")
)
attended("sdpa-rows-masked", lambda q, m: SDPA(q, q, q, attn_mask=m), HEADS, MASKED, seeds=4)
attended(
    "sdpa-rows-infinite",
    lambda q, m: SDPA(
        q, q, q, attn_mask=torch.zeros_like(q[:, :1, :, :1]).masked_fill(m, -torch.inf)
    ),
    HEADS,
    of(lambda t: t > 0, normal("B", 1, "L", "L")),
    seeds=4,
)
attended(
    "sdpa-broadcast-mask",
    lambda q, m: SDPA(q, q, q, attn_mask=m),
    HEADS,
    of(lambda t: t > 0, normal("L", "L")),
    seeds=3,
)
attended("sdpa-grouped", lambda q, k: SDPA(q, k, k, enable_gqa=True), normal("B", 4, "L", 4), HEADS)
attended(
    "sdpa-causal-across", lambda q, k: SDPA(q, k, k, is_causal=True), HEADS, normal("B", 2, "2L", 4)
)
attended("sdpa-of-three-dimensions", lambda q: SDPA(q, q, q), normal("B", "L", 4))
attended(
    "softmax-rows-masked",
    lambda q, m: (q @ q.mT).masked_fill(~m, -torch.inf).softmax(-1) @ q,
    HEADS,
    MASKED,
    seeds=4,
)


def encoder(**options: Any) -> nn.Module:
    one = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, **options)
    return nn.TransformerEncoder(one, 2, enable_nested_tensor=True)


sequences("layers/encoder", path="openvino")(encoder)
sequences("layers/encoder-norm-first")(lambda: encoder(norm_first=True, activation="gelu"))
sequences("layers/encoder-padded", redraw=draw(TOKENS, src_key_padding_mask=PADDING), seeds=4)(
    encoder
)
sequences("layers/encoder-fully-padded", redraw=draw(TOKENS, src_key_padding_mask=ALL_PADDING))(
    encoder
)
sequences(
    "layers/encoder-causal",
    redraw=draw(TOKENS, mask=lambda b, n: nn.Transformer.generate_square_subsequent_mask(n)),
)(encoder)


@sequences("layers/transformer", redraw=draw(TOKENS, normal("B", 3, 8)))
class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Transformer(8, 2, 1, 1, 16, batch_first=True)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        causal = nn.Transformer.generate_square_subsequent_mask(target.shape[1])
        return self.body(source, target, tgt_mask=causal, tgt_is_causal=True)


awkward("layers/weight-norm")(lambda: weight_norm(nn.Linear(8, 4), dim=0))
awkward("layers/weight-norm-parametrized")(lambda: parametrizations.weight_norm(nn.Linear(8, 4)))
awkward("layers/spectral-norm")(lambda: parametrizations.spectral_norm(nn.Linear(8, 4)))
awkward("layers/orthogonal")(lambda: parametrizations.orthogonal(nn.Linear(8, 8)))
awkward("layers/flatten-unflatten", draw(normal("B", 4, 6)))(
    lambda: nn.Sequential(nn.Flatten(), nn.Unflatten(1, (2, 12)), nn.Identity())
)
awkward(
    "layers/connectionist-loss",
    draw(of(lambda t: t.log_softmax(-1), normal(6, "B", 5)), integers(1, 5, "B", 3)),
)(lambda: _Ctc())


class _Ctc(nn.Module):
    def forward(self, scores: Tensor, targets: Tensor) -> Tensor:
        B = scores.shape[1]
        return F.ctc_loss(scores, targets, [6] * B, [3] * B, reduction="none")
