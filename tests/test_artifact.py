"""Artifacts: saved here, run there, without the code; whatever is wrong with one is said."""

import contextlib
import copy
import dataclasses
import json
import pickle
import random
import shutil
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from checks import as_it_runs, check, falls_back, run_python, same
from modules import (
    Attention,
    Branches,
    DictToDataclass,
    Mlp,
    Nest,
    ToNamedTuple,
    Towers,
    make,
    small_bert,
)
from test_hostile_entries import ODD, places, with_value
from torch import nn

import ovshim
from ovshim import ArtifactError, FallbackError, OptionError
from ovshim.artifact import read
from ovshim.artifact.structure import Fields
from ovshim.cache import files


def accelerated(module: nn.Module, *examples: Any, **options: Any) -> Any:
    fast: Any = ovshim.accelerate(module, examples[0], prefer="openvino", **options)
    fast.ovshim.warm(*examples[1:])
    return fast


@pytest.fixture(scope="module")
def mlp() -> nn.Module:
    return make(Mlp)


@pytest.fixture(scope="module")
def saved(mlp: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("artifact") / "mlp"
    accelerated(mlp, torch.randn(3, 8)).ovshim.save(where)
    return where


@pytest.fixture
def copied(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copied"))


# ------------------------------------------------------------------ what it is for


ELSEWHERE = """
import sys
import torch, ovshim
assert "modules" not in sys.modules
loaded = ovshim.load(sys.argv[1])
assert "modules" not in sys.modules
x = torch.linspace(-1, 1, 40).reshape(5, 8)
with torch.inference_mode():
    print(loaded(x).double().norm().item())
print(loaded.ovshim.stats()["openvino"])
"""


def test_it_runs_without_the_code(saved: Path, mlp: nn.Module) -> None:
    norm, calls = run_python(ELSEWHERE, str(saved)).split()
    with torch.inference_mode():
        expected = mlp(torch.linspace(-1, 1, 40).reshape(5, 8)).double().norm().item()
    assert abs(float(norm) - expected) < 1e-4 * expected
    assert calls == "1"


def test_a_loaded_module_is_served_by_openvino(saved: Path, mlp: nn.Module) -> None:
    loaded: Any = ovshim.load(saved)
    for batch in (1, 3, 50):
        x = torch.randn(batch, 8)
        with torch.no_grad():
            same(loaded(x), mlp(x))
    same(loaded(x), mlp(x).detach())  # it has no weights that gradients could be wanted of
    report = ovshim.explain(loaded).to_dict()
    assert report["calls"] == {"openvino": 4, "mixed": 0, "eager": 0}
    (plan,) = report["plans"]
    assert (plan["cache"], plan["cache_path"]) == ("artifact", str(saved))
    assert plan["precision_run"] == "f32"
    assert "Mlp" in repr(loaded)
    assert not loaded.training
    assert list(loaded.state_dict()) == []


def test_several_calls_at_once(saved: Path, mlp: nn.Module) -> None:
    loaded: Any = ovshim.load(saved)
    inputs = [torch.randn(n + 1, 8) for n in range(6)]
    with torch.inference_mode():
        same(list(loaded.ovshim.map(inputs, in_flight=2)), [mlp(x) for x in inputs])
        same(loaded.ovshim.submit(inputs[0]).result(30), mlp(inputs[0]))


def test_copies_and_pickles_read_it_again(saved: Path, mlp: nn.Module) -> None:
    loaded = ovshim.load(saved)
    x = torch.randn(3, 8)
    with torch.no_grad():
        for other in (copy.deepcopy(loaded), pickle.loads(pickle.dumps(loaded))):
            same(other(x), mlp(x))
            assert other.ovshim.stats()["openvino"] == 1
    assert len(pickle.dumps(loaded)) < 20_000


def test_nothing_in_it_is_a_pickle(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a pickle was read")

    monkeypatch.setattr(pickle, "load", refuse)
    monkeypatch.setattr(pickle, "Unpickler", refuse)
    monkeypatch.setattr(torch, "load", refuse)
    ovshim.load(saved)
    names = sorted(path.name for path in saved.iterdir())
    assert names == ["artifact.json", "graph0.bin", "graph0.tensors", "graph0.xml"]


# ------------------------------------------------------------------ calls and answers of all sorts


def round_trip(fast: Any, where: Path) -> Any:
    fast.ovshim.save(where)
    return ovshim.load(where)


def test_nested_containers_and_constants(tmp_path: Path) -> None:
    module = make(Nest)
    a, b, c = torch.randn(3, 8), torch.randn(3, 8), torch.randn(3, 4)
    pairs = ((a, b), {"c": c})
    loaded = round_trip(accelerated(module, (pairs,)), tmp_path / "x")
    with torch.no_grad():
        same(loaded(pairs), module(pairs))
    assert type(loaded(pairs)["ordered"]) is OrderedDict
    with pytest.raises(FallbackError, match="no graph for this call"):
        loaded(pairs, mode="mean")


def test_dataclasses_come_as_their_fields(tmp_path: Path) -> None:
    module = make(DictToDataclass)
    batch = {"features": torch.randn(3, 8), "weight": torch.rand(3)}
    loaded = round_trip(accelerated(module, (batch,)), tmp_path / "x")
    with torch.no_grad():
        expected, answer = module(batch), loaded(batch)
    assert isinstance(answer, Fields)
    assert type(answer).__name__ == "Detections"
    same(answer.scores, expected.scores)
    same(answer["extra"], expected.extra)
    assert answer.name == answer[2] == "detections"
    assert list(answer) == list(answer.keys()) == [f.name for f in dataclasses.fields(expected)]
    with pytest.raises(KeyError):
        answer["nothing"]


def test_named_tuples(tmp_path: Path) -> None:
    module, x = make(ToNamedTuple), torch.randn(3, 8)
    loaded = round_trip(accelerated(module, x), tmp_path / "x")
    with torch.no_grad():
        answer = loaded(x)
        same(answer.near, module(x).near)
    assert (answer.far, answer.count, type(answer).__name__) == (None, 3, "Points")


@pytest.mark.slow
def test_model_outputs(tmp_path: Path) -> None:
    bert, ids = small_bert(), torch.randint(0, 100, (2, 7))
    example = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    loaded = round_trip(accelerated(bert, example), tmp_path / "bert")
    with torch.no_grad():
        expected, answer = bert(**example), loaded(**example)
    same(answer.last_hidden_state, expected.last_hidden_state)
    same(answer[1], expected.pooler_output)
    assert answer.hidden_states is None
    assert list(answer) == list(expected)
    with pytest.raises(FallbackError, match="outside of its table"):
        loaded(input_ids=ids + 100, attention_mask=example["attention_mask"])


def test_an_index_beside_its_table(tmp_path: Path) -> None:
    module, ids = nn.Sequential(nn.Embedding(9, 8), nn.Tanh()).eval(), torch.tensor([[1, 2, 8]])
    loaded = round_trip(accelerated(module, ids), tmp_path / "x")
    with torch.no_grad():
        same(loaded(ids), module(ids))
    with pytest.raises(FallbackError, match="outside of its table"):
        loaded(ids + 1)


def test_every_kind_of_call_that_was_planned(tmp_path: Path) -> None:
    module = make(Attention)
    x, mask = torch.randn(2, 5, 16), torch.rand(2, 5) > 0.3
    mask[:, 0] = True
    loaded = round_trip(accelerated(module, x, (x, mask)), tmp_path / "x")
    with torch.no_grad():
        same(loaded(x), module(x))
        same(loaded(x, mask), module(x, mask))
    assert len(ovshim.explain(loaded).plans) == 2
    with pytest.raises(FallbackError, match="mask"):
        loaded(x, mask=mask)


@pytest.mark.slow
def test_precision_is_kept(mlp: nn.Module, tmp_path: Path) -> None:
    x = torch.randn(3, 8)
    fast = accelerated(mlp, x, precision="int8_weights")
    loaded = round_trip(fast, tmp_path / "x")
    same(loaded(x), mlp(x).detach(), tolerance=0.03)
    (plan,) = ovshim.explain(loaded).to_dict()["plans"]
    (then,) = ovshim.explain(fast).to_dict()["plans"]
    assert plan["precision_run"] == then["precision_run"]


def test_saved_without_a_cache(mlp: nn.Module, tmp_path: Path) -> None:
    loaded = round_trip(accelerated(mlp, torch.randn(3, 8), cache_dir=False), tmp_path / "x")
    x = torch.randn(9, 8)
    with torch.no_grad():
        same(loaded(x), mlp(x))


# ------------------------------------------------------------------ what it cannot answer


def test_there_is_no_eager(saved: Path) -> None:
    loaded: Any = ovshim.load(saved)
    x = torch.randn(3, 8)
    refused = {
        "special-values": lambda: loaded(x * torch.nan),
        "not-in-artifact": lambda: loaded(x.double()),
        "empty-tensor": lambda: loaded(x[:0]),
        "input-grad": lambda: loaded((x + 0).requires_grad_()),
        "unknown-leaf": lambda: loaded(object()),
    }
    for code, call in refused.items():
        with pytest.raises(FallbackError) as caught:
            call()
        assert caught.value.reason.code == code
        assert "eager answers" not in caught.value.reason.remedy
    with pytest.raises(FallbackError) as caught:  # not a leaf
        loaded(x.clone().requires_grad_() * 2)
    assert caught.value.reason.code == "input-grad"
    with torch.no_grad():
        assert loaded(x.clone().requires_grad_()).shape == (3, 4)
    with torch.autocast("cpu"), pytest.raises(FallbackError) as caught:
        loaded(x.detach())
    assert caught.value.reason.code == "autocast"
    loaded.train()
    with pytest.raises(FallbackError) as caught:
        loaded(x.detach())
    assert caught.value.reason.code == "training"
    loaded.eval()
    loaded.note = "an attribute"
    loaded.ovshim.refresh()
    assert loaded(x.detach()).shape == (3, 4)
    assert ovshim.explain(loaded).to_dict()["eager_reasons"]["autocast"] == 1
    loaded.ovshim.warm(x.detach())
    with pytest.raises(FallbackError):
        loaded.ovshim.warm(torch.randn(3, 9))


def test_switched_off_it_still_answers(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OVSHIM", "0")
    assert ovshim.load(saved)(torch.randn(3, 8)).shape == (3, 4)


@pytest.mark.parametrize(
    ("name", "value"),
    [("precision", "bf16"), ("inplace", True), ("methods", ("x",)), ("dynamic_batch", False),
     ("prefer", "eager"), ("calibration", [1]), ("nothing", 1), ("device", "NPU.7"),
     ("strict", False), ("cache_dir", "somewhere")],
)  # fmt: skip
def test_options_that_mean_nothing_here(saved: Path, name: str, value: Any) -> None:
    with pytest.raises(OptionError) as caught:
        ovshim.load(saved, **{name: value})
    assert caught.value.name == name


@pytest.mark.parametrize("options", [{}, {"inplace": True}, {"prefer": "openvino"}], ids=str)
@pytest.mark.parametrize("shown", [True, False])
def test_within_an_accelerated_module(
    saved: Path, mlp: nn.Module, options: dict[str, Any], shown: bool
) -> None:
    module, x = nn.Sequential(ovshim.load(saved), nn.Tanh()).eval(), torch.randn(3, 8)
    with falls_back("capture-failed"):
        fast = ovshim.accelerate(module, *([x] if shown else []), **options)
        for _ in range(3):
            check(fast, nn.Sequential(mlp, nn.Tanh()), x, path="eager", reason="capture-failed")
    assert fast[0].ovshim.stats()["openvino"] >= 3  # type: ignore[index]


@pytest.mark.parametrize("inplace", [True, False])
def test_there_is_nothing_to_accelerate(saved: Path, mlp: nn.Module, inplace: bool) -> None:
    loaded, x = ovshim.load(saved), torch.randn(3, 8)
    with pytest.raises(OptionError, match="runs in OpenVINO already"):
        ovshim.accelerate(loaded, x, inplace=inplace)
    with torch.inference_mode():
        same(loaded(x), mlp(x))


@pytest.mark.parametrize("wrong", [5, None, ""])
def test_what_is_no_directory_is_told(wrong: Any) -> None:
    fast: Any = ovshim.accelerate(nn.Linear(8, 4).eval())
    with pytest.raises(OptionError, match="directory"):
        fast.ovshim.save(wrong)


def test_options_that_do(saved: Path) -> None:
    loaded: Any = ovshim.load(saved, hint="throughput", streams=2, threads=2)
    assert loaded(torch.randn(3, 8)).shape == (3, 4)
    assert loaded.ovshim.options.streams == 2
    shared = ovshim.Options(threads=1, prefer="openvino", cache_dir=saved.parent / "cache")
    assert ovshim.load(saved, options=shared)(torch.randn(3, 8)).shape == (3, 4)
    assert not (saved.parent / "cache").exists()


# ------------------------------------------------------------------ what cannot be saved


def test_saving_needs_a_plan_in_openvino(mlp: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no plan"):
        ovshim.accelerate(mlp).ovshim.save(tmp_path / "x")  # type: ignore[operator, union-attr]
    with falls_back("value-dependent"):
        fast: Any = ovshim.accelerate(make(Branches), torch.randn(3, 8), cache_dir=False)
    with falls_back("value-dependent"), pytest.raises(ArtifactError, match="no plan"):
        fast.ovshim.save(tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_a_module_that_has_changed(tmp_path: Path) -> None:
    module = make(Mlp)
    fast = accelerated(module, torch.randn(3, 8))
    with torch.no_grad():
        module.first.weight.mul_(2)
    with pytest.raises(ArtifactError, match="has changed"):
        fast.ovshim.save(tmp_path / "x")
    with torch.no_grad():
        fast(torch.randn(3, 8))
        fast(torch.randn(3, 8))
    fast.ovshim.save(tmp_path / "x")
    x = torch.randn(3, 8)
    same(ovshim.load(tmp_path / "x")(x), module(x).detach())


def test_other_methods_cannot_be_saved(tmp_path: Path) -> None:
    fast: Any = ovshim.accelerate(make(Towers), prefer="openvino",
                                  methods=("encode_image", "encode_text"))  # fmt: skip
    with torch.no_grad():
        fast.encode_image(torch.randn(3, 8))
    with pytest.raises(ArtifactError, match="encode_image"):
        fast.ovshim.save(tmp_path / "x")


def test_a_directory_is_never_overwritten(copied: Path, mlp: nn.Module, tmp_path: Path) -> None:
    fast = accelerated(mlp, torch.randn(3, 8))
    before = {path: path.read_bytes() for path in copied.iterdir()}
    with pytest.raises(ArtifactError, match="not empty"):
        fast.ovshim.save(copied)
    assert {path: path.read_bytes() for path in copied.iterdir()} == before
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ArtifactError):
        fast.ovshim.save(tmp_path / "file")
    with pytest.raises(ArtifactError):
        fast.ovshim.save(tmp_path / "file" / "below")
    (tmp_path / "empty").mkdir()
    fast.ovshim.save(tmp_path / "empty")
    with pytest.raises(ArtifactError, match="loaded from an artifact"):
        ovshim.load(tmp_path / "empty").ovshim.save(tmp_path / "y")  # type: ignore[operator, union-attr]


def test_a_disk_that_takes_no_more(
    mlp: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast = accelerated(mlp, torch.randn(3, 8))

    def refuse(*args: Any) -> Any:
        raise OSError(28, "No space left on device")

    for place in ("shutil.copyfile", "os.fsync", "os.rename"):
        with monkeypatch.context() as patch:
            patch.setattr(place, refuse)
            with pytest.raises(ArtifactError, match="No space left"):
                fast.ovshim.save(tmp_path / "deep" / "x")
        assert list(tmp_path.rglob("*")) in ([], [tmp_path / "deep"])


# ------------------------------------------------------------------ what is no artifact


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no such directory") as caught:
        ovshim.load(tmp_path / "x")
    assert caught.value.value == str(tmp_path / "x")
    with pytest.raises(ArtifactError, match=r"holds no artifact\.json"):
        ovshim.load(tmp_path)


@pytest.mark.parametrize("name", ["artifact.json", "graph0.xml", "graph0.bin", "graph0.tensors"])
def test_damage(copied: Path, name: str) -> None:
    path = copied / name
    whole = path.read_bytes()
    draw = random.Random(0)
    for _ in range(6):
        at = draw.randrange(len(whole))
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(ArtifactError):
            ovshim.load(copied)
    path.write_bytes(whole[:-1])
    with pytest.raises(ArtifactError):
        ovshim.load(copied)
    path.unlink()
    with pytest.raises(ArtifactError):
        ovshim.load(copied)
    path.write_bytes(whole)
    ovshim.load(copied)


def resealed(where: Path, manifest: Any) -> None:
    from test_hostile_entries import _sealed

    (where / "artifact.json").write_bytes(_sealed(manifest))


def test_another_schema(copied: Path) -> None:
    manifest = files.read_sealed(copied / "artifact.json")
    resealed(copied, {**manifest, "schema": 2})
    with pytest.raises(ArtifactError, match="schema"):
        ovshim.load(copied)


def test_answers_that_are_not_the_recorded_ones(copied: Path) -> None:
    path = copied / "graph0.tensors"
    manifest = files.read_sealed(copied / "artifact.json")
    data = bytearray(path.read_bytes())
    at = manifest["graphs"][0]["cases"][0]["outputs"][0]["tensor"]["at"]
    data[at : at + 4] = torch.tensor([100.0]).numpy().tobytes()
    path.write_bytes(data)
    size, digest = files.checksum(path)
    manifest["files"]["graph0.tensors"] = {"size": size, "xxh3": digest}
    resealed(copied, manifest)
    with pytest.raises(ArtifactError, match="does not give the recorded answers"):
        ovshim.load(copied)


def test_another_machine_proves_it_anew(
    copied: Path, mlp: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = files.read_sealed(copied / "artifact.json")
    (graph,) = manifest["graphs"]
    resealed(copied, {**manifest, "processor": "another"})
    compared: list[Any] = []
    compare = read.compare

    def comparing(*given: Any) -> None:
        compared.append(given)
        if len(compared) == 1:  # as where that processor's kernels miscompile the graph
            raise read.Mismatch("off by much")
        compare(*given)

    monkeypatch.setattr(read, "compare", comparing)
    loaded: Any = ovshim.load(copied)
    # The second way of compiling was right on every recorded call.
    assert len(compared) == 1 + len(graph["cases"]) > 2
    x = torch.randn(5, 8)
    same(loaded(x), mlp(x).detach())
    assert ovshim.explain(loaded).to_dict()["calls"]["openvino"] == 1


@pytest.mark.parametrize("many", [40, pytest.param(1000, marks=pytest.mark.slow)])
def test_any_value_of_a_manifest(copied: Path, mlp: nn.Module, many: int) -> None:
    manifest = files.read_sealed(copied / "artifact.json")
    draw, everywhere, x = random.Random(0), list(places(manifest)), torch.randn(3, 8)
    refused = 0
    for _ in range(many):
        resealed(copied, with_value(manifest, draw.choice(everywhere), draw.choice(ODD)))
        try:
            with as_it_runs():
                same(ovshim.load(copied)(x), mlp(x).detach())
        except (ArtifactError, FallbackError):
            refused += 1
    assert refused > many // 3


def test_names_in_a_manifest_do_not_escape(copied: Path, tmp_path: Path) -> None:
    (tmp_path / "outside.xml").write_bytes((copied / "graph0.xml").read_bytes())
    manifest = files.read_sealed(copied / "artifact.json")
    for stem in ("../outside", str(tmp_path / "outside"), "", "a.b"):
        changed = copy.deepcopy(manifest)
        changed["graphs"][0]["stem"] = stem
        resealed(copied, changed)
        with pytest.raises(ArtifactError, match="not as ovshim writes it"):
            ovshim.load(copied)


def test_no_name_in_a_manifest_is_imported(
    copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "trap.py").write_text("raise AssertionError('imported')", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    text = (copied / "artifact.json").read_text(encoding="utf-8")
    manifest = json.loads(text)["record"]
    for path in places(manifest):
        resealed(copied, with_value(manifest, path, "trap"))
        with as_it_runs(), contextlib.suppress(ArtifactError):
            ovshim.load(copied)
    assert "trap" not in sys.modules
