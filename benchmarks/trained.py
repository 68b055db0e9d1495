"""Models that have learned something, so that what a precision costs can be counted in answers.

Nothing is downloaded: digits come with scikit-learn, and numbers to sort are drawn.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import nn

from ovshim.cli import digits

__all__ = ["TRAINED", "Trained"]

_BATCH = 50


@dataclasses.dataclass(frozen=True)
class Trained:
    """A trained model in evaluation mode, and what it is asked.

    Attributes:
        inputs, answers: held out from training: batches of its one input, and the classes that
            are right, as the last dimension of its outputs counts them.
        calibration: batches of inputs that it was trained on.
        rules: a precision for each of its modules.
    """

    module: nn.Module
    inputs: tuple[torch.Tensor, ...]
    answers: tuple[torch.Tensor, ...]
    calibration: tuple[torch.Tensor, ...]
    rules: Mapping[str, str]

    def right(self, model: Callable[[torch.Tensor], torch.Tensor]) -> float:
        """The percentage of items of which every answer is right."""
        hits: list[torch.Tensor] = []
        with torch.inference_mode():
            for batch, answers in zip(self.inputs, self.answers, strict=True):
                found = model(batch).argmax(-1)
                hits.append((found == answers).reshape(len(batch), -1).all(1))
        return 100 * torch.cat(hits).float().mean().item()


@functools.cache
def _digits() -> Trained:
    seen, held = digits.glyphs(seed=0)
    net = digits.train(seen, seed=0, progress=False)
    return Trained(
        module=net,
        inputs=held.images.split(_BATCH),
        answers=held.labels.split(_BATCH),
        calibration=seen.images[: 12 * _BATCH].split(_BATCH),
        rules={"default": "int8", "features.0": "fp32", "head": "bf16"},
    )


class _Sorter(nn.Module):
    """Twelve digits, int64 [batch, 12], to logits of the same in order, [batch, 12, 10]."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.digits = nn.Embedding(10, width)
        self.places = nn.Parameter(0.02 * torch.randn(12, width))
        layer = nn.TransformerEncoderLayer(
            width, 4, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, numbers: torch.Tensor) -> torch.Tensor:
        hidden = self.encoder(self.digits(numbers) + self.places)
        logits: torch.Tensor = self.head(self.norm(hidden))
        return logits


@functools.cache
def _sorter() -> Trained:
    drawn = torch.Generator().manual_seed(0)
    threads, steps = torch.get_num_threads(), 300
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = _Sorter()
    optimizer = torch.optim.AdamW(net.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, steps)
    torch.set_num_threads(1)  # faster for tensors this small
    try:
        for _ in range(steps):
            numbers = torch.randint(0, 10, (64, 12), generator=drawn)
            right = numbers.sort(1).values
            optimizer.zero_grad()
            loss = F.cross_entropy(net(numbers).flatten(0, 1), right.flatten())
            torch.autograd.backward(loss)
            optimizer.step()
            schedule.step()
    finally:
        torch.set_num_threads(threads)
    held = torch.randint(0, 10, (2000, 12), generator=torch.Generator().manual_seed(1))
    return Trained(
        module=net.eval(),
        inputs=held.split(_BATCH),
        answers=held.sort(1).values.split(_BATCH),
        calibration=torch.randint(0, 10, (12 * _BATCH, 12), generator=drawn).split(_BATCH),
        rules={"default": "bf16", "encoder.layers.0": "int8", "head": "fp32"},
    )


TRAINED: dict[str, Callable[[], Trained]] = {
    "digits CNN": _digits,
    "sorting transformer": _sorter,
}
"""By name; each is trained when it is first asked for, in seconds."""
