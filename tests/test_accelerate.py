"""The call: forms of the example, the twin that comes back, methods, in place, the decorator."""

import copy
import gc
import inspect
import io
import pickle
from typing import Any

import pytest
import torch
from checks import check, counts, falls_back, paths, plans, same, served, settle
from modules import AlwaysDrops, Mlp, Nest, Scaled, Towers, WritesInput, make
from torch import Tensor, nn

import ovshim


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 4)

    def forward(self, x: Tensor, y: Tensor | None = None, scale: float = 1.0) -> Tensor:
        out = self.linear(x) * scale
        return out if y is None else out + self.linear(y)


class Anything(nn.Module):
    """Takes whatever dtype and rank there is."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, 8))

    def forward(self, x: Any, flag: bool = False) -> Tensor:
        if isinstance(x, dict):
            x = x["a"] - x["b"]
        y = x * self.weight
        return y.sum(-1) if flag else y


class Greedy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 4)

    def forward(self, *xs: Tensor, **named: Tensor) -> Tensor:
        out = sum((self.linear(x) for x in xs), torch.zeros(4))
        for name in sorted(named):
            out = out + named[name].sum()
        return out


# What is accelerated, and how the example is given


def test_a_tensor_is_one_positional_argument() -> None:
    module = make(Mlp)
    fast = ovshim.accelerate(
        module, torch.randn(3, 8), device="CPU", precision="fp32", prefer="openvino"
    )
    check(fast, module, torch.randn(3, 8))
    check(fast, module, x=torch.randn(3, 8), path=None)
    assert paths(fast)[0] == "openvino"


def test_a_tuple_is_positional_arguments() -> None:
    module = make(TwoInputs)
    fast = ovshim.accelerate(module, (torch.randn(3, 8), torch.randn(3, 8)), prefer="openvino")
    check(fast, module, torch.randn(3, 8), torch.randn(3, 8))


def test_a_tuple_with_constants() -> None:
    module = make(TwoInputs)
    fast = ovshim.accelerate(module, (torch.randn(3, 8), None, 0.5), prefer="openvino")
    check(fast, module, torch.randn(3, 8), None, 0.5)


def test_a_mapping_is_keyword_arguments() -> None:
    module = make(TwoInputs)
    example = {"y": torch.randn(3, 8), "x": torch.randn(3, 8)}
    fast = ovshim.accelerate(module, example, prefer="openvino")
    check(fast, module, y=torch.randn(3, 8), x=torch.randn(3, 8))


def test_the_order_of_keywords_does_not_matter() -> None:
    module = make(TwoInputs)
    example = {"y": torch.randn(3, 8), "x": torch.randn(3, 8)}
    fast = ovshim.accelerate(module, example, prefer="openvino")
    check(fast, module, x=torch.randn(3, 8), y=torch.randn(3, 8))
    assert len(plans(fast)) == 1


@pytest.mark.parametrize("wrapped", [True, False], ids=["tuple", "tensor"])
def test_keywords_beside_positional_arguments(wrapped: bool) -> None:
    module = make(TwoInputs)
    x = torch.randn(3, 8)
    fast = ovshim.accelerate(
        module,
        (x,) if wrapped else x,
        example_kwargs={"y": torch.randn(3, 8), "scale": 3.0},
        prefer="openvino",
    )
    check(fast, module, torch.randn(3, 8), y=torch.randn(3, 8), scale=3.0)


def test_keywords_alone() -> None:
    module = make(TwoInputs)
    example = {"x": torch.randn(3, 8)}
    fast = ovshim.accelerate(module, example_kwargs=example, prefer="openvino")
    check(fast, module, x=torch.randn(3, 8))


def test_variable_arguments() -> None:
    module = make(Greedy)
    example = (torch.randn(2, 8), torch.randn(2, 8))
    fast = ovshim.accelerate(
        module,
        example,
        example_kwargs={"b": torch.randn(3), "a": torch.randn(3)},
        prefer="openvino",
    )
    # In the same order: `forward` gets them as a dict, and could go through it.
    check(fast, module, torch.randn(2, 8), torch.randn(2, 8), b=torch.randn(3), a=torch.randn(3))


def test_one_argument_of_a_structure() -> None:
    module = make(Nest)
    pairs = ((torch.randn(2, 8), torch.randn(2, 8)), {"c": torch.randn(2, 3)})
    fast = ovshim.accelerate(module, (pairs,), prefer="openvino")
    check(fast, module, copy.deepcopy(pairs))


def test_without_an_example_the_first_call_is_it() -> None:
    module = make(Mlp)
    fast = ovshim.accelerate(module, prefer="openvino")
    assert plans(fast) == []
    check(fast, module, torch.randn(3, 8), path=None)
    check(fast, module, torch.randn(3, 8))
    assert paths(fast) == ["openvino"]


def test_a_call_unlike_the_plan_gets_its_own() -> None:
    module = make(Anything)
    fast = ovshim.accelerate(module, torch.randn(3, 8), prefer="openvino")
    for args in (
        (torch.randn(3, 2, 8),),  # rank
        (torch.arange(16).view(2, 8),),  # dtype
        (torch.randn(3, 8), True),  # constant
        ({"a": torch.randn(3, 8), "b": torch.randn(3, 8)},),  # structure
    ):
        known = len(plans(fast))
        settle(fast, module, *args)
        assert len(plans(fast)) == known + 1
        check(fast, module, *args)
        check(fast, module, torch.randn(3, 8))  # the first plan still serves
    assert set(paths(fast)) == {"openvino"}


@pytest.mark.slow
def test_constants_that_are_equal_but_not_the_same() -> None:
    module = make(TwoInputs)
    fast = ovshim.accelerate(module, (torch.randn(3, 8), None, 1.0), prefer="openvino")
    for scale in (1.0, 1, True, 0.0, -0.0, 2.0):
        check(fast, module, torch.randn(3, 8), None, scale, path=None)


def test_a_module_of_torch_itself() -> None:
    module = make(nn.Linear, 8, 4)
    fast = ovshim.accelerate(module, torch.randn(3, 8), prefer="openvino")
    assert type(fast) is nn.Linear
    check(fast, module, torch.randn(3, 8))


def test_a_sequential_of_a_class_made_in_a_function() -> None:
    class Local(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.sin() * scale

    scale = 3.0
    module = nn.Sequential(nn.Linear(8, 8), Local()).eval()
    fast = ovshim.accelerate(module, torch.randn(3, 8), prefer="openvino")
    check(fast, module, torch.randn(3, 8))
    scale = 4.0
    settle(fast, module, torch.randn(3, 8))


# The twin


def test_the_result_is_of_the_users_class_with_one_name_more() -> None:
    module = make(Mlp)
    fast = ovshim.accelerate(module, torch.randn(3, 8), prefer="openvino")
    assert type(fast) is Mlp
    assert fast is not module
    assert set(dir(fast)) - set(dir(module)) == {"ovshim"}
    assert list(fast.state_dict()) == list(module.state_dict())
    assert [name for name, _ in fast.named_modules()] == [n for n, _ in module.named_modules()]
    assert [name for name, _ in fast.named_parameters()] == [
        name for name, _ in module.named_parameters()
    ]
    assert repr(fast) == repr(module)
    assert inspect.signature(fast.forward) == inspect.signature(module.forward)


def test_the_module_stays_as_it_was() -> None:
    module = make(Mlp)
    module.first.train()
    module.first.weight.requires_grad_(False)
    before = dict(module.__dict__)
    flags = [part.training for part in module.modules()]
    values = copy.deepcopy(module.state_dict())
    forward = module.forward
    fast = ovshim.accelerate(module, torch.randn(3, 8), prefer="openvino")
    with torch.inference_mode():
        fast(torch.randn(3, 8))
    assert module.__dict__.keys() == before.keys()
    assert all(module.__dict__[name] is value for name, value in before.items())
    assert [part.training for part in module.modules()] == flags
    assert module.forward == forward
    assert [p.requires_grad for p in module.first.parameters()] == [False, True]
    same(module.state_dict(), values, 0.0)


def test_random_numbers_go_on_as_if_nothing_had_been_built() -> None:
    module = make(Mlp)
    x = torch.randn(3, 8)
    state = torch.get_rng_state()
    fast = ovshim.accelerate(module, x, prefer="openvino")
    with torch.inference_mode():
        fast(torch.ones(5, 8))
    assert torch.equal(torch.get_rng_state(), state)


def test_the_state_of_torch_is_left_alone() -> None:
    torch.set_num_threads(threads := torch.get_num_threads())
    ovshim.accelerate(make(Mlp), torch.randn(3, 8), prefer="openvino")
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()
    assert torch.get_num_threads() == threads
    assert torch.get_default_dtype() == torch.float32


def test_tensors_are_one_with_the_originals() -> None:
    module = make(Mlp)
    fast = ovshim.accelerate(module, torch.randn(3, 8), prefer="openvino")
    for one, other in zip(fast.parameters(), module.parameters(), strict=True):
        assert one is other
    fast.half()
    assert module.first.weight.dtype == torch.float16
    module.float()
    assert fast.first.weight.dtype == torch.float32


def test_structure_hooks_and_flags_are_each_ones_own() -> None:
    module = make(Mlp)
    fast = ovshim.accelerate(module, torch.randn(3, 8), prefer="openvino")
    assert not fast.training
    fast.train()
    assert not module.training
    assert not module.first.training
    fast.eval()
    module.train()
    assert not fast.training
    assert not fast.first.training
    module.eval()
    fast.last = nn.Identity()
    assert isinstance(module.last, nn.Linear)
    handle = module.register_forward_hook(lambda *_: torch.zeros(()))
    with torch.inference_mode():
        assert fast(torch.randn(3, 8)).shape == (3, 16)
    handle.remove()


def test_attributes_and_methods_work() -> None:
    module = make(Scaled, k=5.0)
    fast = ovshim.accelerate(module, torch.randn(3, 8), prefer="openvino")
    assert fast.k == 5.0
    fast.note = "mine"
    assert fast.note == "mine"
    assert not hasattr(module, "note")
    assert fast.requires_grad_(False) is fast
    assert fast.zero_grad() is None
    assert fast.eval() is fast
    assert fast.train() is fast
    assert fast.to("cpu") is fast


def test_a_method_that_calls_the_module_is_accelerated_inside() -> None:
    module = make(Towers)
    fast = ovshim.accelerate(module, (torch.randn(2, 8), torch.randn(3, 6)), prefer="openvino")
    image, text = torch.randn(2, 8), torch.randn(3, 6)
    with served(fast, "openvino", calls=2), torch.inference_mode():
        same(fast.twice(image, text), module.twice(image, text))
    with served(fast, "openvino", calls=0), torch.inference_mode():
        same(fast.encode_image(image), module.encode_image(image))


def test_calling_forward_itself_is_accelerated() -> None:
    module = make(Mlp)
    fast = ovshim.accelerate(module, torch.randn(3, 8), prefer="openvino")
    x = torch.randn(3, 8)
    with served(fast, "openvino"), torch.inference_mode():
        same(fast.forward(x), module(x))


def test_a_forward_that_outlives_its_module() -> None:
    module = make(Mlp)
    forward = ovshim.accelerate(module, torch.randn(3, 8), prefer="openvino").forward
    gc.collect()
    with torch.inference_mode():
        same(forward(x := torch.randn(3, 8)), module(x))


def test_the_twin_outlives_the_original() -> None:
    module = make(Mlp)
    reference = copy.deepcopy(module)
    fast = ovshim.accelerate(module, torch.randn(3, 8), prefer="openvino")
    del module
    gc.collect()
    check(fast, reference, torch.randn(3, 8))


def test_hooks_on_the_module_fire_in_order() -> None:
    module = make(Mlp)
    said: list[str] = []

    def hook(name: str) -> Any:
        def note(*_: Any) -> None:
            said.append(name)

        return note

    module.register_forward_pre_hook(hook("pre, before"))
    module.register_forward_hook(hook("post, before"))
    fast = ovshim.accelerate(module, torch.randn(3, 8), prefer="openvino")
    fast.register_forward_pre_hook(hook("pre, after"))
    fast.register_forward_hook(hook("post, after"))
    said.clear()
    with torch.inference_mode():
        fast(torch.randn(3, 8))
    assert said == ["pre, before", "pre, after", "post, before", "post, after"]
    settle(fast, fast_free_of_hooks(module), torch.randn(3, 8))


def fast_free_of_hooks(module: nn.Module) -> nn.Module:
    copied = copy.deepcopy(module)
    copied._forward_hooks.clear()
    copied._forward_pre_hooks.clear()
    return copied


def test_hooks_may_change_arguments_and_output() -> None:
    module = make(Mlp)
    fast = ovshim.accelerate(module, torch.randn(3, 8), prefer="openvino")
    for one in (module, fast):
        one.register_forward_pre_hook(lambda _module, args: (args[0] * 2,))
        one.register_forward_hook(lambda _module, _args, output: {"y": output - 1})
    settle(fast, module, torch.randn(3, 8))
    check(fast, module, torch.randn(3, 8))


def test_a_hook_sees_the_accelerated_module() -> None:
    fast = ovshim.accelerate(make(Mlp), torch.randn(3, 8), prefer="openvino")
    seen: list[nn.Module] = []
    fast.register_forward_hook(lambda module, _args, _output: seen.append(module))
    with torch.inference_mode():
        fast(torch.randn(3, 8))
    assert len(seen) == 1
    assert seen[0] is fast


def test_a_twin_of_a_twin() -> None:
    module = make(Mlp)
    once = ovshim.accelerate(module, torch.randn(3, 8), prefer="openvino")
    fast = ovshim.accelerate(once, torch.randn(3, 8), prefer="openvino")
    check(fast, module, torch.randn(3, 8))
    check(once, module, torch.randn(3, 8))


def test_an_accelerated_part_of_an_accelerated_whole() -> None:
    class Whole(nn.Module):
        def __init__(self, part: nn.Module) -> None:
            super().__init__()
            self.part = part
            self.head = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.part(x))

    part = make(Mlp)
    whole = Whole(ovshim.accelerate(part, torch.randn(3, 8), prefer="openvino")).eval()
    fast = ovshim.accelerate(whole, torch.randn(3, 8), prefer="openvino")
    x = torch.randn(3, 8)
    with torch.inference_mode():
        expected = whole.head(part(x))
        with served(fast, "openvino"):
            same(fast(x), expected)
        same(whole(x), expected)


# Copies


@pytest.mark.parametrize("has_plan", [True, False])
@pytest.mark.parametrize(
    "copied",
    [
        pytest.param(copy.deepcopy, id="deepcopy"),
        pytest.param(lambda fast: pickle.loads(pickle.dumps(fast)), id="pickle"),
    ],
)
def test_copies_are_right_and_accelerated(copied: Any, has_plan: bool) -> None:
    module = make(Mlp)
    fast = ovshim.accelerate(module, torch.randn(3, 8) if has_plan else None, prefer="openvino")
    twin = copied(fast)
    assert type(twin) is Mlp
    assert twin.first.weight.data_ptr() != fast.first.weight.data_ptr()
    settle(twin, module, torch.randn(3, 8))
    # The copy has weights of its own: what happens to one is not seen by the other.
    with torch.no_grad():
        twin.last.bias += 10
    other = copy.deepcopy(module)
    with torch.no_grad():
        other.last.bias += 10
    settle(twin, other, torch.randn(3, 8))
    settle(fast, module, torch.randn(3, 8))


def test_a_saved_whole_module() -> None:
    module = make(Mlp)
    fast = ovshim.accelerate(module, torch.randn(3, 8), prefer="openvino")
    buffer = io.BytesIO()
    torch.save(fast, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    settle(loaded, module, torch.randn(3, 8))


def test_a_saved_state_goes_into_a_plain_module() -> None:
    fast = ovshim.accelerate(make(Mlp), torch.randn(3, 8), prefer="openvino")
    buffer = io.BytesIO()
    torch.save(fast.state_dict(), buffer)
    buffer.seek(0)
    other = Mlp().eval()
    other.load_state_dict(torch.load(buffer, weights_only=True))
    check(fast, other, torch.randn(3, 8))


def test_a_shallow_copy_with_another_head_answers_with_it() -> None:
    module = make(Mlp)
    fast = ovshim.accelerate(module, torch.randn(3, 8), prefer="openvino")
    other = copy.copy(fast)
    other._modules = dict(fast._modules)
    other.last = nn.Linear(16, 2).eval()
    x = torch.randn(3, 8)
    with torch.inference_mode():
        hidden = torch.relu(module.norm(module.first(x)))
        for _ in range(3):
            same(other(x), other.last(hidden))
            same(fast(x), module(x))


def test_copying_the_options_along() -> None:
    fast = ovshim.accelerate(make(Mlp), torch.randn(3, 8), prefer="openvino", tolerance=1e-3)
    for twin in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert twin.ovshim.options == fast.ovshim.options
        assert twin.ovshim.options.tolerance == 1e-3


# In place, methods, the decorator


def test_in_place_accelerates_the_module_itself() -> None:
    module = make(Mlp)
    reference = copy.deepcopy(module)
    fast = ovshim.accelerate(module, torch.randn(3, 8), inplace=True, prefer="openvino")
    assert fast is module
    check(module, reference, torch.randn(3, 8))


def test_in_place_after_a_twin() -> None:
    module = make(Mlp)
    reference = copy.deepcopy(module)
    fast = ovshim.accelerate(module, torch.randn(3, 8), prefer="openvino")
    ovshim.accelerate(module, torch.randn(3, 8), inplace=True, prefer="openvino")
    check(module, reference, torch.randn(3, 8))
    check(fast, reference, torch.randn(3, 8))


def test_in_place_twice() -> None:
    module = make(Mlp)
    reference = copy.deepcopy(module)
    ovshim.accelerate(module, torch.randn(3, 8), inplace=True, prefer="openvino")
    ovshim.accelerate(module, torch.randn(3, 8), inplace=True, prefer="openvino", tolerance=1e-3)
    assert module.ovshim.options.tolerance == 1e-3
    check(module, reference, torch.randn(3, 8))


def test_other_methods_than_forward() -> None:
    module = make(Towers)
    fast = ovshim.accelerate(module, methods=["encode_image", "encode_text"], prefer="openvino")
    for method, args, kwargs in (
        ("encode_image", (torch.randn(2, 8),), {}),
        ("encode_text", (torch.randn(2, 6),), {"shift": 0.5}),
    ):
        eager = getattr(module, method)
        accelerated = getattr(fast, method)
        with torch.inference_mode():
            expected = eager(*args, **kwargs)
            same(accelerated(*args, **kwargs), expected)
            with served(fast, "openvino"):
                same(accelerated(*args, **kwargs), expected)
    with served(fast, "openvino", calls=2), torch.inference_mode():  # forward itself is eager
        image, text = torch.randn(2, 8), torch.randn(3, 6)
        expected = module(image, text)
        fast.encode_text(text, shift=0.5)
        fast.encode_image(image)
    with torch.inference_mode():
        same(fast(image, text), expected)


def test_the_example_is_of_the_first_method() -> None:
    module = make(Towers)
    fast = ovshim.accelerate(
        module, torch.randn(2, 8), methods=["encode_image", "forward"], prefer="openvino"
    )
    x = torch.randn(2, 8)
    with served(fast, "openvino"), torch.inference_mode():
        same(fast.encode_image(x), module.encode_image(x))
    settle(fast, module, torch.randn(2, 8), torch.randn(3, 6))


def test_methods_and_copies() -> None:
    module = make(Towers)
    fast = ovshim.accelerate(
        module, torch.randn(2, 8), methods=("encode_image",), prefer="openvino"
    )
    x = torch.randn(2, 8)
    for twin in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        with torch.inference_mode():
            for _ in range(3):
                same(twin.encode_image(x), module.encode_image(x))
        assert counts(twin)["openvino"] >= 1


@ovshim.accelerate(device="CPU", precision="fp32", prefer="openvino")
class Decorated(nn.Module):
    """Documented."""

    def __init__(self, inputs: int = 8, *, outputs: int = 4) -> None:
        """Made."""
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).tanh()


class Derived(Decorated):
    def __init__(self) -> None:
        super().__init__(outputs=6)
        self.more = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.more(super().forward(x))


def eager_decorated(module: Any) -> Any:
    return lambda x: module.linear(x).tanh()


def test_each_instance_of_a_decorated_class_accelerates_itself() -> None:
    one, other = make(Decorated), make(Decorated, outputs=2)
    assert plans(one) == []
    for module in (one, other):
        settle(module, eager_decorated(module), torch.randn(3, 8))
        check(module, eager_decorated(module), torch.randn(3, 8))


def test_a_decorated_class_stays_itself() -> None:
    assert isinstance(Decorated, type)
    assert Decorated.__name__ == "Decorated"
    assert Decorated.__doc__ == "Documented."
    assert list(inspect.signature(Decorated).parameters) == ["inputs", "outputs"]
    module = make(Decorated)
    assert type(module) is Decorated
    assert list(module.state_dict()) == ["linear.weight", "linear.bias"]


def test_instances_of_a_decorated_class_pickle_and_copy() -> None:
    module = make(Decorated)
    settle(module, eager_decorated(module), torch.randn(3, 8))
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        settle(twin, eager_decorated(module), torch.randn(3, 8))


def test_a_subclass_of_a_decorated_class_is_right() -> None:
    module = make(Derived)
    x = torch.randn(3, 8)
    with torch.inference_mode():
        expected = module.more(module.linear(x).tanh())
        for _ in range(3):
            same(module(x), expected)


def test_the_decorator_wants_a_class_of_modules() -> None:
    with pytest.raises(ovshim.OptionError):
        ovshim.accelerate(device="CPU")(int)  # type: ignore[type-var]
    with pytest.raises(ovshim.OptionError):
        ovshim.accelerate(device="CPU")(lambda x: x)  # type: ignore[type-var]
    with pytest.raises(ovshim.OptionError):
        ovshim.accelerate(precision="fp7")
    with pytest.raises(ovshim.OptionError, match=r"@ovshim\.accelerate\(\)"):
        ovshim.accelerate(nn.Linear)  # type: ignore[type-var]


# Training and evaluation


def test_a_module_in_training_mode_waits_for_eval() -> None:
    module = Mlp().train()
    x = torch.randn(3, 8)
    fast = ovshim.accelerate(module, x, prefer="openvino")
    check(fast, module, torch.randn(3, 8), path="eager", reason="training")
    fast.eval()
    settle(fast, copy.deepcopy(module).eval(), torch.randn(3, 8))


def test_training_through_the_twin_and_back() -> None:
    module = make(Mlp)
    reference = copy.deepcopy(module)
    fast = ovshim.accelerate(module, torch.randn(16, 8), prefer="openvino")
    x, target = torch.randn(16, 8), torch.randn(16, 4)
    for model in (fast, reference):
        model.train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for _ in range(3):
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x), target).backward()
            optimizer.step()
        model.eval()
    for one, other in zip(fast.parameters(), reference.parameters(), strict=True):
        same(one.detach(), other.detach())
    settle(fast, reference, torch.randn(16, 8))
    check(fast, reference, torch.randn(16, 8))


# Ownership


@pytest.mark.parametrize("width", [8, 40_000], ids=["small", "large"])
def test_outputs_belong_to_the_caller(width: int) -> None:
    class Shift(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.rand(width))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x * self.weight, (x + 1).sum(-1)

    module = Shift().eval()
    fast = ovshim.accelerate(module, torch.randn(2, width), prefer="openvino")
    xs = [torch.randn(2, width) for _ in range(6)]
    with served(fast, "openvino", calls=7), torch.inference_mode():
        outputs = [fast(x) for x in xs]
        same(outputs, [module(x) for x in xs])
        kept = [tuple(part.clone() for part in output) for output in outputs]
        outputs[0][0].zero_()  # the caller's to write to
        fast(torch.randn(3, width))
    same(outputs[1:], kept[1:], 0.0)
    views = [output[0][0, 1:4] for output in outputs]
    copies = [view.clone() for view in views]
    del outputs
    gc.collect()
    with torch.inference_mode():
        for x in xs:
            fast(x)
    same(views, copies, 0.0)


@pytest.mark.parametrize("width", [8, 40_000], ids=["small", "large"])
def test_writing_to_an_input_after_the_call_changes_no_output(width: int) -> None:
    module = nn.Sequential(nn.Identity(), nn.ReLU()).eval()
    fast = ovshim.accelerate(module, torch.rand(2, width), prefer="openvino")
    x = torch.rand(2, width)
    with served(fast, "openvino"), torch.inference_mode():
        y = fast(x)
    kept = y.clone()
    x.zero_()
    assert torch.equal(y, kept)


def test_outputs_have_no_history_and_can_be_used_everywhere() -> None:
    module = make(Mlp)
    fast = ovshim.accelerate(module, torch.randn(3, 8), prefer="openvino")
    with served(fast, "openvino"), torch.no_grad():
        y = fast(torch.randn(3, 8))
    assert not y.requires_grad
    assert not y.is_inference()
    weight = torch.ones(4, requires_grad=True)
    (y * weight).sum().backward()
    assert weight.grad is not None
    with served(fast, "openvino"), torch.inference_mode():
        assert fast(torch.randn(3, 8)).is_inference()


def test_strange_strides_of_inputs() -> None:
    module = make(Mlp)
    fast = ovshim.accelerate(module, torch.randn(4, 8), prefer="openvino")
    base = torch.randn(8, 8)
    for x in (
        base.t()[:4],
        base[::2],
        base[:4, torch.arange(8)],
        torch.randn(1, 8).expand(4, 8),
        torch.randn(64)[::2].view(4, 8),
        torch.randn(33)[1:].view(4, 8),
        torch.zeros(()).expand(4, 8),
    ):
        settle(fast, module, x)  # what is not contiguous is another kind of call


def test_inputs_that_numpy_owns_and_may_not_be_written() -> None:
    import warnings

    import numpy as np

    module = make(Mlp)
    fast = ovshim.accelerate(module, torch.randn(4, 8), prefer="openvino")
    array = np.random.default_rng(0).normal(size=(4, 8)).astype("float32")
    array.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, of the array that cannot be written
        x = torch.from_numpy(array)
    with served(fast, "openvino"), torch.inference_mode():
        same(fast(x), module(x))


def test_inputs_are_unchanged_by_the_build() -> None:
    module = make(WritesInput)
    x = torch.ones(3, 8)
    with falls_back("mutates-input"):
        ovshim.accelerate(module, x, prefer="openvino")
    assert torch.equal(x, torch.ones(3, 8))


def test_what_builds_does_not_move_random_numbers_of_a_random_module() -> None:
    module = make(AlwaysDrops)
    state = torch.get_rng_state()
    with falls_back("random"):
        ovshim.accelerate(module, torch.ones(3, 8), prefer="openvino")
    assert torch.equal(torch.get_rng_state(), state)
