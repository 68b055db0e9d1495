"""Modules with a memory, with a random state, or that write to what they were given."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conformance.awkward.registering import awkward, sequences
from conformance.awkward.values import Linear
from conformance.drawing import draw, integers, normal, of
from conformance.entries import call


@awkward("state/buffer-counter", path="eager")
class BufferCounter(Linear):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return self.linear(x) * self.count


@awkward("state/buffer-replaced", path="eager")
class BufferReplaced(Linear):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("last", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x) + self.last
        self.last = y.mean(0)
        return y


@awkward("state/moving-average", path="eager")
class MovingAverage(Linear):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("average", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        self.average.mul_(0.9).add_(y.mean(0), alpha=0.1)
        return y - self.average


@sequences("state/key-value-buffer", path="eager")
class KeyValueBuffer(Linear):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("keys", torch.zeros(1, 16, 8))

    def forward(self, x: Tensor) -> Tensor:
        self.keys[:, : x.shape[1]] = self.linear(x).mean(0, keepdim=True)
        return x @ self.keys.transpose(1, 2)


@awkward("state/python-counter", path="eager")
class PythonCounter(Linear):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.linear(x) * self.calls


@awkward("state/alternates", path="eager")
class Alternates(Linear):
    def __init__(self) -> None:
        super().__init__()
        self.odd = False

    def forward(self, x: Tensor) -> Tensor:
        self.odd = not self.odd
        return self.linear(x) if self.odd else -self.linear(x)


@awkward("state/list-grows", path="eager")
class ListGrows(Linear):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def forward(self, x: Tensor) -> tuple[Tensor, int]:
        self.seen.append(x.shape[0])
        return self.linear(x), len(self.seen)


@awkward("state/result-cached", path="openvino")
class ResultCached(Linear):
    """Remembers by an attribute made on the first call."""

    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self, "first"):
            self.first = self.linear(x).mean().detach()
        return self.linear(x) - self.first


CALLS = [0]


def _reset_calls() -> None:
    # The plain module and the accelerated one share it: what it adds may not depend on how often.
    CALLS[0] = 0


@awkward("state/global-list", before=_reset_calls, path="eager")
class GlobalList(Linear):
    def forward(self, x: Tensor) -> Tensor:
        CALLS.append(x.shape[0])
        CALLS.pop()
        return self.linear(x) + len(CALLS)


@awkward("state/input-written", path="eager")
class InputWritten(Linear):
    def forward(self, x: Tensor) -> Tensor:
        x.mul_(2)
        return self.linear(x)


@awkward("state/input-written-by-index", path="eager")
class InputWrittenByIndex(Linear):
    def forward(self, x: Tensor) -> Tensor:
        x[:, 0] = 1.0
        return self.linear(x)


@awkward("state/view-of-input-written", path="eager")
class ViewOfInputWritten(Linear):
    def forward(self, x: Tensor) -> Tensor:
        flat = x.view(-1)
        flat[:3].zero_()
        return self.linear(x)


@awkward("state/out-argument", draw(normal("B", 8), normal("B", 8)), path="eager")
class OutArgument(Linear):
    def forward(self, x: Tensor, out: Tensor) -> Tensor:
        return torch.add(self.linear(x), 1, out=out)


@awkward("state/list-argument-grows", draw(of(lambda *t: list(t), normal("B", 8))), path="eager")
class ListArgumentGrows(Linear):
    def forward(self, xs: list[Tensor]) -> Tensor:
        xs.append(self.linear(xs[-1]))
        return xs[-1] + len(xs)


@awkward("state/dict-argument-written", draw(of(lambda x: {"x": x}, normal("B", 8))), path="eager")
class DictArgumentWritten(Linear):
    def forward(self, record: dict[str, Tensor]) -> dict[str, Tensor]:
        record["y"] = self.linear(record["x"])
        return record


@awkward(
    "state/dict-argument-popped",
    draw(of(lambda x, y: {"x": x, "y": y}, normal("B", 8), normal("B", 8))),
)
class DictArgumentPopped(Linear):
    def forward(self, record: dict[str, Tensor]) -> Tensor:
        return self.linear(record.pop("x")) + record["y"]


@awkward("state/weight-written", path="eager")
class WeightWritten(Linear):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.linear.weight.mul_(0.99)
        return self.linear(x)


@awkward("state/attribute-set-and-restored")
class SetAndRestored(Linear):
    def __init__(self) -> None:
        super().__init__()
        self.scale = 1.0

    def forward(self, x: Tensor) -> Tensor:
        self.scale = 3.0
        try:
            return self.linear(x) * self.scale
        finally:
            self.scale = 1.0


@awkward("state/eval-in-forward")
class EvalInForward(Linear):
    def forward(self, x: Tensor) -> Tensor:
        self.eval()
        return self.linear(x)


@awkward("state/batch-norm-in-training", train=True, path="eager", size=(4, 5), batches=(2, 3, 5))
class BatchNormInTraining(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8)
        self.linear = nn.Linear(8, 8)
        self.eval()
        self.norm.train()

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.norm(x))


@awkward("state/dropout-in-training", train=True, path="eager")
class DropoutInTraining(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5))
        self.eval()
        self.body[1].train()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


@awkward("state/dropout-always", path="eager")
class DropoutAlways(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.linear(x), 0.3)


@awkward("state/noise-added", path="eager")
class NoiseAdded(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + torch.randn_like(x)


@awkward("state/noise-times-zero")
class NoiseTimesZero(Linear):
    """The draw does not show in the output, but in the random state."""

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + 0 * torch.rand(8)


@awkward("state/sampled", path="eager")
class Sampled(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return torch.multinomial(self.linear(x).softmax(-1), 2)


@awkward("state/bernoulli", path="eager")
class Bernoulli(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * torch.bernoulli(x.sigmoid())


@awkward("state/own-generator", path="eager")
class OwnGenerator(Linear):
    """Answers alike each time, though it draws."""

    def forward(self, x: Tensor) -> Tensor:
        drawn = torch.rand(8, generator=torch.Generator().manual_seed(3))
        return self.linear(x) * drawn


@awkward("state/python-random", path="eager", seeds=4)
class PythonRandom(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * random.random()


@awkward("state/numpy-random", path="eager", seeds=4)
class NumpyRandom(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * float(np.random.rand())


@awkward("state/permutation", path="eager")
class Permutation(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)[:, torch.randperm(8)]


@awkward("state/fractional-pooling", draw(normal("B", 3, 9, 9)), path="eager")
class FractionalPooling(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.FractionalMaxPool2d(2, output_size=4)

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(x)


@awkward("state/embedding-renormed", draw(integers(0, 10, "B", 4)), path="eager")
class EmbeddingRenormed(nn.Module):
    """Looking up rows shrinks them in the weight itself."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 8, max_norm=0.5)

    def forward(self, ids: Tensor) -> Tensor:
        return self.table(ids)


@awkward("state/instance-norm-tracking", draw(normal("B", 4, 6)), path="openvino")
class InstanceNormTracking(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.InstanceNorm1d(4, affine=True, track_running_stats=True)
        self.norm.running_mean.uniform_()  # type: ignore[union-attr]

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


class Hooked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


@awkward("state/inner-hook")
def _inner_hook() -> nn.Module:
    module = Hooked()
    module.body[0].register_forward_hook(lambda m, args, out: out * 2)
    return module


@awkward("state/inner-pre-hook")
def _inner_pre_hook() -> nn.Module:
    module = Hooked()
    module.body[2].register_forward_pre_hook(lambda m, args: (args[0] + 1,))
    return module


@awkward("state/outer-hooks")
def _outer_hooks() -> nn.Module:
    module = Hooked()
    module.register_forward_pre_hook(
        lambda m, args, kwargs: ((args[0] * 2,), kwargs), with_kwargs=True
    )
    module.register_forward_hook(lambda m, args, out: {"out": out})
    return module


@awkward("state/recording-hook", path="eager")
def _recording_hook() -> nn.Module:
    """Features taken out by a hook, and returned."""

    class Recording(Hooked):
        def __init__(self) -> None:
            super().__init__()
            self.features: list[Tensor] = []
            self.body[1].register_forward_hook(lambda m, args, out: self.features.append(out))

        def forward(self, x: Tensor) -> tuple[Tensor, Any]:
            self.features = []
            y = self.body(x)
            return y, self.features[0]

    return Recording()


@awkward("state/lazy", batches=(2, 3))
def _lazy() -> nn.Module:
    """Its weights have their sizes since the first call."""
    module = nn.Sequential(nn.LazyLinear(6), nn.ReLU(), nn.LazyLinear(3))
    module(torch.zeros(1, 8))
    return module


@awkward(
    "state/inputs-of-inference",
    others={
        "made in inference mode": lambda: call(_of_inference()),
    },
)
class InputsOfInference(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def _of_inference() -> Tensor:
    with torch.inference_mode():
        return torch.ones(2, 8)
