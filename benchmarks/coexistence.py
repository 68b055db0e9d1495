"""A child process: a module that runs in part, beside eager, as a line of JSON.

Its threads wait as the environment says (`OMP_WAIT_POLICY`), which the first of them reads once.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from interleave import Effort, interleave
from torch import Tensor, nn

import ovshim

_EFFORTS = {"--small": Effort(0.5, 3, 10, 1, 0.0), "--whole": Effort(6.0, 8, 60, 1, 2.0)}


class Layers(nn.Module):
    """Layers of a transformer, with a small operator between them that OpenVINO has not."""

    def __init__(self) -> None:
        super().__init__()
        made = (nn.TransformerEncoderLayer(256, 8, 1024, batch_first=True) for _ in range(6))
        self.layers = nn.ModuleList(made)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
            x = x + 0.01 * torch.special.i0e(x)
        return x


def main(effort: str, cache: Path) -> dict[str, Any]:
    torch.manual_seed(0)
    module, x = Layers().eval(), torch.randn(1, 64, 256)
    with torch.inference_mode():
        mixed = ovshim.accelerate(module, x, prefer="openvino", cache_dir=cache)
        expected, answer = module(x), mixed(x)
        error = float((answer - expected).norm() / expected.norm())
        turns = interleave(
            {"eager": lambda: module(x), "ovshim": lambda: mixed(x)}, _EFFORTS[effort]
        )
    (plan,) = ovshim.explain(mixed).to_dict()["plans"]
    return {"path": plan["path"], "error": error, "samples": turns.samples}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], Path(sys.argv[2]))))
