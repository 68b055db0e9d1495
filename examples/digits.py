"""Classify handwritten digits, one at a time and all at once, by one accelerated module.

Needs scikit-learn: pip install "ovshim[demo]"
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import ovshim


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3, padding=1)
        self.conv2 = nn.Conv2d(32, 64, 3, padding=1)
        self.head = nn.Linear(64 * 16, 10)

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = F.relu(self.conv1(images))
        hidden = F.max_pool2d(F.relu(self.conv2(hidden)), 2)
        logits = self.head(hidden.flatten(1))
        return {"logits": logits, "digit": logits.argmax(1)}


def trained(images: torch.Tensor, labels: torch.Tensor) -> Classifier:
    model = Classifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(8):
        for batch in torch.randperm(len(images)).split(64):
            loss = F.cross_entropy(model(images[batch])["logits"], labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


def main() -> None:
    torch.manual_seed(0)
    found = load_digits()
    images = torch.from_numpy(found.images).float().unsqueeze(1) / 16
    labels = torch.from_numpy(found.target).long()
    model = trained(images[:1297], labels[:1297])
    held, answers = images[1297:], labels[1297:]

    # The batch may change from call to call; every output comes back in the model's own dict.
    fast = ovshim.accelerate(model, held[:1], prefer="openvino")
    with torch.inference_mode():
        one_by_one = torch.cat([fast(image.unsqueeze(0))["digit"] for image in held])
        at_once = fast(held)["digit"]
        eager = model(held)["digit"]

    print(f"right: {(at_once == answers).float().mean():.1%} of {len(held)} held-out glyphs")
    print(f"otherwise than eager: {int((at_once != eager).sum() + (one_by_one != eager).sum())}")
    print(ovshim.explain(fast))


if __name__ == "__main__":
    main()
