"""Modules for the tests to accelerate: each small, each with one thing that is special.

They stand here rather than in the tests so that child processes can import them by name.
"""

import dataclasses
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Mlp(nn.Module):
    def __init__(self, inputs: int = 8, hidden: int = 16, outputs: int = 4) -> None:
        super().__init__()
        self.first = nn.Linear(inputs, hidden)
        self.norm = nn.LayerNorm(hidden)
        self.last = nn.Linear(hidden, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.norm(self.first(x))))


def two_layers(last: float = 0.0) -> nn.Module:
    """Two of them differ in the last weight alone, if at all."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)).eval()
    with torch.no_grad():
        module[2].weight[-1, -1] = last
    return module


class Function(nn.Module):
    """Answers what a function answers."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Tensor) -> Any:
        return self.function(*args)


class Scaled(nn.Module):
    """Reads a plain attribute."""

    def __init__(self, k: float = 2.0) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 4)
        self.k = k

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.k


class DigitsCnn(nn.Module):
    """Ten classes out of [batch, 1, 16, 16] images in 0..1."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(4),
            nn.Flatten(),
            nn.Dropout(0.2),
        )
        self.head = nn.Linear(512, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


class Recurrent(nn.Module):
    """[batch, length, 8] → outputs, (hidden, cell)."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 16, num_layers=2, batch_first=True)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        output, state = self.lstm(x)
        return self.head(output), state


@dataclasses.dataclass
class Detections:
    scores: Tensor
    labels: Tensor
    name: str = "detections"
    extra: dict[str, Tensor] | None = None


class DictToDataclass(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 5)

    def forward(self, batch: dict[str, Tensor]) -> Detections:
        scores = self.linear(batch["features"]).softmax(-1) * batch["weight"].unsqueeze(-1)
        return Detections(scores, scores.argmax(-1), extra={"top": scores.amax(-1)})


class Points(NamedTuple):
    near: Tensor
    far: Tensor | None
    count: int


class ToNamedTuple(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Points:
        y = self.linear(x)
        return Points(near=y.tanh(), far=None, count=3)


class Nest(nn.Module):
    """Tuples, lists, dicts, None and constants in and out."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 4)

    def forward(self, pairs: Any, *, mode: str = "sum", bias: Any = None) -> dict[str, Any]:
        (a, b), rest = pairs
        y = self.linear(a) + self.linear(b)
        if mode == "mean":
            y = y / 2
        if bias is not None:
            y = y + bias
        return {
            "y": y,
            "parts": [y.exp(), (None, y.sum(-1))],
            "mode": mode,
            "ordered": OrderedDict(z=y.sin(), a=rest["c"] * 2),
            "nothing": None,
        }


def by(linear: nn.Linear, x: Tensor) -> Tensor:
    """What `linear` answers, but not called as a module: no part that could run by itself."""
    return F.linear(x, linear.weight, linear.bias)


class UsesHistc(nn.Module):
    """aten::histc has no OpenVINO counterpart."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.histc(by(self.linear, x), bins=5, min=-2.0, max=2.0)


class Branches(nn.Module):
    """Data-dependent control flow."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 4)
        self.down = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return by(self.up, x)
        return by(self.down, x) * 3


class ReadsItem(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return by(self.linear, x) * x.abs().max().item()


class AlwaysDrops(nn.Module):
    """Draws random numbers in evaluation mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 64)

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(by(self.linear, x), 0.5, training=True)


class WritesInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x.mul_(2)
        return by(self.linear, x)


class CountsInBuffer(nn.Module):
    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 4)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.linear(x) + self.calls


class CountsInNamed(nn.Module):
    """Counts in a tensor that it gives for a buffer of its own accord."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 4)
        self.calls = torch.zeros(())

    def named_buffers(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, Tensor]]:
        yield from super().named_buffers(*args, **kwargs)
        yield "calls", self.calls

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        return self.linear(x) + self.calls


class KeepsLast(nn.Module):
    """Writes to a buffer without torch counting it."""

    last: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 4)
        self.register_buffer("last", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        self.last.data = x.mean(0)
        return self.linear(x)


class CountsInAttribute(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 4)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.linear(x) + self.calls


class Attention(nn.Module):
    """[batch, length, 16], mask [batch, length] of bool → the same shape."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)
        self.out = nn.Linear(16, 16)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, 2, width // 2).permute(2, 0, 3, 1, 4)
        weights = q @ k.transpose(-1, -2) / math.sqrt(width // 2)
        if mask is not None:
            weights = weights.masked_fill(~mask[:, None, None, :], -1e9)
        return self.out((weights.softmax(-1) @ v).transpose(1, 2).reshape(batch, length, width))


class Pooled(nn.Module):
    """[batch, 3, height, width] → [batch, 4]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).relu().mean((2, 3))


class Towers(nn.Module):
    """Several methods, and one that calls the module itself."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Linear(8, 4)
        self.text = nn.Linear(6, 4)
        self.log_scale = nn.Parameter(torch.tensor(0.3))

    def encode_image(self, x: Tensor) -> Tensor:
        return F.normalize(self.image(x) + 1, dim=-1)

    def encode_text(self, x: Tensor, *, shift: float = 0.0) -> Tensor:
        return F.normalize(self.text(x) + shift, dim=-1)

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        scale = self.log_scale.exp()
        return scale * self.encode_image(image) @ self.encode_text(text).T

    def twice(self, image: Tensor, text: Tensor) -> Tensor:
        return self(image, text) + self(image, text)


def make(cls: type[nn.Module], *args: Any, **kwargs: Any) -> nn.Module:
    """An instance in evaluation mode with weights that are the same in every process."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        return cls(*args, **kwargs).eval()


def small_bert(**changes: Any) -> nn.Module:
    from transformers import BertConfig, BertModel

    sizes = {
        "vocab_size": 100,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "max_position_embeddings": 64,
    }
    return make(BertModel, BertConfig(**{**sizes, **changes}))


def small_vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        image_size=32,
        patch_size=8,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        num_labels=7,
    )
    return make(ViTForImageClassification, config)


def small_resnet() -> nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 16],
        depths=[1, 1],
        layer_type="basic",
        num_labels=5,
    )
    return make(ResNetForImageClassification, config)
