"""What captured code asks of tensors that no graph tells: which one it is, how it lies in memory,
whether gradients reach it.

Dynamo answers for good. To it two tensors are two, and strides and flags are constants. But the
next call may bring the very one that the module began with, or the same values in another layout.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ovshim.capture import CaptureError
from ovshim.capture.sources import Sources
from ovshim.capture.spared import put
from ovshim.reasons import reason

__all__ = ["GRADIENTS", "STRIDES", "Questions", "noted"]

STRIDES, GRADIENTS = "strides", "requires_grad"


@dataclasses.dataclass
class Questions:
    """All that is asked in a capture.

    Attributes:
        asks: STRIDES, GRADIENTS, neither or both: what is asked of any tensor.
        compared: sources of tensors that are compared by `is`, two by two.
        identified: sources of those of which an id or a hash is taken, as of keys of a dict.
        storage: whether the memory that holds a tensor is asked for.

    Of what is computed the source is None.
    """

    asks: set[str] = dataclasses.field(default_factory=set)
    compared: list[Any] = dataclasses.field(default_factory=list)
    identified: list[Any] = dataclasses.field(default_factory=list)
    storage: bool = False

    def refuse(self, sources: Sources) -> None:
        """Raises CaptureError where a graph would answer for one call alone."""
        if self.storage:
            raise CaptureError(reason("value-dependent", "the module asks for a tensor's storage"))
        for pair in zip(self.compared[::2], self.compared[1::2], strict=False):
            # Of two tensors of the call the kind of it tells.
            if None not in pair and len({sources.is_given(source) for source in pair}) > 1:
                names = " is ".join(str(source.name) for source in pair)
                raise CaptureError(reason("value-dependent", f"the module asks {names}"))
        for source in self.identified:
            if source is None or sources.is_given(source):
                name = "a computed tensor" if source is None else source.name
                raise CaptureError(reason("value-dependent", f"the module asks which {name} is"))


@contextlib.contextmanager
def noted() -> Iterator[Questions]:
    """Gives what this thread's captures inside ask, as far as they have come."""
    from torch._dynamo.variables import base, builtin, tensor

    found, here = Questions(), threading.get_ident()
    variable = tensor.TensorVariable

    def hear(owner: Any, name: str, note: Callable[[Any], None]) -> Any:
        """Have `note` called with the first argument of this function of Dynamo's."""
        answer = vars(owner)[name]

        @functools.wraps(answer)
        def noting(asked: Any, *given: Any, **kwargs: Any) -> Any:
            if threading.get_ident() == here:
                note(asked)
            return answer(asked, *given, **kwargs)

        return put(owner, name, noting)

    def identified(asked: Any) -> None:
        if isinstance(asked, variable):
            found.identified.append(_source(asked.as_proxy().node))

    with contextlib.ExitStack() as stack:
        for owner, name, note in (
            # What compares is kept by Dynamo in tables; it looks up this function each time, for
            # both.
            (
                builtin,
                "extract_fake_example_value",
                lambda node: found.compared.append(_source(node)),
            ),
            (variable, "hash_impl", identified),
            (base.VariableTracker, "get_id", identified),
            (variable, "method_stride", lambda _: found.asks.add(STRIDES)),
            (variable, "method_is_contiguous", lambda _: found.asks.add(STRIDES)),
            (variable, "method_attr_requires_grad", lambda _: found.asks.add(GRADIENTS)),
            (variable, "method_untyped_storage", lambda _: setattr(found, "storage", True)),
        ):
            stack.enter_context(hear(owner, name, note))
        yield found


def _source(node: Any) -> Any:
    """Where a tensor comes from; None where it is computed. What is made by an operator that has
    nothing to do (`x.float()` of floats, `x.flatten()` of one dimension) is the very tensor that it
    was made of, or another one over the same memory: it is taken for the former."""
    known = getattr(node.meta.get("grapharg"), "source", None)
    if known is not None:
        return known
    memory = _memory(node)
    given = (one for one in node.graph.nodes if one.op == "placeholder")
    same = (one for one in given if memory is not None and _memory(one) == memory)
    return next((getattr(one.meta.get("grapharg"), "source", None) for one in same), None)


def _memory(node: Any) -> Any:
    fake = node.meta.get("example_value")
    if not isinstance(fake, torch.Tensor) or fake.layout is not torch.strided:
        return None
    return fake.untyped_storage()._cdata
