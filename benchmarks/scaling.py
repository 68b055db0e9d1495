"""How cost grows along one axis: batch, length, shapes, kinds of calls, parameters, threads.

Each axis is measured with one model family: BERTs with random weights and few token ids.
"""

from __future__ import annotations

import dataclasses
import gc
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import psutil
import quiet
import torch
from interleave import Effort, Ratio, compare, interleave
from rows import duration
from torch import nn

import ovshim

__all__ = ["AXES", "Axis", "Point", "head_of", "measured"]

_IDS = 1000


@dataclasses.dataclass(frozen=True)
class Point:
    """One place on an axis.

    Attributes:
        eager, ovshim: seconds a call, one for each round of both.
        built: seconds from `accelerate` to its return, nothing cached, and then all cached.
        memory: bytes by which the process has grown since before the first call.
        remark: what else there is to say.
    """

    x: float
    eager: tuple[float, ...] = ()
    ovshim: tuple[float, ...] = ()
    built: tuple[float, float] | None = None
    memory: int | None = None
    remark: str = ""

    @property
    def ratio(self) -> Ratio | None:
        return compare(self.eager, self.ovshim) if self.eager else None

    def cells(self) -> tuple[str, ...]:
        times = [duration(statistics.median(s)) if s else "" for s in (self.eager, self.ovshim)]
        memory = "" if self.memory is None else f"{self.memory / 1e6:.0f} MB"
        built = "" if self.built is None else " / ".join(f"{s:.1f} s" for s in self.built)
        further = ", ".join(filter(None, (built, memory, self.remark)))
        return (f"{self.x:g}", *times, "" if self.ratio is None else str(self.ratio), further)


@dataclasses.dataclass(frozen=True)
class Axis:
    """What was found along one axis.

    Attributes:
        title: what changes, as the plot says it.
        model: what was run.
        further: what the last column of the table holds.
    """

    name: str
    title: str
    model: str
    points: tuple[Point, ...]
    further: str = ""


def _bert(small: bool, width: int = 256, layers: int = 4, heads: int = 4) -> nn.Module:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=_IDS,
        hidden_size=64 if small else width,
        num_hidden_layers=2 if small else layers,
        num_attention_heads=heads,
        intermediate_size=128 if small else 4 * width,
    )
    return BertModel(config, add_pooling_layer=False).eval()


_BERT = "BERT of 4 layers, 256 wide"


def _ids(batch: int, length: int) -> torch.Tensor:
    return torch.randint(0, _IDS, (batch, length))


def _accelerated(module: nn.Module, cache: Path, ids: torch.Tensor, **options: Any) -> nn.Module:
    both = {0: "batch", 1: "length"}
    return ovshim.accelerate(
        module,
        {"input_ids": ids},
        dynamic_shapes={"input_ids": both},
        prefer="openvino",
        cache_dir=cache,
        max_build_seconds=600.0,
        **options,
    )


def _times(
    module: nn.Module, fast: nn.Module, calls: Sequence[torch.Tensor], effort: Effort
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Seconds a call of eager and of ovshim, over calls of different sizes in turn."""

    def over(called: nn.Module) -> Callable[[], None]:
        def run() -> None:
            for ids in calls:
                called(input_ids=ids)

        return run

    with torch.inference_mode():
        # The first call of new sizes is answered by both.
        over(fast)()
        served = _served(fast)
        turns = interleave({"eager": over(module), "ovshim": over(fast)}, effort)
    assert _served(fast) > served, ovshim.explain(fast)
    eager, mine = (
        tuple(seconds / len(calls) for seconds in turns.samples[name])
        for name in ("eager", "ovshim")
    )
    return eager, mine


def _batches(cache: Path, effort: Effort, small: bool) -> Iterable[Point]:
    module = _bert(small)
    fast = _accelerated(module, cache, _ids(2, 32))
    for n in range(4 if small else 9):
        yield Point(2**n, *_times(module, fast, [_ids(2**n, 32)], effort))


def _lengths(cache: Path, effort: Effort, small: bool) -> Iterable[Point]:
    module = _bert(small)
    fast = _accelerated(module, cache, _ids(2, 32))
    for n in range(4, 6 if small else 10):
        yield Point(2**n, *_times(module, fast, [_ids(1, 2**n)], effort))


def _shapes(cache: Path, effort: Effort, small: bool) -> Iterable[Point]:
    module = _bert(small)
    fast = _accelerated(module, cache, _ids(2, 32))
    with torch.inference_mode():
        fast(input_ids=_ids(1, 16))
    before = _memory()
    for count in (1, 2, 5, 10) if small else (1, 2, 5, 10, 20, 50, 100, 200):
        calls = [_ids(1, 16 + n) for n in range(count)]
        eager, mine = _times(module, fast, calls, effort)
        plans = len(ovshim.explain(fast).to_dict()["plans"])
        remark = f"{plans} plan{'s' if plans > 1 else ''}"
        yield Point(count, eager, mine, memory=_memory() - before, remark=remark)


class _Scaled(nn.Module):
    """Each value of its constant is a kind of call, with a plan of its own."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU())
        self.layers.append(nn.Linear(2 * width, width))

    def forward(self, x: torch.Tensor, scale: float) -> torch.Tensor:
        scaled: torch.Tensor = self.layers(x) * scale
        return scaled


def _kinds(cache: Path, effort: Effort, small: bool) -> Iterable[Point]:
    """Calls of many kinds, each three times in a row, and memory as their plans come and go."""
    module = _Scaled(64 if small else 1024).eval()
    fast: Any = ovshim.accelerate(module, prefer="openvino", cache_dir=cache)
    x = torch.randn(1, 64 if small else 1024)
    with torch.inference_mode():
        fast(x, -1.0)
        fast(x, -1.0)
    assert _served(fast) == 1
    before, met = _memory(), 0
    for count in (1, 2, 5, 20) if small else (1, 2, 5, 10, 20, 50, 100, 200):
        started = time.perf_counter()
        with torch.inference_mode():
            for n in range(met, count):
                for _ in range(3):
                    fast(x, float(n))
        seconds = (time.perf_counter() - started) / (count - met)
        met = count
        gc.collect()
        plans = len(ovshim.explain(fast).to_dict()["plans"])
        remark = f"{plans} plans, {seconds:.2f} s for a new kind"
        yield Point(count, memory=_memory() - before, remark=remark)


def _parameters(cache: Path, effort: Effort, small: bool) -> Iterable[Point]:
    widths = (128, 192, 384, 640, 1184, 2048)
    for width in widths[:1] if small else widths:
        module = _bert(small, width, layers=6, heads=width // 32)
        seconds = []
        for _ in range(2):  # nothing cached, then all
            started = time.perf_counter()
            fast = _accelerated(module, cache, _ids(2, 32))
            seconds.append(time.perf_counter() - started)
        millions = sum(p.numel() for p in module.parameters()) / 1e6
        eager, mine = _times(module, fast, [_ids(1, 64)], effort)
        yield Point(round(millions, 1), eager, mine, built=(seconds[0], seconds[1]))
        del fast, module
        gc.collect()


def _threads(cache: Path, effort: Effort, small: bool) -> Iterable[Point]:
    module = _bert(small)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2) if small else (1, 2, 4, 8):
            torch.set_num_threads(threads)
            fast = _accelerated(module, cache, _ids(2, 32), threads=threads)
            yield Point(threads, *_times(module, fast, [_ids(1, 128)], effort))
    finally:
        torch.set_num_threads(before)


def _served(fast: Any) -> int:
    """Calls that OpenVINO has served."""
    return int(fast.ovshim.stats()["openvino"])


def _memory() -> int:
    return int(psutil.Process().memory_info().rss)


def head_of(axis: Axis) -> tuple[str, ...]:
    """Of a table of the cells of the axis's points."""
    return (axis.name, "eager", "ovshim", "× eager", axis.further)


_Measure = Callable[[Path, Effort, bool], Iterable[Point]]
_OF: dict[str, tuple[str, str, str, _Measure]] = {
    "batch": ("batch size, of length 32", _BERT, "", _batches),
    "length": ("length, batch 1", _BERT, "", _lengths),
    "shapes": (
        "number of lengths met, in turn, from 16 up",
        _BERT,
        "memory since the first call",
        _shapes,
    ),
    "kinds": (
        "kinds of calls met (values of a constant argument)",
        "2 linear layers, 4 million parameters",
        "memory since the first plan",
        _kinds,
    ),
    "parameters": (
        "millions of parameters, batch 1, length 64",
        "BERTs of 6 layers",
        "built in, with nothing cached / all cached",
        _parameters,
    ),
    "threads": ("threads, of torch and of OpenVINO, length 128", _BERT, "", _threads),
}
AXES = tuple(_OF)


def measured(name: str, effort: Effort, small: bool) -> Axis:
    """An axis, measured."""
    quiet.wait(effort.patience)
    title, model, further, measure = _OF[name]
    each = dataclasses.replace(effort, patience=effort.patience / 10)
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory,
        warnings.catch_warnings(),
    ):
        # Of too many kinds: that they go to eager is what is shown.
        warnings.simplefilter("ignore", ovshim.FallbackWarning)
        return Axis(name, title, model, tuple(measure(Path(directory), each, small)), further)
