"""What torch does with modules, and who answers when it does so with an accelerated one.

`python -m compatibility docs/compatibility.md`, run in `tests`, writes the page of it; that it is
true, `test_compatibility.py` finds out.
"""

import copy
import dataclasses
import functools
import io
import pickle
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import ovshim


class Model(nn.Module):
    """[batch, 8] → [batch, 4], by a part that is of use alone."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
        self.norm = nn.BatchNorm1d(8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return self.head(self.norm(self.encoder(x)).tanh()) * scale

    def classify(self, x: Tensor) -> Tensor:
        return self(x).argmax(-1)


X = torch.linspace(-2, 2, 24).view(3, 8)

Use = Callable[[Any], "tuple[Any, Any]"]
"""Takes the model, and gives what is compared with a plain model's, and the accelerated module that
was called on the way (None: there is none)."""


@dataclasses.dataclass(frozen=True)
class Feature:
    """One thing that torch does with modules.

    Attributes:
        code: how it is written, for the page.
        who: answers: "OpenVINO", or "eager" (the module's own method, run as ever or seen through).
    """

    group: str
    code: str
    who: str
    use: Use
    note: str = ""


FEATURES: list[Feature] = []


def feature(group: str, code: str, who: str, note: str = "") -> Callable[[Use], Use]:
    def add(use: Use) -> Use:
        FEATURES.append(Feature(group, code, who, use, note))
        return use

    return add


def answers(model: Any, *args: Any, **kwargs: Any) -> list[Any]:
    """Three answers: at the first a plan may still have to be made."""
    args = args or (X,)
    with torch.inference_mode():
        return [model(*args, **kwargs) for _ in range(3)]


# Calling

CALLING = "Calling"


@feature(CALLING, "with torch.inference_mode(): fast(x)", "OpenVINO")
def _(m: Any) -> Any:
    return answers(m), m


@feature(CALLING, "with torch.no_grad(): fast(x)", "OpenVINO")
def _(m: Any) -> Any:
    with torch.no_grad():
        return [m(X) for _ in range(3)], m


@feature(CALLING, "fast(x)", "OpenVINO", "with gradients, see below")
def _(m: Any) -> Any:
    return [m(X) for _ in range(3)], m


@feature(CALLING, "fast.forward(x)", "OpenVINO")
def _(m: Any) -> Any:
    return answers(m.forward), m


@feature(CALLING, "fast.classify(x)", "OpenVINO", "a method of the user's that calls `self(x)`")
def _(m: Any) -> Any:
    return answers(m.classify), m


@feature(CALLING, "fast(x, scale=2.0)", "OpenVINO", "constants get plans of their own")
def _(m: Any) -> Any:
    return answers(m, X, scale=2.0), m


@feature(CALLING, "nn.Sequential(fast, head)", "OpenVINO")
def _(m: Any) -> Any:
    torch.manual_seed(1)
    return answers(nn.Sequential(m, nn.Linear(4, 2))), m


@feature(CALLING, "fast as an attribute of another module", "OpenVINO")
def _(m: Any) -> Any:
    outer = nn.Module()
    outer.inner = m
    outer.forward = lambda x: outer.inner(x) * 2  # type: ignore[method-assign]
    return [answers(outer), list(outer.state_dict())], m


@feature(CALLING, "fast.encoder(x)", "eager", "accelerate the part itself if it is called alone")
def _(m: Any) -> Any:
    return answers(m.encoder), m


@feature(CALLING, "map(fast, batches), fast in threads", "OpenVINO")
def _(m: Any) -> Any:
    from concurrent.futures import ThreadPoolExecutor

    def call(x: Tensor) -> Tensor:
        with torch.inference_mode():
            return m(x)

    answers(m)
    with ThreadPoolExecutor(3) as pool:
        return list(pool.map(call, [X, X + 1, X * 2])), m


# Gradients

GRADIENTS = "Gradients"


def gradients(m: Any) -> list[Any]:
    return [parameter.grad for parameter in m.parameters()]


@feature(GRADIENTS, "fast(x).sum().backward()", "OpenVINO", "recomputed in eager, once")
def _(m: Any) -> Any:
    m(X)
    m(X).square().sum().backward()
    return gradients(m), m


@feature(GRADIENTS, "torch.autograd.grad(y, fast.parameters())", "OpenVINO", "as above")
def _(m: Any) -> Any:
    m(X)
    return torch.autograd.grad(m(X).square().sum(), list(m.parameters())), m


@feature(GRADIENTS, "x.requires_grad_(); fast(x)", "eager")
def _(m: Any) -> Any:
    x = X.clone().requires_grad_()
    m(x).square().sum().backward()
    return [x.grad, gradients(m)], m


@feature(GRADIENTS, "torch.autograd.functional.jacobian(fast, x)", "eager")
def _(m: Any) -> Any:
    return torch.autograd.functional.jacobian(m, X), m


@feature(GRADIENTS, "torch.utils.checkpoint.checkpoint(fast, x)", "eager")
def _(m: Any) -> Any:
    y = torch.utils.checkpoint.checkpoint(m, X, use_reentrant=False)
    y.square().sum().backward()
    return gradients(m), m


@feature(GRADIENTS, "fast.requires_grad_(False), a head behind it trained", "OpenVINO")
def _(m: Any) -> Any:
    torch.manual_seed(1)
    head = nn.Linear(4, 2)
    m.requires_grad_(False)
    optimizer = torch.optim.SGD(head.parameters(), 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        head(m(X)).square().sum().backward()
        optimizer.step()
    return list(head.parameters()), m


@feature(GRADIENTS, "fast.train(), optimizer steps, fast.eval()", "OpenVINO", "eager in training")
def _(m: Any) -> Any:
    optimizer = torch.optim.AdamW(m.parameters(), 0.01)
    m.train()
    for _ in range(2):
        optimizer.zero_grad()
        m(X).square().sum().backward()
        optimizer.step()
    m.eval()
    return [answers(m), m.state_dict()], m


@feature(GRADIENTS, "torch.autograd.forward_ad", "eager")
def _(m: Any) -> Any:
    from torch.autograd import forward_ad

    with forward_ad.dual_level():
        y = m(forward_ad.make_dual(X, torch.ones_like(X)))
        return list(forward_ad.unpack_dual(y)), m


@feature(GRADIENTS, "torch.autocast", "eager")
def _(m: Any) -> Any:
    with torch.autocast("cpu", torch.bfloat16):
        return answers(m), m


# Compilers

COMPILERS = "Compilers and tracers"


@feature(COMPILERS, "torch.compile(fast)", "eager", "the compiler sees the original")
def _(m: Any) -> Any:
    torch._dynamo.reset()
    compiled = torch.compile(m, backend="aot_eager", fullgraph=True)
    return [answers(compiled), list(compiled.state_dict())], m


@feature(COMPILERS, "fast.compile()", "eager", "the same")
def _(m: Any) -> Any:
    torch._dynamo.reset()
    m.compile(backend="eager", fullgraph=True)
    return answers(m), m


@feature(COMPILERS, "torch.compile of a function that calls fast", "eager", "the same")
def _(m: Any) -> Any:
    torch._dynamo.reset()
    return answers(torch.compile(lambda x: m(x).relu(), backend="eager", fullgraph=True)), m


@feature(COMPILERS, "torch.export.export(fast, (x,))", "eager", "the program is the original's")
def _(m: Any) -> Any:
    program = torch.export.export(m, (X,))
    return [program.module()(X), sorted(program.state_dict)], m


@feature(COMPILERS, "torch.export.export(fast, (x,), strict=True)", "eager", "the same")
def _(m: Any) -> Any:
    torch._dynamo.reset()
    return torch.export.export(m, (X,), strict=True).module()(X), m


@feature(
    COMPILERS,
    "torch.jit.trace(fast, x)",
    "eager",
    "the trace is the original's; it is checked by a call",
)
def _(m: Any) -> Any:
    with torch.no_grad():
        return torch.jit.trace(m, X, check_trace=False)(X), m


@feature(COMPILERS, "torch.jit.script(fast)", "eager", "the script is the original's")
def _(m: Any) -> Any:
    return torch.jit.script(m)(X), m


@feature(COMPILERS, "torch.fx.symbolic_trace(fast)", "eager", "the graph is the original's")
def _(m: Any) -> Any:
    graph = torch.fx.symbolic_trace(m)
    return [graph(X), str(graph.graph)], m


@feature(COMPILERS, "torch.fx.experimental.proxy_tensor.make_fx(fast)(x)", "eager", "the same")
def _(m: Any) -> Any:
    from torch.fx.experimental.proxy_tensor import make_fx

    with torch.no_grad():
        return make_fx(m)(X)(X), m


@feature(COMPILERS, "ovshim.accelerate(fast)", "OpenVINO", "accelerated anew")
def _(m: Any) -> Any:
    again = ovshim.accelerate(m, prefer="openvino") if "ovshim" in vars(m) else m
    return answers(again), again


# torch.func

FUNC = "torch.func"


def weights_of(m: Any) -> dict[str, Tensor]:
    return {name: parameter.detach() * 2 for name, parameter in m.named_parameters()}


@feature(FUNC, "torch.func.functional_call(fast, weights, (x,))", "eager")
def _(m: Any) -> Any:
    return torch.func.functional_call(m, weights_of(m), (X,)), m


@feature(FUNC, "torch.func.vmap(fast)(x)", "eager")
def _(m: Any) -> Any:
    return torch.func.vmap(m)(X.view(3, 1, 8)), m


@feature(FUNC, "torch.func.grad of functional_call", "eager")
def _(m: Any) -> Any:
    def loss(weights: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(m, weights, (X,)).square().sum()

    return torch.func.grad(loss)(weights_of(m)), m


@feature(FUNC, "torch.func.jacrev(fast)(x)", "eager")
def _(m: Any) -> Any:
    return torch.func.jacrev(m)(X), m


@feature(FUNC, "torch.func.jvp(fast, (x,), (v,))", "eager")
def _(m: Any) -> Any:
    return list(torch.func.jvp(m, (X,), (torch.ones_like(X),))), m


@feature(FUNC, "torch.func.stack_module_state([fast, other])", "eager")
def _(m: Any) -> Any:
    parameters, buffers = torch.func.stack_module_state([m, copy.deepcopy(m)])

    def call(parameters: Any, buffers: Any) -> Any:
        return torch.func.functional_call(m, (parameters, buffers), (X,))

    return torch.func.vmap(call)(parameters, buffers), m


# Wrappers

WRAPPERS = "Wrappers for several processes"


@contextmanager
def alone() -> Iterator[None]:
    """A process group of one."""
    import torch.distributed as dist

    with tempfile.TemporaryDirectory() as directory:
        store = dist.FileStore(f"{directory}/store", 1)
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        try:
            yield
        finally:
            dist.destroy_process_group()


@feature(WRAPPERS, "DistributedDataParallel(fast)", "OpenVINO")
def _(m: Any) -> Any:
    with alone():
        wrapped = nn.parallel.DistributedDataParallel(m)
        result = answers(wrapped)
        wrapped(X).square().sum().backward()
        return [result, gradients(m)], m


@feature(
    WRAPPERS, "torch.distributed.fsdp.fully_shard(fast)", "eager", "reason `untracked-weights`"
)
def _(m: Any) -> Any:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    with alone():
        sharded = copy.deepcopy(m)
        fully_shard(sharded, mesh=init_device_mesh("cpu", (1,)))
        with torch.no_grad():
            return [sharded(X) for _ in range(4)], sharded


@feature(WRAPPERS, "nn.DataParallel(fast)", "OpenVINO")
def _(m: Any) -> Any:
    return answers(nn.DataParallel(m)), m


@feature(WRAPPERS, "torch.optim.swa_utils.AveragedModel(fast)", "OpenVINO")
def _(m: Any) -> Any:
    averaged = torch.optim.swa_utils.AveragedModel(m)
    averaged.update_parameters(m)
    averaged.eval()
    return answers(averaged), averaged.module


@feature(WRAPPERS, "fast.share_memory()", "OpenVINO")
def _(m: Any) -> Any:
    return answers(m.share_memory()), m


# Methods of nn.Module

METHODS = "Methods of nn.Module"


@feature(METHODS, "named_modules, named_parameters, named_buffers, children", "OpenVINO")
def _(m: Any) -> Any:
    names = [name for name, _ in m.named_modules()] + [name for name, _ in m.named_buffers()]
    names += [type(child).__name__ for child in m.children()]
    return [answers(m), names, dict(m.named_parameters()), repr(m)], m


@feature(METHODS, "apply(function)", "OpenVINO")
def _(m: Any) -> Any:
    def fill(inner: nn.Module) -> None:
        if isinstance(inner, nn.Linear):
            nn.init.constant_(inner.weight, 0.1)

    answers(m)
    return answers(m.apply(fill)), m


@feature(METHODS, "state_dict, load_state_dict", "OpenVINO")
def _(m: Any) -> Any:
    state = {name: tensor * 2 for name, tensor in m.state_dict().items()}
    answers(m)
    m.load_state_dict(state)
    return answers(m), m


@feature(METHODS, "load_state_dict(assign=True)", "OpenVINO")
def _(m: Any) -> Any:
    state = {name: tensor * 2 for name, tensor in m.state_dict().items()}
    answers(m)
    m.load_state_dict(state, assign=True)
    return answers(m), m


@feature(METHODS, "to(torch.bfloat16)", "OpenVINO")
def _(m: Any) -> Any:
    answers(m)
    m.to(torch.bfloat16)
    return [y.dtype for y in answers(m, X.bfloat16())], m


@feature(METHODS, 'to("meta")', "eager")
def _(m: Any) -> Any:
    m.to("meta")
    return [y.shape for y in answers(m, X.to("meta"))], m


@feature(METHODS, "register_forward_hook on fast", "OpenVINO", "before and behind OpenVINO")
def _(m: Any) -> Any:
    met: list[Any] = []
    m.register_forward_pre_hook(lambda m, args: met.append(args))
    m.register_forward_hook(lambda m, args, y: y * 2)
    return [answers(m), met], m


@feature(METHODS, "register_forward_hook on fast.encoder", "eager", "reason `inner-hooks`")
def _(m: Any) -> Any:
    met: list[Any] = []
    handle = m.encoder.register_forward_hook(lambda m, args, y: met.append(y))
    result = answers(m)
    handle.remove()
    return [result, met], m


@feature(METHODS, "torch.nn.modules.module.register_module_forward_hook", "eager", "the same")
def _(m: Any) -> Any:
    from torch.nn.modules.module import register_module_forward_hook

    met: list[Any] = []
    handle = register_module_forward_hook(lambda m, args, y: met.append(type(m).__name__))
    try:
        return [answers(m), met], m
    finally:
        handle.remove()


@feature(METHODS, "register_full_backward_hook on fast", "OpenVINO")
def _(m: Any) -> Any:
    met: list[Any] = []
    m.register_full_backward_pre_hook(lambda m, grads: met.append(grads[0].clone()))
    m(X)
    m(X).square().sum().backward()
    return [met, gradients(m)], m


@feature(METHODS, "fast.head = another module", "OpenVINO", "structure is the twin's own")
def _(m: Any) -> Any:
    answers(m)
    torch.manual_seed(1)
    m.head = nn.Linear(8, 2)
    return answers(m), m


# torch.nn.utils

UTILS = "torch.nn.utils"


@feature(UTILS, "prune.l1_unstructured", "eager", "it works by a hook: `prune.remove` first")
def _(m: Any) -> Any:
    prune.l1_unstructured(m.head, "weight", 0.5)
    return answers(m), m


@feature(UTILS, "prune.remove", "OpenVINO")
def _(m: Any) -> Any:
    prune.l1_unstructured(m.head, "weight", 0.5)
    prune.remove(m.head, "weight")
    return answers(m), m


@feature(UTILS, "parametrizations.weight_norm", "OpenVINO")
def _(m: Any) -> Any:
    parametrizations.weight_norm(m.head)
    return answers(m.eval()), m


@feature(
    UTILS, "parametrizations.orthogonal", "OpenVINO", "remove_parametrizations first, or eager"
)
def _(m: Any) -> Any:
    torch.manual_seed(0)
    parametrizations.orthogonal(m.head)
    parametrize.remove_parametrizations(m.head, "weight")
    return answers(m.eval()), m


@feature(UTILS, "parametrize.cached()", "OpenVINO")
def _(m: Any) -> Any:
    parametrizations.weight_norm(m.head)
    m.eval()
    result = answers(m)
    with parametrize.cached():
        return [result, answers(m)], m


@feature(UTILS, "parameters_to_vector, vector_to_parameters", "OpenVINO")
def _(m: Any) -> Any:
    vector = nn.utils.parameters_to_vector(m.parameters()).detach()
    answers(m)
    nn.utils.vector_to_parameters(vector * 2, m.parameters())
    return answers(m), m


@feature(UTILS, "clip_grad_norm_", "OpenVINO")
def _(m: Any) -> Any:
    m(X)
    m(X).square().sum().backward()
    norm = nn.utils.clip_grad_norm_(m.parameters(), 0.1)
    return [norm, gradients(m)], m


@feature(UTILS, "torch.ao.quantization.quantize_dynamic(fast)", "eager")
def _(m: Any) -> Any:
    quantized = torch.ao.quantization.quantize_dynamic(m, {nn.Linear}, torch.qint8)
    return answers(quantized), quantized


# Copies

COPIES = "Copies and files"


@feature(COPIES, "copy.deepcopy(fast)", "OpenVINO")
def _(m: Any) -> Any:
    copied = copy.deepcopy(m)
    return answers(copied), copied


@feature(COPIES, "copy.copy(fast)", "OpenVINO")
def _(m: Any) -> Any:
    copied = copy.copy(m)
    return answers(copied), copied


@feature(COPIES, "pickle.loads(pickle.dumps(fast))", "OpenVINO")
def _(m: Any) -> Any:
    copied = pickle.loads(pickle.dumps(m))
    return answers(copied), copied


@feature(COPIES, "torch.save(fast), torch.load(weights_only=False)", "OpenVINO")
def _(m: Any) -> Any:
    file = io.BytesIO()
    torch.save(m, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    return answers(loaded), loaded


@feature(COPIES, "torch.save(fast.state_dict())", "OpenVINO", "and into a plain module")
def _(m: Any) -> Any:
    file = io.BytesIO()
    torch.save(m.state_dict(), file)
    file.seek(0)
    plain = Model().eval()
    plain.load_state_dict(torch.load(file))
    return [answers(m), answers(plain)], m


# Tools

TOOLS = "Tools"


@feature(TOOLS, "torch.profiler.profile", "OpenVINO", "OpenVINO's operators are not seen")
def _(m: Any) -> Any:
    answers(m)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        return answers(m), m


@feature(TOOLS, "torch.utils.flop_counter.FlopCounterMode", "eager", "it counts operators")
def _(m: Any) -> Any:
    counter = torch.utils.flop_counter.FlopCounterMode(display=False)
    with counter:
        result = answers(m)
    return [result, counter.get_total_flops()], m


@feature(TOOLS, "torch.utils.benchmark.Timer", "OpenVINO")
def _(m: Any) -> Any:
    from torch.utils.benchmark import Timer

    with torch.no_grad():
        m(X)
        Timer("m(x)", globals={"m": m, "x": X}).timeit(2)
    return answers(m), m


@feature(TOOLS, 'torch.set_default_device("cpu")', "OpenVINO")
def _(m: Any) -> Any:
    with torch.device("cpu"):
        return answers(m), m


@feature(TOOLS, "inspect.signature(fast.forward), isinstance, type(fast)", "OpenVINO")
def _(m: Any) -> Any:
    import inspect

    facts = [str(inspect.signature(m.forward)), isinstance(m, Model), type(m) is Model]
    return [answers(m), facts], m


@feature(TOOLS, "functools.partial(fast, scale=2.0)", "OpenVINO")
def _(m: Any) -> Any:
    return answers(functools.partial(m, scale=2.0)), m


HEAD = """\
# What torch does with an accelerated module

Written by `python -m compatibility` of the matrix in `tests/compatibility.py`; do not edit. Each
line is run by the tests, on a plain module and on its twin, and comes to the same. In the last
column stands who answers there: OpenVINO, or eager, which is the module's own method, run as ever,
or seen through by what compiles and traces.

Beside these, inputs that PyTorch's own tests have for every module of `torch.nn`
(`torch.testing._internal.common_modules.module_db`) are given to each module and to its twin. All
but nine of the losses and the two random poolings are answered by OpenVINO.
"""


def page() -> str:
    """docs/compatibility.md."""
    lines = [HEAD]
    for group in dict.fromkeys(feature.group for feature in FEATURES):
        lines += [f"## {group}", "", "| | answered by |", "|---|---|"]
        for feature in FEATURES:
            if feature.group == group:
                note = f": {feature.note}" if feature.note else ""
                lines.append(f"| `{feature.code}` | {feature.who}{note} |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page(), encoding="utf-8")
