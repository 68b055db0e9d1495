"""Outputs that lie in the memory of other outputs: OpenVINO serves, and they still do."""

import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from checks import check, counts, falls_back, plans, quietly, same, served, settle
from modules import make
from torch import Tensor, nn

import ovshim
from ovshim.capture.overlaps import _taken
from ovshim.verify import Mismatch, compare_views
from ovshim.views import View, copied_together


class Seen(nn.Module):
    """Hands out what is computed, as the given function makes outputs of it."""

    def __init__(self, outputs: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 6)
        self.outputs = outputs

    def forward(self, x: Tensor) -> Any:
        return self.outputs(self.linear(x).tanh())


VIEWS = {
    "before its owner": lambda y: (y.transpose(1, 2), y),
    "first token": lambda y: {"states": y, "pooled": y[:, 0]},
    "last token": lambda y: (y, y[:, -1]),
    "all tokens but one": lambda y: (y, y[:, 1:]),
    "all but the last": lambda y: (y, y[:, :-1]),
    "the last two features": lambda y: (y, y[..., -2:]),
    "two features": lambda y: (y, y[..., 1:3]),
    "whole": lambda y: (y, y[:]),
    "several": lambda y: (y, y[:, 0], y.permute(2, 0, 1), y[..., 2], y[:, 0]),
    "of a view": lambda y: (y, y.transpose(1, 2)[:, 3]),
}


def accelerated(outputs: Callable[[Tensor], Any], **options: Any) -> tuple[nn.Module, Any]:
    module = make(Seen, outputs)
    example = torch.randn(3, 5, 8)
    options = {"dynamic_shapes": {"x": {0: "batch", 1: "length"}}, **options}
    return module, ovshim.accelerate(module, (example,), prefer="openvino", **options)


@contextmanager
def no_fallback() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", ovshim.FallbackWarning)
        yield


def memory(output: Any) -> list[Any]:
    """Where the tensors lie, from the first address of all on."""
    leaves = torch.utils._pytree.tree_leaves(output)
    first = min(leaf.data_ptr() for leaf in leaves)
    return [(leaf.data_ptr() - first, leaf.shape, leaf.stride()) for leaf in leaves]


@pytest.mark.parametrize("outputs", VIEWS.values(), ids=VIEWS)
def test_views_of_outputs(outputs: Callable[[Tensor], Any]) -> None:
    module, fast = accelerated(outputs)
    for batch, length in ((3, 5), (2, 5), (3, 9), (1, 3), (2, 12)):
        x = torch.randn(batch, length, 8)
        settle(fast, module, x)
        answer = check(fast, module, x)
        with torch.inference_mode():
            assert memory(answer) == memory(module(x))


def test_who_writes_to_one_writes_to_both() -> None:
    module, fast = accelerated(VIEWS["first token"])
    x = torch.randn(3, 5, 8)
    with served(fast, "openvino"), torch.no_grad():
        answer = fast(x)
    answer["pooled"].fill_(7.0)
    assert bool((answer["states"][:, 0] == 7).all())
    assert not bool((answer["states"][:, 1] == 7).any())
    check(fast, module, x)


@pytest.mark.parametrize(
    "outputs",
    [
        lambda y: (y, y[:, y.shape[1] // 2]),
        lambda y: (y, y[:, y.shape[1] // 2 :]),
        lambda y: (y, y[:, : y.shape[1] // 2]),
        lambda y: (y, y[: y.shape[1] // 2]),
    ],
)
def test_a_place_that_depends_on_sizes_is_not_the_examples(
    outputs: Callable[[Tensor], Any],
) -> None:
    """Of 5 tokens the middle one is the third, and so it is of 4, which a proof might ask."""
    with quietly():
        module, fast = accelerated(outputs)
        for length in (5, 4, 6, 7, 9, 5, 4, 6, 7, 9):
            answer = check(fast, module, x := torch.randn(3, length, 8), path=None)
            with torch.inference_mode():
                assert memory(answer) == memory(module(x))


@pytest.mark.parametrize(
    "outputs",
    [
        pytest.param(lambda y: (y[:, 1:], y[:, :-1]), id="of what is no output"),
        pytest.param(lambda y: (y[:, :1].expand(-1, 4, -1), y[:, 0]), id="of what overlaps itself"),
        pytest.param(lambda y: (y, y[:, ::2]), id="in steps"),
        pytest.param(lambda y: (y, y.flatten(1)), id="of another rank"),
        pytest.param(lambda y: (y, *[y[:, 0]] * 2), id="one object twice"),
    ],
)
def test_what_is_no_plain_view(outputs: Callable[[Tensor], Any]) -> None:
    with falls_back("aliases-input"):
        module, fast = accelerated(outputs)
        x = torch.randn(3, 5, 8)
        answer = check(fast, module, x, path="mixed")
    with torch.inference_mode():
        assert memory(answer) == memory(module(x))


@pytest.mark.parametrize(
    ("outputs", "batch", "length"),
    [
        (lambda y: (y[:, 0], y[:, -1]), 3, 1),
        (lambda y: (y[:, 2], y[:, -2]), 3, 4),
        (lambda y: (y[0], y[-1]), 1, 5),
    ],
)
def test_outputs_that_overlap_at_another_size_alone(
    outputs: Callable[[Tensor], Any], batch: int, length: int
) -> None:
    """The first and the last of several are two, and of one they are the same."""
    with quietly():
        module, fast = accelerated(outputs)
        check(fast, module, torch.randn(3, 6, 8))
        one, other = check(fast, module, torch.randn(batch, length, 8), path=None)
    assert one.data_ptr() == other.data_ptr()
    check(fast, module, torch.randn(3, 6, 8))


@pytest.mark.parametrize("length", [2, 3])
def test_an_overlap_that_only_eager_shows_is_eagers(length: int) -> None:
    """Of few the first two and the last two have some in common, which no size tells beforehand."""
    with quietly():
        module, fast = accelerated(lambda y: (y[:, :2], y[:, -2:]))
        x = torch.randn(3, length, 8)
        for _ in range(3):
            answer = check(fast, module, x, path=None)
            with torch.inference_mode():
                assert memory(answer) == memory(module(x))


def test_the_next_process_takes_them_alike(tmp_path: Path) -> None:
    for cache in ("miss", "hit"):
        torch.manual_seed(0)
        module, fast = accelerated(VIEWS["several"], cache_dir=tmp_path)
        assert [plan["cache"] for plan in plans(fast)] == [cache]
        answer = check(fast, module, x := torch.randn(3, 5, 8))
        with torch.inference_mode():
            assert memory(answer) == memory(module(x))


@pytest.mark.parametrize("cached", [False, True])
def test_without_an_example(cached: bool, tmp_path: Path) -> None:
    if cached:
        torch.manual_seed(0)
        accelerated(VIEWS["first token"], cache_dir=tmp_path, dynamic_shapes=None)
    torch.manual_seed(0)
    module = make(Seen, VIEWS["first token"])
    fast = ovshim.accelerate(module, prefer="openvino", cache_dir=tmp_path)
    settle(fast, module, torch.randn(3, 5, 8))
    assert [plan["cache"] for plan in plans(fast)] == ["hit" if cached else "miss"]


def test_gradients_go_by_way_of_the_view() -> None:
    module, fast = accelerated(VIEWS["several"])
    x = torch.randn(3, 5, 8)
    settle(fast, module, x, under=torch.enable_grad)
    found = []
    for one in (module, fast):
        module.zero_grad()
        before = counts(fast)["openvino"]
        outputs = one(x)
        assert counts(fast)["openvino"] - before == (one is fast)
        (outputs[1].square().sum() + 3 * outputs[2].sum() + outputs[0].mean()).backward()
        found.append([parameter.grad for parameter in module.parameters()])
    same(found[1], found[0])


@pytest.mark.parametrize(
    "outputs",
    [
        pytest.param(lambda y: (y, v := y[:, 0], v.exp()), id="from which another is computed"),
        pytest.param(lambda y: (y, y.detach()), id="that hands on no gradients"),
    ],
)
def test_views_with_another_place_in_autograds_graph(outputs: Callable[[Tensor], Any]) -> None:
    with quietly():
        module, fast = accelerated(outputs)
        x = torch.randn(3, 5, 8)
        expected = module(x)
        for path in ("eager", "mixed"):
            with served(fast, path):
                answer = fast(x)
            assert [y.requires_grad for y in answer] == [y.requires_grad for y in expected]
        check(fast, module, x)  # but in inference mode, where there are no gradients


def test_an_artifact_gives_them_too(tmp_path: Path) -> None:
    module, fast = accelerated(VIEWS["several"])
    fast.ovshim.save(tmp_path / "saved")
    loaded: Any = ovshim.load(tmp_path / "saved")
    x = torch.randn(2, 7, 8)
    with torch.inference_mode():
        answer, expected = loaded(x), module(x)
    same(answer, expected)
    assert memory(answer) == memory(expected)


def test_a_graph_of_torch_compile() -> None:
    module = make(Seen, VIEWS["first token"])
    torch._dynamo.reset()
    with no_fallback(), torch.no_grad():
        compiled = torch.compile(module, backend="ovshim", options={"prefer": "openvino"})
        for _ in range(3):
            x = torch.randn(3, 5, 8)
            same(answer := compiled(x), module(x))
            assert memory(answer) == memory(module(x))


def test_views_are_told_by_sizes_and_strides() -> None:
    """Whatever is taken of a tensor, what is told of it takes the very same."""
    drawn = random.Random(0)
    told = 0
    for _ in range(300):
        whole = torch.empty([drawn.choice((1, 2, 3, 4)) for _ in range(drawn.randint(1, 4))])
        whole = whole.permute(drawn.sample(range(whole.dim()), whole.dim()))
        parts: list[Any] = [slice(None)] * whole.dim()
        d = drawn.randrange(whole.dim())
        n = whole.shape[d]
        start = drawn.randrange(n)
        parts[d] = drawn.choice((start, slice(start, drawn.randint(start + 1, n)), slice(None)))
        view = whole[tuple(parts)]
        view = view.permute(drawn.sample(range(view.dim()), view.dim()))
        taken = _taken(view, whole)
        assert taken is not None
        compare_views([whole, view], {1: View(0, *taken)})
        told += view.numel() < whole.numel()
    assert told > 50


def test_a_view_that_is_another_one_is_told() -> None:
    y = torch.randn(3, 4)
    view = View(0, (0, (0, None)), (0,))
    compare_views([y, y[0]], {1: view})
    for other in (y[1], y[0].clone(), y[0, :3], y[:, 0]):
        with pytest.raises(Mismatch, match="output 1"):
            compare_views([y, other], {1: view})


def test_copies_share_what_their_originals_share() -> None:
    y = torch.randn(3, 4)
    copies = copied_together([y, view := y[1]])
    copies[id(view)].zero_()
    assert copies[id(y)][1].eq(0).all()
    assert copies[id(y)][0].equal(y[0])
    assert not y[1].eq(0).any()


@pytest.mark.parametrize("stored", [[0, [0.5], [0]], [0, [[0]], [0]], ["0", [0], []], [0, [0]]])
def test_what_is_no_view_in_a_manifest(stored: Any) -> None:
    with pytest.raises((ValueError, TypeError)):
        View.from_json(stored)
