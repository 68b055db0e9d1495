"""Many threads, one accelerated module: what a web service does, without the web.

`fast` needs no lock: every thread gets an inference request of its own, and what a call returned
is never written to again.
"""

import time
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import nn

import ovshim

WORKERS = 4
REQUESTS = 400


def ranker() -> nn.Module:
    """Scores a request of 64 candidates with 128 features each: float32 [64, 128] to [64, 1]."""
    return nn.Sequential(
        nn.Linear(128, 512), nn.GELU(), nn.Linear(512, 512), nn.GELU(), nn.Linear(512, 1)
    ).eval()


def serve(model: nn.Module, requests: list[torch.Tensor]) -> tuple[list[torch.Tensor], float]:
    """Every request's answer, in order, and the requests served in a second."""

    def handle(request: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():  # a mode belongs to a thread: set it in each
            return model(request)

    started = time.perf_counter()
    with ThreadPoolExecutor(WORKERS) as pool:
        answers = list(pool.map(handle, requests))
    return answers, len(requests) / (time.perf_counter() - started)


def main() -> None:
    torch.manual_seed(0)
    model = ranker()
    requests = [torch.randn(64, 128) for _ in range(REQUESTS)]

    # hint="throughput" arranges OpenVINO for many callers instead of one.
    fast = ovshim.accelerate(model, requests[0], prefer="openvino", hint="throughput")
    expected, eager_rate = serve(model, requests)
    answers, rate = serve(fast, requests)

    worst = max(float((a - e).norm() / e.norm()) for a, e in zip(answers, expected, strict=True))
    print(f"{WORKERS} threads: eager {eager_rate:.0f} requests/s, ovshim {rate:.0f}")
    print(f"largest relative error: {worst:.1e}")
    print(ovshim.explain(fast))


if __name__ == "__main__":
    main()
