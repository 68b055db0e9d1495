"""Weights, statistics and structure, edited between calls."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from conformance.awkward.editing import do, written
from conformance.awkward.registering import awkward
from conformance.awkward.values import Linear


@awkward(
    "reads/replaced-submodule",
    edits=[
        do("replaced", lambda m: setattr(m, "linear", _eye())),
        do("wrapped", lambda m: setattr(m, "linear", nn.Sequential(m.linear, nn.Tanh()))),
    ],
    path="openvino",
)
class ReplacedSubmodule(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + 1


def _eye() -> nn.Module:
    layer = nn.Linear(8, 8)
    written(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def _structure(module: Any) -> None:
    parametrize.register_parametrization(module[0], "weight", Doubled())


@awkward(
    "reads/structure",
    edits=[
        do("hook added", lambda m: m[1].register_forward_hook(lambda m, a, out: out + 1)),
        do("hooks gone", lambda m: m[1]._forward_hooks.clear()),
        do("layer appended", lambda m: m.append(nn.Tanh())),
        do("parametrized", _structure),
        do("layer dropped", lambda m: m.__delitem__(1)),
    ],
)
def _structured() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))


@awkward(
    "reads/weights",
    edits=[
        do(
            "state dict loaded",
            lambda m: m.load_state_dict(
                {name: torch.full_like(t, 0.1) for name, t in m.state_dict().items()}
            ),
        ),
        do("parameter replaced", lambda m: setattr(m[0], "weight", nn.Parameter(torch.eye(8)))),
        do("bias gone", lambda m: setattr(m[0], "bias", None)),
        do("data replaced", lambda m: setattr(m[2].weight, "data", torch.full((8, 8), 0.2))),
        do("optimizer stepped", lambda m: _step(m)),
        do("frozen", lambda m: m.requires_grad_(False)),
        do("doubled and back", lambda m: m.double().float()),
    ],
    path="openvino",
)
def _weighted() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8))


def _step(module: nn.Module) -> None:
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    module(torch.ones(2, 8)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


@awkward(
    "reads/running-statistics",
    edits=[
        do("trained", lambda m: _trained(m)),
        do("buffer written", lambda m: m[1].running_mean.fill_(2.0)),
        do("momentum", lambda m: setattr(m[1], "momentum", 0.7)),
        do("no statistics", lambda m: setattr(m[1], "track_running_stats", False)),
    ],
)
def _normed() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))


def _trained(module: nn.Module) -> None:
    module.train()
    module(torch.linspace(-1, 1, 32).view(4, 8))
    module.eval()


@awkward(
    "reads/training-flag",
    edits=[
        do("part in training", lambda m: m.linear.train()),
        do("all in training", lambda m: m.train()),
        do("back", lambda m: m.eval()),
    ],
)
class TrainingFlag(Linear):
    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        y = y * 2 if self.linear.training else y
        return y + 1 if self.training else y
