"""What the demo works on: a small convolutional network and scikit-learn's handwritten digits."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

__all__ = ["DigitsNet", "Glyphs", "glyphs", "train"]

HELD_OUT = 500
_EPOCHS = 6
_BATCH = 64
_LEARNING_RATE = 1e-2


class DigitsNet(nn.Module):
    """Ten logits for each 16x16 glyph: float32 [batch, 1, 16, 16] to [batch, 10]."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *_block(1, width),
            *_block(width, width),
            nn.MaxPool2d(2),
            *_block(width, 2 * width),
            *_block(2 * width, 2 * width),
            nn.AdaptiveAvgPool2d(1),
        )
        self.head = nn.Linear(2 * width, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.features(images).flatten(1))
        return logits


def _block(inputs: int, outputs: int) -> list[nn.Module]:
    convolution = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    return [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]


@dataclass(frozen=True)
class Glyphs:
    """Images, float32 [count, 1, 16, 16] in 0 to 1, and the digits they show, int64 [count]."""

    images: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.labels)


def glyphs(seed: int) -> tuple[Glyphs, Glyphs]:
    """Those to train on and the held-out ones, 8x8 scaled to 16x16.

    Raises ImportError where there is no scikit-learn.
    """
    from sklearn.datasets import load_digits

    found = load_digits()
    small = torch.from_numpy(found.images).float().div(16).unsqueeze(1)
    images = F.interpolate(small, size=(16, 16), mode="bilinear", align_corners=False)
    labels = torch.from_numpy(found.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    held, seen = order[:HELD_OUT], order[HELD_OUT:]
    return Glyphs(images[seen], labels[seen]), Glyphs(images[held], labels[held])


def train(seen: Glyphs, seed: int, progress: bool | None) -> DigitsNet:
    """A trained network in evaluation mode: for a seed and a machine always the same, bit by bit.

    progress: whether to show a bar; None: on a terminal.
    """
    with _repeatable(seed):
        net = DigitsNet()
        optimizer = torch.optim.AdamW(net.parameters())
        steps = _EPOCHS * (len(seen) // _BATCH)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _LEARNING_RATE, steps)
        # To tqdm, disable=None means: unless on a terminal.
        hidden = None if progress is None else not progress
        with tqdm(total=steps, desc="training", unit="batch", disable=hidden, leave=False) as bar:
            for _ in range(_EPOCHS):
                for batch in torch.split(torch.randperm(len(seen)), _BATCH):
                    if len(batch) == _BATCH:
                        _step(net, optimizer, seen.images[batch], seen.labels[batch])
                        schedule.step()
                        bar.update()
    return net.eval()


def _step(
    net: nn.Module, optimizer: torch.optim.Optimizer, images: torch.Tensor, labels: torch.Tensor
) -> None:
    optimizer.zero_grad()
    torch.autograd.backward(F.cross_entropy(net(images), labels))
    optimizer.step()


@contextlib.contextmanager
def _repeatable(seed: int) -> Iterator[None]:
    """Within, the same work gives the same bits in every process; afterwards all is as before."""
    threads = torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # One thread: sums over batches depend on how many threads share them. It is also faster for
        # tensors this small, by far so on a busy machine, where waiting threads spin.
        torch.set_num_threads(1)
        torch.use_deterministic_algorithms(True)
        try:
            yield
        finally:
            torch.set_num_threads(threads)
            torch.use_deterministic_algorithms(deterministic)
