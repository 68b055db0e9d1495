"""Recurrent layers, of whose outputs Dynamo wants the sizes alone.

Torch 2.13 knows those of a GRU, of a plain RNN and of some LSTMs by a decomposition that does a
step for each moment: the length of the sequence becomes a constant of the capture, and one of 200
moments took a GRU 29 s where it takes 0.4 now. The graph has one operator for all of them either
way.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch

__all__ = ["LAYERS", "in_one_step"]

LAYERS = tuple(
    getattr(torch.ops.aten, name).input for name in ("gru", "lstm", "rnn_tanh", "rnn_relu")
)
_KEYS = (torch._C.DispatchKey.CompositeImplicitAutograd, torch._C.DispatchKey.Autograd)


@contextlib.contextmanager
def in_one_step() -> Iterator[None]:
    """What this thread asks of sizes of such layers inside is computed of one moment. The caller
    holds `capture.TRACE_LOCK`."""
    with contextlib.ExitStack() as stack:
        for layer in LAYERS:
            for key in _KEYS:
                if key in layer.py_kernels:
                    stack.enter_context(_replaced(layer, key))
        yield


@contextlib.contextmanager
def _replaced(layer: Any, key: Any) -> Iterator[None]:
    theirs = layer.py_kernels[key]
    layer.py_kernels[key] = ours = _of_one_moment(theirs)
    # What it was dispatched to before is kept there.
    layer._dispatch_cache.clear()
    try:
        yield
    finally:
        if layer.py_kernels.get(key) is ours:
            layer.py_kernels[key] = theirs
        layer._dispatch_cache.clear()


def _of_one_moment(theirs: Callable[..., Any]) -> Callable[..., Any]:
    from torch._subclasses.fake_tensor import FakeTensor

    tracing = threading.get_ident()

    def ours(sequence: torch.Tensor, *rest: Any, **named: Any) -> Any:
        fake = isinstance(sequence, FakeTensor) and not named
        if threading.get_ident() != tracing or not fake:
            return theirs(sequence, *rest, **named)
        along = 1 if rest[-1] else 0  # batch_first
        outputs, *states = theirs(sequence.narrow(along, 0, 1), *rest)
        # It lies in memory as theirs, and wants gradients where the one moment does.
        whole = outputs.transpose(0, along).repeat(sequence.shape[along], 1, 1)
        return whole.transpose(0, along), *states

    return ours
