"""What every call asks, in the ways that cost least: no answer may depend on which way it was."""

import functools
import sys
import threading
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from checks import Seen, check, check_alone, counts, eager_reasons, paths, quietly, same, standing
from modules import Mlp, make
from torch import nn
from torch.overrides import TorchFunctionMode

import ovshim
from ovshim import (
    conditions,
    dict_versions,
    generation,
    parts,
    places,
    runtime,
    tiny,
    untouched,
    verdict,
)
from ovshim.bound import installed
from ovshim.matcher import compile_glance
from ovshim.race import Finish
from ovshim.signature import flatten_call, kind_of
from ovshim.single import SingleThreadEngine

# --- dictionaries that nobody has written to --------------------------------------------------


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.k: Any = 2


def one_more(module: Small) -> None:
    module.first.bias.data.add_(1)  # as by an optimizer: not counted in the tensor's own version
    torch.autograd.graph.increment_version(module.first.bias)


CHANGES: Mapping[str, Callable[[Small], Any]] = {
    "attribute": lambda m: setattr(m, "k", 3),
    "attribute's type": lambda m: setattr(m, "k", 2.0),
    "attribute, by the dict": lambda m: m.__dict__.update(k=3),
    "new attribute": lambda m: setattr(m, "other", 1),
    "no attribute": lambda m: delattr(m, "k"),
    "method of the instance": lambda m: setattr(m.first, "forward", abs),
    "training": lambda m: m.second.train(),
    "parameter": lambda m: setattr(m.first, "weight", nn.Parameter(torch.ones(4, 4))),
    "no parameter": lambda m: setattr(m.first, "bias", None),
    "parameter, by the dict": lambda m: m.first._parameters.update(bias=None),
    "buffer": lambda m: setattr(m.second, "running_mean", torch.ones(4)),
    "child": lambda m: setattr(m, "first", nn.Linear(4, 4)),
    "new child": lambda m: m.add_module("third", nn.ReLU()),
    "no child": lambda m: m._modules.pop("second"),
    "parameter of what had none": lambda m: m.register_parameter("p", nn.Parameter(torch.ones(1))),
    "class": lambda m: setattr(m.first, "__class__", nn.Identity),
    "hook": lambda m: m.first.register_forward_hook(lambda *_: None),
    "in place": lambda m: m.first.weight.detach().mul_(2),
    "counted for it": one_more,
    "data": lambda m: setattr(m.first.weight, "data", torch.ones(4, 4)),
    "the same data, transposed": lambda m: setattr(m.first.weight, "data", m.first.weight.data.t()),
    "a part of the data": lambda m: setattr(m.first.weight, "data", m.first.weight.data[:2]),
    "the end of the data": lambda m: setattr(m.first.bias, "data", m.first.bias.data[2:]),
    "data of other dimensions": lambda m: setattr(m.first.bias, "data", m.first.bias.data[None]),
    "another tensor in its place": lambda m: torch.utils.swap_tensors(
        m.first.weight, nn.Parameter(torch.ones(4, 4))
    ),
    "attributes of another": lambda m: setattr(m.first, "__dict__", nn.Linear(4, 4).__dict__),
    "another dict of parameters": lambda m: setattr(
        m.first, "_parameters", {**m.first._parameters}
    ),
}


@pytest.fixture(params=["memory", "counted", "compared"])
def counted(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With what memory tells, without, and without the interpreter's count of writes too."""
    if request.param != "memory":
        monkeypatch.setattr(untouched, "_places", lambda: None)
    if request.param == "compared":
        monkeypatch.setattr(dict_versions, "version_of", None)


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("many", [False, True])
def test_a_change_is_noticed_either_way(
    change: Callable[[Small], Any], many: bool, counted: None
) -> None:
    module = Small().eval()
    whole = nn.Sequential(module, *(nn.Linear(2, 2) for _ in range(20 if many else 0))).eval()
    made = generation.Generation(whole)
    assert made.holds()
    assert made.holds()
    change(module)
    assert not made.holds()
    assert not made.holds()


def assigned_twice(weight: nn.Parameter) -> None:
    for _ in range(2):
        weight.data = weight.data * 2


def swapped_twice(weight: nn.Parameter) -> None:
    for _ in range(2):
        torch.utils.swap_tensors(weight, nn.Parameter(weight.detach() * 2))


@pytest.mark.parametrize("change", [assigned_twice, swapped_twice])
def test_other_values_where_the_old_ones_lay_are_noticed(
    change: Callable[[nn.Parameter], None], counted: None
) -> None:
    again = 0
    for n in range(60):
        module = nn.Linear(64, 4 + 4 * n, bias=False).eval()
        made = generation.Generation(module)
        assert made.holds()
        where = module.weight.data_ptr()
        change(module.weight)
        assert not made.holds()
        again += module.weight.data_ptr() == where
    if not again:
        pytest.skip("memory was not given out again")


def test_a_weight_that_can_be_read_no_more_is_a_change(counted: None) -> None:
    module = Small().eval()
    made = generation.Generation(module)
    assert made.holds()
    weight = module.first.weight
    weight.data = weight.data.view(1, 1, 1, 1, 4, 4)
    assert not made.holds()
    weight.data = weight.data.view(4, 4)
    made = generation.Generation(module)
    assert made.holds()


class Loose:
    """Equal to everything."""

    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = object.__hash__


@pytest.mark.parametrize(
    "make",
    [lambda: torch.tensor(2.0), lambda: [2.0], lambda: (2.0, [3.0]), lambda: {"a": [2.0]}, Loose],
    ids=["tensor", "list", "tuple", "dict", "object"],
)
def test_an_attribute_replaced_by_an_equal_one_is_a_change(
    make: Callable[[], Any], counted: None
) -> None:
    module = Small().eval()
    module.held = make()
    made = generation.Generation(module)
    assert made.holds()
    kept, module.held = module.held, make()
    assert not made.holds()
    module.held = kept
    assert made.holds()


def test_a_change_that_is_taken_back_holds_again(counted: None) -> None:
    module = Small().eval()
    made = generation.Generation(module)
    for _ in range(3):
        module.train()
        assert not made.holds()
        module.eval()
        assert made.holds()
        assert made.holds()


def test_what_was_compared_is_compared_again_after_a_write_only() -> None:
    if dict_versions.version_of is None:
        pytest.skip("this interpreter counts no writes")
    held: list[dict[Any, Any]] = [{"a": 1}, {}]
    asked: list[int] = []
    made = conditions.Conditions()

    def further() -> bool:
        asked.append(len(held[0]))
        return held[0].get("a") == 1

    dict_versions.add_unless_written(made, held, further)
    holds = made.compiled()
    assert holds()
    assert holds()
    assert asked == [1]
    held[0]["b"] = 2
    assert holds()
    assert holds()
    assert asked == [1, 2]
    held[1]["c"] = 3
    assert holds()
    assert holds()
    assert asked == [1, 2, 2]
    held[0]["a"] = 0
    assert not holds()
    assert not holds()
    assert len(asked) == 5
    held[0]["a"] = 1
    assert holds()
    assert holds()
    assert len(asked) == 6


def test_an_interpreter_that_counts_otherwise_is_not_trusted() -> None:
    assert not dict_versions.tells_writes(lambda held: 1)
    assert not dict_versions.tells_writes(id)
    assert not dict_versions.tells_writes(len)
    reads = iter(range(1000))
    assert not dict_versions.tells_writes(lambda held: next(reads))


# --- what memory tells ------------------------------------------------------------------------


class Looks:
    """A condition of which memory tells when it has to be asked, and how often it was."""

    def __init__(self, module: nn.Module) -> None:
        self.count, self.answer = 0, True
        made = conditions.Conditions()
        tensors, modules = list(module.parameters()), list(module.modules())
        dicts: list[Any] = [vars(m) for m in modules]
        self.asks_memory = untouched.add_unless_touched(made, tensors, dicts, modules, self.look)
        self.holds = made.compiled()

    def look(self) -> bool:
        self.count += 1
        return self.answer


@pytest.mark.skipif(untouched._places() is None, reason="memory does not tell here")
def test_what_nobody_has_written_to_is_looked_at_once() -> None:
    module = nn.Sequential(*(nn.Linear(3, 3) for _ in range(300))).eval()
    looks = Looks(module)
    assert looks.asks_memory
    assert looks.holds()
    assert looks.holds()
    assert looks.count == 1
    for n, write in enumerate(
        (
            lambda: module[7].weight.detach().add_(0),
            lambda: setattr(module[299], "note", 1),
            # Other storages: what is read from now on lies elsewhere.
            lambda: setattr(module[50].bias, "data", module[50].bias.data.clone()),
            lambda: module[50].bias.detach().add_(0),
        )
    ):
        write()
        assert looks.holds()
        assert looks.holds()
        assert looks.count == n + 2
    looks.answer = False
    module[1].weight.detach().add_(0)
    assert not looks.holds()
    assert not looks.holds()
    assert looks.count == 7


def test_looking_for_the_words_leaves_no_trace() -> None:
    untouched._places.cache_clear()
    before = torch.get_rng_state()
    with torch.device("meta"), torch.inference_mode(), Refusing():
        torch.set_default_dtype(torch.float64)
        try:
            found = untouched._places()
        finally:
            torch.set_default_dtype(torch.float32)
    assert torch.equal(torch.get_rng_state(), before)
    assert found is not None or sys.version_info[:2] != (3, 11)  # later ones may count otherwise


def test_bytes_that_look_like_a_word_cost_another_search(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = untouched._places.__wrapped__()
    if expected is None:
        pytest.skip("memory does not tell")
    found, wrong = untouched.find, [None, expected._replace(keys=expected.dtype), None]

    def search() -> Any:
        if not wrong:
            return found()
        answer = wrong.pop()
        if answer is None:
            raise places.UnknownPlaceError
        return answer

    monkeypatch.setattr(untouched, "find", search)
    assert untouched._places.__wrapped__() == expected
    assert not wrong


class Refusing(TorchFunctionMode):
    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise AssertionError(function)


@pytest.mark.parametrize(
    "odd",
    [
        torch.zeros(1, 1, 1, 1, 2, 2),
        torch.zeros(3, device="meta"),
        torch.zeros(0, 3),
        torch.zeros(4, dtype=torch.complex64).conj(),
        torch.zeros(()),
    ],
    ids=["six dimensions", "meta", "empty", "conjugate", "number"],
)
def test_odd_tensors_are_watched_too(odd: torch.Tensor) -> None:
    module = Small().eval()
    module.odd = odd
    made = generation.Generation(module)
    assert made.holds()
    assert made.holds()
    odd.add_(odd)
    assert not made.holds()


def test_memory_is_never_shown() -> None:
    assert "method" in repr(places.reader())  # an array of it all would end the process


# --- calls that eager serves because it is faster ---------------------------------------------


@pytest.fixture
def lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every race is lost by OpenVINO, and no part of a module is tried by itself."""
    monkeypatch.setattr(parts, "divide", lambda job, plan: plan)
    finish = Finish(1.0, 2.0, 0.5, 0.5)
    monkeypatch.setattr(verdict, "race", lambda *_: finish)
    # The one that calls of other sizes run by turns.
    monkeypatch.setattr(Finish, "of", lambda *_: finish)


def resting(fast: nn.Module) -> Any:
    return installed(fast)["forward"].dispatcher._at_rest  # type: ignore[attr-defined]


def test_calls_at_rest_are_eagers_and_counted(lost: None) -> None:
    module = make(Mlp)
    fast = ovshim.accelerate(module, torch.randn(3, 8), cache_dir=None)
    for number in range(40):
        check(fast, module, torch.randn(3, 8), path="eager", reason="slower")
        assert (resting(fast) is None) is (number == 0)
        assert counts(fast)["eager"] == number + 1
    assert eager_reasons(fast) == {"slower": 40}
    fast.ovshim.reset_stats()  # type: ignore[union-attr, operator]
    with torch.inference_mode():
        for _ in range(20):
            fast(torch.randn(3, 8))
    assert counts(fast) == {"openvino": 0, "mixed": 0, "eager": 20}


@pytest.mark.parametrize("many", [2, 8, 9])
def test_sizes_that_take_turns_rest_together(many: int, lost: None) -> None:
    class Branches(Mlp):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) if x.sum() > 0 else -super().forward(x)

    module = make(Branches)
    with quietly(), torch.inference_mode():
        fast = ovshim.accelerate(module, torch.randn(3, 8), cache_dir=None)
        rests = set()
        for number in range(40 * many):
            x = torch.randn(3 + number % many, 8)
            assert torch.equal(fast(x), module(x))
            rests.add(id(resting(fast)))
        # Of more sizes than may rest at once none came lately; nothing is made for them.
        assert (resting(fast) is None) is (many == 9)
        assert len(rests) < 10
        for _ in range(20):
            fast(torch.randn(4, 8))
        assert resting(fast).left > 0
    assert sum(eager_reasons(fast).values()) == 40 * many + 20


def test_at_rest_other_kinds_and_modes_are_eagers_too(lost: None) -> None:
    module = make(Mlp)
    fast = ovshim.accelerate(module, torch.randn(3, 8), cache_dir=None)
    x = torch.randn(3, 8)
    for _ in range(2):
        check(fast, module, x, path="eager")
    assert resting(fast) is not None
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        answer = fast(x)
        assert answer.dtype is torch.bfloat16
        same(answer, module(x))
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        same(fast(x.double()[:, :0].float().expand(3, 0).new_ones(3, 8)), module(torch.ones(3, 8)))
        with pytest.raises(RuntimeError):
            fast(torch.randn(3, 9))
    # Another rank is another kind: it has a plan at once, and its own race.
    check(fast, module, torch.randn(2, 3, 8), path="eager")
    assert len(paths(fast)) == 2


def test_a_mode_that_looks_on_sees_no_more_than_the_module_does(lost: None) -> None:
    module = make(Mlp)
    fast = ovshim.accelerate(module, torch.randn(3, 8), cache_dir=None)
    x = torch.randn(3, 8)
    for _ in range(2):
        check(fast, module, x, path="eager")
    assert resting(fast).left > 0
    with quietly(), torch.no_grad(), Seen() as mine:
        fast(x)
    with torch.no_grad(), Seen() as eagers:
        module(x)
    assert mine.names == eagers.names


def test_a_module_that_changes_at_rest_is_looked_at_again(lost: None) -> None:
    module = make(Mlp)
    fast = ovshim.accelerate(module, torch.randn(3, 8), cache_dir=None)
    for _ in range(2):
        check(fast, module, torch.randn(3, 8), path="eager")
    assert resting(fast) is not None
    (before,) = standing(fast)
    with torch.no_grad():
        module.first.weight.mul_(2)  # type: ignore[union-attr, operator]
    for _ in range(80):
        check(fast, module, torch.randn(3, 8), path="eager")
    (after,) = standing(fast)
    assert after is not before


def test_another_forward_is_seen_at_rest(lost: None) -> None:
    class Changing(Mlp):
        pass

    class Another(Mlp):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) - 1

    module = make(Changing)
    fast = ovshim.accelerate(module, torch.randn(3, 8), cache_dir=None)
    for forward in (Mlp.forward, lambda self, x: Mlp.forward(self, x) + 1):
        Changing.forward = forward  # type: ignore[method-assign, assignment]
        for _ in range(3):
            assert resting(fast) is None or resting(fast).left > 0
            check(fast, module, torch.randn(3, 8), path="eager")
    fast.__class__ = module.__class__ = Another
    check(fast, module, torch.randn(3, 8), path="eager")


def test_training_at_rest(lost: None) -> None:
    module = make(Mlp)
    fast = ovshim.accelerate(module, torch.randn(3, 8), cache_dir=None)
    check(fast, module, torch.randn(3, 8), path="eager")
    fast.train()
    x = torch.randn(3, 8)
    loss = fast(x).square().mean()
    loss.backward()
    assert module.first.weight.grad is not None  # type: ignore[union-attr]


def test_threads_at_rest(lost: None) -> None:
    module = make(Mlp)
    fast = ovshim.accelerate(module, torch.randn(3, 8), cache_dir=None)
    wrong: list[Any] = []

    def work(rows: int) -> None:
        x = torch.randn(rows, 8)
        with torch.inference_mode():
            wanted = module(x)
            # In the turns of sizes that are new OpenVINO answers as well.
            answers = (fast(x) for _ in range(200))
            wrong.extend(y for y in answers if not torch.allclose(y, wanted, atol=1e-5))

    with torch.inference_mode():
        fast(torch.randn(2, 8)), fast(torch.randn(3, 8))
    threads = [threading.Thread(target=work, args=(rows,)) for rows in (2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert sum(counts(fast).values()) == 402


def test_a_glance_sees_what_it_says() -> None:
    x, y = torch.randn(3, 8), torch.arange(3)
    leaves, structure = flatten_call((x,), {"y": y, "k": 2})
    glance = compile_glance(kind_of(leaves, structure))
    assert glance is not None
    assert glance((x,), {"y": y, "k": 2}) == (x.shape, y.shape)
    assert glance((torch.randn(5, 8),), {"y": y, "k": 2}) == ((5, 8), (3,))
    for args, kwargs in (
        ((x,), {"y": y, "k": 3}),
        ((x,), {"y": y}),
        ((x, x), {"y": y, "k": 2}),
        ((x.double(),), {"y": y, "k": 2}),
        ((nn.Parameter(x),), {"y": y, "k": 2}),
        ((None,), {"y": y, "k": 2}),
    ):
        assert glance(args, kwargs) is None


# --- a graph for the example's sizes alone ----------------------------------------------------


def plan_of(fast: nn.Module) -> Any:
    (plan,) = standing(fast)
    return plan


accelerate = functools.partial(ovshim.accelerate, prefer="openvino")


Favoured = Callable[[str], None]


@pytest.fixture
def favoured(monkeypatch: pytest.MonkeyPatch) -> Favoured:
    """Lets one of the ways of exact graphs be tried alone."""
    ways = tiny._ways_of_exact

    def favour(name: str) -> None:
        monkeypatch.setattr(
            tiny,
            "_ways_of_exact",
            lambda *given: {k: w for k, w in ways(*given).items() if k == name},
        )

    return favour


def test_the_examples_sizes_have_a_graph_of_their_own(
    exact_wins: list[Any], favoured: Favoured, tmp_path: Path
) -> None:
    favoured(", exact sizes")
    module = make(Mlp)
    for cache in ("miss", "hit"):
        fast = accelerate(module, torch.randn(3, 8), cache_dir=tmp_path)
        plan = plan_of(fast)
        assert plan.cache == cache
        assert plan.way == "not pinned, exact sizes"
        assert exact_wins.pop() == [(3, 8)]
        assert not exact_wins
        check_alone(fast, module, plan.served.engine.exact, rows=3)
        check(fast, module, torch.randn(3, 8))


@pytest.mark.parametrize("dynamic", [True, False])
def test_a_tiny_graph_runs_in_one_thread(
    exact_wins: list[Any], tmp_path: Path, dynamic: bool
) -> None:
    module, x = make(Mlp), torch.randn(3, 8)
    for cache in ("miss", "hit"):
        fast = accelerate(module, x, cache_dir=tmp_path, dynamic_batch=dynamic)
        plan = plan_of(fast)
        assert plan.cache == cache
        assert plan.way == "not pinned, exact sizes in one thread"
        # What is known is not compiled in other ways again.
        assert len(exact_wins) == (1 if cache == "hit" else 1 + dynamic)
        exact_wins.clear()
        exact = plan.served.engine.exact
        assert isinstance(exact, SingleThreadEngine)
        if dynamic:
            check_alone(fast, module, exact, rows=3)
        check(fast, module, torch.randn(3, 8))


def test_precisions_that_can_end_the_process_in_one_thread_are_not_tried_there(
    exact_wins: list[Any],
) -> None:
    module, x = make(Mlp), torch.randn(3, 8)
    plan = plan_of(accelerate(module, x, precision="bf16", cache_dir=None))
    assert plan.way == "not pinned, exact sizes"
    assert not isinstance(plan.served.engine.exact, SingleThreadEngine)


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_that_were_asked_for_stay(exact_wins: list[Any], threads: int) -> None:
    module, x = make(Mlp), torch.randn(3, 8)
    fast = accelerate(module, x, threads=threads, cache_dir=None)
    plan = plan_of(fast)
    assert plan.way == "usual, exact sizes"
    exact = plan.served.engine.exact
    assert int(exact._compiled.get_property("INFERENCE_NUM_THREADS")) == threads
    check_alone(fast, module, exact, rows=3)


@pytest.mark.parametrize("first", [3, 300])
def test_what_is_measured_of_some_sizes_is_not_of_quite_others(
    first: int, exact_wins: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    del exact_wins
    rows = [0]
    monkeypatch.setattr(tiny, "_is_tiny", lambda call, times: rows[0] == 3)
    ways = {3: "not pinned, exact sizes in one thread", 300: "usual"}
    for rows[0] in (first, 303 - first, first):
        fast = accelerate(make(Mlp), torch.randn(rows[0], 8), cache_dir=tmp_path)
        assert plan_of(fast).way == ways[rows[0]]
        assert (plan_of(fast).served.engine.exact is None) is (rows[0] == 300)


def test_what_is_measured_of_some_threads_is_not_of_those_asked_for(
    exact_wins: list[Any], tmp_path: Path
) -> None:
    module, x = make(Mlp), torch.randn(3, 8)
    usual, asked = "not pinned, exact sizes in one thread", "usual, exact sizes"
    for threads, way in ((None, usual), (torch.get_num_threads(), asked), (None, usual)):
        fast = accelerate(module, x, threads=threads, cache_dir=tmp_path)
        assert plan_of(fast).way == way


def test_calls_at_the_same_time_do_not_wait_for_the_one_thread(exact_wins: list[Any]) -> None:
    module, x = make(Mlp), torch.randn(3, 8)
    fast = accelerate(module, x, cache_dir=None)
    exact = plan_of(fast).served.engine.exact
    inside, go_on, infer = threading.Event(), threading.Event(), exact._infer

    def slowly(*given: Any) -> Any:
        inside.set()
        assert go_on.wait(30)
        return infer(*given)

    def call() -> torch.Tensor:
        with torch.no_grad():
            answer: torch.Tensor = fast(x)
        return answer

    exact._infer = slowly
    wanted = module(x)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(call)
        assert inside.wait(30)
        same(call(), wanted)
        assert not first.done()
        go_on.set()
        same(first.result(), wanted)
    assert counts(fast)["openvino"] == 2
    exact._infer = infer
    check_alone(fast, module, exact, rows=3)
    assert len(exact._pool._all) == 1


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("thread", ["stream", "thread"])
def test_a_tiny_graph_runs_in_one_stream_whatever_the_hint(
    exact_wins: list[Any],
    favoured: Favoured,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    dynamic: bool,
    thread: str,
) -> None:
    favoured(f", exact sizes in one {thread}")
    module, x = make(Mlp), torch.randn(3, 8)
    options = {"hint": "throughput", "dynamic_batch": dynamic}
    for cache in ("miss", "hit"):
        plan = plan_of(fast := accelerate(module, x, cache_dir=tmp_path, **options))
        assert plan.cache == cache
        assert plan.way == f"usual, exact sizes in one {thread}"
        assert plan.served.engine.exact.advised == 1
        for rows in (3, 5) if dynamic else (3,):
            check(fast, module, torch.randn(rows, 8))
    # What is as long in one stream is none of these.
    monkeypatch.setattr(tiny, "rounds", lambda calls, *_, **__: [[1e-4], [8e-5]][: len(calls)])
    plan = plan_of(accelerate(module, x, cache_dir=None, **options))
    assert plan.way == "usual"
    assert plan.served.engine.exact is None


@pytest.mark.slow
def test_without_it_the_open_graph_serves(
    exact_wins: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*args: Any) -> Any:
        raise RuntimeError("no graph of these sizes")

    noted = runtime.compile_model
    monkeypatch.setattr(
        runtime, "compile_model", lambda *args: (none if any(args[3:]) else noted)(*args)
    )
    module = make(Mlp)
    fast = accelerate(module, torch.randn(3, 8), cache_dir=None)
    assert plan_of(fast).way == "not pinned"
    assert plan_of(fast).served.engine.exact is None
    for rows in (3, 5):
        check(fast, module, torch.randn(rows, 8))


@pytest.mark.slow
def test_a_graph_that_is_wrong_there_does_not_serve(
    exact_wins: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = runtime.compile_model

    def other(source: Path, device: str, settings: Any, sizes: Any = None) -> Any:
        import openvino as ov

        if sizes is None:
            return compiled(source, device, settings, sizes)
        model = runtime.core().read_model(str(source))
        model.reshape({0: ov.PartialShape(list(sizes[0]))})
        result = model.get_results()[0]
        halved = ov.opset15.multiply(result.input_value(0), ov.opset15.constant(0.5))
        result.input(0).replace_source_output(halved.output(0))
        return runtime.core().compile_model(model, device, dict(settings))

    monkeypatch.setattr(runtime, "compile_model", other)
    module = make(Mlp)
    fast = accelerate(module, torch.randn(3, 8), cache_dir=None)
    assert plan_of(fast).way == "not pinned"
    assert plan_of(fast).served.engine.exact is None
    check(fast, module, torch.randn(3, 8))


@pytest.mark.slow
def test_an_exact_graph_that_dies_takes_the_plan_along(exact_wins: list[Any]) -> None:
    module = make(Mlp)
    fast = accelerate(module, torch.randn(3, 8), cache_dir=None)
    plan_of(fast).served.engine.exact.close("spoiled")
    with pytest.warns(ovshim.FallbackWarning, match="spoiled"):
        check(fast, module, torch.randn(3, 8), path="eager", reason="infer-failed")
    check(fast, module, torch.randn(5, 8), path="eager")


def test_a_graph_that_is_too_slow_for_other_ways_is_known_as_such(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tiny, "_seconds", lambda call: 1.0)
    module = make(Mlp)
    assert plan_of(accelerate(module, torch.randn(3, 8), cache_dir=tmp_path)).way == "usual"
    monkeypatch.setattr(tiny, "_seconds", None)  # is not asked again
    assert plan_of(accelerate(module, torch.randn(3, 8), cache_dir=tmp_path)).way == "usual"
