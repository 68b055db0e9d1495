"""ONNX models: proved against their own runtime, cached, and in its hands where OpenVINO is not."""

import copy
import pickle
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.reference
import pytest
import torch
from checks import as_it_runs, falls_back, same
from onnx import TensorProto as T
from onnx import helper, numpy_helper
from torch import Tensor, nn

import ovshim
from ovshim import ArtifactError, OptionError

FLOAT, INT64 = T.FLOAT, T.INT64
Info = tuple[str, int, list[Any] | None]


def weights(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).standard_normal(shape).astype("float32")


def model(
    nodes: list[Any], inputs: list[Info], outputs: list[Info], name: str = "net", **constants: Any
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        name,
        [helper.make_tensor_value_info(*info) for info in inputs],
        [helper.make_tensor_value_info(*info) for info in outputs],
        [numpy_helper.from_array(np.asarray(value), key) for key, value in constants.items()],
    )
    opset = [helper.make_opsetid("", 17)]
    return helper.make_model(graph, opset_imports=opset, ir_version=10)


def mlp(seed: int = 0, width: Any = 8) -> onnx.ModelProto:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["y"]),
        helper.make_node("Add", ["y", "b"], ["a"]),
        helper.make_node("Tanh", ["a"], ["z"]),
    ]
    return model(nodes, [("x", FLOAT, ["N", width])], [("z", FLOAT, ["N", 4])],
                 w=weights(8, 4, seed=seed), b=weights(4, seed=seed))  # fmt: skip


def expected(proto: onnx.ModelProto, *inputs: Tensor) -> list[Tensor]:
    """By ONNX's reference evaluator, whatever else is installed."""
    names = [info.name for info in proto.graph.input]
    evaluator = onnx.reference.ReferenceEvaluator(proto)
    found = evaluator.run(None, {n: x.numpy() for n, x in zip(names, inputs, strict=True)})
    return [torch.from_numpy(np.array(value)) for value in found]


def opened(given: Any, **options: Any) -> Any:
    return ovshim.from_onnx(given, prefer="openvino", **options)


def served(net: Any) -> int:
    count: int = ovshim.explain(net).to_dict()["calls"]["openvino"]
    return count


@pytest.fixture(autouse=True)
def _without_gradients() -> Any:
    with torch.inference_mode():
        yield


# ------------------------------------------------------------------ what it is for


def test_bytes_a_proto_and_a_path_are_one_model(tmp_path: Path) -> None:
    proto = mlp()
    onnx.save(proto, tmp_path / "net.onnx")
    for number, given in enumerate(
        [proto, proto.SerializeToString(), tmp_path / "net.onnx", str(tmp_path / "net.onnx")]
    ):
        net = opened(given)
        net.ovshim.warm(torch.randn(3, 8))
        for batch in (3, 1, 20):
            x = torch.randn(batch, 8)
            same(net(x), expected(proto, x)[0])
        assert served(net) == 3
        (plan,) = ovshim.explain(net).to_dict()["plans"]
        assert plan["cache"] == ("hit" if number else "miss")
        assert (plan["route"], plan["precision_run"]) == ("onnx", "f32")
        assert plan["error"] < 1e-5
        assert plan["speedup"] is None
    assert isinstance(net, nn.Module)
    assert type(net).__name__ == "net"
    assert "x: ['N', 8] -> z" in repr(net)


def test_the_race_is_run_against_its_own_runtime() -> None:
    net: Any = ovshim.from_onnx(mlp())
    net.ovshim.warm(torch.randn(3, 8))
    (plan,) = ovshim.explain(net).to_dict()["plans"]
    assert plan["speedup"] > 0


def test_another_weight_is_another_key(tmp_path: Path) -> None:
    x = torch.randn(3, 8)
    for seed in (0, 1):
        net = opened(mlp(seed))
        net.ovshim.warm(x)
        same(net(x), expected(mlp(seed), x)[0])
        assert ovshim.explain(net).plans[0]["cache"] == "miss"


def test_external_data(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        onnx.save(mlp(), tmp_path / name / "net.onnx", save_as_external_data=True,
                  location="weights.bin", size_threshold=0)  # fmt: skip
    x = torch.randn(3, 8)
    for name, cache in (("one", "miss"), ("two", "hit")):
        net = opened(tmp_path / name / "net.onnx")
        net.ovshim.warm(x)
        same(net(x), expected(mlp(), x)[0])
        assert (served(net), ovshim.explain(net).plans[0]["cache"]) == (1, cache)
    path = tmp_path / "one" / "weights.bin"
    data = path.read_bytes()
    path.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    net = opened(tmp_path / "one" / "net.onnx")
    net.ovshim.warm(x)
    assert ovshim.explain(net).plans[0]["cache"] == "miss"


def test_a_file_that_changes_after_it_was_opened(tmp_path: Path) -> None:
    onnx.save(mlp(0), tmp_path / "net.onnx")
    net = opened(tmp_path / "net.onnx")
    onnx.save(mlp(1), tmp_path / "net.onnx")
    x = torch.randn(3, 8)
    with falls_back("capture-failed"):
        same(net(x), expected(mlp(0), x)[0])
    assert "changed" in ovshim.explain(net).plans[0]["reason"]["message"]


def test_several_inputs_and_outputs_by_position_and_by_name() -> None:
    nodes = [
        helper.make_node("Mul", ["in.1", "2"], ["product"]),
        helper.make_node("ReduceSum", ["product"], ["total"], keepdims=0),
        helper.make_node("Shape", ["product"], ["size"]),
        helper.make_node("Not", ["class"], ["flipped"]),
    ]
    proto = model(
        nodes,
        [("in.1", FLOAT, ["N", "M"]), ("2", FLOAT, ["N", "M"]), ("class", T.BOOL, ["K"])],
        [("product", FLOAT, ["N", "M"]), ("total", FLOAT, []), ("size", INT64, [2]),
         ("flipped", T.BOOL, ["K"])],
    )  # fmt: skip
    net = opened(proto)
    a, b, c = torch.randn(3, 5), torch.randn(3, 5), torch.tensor([True, False])
    net.ovshim.warm((a, b, c))
    for n, m in ((3, 5), (4, 2)):
        a, b = torch.randn(n, m), torch.randn(n, m)
        answer = net(a, b, c)
        assert type(answer) is tuple
        for one, other in zip(answer, expected(proto, a, b, c), strict=True):
            same(one, other)
    assert served(net) == 2
    same(net(a, _2=b, _class=c), answer)
    same(net(**{"in.1": a, "2": b, "class": c}), answer)
    for wrong in (lambda: net(a), lambda: net(a, b, c, c), lambda: net(a, b, d=c)):
        with pytest.raises(TypeError):
            wrong()
    with pytest.raises(TypeError, match=r"float64; the model takes torch\.float32"):
        net(a.double(), b, c)


def test_sizes_that_the_model_says_are_one_or_fixed() -> None:
    nodes = [helper.make_node("Add", ["x", "y"], ["z"])]
    proto = model(nodes, [("x", FLOAT, ["N", 4]), ("y", FLOAT, ["N", 4])], [("z", FLOAT, ["N", 4])])
    net = opened(proto)
    net.ovshim.warm((torch.randn(3, 4), torch.randn(3, 4)))
    (plan,) = ovshim.explain(net).to_dict()["plans"]
    assert plan["signature"] == "[0]: float32[?, 4], [1]: float32[?, 4]"
    assert "s1[0] == s0[0]" in plan["guards"]
    static = opened(proto, dynamic_batch=False, dynamic_shapes={}, cache_dir=False)
    static.ovshim.warm((torch.randn(3, 4), torch.randn(3, 4)))
    assert ovshim.explain(static).plans[0]["signature"] == "[0]: float32[3, 4], [1]: float32[3, 4]"
    with pytest.raises(Exception, match=r"(?i)dimension|shape"):
        net(torch.randn(3, 5), torch.randn(3, 5))


def test_one_tensor_given_twice() -> None:
    nodes = [helper.make_node("Sub", ["x", "y"], ["d"]), helper.make_node("Exp", ["d"], ["z"])]
    inputs: list[Info] = [("x", FLOAT, ["N", 4]), ("y", FLOAT, ["N", 4])]
    proto = model(nodes, inputs, [("z", FLOAT, ["N", 4])])
    net = opened(proto)
    x, y = torch.randn(3, 4), torch.randn(3, 4)
    net.ovshim.warm((x, x), (x, y))
    same(net(x, x), torch.ones(3, 4))
    same(net(x, y), expected(proto, x, y)[0])
    assert served(net) == 2


def test_an_input_that_is_an_output_and_one_that_nothing_reads() -> None:
    nodes = [helper.make_node("Identity", ["x"], ["same"]), helper.make_node("Relu", ["x"], ["z"])]
    proto = model(nodes, [("x", FLOAT, ["N", 4]), ("unread", FLOAT, ["N"])],
                  [("same", FLOAT, ["N", 4]), ("z", FLOAT, ["N", 4])])  # fmt: skip
    net = opened(proto)
    x = torch.randn(3, 4)
    net.ovshim.warm((x, torch.randn(3)))
    answer = net(x, torch.randn(3))
    same(answer, (x, x.relu()))
    assert answer[0].data_ptr() != x.data_ptr()
    assert served(net) == 1


def embedding(seed: int = 0) -> onnx.ModelProto:
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["rows"]),
        helper.make_node("ReduceMean", ["rows"], ["z"], axes=[1], keepdims=0),
    ]
    return model(nodes, [("ids", INT64, ["N", "L"])], [("z", FLOAT, ["N", 4])],
                 table=weights(50, 4, seed=seed))  # fmt: skip


def test_indices_are_looked_at_inside_the_graph() -> None:
    net = opened(embedding())
    net.ovshim.warm(torch.tensor([[3, 4, 5]]))
    ids = torch.tensor([[0, 49, -50, 7], [1, 2, 3, 4]])
    same(net(ids), expected(embedding(), ids)[0])
    assert served(net) == 1
    for wrong in (50, -51):
        with pytest.raises(Exception, match=r"(?i)out of .*bounds"):
            net(torch.tensor([[0, wrong]]))
    assert ovshim.explain(net).to_dict()["eager_reasons"]["out-of-range"] == 2


def test_half_precision_is_judged_as_such() -> None:
    proto = mlp()
    half = helper.make_graph(
        proto.graph.node, "half",
        [helper.make_tensor_value_info("x", T.FLOAT16, ["N", 8])],
        [helper.make_tensor_value_info("z", T.FLOAT16, ["N", 4])],
        [numpy_helper.from_array(numpy_helper.to_array(i).astype("float16"), i.name)
         for i in proto.graph.initializer],
    )  # fmt: skip
    net = opened(
        helper.make_model(half, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    )
    x = torch.randn(3, 8).half()
    with as_it_runs():
        net.ovshim.warm(x)
    answer = net(x)
    assert answer.dtype is torch.float16
    same(answer.float(), expected(proto, x.float())[0], tolerance=0.01)
    assert served(net) == 1
    assert ovshim.explain(net).to_dict()["plans"][0]["precision_run"] in ("f16", "f32", "bf16")


# ------------------------------------------------------------------ what its own runtime keeps


def branches() -> onnx.ModelProto:
    value = helper.make_tensor_value_info
    one = helper.make_graph([helper.make_node("Identity", ["x"], ["p"])], "p", [],
                            [value("p", FLOAT, None)])  # fmt: skip
    two = helper.make_graph([helper.make_node("Neg", ["x"], ["q"])], "q", [],
                            [value("q", FLOAT, None)])  # fmt: skip
    nodes = [
        helper.make_node("ReduceSum", ["x"], ["s"], keepdims=0),
        helper.make_node("Greater", ["s", "zero"], ["c"]),
        helper.make_node("If", ["c"], ["z"], then_branch=one, else_branch=two),
    ]
    return model(nodes, [("x", FLOAT, ["N", 8])], [("z", FLOAT, ["N", 8])], zero=np.float32(0))


def nonzero() -> onnx.ModelProto:
    return model([helper.make_node("NonZero", ["x"], ["z"])], [("x", FLOAT, ["N", 8])],
                 [("z", INT64, [2, "M"])])  # fmt: skip


def reshaped() -> onnx.ModelProto:
    nodes = [helper.make_node("Reshape", ["x", "to"], ["z"])]
    return model(nodes, [("x", FLOAT, [None, 8]), ("to", INT64, [2])], [("z", FLOAT, [None, None])])


@pytest.mark.parametrize(
    ("proto", "inputs"),
    [
        (branches(), [(torch.ones(3, 8),), (-torch.ones(3, 8),)]),
        (nonzero(), [(torch.ones(2, 8),), (torch.zeros(2, 8),)]),
        (reshaped(), [(torch.ones(2, 8), torch.tensor([4, 4])),
                      (torch.ones(2, 8), torch.tensor([16, 1]))]),
    ],
    ids=["if", "nonzero", "reshape"],
)  # fmt: skip
def test_what_values_decide_stays(proto: onnx.ModelProto, inputs: list[tuple[Tensor, ...]]) -> None:
    net = opened(proto)
    with falls_back("value-dependent"):
        for given in inputs:
            same(net(*given), expected(proto, *given)[0])
    assert served(net) == 0


def test_sizes_decide_what_they_may() -> None:
    nodes = [
        helper.make_node("Shape", ["x"], ["size"]),
        helper.make_node("Gather", ["size", "first"], ["n"]),
        helper.make_node("Concat", ["n", "rest"], ["to"], axis=0),
        helper.make_node("Reshape", ["x", "to"], ["z"]),
    ]
    proto = model(nodes, [("x", FLOAT, ["N", 8])], [("z", FLOAT, ["N", 2, 4])],
                  first=np.array([0]), rest=np.array([2, 4]))  # fmt: skip
    net = opened(proto)
    net.ovshim.warm(torch.randn(3, 8))
    x = torch.randn(6, 8)
    same(net(x), x.reshape(6, 2, 4))
    assert served(net) == 1


def test_random_numbers_stay() -> None:
    draw = helper.make_node("RandomNormalLike", ["x"], ["r"])
    nodes = [draw, helper.make_node("Add", ["x", "r"], ["z"])]
    net = opened(model(nodes, [("x", FLOAT, ["N", 8])], [("z", FLOAT, ["N", 8])]))
    with falls_back("nondeterministic"):
        assert net(torch.randn(3, 8)).shape == (3, 8)
    assert served(net) == 0


def test_without_onnx_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    net = opened(mlp())
    x = torch.randn(3, 8)
    net.ovshim.warm(x)
    same(net(x), expected(mlp(), x)[0])
    assert served(net) == 1
    eager = opened(branches())
    with falls_back("value-dependent"):
        same(eager(-torch.ones(3, 8)), torch.ones(3, 8))


# ------------------------------------------------------------------ what comes with a module


def test_copies_pickles_and_artifacts(tmp_path: Path) -> None:
    net, x = opened(mlp()), torch.randn(3, 8)
    net.ovshim.warm(x)
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        other.ovshim.warm(x)
        same(other(x), expected(mlp(), x)[0])
        assert served(other) == 1
        assert ovshim.explain(other).plans[0]["cache"] == "hit"
    net.ovshim.save(tmp_path / "artifact")
    same(ovshim.load(tmp_path / "artifact")(x), expected(mlp(), x)[0])
    assert net.ovshim.export(tmp_path / "models") == ["net"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's, that no one is to trace
def test_a_trace_would_keep_one_answer() -> None:
    net, x = opened(mlp()), torch.randn(3, 8)
    for traced in (net, torch.nn.Sequential(net)):
        with pytest.raises(RuntimeError, match="ONNX model"):
            torch.jit.trace(traced, x)  # type: ignore[no-untyped-call]
    same(net(x), expected(mlp(), x)[0])


def test_compressed_weights() -> None:
    net, x = opened(mlp(), precision="int8_weights"), torch.randn(3, 8)
    net.ovshim.warm(x)
    same(net(x), expected(mlp(), x)[0], tolerance=0.03)
    assert served(net) == 1


def test_rules_by_module_path_have_no_modules() -> None:
    net = opened(mlp(), precision={"default": "bf16"})
    with falls_back("no-module-paths"):
        net(torch.randn(3, 8))


@pytest.mark.slow
def test_calibrated() -> None:
    data = [torch.randn(4, 8) for _ in range(20)]
    net = opened(mlp(), precision="int8", calibration=data)
    with as_it_runs():
        net.ovshim.warm(data[0])
    same(net(data[1]), expected(mlp(), data[1])[0], tolerance=0.1)
    assert served(net) == 1


def test_in_the_background() -> None:
    net = opened(embedding(), background=True)
    ids = torch.tensor([[1, 2, 3]])
    same(net(ids), expected(embedding(), ids)[0])
    assert net.ovshim.wait(60)
    same(net(ids), expected(embedding(), ids)[0])
    assert served(net) == 1


def test_threads(tmp_path: Path) -> None:
    net = opened(mlp())
    inputs = [torch.randn(1 + n % 3, 8) for n in range(30)]
    net.ovshim.warm(inputs[2])
    wrong: list[int] = []

    def work() -> None:
        with torch.inference_mode():
            for n, x in enumerate(inputs):
                if not torch.allclose(net(x), expected(mlp(), x)[0], atol=1e-5):
                    wrong.append(n)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert served(net) == 120


# ------------------------------------------------------------------ what is no model


def no_such_operator() -> bytes:
    node = helper.make_node("NoSuchThing", ["x"], ["z"], domain="of.mine")
    proto = model([node], [("x", FLOAT, [2])], [("z", FLOAT, [2])])
    proto.opset_import.append(helper.make_opsetid("of.mine", 1))
    return bytes(proto.SerializeToString())


def texts() -> bytes:
    node = helper.make_node("Identity", ["x"], ["z"])
    return bytes(model([node], [("x", T.STRING, [2])], [("z", T.STRING, [2])]).SerializeToString())


def unknown_input() -> bytes:
    node = helper.make_node("Relu", ["nowhere"], ["z"])
    return bytes(model([node], [("x", FLOAT, [2])], [("z", FLOAT, [2])]).SerializeToString())


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (lambda: b"", "no ONNX model that can be read"),
        (lambda: b"hello, world", "no ONNX model that can be read"),
        (lambda: mlp().SerializeToString()[:-20], "no ONNX model that can be read"),
        (lambda: mlp().SerializeToString()[:60], "no ONNX model that can be read"),
        (unknown_input, "nowhere"),
        (no_such_operator, "NoSuchThing"),
        (texts, "'x' is of a type"),
    ],
)
def test_what_is_wrong_is_said(made: Callable[[], bytes], said: str, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=said):
        ovshim.from_onnx(made())
    (tmp_path / "net.onnx").write_bytes(made())
    with pytest.raises(ArtifactError, match=said) as caught:
        ovshim.from_onnx(tmp_path / "net.onnx")
    assert caught.value.value == str(tmp_path / "net.onnx")


def test_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no ONNX model that can be read"):
        ovshim.from_onnx(tmp_path / "nowhere.onnx")
    with pytest.raises(ArtifactError):
        ovshim.from_onnx(tmp_path)
    onnx.save(mlp(), tmp_path / "net.onnx", save_as_external_data=True, location="w.bin",
              size_threshold=0)  # fmt: skip
    with pytest.raises(ArtifactError, match="Give the path"):
        ovshim.from_onnx((tmp_path / "net.onnx").read_bytes())
    (tmp_path / "w.bin").write_bytes(b"")
    with pytest.raises(ArtifactError):
        ovshim.from_onnx(tmp_path / "net.onnx")
    (tmp_path / "w.bin").unlink()
    with pytest.raises(ArtifactError, match=r"w\.bin"):
        ovshim.from_onnx(tmp_path / "net.onnx")


def test_external_data_does_not_escape(tmp_path: Path) -> None:
    (tmp_path / "inside").mkdir()
    path = tmp_path / "inside" / "net.onnx"
    onnx.save(mlp(), path, save_as_external_data=True, location="w.bin", size_threshold=0)
    (tmp_path / "inside" / "w.bin").rename(tmp_path / "w.bin")
    proto = onnx.load(path, load_external_data=False)
    for tensor in proto.graph.initializer:
        for entry in tensor.external_data:
            entry.value = "../w.bin" if entry.key == "location" else entry.value
    onnx.save(proto, path)
    with pytest.raises(ArtifactError, match="outside"):
        ovshim.from_onnx(path)


def test_options() -> None:
    with pytest.raises(OptionError, match="model=5"):
        ovshim.from_onnx(5)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="methods"):
        ovshim.from_onnx(mlp(), methods=("x",))
    with pytest.raises(OptionError, match="dynamic_shapes"):
        ovshim.from_onnx(mlp(), dynamic_shapes={"nothing": {0: "n"}})
    assert ovshim.from_onnx(mlp(), hint="throughput").ovshim.options.hint == "throughput"  # type: ignore[union-attr]


def test_indices_of_any_rank_and_along_any_axis() -> None:
    nodes = [
        helper.make_node("Gather", ["table", "one"], ["row"]),
        helper.make_node("GatherElements", ["x", "where"], ["picked"], axis=1),
    ]
    proto = model(
        nodes,
        [("one", INT64, []), ("x", FLOAT, ["N", 4]), ("where", INT64, ["N", 2])],
        [("row", FLOAT, [4]), ("picked", FLOAT, ["N", 2])],
        table=weights(9, 4),
    )
    net = opened(proto)
    x, where = torch.randn(3, 4), torch.tensor([[0, 3], [-4, 1], [2, 2]])
    net.ovshim.warm((torch.tensor(2), x, where))
    one = torch.tensor(-9)
    for mine, other in zip(net(one, x, where), expected(proto, one, x, where), strict=True):
        same(mine, other)
    assert served(net) == 1
    for wrong in ((torch.tensor(9), x, where), (one, x, where + 2)):
        with pytest.raises(Exception, match=r"(?i)out of (data )?(bounds|range)"):
            net(*wrong)
