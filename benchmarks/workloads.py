"""What is run: modules with random weights of a fixed seed, and the arguments of one call."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

__all__ = [
    "ALL_BACKENDS",
    "MODELS",
    "ZOO",
    "Arguments",
    "Case",
    "Workload",
    "arguments",
    "cases",
    "make",
]

ALL_BACKENDS = (
    "eager",
    "eager-bf16",
    "autocast",
    "inductor",
    "onnxruntime",
    "openvino",
    "ovshim-openvino",
    "ovshim",
    "ovshim-compile",
    # Last: while it is measured it has changed Dynamo's configuration.
    "dynamo-openvino",
)
_FIRST_BATCH_ONLY = ("eager-bf16", "autocast", "inductor", "dynamo-openvino")
_ZOO_BACKENDS = ("eager", "openvino", "ovshim-openvino", "ovshim")

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Workload:
    """A model and how to call it.

    Attributes:
        module: makes the module; `small` asks for one with the same operators and few of them.
        arguments: makes the arguments of a call for a batch size.
        backends: which backends are measured on it.
    """

    name: str
    batches: tuple[int, ...]
    module: Callable[[bool], nn.Module]
    arguments: Callable[[int, bool], Arguments]
    backends: tuple[str, ...] = ALL_BACKENDS


@dataclasses.dataclass(frozen=True)
class Case:
    """A workload at one batch size: one group of the benchmark."""

    workload: str
    batch: int

    def __str__(self) -> str:
        return f"{self.workload}, batch {self.batch}"


def _positional(*shape: int) -> Callable[[int, bool], Arguments]:
    return lambda batch, small: ((torch.randn(batch, *shape),), {})


# --- models -----------------------------------------------------------------------------------


def _mlp(small: bool) -> nn.Module:
    return nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))


def _resnet(small: bool) -> nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig()  # its defaults are ResNet-50's dimensions
    if small:
        config = ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1])
    config.num_labels = 1000
    return ResNetForImageClassification(config)


def _bert(small: bool) -> nn.Module:
    from transformers import BertConfig, BertModel

    config = BertConfig()  # its defaults are BERT-base's dimensions
    if small:
        config = BertConfig(
            hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128
        )
    return BertModel(config)


def _bert_arguments(batch: int, small: bool) -> Arguments:
    shape = (batch, 32 if small else 128)
    ids = torch.randint(0, 30000, shape)
    return (), {"input_ids": ids, "attention_mask": torch.ones(shape, dtype=torch.int64)}


def _vit(small: bool) -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=64 if small else 384,
        num_hidden_layers=2 if small else 12,
        num_attention_heads=2 if small else 6,
        intermediate_size=128 if small else 1536,
        image_size=64 if small else 224,
    )
    config.num_labels = 1000
    return ViTForImageClassification(config)


def _pixels(batch: int, small: bool) -> Arguments:
    size = 64 if small else 224
    return (), {"pixel_values": torch.randn(batch, 3, size, size)}


MODELS = (
    Workload("MLP 256-256-10", (1, 64), _mlp, _positional(256)),
    Workload("ResNet-50", (1, 8), _resnet, _pixels),
    Workload("BERT-base/128", (1, 8), _bert, _bert_arguments),
    Workload("ViT-S/16", (1, 8), _vit, _pixels),
)


# --- tiny and odd ones ------------------------------------------------------------------------


class _Separable(nn.Module):
    """A depthwise convolution, a pointwise one, and a squeeze-and-excitation gate."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(before, before, 3, stride, 1, groups=before, bias=False)
        self.norm = nn.BatchNorm2d(before)
        self.pointwise = nn.Conv2d(before, after, 1)
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(after, after, 1), nn.Sigmoid())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.silu(self.norm(self.depthwise(x)))
        x = nn.functional.silu(self.pointwise(x))
        gated: torch.Tensor = x * self.gate(x)
        return gated


def _depthwise(small: bool) -> nn.Module:
    widths = ((16, 24, 2), (24, 40, 2), (40, 40, 1), (40, 80, 2))
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1),
        *(_Separable(*width) for width in widths),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(80, 10),
    )


class _LogMel(nn.Module):
    """A front end for speech: power spectrogram, 80 bands, logarithm. 16 kHz in, 100 frames/s."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("window", torch.hann_window(400))
        self.register_buffer("bands", torch.rand(80, 201) / 201)

    def forward(self, sound: torch.Tensor) -> torch.Tensor:
        window, bands = self.get_buffer("window"), self.get_buffer("bands")
        spectrum = torch.stft(sound, 400, 160, window=window, return_complex=True)
        return torch.log10((bands @ spectrum.abs().square()).clamp(min=1e-10))


def _sound(batch: int, small: bool) -> Arguments:
    return (torch.randn(batch, 8_000 if small else 80_000),), {}


class _Bags(nn.Module):
    """Text classification by averaged embeddings: ids of all texts in one row, with offsets."""

    def __init__(self) -> None:
        super().__init__()
        self.bags = nn.EmbeddingBag(10_000, 64, mode="mean")
        self.head = nn.Linear(64, 4)

    def forward(self, ids: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        answer: torch.Tensor = self.head(self.bags(ids, offsets))
        return answer


def _bags_arguments(batch: int, small: bool) -> Arguments:
    offsets = torch.arange(8 * batch) * 32
    return (torch.randint(0, 10_000, (8 * 32 * batch,)), offsets), {}


def _conv1d(small: bool) -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(1, 16, 80, stride=16),
        nn.ReLU(),
        nn.Conv1d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool1d(4),
        nn.Conv1d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool1d(1),
        nn.Flatten(),
        nn.Linear(64, 12),
    )


class _Recurrent(nn.Module):
    """Two LSTM layers over a sequence, and a classifier on the last step."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(64, 128, num_layers=2, batch_first=True)
        self.head = nn.Linear(128, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        steps, _ = self.lstm(x)
        answer: torch.Tensor = self.head(steps[:, -1])
        return answer


def _tiny(small: bool) -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))


ZOO = tuple(
    Workload(name, (1,), module, arguments, _ZOO_BACKENDS)
    for name, module, arguments in (
        ("3 layers of 8", _tiny, _positional(8)),
        ("1-D convolutions, 1 s", _conv1d, _positional(1, 16_000)),
        ("depthwise + SE, 96×96", _depthwise, _positional(3, 96, 96)),
        ("LSTM 2×128, 50 steps", lambda small: _Recurrent(), _positional(50, 64)),
        ("EmbeddingBag, 8×32 ids", lambda small: _Bags(), _bags_arguments),
        ("log-mel by STFT, 5 s", lambda small: _LogMel(), _sound),
    )
)

_BY_NAME: Mapping[str, Workload] = {workload.name: workload for workload in (*MODELS, *ZOO)}


def cases(small: bool) -> list[tuple[Case, str]]:
    """Every case with every backend that it is measured on, backends of one case side by side.

    `small`: the first batch size of each workload only.
    """
    return [
        (Case(workload.name, batch), backend)
        for workload in _BY_NAME.values()
        for batch in workload.batches[: 1 if small else None]
        for backend in workload.backends
        # Those take long, some to compile for each batch size anew.
        if backend not in _FIRST_BATCH_ONLY or batch == workload.batches[0]
    ]


def make(case: Case, small: bool) -> tuple[nn.Module, Arguments]:
    """The module of a case, in evaluation mode, and the arguments of one call of it."""
    workload = _BY_NAME[case.workload]
    torch.manual_seed(0)
    module = workload.module(small).eval()
    return module, workload.arguments(case.batch, small)


def arguments(case: Case, small: bool) -> Arguments:
    """The arguments of another call of a case, with values drawn anew."""
    return _BY_NAME[case.workload].arguments(case.batch, small)
