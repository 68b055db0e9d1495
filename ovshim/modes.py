"""What the operators of a call do besides: modes of torch's dispatcher, for calls of our own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ovshim import intraop

__all__ = ["Drawing", "Operators", "Writes", "Writing", "harmless"]


class _Lasting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A mode that operators of higher order do not end."""

    supports_higher_order_operators = True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # there is nothing of Dynamo's here to skip, and saying so would import it


class Operators(_Lasting):
    """Notices what this thread calls: names of operators, and whether random numbers are drawn."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: set[str] = set()
        self.drawn = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if isinstance(func, torch._ops.OpOverload):  # not one of higher order
            self.names.add(func.name())  # type: ignore[no-untyped-call]
            self.drawn = self.drawn or torch.Tag.nondeterministic_seeded in func.tags
        return func(*args, **(kwargs or {}))


class Writes(_Lasting):
    """Copies these tensors before this thread writes to them, all that share the memory."""

    def __init__(self, kept: Iterable[torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._kept: dict[int, list[torch.Tensor]] = {}
        for tensor in kept:
            if _lies_somewhere(tensor):
                self._kept.setdefault(tensor.untyped_storage().data_ptr(), []).append(tensor)
        self.copies: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        intraop.look_up()
        kwargs = kwargs or {}
        for storage in _written(func, args, kwargs):
            for tensor in self._kept.pop(storage, ()):
                self.copies.append((tensor, tensor.detach().clone()))
        return func(*args, **kwargs)


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[int]:
    """Where the storages begin that an operator is about to write to."""
    if not isinstance(func, torch._ops.OpOverload) or not func._schema.is_mutable:
        return
    given = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
    for argument in func._schema.arguments:
        if argument.alias_info is not None and argument.alias_info.is_write:
            tensor = given.get(argument.name)
            if isinstance(tensor, torch.Tensor) and _lies_somewhere(tensor):
                yield tensor.untyped_storage().data_ptr()


def _lies_somewhere(tensor: torch.Tensor) -> bool:
    strided = tensor.layout is torch.strided and not tensor.is_nested
    return strided and tensor.is_cpu and tensor.numel() > 0


class Drawing(BaseException):
    """An operator was about to draw random numbers. No Exception: users' code catches those."""


class Writing(BaseException):
    """An operator was about to write to what others hold too: the tensor."""


class _Harmless(_Lasting):
    """Stops this thread before it draws a random number, or writes to one of these tensors."""

    def __init__(self, held: Iterable[torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        plain = filter(_lies_somewhere, held)
        self._held = {t.untyped_storage().data_ptr(): t for t in plain}
        self.stopped: BaseException | None = None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        intraop.look_up()
        kwargs = kwargs or {}
        tags = getattr(func, "tags", ())  # higher-order operators have none
        if torch.Tag.nondeterministic_seeded in tags and _would_draw(func, args, kwargs):
            self.stopped = Drawing()
            raise self.stopped
        for storage in _written(func, args, kwargs):
            if storage in self._held:
                self.stopped = Writing(self._held[storage])
                raise self.stopped
        return func(*args, **kwargs)


def _would_draw(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Not attention without dropout, and nothing that is told not to train."""
    names = [argument.name for argument in func._schema.arguments]
    defaults = {a.name: a.default_value for a in func._schema.arguments if a.has_default_value()}
    given = {**defaults, **dict(zip(names, args, strict=False)), **kwargs}
    for name in ("dropout_p", "training", "train"):
        if name in given:
            return bool(given[name])
    return True


def harmless(call: Callable[[], Any], held: Iterable[torch.Tensor]) -> Any:
    """What a call gives that draws no random numbers and writes to none of these tensors. Raises
    Drawing, or Writing, before it would."""
    mode = _Harmless(held)
    with mode:
        output = call()
    if mode.stopped is not None:  # and the module went on, which it could only by catching all
        raise mode.stopped
    return output
