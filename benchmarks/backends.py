"""The ways to run a workload, each by the best technique known for it.

A backend gets a module and the arguments of a call and answers with something to call without
arguments. What it takes to get there (conversion, compilation) is not measured here.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import importlib
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.utils._pytree as pytree
from torch import nn

import ovshim
from ovshim import backend, executed, runtime
from ovshim.bound import installed

__all__ = [
    "TITLES",
    "Prepared",
    "Task",
    "dynamo_as_it_was",
    "leaves_of",
    "lowered_inputs",
    "module_bytes",
    "prepare",
    "raw_request",
    "settle_sizes",
]

TITLES = {
    "eager": "eager",
    "eager-bf16": "eager .bfloat16()",
    "autocast": "eager under autocast",
    "inductor": "torch.compile (inductor, freezing)",
    "dynamo-openvino": 'torch.compile(backend="openvino")',
    "onnxruntime": "ONNX Runtime",
    "openvino": "raw OpenVINO",
    "ovshim-openvino": 'ovshim, prefer="openvino"',
    "ovshim": "ovshim",
    "ovshim-compile": 'torch.compile(backend="ovshim")',
}

# A trial call below this is worth a second compilation for one thread: waking others costs more.
_TINY_SECONDS = 50e-6
_SETTLE_SECONDS = 60.0


@dataclasses.dataclass(frozen=True)
class Task:
    """What a backend is to run; `directory` is for its files."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    directory: Path

    def eager(self) -> Any:
        return self.module(*self.args, **self.kwargs)

    def flat(self) -> tuple[nn.Module, list[torch.Tensor]]:
        """The module as a function from tensors to a tuple of tensors, and those tensors."""
        leaves, spec = pytree.tree_flatten((self.args, self.kwargs))
        return _Flat(self.module, spec).eval(), leaves

    def save(self, directory: Path) -> Path:
        """Convert the module for these very sizes and write the IR, uncompressed."""
        ov = runtime.openvino()
        module, tensors = self.flat()
        model = ov.convert_model(module, example_input=tuple(tensors))
        model.reshape({i: list(tensor.shape) for i, tensor in enumerate(tensors)})
        path = directory / "model.xml"
        ov.save_model(model, str(path), compress_to_fp16=False)
        return path


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A backend that is ready.

    Attributes:
        call: makes one call; this is what is timed.
        outputs: the tensors that `call` answered with, in eager's order.
        precision: what it computes in.
        note: how it runs, where that is not obvious.
        bytes: of the files that it is kept in; None where there are none.
    """

    call: Callable[[], Any]
    outputs: Callable[[Any], list[torch.Tensor]]
    precision: str
    note: str = ""
    bytes: int | None = None


class _Flat(nn.Module):
    def __init__(self, module: nn.Module, spec: pytree.TreeSpec) -> None:
        super().__init__()
        self.module = module
        self.spec = spec

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        args, kwargs = pytree.tree_unflatten(list(tensors), self.spec)
        return tuple(leaves_of(self.module(*args, **kwargs)))


def leaves_of(answer: Any) -> list[torch.Tensor]:
    """The tensors of a module's answer, whatever containers they come in."""
    return [leaf for leaf in pytree.tree_leaves(answer) if isinstance(leaf, torch.Tensor)]


def prepare(name: str, task: Task) -> Prepared:
    """Make a backend ready. Raises whatever the backend raises on a module it cannot take."""
    return _BACKENDS[name](task)


def _eager(task: Task) -> Prepared:
    call = functools.partial(task.module, *task.args, **task.kwargs)
    return Prepared(call, leaves_of, "f32")


def _inductor(task: Task) -> Prepared:
    torch.compiler.reset()
    compiled = torch.compile(task.module, dynamic=False, options={"freezing": True})
    call = functools.partial(compiled, *task.args, **task.kwargs)
    call()
    return Prepared(call, leaves_of, "f32", "static shapes")


def _eager_bf16(task: Task) -> Prepared:
    module = copy.deepcopy(task.module).bfloat16()
    args, kwargs = lowered_inputs((task.args, task.kwargs))
    call = functools.partial(module, *args, **kwargs)
    return Prepared(call, leaves_of, "bf16", "bf16", module_bytes(module))


def module_bytes(module: nn.Module) -> int:
    """What the tensors of a module take."""
    return sum(t.numel() * t.element_size() for t in module.state_dict().values())


def lowered_inputs(given: Any) -> Any:
    """The same with floating tensors in bf16."""
    return pytree.tree_map(_lowered, given)


def _lowered(leaf: Any) -> Any:
    floats = isinstance(leaf, torch.Tensor) and leaf.is_floating_point()
    return leaf.bfloat16() if floats else leaf


def _autocast(task: Task) -> Prepared:
    def call() -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return task.eager()

    return Prepared(call, leaves_of, "bf16, f32", "bf16")


def _dynamo_openvino(task: Task) -> Prepared:
    """OpenVINO's own backend, which computes in bf16 unless it is told otherwise. Weights are
    constants for it under AOT only, which takes fewer models."""
    backend = importlib.import_module("openvino.frontend.pytorch.torchdynamo.backend")
    # The import switches it off, but `dynamo_as_it_was` may have switched it on again.
    torch._dynamo.config.inline_inbuilt_nn_modules = False
    failures = []
    for aot in (True, False):
        torch.compiler.reset()
        backend.openvino_options = {}  # it keeps those of an earlier model
        config = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
        options = {"aot_autograd": aot, "config": config}
        compiled = torch.compile(task.module, backend="openvino", options=options)  # type: ignore[call-overload]
        call = functools.partial(compiled, *task.args, **task.kwargs)
        try:
            call()
            call()
        except Exception as error:  # it raises on many models
            failures.append(error)
            continue
        return Prepared(call, leaves_of, "f32", "by AOT" if aot else "weights are inputs")
    raise failures[0]


@contextlib.contextmanager
def dynamo_as_it_was() -> Iterator[None]:
    """Undoes what OpenVINO's backend changes for the process: our captures go by it as well."""
    import torch._dynamo.config as dynamo

    before = dynamo.inline_inbuilt_nn_modules
    try:
        yield
    finally:
        dynamo.inline_inbuilt_nn_modules = before
        torch.compiler.reset()


def _onnxruntime(task: Task) -> Prepared:
    import onnxruntime  # type: ignore[import-untyped]

    module, tensors = task.flat()
    path = str(task.directory / "model.onnx")
    names = [f"input{i}" for i in range(len(tensors))]
    with warnings.catch_warnings():
        # The exporter by tracing is deprecated; the other one would need onnxscript.
        warnings.simplefilter("ignore")
        torch.onnx.export(module, tuple(tensors), path, input_names=names, dynamo=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feed = {name: tensor.numpy() for name, tensor in zip(names, tensors, strict=True)}
    call = functools.partial(session.run, None, feed)
    return Prepared(call, lambda out: list(map(torch.from_numpy, out)), "f32", "static shapes")


def _openvino(task: Task) -> Prepared:
    """Static shapes, weights from a file, inputs bound once, outputs where the request has them:
    the next call overwrites them, which a caller would have to be content with."""
    path = task.save(task.directory)
    _, tensors = task.flat()
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    compiled = runtime.compile_model(path, "CPU", settings)
    call, note = raw_request(compiled, tensors), "outputs not owned"
    seconds = _typical(call)
    if seconds < _TINY_SECONDS:
        alone = {"INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1, "ENABLE_CPU_PINNING": False}
        one = runtime.compile_model(path, "CPU", {**settings, **alone})
        rival = raw_request(one, tensors)
        if _typical(rival) < seconds:
            call, compiled, note = rival, one, f"{note}, one thread"

    def outputs(answer: Any) -> list[torch.Tensor]:
        return [torch.from_numpy(array.copy()) for array in answer.values()]

    return Prepared(call, outputs, executed.precision_run(compiled), note)


def raw_request(compiled: Any, tensors: Sequence[torch.Tensor]) -> Callable[[], Any]:
    """A call of a compiled model, with nothing around it, on inputs that are bound once."""
    from openvino._pyopenvino import InferRequest

    request = compiled.create_infer_request()
    bound = [runtime.openvino().Tensor(x.contiguous().numpy(), shared_memory=True) for x in tensors]
    for i, tensor in enumerate(bound):
        request.set_input_tensor(i, tensor)
    # The base class's infer: openvino.InferRequest's own adds 15 µs of conveniences.
    call = functools.partial(InferRequest.infer, request, {}, True, False)
    # A request keeps nothing alive of what was bound to it.
    call.keep = (compiled, bound, list(tensors))  # type: ignore[attr-defined]
    return call


def _typical(call: Callable[[], Any], calls: int = 50) -> float:
    times = []
    for _ in range(calls):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
        if sum(times) > 0.2:
            break
    return sorted(times)[len(times) // 2]


def _ovshim(task: Task, prefer: Literal["faster", "openvino"]) -> Prepared:
    example = task.args if task.args else None
    fast = ovshim.accelerate(
        task.module,
        example,
        example_kwargs=task.kwargs or None,
        prefer=prefer,
        cache_dir=task.directory / "cache",
    )
    call = functools.partial(fast, *task.args, **task.kwargs)
    call()
    settle_sizes(fast, call)
    plan = ovshim.explain(fast).to_dict()["plans"][0]
    if plan["reason"] is not None:
        note = f"eager serves: {plan['reason']['code']}"
    else:
        note = f"OpenVINO serves, by {plan['route']}"
        note += ", these sizes alone" if "exact sizes" in (plan["way"] or "") else ""
    return Prepared(call, leaves_of, plan["precision_run"] or "f32", note)


def settle_sizes(fast: nn.Module, call: Callable[[], Any]) -> Any:
    """Go on calling, as a program does, until it is found out whether these sizes have a graph for
    themselves alone. Returns the one plan."""
    (plan,) = installed(fast)["forward"].dispatcher.plans  # type: ignore[attr-defined]
    started = time.perf_counter()
    while plan.path == "openvino" and plan.served.engine.rival is not None:
        if time.perf_counter() - started > _SETTLE_SECONDS:
            raise RuntimeError(f"not settled after {_SETTLE_SECONDS} s")
        call()
    return plan


def _compiled(task: Task) -> Prepared:
    torch.compiler.reset()
    options = {"prefer": "openvino", "cache_dir": str(task.directory / "graphs")}
    compiled = torch.compile(
        task.module, backend=backend.compile_graph, dynamic=False, options=options
    )
    call = functools.partial(compiled, *task.args, **task.kwargs)
    call()
    plans = [plan for report in backend.reports() for plan in report.plans]
    served = sum(plan["path"] == "openvino" for plan in plans)
    note = f"OpenVINO serves {served} of {len(plans)} graphs"
    precisions = {plan["precision_run"] for plan in plans if plan["precision_run"]}
    return Prepared(call, leaves_of, ", ".join(sorted(precisions)) or "f32", note)


_BACKENDS: dict[str, Callable[[Task], Prepared]] = {
    "eager": _eager,
    "eager-bf16": _eager_bf16,
    "autocast": _autocast,
    "inductor": _inductor,
    "dynamo-openvino": _dynamo_openvino,
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
    "ovshim-openvino": functools.partial(_ovshim, prefer="openvino"),
    "ovshim": functools.partial(_ovshim, prefer="faster"),
    "ovshim-compile": _compiled,
}
