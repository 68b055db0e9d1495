"""Steps of many tokens: both answer until it is clear who is faster, and it is kept."""

import json
import math
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ovshim.decode.long_steps import LongSteps
from ovshim.decode.probes import bucket

PROMPT = bucket(1, 900, 900, 0)
SECONDS = st.floats(1e-6, 1e3)


def made(known: Any = None) -> tuple[LongSteps, list[dict[str, Any]]]:
    kept: list[dict[str, Any]] = []
    return LongSteps(known, kept.append), kept


@given(st.lists(st.tuples(SECONDS, SECONDS), max_size=6))
def test_eager_has_to_be_faster_every_time(samples: list[tuple[float, float]]) -> None:
    steps, kept = made()
    for n, (eager, openvino) in enumerate(samples):
        won = any(ours <= theirs for theirs, ours in samples[: min(n, 3)])
        assert steps.open(PROMPT) == (not won and n < 3)
        assert steps.lost(PROMPT) == (not won and n >= 3)
        steps.add(PROMPT, eager, openvino)
    lost = len(samples) >= 3 and all(eager < openvino for eager, openvino in samples[:3])
    assert steps.lost(PROMPT) == lost
    settled = bool(samples) and not steps.open(PROMPT)
    assert len(kept) == settled
    # Another process goes on from what was kept.
    again, _ = made(json.loads(json.dumps(kept[-1])) if kept else None)
    assert again.lost(PROMPT) == lost
    assert again.open(PROMPT) != settled
    assert again.to_list() == (steps.to_list() if settled else [])


@given(st.integers(1, 64), st.integers(1, 5000), st.integers(0, 5000))
def test_short_steps_are_never_timed(batch: int, tokens: int, past: int) -> None:
    steps, kept = made()
    sizes = bucket(batch, tokens, tokens + past, 0)
    assert steps.open(sizes) == (tokens >= 16)
    for _ in range(3):
        steps.add(sizes, 1.0, 2.0)
    assert steps.lost(sizes) == bool(kept) == (tokens >= 16)


def test_buckets_are_settled_each_for_itself() -> None:
    steps, kept = made()
    turn = bucket(1, 128, 900, 0)
    for _ in range(3):
        steps.add(PROMPT, 1.0, 2.0)
        steps.add(turn, 2.0, 1.0)
    assert steps.lost(PROMPT)
    assert not steps.lost(turn)
    assert len(kept) == 2
    assert steps.to_list() == [
        {"bucket": [1, 8, 10, 0], "path": "openvino", "medians": [2.0, 1.0]},
        {"bucket": [1, 10, 10, 0], "path": "eager", "medians": [1.0, 2.0]},
    ]


@pytest.mark.parametrize(
    "known",
    [
        None,
        [1],
        "x",
        {1: [[1, 2]]},
        {"1,10,10": [[1.0, 2.0]] * 3},
        {"1,10,10,-1": [[1.0, 2.0]] * 3},
        {"1,10,10,0": 3},
        {"1,10,10,0": [[1.0]] * 3},
        {"1,10,10,0": [["a", None]] * 3},
        {"1,10,10,x": [[1.0, 2.0]] * 3},
        {"1,10,10,0": [[10**400, 1.0]] * 3},
        {"1,10,10,0": [[math.nan, 1.0]] * 3},
        {"1,20000,20000,0": [[1.0, 2.0]] * 3},
    ],
)
def test_what_is_no_finding_is_found_anew(known: Any) -> None:
    steps, _ = made(known)
    assert steps.open(PROMPT)
    assert not steps.lost(PROMPT)
    assert steps.to_list() == []


def test_threads_may_settle_buckets_at_once() -> None:
    usual = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(5):
            steps, kept = made()

            def work(k: int, steps: LongSteps = steps) -> None:
                for i in range(60):
                    steps.add((1, 10, i, k), 2.0, 1.0)
                    steps.to_list()

            with ThreadPoolExecutor(4) as pool:
                list(pool.map(work, range(4)))
            assert len(kept) == len(steps.to_list()) == 240
    finally:
        sys.setswitchinterval(usual)
