"""What an engine's requests hold: buffers, what copies into them, and the types on both sides."""

import logging
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from ovshim.binding import binding

__all__ = [
    "ALONE",
    "Array",
    "Copy",
    "Slot",
    "bindable_outputs",
    "conversion",
    "element_types",
    "port_dtype",
    "references",
]

_log = logging.getLogger("ovshim")

Array = np.ndarray[Any, Any]
Copy = Callable[[torch.Tensor], torch.Tensor]


def references(array: list[Array]) -> int:
    return sys.getrefcount(array[0])


def _count_when_alone() -> int:
    """What `references` gives for an array that no tensor stands on; -1 where it cannot tell.

    Interpreters without reference counts, or with counts split between threads, fail the test or
    are excluded; outputs are then bound afresh on every call.
    """
    if not getattr(sys, "_is_gil_enabled", lambda: True)():
        return -1
    array = [np.empty(4, dtype=np.float32)]
    alone = references(array)
    tensor = torch.from_numpy(array[0])
    view = tensor[1:]
    del tensor
    held = references(array)
    del view
    return alone if held > alone and references(array) == alone else -1


ALONE = _count_when_alone()


def element_types() -> dict[Any, torch.dtype]:
    ov = binding()
    return {
        ov.Type.f32: torch.float32,
        ov.Type.f64: torch.float64,
        ov.Type.f16: torch.float16,
        ov.Type.bf16: torch.bfloat16,
        ov.Type.i8: torch.int8,
        ov.Type.i16: torch.int16,
        ov.Type.i32: torch.int32,
        ov.Type.i64: torch.int64,
        ov.Type.u8: torch.uint8,
        ov.Type.boolean: torch.bool,
    }


def port_dtype(port: Any, known: dict[Any, torch.dtype]) -> torch.dtype:
    dtype = known.get(port.element_type)
    if dtype is None:
        raise TypeError(f"{port} has an element type without a counterpart in torch.")
    return dtype


def conversion(
    model: torch.dtype, wanted: torch.dtype
) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """What turns an array's tensor into the wanted one. bf16 arrives as the bits of a float16."""
    if model == torch.bfloat16:
        if wanted == torch.bfloat16:
            return lambda tensor: tensor.view(torch.bfloat16)
        return lambda tensor: tensor.view(torch.bfloat16).to(wanted)
    if model == wanted:
        return None
    return lambda tensor: tensor.to(wanted)


def bindable_outputs(compiled: Any, fresh: Sequence[tuple[Any, Any]]) -> list[bool]:
    """Which outputs of a compiled model may be given a buffer.

    Not one that is an input unchanged: both are one tensor to the request, and binding one
    silently replaces the other. Of outputs that are the same tensor, the last takes the buffer.
    Found out by trying, since names and graphs tell it only in part.

    `fresh`: the element type and the smallest shape of each.
    """
    request = compiled.create_infer_request()
    bound: list[int | None] = []
    for index, (element_type, least) in enumerate(fresh):
        tensor = binding().Tensor(element_type, [max(size, 1) for size in least])
        try:
            request.set_output_tensor(index, tensor)
        except RuntimeError as error:
            _log.debug("Output %d takes no buffer: %s", index, error)
            bound.append(None)
        else:
            bound.append(tensor.data.ctypes.data)
    taken = {
        request.get_input_tensor(index).data.ctypes.data for index in range(len(compiled.inputs))
    }
    return [
        where is not None
        and where not in taken
        and where == request.get_output_tensor(index).data.ctypes.data
        for index, where in enumerate(bound)
    ]


class Slot:
    """One infer request and what is bound to it; used by one thread at a time."""

    __slots__ = (
        *("__weakref__", "arrays", "bound", "capacity", "checked", "copies", "heads", "held"),
        *("large", "ready", "request", "shapes", "sound"),
    )

    def __init__(self, request: Any, inputs: int) -> None:
        self.request = request
        # Whether its state, where it has one, is of one time.
        self.sound = True
        # How often anything was bound, or taken for unbound.
        self.bound = 0
        # The outputs that get buffers of ours, the array last handed out of each, and its bytes.
        # They outlast what a call has met: they are bound until others are.
        self.large: tuple[int, ...] = ()
        self.held: dict[int, list[Array]] = {}
        self.capacity: dict[int, int] = {}
        self.forget(inputs)

    def forget(self, inputs: int) -> None:
        """Take no input for bound."""
        self.bound += 1
        # Per input: the shape of the bound buffer (None: bound where it lay, or nothing is), what
        # copies into it, and the buffers of other shapes, the last used at the end.
        self.shapes: list[torch.Size | None] = [None] * inputs
        self.copies: list[Copy | None] = [None] * inputs
        self.ready: list[dict[torch.Size, tuple[Any, Copy]]] = [{} for _ in range(inputs)]
        # The buffers that are bound and whose values are looked at, by input, and in a list.
        self.arrays: dict[int, Array] = {}
        self.checked: list[Array] = []
        # Where the outputs begin that stay the request's own.
        self.heads: list[Array] = []
