"""Many items one after the other: `fast.ovshim.map` beside OpenVINO's own AsyncInferQueue.

Both run the very same compiled model: made for throughput, or for one stream where calls are too
short for several (the MLP; over one that is made for throughput the queue takes as long). The queue
is used as its documentation has it: inputs shared, outputs copied in the callback, for they have to
outlast the request. `map` asks all guards of each item, copies its inputs, and hands out outputs
that belong to the caller.
"""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import quiet
import torch
import workloads
from board import Board
from replay import clock
from ways import Ways, measure_ways

import ovshim
from ovshim.bound import installed

pytestmark = pytest.mark.benchmark(timer=clock)

# Items of a sample, by workload: some tenths of a second each.
_ITEMS = {"MLP 256-256-10": 1000, "ViT-S/16": 16, "ResNet-50": 16, "BERT-base/128": 8}
_TITLES = {
    "eager": "eager, one by one",
    "queue": "AsyncInferQueue",
    "loop": "fast(x), one by one",
    "map": "fast.ovshim.map",
    "submit": "fast.ovshim.submit",
}


@pytest.fixture(scope="module", params=_ITEMS)
def finding(
    request: pytest.FixtureRequest, board: Board, tmp_path_factory: pytest.TempPathFactory
) -> Ways:
    """The ways of one workload, timed."""
    quiet.wait(board.effort.patience)
    case = workloads.Case(request.param, 1)
    module, call = workloads.make(case, board.small)
    cache: Path = tmp_path_factory.mktemp("cache")
    fast: Any = ovshim.accelerate(
        module,
        call[0] or None,
        example_kwargs=call[1] or None,
        prefer="openvino",
        hint="throughput",
        cache_dir=cache,
    )
    plan: Any = installed(fast)["forward"].dispatcher.plans[0]  # type: ignore[attr-defined]
    assert plan.served is not None, plan.reason
    items = [call[0] if call[0] else call[1]] * _ITEMS[request.param]
    with torch.inference_mode():
        ways = _ways(module, fast, plan, items)
        return measure_ways(
            f"throughput: {case}, {len(items)} items",
            ways,
            _TITLES,
            board,
            ours=frozenset({"map", "submit"}),
            raw="queue",
        )


def _ways(module: Any, fast: Any, plan: Any, items: list[Any]) -> Mapping[str, Callable[[], Any]]:
    def one_by_one(called: Any) -> list[Any]:
        return [called(*x) if isinstance(x, tuple) else called(**x) for x in items]

    def submit() -> list[Any]:
        start = fast.ovshim.submit
        futures = [start(*x) if isinstance(x, tuple) else start(**x) for x in items]
        return [future.result() for future in futures]

    engine = plan.served.engine.exact or plan.served.engine
    return {
        "eager": functools.partial(one_by_one, module),
        "queue": _queue(engine._compiled, plan, items),
        "loop": functools.partial(one_by_one, fast),
        "map": lambda: list(fast.ovshim.map(items)),
        "submit": submit,
    }


def _queue(compiled: Any, plan: Any, items: list[Any]) -> Callable[[], list[Any]]:
    import openvino as ov

    queue = ov.AsyncInferQueue(compiled)
    answers: list[Any] = []

    def keep(request: Any, number: int) -> None:
        found = [request.get_output_tensor(i).data.copy() for i in range(outputs)]
        answers[number] = [torch.from_numpy(array) for array in found]

    outputs = len(compiled.outputs)
    queue.set_callback(keep)
    arrays: list[list[np.ndarray[Any, Any]]] = []
    for x in items:
        tensors = plan.match(x, {}) if isinstance(x, tuple) else plan.match((), x)
        wanted = plan.served.inputs
        taken = tensors if wanted is None else [tensors[i] for i in wanted]
        arrays.append([tensor.numpy() for tensor in taken])

    def run() -> list[Any]:
        answers[:] = [None] * len(arrays)
        for number, inputs in enumerate(arrays):
            queue.start_async(dict(enumerate(inputs)), number, share_inputs=True)
        queue.wait_all()
        return answers

    return run


@pytest.mark.parametrize("way", _TITLES)
def test_throughput(way: str, finding: Ways, board: Board, benchmark: Any) -> None:
    finding.show(way, board, benchmark)
