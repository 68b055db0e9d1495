"""Sizes met for the first time: compared with eager once, and raced, bucket by bucket."""

import dataclasses
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from checks import (
    check,
    counts,
    eager_reasons,
    falls_back,
    paths,
    plans,
    run_python,
    same,
    standing,
)
from hypothesis import given
from hypothesis import strategies as st
from modules import Mlp, make
from torch import Tensor, nn

import ovshim
from ovshim import deferred, lanes, parts, tiny, verdict
from ovshim.buckets import compile_bucket, compile_sizes, shown
from ovshim.lanes import Lane
from ovshim.race import Finish
from ovshim.unmet import Unmet

SIZES = st.integers(0, 5000)


@given(SIZES, SIZES, SIZES)
def test_a_bucket_spans_a_power_of_two(batch: int, length: int, other: int) -> None:
    of_tensors, of_sizes = compile_bucket(((None, 3, None), (None,)), ["s0[0] == s1[0]"])
    sizes = ((batch, 3, length), (batch,))
    assert of_tensors([torch.empty(size, device="meta") for size in sizes]) == of_sizes(sizes)
    alike = of_sizes(((batch, 3, other), (batch,))) == of_sizes(sizes)
    assert alike == (length.bit_length() == other.bit_length())


@pytest.mark.parametrize(
    ("bucket", "told"), [(3, [3]), ((3, 0), [3, 0]), ((), []), ("alone (4, 8)", "alone (4, 8)")]
)
def test_reports_show_buckets_as_lists_whatever_is_open(bucket: Any, told: Any) -> None:
    assert shown(bucket) == told


def test_sizes_that_cannot_change_have_one_bucket() -> None:
    of_tensors, of_sizes = compile_bucket(((2, 3),), [])
    assert of_tensors([torch.empty(2, 3)]) == of_sizes(((2, 3),))


class Spoiled:
    """An engine that is wrong from a batch of 64 on."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.asked: list[int] = []

    def run(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        self.asked.append(len(tensors[0]))
        outputs: list[Tensor] = self.engine.run(tensors)
        return [y + 1 for y in outputs] if len(tensors[0]) >= 64 else outputs


def spoil(fast: nn.Module) -> Spoiled:
    bound = fast.__dict__["forward"].dispatcher
    (plan,) = bound.plans
    engine = Spoiled(plan.served.engine)
    served = plan.served
    plan.served = dataclasses.replace(served, engine=engine)  # type: ignore[arg-type]
    return engine


def accelerated(module: nn.Module, **options: Any) -> nn.Module:
    return ovshim.accelerate(module, torch.randn(3, 8), **{"prefer": "openvino", **options})


def test_a_graph_that_is_wrong_at_new_sizes_never_answers_there() -> None:
    module = make(Mlp)
    fast = accelerated(module)
    spoil(fast)
    check(fast, module, torch.randn(4, 8))
    x = torch.randn(64, 8)
    with falls_back("first-use-mismatch"):
        check(fast, module, x, path="eager", reason="first-use-mismatch")
        check(fast, module, x, path="eager", reason="first-use-mismatch")
    assert paths(fast) == ["eager"]


def test_a_graph_is_not_to_blame_for_a_weight_changed_while_both_answer() -> None:
    module = make(Mlp)
    fast = ovshim.accelerate(module, torch.randn(3, 8), cache_dir=None, prefer="openvino")
    engine, x = spoil(fast), torch.randn(64, 8)
    (plan,) = standing(fast)
    run, weight = engine.run, module.get_parameter("last.weight")

    def changed(tensors: Sequence[Tensor]) -> list[Tensor]:
        with torch.no_grad():
            weight.mul_(2.0)  # as another thread does
        return run(tensors)

    engine.run = changed  # type: ignore[method-assign]
    with torch.inference_mode():
        expected = module(x)
        assert torch.equal(fast(x), expected)
    assert engine.asked
    assert plan.reason is None
    assert eager_reasons(fast) == {"stale": 1}


@pytest.mark.slow
def test_a_mismatch_is_kept_for_every_process(tmp_path: Path) -> None:
    torch.save(make(Mlp).state_dict(), tmp_path / "weights.pt")
    script = f"""
import torch, ovshim, warnings, sys
from modules import Mlp, make
from test_lanes import spoil
warnings.simplefilter("ignore")
module = make(Mlp)
module.load_state_dict(torch.load({str(tmp_path / "weights.pt")!r}))
fast = ovshim.accelerate(module, torch.ones(3, 8), prefer="openvino", cache_dir={str(tmp_path)!r})
if sys.argv[1:] == ["spoil"]:
    spoil(fast)
x = torch.randn(64, 8)
with torch.inference_mode():
    assert torch.allclose(fast(x), module(x), atol=1e-5)
print(ovshim.explain(fast).to_dict()["plans"][0]["reason"] or "openvino")
"""
    assert "first-use-mismatch" in run_python(script, "spoil")
    assert "first-use-mismatch" in run_python(script)


def test_sizes_are_compared_once_in_each_bucket() -> None:
    module = make(Mlp)
    eager: list[int] = []
    fast = accelerated(module)
    engine = spoil(fast)
    inner = type(module).forward

    def counting(self: nn.Module, x: Tensor) -> Tensor:
        eager.append(len(x))
        return inner(self, x)  # type: ignore[arg-type]

    fast.__dict__["forward"].original.beneath = counting.__get__(fast)
    with torch.inference_mode():
        for size in (16, 17, 31, 16, 33, 40, 63):
            fast(torch.randn(size, 8))
    assert engine.asked == [16, 17, 31, 16, 33, 40, 63]
    assert eager == [16, 33]
    assert counts(fast) == {"openvino": 7, "mixed": 0, "eager": 0}


def wait_for_notes() -> None:
    """Until what is written to entries by another thread is there."""
    deferred.later(lambda: None)
    assert deferred._writer is not None
    deferred._writer.submit(int).result(30)


def test_what_was_compared_is_kept_with_the_entry(tmp_path: Path) -> None:
    module = make(Mlp)
    fast = accelerated(module, cache_dir=tmp_path)
    check(fast, module, torch.randn(40, 8))
    wait_for_notes()
    manifest = json.loads((Path(plans(fast)[0]["cache_path"]) / "manifest.json").read_text())
    assert [[40, 8]] in manifest["record"]["met"]
    again = accelerated(module, cache_dir=tmp_path)
    engine = spoil(again)
    check(again, module, torch.randn(33, 8))
    assert engine.asked == [33]


def test_exceptions_of_the_module_are_its_own_at_new_sizes() -> None:
    class Picky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = Mlp()

        def forward(self, x: Tensor) -> Tensor:
            if x.shape[0] > 100:
                raise LookupError("too many")
            y: Tensor = self.mlp(x)
            return y

    module = make(Picky)
    fast = accelerated(module)
    check(fast, module, torch.randn(90, 8))
    with torch.inference_mode(), pytest.raises(LookupError, match="too many"):
        fast(torch.randn(101, 8))


def answered_until_settled(fast: nn.Module, module: nn.Module, x: Tensor) -> int:
    """Call until it is settled who serves such calls, and once more; the calls that took."""
    (plan,) = standing(fast)
    with torch.inference_mode():
        expected = module(x)
        for calls in range(1, 100_000):
            same(fast(x), expected)
            lane = plan.lanes.get(plan.bucket([x]))
            if lane is not None and lane._samples is None:
                same(fast(x), expected)
                return calls + 1
    raise AssertionError("it is not settled")


def test_turns_are_taken_and_the_faster_one_serves() -> None:
    module = make(Mlp)
    fast = accelerated(module, prefer="faster")
    (plan,) = standing(fast)
    x = torch.randn(40, 8)
    calls = answered_until_settled(fast, module, x)
    lane = plan.lanes[plan.bucket([x])]
    assert lane.proved
    assert lane.open != lane.eager
    by = counts(fast)
    assert by["eager"] + by["openvino"] == calls
    assert ("slower" in ovshim.explain(fast).eager) == lane.eager


@pytest.mark.parametrize("eager_wins", [True, False])
def test_a_lane_is_closed_by_what_it_has_timed(eager_wins: bool) -> None:
    lane = Lane(proved=False, raced=False)
    assert lane.turn() == "both"
    lane.passed()
    finish = None
    turns = []
    while finish is None:
        turn = lane.turn()
        turns.append(turn)
        finish = lane.timed(turn, 1.0 if (turn == "eager") == eager_wins else 2.0)
    assert set(turns) == {"openvino", "eager"}
    assert abs(turns.count("eager") - turns.count("openvino")) <= 1
    assert finish.decided
    assert lane.eager is eager_wins
    assert lane.open is not eager_wins
    assert lane.turn() == ("eager" if eager_wins else "openvino")


@pytest.mark.parametrize("eager_wins", [True, False])
def test_short_calls_take_turns_by_the_clock(
    eager_wins: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside the other one's threads eager takes three times as long."""
    now, lane, turns = [0.0], Lane(proved=True, raced=False), list[str]()
    monkeypatch.setattr(lanes.time, "perf_counter", lambda: now[0])
    finish = None
    while finish is None:
        turn = lane.turn()
        spinning = turns[-40:].count("openvino") > 0
        took = {"openvino": 20e-6, "eager": (15e-6 if eager_wins else 30e-6) * (1 + 2 * spinning)}
        turns.append(turn)
        now[0] += took[turn]
        finish = lane.timed(turn, took[turn])
    assert finish.decided
    assert lane.eager is eager_wins
    assert finish.candidate == 20e-6
    changes = sum(a != b for a, b in itertools.pairwise(turns))
    assert changes < 25


def test_short_calls_that_come_seldom_take_turns_one_by_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now, lane, turns = [0.0], Lane(proved=True, raced=False), list[str]()
    monkeypatch.setattr(lanes.time, "perf_counter", lambda: now[0])
    for _ in range(20):
        now[0] += 8e-3  # by the clock it would be the same one's turn each time
        turns.append(turn := lane.turn())
        lane.timed(turn, 20e-6 if turn == "openvino" else 30e-6)
    assert lane.open
    assert {"openvino", "eager"} == set(turns)


def test_a_race_is_of_one_way_to_place_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    races: list[None] = []

    def won(*_: Any) -> Finish:
        races.append(None)
        return Finish(2.0, 1.0, 1.9, 2.1)

    monkeypatch.setattr(verdict, "race", won)
    module, x = make(Mlp), torch.randn(3, 8)
    ways: list[dict[str, Any]] = [{}, {"threads": 1}, {"streams": 2, "hint": "throughput"}]
    for count, options in enumerate(ways, 1):
        for _ in range(2):  # the second finds how it came out
            fast = ovshim.accelerate(module, x, **options)
            wait_for_notes()
            assert paths(fast) == ["openvino"]
            assert len(races) == count


LOST, WON = Finish(1.0, 1.2, 0.8, 0.9), Finish(2.0, 1.0, 1.9, 2.1)


@pytest.fixture
def races(monkeypatch: pytest.MonkeyPatch) -> list[Finish]:
    """How the next races come out; one that is not foreseen fails."""
    coming: list[Finish] = []
    monkeypatch.setattr(verdict, "race", lambda *_: coming.pop(0))
    return coming


def test_what_wins_for_the_examples_sizes_says_nothing_of_others(
    exact_wins: list[Any], races: list[Finish]
) -> None:
    del exact_wins
    module = make(Mlp)
    races.append(WON)
    fast = ovshim.accelerate(module, torch.randn(5, 8), cache_dir=None)
    (plan,) = standing(fast)
    assert plan.bucket([torch.empty(5, 8)]) == "alone [[5, 8]]"
    assert plan.bucket([torch.empty(6, 8)]) == 3
    check(fast, module, torch.randn(5, 8))
    assert plan.open == {5}
    plan.unmet._left = 1e3
    answered_until_settled(fast, module, torch.randn(6, 8))
    assert eager_reasons(fast)["taking-turns"] >= 8  # the open graph is raced itself


def test_what_loses_by_little_competes_with_a_graph_for_its_sizes(
    exact_wins: list[Any], races: list[Finish], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tiny, "_is_tiny", lambda call, times: False)
    module, x = make(Mlp), torch.randn(5, 8)
    for cache in ("miss", "hit"):
        races += [LOST, WON] if cache == "miss" else []
        fast = ovshim.accelerate(module, x, cache_dir=tmp_path)
        (plan,) = standing(fast)
        assert (plan.cache, plan.path, plan.speedup, races) == (cache, "openvino", 2.0, [])
        assert plan.way.endswith("exact sizes in one thread")
        assert exact_wins
        check(fast, module, x)
        check(fast, module, torch.randn(6, 8), path="eager", reason="slower")
        wait_for_notes()


@pytest.mark.parametrize("finish", [Finish(1.0, 1.3, 0.7, 0.8), LOST])
def test_what_loses_by_more_is_left_to_eager(
    finish: Finish,
    exact_wins: list[Any],
    races: list[Finish],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(tiny, "_is_tiny", lambda call, times: False)
    monkeypatch.setattr(parts, "divide", lambda job, plan: plan)
    near = finish is LOST
    module, x = make(Mlp), torch.randn(5, 8)
    for cache in ("miss", "hit"):
        races += ([finish, LOST] if near else [finish]) if cache == "miss" else []
        fast = ovshim.accelerate(module, x, cache_dir=tmp_path)
        assert (standing(fast)[0].cache, races) == (cache, [])
        check(fast, module, x, path="eager", reason="slower")
        assert bool(exact_wins) is near
        wait_for_notes()


def test_an_undecided_race_leaves_openvino_serving() -> None:
    lane = Lane(proved=True, raced=False)
    times = iter([1.0, 1.1, 1.1, 1.0] * 20)
    while lane._samples is not None:
        lane.timed(lane.turn(), next(times))
    assert lane.open
    assert not lane.eager


@given(st.lists(st.integers(0, 400), max_size=600), st.floats(0.1, 20.0), st.floats(0.05, 2.0))
def test_first_calls_cost_a_tenth_of_eagers_time(
    sizes: list[int], first: float, openvino: float
) -> None:
    """A program in which eager takes a second for each call, whatever sizes come, and how often."""
    unmet = Unmet(-1, 0, 1.0, openvino)
    spent, calls = 0.0, 0
    for size in sizes:
        if size in unmet.met:
            spent += openvino
            calls += 1
        elif unmet.affords(False, calls):
            unmet.openvino_took(first, by_both=False)
            unmet.meet(size, 0)
            spent += first
            calls += 1
        else:
            unmet.eager_took(1.0)
            spent += 1.0
    # What the very first one costs is not known before.
    unknown = max(first - 2.0, 0.0) + max(openvino - 1.0, 0.0) * calls
    assert spent <= 1.1 * len(sizes) + unknown + 1e-6


def test_sizes_that_come_again_are_served() -> None:
    module = make(Mlp)
    fast = accelerated(module)
    (plan,) = standing(fast)
    plan.raced = True
    plan.lanes = {plan.bucket([torch.empty(3, 8)]): Lane(True, raced=True)}
    plan.unmet = Unmet(3, plan.bucket([torch.empty(3, 8)]), 10.0, 10.0)
    plan.key = compile_sizes(plan.pattern, plan.size_guards)
    plan.reason = None
    plan.settle()
    check(fast, module, torch.randn(3, 8))
    x = torch.randn(2, 8)
    check(fast, module, x, path="eager", reason="new-sizes")
    plan.unmet._left = 100.0
    check(fast, module, x)
    assert plan.open == {3, 2}
    check(fast, module, x)
    # Of another bucket: both answer, once there is enough for that.
    y = torch.randn(40, 8)
    plan.unmet._left = 0.0
    plan.unmet._first = 50.0
    check(fast, module, y, path="eager", reason="new-sizes")
    plan.unmet._left = 60.0
    check(fast, module, y)
    assert plan.lanes[plan.bucket([y])].proved
