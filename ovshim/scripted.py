"""What modules of TorchScript hold: objects of C++, which no dictionary of Python's shows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.jit._script import RecursiveScriptModule

__all__ = ["Held", "is_frozen", "is_plain"]

_PLAIN = (type(None), bool, int, float, complex, str, torch.device, torch.dtype)


def is_plain(module: nn.Module) -> bool:
    """Not a scripted module: those show their tensors and children through wrappers, not dicts."""
    return not isinstance(module, torch.jit.ScriptModule)


def is_frozen(module: nn.Module) -> bool:
    """Whether `torch.jit.freeze` has made it: it has no tensors, children and mode any more."""
    # A trace is of another class, and holds one of these.
    return isinstance(module, RecursiveScriptModule) and "_concrete_type" not in module.__dict__


class Held:
    """Tensors and plain attributes of the scripted ones among `modules`, and their submodules.

    Attributes:
        tensors: those in attributes, as alive and as they are now; parameters and buffers are.

    Raises (when made):
        ValueError: an attribute is an object of C++, whose changes nobody can tell.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._modules: list[Any] = [module for module in modules if not is_plain(module)]
        self._slots = [(m._c.getattr, name) for m in self._modules for name in _attributes(m)]
        values = [read(name) for read, name in self._slots]
        self.tensors: list[torch.Tensor] = [t for value in values for t in _tensors(value)]
        self._then = self._now()

    def __bool__(self) -> bool:
        return bool(self._modules)

    def same(self) -> bool:
        """Whether all of it is what it was."""
        return self._now() == self._then

    def _now(self) -> tuple[Any, ...]:
        children = [id(child) for module in self._modules for child in module.children()]
        return children, [_described(read(name)) for read, name in self._slots]


def _attributes(module: Any) -> list[str]:
    """Of a module's type: all but its submodules. A frozen module has none left."""
    kind: Any = torch._C.ConcreteModuleType.from_jit_type(module._c._type())
    return sorted(kind.get_attributes())


def _described(value: Any) -> Any:
    """Tensors by identity: a wrapper in Python is kept for as long as somebody holds it."""
    if isinstance(value, torch.Tensor):
        return "tensor", id(value)
    if isinstance(value, (list, tuple)):
        return type(value), [_described(item) for item in value]
    if isinstance(value, dict):
        return [(_described(key), _described(item)) for key, item in value.items()]
    if isinstance(value, _PLAIN):
        return type(value), repr(value)  # 1 is not 1.0, and a NaN is one
    raise ValueError(f"a scripted module holds an object of type {type(value).__qualname__}")


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)
