"""`enabled`, `disabled`, `enable`, `disable`: programs as they stand, and nothing left behind."""

import asyncio
import collections
import contextlib
import contextvars
import copy
import gc
import io
import json
import pickle
import threading
import time
import warnings
import weakref
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checks import falls_back, same
from modules import Mlp, Scaled, make
from torch import Tensor, nn

import ovshim
from ovshim import building
from ovshim.scope import Summary, calls, found, patient

CALL = nn.Module.__call__


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    yield
    assert nn.Module.__call__ is CALL


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every build pays."""
    monkeypatch.setattr(patient, "_WORTH_BUILDING", 0.0)
    monkeypatch.setattr(patient, "_WORTH_LOOKING_UP", 0.0)
    monkeypatch.setattr(found, "_WORTH_A_LOOK", 0.0)


def x(batch: int = 3) -> Tensor:
    return torch.randn(batch, 8)


def warm(module: nn.Module, calls: int = 3) -> None:
    """The first calls, which are eager's, and the one that a plan is made of."""
    with torch.no_grad():
        for _ in range(calls):
            module(x())


def row(summary: Summary, name: str = "Mlp") -> dict[str, Any]:
    (found,) = [row.to_dict() for row in summary.rows if row.module == name]
    return found


def served(scope: ovshim.Scope, name: str = "Mlp") -> int:
    rows = [row for row in scope.report().rows if row.module == name]
    return sum(row.calls["openvino"] for row in rows)


class Branching(nn.Module):
    """Which way it goes is a matter of values."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Mlp()

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        return y + 1 if y.sum() > 0 else y - 1


class Features(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = make(Mlp)

    def forward(self, features: Any) -> Any:
        features["answer"] = self.inner(features["x"])
        return features


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + 1


# What it does, and that nothing is left


def test_what_is_called_often_is_served_and_nothing_is_put_on_it() -> None:
    net, before = make(Mlp), set(make(Mlp).__dict__)
    inputs = [x(3), x(3), x(5), x(7), x(3)]
    with torch.no_grad():
        expected = [net(given) for given in inputs]
        with ovshim.enabled(prefer="openvino") as scope:
            assert nn.Module.__call__ is not CALL
            answers = [net(given) for given in inputs]
            assert set(net.__dict__) == before
    assert set(net.__dict__) == before
    same(answers, expected)
    found = row(scope.report())
    assert found["calls"] == {"openvino": 2, "mixed": 0, "eager": 3, "training": 0}
    assert found["eager_reasons"] == {"seldom": 2, "building": 1}
    assert found["why"] is None  # it is served now
    # The third call had another batch than the first two: one plan for all.
    assert [plan["signature"] for plan in found["plans"]] == ["[0]: float32[?, 8]"]


def test_sizes_that_differ_from_the_start_are_open_in_the_first_plan() -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.Tanh()).eval()
    with torch.no_grad(), ovshim.enabled(prefer="openvino") as scope:
        for length in (3, 4, 5, 6, 7):
            net(torch.randn(2, length, 8))
    (plan,) = row(scope.report(), "Sequential")["plans"]
    assert plan["signature"] == "[0]: float32[?, ?, 8]"
    assert served(scope, "Sequential") == 2


def test_only_the_outermost_module_is_served() -> None:
    net = make(Outer)
    with ovshim.enabled(prefer="openvino") as scope:
        warm(net, 5)
    assert [row.module for row in scope.report().rows] == ["Outer"]


def test_a_program_that_calls_seldom_is_left_alone() -> None:
    net = make(Mlp)
    with ovshim.enabled() as scope:
        warm(net, 20)
    found = row(scope.report())
    assert found["calls"]["eager"] == found["eager_reasons"]["seldom"] == 20
    assert found["plans"] == []


class Slow(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(0.01)
        return self.linear(x)


def test_a_plan_is_made_when_eager_has_taken_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patient, "_WORTH_BUILDING", 0.1)
    monkeypatch.setattr(patient, "_WORTH_LOOKING_UP", 0.05)
    net = make(Slow)
    with ovshim.enabled() as scope:
        warm(net, 1)
        assert row(scope.report(), "Slow")["plans"] == []
        warm(net, 12)
    assert len(row(scope.report(), "Slow")["plans"]) == 1


@pytest.mark.usefixtures("at_once")
def test_what_is_hardly_faster_is_left_alone() -> None:
    net = make(Mlp)
    with ovshim.enabled(min_speedup=1e6) as scope:
        warm(net, 40)
    found = row(scope.report())
    assert found["calls"]["openvino"] == 0
    assert found["plans"][0]["reason"]["code"] == "slower"
    # Most of the calls did not even go by the plan.
    assert sum(found["eager_reasons"].values()) < 20 < found["calls"]["eager"]


@pytest.mark.usefixtures("at_once")
def test_another_scope_and_accelerate_find_what_was_built() -> None:
    net = make(Mlp)
    ovshim.accelerate(net, x(), prefer="openvino")
    with ovshim.enabled() as scope:
        warm(net)
    assert [plan["cache"] for plan in row(scope.report())["plans"]] == ["hit"]


def test_plans_of_one_module_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patient, "_MOST_PLANS", 1)
    net = make(Mlp)
    with torch.no_grad(), ovshim.enabled(prefer="openvino") as scope:
        warm(net, 4)
        for _ in range(4):
            net(torch.randn(2, 2, 8))
    found = row(scope.report())
    assert len(found["plans"]) == 1
    assert found["eager_reasons"]["too-many-plans"] == 4


def test_a_module_that_changes_is_built_for_less_and_less_often() -> None:
    net = make(Mlp)
    with torch.no_grad(), ovshim.enabled(prefer="openvino") as scope:
        for _ in range(6):
            net.first.weight.mul_(1.01)
            inputs = x()
            same(net(inputs), CALL(net, inputs))
    assert row(scope.report())["plans"] == []  # never twice the same weights


def test_weights_changed_after_the_plan() -> None:
    net = make(Mlp)
    with torch.no_grad(), ovshim.enabled(prefer="openvino") as scope:
        warm(net, 4)
        net.last.bias.add_(1)
        inputs = x()
        answer = net(inputs)
    with torch.no_grad():
        same(answer, net(inputs))
    assert served(scope) == 1


def test_attributes_are_those_of_the_users_module() -> None:
    net = make(Scaled)
    inputs = x()
    with torch.no_grad(), ovshim.enabled(prefer="openvino") as scope:
        warm(net, 4)
        net.k = 5.0
        same(net(inputs), net.linear(inputs) * 5)
        for _ in range(4):
            net(inputs)
        same(net(inputs), net.linear(inputs) * 5)
    assert served(scope, "Scaled") >= 2


def test_training_and_gradients_are_eagers() -> None:
    net = make(Mlp)
    with ovshim.enabled(prefer="openvino") as scope:
        warm(net, 4)
        net.train()
        loss = net(x()).sum()
        loss.backward()
        assert net.last.weight.grad is not None
        net.eval()
        assert net(x().requires_grad_()).grad_fn is not None
    assert row(scope.report())["calls"]["training"] == 1
    assert served(scope) == 1


def test_the_modules_own_hooks_fire_around_it() -> None:
    net, fired = make(Mlp), []

    def before(module: nn.Module, args: Any) -> Any:
        fired.append(module)
        return (args[0] + 1,)

    def after(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        fired.append(module)
        return output * 2

    net.register_forward_pre_hook(before)
    net.register_forward_hook(after)
    inputs = x()
    with torch.no_grad():
        expected = net(inputs)
        fired.clear()
        with ovshim.enabled(prefer="openvino") as scope:
            answers = [net(inputs) for _ in range(4)]
            assert "forward" not in net.__dict__
    for answer in answers:
        same(answer, expected)
    assert all(module is net for module in fired)
    assert len(fired) == 8
    assert served(scope) == 1


def test_an_exception_of_the_modules_own_leaves_nothing() -> None:
    net = make(Mlp)
    net.register_forward_hook(lambda *_: None)
    with ovshim.enabled(prefer="openvino"):
        warm(net, 4)
        with pytest.raises(RuntimeError, match="mat1"):
            net(torch.randn(2, 9))
        assert "forward" not in net.__dict__
        warm(net)


def test_copies_and_pickles_made_inside_know_nothing_of_it() -> None:
    net = make(Mlp)
    with ovshim.enabled(prefer="openvino") as scope:
        warm(net, 5)
        copied = copy.deepcopy(net)
        data = pickle.dumps(net)
        saved = io.BytesIO()
        torch.save(net, saved)
    assert served(scope) == 2
    assert set(copied.__dict__) == set(net.__dict__)
    assert b"ovshim" not in data
    assert b"ovshim" not in saved.getvalue()


def test_what_is_accelerated_by_name_stays_so() -> None:
    fast = ovshim.accelerate(make(Mlp), x(), prefer="openvino")
    with torch.no_grad(), ovshim.enabled() as scope:
        fast(x())
    assert ovshim.explain(fast).calls["openvino"] == 1
    assert scope.report().rows == ()


def test_eager_answers_everything_in_disabled() -> None:
    fast = ovshim.accelerate(make(Mlp), x(), prefer="openvino", strict=True)
    told = ovshim.explain

    def calls_of(block: Any) -> tuple[int, int]:
        before = told(fast)
        with torch.no_grad(), block:
            fast(x())
            fast.ovshim.submit(x()).result(60)
        after = told(fast)
        off = dict(after.eager).get("off", 0) - dict(before.eager).get("off", 0)
        return after.calls["openvino"] - before.calls["openvino"], off

    assert calls_of(contextlib.nullcontext()) == (2, 0)
    assert calls_of(ovshim.disabled()) == (0, 2)
    with ovshim.disabled():
        assert calls_of(ovshim.enabled()) == (2, 0)
        assert calls_of(contextlib.nullcontext()) == (0, 2)
        assert in_a_thread(lambda: calls_of(contextlib.nullcontext())) == (2, 0)
        other = ovshim.accelerate(make(Scaled), x(), prefer="openvino")  # a plan may be made here
    assert calls_of(contextlib.nullcontext()) == (2, 0)
    with torch.no_grad():
        other(x())
    assert told(other).calls["openvino"] == 1
    assert building.running == 0


def test_what_has_no_eager_goes_on_in_disabled(tmp_path: Path) -> None:
    fast: Any = ovshim.accelerate(make(Mlp), x(), prefer="openvino")
    fast.ovshim.save(tmp_path / "saved")
    loaded, given = ovshim.load(tmp_path / "saved"), x()
    with torch.no_grad(), ovshim.disabled():
        same(loaded(given), fast(given))


@pytest.mark.slow
def test_a_mixed_plan_may_be_made_in_disabled() -> None:
    net = make(Branching)
    with ovshim.disabled(), falls_back("value-dependent"):
        fast = ovshim.accelerate(net, x(), prefer="openvino")
    with torch.no_grad():
        given = x()
        same(fast(given), net(given))
    assert ovshim.explain(fast).calls["mixed"] == 1


def test_a_module_that_nobody_holds_goes_with_all_that_was_made_of_it() -> None:
    net = make(Mlp)
    with ovshim.enabled(prefer="openvino") as scope:
        warm(net, 4)
        gone, weight = weakref.ref(net), weakref.ref(net.first.weight)
        gc.collect()  # what the capture has left
        gc.disable()
        try:
            del net
            assert gone() is None
            assert weight() is None
        finally:
            gc.enable()
    assert served(scope) == 1  # what there is to tell of it stays


def test_a_forward_of_the_instances_own_is_left_alone() -> None:
    net = make(Mlp)
    with torch.no_grad(), ovshim.enabled(prefer="openvino") as scope:
        warm(net, 4)
        net.forward = lambda inputs: inputs + 7  # type: ignore[method-assign]
        inputs = x()
        same(net(inputs), inputs + 7)
    assert served(scope) == 1


def test_somebody_elses_patch_over_ours() -> None:
    net, seen = make(Mlp), []
    with ovshim.enabled():
        ours = nn.Module.__call__

        def theirs(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            seen.append(type(self).__name__)
            return ours(self, *args, **kwargs)

        nn.Module.__call__ = theirs  # type: ignore[method-assign]
    try:
        assert nn.Module.__call__ is theirs
        warm(net, 1)
        with ovshim.enabled() as scope:
            warm(net, 2)
        assert nn.Module.__call__ is theirs
        assert sum(row(scope.report())["calls"].values()) == 2
        assert seen.count("Mlp") == 1 + 2
    finally:
        nn.Module.__call__ = ours  # type: ignore[method-assign] # as theirs would, when it ends
    warm(net, 1)
    with ovshim.enabled():
        pass
    assert nn.Module.__call__ is CALL


@pytest.mark.slow
def test_torch_compile_sees_the_original_and_remembers_nothing() -> None:
    import torch._dynamo.utils

    net, inputs = make(Outer), x()
    with torch.no_grad():
        expected = net(inputs)
        with ovshim.enabled(prefer="openvino") as scope:
            compiled = torch.compile(net, backend="eager", fullgraph=True)
            for _ in range(4):
                same(compiled(inputs), expected)
            exported = torch.export.export(net, (inputs,)).module()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)
                traced = torch.jit.trace(net, (inputs,))
        with torch._dynamo.config.patch(error_on_recompile=True):
            same(compiled(inputs), expected)
    same(exported(inputs), expected)
    same(traced(inputs), expected)
    assert served(scope, "Outer") == 0
    assert torch._dynamo.utils.unpatched_nn_module_call is CALL


@pytest.mark.slow
def test_a_transformer_and_what_it_generates() -> None:
    import language_models as lm
    import transformers
    from conformance.real.tiny import configure

    bert = transformers.BertForSequenceClassification(configure(transformers.BertConfig)).eval()
    llama: Any = lm.make("llama")
    texts = [torch.randint(3, 99, sizes) for sizes in ((1, 5), (2, 9), (3, 7), (2, 8), (4, 12))]
    asked = {"inputs": texts[0], "max_new_tokens": 6, "do_sample": False}
    with torch.no_grad():
        expected = [bert(text) for text in texts], llama.generate(**asked)
        with ovshim.enabled(prefer="openvino") as scope:
            answers = [bert(text) for text in texts], llama.generate(**asked)
            before = served(scope, "LlamaForCausalLM")
            again = llama.generate(**asked)
    same(answers, expected)
    same(again, expected[1])
    assert served(scope, "BertForSequenceClassification") == 2
    # Two steps are eager's, and the one that the decoding is made of.
    assert before == 3
    assert served(scope, "LlamaForCausalLM") == 9
    assert "forward" not in vars(llama)


@pytest.mark.slow
def test_what_is_generated_has_to_earn_its_build(monkeypatch: pytest.MonkeyPatch) -> None:
    import language_models as lm

    model: Any = lm.make("llama")
    asked = {"inputs": torch.tensor([[5, 6, 7]]), "max_new_tokens": 8, "do_sample": False}
    expected = model.generate(**asked)
    with ovshim.enabled() as scope:
        same(model.generate(**asked), expected)
        assert row(scope.report(), "LlamaForCausalLM")["eager_reasons"] == {"seldom": 8}
        monkeypatch.setattr(patient, "_WORTH_BUILDING", 0.0)
        monkeypatch.setattr(patient, "_WORTH_LOOKING_UP", 0.0)
        monkeypatch.setattr(found, "_WORTH_A_LOOK", 0.0)
        for _ in range(3):
            same(model.generate(**asked), expected)
    (plan,) = row(scope.report(), "LlamaForCausalLM")["plans"]
    assert plan["signature"] == "decoding, step by step"
    assert (plan["speedup"] >= 1.05) == (plan["path"] == "openvino")
    # A second program finds it in the cache, and is as patient.
    with ovshim.enabled(min_speedup=1000) as scope:
        for _ in range(3):
            same(model.generate(**asked), expected)
    told = row(scope.report(), "LlamaForCausalLM")
    assert told["plans"][0]["cache"] == "hit"
    assert told["plans"][0]["reason"]["code"] == "slower"
    assert told["calls"]["openvino"] == 0


@pytest.mark.slow
def test_a_model_that_was_trained_between_two_texts() -> None:
    import language_models as lm

    model: Any = lm.make("llama")
    asked = {"inputs": torch.tensor([[5, 6, 7]]), "max_new_tokens": 8, "do_sample": False}
    with ovshim.enabled(prefer="openvino") as scope:
        for factor in (1.0, -1.0):
            with torch.no_grad():
                model.lm_head.weight.mul_(factor)
            with ovshim.disabled():
                expected = model.generate(**asked)
            for _ in range(2):
                same(model.generate(**asked), expected)
    assert row(scope.report(), "LlamaForCausalLM")["eager_reasons"]["stale"] == 1
    assert served(scope, "LlamaForCausalLM") > 16


# Which modules


@pytest.mark.parametrize("names", ["Mlp", ["Ml*"], ["modules.Mlp"], ["Other", "*.Mlp"]])
def test_included_modules_are_looked_for_inwards(names: Any) -> None:
    net = make(Outer)
    with ovshim.enabled(prefer="openvino", include=names) as scope:
        warm(net, 4)
    assert [row.module for row in scope.report().rows] == ["Mlp"]
    assert served(scope) == 1


def test_excluded_modules_are_left_alone_with_what_is_inside() -> None:
    net, other = make(Outer), make(Scaled)
    with ovshim.enabled(prefer="openvino", exclude="Outer") as scope:
        warm(net, 4)
        warm(other, 4)
    assert [row.module for row in scope.report().rows] == ["Scaled"]


def test_what_is_called_with_a_mapping_of_its_own_is_looked_into() -> None:
    """As sentence-transformers does."""

    net = make(Features)
    with torch.no_grad(), ovshim.enabled(prefer="openvino") as scope:
        for _ in range(5):
            given = x()
            same(net(collections.UserDict(x=given))["answer"], CALL(net.inner, given))
    assert served(scope) == 1
    outer = row(scope.report(), "Features")
    assert outer["calls"]["eager"] == 1
    assert "UserDict" in outer["why"]


def test_modules_without_weights_are_left_alone() -> None:
    with ovshim.enabled(prefer="openvino") as scope:
        for _ in range(5):
            nn.MSELoss()(x(), x())
    assert scope.report().rows == ()


# Where it holds


def on() -> bool:
    """Whether a module that is called now would be found."""
    return nn.Module.__call__ is not CALL and calls._current() is not None


def test_scopes_nest_and_are_entered_again() -> None:
    scope = ovshim.enabled()
    assert not on()
    with scope:
        with scope, ovshim.disabled():
            assert not on()
            with ovshim.enabled():
                assert on()
            assert not on()
        assert on()
    assert not on()
    with pytest.raises(KeyError), scope:
        raise KeyError
    assert not on()


def test_the_inner_scope_serves() -> None:
    net, outer, inner = make(Mlp), ovshim.enabled(), ovshim.enabled(prefer="openvino")
    with outer, inner:
        warm(net, 5)
    assert served(inner) == 2
    assert outer.report().rows == ()


def test_a_scope_that_is_entered_again_remembers() -> None:
    net, scope = make(Mlp), ovshim.enabled(prefer="openvino")
    for _ in range(5):
        with scope:
            warm(net, 1)
        assert nn.Module.__call__ is CALL
    assert served(scope) == 2


def test_generators_may_be_left_in_any_order() -> None:
    def inside(scope: Any) -> Iterator[bool]:
        with scope:
            yield on()

    first, second = inside(ovshim.enabled()), inside(ovshim.disabled())
    assert next(first)
    assert not next(second)
    first.close()
    assert not on()  # `second` is still where it is
    second.close()
    assert not on()
    third, fourth = inside(ovshim.enabled()), inside(ovshim.enabled())
    next(third), next(fourth)
    third.close()
    assert on()
    fourth.close()
    assert nn.Module.__call__ is CALL


def test_a_generator_closed_in_another_context() -> None:
    def inside() -> Iterator[None]:
        with ovshim.enabled():
            yield

    generator = inside()
    next(generator)
    thread = threading.Thread(target=generator.close)
    thread.start()
    thread.join()
    assert not on()


def test_tasks_have_each_their_own() -> None:
    scope, seen = ovshim.enabled(), {}

    async def enter(name: str, before: float, inside: float) -> None:
        await asyncio.sleep(before)
        with scope:
            await asyncio.sleep(inside)
            seen[name] = on()
        seen[f"{name} after"] = on()

    async def all_of_them() -> None:
        await asyncio.gather(enter("a", 0.0, 0.02), enter("b", 0.01, 0.03), enter("c", 0.0, 0.05))
        seen["outside"] = on()

    asyncio.run(all_of_them())
    names = ("a", "b", "c")
    assert seen == dict.fromkeys(names, True) | dict.fromkeys(
        [*(f"{name} after" for name in names), "outside"], False
    )


def in_a_thread(ask: Any) -> Any:
    seen: list[Any] = []
    thread = threading.Thread(target=lambda: seen.append(ask()))
    thread.start()
    thread.join()
    return seen[0]


def test_threads_follow_by_their_context_or_all_at_once() -> None:
    with ovshim.enabled():
        assert not in_a_thread(on)
        context = contextvars.copy_context()
        assert in_a_thread(lambda: context.run(on))
    assert not context.run(on)  # what has ended has ended everywhere
    with ovshim.enabled(all_threads=True), ovshim.disabled():
        assert in_a_thread(on)
        assert not on()
    assert not in_a_thread(on)


def test_several_threads_call_one_module() -> None:
    net, inputs = make(Mlp), [x(n) for n in range(1, 5)]
    with torch.no_grad():
        expected = [net(given) for given in inputs]
    wrong: list[Any] = []

    def work() -> None:
        with torch.no_grad():
            for _ in range(20):
                for given, answer in zip(inputs, expected, strict=True):
                    try:
                        same(net(given), answer)
                    except BaseException as error:
                        wrong.append(error)

    with ovshim.enabled(prefer="openvino", all_threads=True) as scope:
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []
    assert served(scope) > 0
    assert sum(row(scope.report())["calls"].values()) == 320


def test_enable_and_disable_are_the_processs() -> None:
    net = make(Mlp)
    ovshim.disable()  # does nothing
    scope = ovshim.enable(prefer="openvino")
    try:
        assert in_a_thread(on)
        in_a_thread(lambda: warm(net, 4))
        with ovshim.disabled():
            assert not on()
        second = ovshim.enable(exclude="*")
        warm(net, 4)
        assert second.report().rows == ()
    finally:
        ovshim.disable()
    assert served(scope) == 1
    assert not in_a_thread(on)


def test_ovshim_0_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    scope = ovshim.enabled()
    monkeypatch.setenv("OVSHIM", "0")
    with scope, ovshim.enabled(all_threads=True):
        assert nn.Module.__call__ is CALL
    ovshim.enable()
    assert nn.Module.__call__ is CALL
    ovshim.disable()


def test_functions_coroutines_and_generators_are_decorated() -> None:
    scope = ovshim.enabled()

    @scope
    def function() -> bool:
        return on()

    @scope
    async def coroutine() -> bool:
        await asyncio.sleep(0)
        return on()

    @scope
    def generator() -> Iterator[bool]:
        yield on()
        yield on()

    assert function()
    assert asyncio.run(coroutine())
    steps = generator()
    assert next(steps)
    assert not on()
    assert next(steps)
    assert list(steps) == []


def test_async_generators_are_inside_at_each_step_and_outside_between() -> None:
    told: list[Any] = []

    @ovshim.enabled()
    async def generator() -> AsyncGenerator[bool, str]:
        try:
            told.append((yield on()))
            try:
                yield on()
            except ValueError as error:
                told.append(error)
            yield on()
            yield on()
        finally:
            told.append(on())

    async def main() -> None:
        steps = generator()
        assert await anext(steps)
        assert not on()
        error = ValueError()
        assert await steps.asend("sent")
        assert await steps.athrow(error)
        assert not on()
        await steps.aclose()
        assert told == ["sent", error, True]
        assert [inside async for inside in generator()] == [True] * 4

    asyncio.run(main())


@pytest.mark.parametrize("wrong", [nn.Linear, 5])
def test_what_is_no_function_cannot_be_decorated(wrong: Any) -> None:
    for stay in (ovshim.enabled(), ovshim.disabled()):
        with pytest.raises(ovshim.OptionError, match="allowed is a function"):
            stay(wrong)


# Reports and mistakes


def test_the_report_goes_to_a_file_or_a_function(tmp_path: Path) -> None:
    net, told = make(Mlp), []
    with ovshim.enabled(prefer="openvino", report=told.append):
        warm(net, 4)
    (summary,) = told
    assert "3 of 4" not in str(summary)
    assert "1 of 4 calls in OpenVINO on CPU" in str(summary)
    with ovshim.enabled(prefer="openvino", report=tmp_path / "r.json") as scope:
        warm(net, 4)
    written = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    assert written["modules"] == scope.report().to_dict()["modules"]
    with ovshim.enabled(report=tmp_path / "none" / "r.json"):
        pass  # it cannot be written: a line in the log


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"min_speedup": -1}, "min_speedup"),
        ({"min_speedup": np.float32("nan")}, "min_speedup"),
        ({"include": [3]}, "include"),
        ({"exclude": [""]}, "exclude"),
        ({"include": 5}, "include"),
        ({"exclude": None}, "exclude"),
        ({"report": 3}, "report"),
        ({"all_threads": 1}, "all_threads"),
        ({"inplace": True}, "inplace"),
        ({"methods": ["forward"]}, "methods"),
        ({"dynamic_shapes": {"x": {1: "n"}}}, "dynamic_shapes"),
        ({"options": ovshim.Options(inplace=True, memory="lean")}, "inplace"),
        ({"options": ovshim.Options(methods=["encode"])}, "methods"),
        ({"options": ovshim.Options(dynamic_shapes={"x": {1: "n"}})}, "dynamic_shapes"),
        ({"properties": {"NO_SUCH_PROPERTY": 1}}, "properties"),
        ({"precision": "fp7"}, "precision"),
        ({"device": "GPU.9"}, "device"),
        ({"devise": "CPU"}, "devise"),
    ],
)
def test_mistakes_are_told_at_once(arguments: dict[str, Any], name: str) -> None:
    with pytest.raises(ovshim.OptionError) as raised:
        ovshim.enabled(**arguments)
    assert raised.value.name == name


def test_what_has_no_storage_is_no_error() -> None:
    class Sparse(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)
            self.register_buffer("ways", torch.eye(8).to_sparse())

        def forward(self, x: Tensor) -> Tensor:
            return torch.sparse.mm(self.ways, self.linear(x))

    module, given = make(Sparse), torch.randn(8, 8)
    with torch.no_grad():
        expected = module(given)
        with ovshim.enabled(prefer="openvino"):
            for _ in range(12):
                same(module(given), expected)


def test_what_is_told_while_a_module_goes() -> None:
    net = make(Mlp)
    with ovshim.enabled(prefer="openvino") as scope:
        warm(net, 4)
        (found,) = [f for f in scope._finder._found.values() if f.cls is Mlp]  # type: ignore[attr-defined]
        row = found.row()
        found.kept = row
        found.let_go()
        assert found.row() is row


def test_weights_that_another_process_may_write_to_are_left_to_eager() -> None:
    module, x = make(Mlp), torch.randn(3, 8)
    module.share_memory()
    with torch.no_grad(), ovshim.enabled(prefer="openvino") as scope:
        for _ in range(20):
            module(x)
    (entry,) = scope.report().to_dict()["modules"]
    assert entry["calls"]["openvino"] == 0
    assert "untracked-weights" in str(entry)
