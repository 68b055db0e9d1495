"""Which sizes of a call may change: `dynamic_batch` and `dynamic_shapes` against an example."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree

from ovshim.errors import OptionError
from ovshim.options import Options

__all__ = ["Dims", "check_names", "dynamic_dims", "ordered_keywords"]

# For each tensor of a call, the dimensions that may change.
Dims = tuple[frozenset[int], ...]

_ALLOWED = (
    "for each argument, by name or position, its dimensions: {0: 'batch'}, ('batch', None), "
    "torch.export's Dim, or None for an argument whose sizes stay"
)


def ordered_keywords(call: Callable[..., Any], names: Iterable[str]) -> list[str]:
    """Those of a call's keywords whose order the method can tell: they are none of its parameters,
    and it gets them as a dict."""
    try:
        parameters = inspect.signature(call).parameters.values()
    except (TypeError, ValueError):  # a function that does not say
        return list(names)
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    known = {p.name for p in parameters if p.kind in named}
    free = [name for name in names if name not in known]
    return free if len(free) > 1 else []


def dynamic_dims(
    options: Options,
    call: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    tensors: Sequence[torch.Tensor],
    lenient: bool = False,
) -> Dims:
    """The dimensions of each tensor of a call that the options declare open.

    Args:
        call: the module's method, for the names of its arguments.
        tensors: the tensors of the call, in the order of `signature.flatten_call`.
        lenient: pass over what does not fit: it was right for the example, and this is some other
            call, which may well lack an argument.

    Raises:
        OptionError: `dynamic_shapes` names no argument or no dimension of this call.
    """
    named: dict[int, set[int]] = {id(tensor): set() for tensor in tensors}
    if options.dynamic_batch:
        for tensor in tensors:
            if tensor.dim() > 0:
                named[id(tensor)].add(0)
    if options.dynamic_shapes is not None:
        try:
            reading = _Reading(options.dynamic_shapes, named)
            for name, value, spec in _pairs(options.dynamic_shapes, call, args, kwargs):
                reading.collect(name, value, spec)
        except OptionError:
            if not lenient:
                raise
    return tuple(frozenset(named[id(tensor)]) for tensor in tensors)


def check_names(options: Options, call: Callable[..., Any]) -> None:
    """What can be said of `dynamic_shapes` before there is an example.

    Raises:
        OptionError: it names an argument that the method does not take.
    """
    if not isinstance(options.dynamic_shapes, Mapping):
        return
    try:
        parameters = inspect.signature(call).parameters.values()
    except (TypeError, ValueError):  # no signature to ask
        return
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
        return
    names = [parameter.name for parameter in parameters]
    for name in options.dynamic_shapes:
        if name not in names:
            text = f"{name!r} is no argument of this method; its arguments: {', '.join(names)}."
            raise _wrong(options.dynamic_shapes, text)


def _wrong(given: Any, remedy: str) -> OptionError:
    return OptionError("dynamic_shapes", given, _ALLOWED, remedy)


def _pairs(
    given: Any, call: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> list[tuple[str, Any, Any]]:
    """(name, argument, its specification), for each argument that has one."""
    try:
        bound = inspect.signature(call).bind(*args, **kwargs).arguments
    except (TypeError, ValueError):  # no signature, or a call that eager itself will refuse
        bound = dict(kwargs)
    arguments: dict[str, Any] = {}
    for name, value in bound.items():
        if isinstance(value, Mapping) and name not in kwargs and _is_var_keyword(call, name):
            arguments.update(value)
        else:
            arguments[name] = value
    if isinstance(given, Mapping):
        for name in given:
            if name not in arguments:
                names = ", ".join(arguments) or "none"
                raise _wrong(
                    given, f"{name!r} is no argument of this call; its arguments: {names}."
                )
        return [(name, arguments[name], spec) for name, spec in given.items()]
    values = [*args, *kwargs.values()]
    if len(given) > len(values):
        raise _wrong(given, f"The call has {len(values)} arguments; give no more entries.")
    return [(f"argument {i}", values[i], spec) for i, spec in enumerate(given)]


def _is_var_keyword(call: Callable[..., Any], name: str) -> bool:
    parameter = inspect.signature(call).parameters.get(name)
    return parameter is not None and parameter.kind is inspect.Parameter.VAR_KEYWORD


class _Reading:
    """Reads a specification against the tensors of a call."""

    def __init__(self, given: Any, named: dict[int, set[int]]) -> None:
        self.given = given
        self.named = named
        self.sizes: dict[str, tuple[int, str]] = {}

    def collect(self, name: str, value: Any, spec: Any) -> None:
        if spec is None:
            return
        if isinstance(value, torch.Tensor):
            self.named[id(value)] |= self._dims_of(name, value, spec)
            return
        if isinstance(value, Mapping) and isinstance(spec, Mapping):
            for key, inner in spec.items():
                if key not in value:
                    text = f"{name} has no {key!r}; it has {', '.join(map(str, value))}."
                    raise _wrong(self.given, text)
                self.collect(f"{name}[{key!r}]", value[key], inner)
            return
        parts = pytree.tree_leaves(value)
        if isinstance(spec, (list, tuple)) and len(spec) == len(parts):
            for i, (part, inner) in enumerate(zip(parts, spec, strict=True)):
                self.collect(f"{name}[{i}]", part, inner)
            return
        text = f"{name} is a {type(value).__name__}; give one entry for each part of it."
        raise _wrong(self.given, text)

    def _dims_of(self, name: str, tensor: torch.Tensor, spec: Any) -> set[int]:
        if isinstance(spec, Mapping):
            entries = list(spec.items())
        elif isinstance(spec, (list, tuple)) and len(spec) == tensor.dim():
            entries = list(enumerate(spec))
        else:
            text = f"{name} has {tensor.dim()} dimensions; give {{dimension: name}}."
            raise _wrong(self.given, text)
        dims = set()
        for dim, how in entries:
            if not isinstance(dim, int) or not -tensor.dim() <= dim < tensor.dim():
                text = f"{name} has dimensions 0 to {tensor.dim() - 1}, not {dim!r}."
                raise _wrong(self.given, text)
            if self._is_open(f"{name}, dimension {dim}", tensor.shape[dim], how):
                dims.add(dim % tensor.dim())
        return dims

    def _is_open(self, where: str, size: int, how: Any) -> bool:
        """A name, a `Dim` and the hints AUTO and DYNAMIC open a dimension; None, its own size and
        STATIC do not. Hints are told by their names: their enum is private to torch.export."""
        if how is None or getattr(getattr(how, "type", None), "name", "") == "STATIC":
            return False
        if type(how) is int:
            if how != size:
                raise _wrong(self.given, f"{where} has size {size} in the example, not {how}.")
            return False
        if getattr(getattr(how, "type", None), "name", "") in ("AUTO", "DYNAMIC"):
            return True
        dim = type(how).__module__ == "torch.export.dynamic_shapes"
        if not dim and not isinstance(how, str):
            raise _wrong(self.given, f"{where} is given {how!r}; give a name or a Dim.")
        least, most = getattr(how, "min", 0), getattr(how, "max", None)
        # 2 is what a Dim says where no minimum was given: 0 and 1 are not forbidden by that.
        too_small = isinstance(least, int) and size < least and least > 2
        if dim and (too_small or (isinstance(most, int) and size > most)):
            text = f"{where} has size {size} in the example, outside of {least} to {most}."
            raise _wrong(self.given, text)
        name = how if isinstance(how, str) else str(getattr(how, "__name__", how))
        known, there = self.sizes.setdefault(name, (size, where))
        if known != size:
            text = f"{name!r} is {known} at {there} and {size} at {where} of the example."
            raise _wrong(self.given, text)
        return True
