"""Where values leave float16's range, found by running eager.

On a processor without float16 OpenVINO computes in something wider, and says nothing; so what fits
and what does not is found out from the values themselves, the same everywhere.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import nn
from torch.nn.modules import module as modules
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Overflow", "overflow"]

LARGEST = 65504.0
# Beyond this a value is a mark (the minimum in a mask) and not a result: cut to float16's range it
# means the same.
_MARK = 1e30


@dataclass(frozen=True)
class Overflow:
    """Attributes:
    path: of the module in which it began; "" is the root.
    value: the largest magnitude there.
    paths: of all modules that compute with values beyond the range.
    """

    path: str
    value: float
    paths: tuple[str, ...]


def overflow(
    module: nn.Module,
    call: Callable[[], Any],
    inputs: Sequence[torch.Tensor],
    in_fp16: Callable[[str], bool],
) -> Overflow | None:
    """Where a call leaves float16's range in a module that is to run in it; None where nowhere.

    Args:
        call: calls `module` on `inputs`.
        in_fp16: whether the module at a path is to run in fp16.

    Raises:
        whatever the module raises.
    """
    path_of = {id(m): path for path, m in module.named_modules()}
    seen = _Ranges(path_of, in_fp16)
    for name, parameter in module.named_parameters():
        seen.held(name.rpartition(".")[0], parameter)
    for tensor in inputs:
        seen.held("", tensor)
    with torch.no_grad(), seen.watching(), seen:
        call()
    return seen.found


class _Ranges(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Looks at the values of every operation, and knows whose module it is."""

    def __init__(self, path_of: dict[int, str], in_fp16: Callable[[str], bool]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._path_of = path_of
        self._in_fp16 = in_fp16
        self._thread = threading.get_ident()
        self._path = [""]
        # Tensors beyond the range, kept alive so that their identities stay theirs.
        self._beyond: dict[int, torch.Tensor] = {}
        self._first: tuple[str, float] | None = None
        self._met: dict[str, None] = {}

    @property
    def found(self) -> Overflow | None:
        return None if self._first is None else Overflow(*self._first, tuple(self._met))

    def held(self, path: str, tensor: torch.Tensor) -> None:
        """Take in a tensor that is there before the call."""
        size = _largest(tensor)
        if LARGEST < size < _MARK:
            self._beyond[id(tensor)] = tensor
            self._meet(path, size)

    def watching(self) -> _Watch:
        return _Watch(self._enter, self._leave)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        results = func(*args, **(kwargs or {}))
        given = pytree.tree_leaves((args, kwargs))
        tensors = [x for x in given if isinstance(x, torch.Tensor)]
        numbers = [x for x in given if isinstance(x, int | float) and abs(x) > LARGEST]
        from_beyond = max((_largest(x) for x in tensors if id(x) in self._beyond), default=0.0)
        # Something to add to a mask, or to fill one with, was meant to be beyond the range.
        meant = bool(numbers) or any(
            _largest(x) > LARGEST for x in tensors if id(x) not in self._beyond
        )
        size = from_beyond
        for result in pytree.tree_leaves(results):
            if isinstance(result, torch.Tensor) and tensors and (from_beyond or not meant):
                own = _largest(result)
                if LARGEST < own < _MARK:
                    self._beyond[id(result)] = result
                    size = max(size, own)
        if size:
            self._meet(self._path[-1], size)
        return results

    def _meet(self, path: str, size: float) -> None:
        if self._in_fp16(path):
            self._first = self._first or (path, size)
            self._met[path] = None

    def _enter(self, module: nn.Module) -> None:
        if threading.get_ident() == self._thread:
            self._path.append(self._path_of.get(id(module), self._path[-1]))

    def _leave(self, module: nn.Module) -> None:
        if threading.get_ident() == self._thread:
            self._path.pop()


class _Watch:
    """Calls back when any module's call begins and ends. Hooks for all modules, because one on a
    module of the user's would be seen by the user."""

    def __init__(
        self, enter: Callable[[nn.Module], None], leave: Callable[[nn.Module], None]
    ) -> None:
        self._enter = enter
        self._leave = leave

    def __enter__(self) -> None:
        self._handles = [
            modules.register_module_forward_pre_hook(lambda m, args: self._enter(m)),
            modules.register_module_forward_hook(lambda m, args, out: self._leave(m)),
        ]

    def __exit__(self, *exc: object) -> None:
        for handle in self._handles:
            handle.remove()


def _largest(tensor: torch.Tensor) -> float:
    """The largest magnitude of the finite elements of a floating tensor; 0.0 for others."""
    if not tensor.dtype.is_floating_point or tensor.numel() == 0:
        return 0.0
    size = float(tensor.detach().abs().max())
    if size < _MARK:
        return size
    kept = tensor.detach().abs()
    return float(torch.where(kept < _MARK, kept, 0.0).max()) or size
