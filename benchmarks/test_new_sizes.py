"""Lengths in a row that no call had before, compared with eager as they come: beside eager."""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import quiet
import torch
from board import Board
from interleave import Turns, compare
from measure import AGAIN
from replay import clock, play
from rows import Row, noise

import ovshim
from ovshim.bound import installed

pytestmark = pytest.mark.benchmark(timer=clock)

_GROUP = "BERT of 4 layers, 30 new lengths from 33 to 62, then 30 over 64"
_TITLES = {"eager": "eager", "ovshim": "ovshim, no length met before", "met": "ovshim, all met"}
_LENGTHS = [*range(33, 63), *range(65, 95)]


def _bert() -> torch.nn.Module:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(hidden_size=256, num_hidden_layers=4, intermediate_size=1024)
    config.num_attention_heads = 4
    return BertModel(config).eval()


@pytest.fixture(scope="module")
def rows(board: Board, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Row], Turns]:
    quiet.wait(board.effort.patience)
    module = _bert()
    calls = [torch.randint(0, 30000, (1, length)) for length in _LENGTHS]
    cache: Path = tmp_path_factory.mktemp("cache")

    def fresh() -> torch.nn.Module:
        """A twin with a plan for every length, of which it has met those of the proof alone."""
        shapes = {"input_ids": {1: "length"}}
        fast = ovshim.accelerate(
            module, {"input_ids": calls[0][:, :8]}, dynamic_shapes=shapes, cache_dir=cache
        )
        dispatcher: Any = installed(fast)["forward"].dispatcher
        for plan in dispatcher.plans:
            assert plan.served is not None, plan.reason
            plan.notes = None  # what one round finds out is not for the next
        return fast

    met = fresh()
    samples: dict[str, list[float]] = {name: [] for name in (*_TITLES, AGAIN)}
    with torch.inference_mode():
        for _ in range(40):
            for ids in (calls[0], calls[-1]):
                met(input_ids=ids)
        for _ in range(5 if board.small else 15):
            ways = {"eager": module, "ovshim": fresh(), "met": met, AGAIN: module}
            for name, way in ways.items():
                samples[name].append(_seconds(way, calls))
    turns = Turns(samples)
    made = {name: _row(name, turns) for name in samples}
    board.add(made.values())
    return made, turns


def _seconds(way: Callable[..., Any], calls: list[torch.Tensor]) -> float:
    started = time.perf_counter()
    for ids in calls:
        way(input_ids=ids)
    return time.perf_counter() - started


def _row(name: str, turns: Turns) -> Row:
    against = compare(turns.samples["eager"], turns.samples[name])
    each = statistics.median(turns.samples[name]) / len(_LENGTHS) * 1e3
    return Row(
        group=_GROUP,
        backend=_TITLES.get(name, name),
        samples=tuple(turns.samples[name]),
        eager=None if name == "eager" else against,
        remark=noise(against, turns) if name == AGAIN else f"{each:.3g} ms a length",
        ours=name in ("ovshim", "met"),
    )


@pytest.mark.parametrize("way", _TITLES)
def test_new_sizes(
    way: str, rows: tuple[dict[str, Row], Turns], board: Board, benchmark: Any
) -> None:
    found, turns = rows
    benchmark.group = _GROUP
    benchmark.extra_info.update(board.facts(found[way], None, found[AGAIN], turns))
    play(benchmark, found[way].samples)
