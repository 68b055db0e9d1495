"""`torch.compile(backend="ovshim")`: graphs cut out by Dynamo, with their weights frozen."""

import gc
import os
import subprocess
import sys
import threading
import warnings
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from checks import same
from conformance.real.tiny import configure
from modules import Mlp, make
from test_run import environment
from torch import Tensor, nn

import ovshim
from ovshim import backend
from ovshim.backend import compile_graph, reports
from ovshim.report import Report


@pytest.fixture(autouse=True)
def _no_graphs() -> Iterator[None]:
    torch._dynamo.reset()
    gc.collect()
    yield
    torch._dynamo.reset()


def compiled(module: Any, dynamic: bool | None = None, **options: Any) -> Any:
    chosen = {"prefer": "openvino", **options}
    return torch.compile(module, backend=compile_graph, dynamic=dynamic, options=chosen)


def x(batch: int = 3) -> Tensor:
    return torch.randn(batch, 8)


def counts() -> dict[str, int]:
    """Calls of all graphs by path."""
    total = {"openvino": 0, "mixed": 0, "eager": 0}
    for report in reports():
        for path, count in report.calls.items():
            total[path] += count
    return total


def reasons() -> set[str]:
    return {code for report in reports() for code in report.eager} - {"building"}


def only() -> Report:
    (report,) = reports()
    return report


def checked(fast: Any, module: nn.Module, *args: Any) -> None:
    with torch.no_grad():
        same(fast(*args), module(*args))


# Whole graphs


def test_a_module_is_served_with_its_weights_frozen() -> None:
    net = make(Mlp)
    fast = compiled(net)
    inputs = x()
    with torch.no_grad():
        first = [fast(inputs) for _ in range(3)]
        kept = [answer.clone() for answer in first]
        checked(fast, net, x())
    same(first, kept)  # outputs are the caller's
    assert counts() == {"openvino": 3, "mixed": 0, "eager": 1}
    (plan,) = only().plans
    assert plan["precision_run"] == "f32"
    assert plan["signature"] == "[0]: float32[3, 8]"  # the weights are none of its inputs


def test_sizes_that_change_are_those_that_dynamo_leaves_open() -> None:
    net = make(Mlp)
    fast = compiled(net)
    for batch in (2, 3, 4, 5, 6):
        checked(fast, net, x(batch))
    assert len(reports()) == 2  # the second is for every batch
    assert counts()["openvino"] == 3


def test_several_sizes_that_change_are_open_in_one_plan() -> None:
    net = nn.Linear(8, 4).eval()
    fast = compiled(net)
    for batch, length in ((2, 3), (3, 5), (4, 6), (5, 7)):
        checked(fast, net, torch.randn(batch, length, 8))
    assert counts() == {"openvino": 2, "mixed": 0, "eager": 2}
    assert "[0]: float32[?, ?, 8]" in [report.plans[0]["signature"] for report in reports()]


def test_gradient_modes_share_a_graph() -> None:
    net, inputs = make(Mlp), x()
    fast = compiled(net)
    with torch.inference_mode():
        fast(inputs), fast(inputs)
    checked(fast, net, inputs)
    assert only().calls == {"openvino": 2, "mixed": 0, "eager": 1}


def test_graph_breaks_leave_two_graphs_that_are_served() -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = Mlp(outputs=8), Mlp()

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            torch._dynamo.graph_break()
            return self.last(x)

    net = make(Broken)
    fast = compiled(net)
    for _ in range(3):
        checked(fast, net, x())
    assert counts() == {"openvino": 4, "mixed": 0, "eager": 2}


def test_a_name_tells_torchs_number_and_the_users_line() -> None:
    checked(compiled(net := make(Mlp)), net, x())
    name = only().module
    assert name.startswith("graph 0/0 (modules.py:")
    assert name.endswith(" in forward)")


# Weights


@pytest.mark.slow
def test_weights_that_change_under_it() -> None:
    net, inputs = make(Mlp), x()
    fast = compiled(net)
    checked(fast, net, inputs), checked(fast, net, inputs)
    with torch.no_grad():
        net.first.weight.mul_(2)
    for _ in range(3):
        checked(fast, net, inputs)
    net.last.weight.data = torch.randn_like(net.last.weight)
    for _ in range(3):
        checked(fast, net, inputs)
    other = {name: torch.randn_like(value) for name, value in net.state_dict().items()}
    net.load_state_dict(other, assign=True)
    for _ in range(3):
        checked(fast, net, inputs)
    net.norm.eps = 10.0
    for _ in range(2):
        checked(fast, net, inputs)
    assert counts()["openvino"] > 0


def test_instances_of_a_class_keep_their_weights_apart() -> None:
    nets = [make(Mlp) for _ in range(3)]
    for n, net in enumerate(nets):
        net.load_state_dict({k: v + n for k, v in net.state_dict().items()})
    fasts = [compiled(net) for net in nets]
    for _ in range(3):
        for net, fast in zip(nets, fasts, strict=True):
            checked(fast, net, x())
    assert counts()["openvino"] == 6


def test_sets_of_weights_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_MOST_SETS", 2)
    nets = [make(Mlp) for _ in range(5)]
    fasts = [compiled(net) for net in nets]
    for net, fast in [*zip(nets, fasts, strict=True)] * 2:
        checked(fast, net, x())
    assert len(reports()) == 2


def test_nothing_keeps_the_module() -> None:
    net = make(Mlp)
    fast = compiled(net)
    checked(fast, net, x()), checked(fast, net, x())
    assert counts()["openvino"] == 1
    gone = weakref.ref(net.first.weight)
    del net, fast
    torch._dynamo.reset()
    gc.collect()
    assert gone() is None
    assert reports() == []


# What stays with the graph as it was given


def test_gradients_are_the_graphs_own() -> None:
    net, inputs = make(Mlp), x()
    fast = compiled(net)
    with pytest.warns(ovshim.FallbackWarning, match="Gradients"):
        fast(inputs).sum().backward()
    gradient = net.first.weight.grad
    net.zero_grad()
    net(inputs).sum().backward()
    same(gradient, net.first.weight.grad)
    fast(inputs)  # and is not warned of again
    assert reports() == []


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 4)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        return self.linear(x) * self.calls


def test_a_graph_that_writes_to_a_buffer_does_it_once_a_call() -> None:
    net, inputs = make(Counting), x()
    fast = compiled(net)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", ovshim.FallbackWarning)
        for n in range(1, 6):
            same(fast(inputs), net.linear(inputs) * n)
    assert net.calls == 5
    assert reasons() == {"mutates-buffer"}


def test_a_graph_that_draws_random_numbers() -> None:
    net = nn.Sequential(nn.Linear(8, 4), nn.Dropout(0.5)).train()
    fast = compiled(net)
    inputs = x()
    with torch.no_grad():
        with pytest.warns(ovshim.FallbackWarning, match="random"):
            fast(inputs)
        for seed in range(3):
            torch.manual_seed(seed)
            answer = fast(inputs)
            torch.manual_seed(seed)
            same(answer, net(inputs))
    assert reasons() == {"random"}


# Numbers among the inputs


class Numbers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 4)

    def forward(self, x: Tensor, factor: float, n: int) -> Tensor:
        return self.linear(x).view(x.shape[0] * n, -1) * factor + x.shape[0]


@pytest.mark.parametrize("dynamic", [None, pytest.param(True, marks=pytest.mark.slow)])
def test_numbers_that_change_are_never_baked_in(dynamic: bool | None) -> None:
    net = make(Numbers)
    fast = compiled(net, dynamic=dynamic)
    for factor, n in ((1.5, 1), (2.5, 2), (3.5, 4)):
        checked(fast, net, x(4), factor, n)
        checked(fast, net, x(2), factor, n)
    # Each pair of numbers has its plan: for every batch, but the first where sizes are not open.
    assert counts()["openvino"] == (3 if dynamic else 2)


def test_an_empty_tensor_in_front_of_a_cache() -> None:
    class Cached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            keys = torch.cat([torch.tensor([], dtype=x.dtype), self.linear(x)], dim=-2)
            return keys @ x.transpose(-1, -2), keys

    net = make(Cached)
    fast = compiled(net)
    for _ in range(3):
        checked(fast, net, torch.randn(2, 3, 8))
    assert counts()["openvino"] == 2


# Threads, mistakes, names


def test_threads_call_it_at_once() -> None:
    net = make(Mlp)
    fast = compiled(net)
    wrong: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(30):
                checked(fast, net, x())
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert counts()["openvino"] > 0


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"precision": "fp7"}, "precision"),
        ({"inplace": True}, "inplace"),
        ({"dynamic_shapes": None}, "dynamic_shapes"),
        ({"max_autotune": True}, "max_autotune"),
        ({"device": "GPU.9"}, "device"),
    ],
)
def test_mistakes_are_told(options: dict[str, Any], name: str) -> None:
    fast = torch.compile(make(Mlp), backend=compile_graph, options=options)
    with torch.no_grad(), pytest.raises(torch._dynamo.exc.BackendCompilerFailed) as raised:
        fast(x())
    cause = raised.value.inner_exception
    assert isinstance(cause, ovshim.OptionError)
    assert cause.name == name


def test_a_mode_is_inductors() -> None:
    with pytest.raises(ovshim.OptionError):
        compile_graph(torch.fx.symbolic_trace(make(Mlp)), [], mode="max-autotune")


BY_NAME = """
import torch, ovshim.backend
net = torch.nn.Linear(8, 4).eval()
fast = torch.compile(net, backend="ovshim", options={"prefer": "openvino"})
with torch.no_grad():
    for _ in range(3):
        torch.testing.assert_close(fast(x := torch.randn(2, 8)), net(x))
print(ovshim.backend.reports()[0].calls["openvino"])
"""


@pytest.mark.slow
def test_it_is_found_by_its_name(tmp_path: Path) -> None:
    info = tmp_path / f"ovshim-{ovshim.__version__}.dist-info"
    info.mkdir()
    metadata = f"Metadata-Version: 2.1\nName: ovshim\nVersion: {ovshim.__version__}\n"
    (info / "METADATA").write_text(metadata, encoding="utf-8")
    entry_points = "[torch_dynamo_backends]\novshim = ovshim.backend:compile_graph\n"
    (info / "entry_points.txt").write_text(entry_points, encoding="utf-8")
    own = environment()
    own["PYTHONPATH"] = os.pathsep.join([str(tmp_path), own["PYTHONPATH"]])
    command = [sys.executable, "-c", BY_NAME]
    result = subprocess.run(
        command, env=own, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.stdout == "2\n", result.stderr


# Transformers, with caches of keys and values where they have them


def ids(batch: int, length: int) -> dict[str, Tensor]:
    mask = torch.ones(batch, length, dtype=torch.long)
    return {"input_ids": torch.randint(3, 99, (batch, length)), "attention_mask": mask}


def both(batch: int, length: int) -> dict[str, Tensor]:
    return {**ids(batch, length), "decoder_input_ids": torch.randint(3, 99, (batch, 5))}


def pixels(batch: int, length: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(batch, 3, 32, 32)}


def sound(batch: int, length: int) -> dict[str, Tensor]:
    return {"input_values": torch.randn(batch, 4000 + 100 * length)}


# Name, head, inputs, and whether OpenVINO answers every call that has a plan.
TRANSFORMERS: list[tuple[str, str, Any, bool]] = [
    ("Bert", "ForMaskedLM", ids, True),
    ("Roberta", "ForSequenceClassification", ids, True),
    ("DistilBert", "ForSequenceClassification", ids, True),
    ("Electra", "ForTokenClassification", ids, True),
    ("Albert", "ForMaskedLM", ids, True),
    ("MPNet", "ForMaskedLM", ids, True),
    ("Deberta", "ForMaskedLM", ids, True),
    ("GPT2", "LMHeadModel", ids, True),
    ("GPTNeoX", "ForCausalLM", ids, True),
    ("OPT", "ForCausalLM", ids, True),
    ("Llama", "ForCausalLM", ids, True),
    ("Mistral", "ForCausalLM", ids, True),
    ("Qwen2", "ForCausalLM", ids, True),
    ("Bloom", "ForCausalLM", ids, True),
    ("Mamba", "ForCausalLM", ids, True),
    ("Bart", "ForConditionalGeneration", both, True),
    ("T5", "ForConditionalGeneration", both, True),
    ("ViT", "ForImageClassification", pixels, True),
    ("ResNet", "ForImageClassification", pixels, True),
    ("Wav2Vec2", "ForCTC", sound, True),
]


def test_as_many_as_were_promised_are_served_whole() -> None:
    assert len(TRANSFORMERS) >= 20
    assert sum(whole for *_, whole in TRANSFORMERS) >= 17


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "head", "draw", "whole"), TRANSFORMERS, ids=[name for name, *_ in TRANSFORMERS]
)
@pytest.mark.filterwarnings("ignore")
def test_transformers(name: str, head: str, draw: Any, whole: bool) -> None:
    import transformers

    config = configure(getattr(transformers, f"{name}Config"))
    model = getattr(transformers, f"{name}{head}")(config).eval()
    fast = compiled(model)
    for batch, length in ((1, 8), (2, 8), (2, 12), (3, 16)):
        inputs = draw(batch, length)
        for _ in range(2):
            with torch.no_grad():
                answer, expected = fast(**inputs), model(**inputs)
            assert type(answer) is type(expected)
            same(answer.to_tuple()[0], expected.to_tuple()[0])
    if whole:
        assert reasons() == set()  # eager has answered the first call of each graph
        assert counts()["openvino"] >= 4
        assert counts() == {"openvino": 8 - len(reports()), "mixed": 0, "eager": len(reports())}
