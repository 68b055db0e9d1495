"""One compiled model behind a call: torch tensors in, torch tensors out, from any thread.

Where the microseconds go, and what was decided for it:

* A small input is copied into a buffer that stays bound to its request; rebinding costs several
  times what copying 1 KB does. A large one is bound where it lies.
* A small output is copied out by `infer` itself (`share_outputs=False`), which costs less than
  binding a fresh buffer per call and is right for outputs of any size. From 256 KB up the copy
  costs more than the binding, so a buffer is bound and handed over without a copy.
* Bound outputs are tensors that OpenVINO allocated, never wrapped arrays: the request shares in
  owning them, so nothing is left dangling, and they grow where an output's size depends on values.
  A wrapped array that is too small makes `infer` raise, which costs the compiled model.
"""

from __future__ import annotations

import math
import os
import weakref
from collections.abc import Callable, Collection, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from ovshim.binding import binding
from ovshim.inherited import all_of, keep_for_good
from ovshim.pool import Pool
from ovshim.signals import let_through, let_through_inference
from ovshim.slots import (
    ALONE,
    Array,
    Copy,
    Slot,
    bindable_outputs,
    conversion,
    element_types,
    port_dtype,
    references,
)
from ovshim.special_mode import outside_inference
from ovshim.waiting import SHARED_OUT

_COPY_INPUT_BYTES = 128 * 1024
_BIND_OUTPUT_BYTES = 256 * 1024
_BUFFERS_PER_INPUT = 16

_from_numpy = torch.from_numpy
# Without the question whether an argument overrides it, which takes as long as 256 products.
_vdot = getattr(np.vdot, "__wrapped__", np.vdot)


class Rival(Protocol):
    """Answers an engine's calls, by it or by another one. See `rival.Rival`."""

    def run(self, engine: Any, tensors: Sequence[torch.Tensor], /) -> list[torch.Tensor]:
        """As `engine.run`."""

    def wait(self, timeout: float | None, /) -> bool:
        """Wait until nothing is being compiled; whether that was so in time."""


class SpecialValuesError(ValueError):
    """An input holds what OpenVINO does not compute as eager does."""


class EngineDead(RuntimeError):
    """The engine must not be used any more: an `infer` has failed, or it was closed."""


_engines: weakref.WeakSet[Any] = weakref.WeakSet()


def _leak_after_fork() -> None:
    for engine in all_of(_engines):
        keep_for_good(engine, engine._compiled, engine._pool, *engine._pool.free)
        engine._forget_slots()  # its requests may have been running in a thread that is not here


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leak_after_fork)


class Engine:
    """Runs a compiled model.

    `inputs`: the dtypes of the tensors that `run` will be given, in the order of the model's own
    inputs; where the model takes another element type, values are converted. `outputs`: the
    dtypes `run` is to return, in the order of the model's outputs. Known are float32, float64,
    float16, bfloat16, int8 to int64, uint8 and bool; TypeError for others, ValueError when the
    numbers do not match the model's.

    `dead` is None, or why the engine cannot be used any more; `checked`, the inputs whose
    values are looked at; `exact`, the engine that calls of some sizes are left to; `rival`,
    what answers until it is known whether there is to be one. `queues`: whether calls at the same
    time wait for each other.
    """

    queues = False

    def __init__(
        self, compiled: Any, inputs: Sequence[torch.dtype], outputs: Sequence[torch.dtype]
    ) -> None:
        ov = binding()
        if len(inputs) != len(compiled.inputs) or len(outputs) != len(compiled.outputs):
            raise ValueError(
                f"{len(inputs)} inputs and {len(outputs)} outputs were named, the model has "
                f"{len(compiled.inputs)} and {len(compiled.outputs)}."
            )
        known = element_types()
        for dtype in (*inputs, *outputs):
            if dtype not in known.values():
                raise TypeError(f"{dtype} has no counterpart among OpenVINO's element types.")
        self.dead: str | None = None
        # How many calls at once make the most of it.
        self.advised = int(compiled.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS"))
        self._tensor: Any = ov.Tensor
        # openvino.InferRequest.infer costs 3 µs more, for conveniences that are not used here.
        self._infer: Any = ov.InferRequest.infer
        self._compiled = compiled
        self._dtypes = [port_dtype(port, known) for port in compiled.inputs]
        # Equal ones that belong to nothing: a port's own keeps the compiled model in memory.
        types = {known_type: known_type for known_type in known}
        self._types = [types[port.element_type] for port in compiled.inputs]
        conversions = [
            conversion(port_dtype(port, known), wanted)
            for port, wanted in zip(compiled.outputs, outputs, strict=True)
        ]
        self._conversions = conversions if any(conversions) else None
        # The smallest size an output may have: OpenVINO enlarges the tensor as it needs.
        self._fresh = [
            (types[port.element_type], ov.Shape([s.get_min_length() for s in port.partial_shape]))
            for port in compiled.outputs
        ]
        self._alone = len(outputs) == 1
        self._bindable = bindable_outputs(compiled, self._fresh)
        self.checked: frozenset[int] = frozenset()
        self.exact: Engine | None = None
        self.exact_sizes: list[torch.Size] | None = None
        self.rival: Rival | None = None
        self._wake: Callable[[], Any] | None = None
        self._is_exact: Callable[[Sequence[torch.Tensor]], bool] | None = None
        self._forget_slots()
        _engines.add(self)

    def check(self, inputs: Collection[int]) -> None:
        """Look at the values of these inputs in each call to come: float32, by index. The buffer
        that an input was copied into is looked at in half of the time that the tensor takes."""
        checked = self.checked.union(i for i in inputs if self._dtypes[i] == torch.float32)
        if checked != self.checked:  # two plans may share it

            def begin(slots: list[Slot]) -> None:
                self.checked = checked
                for slot in slots:
                    self.unbind(slot)

            self._pool.alone(begin)
        if self.exact is not None:
            self.exact.check(inputs)

    def leave(self, sizes: Sequence[Sequence[int]], engine: Engine) -> None:
        """Leave the calls of just these sizes to another engine, of the same graph; where it
        `queues`, one at a time."""
        engine.check(self.checked)
        scope: dict[str, Any] = {f"s{i}": torch.Size(size) for i, size in enumerate(sizes)}
        same = [f"len(tensors) == {len(sizes)}"]
        same += [f"tensors[{i}].shape == s{i}" for i in range(len(sizes))]
        if engine.queues:
            scope["engine"] = engine
            same.append("not engine._pool.busy()")
        self.exact, self.exact_sizes = engine, [torch.Size(size) for size in sizes]
        self._is_exact = eval(f"lambda tensors: {' and '.join(same)}", scope)

    def rest(self, wake: Callable[[], Any]) -> None:
        """Give up the compiled model until a call needs it. `wake` compiles it again."""

        def begin(slots: list[Slot]) -> None:
            self._wake = wake
            self._compiled = None
            slots.clear()

        self._pool.alone(begin)

    def run(self, tensors: Sequence[torch.Tensor], alone: bool = False) -> list[torch.Tensor]:
        """Outputs for one set of inputs, each owned by the caller alone.

        `tensors`: plain CPU tensors, of any strides, as many as the model has inputs; never
        written to. They are read until `run` returns, so nobody may write to them meanwhile.
        The outputs share memory with nothing, except that their storage cannot be resized; under
        inference mode they are inference tensors, as eager's would be.

        Raises EngineDead when `infer` fails, in this call or an earlier one; ValueError when the
        model does not take these sizes, and SpecialValuesError when an input that is to be checked
        holds a NaN, an infinity or a value near 1e19 (the engine stays usable); ReenteredError in a
        call from within another one of this thread's, where no request is free.

        `alone`: not by way of `rival`.
        """
        if self._is_exact is not None and self._is_exact(tensors):
            return self.exact.run(tensors)  # type: ignore[union-attr]  # they are set together
        if self.rival is not None and not alone:
            return self.rival.run(self, tensors)
        if self.dead is not None:
            raise EngineDead(self.dead)
        pool = self._pool
        try:
            slot = pool.free.pop()
        except IndexError:
            slot = pool.new(self._new_slot)
        try:
            outputs = self._run(slot, tensors)
        except BaseException:
            self.take_back(slot)
            raise
        pool.back.append(slot)
        return outputs if self._conversions is None else self._converted(outputs)

    def _converted(self, outputs: list[torch.Tensor]) -> list[torch.Tensor]:
        """Outputs in the types that were asked for, where the model gives others."""
        return [
            tensor if convert is None else convert(tensor)
            for tensor, convert in zip(outputs, self._conversions or (), strict=True)
        ]

    def _bind_inputs(self, slot: Slot, tensors: Sequence[torch.Tensor]) -> list[Array | None]:
        """Inputs to where the request finds them. OpenVINO keeps nothing alive: what is returned
        must last until `infer` has returned."""
        in_place: list[Array | None] = []
        shapes = slot.shapes
        if len(tensors) != len(shapes):
            raise ValueError(f"{len(tensors)} tensors for {len(shapes)} inputs.")
        for index, x in enumerate(tensors):
            if x.requires_grad:
                # In grad mode the buffer would join the graph and keep every call's inputs alive.
                x = x.detach()
            if x.shape == shapes[index]:
                slot.copies[index](x)  # type: ignore[misc]  # there is one where there is a shape
            else:
                in_place.append(self._bind_input(slot, index, x))
        for array in slot.checked:
            if not _vdot(array, array) < math.inf:
                raise SpecialValuesError
        return in_place

    def _run(self, slot: Slot, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        in_place = self._bind_inputs(slot, tensors)
        large = slot.large
        if large:
            self._renew_outputs(slot)
        try:
            results = self._infer(slot.request, {}, bool(large), False)
        except Exception as error:
            let_through_inference(error)
            # The plugin has been seen to answer wrongly at good shapes after one failure, from new
            # requests too. So nothing of this compiled model may serve again.
            self.failed(slot, str(error))
            raise EngineDead(self.dead) from error
        if self.dead is not None:
            # Another thread's call failed while this one ran: its values cannot be trusted.
            raise EngineDead(self.dead)
        arrays = self._take_outputs(slot, results) if large else results.values()
        if self._alone:
            (array,) = arrays
            outputs = [_from_numpy(array)]
        else:
            outputs = list(map(_from_numpy, arrays))
        if in_place and not large:
            # Sizes that are new to the slot, or large: outputs may have become large as well.
            self._choose_large(slot, results)
        return outputs

    def is_left(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether `exact` runs these."""
        return self._is_exact is not None and self._is_exact(tensors)

    @property
    def converts(self) -> bool:
        """Whether outputs are of other types than the model's."""
        return self._conversions is not None

    def take_back(self, slot: Slot) -> None:
        """Have a slot back from a call that failed."""
        self.unbind(slot)
        self._pool.back.append(slot)

    def unbind(self, slot: Slot) -> None:
        """Take nothing for bound any more: a call has ended somewhere. To an output is still bound
        what was handed out last, and the next call would write into it."""
        slot.forget(len(self._types))
        if self.dead is None:
            for index in slot.large:
                self._bind_output(slot, index)

    def failed(self, slot: Slot, why: str) -> None:
        """End with an `infer` that has failed."""
        self.close(f"OpenVINO failed while running the model: {why}")

    def close(self, why: str = "The engine was closed.") -> None:
        """Give up the compiled model and every buffer; calls under way end with EngineDead."""
        if self.dead is None:
            self.dead = why
        self._compiled = None
        self._pool.free.clear()
        if self.exact is not None:
            self.exact.close(why)

    def _forget_slots(self) -> None:
        self._pool: Pool[Slot] = Pool(Engine.run.__code__)

    def _new_slot(self) -> Slot:
        compiled = self._compiled
        if compiled is None and self.dead is None and self._wake is not None:
            try:
                compiled = self._compiled = self._wake()
            except RuntimeError as error:
                self.close(f"OpenVINO did not compile it again: {error}")
        if compiled is None:
            raise EngineDead(self.dead)
        return Slot(compiled.create_infer_request(), len(self._types))

    def _bind_input(self, slot: Slot, index: int, x: torch.Tensor) -> Array | None:
        """Bind an input whose size is not the bound one's; an array returned must be kept."""
        array = None
        slot.bound += 1
        if x.nbytes <= _COPY_INPUT_BYTES and x.numel() < SHARED_OUT:
            shape = x.shape
            ready = slot.ready[index]
            entry = ready.pop(shape, None) or self._buffer(index, shape)
            ready[shape] = entry
            if len(ready) > _BUFFERS_PER_INPUT:
                del ready[next(iter(ready))]
            tensor, copy = entry
            copy(x)
            slot.shapes[index], slot.copies[index] = shape, copy
            if index in self.checked:
                slot.arrays[index] = tensor.data
        else:
            # So that a smaller input, next time, is bound anew.
            slot.shapes[index] = slot.copies[index] = None
            slot.arrays.pop(index, None)
            array, tensor = self._wrapped(index, x)
            if index in self.checked and not _vdot(array, array) < math.inf:
                raise SpecialValuesError
        slot.checked = list(slot.arrays.values())
        try:
            slot.request.set_input_tensor(index, tensor)
        except RuntimeError as error:
            let_through(error)
            raise ValueError(f"The model does not take input {index}: {error}") from error
        return array

    def _buffer(self, index: int, shape: torch.Size) -> tuple[Any, Copy]:
        tensor = self._tensor(self._types[index], list(shape))

        def made() -> torch.Tensor:
            buffer = torch.from_numpy(tensor.data)
            return buffer.view(torch.bfloat16) if self._dtypes[index] == torch.bfloat16 else buffer

        # An inference tensor could not be written to by a later call under no_grad.
        return tensor, outside_inference(made).copy_

    def _wrapped(self, index: int, x: torch.Tensor) -> tuple[Array, Any]:
        """An array over the tensor's own memory where that will do, and OpenVINO's view of it."""
        if x.dtype != self._dtypes[index]:
            x = x.to(self._dtypes[index])
        if not x.is_contiguous():
            x = x.contiguous()
        if x.is_neg():
            x = x.resolve_neg()
        if x.dtype == torch.bfloat16:
            array = x.view(torch.uint16).numpy()
            return array, self._tensor(array, list(x.shape), self._types[index])
        array = x.numpy()
        return array, self._tensor(array, shared_memory=True)

    def _choose_large(self, slot: Slot, results: dict[Any, Array]) -> None:
        for index, array in enumerate(results.values()):
            if array.nbytes >= _BIND_OUTPUT_BYTES and self._bindable[index]:
                slot.large = (*slot.large, index)
                self._bind_output(slot, index)

    def _bind_output(self, slot: Slot, index: int) -> None:
        slot.request.set_output_tensor(index, self._tensor(*self._fresh[index]))
        slot.held.pop(index, None)
        slot.capacity[index] = 0

    def _renew_outputs(self, slot: Slot) -> None:
        """A new buffer for each large output that somebody still holds."""
        for index in slot.large:
            held = slot.held.get(index)
            if held is not None and references(held) != ALONE:
                self._bind_output(slot, index)

    def _take_outputs(self, slot: Slot, results: dict[Any, Array]) -> list[Array]:
        """Arrays to hand out: the buffers themselves where they are filled, else copies."""
        arrays = list(results.values())
        for index, array in enumerate(arrays):
            size = array.nbytes
            if index in slot.large and size >= max(slot.capacity[index], _BIND_OUTPUT_BYTES):
                slot.capacity[index] = size
                slot.held[index] = [array]
                continue
            arrays[index] = array.copy()
            if index in slot.large:
                # Handing out a corner of a large buffer would keep all of it alive.
                self._bind_output(slot, index)
        return arrays
