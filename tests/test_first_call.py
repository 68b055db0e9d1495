"""First calls without an example, of a cached graph: eager is asked once."""

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from checks import same
from torch import Tensor, nn

import ovshim
from ovshim import hit, verdict
from ovshim.planner import Planner


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.last = nn.Embedding(100, 64), nn.Linear(64, 16)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        return self.last(self.words(ids))[..., ::2], ids


class Lazy(Net):
    """Makes an attribute at its first call."""

    table: Tensor | None = None

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        if self.table is None:
            self.table = torch.arange(8.0)
        y, ids = super().forward(ids)
        return y + self.table, ids


class Asked:
    """How eager was asked: a "call" of the user's, a "trial" of ours."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ways: list[str] = []
        self._note(monkeypatch, Planner, "_watched", "call")
        self._note(monkeypatch, hit, "trial", "trial")

    def _note(self, monkeypatch: pytest.MonkeyPatch, where: Any, name: str, way: str) -> None:
        original = getattr(where, name)

        def noting(*given: Any, **how: Any) -> Any:
            self.ways.append(way)
            return original(*given, **how)

        monkeypatch.setattr(where, name, noting)


def accelerated(directory: Path, net: type[Net] = Net) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    module = net().eval()
    options: Any = {"prefer": "openvino", "threads": 2, "cache_dir": directory}
    return module, ovshim.accelerate(module, **options)


def ids(rows: int = 1) -> Tensor:
    return torch.randint(100, (rows, 1))  # no proof takes shorter ones


def counts(fast: Any) -> tuple[int, int]:
    calls = fast.ovshim.stats()
    return calls["openvino"], calls["eager"]


def cached(fast: Any) -> str:
    (plan,) = ovshim.explain(fast).to_dict()["plans"]
    return str(plan["cache"])


@pytest.fixture(params=[Net, Lazy])
def net(request: pytest.FixtureRequest, tmp_path: Path) -> type[Net]:
    """A class of which there is a graph in the cache."""
    net: type[Net] = request.param
    with torch.no_grad():
        accelerated(tmp_path, net)[1](ids())
    return net


def test_eager_is_asked_once(
    net: type[Net], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, fast = accelerated(tmp_path, net)
    x, asked = ids(), Asked(monkeypatch)
    with torch.no_grad():
        y, given = fast(x)
        assert asked.ways[0] == "call"
        assert ("trial" in asked.ways) is (net is Lazy)  # what its first call does tells nothing
        assert (cached(fast), counts(fast)) == ("hit", (0, 1))
        wanted = module(x)[0]
        assert given is x
        assert y.stride() == wanted.stride()  # it is eager's own
        assert torch.equal(y, wanted)
        y.fill_(7)
        same(fast(x)[0], wanted)
    assert counts(fast) == (1, 1)


def test_its_answer_is_of_the_callers_mode(tmp_path: Path) -> None:
    (_, first), (module, fast) = accelerated(tmp_path), accelerated(tmp_path)
    with torch.inference_mode():
        first(ids())
        x = ids()
        for _ in range(2):
            y = fast(x)[0]
            assert y.is_inference()
            same(y, module(x)[0])
    assert counts(fast) == (1, 1)


def test_other_sizes_than_the_proofs_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with torch.no_grad():
        accelerated(tmp_path)[1](ids(40))
        module, fast = accelerated(tmp_path)
        x, asked = ids(40), Asked(monkeypatch)
        same(fast(x)[0], module(x)[0])
        assert asked.ways.count("call") == asked.ways.count("trial") == 1
        same(fast(x)[0], module(x)[0])
    assert (cached(fast), counts(fast)) == ("hit", (1, 1))


def test_gradients_reach_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    accelerated(tmp_path)[1](ids())
    module, fast = accelerated(tmp_path)
    x, asked = ids(), Asked(monkeypatch)
    y = fast(x)[0]
    assert asked.ways == ["call"]
    assert cached(fast) == "hit"
    assert y.requires_grad
    again, wanted = fast(x)[0], module(x)[0]
    same(again.detach(), wanted.detach())
    assert counts(fast) == (1, 1)
    weight = module.last.weight  # type: ignore[union-attr]
    mine, others = (torch.autograd.grad(z.sum(), weight)[0] for z in (again, wanted))
    same(mine, others)


@pytest.mark.parametrize("error", [IndexError, OSError, KeyboardInterrupt])
def test_what_eager_raises_is_raised_at_once_and_costs_no_entry(
    error: type[BaseException],
    net: type[Net],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module, fast = accelerated(tmp_path, net)
    asked = Asked(monkeypatch)
    bad = ids()
    with torch.no_grad():
        if error is IndexError:
            bad[0, 0] = 1000
            with pytest.raises(IndexError):
                fast(bad)
        else:  # once only

            def flaky(*given: Any) -> None:
                monkeypatch.undo()
                raise error("flaky")

            monkeypatch.setattr(torch.nn.functional, "embedding", flaky)
            with pytest.raises(error, match="flaky"):
                fast(bad)
        assert not fast.ovshim.report().plans
        assert asked.ways == ["call"]
        module, fast = accelerated(tmp_path, net)
        x = ids()
        same(fast(x)[0], module(x)[0])
        assert cached(fast) == "hit"


def test_an_example_that_eager_refuses_costs_no_entry(tmp_path: Path) -> None:
    good, bad = ids(4), ids(4)
    bad[0, 0] = 1000
    options: Any = {"prefer": "openvino", "threads": 2, "cache_dir": tmp_path}
    module = Net().eval()
    ovshim.accelerate(module, good, **options)
    with pytest.raises(ovshim.OptionError, match="index out of range"):
        ovshim.accelerate(module, bad, **options)
    fast = ovshim.accelerate(module, good, **options)
    assert cached(fast) == "hit"
    with torch.no_grad():
        same(fast(good)[0], module(good)[0])
    assert counts(fast) == (1, 0)


def test_a_hint_that_was_wrong_costs_no_answer(tmp_path: Path) -> None:
    """At a glance it is the module that was cached; its weights are others."""
    with torch.no_grad():
        accelerated(tmp_path)[1](ids())
        module, fast = accelerated(tmp_path)
        module.last.weight[-1, -1] = 3.0  # type: ignore[union-attr, index]
        x = ids()
        for _ in range(2):
            same(fast(x)[0], module(x)[0])
    assert (cached(fast), counts(fast)) == ("miss", (1, 1))


class Clipped(nn.Module):
    """Of a NaN OpenVINO makes a 0."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(x))


@pytest.mark.parametrize("way", ["as the example", "in the first call"])
def test_a_nan_costs_nobody_a_graph(tmp_path: Path, way: str) -> None:
    options: Any = {"prefer": "openvino", "cache_dir": tmp_path}
    x, bad = torch.ones(2, 8), torch.ones(2, 8)
    bad[0, 3] = torch.nan
    module = Clipped().eval()
    for known in (False, True):
        with torch.inference_mode():
            if way == "as the example":
                fast = ovshim.accelerate(module, bad, **options)
            else:
                fast = ovshim.accelerate(module, **options)
            same(fast(bad), module(bad))
            assert ovshim.explain(fast).to_dict()["plans"] == []
            for _ in range(2):
                same(fast(x), module(x))
            assert (cached(fast), counts(fast)) == ("hit" if known else "miss", (1, 2))
            same(fast(bad), module(bad))
            assert counts(fast) == (1, 3)


class Filled(Clipped):
    """Has a branch that no graph can take, and a part that has never seen a NaN."""

    def __init__(self) -> None:
        super().__init__()
        layers = (nn.Linear(8, 512), nn.ReLU(), *(nn.Linear(512, 512) for _ in range(6)))
        self.last = nn.Sequential(*layers)  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        if bool(torch.isnan(x).any()):
            x = torch.nan_to_num(x)
        return super().forward(x)


def test_parts_do_not_see_the_nan(tmp_path: Path) -> None:
    module, bad = Filled().eval(), torch.full((64, 8), torch.nan)
    with torch.inference_mode():
        with pytest.warns(ovshim.FallbackWarning, match="in part"):
            fast = ovshim.accelerate(module, bad, prefer="openvino", cache_dir=tmp_path)
        same(fast(bad), module(bad))
    assert fast.ovshim.stats() == {"openvino": 0, "mixed": 1, "eager": 0}


class Tabled(nn.Module):
    """Reads a table that is kept by size, outside of it."""

    kept: ClassVar[dict[int, Tensor]] = {}

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(1500, 1500)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.shape[0]
        if torch.compiler.is_compiling():
            return self.last(x) * torch.arange(rows)[:, None].sin()
        if rows not in self.kept:
            self.kept[rows] = torch.arange(rows)[:, None].sin()
        return self.last(x) * self.kept[rows]


def test_what_a_module_keeps_can_be_trained_with_after_a_race(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Tabled, "kept", {})
    for told in ("miss", "hit"):
        Tabled.kept.clear()
        torch.manual_seed(0)
        module, x = Tabled().eval(), torch.randn(64, 1500)
        monkeypatch.setattr(verdict, "_where", lambda *_, told=told: told)  # it is raced each time
        fast = ovshim.accelerate(module, x, cache_dir=tmp_path, dynamic_shapes={"x": {0: "n"}})
        assert cached(fast) == told
        assert len(Tabled.kept) > 1 or told == "miss"
        assert not any(table.is_inference() for table in Tabled.kept.values())
        module.train()
        module(x).sum().backward()
