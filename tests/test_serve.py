"""`map`, `submit`, `acall` and `Batcher`: many calls at once, each answered as if it were alone."""

import asyncio
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from checks import counts, falls_back, quietly, run_python, same, served, share_of_other_threads
from modules import Attention, Branches, Mlp, make
from torch import Tensor, nn

import ovshim
from ovshim import pace, shortcut
from ovshim.infer import Engine, EngineDead
from ovshim.reasons import reason
from ovshim.serve import Batcher, ahead, alike, sizing
from ovshim.serve.copies import joined
from ovshim.serve.flight import Flight, ready
from ovshim.serve.flight import Kept as KeptCall


def accelerated(module: nn.Module, example: Any, **options: Any) -> Any:
    return ovshim.accelerate(module, example, prefer="openvino", **options)


def fast_mlp(**options: Any) -> tuple[nn.Module, Any]:
    module = make(Mlp)
    return module, accelerated(module, torch.randn(3, 8), **options)


IN_FLIGHT = pytest.mark.parametrize("in_flight", [None, 1, 3])

# map


@IN_FLIGHT
@pytest.mark.parametrize("hint", ["latency", "throughput"])
def test_map_answers_in_order(in_flight: int | None, hint: str) -> None:
    module, fast = fast_mlp(hint=hint)
    xs = [torch.randn(1 + n % 4, 8) for n in range(30)]
    with torch.inference_mode(), served(fast, "openvino", calls=30):
        answers = list(fast.ovshim.map(iter(xs), in_flight=in_flight))
    with torch.inference_mode():
        same(answers, [module(x) for x in xs])
    assert all(answer.is_inference() for answer in answers)


class Weighted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 4)

    def forward(self, x: Tensor, weight: Tensor) -> dict[str, Tensor]:
        return {"y": self.linear(x) * weight, "x": x}


def test_items_are_examples_in_every_form() -> None:
    module = make(Weighted)
    x, weight = torch.randn(3, 8), torch.randn(3, 1)
    fast = accelerated(module, {"x": x, "weight": weight})
    items = [{"weight": weight, "x": x}, (x, weight), {"x": x, "weight": weight}]
    with torch.inference_mode(), quietly():
        list(fast.ovshim.map(items))
        with served(fast, "openvino", calls=3):
            answers = list(fast.ovshim.map(items, in_flight=2))
        same(answers, [module(x, weight)] * 3)
    assert all(answer["x"] is x for answer in answers)


def test_several_are_under_way_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    module, fast = fast_mlp()
    together = threading.Barrier(3)
    run = Engine.run

    def wait_for_others(self: Engine, tensors: Any, **how: bool) -> list[Tensor]:
        if not how:  # by way of its rival, the same call comes a second time
            together.wait(30)
        return run(self, tensors, **how)

    monkeypatch.setattr(Engine, "run", wait_for_others)
    xs = [torch.randn(3, 8) for _ in range(9)]
    with torch.inference_mode(), served(fast, "openvino", calls=9):
        same(list(fast.ovshim.map(xs, in_flight=3)), [module(x) for x in xs])


def test_others_go_on_while_one_is_held_up(monkeypatch: pytest.MonkeyPatch) -> None:
    module, fast = fast_mlp()
    others, compute = threading.Semaphore(0), Flight.compute
    numbers = iter(range(8))

    def hold_the_first(self: Flight) -> list[Tensor]:
        if next(numbers) == 0:
            assert all(others.acquire(timeout=30) for _ in range(3))
        computed = compute(self)
        others.release()
        return computed

    monkeypatch.setattr(Flight, "compute", hold_the_first)
    xs = [torch.randn(3, 8) for _ in range(8)]
    with torch.inference_mode(), served(fast, "openvino", calls=8):
        same(list(fast.ovshim.map(xs, in_flight=2)), [module(x) for x in xs])


COPIED = {
    "small": torch.randn(3, 8),
    "large": torch.randn(1, 3, 256, 256),
    "channels last": torch.randn(2, 3, 128, 256).contiguous(memory_format=torch.channels_last),
    "sizes of one": torch.randn(1, 65536, 1).as_strided((1, 65536, 1), (7, 1, 3)),
    "expanded": torch.randn(1, 256).expand(256, 256),
    "every other": torch.randn(256, 512)[:, ::2],
    "bfloat16": torch.randn(256, 256).bfloat16(),
    "bool": torch.rand(256, 256) > 0.5,
    "conjugated": torch.randn(256, 256, dtype=torch.complex64).conj(),
    "negative": torch._neg_view(torch.randn(256, 256)),
    "sparse": torch.eye(256).to_sparse(),
}


@pytest.mark.parametrize("kind", COPIED)
@pytest.mark.parametrize("inference", [False, True])
def test_copies_are_as_torch_would_make_them(kind: str, inference: bool) -> None:
    x = COPIED[kind]
    with torch.inference_mode(inference):
        (copy,) = KeptCall(((x,), {})).copies([x])
    expected = x.clone()
    assert torch.equal(copy.to_dense(), expected.to_dense())
    assert copy.dtype == expected.dtype
    assert not copy.is_inference()
    if x.layout == torch.strided:
        assert copy.stride() == expected.stride()
        assert copy.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()


@pytest.mark.parametrize("sizes", [(1, 3), (200, 100)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64], ids=str)
@pytest.mark.parametrize("form", ["contiguous", "channels last", "strided"])
def test_rows_are_joined_as_torch_would(
    sizes: tuple[int, int], dtype: torch.dtype, form: str
) -> None:
    parts = [torch.rand(rows, 3, 8, 8).mul(9).to(dtype) for rows in sizes]
    if form == "channels last":
        parts = [part.contiguous(memory_format=torch.channels_last) for part in parts]
    elif form == "strided":
        parts = [part[..., ::2] for part in parts]
    with torch.inference_mode():
        whole, expected = joined(parts), torch.cat(parts)
    assert torch.equal(whole, expected)
    assert whole.stride() == expected.stride()
    assert whole.dtype == dtype
    assert whole.is_inference()


@pytest.mark.skipif(torch.get_num_threads() == 1, reason="torch has no other threads")
def test_copies_do_not_wake_torchs_threads() -> None:
    x = torch.randn(4_000_000)
    assert share_of_other_threads(lambda: KeptCall(((x,), {}))) < 0.1
    assert share_of_other_threads(lambda: joined([x, x])) < 0.1
    assert share_of_other_threads(x.clone) > 0.1


def test_a_tensor_that_is_filled_again_and_again() -> None:
    module, fast = fast_mlp()
    x, values = torch.empty(3, 8), torch.randn(20, 3, 8)

    def items() -> Iterator[Tensor]:
        for value in values:
            yield x.copy_(value)

    with torch.inference_mode(), served(fast, "openvino", calls=20):
        same(list(fast.ovshim.map(items(), in_flight=3)), [module(v) for v in values])


def test_calls_for_eager_have_their_turn() -> None:
    module, fast = fast_mlp()
    xs = [torch.randn(3, 8) for _ in range(12)]
    for number in (0, 5, 6, 11):
        xs[number][1, 2] = float("nan")
    with torch.inference_mode():
        same(list(fast.ovshim.map(xs, in_flight=3)), [module(x) for x in xs])
    assert counts(fast) == {"openvino": 8, "mixed": 0, "eager": 4}


class Looking(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return self.table(ids).sum(1)


@IN_FLIGHT
def test_an_exception_comes_at_its_turn(in_flight: int | None) -> None:
    module = make(Looking)
    ids = [torch.randint(0, 10, (2, 3)) for _ in range(6)]
    fast = accelerated(module, ids[0])
    ids[3][0, 0] = 10
    answers = []
    with torch.inference_mode():
        line = fast.ovshim.map(ids, in_flight=in_flight)
        with pytest.raises(IndexError, match="out of range"):  # noqa: PT012
            for answer in line:
                answers.append(answer)  # noqa: PERF402
        same(answers, [module(x) for x in ids[:3]])
        assert list(line) == []


@pytest.mark.parametrize("wrong", [[1, 2], RuntimeError("no more")])
def test_what_items_raise_comes_at_its_turn(wrong: Any) -> None:
    module, fast = fast_mlp()
    xs = [torch.randn(3, 8) for _ in range(3)]

    def items() -> Iterator[Any]:
        yield from xs
        if isinstance(wrong, Exception):
            raise wrong
        yield wrong

    answers = []
    error = type(wrong) if isinstance(wrong, Exception) else ovshim.OptionError
    with torch.inference_mode():
        with pytest.raises(error):  # noqa: PT012
            for answer in fast.ovshim.map(items(), in_flight=2):
                answers.append(answer)  # noqa: PERF402
        same(answers, [module(x) for x in xs])


class Stateful(nn.Module):
    """In eager for what it counts; each answer says how many went before."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 4)
        self.count = 0

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return self.linear(x) + self.count


def test_eager_answers_one_at_a_time() -> None:
    module, other = make(Stateful), make(Stateful)
    fast = ovshim.accelerate(module)
    xs = [torch.randn(3, 8) for _ in range(20)]
    with torch.inference_mode(), falls_back("mutates-attribute"):
        mapped = list(fast.ovshim.map(xs[:10], in_flight=4))  # type: ignore[operator, union-attr]
        futures = [fast.ovshim.submit(x) for x in xs[10:]]  # type: ignore[operator, union-attr]
        answers = mapped + [future.result(60) for future in futures]
    with torch.inference_mode():
        same(answers, [other(x) for x in xs])


def test_hooks_fire_once_a_call_and_in_order() -> None:
    module, fast = fast_mlp()
    seen: list[Tensor] = []
    fast.register_forward_hook(lambda self, args, output: seen.append(args[0]))
    xs = [torch.randn(3, 8) for _ in range(6)]
    with torch.inference_mode():
        same(list(fast.ovshim.map(xs, in_flight=3)), [module(x) for x in xs])
        same(fast.ovshim.submit(xs[0]).result(60), module(xs[0]))
    assert [id(x) for x in seen[:6]] == [id(x) for x in xs]
    same(seen[6:], xs[:1])


def test_what_changes_between_two_answers_counts() -> None:
    module, fast = fast_mlp()
    xs = [torch.randn(3, 8) for _ in range(8)]
    answers, expected = [], []
    with torch.inference_mode(), quietly():
        for number, answer in enumerate(fast.ovshim.map(xs, in_flight=3)):
            answers.append(answer)
            expected.append(module(xs[number]))
            if number == 3:
                with torch.inference_mode(False), torch.no_grad():
                    module.get_parameter("last.bias").add_(1)
    same(answers, expected)


def test_the_mode_is_that_of_the_thread_that_asks() -> None:
    _, fast = fast_mlp()
    line = fast.ovshim.map([torch.randn(3, 8) for _ in range(6)], in_flight=3)
    with torch.inference_mode():
        assert next(line).is_inference()
    with torch.no_grad():
        answer = next(line)
        assert not answer.is_inference()
        assert not answer.requires_grad
    assert next(line).requires_grad
    with torch.autocast("cpu"), torch.inference_mode(), falls_back("autocast"):
        assert next(line).dtype == torch.bfloat16


def test_an_engine_that_dies_is_eagers_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    module, fast = fast_mlp()
    xs = [torch.randn(3, 8) for _ in range(5)]

    def die(self: Engine, tensors: Any, **how: bool) -> list[Tensor]:
        raise EngineDead("it died")

    monkeypatch.setattr(Engine, "run", die)
    with torch.inference_mode(), falls_back("infer-failed"):
        same(list(fast.ovshim.map(xs, in_flight=2)), [module(x) for x in xs])
    assert counts(fast) == {"openvino": 0, "mixed": 0, "eager": 5}


ONE_BY_ONE: dict[str, Callable[[Any, list[Tensor]], list[Any]]] = {
    "submit": lambda fast, xs: [fast.ovshim.submit(x).result(60) for x in xs],
    "map": lambda fast, xs: list(fast.ovshim.map(xs)),
    "map, two at once": lambda fast, xs: list(fast.ovshim.map(xs, in_flight=2)),
}


@pytest.mark.parametrize("way", ONE_BY_ONE)
def test_an_engine_that_dies_once_it_was_asked(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, fast = fast_mlp(hint="throughput")
    xs = [torch.randn(3, 8) for _ in range(3)]

    def dying(*args: Any) -> Any:
        found = ready(*args)
        if found is not None:
            plan, asked, _ = found
            asked.engine.close("it died")
            plan.served, plan.reason = None, reason("infer-failed")
        return found

    with torch.inference_mode():
        with by_openvino(fast, 1):
            fast(xs[0])
        monkeypatch.setattr(ahead, "ready", dying)
        with quietly():
            same(ONE_BY_ONE[way](fast, xs), [module(x) for x in xs])


def test_nothing_is_left_of_a_map_that_is_not_finished() -> None:
    _, fast = fast_mlp()
    with torch.inference_mode():
        line = fast.ovshim.map((torch.randn(3, 8) for _ in range(100)), in_flight=3)
        next(line)
        assert any(t.name.startswith("ovshim-map") for t in threading.enumerate())
        line.close()
    assert not any(t.name.startswith("ovshim-map") for t in threading.enumerate())


@pytest.mark.parametrize("wrong", [0, -1, 1.5, True, "many"])
def test_in_flight_is_checked_at_once(wrong: Any) -> None:
    _, fast = fast_mlp()
    with pytest.raises(ovshim.OptionError, match="in_flight"):
        fast.ovshim.map([], in_flight=wrong)


def test_what_is_no_stream_of_items_is_told_at_once() -> None:
    _, fast = fast_mlp()
    with pytest.raises(ovshim.OptionError, match="items=5"):
        fast.ovshim.map(5)


def test_map_builds_and_falls_back_as_a_call_does() -> None:
    module = make(Branches)
    fast = ovshim.accelerate(module, prefer="openvino")
    xs = [torch.randn(3, 8) for _ in range(4)]
    with torch.inference_mode(), falls_back("value-dependent"):
        same(list(fast.ovshim.map(xs, in_flight=2)), [module(x) for x in xs])  # type: ignore[operator, union-attr]
    strict: Any = ovshim.accelerate(module, prefer="openvino", strict=True)
    with torch.inference_mode(), pytest.raises(ovshim.FallbackError):
        list(strict.ovshim.map(xs, in_flight=2))


# submit and acall


def test_futures_of_many_calls() -> None:
    module, fast = fast_mlp(hint="throughput")
    xs = [torch.randn(1 + n % 4, 8) for n in range(30)]
    with torch.inference_mode(), served(fast, "openvino", calls=30):
        futures = [fast.ovshim.submit(x) for x in xs]
        answers = [future.result(60) for future in futures]
    with torch.inference_mode():
        same(answers, [module(x) for x in xs])
    assert all(answer.is_inference() for answer in answers)


class Writing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x.mul_(2)
        return x + 1


def test_what_the_module_writes_to_inputs_is_written() -> None:
    fast: Any = ovshim.accelerate(Writing().eval())
    x, y = torch.ones(3), torch.ones(3)
    with torch.no_grad(), falls_back("mutates-input"):
        fast(y)
        assert fast.ovshim.submit(x).result(60).tolist() == [3, 3, 3]
        assert next(fast.ovshim.map([x], in_flight=2)).tolist() == [5, 5, 5]
    assert x.tolist() == [4, 4, 4]


@pytest.mark.parametrize("eager", [False, True])
def test_inputs_may_be_written_to_after_submit(eager: bool) -> None:
    module = make(Branches) if eager else make(Mlp)
    fast: Any = ovshim.accelerate(module, prefer="openvino")
    x, values = torch.empty(3, 8), torch.randn(12, 3, 8)
    with torch.no_grad(), quietly():
        fast(values[0])
        futures = [fast.ovshim.submit(x.copy_(value)) for value in values]
        same([future.result(60) for future in futures], [module(value) for value in values])


def test_a_submitted_call_is_made_in_the_callers_modes() -> None:
    module, fast = fast_mlp()
    x = torch.randn(3, 8)
    with torch.inference_mode():
        assert fast.ovshim.submit(x).result(60).is_inference()
    with torch.no_grad():
        assert not fast.ovshim.submit(x).result(60).requires_grad
    with quietly():
        answer = fast.ovshim.submit(x).result(60)
        answer.sum().backward()
        assert module.get_parameter("last.bias").grad is not None
        with torch.autocast("cpu"):
            future = fast.ovshim.submit(x)
        assert future.done()
        assert future.result().dtype == torch.bfloat16


def test_exceptions_go_into_the_future() -> None:
    module, fast = fast_mlp()
    looking = accelerated(make(Looking), torch.randint(0, 10, (2, 3)))
    with torch.inference_mode():
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            fast.ovshim.submit(torch.randn(3, 9)).result(60)
        with pytest.raises(IndexError, match="out of range"):
            looking.ovshim.submit(torch.full((2, 3), 10)).result(60)
        with pytest.raises(TypeError, match="unexpected keyword"):
            fast.ovshim.submit(y=1).result(60)
        same(fast.ovshim.submit(x=torch.ones(3, 8)).result(60), module(torch.ones(3, 8)))


def threads_of_calls(monkeypatch: pytest.MonkeyPatch) -> list[threading.Thread]:
    """The thread that each call of an engine ran in, from now on."""
    seen, bind = [], Engine._bind_inputs

    def note(self: Engine, slot: Any, tensors: Any) -> Any:
        seen.append(threading.current_thread())
        return bind(self, slot, tensors)

    # Not `run`, which may leave a call to another engine. Nor by the helper, which asks neither.
    monkeypatch.setattr(Engine, "_bind_inputs", note)
    monkeypatch.setattr(shortcut, "way_of", lambda *given, **facts: None)
    return seen


def test_what_is_quick_is_answered_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace, "_WORTH_A_THREAD_SECONDS", 30.0)
    module, fast = fast_mlp(hint="throughput")
    xs = [torch.randn(3, 8) for _ in range(4)]
    seen = threads_of_calls(monkeypatch)
    with torch.inference_mode(), served(fast, "openvino", calls=8):
        same(fast.ovshim.submit(xs[0]).result(60), module(xs[0]))  # how long was not known
        futures = [fast.ovshim.submit(x) for x in xs[1:]]
        assert all(future.done() for future in futures)
        same([future.result() for future in futures], [module(x) for x in xs[1:]])
        same(list(fast.ovshim.map(xs)), [module(x) for x in xs])
    here = threading.current_thread()
    assert [thread is here for thread in seen] == [False] + [True] * 7


def test_short_calls_of_map_are_taken_for_such_by_their_sizes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[Any] = []

    def noted(*given: Any) -> Any:
        asked.append(given[2][0].shape)
        return ready(*given)

    monkeypatch.setattr(ahead, "ready", noted)
    module, fast = fast_mlp()
    xs = [torch.randn(3, 8) for _ in range(70)]
    xs[20], xs[40] = torch.randn(2, 8), torch.full((3, 8), torch.nan)
    weight = module.get_parameter("last.weight")

    def items() -> Iterator[Tensor]:
        for n, x in enumerate(xs):
            if n == 10:
                with torch.no_grad():
                    weight.mul_(2.0)
            yield x

    before = weight.detach().clone()
    with torch.inference_mode():
        answers = list(fast.ovshim.map(items()))
        expected = [module(x) for x in xs[10:]]
    with torch.no_grad():
        weight.copy_(before)
        expected = [module(x) for x in xs[:10]] + expected
    same(answers, expected)
    # The first, that of other sizes, and the one behind it.
    assert [tuple(shape) for shape in asked] == [(3, 8), (2, 8), (3, 8)]


def test_what_turns_out_long_gets_threads_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace, "_WORTH_A_THREAD_SECONDS", 0.0)
    monkeypatch.setattr(pace, "_WORTH_A_TRY_SECONDS", 30.0)
    module, fast = fast_mlp()
    x = torch.randn(3, 8)
    seen = threads_of_calls(monkeypatch)
    with torch.inference_mode(), served(fast, "openvino", calls=10):
        for _ in range(10):
            same(fast.ovshim.submit(x).result(60), module(x))
    here = threading.current_thread()
    assert [thread is here for thread in seen] == [False] + [True] * 5 + [False] * 4


def test_interruptions_make_nothing_long() -> None:
    calls = pace.Pace()
    assert not calls.quick  # nothing is known
    calls.took(5e-3, here=False)
    assert calls.quick  # or so it may be
    for seconds in (1e-4, *[1.0] * 20):
        calls.took(seconds, here=True)
    assert calls.quick
    calls = pace.Pace()
    calls.took(0.5, here=False)
    assert not calls.quick


def test_nothing_is_answered_at_once_behind_a_long_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace, "_WORTH_A_THREAD_SECONDS", 30.0)
    module, fast = fast_mlp(dynamic_batch=True)
    few, many = torch.randn(3, 8), torch.randn(64, 8)
    go, run = threading.Event(), Engine.run

    def hold(self: Engine, tensors: Any, **how: bool) -> list[Tensor]:
        assert len(tensors[0]) == 3 or go.wait(30)
        return run(self, tensors, **how)

    with torch.inference_mode():
        same(fast(many), module(many))  # of sizes that are new, by eager too
        fast.ovshim.submit(few).result(60)
        monkeypatch.setattr(Engine, "run", hold)
        long, quick = fast.ovshim.submit(many), fast.ovshim.submit(few)
        assert not quick.done()
        go.set()
        same([long.result(60), quick.result(60)], [module(many), module(few)])
        assert fast.ovshim.submit(few).done()


def test_what_is_quick_and_eagers_is_eagers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace, "_WORTH_A_THREAD_SECONDS", 30.0)
    module = make(Looking)
    ids, wrong = torch.randint(0, 10, (2, 3)), torch.full((2, 3), 10)
    fast = accelerated(module, ids, hint="throughput")
    with torch.inference_mode():
        same(fast.ovshim.submit(ids).result(60), module(ids))
        assert fast.ovshim.submit(ids).done()
        with pytest.raises(IndexError, match="out of range"):
            fast.ovshim.submit(wrong).result(60)
        line = fast.ovshim.map([ids, wrong, ids])
        same(next(line), module(ids))
        with pytest.raises(IndexError, match="out of range"):
            next(line)


def test_who_waits_is_told_where_no_memory_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    _, fast = fast_mlp()

    def fail(self: Engine, tensors: Any, **how: bool) -> list[Tensor]:
        raise MemoryError("none is left")

    monkeypatch.setattr(Engine, "run", fail)
    with torch.inference_mode(), pytest.raises(MemoryError, match="none is left"):
        fast.ovshim.submit(torch.randn(3, 8)).result(60)


def test_a_future_that_is_cancelled_before_its_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    module, fast = fast_mlp()
    started, go = threading.Event(), threading.Event()
    run = Engine.run

    def hold(self: Engine, tensors: Any, **how: bool) -> list[Tensor]:
        started.set()
        assert go.wait(30)
        return run(self, tensors, **how)

    monkeypatch.setattr(Engine, "run", hold)
    x = torch.randn(3, 8)
    with torch.inference_mode():
        first = fast.ovshim.submit(x)
        assert started.wait(30)
        second, third = fast.ovshim.submit(x), fast.ovshim.submit(x)
        assert second.cancel()
        go.set()
        same([first.result(60), third.result(60)], [module(x)] * 2)
    assert counts(fast)["openvino"] == 2


def test_asyncio() -> None:
    module, fast = fast_mlp(hint="throughput")
    xs = [torch.randn(1 + n % 4, 8) for n in range(20)]

    async def main() -> list[Tensor]:
        return list(await asyncio.gather(*(fast.ovshim.acall(x) for x in xs)))

    with torch.inference_mode():
        same(asyncio.run(main()), [module(x) for x in xs])
    assert counts(fast)["openvino"] == 20


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_forked_child_has_threads_of_its_own() -> None:
    script = """
import os, torch, ovshim
from ovshim.serve import Batcher
from modules import Mlp, make
torch.set_num_threads(1)
module, x = make(Mlp), torch.linspace(-1, 1, 24).view(3, 8)
fast = ovshim.accelerate(module, x, prefer="openvino")
batcher = Batcher(fast, max_batch=8, max_delay=0)
def look():
    with torch.inference_mode():
        answers = [fast.ovshim.submit(x).result(60), *fast.ovshim.map([x] * 3, 2), batcher(x)]
        for answer in answers:
            torch.testing.assert_close(answer, expected, rtol=1e-4, atol=1e-5)
with torch.inference_mode():
    expected = module(x)
look()
child = os.fork()
look()
if child == 0:
    os._exit(0)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert run_python(script) == "0\n"


def test_who_goes_on_after_the_main_thread_has_ended_is_answered() -> None:
    """Threads that were there compute on, and no new work is taken."""
    script = """
import threading
from concurrent.futures import ThreadPoolExecutor
import torch, ovshim
from torch import nn
from ovshim.infer import Engine
from ovshim.pace import Pace
from modules import make
module = make(nn.Embedding, 10, 8)
good = torch.arange(6).view(2, 3)
fast = ovshim.accelerate(module, good, prefer="openvino", hint="throughput")
run, begun = Engine.run, threading.Event()
def ended():
    while True:
        try:
            ThreadPoolExecutor(1).submit(int).result()
        except RuntimeError:
            return
def late(self, tensors, **how):
    if threading.current_thread().name.startswith("ovshim-submit") and not begun.is_set():
        begun.set()
        ended()
    return run(self, tensors, **how)
def work():
    with torch.inference_mode():
        expected = module(good)
        try:
            fast.ovshim.submit(good + 100).result()
        except IndexError:
            print("eager's error")
        before = fast.ovshim.stats()
        answers = [fast(good), *fast.ovshim.map([good] * 2), *fast.ovshim.map([good] * 2, 2)]
        answers.append(fast.ovshim.submit(good).result())
        print(all(torch.equal(answer, expected) for answer in answers))
        print(fast.ovshim.stats()["openvino"] - before["openvino"])
        try:
            fast.ovshim.submit(good + 100).result()
        except IndexError:
            print("eager's error")
with torch.inference_mode():
    for _ in range(3):
        fast(good)
Pace.quick = property(lambda self: False)
Engine.run = late
threading.Thread(target=work).start()
begun.wait()
"""
    assert run_python(script) == "eager's error\nTrue\n6\neager's error\n"


# Batcher


def in_threads(work: Callable[[int], Any], count: int) -> list[Any]:
    """What each of that many threads returned, all let go at once, under inference mode."""
    together = threading.Barrier(count)

    def run(number: int) -> Any:
        together.wait(30)
        with torch.inference_mode():
            return work(number)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))


@contextmanager
def by_openvino(fast: nn.Module, calls: int) -> Iterator[None]:
    """Assert that OpenVINO serves so many calls, and what is tried out besides."""
    before = counts(fast)
    yield
    after = counts(fast)
    assert after["eager"] == before["eager"], ovshim.explain(fast)
    assert after["openvino"] >= before["openvino"] + calls


LONG = 30.0  # seconds that no test waits: a batch is full before


def test_calls_of_many_threads_make_a_batch() -> None:
    module, fast = fast_mlp()
    xs = [torch.randn(1 + n % 2, 8) for n in range(6)]
    with Batcher(fast, max_batch=9, max_delay=LONG) as batcher, by_openvino(fast, 6):
        answers = in_threads(lambda n: batcher(xs[n]), 6)
        assert batcher.stats() == {"calls": 6, "batched": 6, "batches": 1}
    with torch.inference_mode():
        same(answers, [module(x) for x in xs])
    storages = {answer.untyped_storage().data_ptr() for answer in answers}
    assert len(storages) == 6
    assert all(answer.is_inference() for answer in answers)


def test_a_plan_that_loses_its_engine_once_the_batch_is_computed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module, fast = fast_mlp()
    xs = [torch.randn(1, 8) for _ in range(4)]
    answer = alike.Call.answer

    def late(self: alike.Call) -> Any:
        self.plan.served = None
        return answer(self)

    with Batcher(fast, max_batch=4, max_delay=LONG) as batcher:
        monkeypatch.setattr(alike.Call, "answer", late)
        answers = in_threads(lambda n: batcher(xs[n]), 4)
        assert batcher.stats()["batched"] == 4
    with torch.inference_mode():
        same(answers, [module(x) for x in xs])


def test_batch_after_batch() -> None:
    """The first ones are compared with their calls, the later ones are not."""
    module, fast = fast_mlp()
    xs = [[torch.randn(1, 8) for _ in range(5)] for _ in range(4)]
    with Batcher(fast, max_batch=4, max_delay=LONG) as batcher:
        answers = in_threads(lambda n: [batcher(x) for x in xs[n]], 4)
        assert batcher.stats() == {"calls": 20, "batched": 20, "batches": 5}
    with torch.inference_mode():
        same(answers, [[module(x) for x in row] for row in xs])


def test_only_calls_that_are_alike_are_gathered() -> None:
    """Two lengths: a batch each."""
    module = make(Attention)
    sizes = {"x": {0: "batch", 1: "length"}}
    fast = accelerated(module, torch.randn(2, 5, 16), dynamic_shapes=sizes)
    xs = [torch.randn(1, 4 + n % 2, 16) for n in range(4)]
    with Batcher(fast, max_batch=2, max_delay=LONG) as batcher:
        with torch.inference_mode():
            batcher(torch.randn(2, 5, 16))
        answers = in_threads(lambda n: batcher(xs[n]), 4)
        assert batcher.stats() == {"calls": 5, "batched": 4, "batches": 2}
    with torch.inference_mode():
        same(answers, [module(x) for x in xs])


def test_the_modes_of_a_batch_are_those_of_its_calls() -> None:
    _, fast = fast_mlp()
    with Batcher(fast, max_batch=2, max_delay=LONG) as batcher:

        def work(number: int) -> Tensor:
            if number % 2:
                with torch.inference_mode(False), torch.no_grad():
                    return batcher(torch.randn(1, 8))
            return batcher(torch.randn(1, 8))

        answers = in_threads(work, 4)
    assert [answer.is_inference() for answer in answers] == [True, False] * 2
    assert batcher.stats()["batches"] == 2


def test_a_call_that_stands_alone_waits_its_time_and_is_answered() -> None:
    module, fast = fast_mlp()
    x = torch.randn(3, 8)
    with Batcher(fast, max_batch=8, max_delay=0.001) as batcher, torch.inference_mode():
        same(batcher(x), module(x))
        same(batcher(x=x), module(x))
        same(batcher(torch.randn(0, 8)), module(torch.randn(0, 8)))
        large = torch.randn(9, 8)
        same(batcher(large), module(large))
        assert batcher.stats() == {"calls": 4, "batched": 0, "batches": 0}


class LastStep(nn.Module):
    """An LSTM, whose plan for one row is not its plan for more."""

    def __init__(self, states: bool) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 16, batch_first=True)
        self.states = states

    def forward(self, x: Tensor) -> Any:
        steps, states = self.lstm(x)
        return (steps[:, -1], states) if self.states else steps[:, -1]


@pytest.mark.parametrize("states", [False, True])
def test_the_plan_of_a_batch_need_not_be_that_of_its_calls(states: bool) -> None:
    """The states of an LSTM come back as [layers, batch, width]: with them nothing is gathered."""
    module = make(LastStep, states)
    fast = accelerated(module, torch.randn(2, 5, 8))
    xs = [torch.randn(1, 5, 8) for _ in range(3)]
    with torch.inference_mode():
        fast(xs[0])  # gets the plan for one row
    with Batcher(fast, max_batch=3, max_delay=LONG) as batcher, by_openvino(fast, 3):
        answers = in_threads(lambda n: batcher(xs[n]), 3)
        batched = {"batched": 0, "batches": 0} if states else {"batched": 3, "batches": 1}
        assert batcher.stats() == {"calls": 3, **batched}
    with torch.inference_mode():
        same(answers, [module(x) for x in xs])


class MeanOfBatch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x - x.mean(0))


class MaxOfBatch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x) / x.abs().max()


class SizeOfBatch(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, int]:
        return torch.tanh(x), x.shape[0]


class LastFirst(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x).T


class Pairs(nn.Module):
    """Square for as long as nobody joins two calls."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x) @ x.T


@pytest.mark.parametrize("cls", [MeanOfBatch, MaxOfBatch, SizeOfBatch, LastFirst, Pairs])
def test_rows_that_are_not_apart_are_not_put_together(cls: type[nn.Module]) -> None:
    module = make(cls)
    fast = accelerated(module, torch.randn(2, 8))
    xs = [torch.randn(2, 8) * (1 + n) for n in range(4)]
    with Batcher(fast, max_batch=8, max_delay=LONG) as batcher, by_openvino(fast, 4):
        answers = in_threads(lambda n: batcher(xs[n]), 4)
        assert batcher.stats() == {"calls": 4, "batched": 0, "batches": 0}
    with torch.inference_mode():
        same(answers, [module(x) for x in xs])


class Crowd(nn.Module):
    """Rows that meet where there are more than six of them."""

    def forward(self, x: Tensor) -> Tensor:
        many = torch.ones_like(x[:, :1]).sum(0, keepdim=True) > 6
        return torch.where(many, x - x.mean(0, keepdim=True), x)


def test_rows_that_meet_in_large_batches_are_noticed() -> None:
    module = make(Crowd)
    fast = accelerated(module, torch.randn(2, 8))
    with Batcher(fast, max_batch=8, max_delay=0.3) as batcher:
        for callers in (3, 3, 3, 8, 8):
            xs = [torch.randn(1, 8) for _ in range(callers)]
            answers = in_threads(lambda n, xs=xs: batcher(xs[n]), len(xs))  # type: ignore[misc]
            with torch.inference_mode():
                same(answers, [module(x) for x in xs])


def test_the_main_thread_joins_no_batch() -> None:
    module, fast = fast_mlp()
    x = torch.randn(1, 8)
    batcher = Batcher(fast, max_batch=4, max_delay=LONG)
    with torch.inference_mode():
        same([batcher(x) for _ in range(3)], [module(x)] * 3)  # it would wait for others
    assert batcher.stats() == {"calls": 3, "batched": 0, "batches": 0}
    batcher.close()
    with pytest.raises(RuntimeError, match="closed"):
        batcher(x)


class Kept(nn.Module):
    """Containers, a constant, an input that comes back, and one tensor for two arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 4)

    def forward(self, x: Tensor, y: Tensor, scale: float = 1.0) -> dict[str, Any]:
        return {"both": [self.linear(x) * scale, y.sum(1)], "x": x, "name": "kept"}


def test_each_caller_gets_its_own_containers() -> None:
    module = make(Kept)
    x = torch.randn(3, 8)
    fast = accelerated(module, (x, x))
    xs = [torch.randn(1 + n % 2, 8) for n in range(4)]
    with Batcher(fast, max_batch=6, max_delay=LONG) as batcher:
        answers = in_threads(lambda n: batcher(xs[n], xs[n]), 4)
        assert batcher.stats()["batches"] == 1
    with torch.inference_mode():
        same(answers, [module(x, x) for x in xs])
    assert all(answer["x"] is x for answer, x in zip(answers, xs, strict=True))


def test_an_exception_reaches_its_caller_alone() -> None:
    module = make(Looking)
    fast = accelerated(module, torch.randint(0, 10, (2, 3)))
    ids = [torch.randint(0, 10, (1, 3)) for _ in range(4)]
    ids[2][0, 1] = 10

    def work(number: int) -> Any:
        try:
            return batcher(ids[number])
        except IndexError as error:
            return str(error)

    with Batcher(fast, max_batch=4, max_delay=LONG) as batcher:
        answers = in_threads(work, 4)
    assert "out of range" in answers.pop(2)
    with torch.inference_mode():
        same(answers, [module(x) for number, x in enumerate(ids) if number != 2])


def test_values_that_are_eagers_keep_no_one_else_from_openvino() -> None:
    module, fast = fast_mlp()
    xs = [torch.randn(1, 8) for _ in range(4)]
    xs[1][0, 0] = float("inf")
    with Batcher(fast, max_batch=3, max_delay=LONG) as batcher:
        answers = in_threads(lambda n: batcher(xs[n]), 4)
    with torch.inference_mode():
        same(answers, [module(x) for x in xs])
    assert counts(fast)["eager"] == 1


@pytest.mark.slow
def test_weights_that_change_while_calls_wait() -> None:
    module, fast = fast_mlp()
    xs = [torch.randn(1, 8) for _ in range(2)]
    batcher = Batcher(fast, max_batch=3, max_delay=LONG)

    def work(x: Tensor) -> Tensor:
        with torch.inference_mode():
            return batcher(x)

    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(work, x) for x in xs]
        wait_for_rows(batcher, 2)
        with torch.no_grad():
            module.get_parameter("last.bias").add_(1)
        batcher.close()
        answers = [future.result(60) for future in futures]
    with torch.inference_mode():
        same(answers, [module(x) for x in xs])
    assert batcher.stats() == {"calls": 2, "batched": 0, "batches": 0}


def wait_for_rows(batcher: Batcher, rows: int) -> None:
    """Until so many wait to be computed."""
    with batcher._changed:
        waiting = batcher._groups.values
        assert batcher._changed.wait_for(lambda: sum(g.rows for g in waiting()) == rows, 60)


def test_closing_lets_calls_finish_and_takes_no_more() -> None:
    module, fast = fast_mlp()
    x = torch.randn(1, 8)
    batcher = Batcher(fast, max_batch=8, max_delay=LONG)

    def work() -> Tensor:
        with torch.inference_mode():
            return batcher(x)

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(work)
        wait_for_rows(batcher, 1)
        batcher.close()
        with torch.inference_mode():
            same(future.result(60), module(x))
    with pytest.raises(RuntimeError, match="closed"):
        batcher(x)
    batcher.close()


def test_an_interrupted_caller_leaves_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    module, fast = fast_mlp()
    xs = [torch.randn(1, 8) for _ in range(3)]
    with Batcher(fast, max_batch=3, max_delay=LONG) as batcher:
        with torch.inference_mode():
            batcher(torch.randn(3, 8))

        def strike(group: Any) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(batcher, "_compute", strike)

        def work(number: int) -> Any:
            try:
                return batcher(xs[number])
            except KeyboardInterrupt:
                return "interrupted"

        answers = in_threads(work, 3)
    assert answers.count("interrupted") == 1
    with torch.inference_mode():
        for x, answer in zip(xs, answers, strict=True):
            assert answer == "interrupted" or torch.allclose(answer, module(x), atol=1e-5)


# The size of a batch


def find(costs: dict[int, float], free: Callable[[], int | None] = lambda: None) -> int:
    return sizing.best_size(costs.__getitem__, free)


def test_the_best_size_is_where_rows_become_no_cheaper() -> None:
    assert find({1: 1.0}) == 1  # too long for anybody to wait for two
    assert find({1: 0.01, 2: 0.0195}) == 1
    assert find({1: 0.01, 2: 0.011, 4: 0.013, 8: 0.025}) == 4
    assert find({1: 0.01, 2: 0.012, 4: 0.02, 8: 0.03, 16: 0.05, 32: 0.09, 64: 0.15}) == 64
    assert find({2**n: 0.001 for n in range(12)}) == 256


def test_the_best_size_leaves_half_of_the_memory() -> None:
    free = iter([1000, 990, 990, 970, 970, 700, 700, 100])
    assert find({2**n: 0.001 for n in range(12)}, lambda: next(free)) == 8


def test_free_memory_is_a_number_of_bytes_or_not_known() -> None:
    free = sizing.free_memory()
    assert free is None or free > 1 << 20


def test_the_size_is_found_by_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    module, fast = fast_mlp()
    measured = []

    def seconds(call: Callable[[], Any]) -> float:
        measured.append(call()[0].shape[0])
        return 0.001 if measured[-1] <= 4 else 1.0

    monkeypatch.setattr(sizing, "seconds_of", seconds)
    xs = [torch.randn(1, 8) for _ in range(4)]
    with Batcher(fast, max_delay=LONG) as batcher:
        answers = in_threads(lambda n: batcher(xs[n]), 4)
        assert batcher.stats() == {"calls": 4, "batched": 4, "batches": 1}
    assert measured == [1, 2, 4, 8]
    with torch.inference_mode():
        same(answers, [module(x) for x in xs])


# What cannot be right


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("max_batch", value) for value in (0, 2.5, True, "all")),
        *(("max_delay", value) for value in (-1, float("nan"), "1 s", None)),
    ],
)
def test_a_batchers_options_are_checked(name: str, value: Any) -> None:
    _, fast = fast_mlp()
    with pytest.raises(ovshim.OptionError) as caught:
        Batcher(fast, **{name: value})
    assert caught.value.name == name


def test_a_batcher_wants_an_accelerated_module_of_any_batch() -> None:
    module = make(Mlp)
    with pytest.raises(ovshim.OptionError, match="accelerated"):
        Batcher(module)
    with pytest.raises(ovshim.OptionError, match="dynamic_batch"):
        Batcher(ovshim.accelerate(module, dynamic_batch=False))
    with pytest.raises(ovshim.OptionError, match="forward"):
        Batcher(ovshim.accelerate(module, methods=["extra_repr"]))
