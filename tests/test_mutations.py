"""Modules changed at random, in every way that torch and Python offer: what changes the answer is
noticed, and no call is answered by what was."""

import contextlib
import gc
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from checks import check, counts, quietly, same
from modules import DigitsCnn, Mlp, Recurrent, make, small_bert
from torch import Tensor, nn

import ovshim
from ovshim import untouched
from ovshim.generation import Generation

Chance = random.Random


def weight(module: nn.Module, chance: Chance) -> nn.Parameter:
    return chance.choice(list(module.parameters()))


def place(module: nn.Module, chance: Chance) -> tuple[nn.Module, str]:
    """Some module of the tree, and the name of a parameter of its own."""
    places = [(inner, name) for inner in module.modules() for name in inner._parameters]
    return chance.choice([(m, name) for m, name in places if m._parameters[name] is not None])


def in_place(module: nn.Module, chance: Chance) -> None:
    weight(module, chance).detach().mul_(1.5)


def by_data(module: nn.Module, chance: Chance) -> None:
    chosen = weight(module, chance)
    for _ in range(chance.randint(1, 3)):
        chosen.data = chosen.data * 0.5


def transposed(module: nn.Module, chance: Chance) -> None:
    chosen = weight(module, chance)
    if chosen.dim() == 2 and chosen.shape[0] == chosen.shape[1]:
        chosen.data = chosen.data.t()


def other_dimensions(module: nn.Module, chance: Chance) -> None:
    chosen = weight(module, chance)
    chosen.data = chosen.data.view(1, 1, 1, 1, *chosen.shape)
    chosen.data = chosen.data.view(chosen.shape[4:]) * 1.5


def swapped(module: nn.Module, chance: Chance) -> None:
    chosen = weight(module, chance)
    with contextlib.suppress(RuntimeError):  # torch refuses those that an LSTM refers to
        for _ in range(chance.randint(1, 3)):
            torch.utils.swap_tensors(chosen, nn.Parameter(chosen.detach() * 1.5))


def replaced(module: nn.Module, chance: Chance) -> None:
    inner, name = place(module, chance)
    setattr(inner, name, nn.Parameter(getattr(inner, name).detach() * 1.5))


def by_the_dict(module: nn.Module, chance: Chance) -> None:
    inner, name = place(module, chance)
    inner._parameters[name] = nn.Parameter(getattr(inner, name).detach() * 0.5)


def other_dict(module: nn.Module, chance: Chance) -> None:
    inner, _ = place(module, chance)
    inner._parameters = {k: nn.Parameter(p.detach() * 0.5) for k, p in inner._parameters.items()}  # type: ignore[union-attr]


def loaded(module: nn.Module, chance: Chance) -> None:
    state = {name: held * 1.5 for name, held in module.state_dict().items()}
    module.load_state_dict(state, strict=False, assign=chance.random() < 0.5)


def rounded(module: nn.Module, chance: Chance) -> None:
    (module.bfloat16() if chance.random() < 0.5 else module.half()).float()


def one_vector(module: nn.Module, chance: Chance) -> None:
    flat = nn.utils.parameters_to_vector(module.parameters()).detach()
    nn.utils.vector_to_parameters(flat * 1.5, module.parameters())


def stepped(module: nn.Module, chance: Chance) -> None:
    further = chance.choice([{}, {"fused": True}, {"foreach": True}])
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1, **further)
    for parameter in module.parameters():
        parameter.grad = torch.full_like(parameter, 0.5)
    optimizer.step()
    optimizer.zero_grad()


def buffer(module: nn.Module, chance: Chance) -> None:
    held = [b for b in module.buffers() if b.is_floating_point()]
    if held:
        chance.choice(held).add_(0.5)


def epsilon(module: nn.Module, chance: Chance) -> None:
    for inner in module.modules():
        if hasattr(inner, "eps"):
            inner.eps = chance.choice([1e-5, 0.1, 1.0])


def wrapped(module: nn.Module, chance: Chance) -> None:
    inner = chance.choice([m for m in module.modules() if isinstance(m, nn.Linear)])
    forward = inner.forward
    inner.forward = lambda *args: forward(*args) * 1.5  # type: ignore[method-assign]


def hooked(module: nn.Module, chance: Chance) -> None:
    inner = chance.choice([m for m in module.modules() if isinstance(m, nn.Linear)])
    inner.register_forward_hook(lambda module, args, output: output * 1.5)


def collected(module: nn.Module, chance: Chance) -> None:
    gc.collect(0)


CHANGES: list[Callable[[nn.Module, Chance], None]] = [
    *(in_place, by_data, transposed, other_dimensions, swapped, replaced, by_the_dict, other_dict),
    *(loaded, rounded, one_vector, stepped, buffer, epsilon, wrapped, hooked, collected),
]
MODULES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "mlp": (lambda: make(Mlp, 64), lambda: torch.randn(3, 64)),
    "conv": (lambda: make(DigitsCnn), lambda: torch.randn(2, 1, 16, 16)),
    "lstm": (lambda: make(Recurrent), lambda: torch.randn(2, 5, 8)),
    "bert": (small_bert, lambda: torch.randint(0, 100, (2, 7))),
}


def change(module: nn.Module, chance: Chance) -> list[str]:
    """Change it one to three times; how."""
    done = []
    for chosen in chance.choices(CHANGES, k=chance.randint(1, 3)):
        chosen(module, chance)
        done.append(chosen.__name__)
    return done


def answer(module: Callable[[Tensor], Any], x: Tensor) -> list[Tensor]:
    with torch.inference_mode():
        found = module(x)
    found = found.values() if isinstance(found, dict) else found
    return list(torch.utils._pytree.tree_leaves(tuple(found)))


@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize("memory", [True, False], ids=["memory", "compared"])
def test_what_changes_the_answer_is_noticed(
    kind: str, memory: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not memory:
        monkeypatch.setattr(untouched, "_places", lambda: None)
    make_module, given = MODULES[kind]
    chance, x, noticed = Chance(f"{kind} {memory}"), given(), 0
    for n in range(60):
        if n % 6 == 0:
            module = make_module()
            made = None
        if made is None:
            for inner in module.modules():
                inner._forward_hooks.clear()
            made, before, done = Generation(module), answer(module, x), []
            assert made.holds()
        done += change(module, chance)
        changed = not all(map(torch.equal, before, answer(module, x)))
        if made.holds():
            assert not changed, done
        else:
            noticed += changed
            made = None
    assert noticed > 40


@pytest.mark.parametrize(
    ("kind", "rounds"),
    [("mlp", 12), *(pytest.param(kind, 40, marks=pytest.mark.slow) for kind in MODULES)],
)
def test_no_call_is_answered_by_what_was(kind: str, rounds: int) -> None:
    make_module, given = MODULES[kind]
    chance = Chance(f"{kind} {rounds}")
    module = make_module()
    fast = ovshim.accelerate(module, given(), prefer="openvino")
    for n in range(rounds):
        if n % 6 == 0:
            module = make_module()
            fast = ovshim.accelerate(module, given(), prefer="openvino")
        for inner in fast.modules():
            inner._forward_hooks.clear()
        with quietly():
            fast.ovshim.refresh()
            answer(fast, given())
            x, served = given(), counts(fast)["openvino"]
            answer(fast, x)
            assert counts(fast)["openvino"] == served + 1, ovshim.explain(fast)
            done = change(fast, chance)
            for _ in range(2):
                with ovshim.disabled():
                    expected = answer(fast, x)
                same(answer(fast, x), expected, where=str(done))


@pytest.mark.parametrize("kind", [nn.ModuleList, nn.Sequential, nn.ModuleDict])
@pytest.mark.parametrize("memory", [True, False])
def test_a_layer_in_what_was_empty(
    kind: type[nn.Module], memory: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not memory:
        monkeypatch.setattr(untouched, "_places", lambda: None)

    class Grows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.more = nn.Linear(8, 8), kind()

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.more.children():
                x = layer(x)
            return self.first(x)

    module, x = Grows().eval(), torch.randn(3, 8)
    fast = ovshim.accelerate(module, x, prefer="openvino")
    check(fast, module, x)
    fast.more.add_module("0", nn.Tanh())
    plain = Grows().eval()
    plain.load_state_dict(module.state_dict())
    plain.more.add_module("0", nn.Tanh())
    with torch.inference_mode():
        assert torch.equal(fast(x), plain(x))
