"""Which sizes of a call may change: `dynamic_batch` and `dynamic_shapes` against an example."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree

from ovshim.errors import OptionError
from ovshim.options import Options

__all__ = ["Dims", "dynamic_dims"]

# For each tensor of a call, the dimensions that may change.
Dims = tuple[frozenset[int], ...]

_ALLOWED = (
    "for each argument, by name or position, its dimensions: {0: 'batch'}, ('batch', None), "
    "torch.export's Dim, or None for an argument whose sizes stay"
)


def dynamic_dims(
    options: Options,
    call: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    tensors: Sequence[torch.Tensor],
) -> Dims:
    """The dimensions of each tensor of a call that the options declare open.

    Args:
        call: the module's method, for the names of its arguments.
        tensors: the tensors of the call, in the order of `signature.flatten_call`.

    Raises:
        OptionError: `dynamic_shapes` names no argument or no dimension of this call.
    """
    named: dict[int, set[int]] = {id(tensor): set() for tensor in tensors}
    if options.dynamic_batch:
        for tensor in tensors:
            if tensor.dim() > 0:
                named[id(tensor)].add(0)
    if options.dynamic_shapes is not None:
        for name, value, spec in _pairs(options.dynamic_shapes, call, args, kwargs):
            _collect(name, value, spec, named, options.dynamic_shapes)
    return tuple(frozenset(named[id(tensor)]) for tensor in tensors)


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


def _collect(name: str, value: Any, spec: Any, named: dict[int, set[int]], given: Any) -> None:
    if spec is None:
        return
    if isinstance(value, torch.Tensor):
        named[id(value)] |= _dims_of(name, value, spec, given)
        return
    if isinstance(value, Mapping) and isinstance(spec, Mapping):
        for key, inner in spec.items():
            if key not in value:
                raise _wrong(given, f"{name} has no {key!r}; it has {', '.join(map(str, value))}.")
            _collect(f"{name}[{key!r}]", value[key], inner, named, given)
        return
    inner_values = pytree.tree_leaves(value)
    if isinstance(spec, (list, tuple)) and len(spec) == len(inner_values):
        for i, (inner_value, inner) in enumerate(zip(inner_values, spec, strict=True)):
            _collect(f"{name}[{i}]", inner_value, inner, named, given)
        return
    raise _wrong(given, f"{name} is a {type(value).__name__}; give one entry for each part of it.")


def _dims_of(name: str, tensor: torch.Tensor, spec: Any, given: Any) -> set[int]:
    if isinstance(spec, Mapping):
        entries = list(spec.items())
    elif isinstance(spec, (list, tuple)) and len(spec) == tensor.dim():
        entries = list(enumerate(spec))
    else:
        raise _wrong(given, f"{name} has {tensor.dim()} dimensions; give {{dimension: name}}.")
    dims = set()
    for dim, how in entries:
        if not isinstance(dim, int) or not -tensor.dim() <= dim < tensor.dim():
            raise _wrong(given, f"{name} has dimensions 0 to {tensor.dim() - 1}, not {dim!r}.")
        if _is_open(how):
            dims.add(dim % tensor.dim())
    return dims


def _is_open(how: Any) -> bool:
    """A name, a `Dim` and the hints AUTO and DYNAMIC open a dimension; None, an int and STATIC do
    not. Hints are told by their name: their enum is private to torch.export."""
    if how is None or isinstance(how, int):
        return False
    return getattr(getattr(how, "type", None), "name", "") != "STATIC"
