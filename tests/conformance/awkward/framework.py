"""What else torch and Python can do inside a forward."""

from __future__ import annotations

import contextlib
import contextvars
import copy
import functools
import logging
import threading
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from conformance.awkward.dtypes import Apply
from conformance.awkward.registering import awkward, sequences
from conformance.awkward.values import Linear
from conformance.drawing import Part, draw, normal, of
from conformance.entries import call

X = normal("B", 8)


def applied(name: str, function: Callable[..., Any], *parts: Part, **fields: Any) -> None:
    awkward(f"framework/{name}", draw(*(parts or (X,))), **fields)(lambda: Apply(function))


class Scripted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        if bool(x.sum() > 0):
            return self.linear(x)
        return self.linear(x) * 2


@awkward("framework/scripted-submodule", seeds=5)
class ScriptedSubmodule(Linear):
    """It branches on values, which no trace through it may freeze."""

    def __init__(self) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.inner = torch.jit.script(Scripted())

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.linear(x))


@awkward("framework/scripted")
def _scripted() -> nn.Module:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))

        def forward(self, x: Tensor) -> Tensor:
            return self.layers(x)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(Plain().eval(), torch.zeros(2, 8))


@awkward("framework/prints")
class Prints(Linear):
    def forward(self, x: Tensor) -> Tensor:
        print("forward", x.shape)
        return self.linear(x)


@awkward("framework/logs")
class Logs(Linear):
    def forward(self, x: Tensor) -> Tensor:
        logging.getLogger("conformance").debug("called with %s", x.shape)
        return self.linear(x)


@awkward("framework/warns")
class Warns(Linear):
    def forward(self, x: Tensor) -> Tensor:
        warnings.warn("called", stacklevel=2)
        return self.linear(x)


class Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0]


@awkward("framework/autograd-function")
class AutogradFunction(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return Straight.apply(self.linear(x) * 4)  # type: ignore[no-any-return]


@awkward("framework/gradient-inside")
class GradientInside(Linear):
    """Answers with a gradient, whatever the mode of the caller."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.inference_mode(False), torch.enable_grad():
            point = x.clone().requires_grad_()
            (slope,) = torch.autograd.grad(self.linear(point).tanh().sum(), point)
        return slope.detach()


@awkward("framework/mapped")
class Mapped(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return torch.func.vmap(lambda row: self.linear(row).softmax(0))(x)


@awkward("framework/differentiated")
class Differentiated(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return torch.func.grad(lambda point: self.linear(point).tanh().sum())(x)


@awkward("framework/jacobian")
class Jacobian(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return torch.func.vmap(torch.func.jacrev(lambda row: self.linear(row).tanh()))(x)


@awkward("framework/functional-call")
class FunctionalCall(Linear):
    def forward(self, x: Tensor) -> Tensor:
        doubled = {name: 2 * weight for name, weight in self.linear.named_parameters()}
        return torch.func.functional_call(self.linear, doubled, (x,))  # type: ignore[no-any-return]


@awkward("framework/checkpointed")
class Checkpointed(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.linear, x, use_reentrant=False)  # type: ignore[no-any-return]


@awkward("framework/grad-switched")
class GradSwitched(Linear):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = self.linear(x)
        with torch.set_grad_enabled(False):
            return y + self.linear(y)


@awkward("framework/compiled-submodule")
class CompiledSubmodule(Linear):
    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.compile(nn.Linear(8, 8), backend="eager")

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.linear(x))  # type: ignore[no-any-return]


@awkward("framework/conditional", seeds=4)
class Conditional(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda y: y * 2, lambda y: y - 1, (self.linear(x),))


@awkward("framework/copied-inside")
class CopiedInside(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return copy.deepcopy(self.linear)(x)


@awkward("framework/tries", others={"caught": lambda: call(torch.randn(2, 9))})
class Tries(Linear):
    """Answers where its part raises."""

    def forward(self, x: Tensor) -> Tensor:
        try:
            return self.linear(x)
        except RuntimeError:
            return x.sum(-1)


class Refused(Exception):
    """An exception of the user's own."""

    def __init__(self, size: int, limit: int) -> None:
        super().__init__(f"{size} over {limit}")
        self.size = size


@awkward("framework/refuses-sizes", batches=(1, 2, 3, 5, 9))
class RefusesSizes(Linear):
    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] > 4:
            raise Refused(x.shape[0], 4)
        return self.linear(x)


@awkward("framework/context-manager")
class ContextManager(Linear):
    def __init__(self) -> None:
        super().__init__()
        self.scale = 1.0

    @contextlib.contextmanager
    def scaled(self, value: float) -> Any:
        before, self.scale = self.scale, value
        try:
            yield
        finally:
            self.scale = before

    def forward(self, x: Tensor) -> Tensor:
        with self.scaled(3.0):
            return self.linear(x) * self.scale


VARIABLE: contextvars.ContextVar[float] = contextvars.ContextVar("VARIABLE", default=2.0)


@awkward("framework/context-variable")
class ContextVariable(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * VARIABLE.get()


@functools.lru_cache(maxsize=8)
def _positions(length: int) -> Tensor:
    return torch.arange(length, dtype=torch.float32)[:, None].sin()


@sequences("framework/cached-function")
class CachedFunction(Linear):
    """A table from a cache of functions: the same tensor object for each length."""

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + _positions(x.shape[1])


@awkward("framework/thread-inside")
class ThreadInside(Linear):
    def forward(self, x: Tensor) -> Tensor:
        found: list[Tensor] = []
        thread = threading.Thread(target=lambda: found.append(x * 2))
        thread.start()
        thread.join()
        return self.linear(x) + found[0]


@awkward("framework/clock")
class Clock(Linear):
    """Reads the clock and does nothing with it that shows."""

    def forward(self, x: Tensor) -> Tensor:
        started = time.perf_counter()
        y = self.linear(x)
        return y * (1.0 if time.perf_counter() >= started else 2.0)


@awkward("framework/recursion")
class Recursion(Linear):
    def halve(self, x: Tensor, depth: int) -> Tensor:
        return x if depth == 0 else self.halve(torch.tanh(self.linear(x)), depth - 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.halve(x, 3)


@awkward("framework/generators-and-lambdas")
class GeneratorsAndLambdas(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({"b": nn.Linear(8, 8), "a": nn.Linear(8, 8)})
        self.scales = nn.ParameterList(torch.rand(8) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        steps = (
            layer(x) * scale for layer, scale in zip(self.layers.values(), self.scales, strict=True)
        )
        return functools.reduce(lambda a, b: a + torch.relu(b), steps)


@awkward("framework/accelerated-inside")
class AcceleratedInside(Linear):
    def __init__(self) -> None:
        super().__init__()
        import ovshim

        inner = nn.Sequential(nn.Linear(8, 8), nn.ReLU()).eval()
        self.inner = ovshim.accelerate(inner, prefer="openvino", cache_dir=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.linear(x))


@awkward("framework/forked")
class Forked(Linear):
    def forward(self, x: Tensor) -> Tensor:
        future = torch.jit.fork(self.linear, x)
        return x + torch.jit.wait(future)


@torch.library.custom_op("conformance::tripled", mutates_args=())
def tripled(x: Tensor) -> Tensor:
    return x * 3


@tripled.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@awkward("framework/custom-operator")
class CustomOperator(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(tripled(self.linear(x)))


class Meters(torch.Tensor):
    """A tensor subclass that stays one through every function."""


@awkward("framework/subclass-inside", path="eager")
class SubclassInside(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).as_subclass(Meters) * 2


applied("fourier", lambda x: (torch.fft.rfft(x).abs(), torch.fft.irfft(torch.fft.rfft(x), n=8)))
applied("fourier-complex", lambda x: torch.fft.fft2(x[:, None] * x[:, :, None]).real)
applied(
    "spectrogram",
    lambda x: torch.stft(x, 16, 4, window=torch.hann_window(16), return_complex=True).abs(),
    normal("B", 64),
)
applied(
    "spectrogram-and-back",
    lambda x: torch.istft(
        torch.stft(x, 16, 4, window=torch.ones(16), return_complex=True),
        16,
        4,
        window=torch.ones(16),
    ),
    normal("B", 64),
)
applied("inverse", lambda x: torch.linalg.inv(x @ x.mT + torch.eye(4)), normal("B", 4, 4))
applied("solved", lambda x: torch.linalg.solve(x @ x.mT + torch.eye(4), x), normal("B", 4, 4))
applied("cholesky", lambda x: torch.linalg.cholesky(x @ x.mT + torch.eye(4)), normal("B", 4, 4))
applied("determinant", lambda x: (torch.linalg.det(x), torch.linalg.slogdet(x)), normal("B", 4, 4))
applied("decomposed", lambda x: torch.linalg.svdvals(x), normal("B", 4, 3))
applied("eigenvalues", lambda x: torch.linalg.eigvalsh(x + x.mT), normal("B", 4, 4))
applied("matrix-exponential", lambda x: torch.matrix_exp(x * 0.1), normal("B", 4, 4))
applied("sparse-inside", lambda x: torch.sparse.mm(torch.eye(8).to_sparse(), x.t()))
applied("sparse-out", lambda x: x.relu().to_sparse(), path="eager")
applied(
    "sparse-in",
    lambda x: torch.sparse.mm(x, torch.ones(8, 2)),
    of(lambda t: t.relu().to_sparse(), X),
    path="eager",
)
applied("nested-inside", lambda x: torch.nested.nested_tensor([x, x[:1]]).to_padded_tensor(0.0))
applied(
    "constant-folding", lambda x: x + torch.ones(8).cumsum(0).softmax(0) * torch.arange(8).sum()
)
applied("data-attribute", lambda x: x.data * 2 + x.detach())
applied("type-checks", lambda x: x * 2 if isinstance(x, Tensor) and type(x) is Tensor else x)
applied("set-flags", lambda x: F.dropout(x.clone().requires_grad_(False), 0.0, True) * 2)
