"""Tensors that were made in inference mode: they count no versions, and no write goes unnoticed."""

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from checks import as_it_runs, check, counts, eager_reasons, plans, quietly, same
from modules import DigitsCnn, Mlp, Recurrent, make
from torch import Tensor, nn

import ovshim
from ovshim import parts, verdict
from ovshim.generation import Generation
from ovshim.race import Finish
from ovshim.stamps import Values, stamp

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t.contiguous(),
    "transposed": lambda t: t.mT.contiguous().mT,
    "strided": lambda t: t.repeat_interleave(2, -1)[..., ::2],
    "expanded": lambda t: t[..., :1].expand(t.shape),
    "conjugated": lambda t: t.conj(),
}


def made_inside(module_class: Callable[[], nn.Module] = Mlp) -> nn.Module:
    with torch.inference_mode():
        module = make(module_class)
    assert all(p.is_inference() for p in module.parameters())
    return module


@pytest.mark.parametrize("module_class", [Mlp, DigitsCnn, Recurrent])
@pytest.mark.parametrize("under", [torch.inference_mode, torch.no_grad])
def test_a_module_made_in_inference_mode_is_served(
    module_class: Callable[[], nn.Module], under: Callable[[], Any]
) -> None:
    size = {Mlp: (4, 8), DigitsCnn: (4, 1, 16, 16), Recurrent: (4, 5, 8)}[module_class]  # type: ignore[index]
    module = made_inside(module_class)
    with under():
        fast = ovshim.accelerate(module, torch.randn(size), prefer="openvino")
        for _ in range(3):
            check(fast, module, torch.randn(size), under=under)


def test_its_entry_is_that_of_the_same_module_made_elsewhere() -> None:
    x = torch.randn(4, 8)
    ovshim.accelerate(make(Mlp), x, prefer="openvino")
    with torch.inference_mode():
        fast = ovshim.accelerate(made_inside(), x, prefer="openvino")
    assert plans(fast)[0]["cache"] == "hit"


def first_weight(module: Any) -> None:
    module.first.weight[0, 0] += 1


def last_of_a_bias(module: Any) -> None:
    module.last.bias[-1].add_(1)


def by_data(module: Any) -> None:
    module.first.weight.data = module.first.weight.data * 2


def elsewhere(module: Any) -> None:
    module.first.weight.set_((module.first.weight * 2).clone())


def loaded(module: Any) -> None:
    module.load_state_dict({name: t + 1 for name, t in module.state_dict().items()})


def assigned(module: Any) -> None:
    state = {name: t + 1 for name, t in module.state_dict().items()}
    module.load_state_dict(state, assign=True)


def transposed(module: Any) -> None:
    square = module.first.weight.data
    module.first.weight.data = square.mT


@pytest.mark.parametrize(
    "write", [first_weight, last_of_a_bias, by_data, elsewhere, loaded, assigned, transposed]
)
def test_a_write_is_noticed(write: Callable[[Any], None]) -> None:
    module = made_inside(lambda: Mlp(8, 8, 8))
    with torch.inference_mode():
        fast = ovshim.accelerate(module, torch.randn(4, 8), prefer="openvino")
        for _ in range(2):
            check(fast, module, torch.randn(4, 8))
        write(module)
        x = torch.randn(4, 8)
        with quietly():
            same(fast(x), module(x))
            for _ in range(4):
                same(fast(x), module(x))
        assert eager_reasons(fast)["stale"] >= 1
        check(fast, module, x)


class Memo(nn.Module):
    """Keeps a table that it makes in its first call, as transformers' LeViT does."""

    def __init__(self) -> None:
        super().__init__()
        self.biases = nn.Parameter(torch.randn(3, 10))
        self.register_buffer("index", torch.randint(0, 10, (16,)), persistent=False)
        self.kept: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        key = str(x.device)
        if key not in self.kept:
            self.kept[key] = self.biases[:, self.index]
        return x[:, None] * self.kept[key]


def test_what_a_module_keeps_in_inference_mode_is_watched() -> None:
    torch.manual_seed(0)
    module = Memo().eval()
    with torch.inference_mode():
        module(torch.randn(2, 16))
        fast = ovshim.accelerate(module, torch.randn(2, 16), prefer="openvino")
        check(fast, module, torch.randn(2, 16))
        module.kept["cpu"][1, 3] = 7.0
        x = torch.randn(2, 16)
        with quietly():
            same(fast(x), module(x))
            same(fast(x), module(x))


class Counting(nn.Module):
    def __init__(self, where: str) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        count = torch.zeros(1)
        if where == "parameter":
            self.count = nn.Parameter(count, requires_grad=False)
        elif where == "buffer":
            self.register_buffer("count", count)
        else:
            self.held = {"attribute": count, "list": [count], "object": Holder(count)}[where]

    def counted(self) -> Tensor:
        held = getattr(self, "held", None)
        if held is None:
            return self.count
        return held[0] if isinstance(held, list) else getattr(held, "count", held)  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        count = self.counted()
        count.add_(1)
        y: Tensor = self.linear(x) * count
        return y


class Holder:
    def __init__(self, count: Tensor) -> None:
        self.count = count


@pytest.mark.parametrize("under", [torch.inference_mode, torch.no_grad])
@pytest.mark.parametrize("inside", [True, False], ids=["inside", "outside"])
@pytest.mark.parametrize("background", [False, True], ids=["at once", "in the background"])
@pytest.mark.parametrize("where", ["buffer", "parameter", "attribute", "list", "object"])
def test_what_calls_write_to_is_written_by_the_users_alone(
    where: str, background: bool, inside: bool, under: Callable[[], Any]
) -> None:
    module: Any
    other: Any
    module, other = (
        made_inside(lambda: Counting(where)) if inside else make(Counting, where=where)
        for _ in range(2)
    )
    with quietly():
        with under():
            fast: Any = ovshim.accelerate(
                module, torch.randn(2, 8), prefer="openvino", background=background
            )
            fast.ovshim.wait()
        assert torch.equal(module.counted(), torch.zeros(1))
        with torch.inference_mode():
            for _ in range(3):
                x = torch.randn(2, 8)
                same(fast(x), other(x))
                fast.ovshim.wait()
    assert counts(fast)["openvino"] == 0
    assert torch.equal(module.counted(), other.counted())


def test_the_callers_tensors_can_be_resized_as_before() -> None:
    module = made_inside()
    with torch.inference_mode(), quietly():
        fast: Any = ovshim.accelerate(module, prefer="openvino")
        x = torch.randn(4, 8)
        for _ in range(3):
            fast(x)
        x.resize_(64, 8)
        module.first.weight.resize_(2, 2)  # type: ignore[union-attr, operator]
    assert counts(fast)["openvino"] >= 1


def test_while_eager_serves_no_values_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    lost = Finish(1.0, 2.0, 0.5, 0.5)
    monkeypatch.setattr(verdict, "race", lambda *_: lost)
    monkeypatch.setattr(parts, "divide", lambda job, plan: plan)
    module, x = made_inside(), torch.randn(4, 8)
    with torch.inference_mode():
        fast = ovshim.accelerate(module, x)
        read: list[Any] = []
        monkeypatch.setattr(Values, "same", lambda self: read.append(self) or True)
        for _ in range(400):
            fast(x)
    assert counts(fast) == {"openvino": 0, "mixed": 0, "eager": 400}
    assert not read


def test_without_a_thread_to_be_had_values_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.inference_mode():
        tensor = torch.randn(3_000, 3_000)
        before = stamp(tensor)

        def refuses(*_: Any) -> None:
            raise RuntimeError("cannot schedule new futures after interpreter shutdown")

        monkeypatch.setattr(ThreadPoolExecutor, "map", refuses)
        assert stamp(tensor) == before
        tensor[1, 1] += 1
        assert stamp(tensor) != before


class Doubling(nn.Module):
    """Writes to its input where a trace would not see whose it is."""

    def forward(self, x: Tensor) -> Tensor:
        x.mul_(2)
        return x + 1


def test_an_input_that_is_written_to_is_written_to() -> None:
    module = Doubling().eval()
    with torch.inference_mode(), quietly():
        fast = ovshim.accelerate(module, torch.randn(2, 8), prefer="openvino")
        for _ in range(3):
            check(fast, module, torch.randn(2, 8), path=None)


class Other(nn.Parameter):
    """What its values are, only it knows."""


def test_a_class_of_tensors_of_its_own_is_eagers() -> None:
    module = made_inside()
    with torch.inference_mode(), quietly():
        module.first.weight = Other(module.first.weight.data, requires_grad=False)  # type: ignore[union-attr]
        fast = ovshim.accelerate(module, torch.randn(2, 8), prefer="openvino")
        check(fast, module, torch.randn(2, 8), path=None)
    assert counts(fast)["openvino"] == 0


def test_a_scope_around_a_whole_program_in_inference_mode() -> None:
    with torch.inference_mode(), ovshim.enabled(prefer="openvino", max_build_seconds=60) as scope:
        module = made_inside()
        x = torch.randn(64, 8)
        for _ in range(40):
            module(x)
        (entry,) = scope.report().to_dict()["modules"]
        assert entry["calls"]["openvino"] > 0
        for _ in range(3):
            module.first.weight.mul_(3)  # type: ignore[union-attr, operator]
            with ovshim.disabled():
                wanted = module(x)
            same(module(x), wanted)


def test_in_the_background() -> None:
    module = made_inside()
    with torch.inference_mode():
        fast = ovshim.accelerate(
            module, torch.randn(4, 8), prefer="openvino", background=True, cache_dir=False
        )
        module.first.weight.mul_(2)  # type: ignore[union-attr, operator]
        fast.ovshim.wait()
        x = torch.randn(4, 8)
        with quietly():
            for _ in range(4):
                same(fast(x), module(x))
                fast.ovshim.wait()


@pytest.mark.parametrize("memory", ["shared", "lean"])
def test_whatever_the_memory(memory: str, tmp_path: Path) -> None:
    module = made_inside(lambda: Mlp(8, 512, 8))
    kept = copy.deepcopy(module)
    with torch.inference_mode(), quietly():
        fast: Any = ovshim.accelerate(
            module, torch.randn(4, 8), prefer="openvino", memory=memory, inplace=True
        )
        check(fast, kept, torch.randn(4, 8))
        for each in (fast, kept):
            each.last.weight.mul_(2)
        x = torch.randn(4, 8)
        same(fast(x), kept(x))
        same(fast.state_dict(), kept.state_dict(), 0.0)


def test_lower_precision() -> None:
    module = made_inside()
    with torch.inference_mode(), quietly(), as_it_runs():
        fast = ovshim.accelerate(module, torch.randn(4, 8), prefer="openvino", precision="bf16")
        check(fast, module, torch.randn(4, 8), tolerance=0.03)


def test_a_race_with_this_watch_is_not_one_without(monkeypatch: pytest.MonkeyPatch) -> None:
    finishes = [Finish(2.0, 1.0, 1.9, 2.1), Finish(1.0, 2.0, 0.5, 0.5)]
    monkeypatch.setattr(verdict, "race", lambda *_: finishes.pop(0))
    monkeypatch.setattr(verdict, "later", lambda write: write())
    x = torch.randn(4, 8)
    for module, speedup in ((make(Mlp), 2.0), (made_inside(), 0.5), (make(Mlp), 2.0)):
        with torch.inference_mode():
            fast = ovshim.accelerate(module, x)
        assert plans(fast)[0]["speedup"] == speedup


def test_eager_does_not_ask_for_values() -> None:
    module = made_inside()
    watched, unwatched = Generation(module), Generation(module, values=False)
    with torch.inference_mode():
        module.first.bias.add_(1)  # type: ignore[union-attr, operator]
    assert not watched.holds()
    assert "first.bias" in watched.change()
    assert unwatched.holds()


@hypothesis.given(
    dtype=st.sampled_from(
        [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool, torch.complex64]
    ),
    size=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    layout=st.sampled_from(sorted(LAYOUTS)),
    at=st.integers(0, 200),
)
def test_any_write_changes_the_stamp(
    dtype: torch.dtype, size: list[int], layout: str, at: int
) -> None:
    with torch.inference_mode():
        matrix = torch.zeros([*size, 3]).to(dtype)
        tensor = LAYOUTS[layout](matrix)
        values, before = Values([tensor]), stamp(tensor)
        assert values.same()
        assert stamp(tensor) == before
        plain = tensor.view(-1) if tensor.is_contiguous() else tensor[(0,) * (tensor.dim() - 1)]
        plain[at % plain.numel()].fill_(1)
        assert stamp(tensor) != before
        assert not values.same()
        assert not values.same_of(tensor)


def test_counted_tensors_have_their_count() -> None:
    tensor = torch.zeros(3)
    before = stamp(tensor)
    tensor.add_(0)
    assert stamp(tensor) != before
    with torch.inference_mode():
        sparse = torch.eye(3).to_sparse()
    assert stamp(sparse) is None
    with pytest.raises(ValueError, match="inference mode"):
        Values([sparse])


@pytest.mark.parametrize("under", [torch.inference_mode, torch.no_grad])
def test_what_the_users_first_call_fills_is_read_by_openvino_soon(
    under: Callable[[], Any],
) -> None:
    torch.manual_seed(0)
    module = Memo().eval()
    plain = copy.deepcopy(module)
    with quietly():
        fast = ovshim.accelerate(module, torch.randn(2, 16), prefer="openvino")
        for _ in range(3):  # it is filled, seen to be, and a plan is made
            check(fast, plain, torch.randn(2, 16), path="eager", under=under)
    check(fast, plain, torch.randn(2, 16), under=under)
    assert "cpu" in module.kept
