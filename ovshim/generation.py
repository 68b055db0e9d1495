"""The generation of a module: everything about it that a plan took for granted when it was made.

Tensors by identity, version and storage; submodules, hooks, flags and plain attributes of every
module in the tree; class methods; and, beyond the tree, whatever the captured graph says it read
(`guards.ValueGuard`). `holds()` runs on every call, so everything is laid out beforehand in flat
lists that C code compares.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from operator import attrgetter
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_module

from ovshim.guards import BadGuardError, ValueGuard
from ovshim.watch import GuardFailedError, Watch

__all__ = ["Generation", "GuardFailedError"]

_version: Callable[[torch.Tensor], int] = attrgetter("_version")
_data_ptr: Callable[[torch.Tensor], int] = torch.Tensor.data_ptr
_values: Callable[[Any], Iterable[Any]] = dict.values


class Generation:
    """A snapshot of `module` and the check that it still stands.

    Raises (when made):
        GuardFailedError: a value guard does not hold now.
        ValueError: a tensor of the module counts no versions (it was made in inference mode), so
            that nobody could tell when it changes.
    """

    def __init__(
        self,
        module: nn.Module,
        guards: Sequence[ValueGuard] = (),
        roots: Mapping[str, Any] | None = None,
    ) -> None:
        modules = list(module.modules())
        self._module = module
        self._dicts = [m.__dict__ for m in modules]
        self._dict_copies = [_copy(d) for d in self._dicts]
        self._children = [m._modules for m in modules if m._modules]
        self._child_copies = [dict(d) for d in self._children]
        self._holders = [d for m in modules for d in (m._parameters, m._buffers)]
        self._hooks = tuple(_inner_hooks(module, modules))
        self._classes = list(dict.fromkeys(type(m) for m in modules))
        self._forwards = list(map(_forward_of, self._classes))
        self._watch = Watch(guards, roots or {}, _plain_numbers(modules))
        self._watch_tensors(modules)

    def holds(self) -> bool:
        """Whether nothing has changed. About 0.3 µs a submodule and 0.1 µs a tensor."""
        try:
            return (
                self._dicts == self._dict_copies
                and self._children == self._child_copies
                and list(map(id, chain.from_iterable(map(_values, self._holders)))) == self._ids
                and list(map(_version, self._tensors)) == self._versions
                and list(map(_data_ptr, self._tensors)) == self._pointers
                and not any(self._hooks)
                and list(map(_forward_of, self._classes)) == self._forwards
                and self._watch.holds()
            )
        except (RuntimeError, KeyError, ValueError, BadGuardError):
            # Two different tensors (or arrays) in one attribute answer == with more than a bool;
            # a watched key that is gone raises. Either way something was replaced.
            return False

    def grad_wanted(self) -> bool:
        """Whether a tensor of the module requires grad at this moment."""
        return any(tensor.requires_grad for tensor in self._tensors)

    def change(self) -> str:
        """What has changed, in words, for a reason or a report."""
        if any(self._hooks):
            return "a hook was registered on an inner module"
        for name, module in self._module.named_modules():
            before = self._snapshot_of(module)
            if before is None:
                return f"module {name or 'itself'} was added or replaced"
            for key in before.keys() | module.__dict__.keys():
                old, new = before.get(key), module.__dict__.get(key)
                if old is not new and key != "__getstate__":
                    return f"attribute {name + '.' if name else ''}{key} changed"
        for name, tensor in chain(self._module.named_parameters(), self._module.named_buffers()):
            if not self._unchanged(tensor):
                return f"tensor {name} changed"
        return "something that the graph read outside the module's own attributes changed"

    # --- laying out ---------------------------------------------------------------------------

    def _watch_tensors(self, modules: Iterable[nn.Module]) -> None:
        self._ids = list(map(id, chain.from_iterable(map(_values, self._holders))))
        held = chain.from_iterable(map(_values, self._holders))
        plain = (v for d in self._dicts for v in d.values() if isinstance(v, torch.Tensor))
        found = {id(t): t for t in chain(held, plain, self._watch.tensors) if t is not None}
        self._tensors: list[torch.Tensor] = list(found.values())
        for tensor in self._tensors:
            if tensor.is_inference():
                raise ValueError("a weight was made in inference mode and counts no versions")
        self._versions = list(map(_version, self._tensors))
        self._pointers = list(map(_data_ptr, self._tensors))

    def _snapshot_of(self, module: nn.Module) -> dict[str, Any] | None:
        for held, copy in zip(self._dicts, self._dict_copies, strict=True):
            if held is module.__dict__:
                return copy
        return None

    def _unchanged(self, tensor: torch.Tensor) -> bool:
        for i, known in enumerate(self._tensors):
            if known is tensor:
                same_version = tensor._version == self._versions[i]
                return same_version and tensor.data_ptr() == self._pointers[i]
        return False


def _copy(held: Mapping[str, Any]) -> dict[str, Any]:
    """A copy to compare with. A BoundMethod's seal counts the references on itself: its stand-in,
    which is equal to it, holds none."""
    return {name: getattr(type(v), "_ovshim_stand_in", v) for name, v in held.items()}


def _forward_of(cls: type) -> Any:
    return getattr(cls, "forward", None)


def _inner_hooks(root: nn.Module, modules: Iterable[nn.Module]) -> Iterable[Any]:
    """Hooks that would fire inside the graph. Those of the root fire around it, as ever."""
    for module in modules:
        if module is not root:
            yield module._forward_hooks
            yield module._forward_pre_hooks
    yield torch_module._global_forward_hooks
    yield torch_module._global_forward_pre_hooks


def _plain_numbers(modules: Iterable[nn.Module]) -> Iterable[tuple[dict[str, Any], list[str]]]:
    """Plain numbers in users' modules, to be watched by identity: to `==`, and so to a comparison
    of dicts, 3, 3.0 and True are one, but `x * 3` and `x * 3.0` differ in dtype. torch's own
    modules pass theirs to C++ functions of fixed types, where they cannot differ."""
    for module in modules:
        if not type(module).__module__.startswith("torch.nn."):
            held = module.__dict__
            names = [k for k, v in held.items() if isinstance(v, (int, float, complex))]
            names = [name for name in names if name != "training"]
            if names:
                yield held, names
