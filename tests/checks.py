"""What each test of behaviour does: call, compare with eager, see by `explain` which path ran."""

import copy
import dataclasses
import enum
import os
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

import ovshim
from ovshim.bound import installed

ROOT = Path(__file__).parents[1]


def same(actual: Any, expected: Any, tolerance: float = 1e-4, where: str = "output") -> None:
    """Assert that two outputs are alike: containers, constants, dtypes, shapes and values.

    Floating values by relative L2 error per tensor, NaN and infinity at the same places; integers
    and booleans exactly.
    """
    assert type(actual) is type(expected), f"{where}: {type(actual)} for {type(expected)}"
    if isinstance(expected, torch.Tensor):
        _same_tensor(actual, expected, tolerance, where)
    elif isinstance(expected, Mapping):
        assert list(actual) == list(expected), f"{where}: other keys"
        for key in expected:
            same(actual[key], expected[key], tolerance, f"{where}[{key!r}]")
    elif isinstance(expected, list | tuple):
        assert len(actual) == len(expected), f"{where}: another length"
        for index, (one, other) in enumerate(zip(actual, expected, strict=True)):
            same(one, other, tolerance, f"{where}[{index}]")
    elif dataclasses.is_dataclass(expected):
        for field in dataclasses.fields(expected):
            one, other = getattr(actual, field.name), getattr(expected, field.name)
            same(one, other, tolerance, f"{where}.{field.name}")
    elif isinstance(expected, np.ndarray):
        np.testing.assert_array_equal(actual, expected, where)
    elif hasattr(expected, "__dict__") and not isinstance(expected, enum.Enum | type):
        same(vars(actual), vars(expected), tolerance, f"vars({where})")
    else:
        alike = actual == expected or (actual != actual and expected != expected)  # NaN
        assert alike, f"{where}: {actual!r} for {expected!r}"


def _same_tensor(
    actual: torch.Tensor, expected: torch.Tensor, tolerance: float, where: str
) -> None:
    assert actual.dtype == expected.dtype, f"{where}: {actual.dtype} for {expected.dtype}"
    assert actual.shape == expected.shape, f"{where}: {actual.shape} for {expected.shape}"
    assert actual.layout == expected.layout, f"{where}: {actual.layout} for {expected.layout}"
    assert actual.device == expected.device, where
    if expected.is_meta:
        return
    if expected.layout != torch.strided:
        actual, expected = actual.to_dense(), expected.to_dense()
    if not expected.dtype.is_floating_point:
        assert torch.equal(actual, expected), f"{where}: other values"
        return
    one, other = actual.detach().double(), expected.detach().double()
    odd = ~other.isfinite()
    assert torch.equal(~one.isfinite(), odd), f"{where}: NaN or infinity elsewhere"
    assert torch.equal(one[odd].nan_to_num(), other[odd].nan_to_num()), f"{where}: other infinities"
    difference = torch.linalg.vector_norm(one[~odd] - other[~odd]).item()
    size = torch.linalg.vector_norm(other[~odd]).item()
    assert difference <= tolerance * (size or 1.0), f"{where}: off by {difference} of {size}"


def counts(fast: nn.Module) -> dict[str, int]:
    """Calls by path: "openvino", "mixed", "eager"."""
    calls: dict[str, int] = ovshim.explain(fast).to_dict()["calls"]
    return calls


def plans(fast: nn.Module) -> list[dict[str, Any]]:
    """Every plan, as `explain` tells it."""
    found: list[dict[str, Any]] = ovshim.explain(fast).to_dict()["plans"]
    return found


def standing(fast: nn.Module) -> list[Any]:
    """The plans themselves, where a test is about what no report tells."""
    found: list[Any] = installed(fast)["forward"].dispatcher.plans  # type: ignore[attr-defined]
    return found


def paths(fast: nn.Module) -> list[str]:
    return [plan["path"] for plan in plans(fast)]


def eager_reasons(fast: nn.Module) -> Counter[str]:
    """Calls that eager served, by reason code."""
    return Counter(dict(ovshim.explain(fast).eager))


@contextmanager
def served(
    fast: nn.Module, path: str | None, reason: str | None = None, calls: int = 1
) -> Iterator[None]:
    """Assert that the calls inside take that path, and eager ones for that reason.

    `path=None`: whichever, but each is counted once.
    """
    before, before_reasons = counts(fast), eager_reasons(fast)
    yield
    after = counts(fast)
    moved = {name: after[name] - before[name] for name in after if after[name] != before[name]}
    reasons = dict(eager_reasons(fast) - before_reasons)
    told = f"served by {moved}, reasons {reasons}, plans {plans(fast)}"
    if path is None:
        assert sum(moved.values()) == calls, told
    else:
        assert moved == ({path: calls} if calls else {}), told
    if reason is not None:
        assert reasons == {reason: calls}, told


def check(
    fast: nn.Module,
    module: Callable[..., Any],
    *args: Any,
    path: str | None = "openvino",
    reason: str | None = None,
    tolerance: float = 1e-4,
    under: Callable[[], Any] = torch.inference_mode,
    **kwargs: Any,
) -> Any:
    """Call both on equal arguments and assert that nobody could tell them apart but by the path.

    Compares the outputs and what became of the arguments. Returns what `fast` returned.
    """
    for_eager, for_fast = copy.deepcopy((args, kwargs)), copy.deepcopy((args, kwargs))
    state = torch.get_rng_state()
    with under():
        expected = module(*for_eager[0], **for_eager[1])
    torch.set_rng_state(state)
    with served(fast, path, reason), under():
        actual = fast(*for_fast[0], **for_fast[1])
    same(actual, expected, tolerance)
    same(for_fast, for_eager, 0.0, "argument")
    return actual


class Seen(TorchFunctionMode):
    """Notes the names of what torch is asked for inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(getattr(func, "__name__", repr(func)))
        return func(*args, **(kwargs or {}))


def by_the_road(fast: nn.Module) -> None:
    """Have Python serve every call from now on, as where the compiled helper is not there."""
    dispatcher: Any = installed(fast)["forward"].dispatcher
    if dispatcher._laying is not None:
        dispatcher._laying.shortcut.way = None
        dispatcher._laying = None


def check_alone(fast: nn.Module, module: nn.Module, engine: Any, rows: int) -> None:
    """Assert that this engine runs the calls of so many rows of 8 and no others, and that their
    values are looked at all the same."""
    by_the_road(fast)  # what the compiled helper does, it does not ask for
    run, ran = engine.run, []
    engine.run = lambda tensors: ran.append(len(tensors[0])) or run(tensors)
    for n in (rows, 8 - rows, rows, 1):
        check(fast, module, torch.randn(n, 8))
    assert ran == [rows, rows]
    bad = torch.randn(rows, 8)
    bad[0, 0] = float("nan")
    check(fast, module, bad, path="eager", reason="special-values")


def settle(
    fast: nn.Module, module: Callable[..., Any], *args: Any, within: int = 6, **kwargs: Any
) -> int:
    """Call until OpenVINO serves, each call right; assert that it does. The calls that took."""
    for attempt in range(within):
        before = counts(fast)["openvino"]
        check(fast, module, *args, path=None, **kwargs)
        if counts(fast)["openvino"] > before:
            return attempt
        time.sleep(0.002)
    raise AssertionError(f"still eager after {within} calls: {ovshim.explain(fast)}")


@contextmanager
def falls_back(*codes: str) -> Iterator[list[ovshim.FallbackWarning]]:
    """Assert that the block warns of exactly these reasons, once each."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.filterwarnings("ignore", "Guards may run slower on Python 3.13.0")  # torch's own
        warned: list[ovshim.FallbackWarning] = []
        yield warned
    messages = [entry.message for entry in caught]
    warned += [message for message in messages if isinstance(message, ovshim.FallbackWarning)]
    others = [str(message) for message in messages if message not in warned]
    assert not others, others
    assert [warning.reason.code for warning in warned] == list(codes), list(map(str, warned))


@contextmanager
def quietly() -> Iterator[None]:
    """Let fallbacks be, where right answers are the subject and either path may give them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ovshim.FallbackWarning)
        yield


@contextmanager
def as_it_runs() -> Iterator[None]:
    """Let be what the processor makes of precisions that it does not have."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ovshim.PrecisionWarning)
        yield


def share_of_other_threads(work: Callable[[], Any]) -> float:
    """Of the processors' time that this work costs, what other threads of this process take. The
    least of three times: threads of other tests may be at work."""

    def share() -> float:
        time.sleep(0.1)  # those that it has woken spin on
        own, whole = time.thread_time(), time.process_time()
        for _ in range(10):
            work()
        own = time.thread_time() - own
        time.sleep(0.1)
        whole = time.process_time() - whole
        return (whole - own) / whole

    work()
    return min(share() for _ in range(3))


def run_python(source: str, *arguments: str, **environment: str) -> str:
    """What a fresh Python prints that runs the source; it can import the tests' own modules."""
    process = start_python(source, *arguments, **environment)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return output


def start_python(source: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    """Start a fresh Python on the source; it can import the tests' own modules."""
    places = [str(Path(__file__).parent), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.Popen(
        [sys.executable, "-W", "error::ovshim.OvshimWarning", "-c", source, *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(places), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
