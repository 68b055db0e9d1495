"""What OpenVINO does not take from PyTorch it may take by way of ONNX, the same graph."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checks import same
from torch import Tensor, nn

import ovshim


def normed(x: Tensor, weight: Tensor) -> Tensor:
    """By an operator for which OpenVINO's frontend for PyTorch has no rule."""
    return torch.native_layer_norm(x, (8,), weight, None, 1e-5)[0]


class Embedded(nn.Module):
    """A look-up, and what only ONNX has."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 8)
        self.inner = nn.Linear(8, 8)
        self.weight = nn.Parameter(torch.randn(8))

    def forward(self, ids: Tensor) -> Tensor:
        return normed(self.inner(self.table(ids)), self.weight)


IDS = torch.tensor([[1, 2, 3], [4, 5, 6]])


@pytest.fixture(scope="module")
def embedded() -> nn.Module:
    torch.manual_seed(0)
    return Embedded().eval().requires_grad_(False)


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def fast_of(module: nn.Module, *example: Any, **options: Any) -> Any:
    return ovshim.accelerate(module, example, prefer="openvino", **options)


def plan_of(fast: Any) -> dict[str, Any]:
    """The plan that was made first."""
    return dict(ovshim.explain(fast).to_dict()["plans"][0])


def refused(module: nn.Module, *example: Any, **options: Any) -> None:
    with pytest.warns(ovshim.FallbackWarning):
        fast = fast_of(module, *example, cache_dir=False, **options)
    same(fast(*example), module(*example))
    assert plan_of(fast)["reason"]["code"] == "unsupported-op"


def test_a_module_that_is_captured_by_no_other_way(embedded: nn.Module, tmp_path: Path) -> None:
    fast = fast_of(embedded, IDS, cache_dir=tmp_path)
    for ids in (IDS, IDS.repeat(3, 1), torch.tensor([[9, 0, 7]])):
        same(fast(ids), embedded(ids))
    report = ovshim.explain(fast)
    assert report.to_dict()["calls"] == {"openvino": 3, "eager": 0, "mixed": 0}
    assert plan_of(fast)["route"] == "dynamo-onnx"
    assert "captured by dynamo-onnx" in str(report)
    with pytest.raises(IndexError):  # eager's own: the check of the capture stands
        fast(torch.tensor([[1, 10]]))
    again = fast_of(embedded, IDS, cache_dir=tmp_path)
    same(again(IDS), embedded(IDS))
    assert (plan_of(again)["cache"], plan_of(again)["route"]) == ("hit", "dynamo-onnx")


class Filled(nn.Module):
    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        return torch.index_fill(x, 0, index, 1.0)


class Condition(nn.Module):
    """torch's exporter knows the operator, and fails in it."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.cond(x) + torch.linalg.norm(x, 2)


@pytest.mark.parametrize(
    ("module", "example"),
    [
        (Filled(), (torch.randn(4, 4), torch.tensor([1, 2]))),  # nobody looks at its indices
        (Condition(), (torch.randn(4, 4),)),
    ],
    ids=["indices", "refused"],
)
def test_what_stays_in_eager(
    module: nn.Module, example: tuple[Tensor, ...], capfd: pytest.CaptureFixture[str]
) -> None:
    refused(module.eval(), *example)
    assert capfd.readouterr() == ("", "")
    assert not torch.onnx.is_in_onnx_export()


def test_another_export_is_left_alone(embedded: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    refused(embedded, IDS)


@pytest.mark.slow
def test_modules_have_no_names_there(embedded: nn.Module) -> None:
    refused(embedded, IDS, precision={"inner": "bf16"})


class Traced(nn.Module):
    """Dynamo does not take TorchScript, the trace of the module is what there is."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.jit.script(nn.Linear(8, 8).eval())  # type: ignore[no-untyped-call]
        self.weight = nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        return normed(self.inner(x), self.weight)


class Around(nn.Module):
    """Circular padding without a batch, of which torch's exporter damages memory."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.jit.script(nn.Linear(8, 8).eval())  # type: ignore[no-untyped-call]

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.pad(self.inner(x), (1, 2), "circular")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_the_exporter_would_die_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.onnx, "export", lambda *args, **kwargs: pytest.fail("exported"))
    module, x = Around().eval().requires_grad_(False), torch.randn(3, 8)
    with pytest.warns(ovshim.FallbackWarning):
        fast = fast_of(module, x, cache_dir=False)
    same(fast(x), module(x))
    assert "openvino" not in plan_of(fast)["path"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_of_a_trace() -> None:
    module, x = Traced().eval().requires_grad_(False), torch.randn(3, 8)
    fast = fast_of(module, x, cache_dir=False)
    for given in (x, torch.randn(5, 8)):
        same(fast(given), module(given))
    assert plan_of(fast)["route"] == "traced-onnx"
    assert ovshim.explain(fast).to_dict()["calls"] == {"openvino": 2, "eager": 0, "mixed": 0}


class Several(nn.Module):
    """Nested outputs, one of them a size; an input that nothing reads, one that is an output."""

    def forward(self, x: Tensor, unread: Tensor, y: Tensor) -> dict[str, Any]:
        z = normed(x, y)
        return {"z": (z, x.sum()), "rows": x.shape[0] * 2, "x": x, "again": z}


@pytest.mark.slow
def test_structure_and_sizes() -> None:
    module = Several().eval()
    x, y = torch.randn(3, 8), torch.randn(8)
    fast = fast_of(module, x, torch.zeros(1), y, cache_dir=False)
    for rows in (3, 2, 8):
        given = torch.randn(rows, 8), torch.zeros(1), y
        same(fast(*given), module(*given))
    assert plan_of(fast)["route"] == "dynamo-onnx"
    assert ovshim.explain(fast).to_dict()["calls"]["openvino"] == 3


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "int8_weights"])
def test_precisions(precision: str) -> None:
    torch.manual_seed(0)

    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 8))
            self.weight = nn.Parameter(torch.randn(8))

        def forward(self, x: Tensor) -> Tensor:
            return normed(self.layers(x), self.weight)

    module, x = Wide().eval().requires_grad_(False), torch.randn(4, 64)
    fast = fast_of(module, x, cache_dir=False, precision=precision)
    error = (fast(x) - module(x)).norm() / module(x).norm()
    assert 0 < error < 0.05
    assert plan_of(fast)["route"] == "dynamo-onnx"
    assert ovshim.explain(fast).to_dict()["calls"] == {"openvino": 1, "eager": 0, "mixed": 0}


@pytest.mark.slow
def test_carried_away(embedded: nn.Module, tmp_path: Path) -> None:
    fast = fast_of(embedded, IDS, cache_dir=False)
    fast.ovshim.save(tmp_path / "saved")
    loaded = ovshim.load(tmp_path / "saved")
    ids = torch.tensor([[9, 0, 1]])
    same(loaded(ids), embedded(ids))
    assert ovshim.explain(loaded).to_dict()["calls"]["openvino"] == 1
    fast.ovshim.export(tmp_path / "served", layout="ovms")
    assert list((tmp_path / "served").rglob("model.xml"))
