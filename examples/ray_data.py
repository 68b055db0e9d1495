"""Classify handwritten digits by Ray Data: two worker processes, one conversion.

The worker that is first converts the network, the other finds it in the cache. The weights are
mapped from a file, so that all workers of a machine share the memory that they lie in.

Needs Ray and scikit-learn: pip install "ray[data]" "ovshim[demo]"
"""

import os
import tempfile
from pathlib import Path

import numpy as np
import ray
import torch
from sklearn.datasets import load_digits
from torch import nn

import ovshim

WORKERS = 2


def network() -> nn.Sequential:
    """float32 [batch, 64], grey values from 0 to 1, to float32 [batch, 10], a score per digit."""
    return nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))


def trained(images: torch.Tensor, labels: torch.Tensor) -> nn.Sequential:
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(20):
        for batch in torch.randperm(len(images)).split(64):
            loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


class Classify:
    """What a worker makes once, and calls with each batch."""

    def __init__(self, weights: str) -> None:
        model = network()
        # Mapped and not copied (assign): every worker looks at the same pages.
        model.load_state_dict(torch.load(weights, mmap=True), assign=True)
        # Without prefer="openvino" eager keeps what it does faster, and this network is small.
        self.fast = ovshim.accelerate(model.eval(), torch.zeros(2, 64), prefer="openvino")

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        with torch.inference_mode():
            # Ray's arrays are read-only, which torch does not know: hence a copy.
            scores = self.fast(torch.tensor(batch["image"]))
        report = ovshim.explain(self.fast).to_dict()
        rows = len(scores)
        return {
            "digit": scores.argmax(1).numpy(),
            "label": batch["label"],
            "process": np.full(rows, os.getpid()),
            "cache": np.full(rows, report["plans"][0]["cache"]),
            "eager": np.full(rows, report["calls"]["eager"]),
        }


def main() -> None:
    torch.manual_seed(0)
    found = load_digits()
    images = torch.from_numpy(found.data).float() / 16
    labels = torch.from_numpy(found.target).long()
    model = trained(images[:1297], labels[:1297])
    held = [
        {"image": image, "label": label}
        for image, label in zip(images[1297:].numpy(), labels[1297:].tolist(), strict=True)
    ]

    ray.init(num_cpus=WORKERS, include_dashboard=False)
    with tempfile.TemporaryDirectory() as directory:
        weights = str(Path(directory, "weights.pt"))
        torch.save(model.state_dict(), weights)
        answers = (
            ray.data.from_items(held)
            .map_batches(
                Classify,
                fn_constructor_args=(weights,),
                compute=ray.data.ActorPoolStrategy(size=WORKERS),
                num_cpus=1,  # Ray gives the worker as many threads, and so does ovshim
                batch_size=32,
            )
            .take_all()
        )
    ray.shutdown()

    right = np.mean([row["digit"] == row["label"] for row in answers])
    workers = {row["process"]: row["cache"] for row in answers}
    print(f"right: {right:.1%} of {len(answers)} held-out glyphs")
    print(f"calls that eager served: {max(row['eager'] for row in answers)}")
    print(f"workers that converted: {list(workers.values()).count('miss')} of {WORKERS}")


if __name__ == "__main__":
    main()
