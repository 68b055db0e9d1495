"""Model repositories for OpenVINO Model Server: valid by its schema, and right by their names."""

import json
from pathlib import Path
from typing import Any

import openvino
import pytest
import torch
from modules import Attention, DictToDataclass, Mlp, Nest, make
from torch import nn

import ovshim
from ovshim import ArtifactError, OptionError

SCHEMA = json.loads(Path(__file__).with_name("ovms_schema.json").read_text(encoding="utf-8"))
TYPES: dict[str, Any] = {"object": dict, "array": list, "string": str, "boolean": bool,
                         "integer": int, "number": (int, float)}  # fmt: skip


def invalid(value: Any, schema: Any, where: str = "config") -> list[str]:
    """What is wrong with a value by a JSON schema, of those rules that the server's schema uses."""
    if isinstance(schema, bool):
        return [] if schema else [f"{where} is not allowed"]
    if "$ref" in schema:
        return invalid(value, SCHEMA["definitions"][schema["$ref"].rpartition("/")[2]], where)
    found: list[str] = []
    types = schema.get("type", [])
    types = [types] if isinstance(types, str) else types
    as_bool = isinstance(value, bool) and "boolean" not in types
    if types and (as_bool or not isinstance(value, tuple(TYPES[t] for t in types))):
        return [f"{where} is {value!r}, no {' or '.join(types)}"]
    if "enum" in schema and value not in schema["enum"]:
        found.append(f"{where} is {value!r}")
    for rule, count in (("anyOf", None), ("oneOf", 1)):
        if rule in schema:
            fitting = [one for one in schema[rule] if not invalid(value, one, where)]
            if not fitting or (count is not None and len(fitting) != count):
                found.append(f"{where} fits {len(fitting)} of {rule}")
    if isinstance(value, int) and value < schema.get("minimum", value):
        found.append(f"{where} is {value}")
    if isinstance(value, list):
        for i, item in enumerate(value):
            found += invalid(item, schema.get("items", True), f"{where}[{i}]")
    if isinstance(value, dict):
        found += [f"{where} lacks {key}" for key in schema.get("required", ()) if key not in value]
        if not schema.get("minProperties", 0) <= len(value) <= schema.get("maxProperties", 99):
            found.append(f"{where} has {len(value)} members")
        for key, inner in value.items():
            rule = schema.get("properties", {}).get(key, schema.get("additionalProperties", True))
            found += invalid(inner, rule, f"{where}.{key}")
    return found


def config_of(root: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((root / "config.json").read_text(encoding="utf-8"))
    return config


@pytest.mark.parametrize(
    "change",
    [
        {"model_config_list": None},
        {"model_config_list": [{"config": {"base_path": "x"}}]},
        {"model_config_list": [{"config": {"name": "x", "plugin_config": {"a": {}}}}]},
        {"model_config_list": [{"config": {"name": "x", "nireq": -1}}]},
        {"model_config_list": [{"config": {"name": "x", "unknown": 1}}]},
        {"model_config_list": [{"config": {"name": "x", "model_version_policy": {"some": {}}}}]},
        {"more": 1, "model_config_list": []},
        {},
    ],
)
def test_the_schema_sees_what_it_should(change: Any) -> None:
    assert invalid(change, SCHEMA)
    assert not invalid({"model_config_list": []}, SCHEMA)
    fine = {"name": "x", "shape": "auto", "model_version_policy": {"latest": {"num_versions": 1}}}
    assert not invalid({"model_config_list": [{"config": fine}]}, SCHEMA)


# One: cores that go in another order than they came leave OpenVINO's stack for signals to memory
# that is gone, and the next signal ends the process (2026.4).
CORE = openvino.Core()


class Served:
    """A model as the server reads, names and compiles it: from its files, with its config."""

    def __init__(self, path: Path, device: str, config: dict[str, Any]) -> None:
        model = CORE.read_model(path)
        self.inputs, self.outputs = (
            [port.get_any_name() for port in ports] for ports in (model.inputs, model.outputs)
        )
        self.compiled = CORE.compile_model(model, device, config)

    def __call__(self, **given: torch.Tensor) -> dict[str, torch.Tensor]:
        assert given.keys() == set(self.inputs)
        answer = self.compiled([given[name].numpy() for name in self.inputs])
        values = [torch.from_numpy(answer[port]) for port in self.compiled.outputs]
        return dict(zip(self.outputs, values, strict=True))


def served(root: Path, name: str, version: int = 1) -> Served:
    """A model of a repository."""
    (entry,) = [m["config"] for m in config_of(root)["model_config_list"]
                if m["config"]["name"] == name]  # fmt: skip
    path = root / entry["base_path"] / str(version) / "model.xml"
    return Served(path, entry["target_device"], entry["plugin_config"])


@pytest.fixture(scope="module")
def mlp() -> nn.Module:
    return make(Mlp)


@pytest.fixture
def fast(mlp: nn.Module) -> Any:
    return ovshim.accelerate(mlp, torch.randn(3, 8), prefer="openvino")


def test_a_repository(fast: Any, mlp: nn.Module, tmp_path: Path) -> None:
    root = tmp_path / "models"
    assert fast.ovshim.export(root) == ["mlp"]
    assert invalid(config_of(root), SCHEMA) == []
    (entry,) = [model["config"] for model in config_of(root)["model_config_list"]]
    assert (entry["name"], entry["base_path"], entry["target_device"]) == ("mlp", "mlp", "CPU")
    assert entry["plugin_config"]["INFERENCE_PRECISION_HINT"] == "f32"
    assert entry["plugin_config"]["PERFORMANCE_HINT"] == "LATENCY"
    assert "INFERENCE_NUM_THREADS" not in entry["plugin_config"]
    assert sorted(p.name for p in (root / "mlp" / "1").iterdir()) == ["model.bin", "model.xml"]
    x = torch.randn(5, 8)
    with torch.inference_mode():
        (answer,) = served(root, "mlp")(x=x).values()
        torch.testing.assert_close(answer, mlp(x), rtol=1e-4, atol=1e-5)


def test_versions_count_up_and_other_models_stay(fast: Any, tmp_path: Path) -> None:
    fast.ovshim.export(tmp_path, name="one")
    config = config_of(tmp_path)
    config["model_config_list"][0]["config"]["nireq"] = 3
    config["model_config_list"].append({"config": {"name": "mine", "base_path": "/mine"}})
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    fast.ovshim.export(tmp_path, name="two")
    fast.ovshim.export(tmp_path, name="one")
    (tmp_path / "one" / "07").mkdir()  # no version
    fast.ovshim.export(tmp_path, name="one")
    assert {p.name for p in (tmp_path / "one").iterdir()} == {"1", "2", "3", "07"}
    config = config_of(tmp_path)
    assert invalid(config, SCHEMA) == []
    names = [model["config"]["name"] for model in config["model_config_list"]]
    assert sorted(names) == ["mine", "one", "two"]


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 8)

    def forward(self, ids: torch.Tensor, scale: torch.Tensor) -> dict[str, torch.Tensor]:
        rows = self.table(ids) * scale
        return {"rows": rows, "mean": rows.mean(1)}


def test_names_of_inputs_and_outputs(tmp_path: Path) -> None:
    module, ids, scale = make(Tokens), torch.tensor([[1, 2, 8]]), torch.tensor([2.0])
    fast: Any = ovshim.accelerate(module, {"ids": ids, "scale": scale}, prefer="openvino")
    fast.ovshim.export(tmp_path, name="tokens")
    model = served(tmp_path, "tokens")
    answer = model(ids=ids, scale=scale)
    with torch.inference_mode():
        expected = module(ids=ids, scale=scale)
    assert answer.keys() == {"rows", "mean", "in_range"}
    assert answer["in_range"].all()
    for name in ("rows", "mean"):
        torch.testing.assert_close(answer[name], expected[name], rtol=1e-4, atol=1e-5)
    assert not model(ids=ids + 1, scale=scale)["in_range"].all()


def test_several_kinds_of_calls_are_several_models(tmp_path: Path) -> None:
    fast: Any = ovshim.accelerate(make(Attention), torch.randn(2, 5, 16), prefer="openvino")
    fast.ovshim.warm((torch.randn(2, 5, 16), torch.ones(2, 5, dtype=torch.bool)))
    assert fast.ovshim.export(tmp_path) == ["attention", "attention_2"]
    assert invalid(config_of(tmp_path), SCHEMA) == []
    inputs = [set(served(tmp_path, name).inputs) for name in ("attention", "attention_2")]
    assert sorted(inputs, key=len) == [{"x"}, {"x", "mask"}]


def test_names_in_nested_calls_are_distinct(tmp_path: Path) -> None:
    a, b, c = torch.randn(3, 8), torch.randn(3, 8), torch.randn(3, 4)
    nest: Any = ovshim.accelerate(make(Nest), (((a, b), {"c": c}),), prefer="openvino")
    nest.ovshim.export(tmp_path)
    model = served(tmp_path, "nest")
    assert set(model.inputs) == {"pairs_0_0", "pairs_0_1", "pairs_1_c"}
    assert set(model.outputs) >= {"y", "parts_0", "ordered_z", "ordered_a"}
    batch = {"features": torch.randn(3, 8), "weight": torch.rand(3)}
    boxes: Any = ovshim.accelerate(make(DictToDataclass), (batch,), prefer="openvino")
    boxes.ovshim.export(tmp_path, name="boxes")
    assert set(served(tmp_path, "boxes").outputs) >= {"scores", "labels", "extra_top"}


class SameTwice(nn.Module):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
        z = x + y
        return {"a": z, "b": z.clone(), "c": x.clone()}


def test_one_tensor_under_several_names(tmp_path: Path) -> None:
    x, y = torch.randn(3, 8), torch.randn(3, 8)
    fast: Any = ovshim.accelerate(SameTwice().eval(), (x, y), prefer="openvino")
    fast.ovshim.export(tmp_path, name="same")
    answer = served(tmp_path, "same")(x=x, y=y)
    assert answer.keys() == {"a", "b", "c"}
    torch.testing.assert_close(answer["c"], x)
    torch.testing.assert_close(answer["b"], x + y)


def test_options_are_written_out(mlp: nn.Module, tmp_path: Path) -> None:
    options: Any = {"hint": "throughput", "streams": 2, "threads": 2}
    options["properties"] = {"ENABLE_CPU_PINNING": False}
    fast: Any = ovshim.accelerate(mlp, torch.randn(3, 8), prefer="openvino", **options)
    fast.ovshim.export(tmp_path)
    assert invalid(config_of(tmp_path), SCHEMA) == []
    told = config_of(tmp_path)["model_config_list"][0]["config"]["plugin_config"]
    assert told["PERFORMANCE_HINT"] == "THROUGHPUT"
    assert (told["NUM_STREAMS"], told["INFERENCE_NUM_THREADS"]) == (2, 2)
    assert told["ENABLE_CPU_PINNING"] is False
    assert served(tmp_path, "mlp").compiled.get_property("NUM_STREAMS") == 2


def test_what_cannot_be_exported(fast: Any, mlp: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="layout"):
        fast.ovshim.export(tmp_path, layout="triton")
    with pytest.raises(OptionError, match="directory"):
        fast.ovshim.export(5)
    for name in ("", "a/b", "../x", "-x", 5):
        with pytest.raises(OptionError, match="name"):
            fast.ovshim.export(tmp_path, name=name)
    several: Any = ovshim.accelerate(mlp, torch.randn(3, 8), prefer="openvino", device="AUTO:CPU")
    with pytest.raises(OptionError, match="device"):
        several.ovshim.export(tmp_path)
    assert list(tmp_path.iterdir()) == []
    for text in ("{", "[]", '{"model_config_list": [1]}', "{}"):
        (tmp_path / "config.json").write_text(text, encoding="utf-8")
        with pytest.raises(ArtifactError, match=r"config\.json"):
            fast.ovshim.export(tmp_path)
        assert (tmp_path / "config.json").read_text(encoding="utf-8") == text
    empty: Any = ovshim.accelerate(mlp)
    with pytest.raises(ArtifactError, match="no plan that runs in OpenVINO"):
        empty.ovshim.export(tmp_path / "other")
