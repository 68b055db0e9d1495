"""Whether two answers could be told apart: structure, dtypes, shapes, values, shared memory."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["differences", "sharing"]

# Of a result in that dtype no better agreement can be asked for. float64 has to be computed in
# float64: a module is never lowered unasked.
_TOLERANCE = {torch.float16: 0.03, torch.bfloat16: 0.03, torch.float64: 1e-9}
# Root mean square below which a difference is noise: an output that is 0 but for rounding.
_FLOOR = 1e-3


def differences(actual: Any, expected: Any, tolerance: float, where: str = "output") -> list[str]:
    """In what way the two differ, as sentences; empty where they are alike."""
    found: list[str] = []
    _compare(actual, expected, tolerance, where, found, set())
    return found


def _compare(
    actual: Any, expected: Any, tolerance: float, where: str, found: list[str], seen: set[int]
) -> None:
    if type(actual) is not type(expected):
        found.append(f"{where}: {type(actual).__name__} for {type(expected).__name__}")
    elif isinstance(expected, Tensor):
        found.extend(f"{where}: {told}" for told in _tensors(actual, expected, tolerance))
    elif isinstance(expected, np.ndarray):
        if not np.array_equal(actual, expected):
            found.append(f"{where}: other values in an array")
    elif isinstance(expected, str | bytes | int | float | complex | type | None | enum.Enum):
        if actual != expected and not (actual != actual and expected != expected):
            found.append(f"{where}: {actual!r} for {expected!r}")
    elif id(expected) not in seen:
        seen.add(id(expected))
        parts, other = dict(_parts(expected)), dict(_parts(actual))
        if list(parts) != list(other):
            found.append(f"{where}: parts {list(other)} for {list(parts)}")
            return
        for name, part in parts.items():
            _compare(other[name], part, tolerance, where + name, found, seen)


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    """What a container or an object holds, by the way to it."""
    if isinstance(value, Mapping):
        yield from ((f"[{key!r}]", part) for key, part in value.items())
    elif isinstance(value, list | tuple):
        yield from ((f"[{index}]", part) for index, part in enumerate(value))
    elif isinstance(value, set | frozenset):
        yield from ((f"{{{part!r}}}", part) for part in sorted(value, key=repr))
    if dataclasses.is_dataclass(value):
        names = [field.name for field in dataclasses.fields(value)]
        yield from ((f".{name}", getattr(value, name)) for name in names)
    elif not isinstance(value, torch.nn.Module):
        yield from ((f".{name}", part) for name, part in getattr(value, "__dict__", {}).items())


def _tensors(actual: Tensor, expected: Tensor, tolerance: float) -> Iterator[str]:
    for name in ("dtype", "shape", "layout", "device", "requires_grad", "is_quantized"):
        one, other = getattr(actual, name), getattr(expected, name)
        if one != other:
            yield f"{name} {one} for {other}"
            if name != "requires_grad":
                return
    if expected.layout != torch.strided:
        actual, expected = actual.to_dense(), expected.to_dense()
    if expected.is_quantized:
        actual, expected = actual.dequantize(), expected.dequantize()
    actual, expected = actual.detach().resolve_conj(), expected.detach().resolve_conj()
    if expected.is_complex():
        actual, expected = torch.view_as_real(actual), torch.view_as_real(expected)
    if not expected.is_floating_point():
        if not torch.equal(actual, expected):
            yield f"{int((actual != expected).sum())} of {expected.numel()} values differ"
        return
    yield from _floats(actual, expected, _TOLERANCE.get(expected.dtype, tolerance))


def _floats(actual: Tensor, expected: Tensor, tolerance: float) -> Iterator[str]:
    one, other = actual.double(), expected.double()
    if not torch.equal(one.isnan(), other.isnan()):
        yield f"NaN in {int(one.isnan().sum())} places for {int(other.isnan().sum())}"
        return
    endless = other.isinf()
    if not torch.equal(one.isinf(), endless) or not torch.equal(one[endless], other[endless]):
        yield "infinity in other places"
        return
    finite = other.isfinite()
    off = torch.linalg.vector_norm(one[finite] - other[finite]).item()
    floor = _FLOOR * max(1, int(finite.sum())) ** 0.5
    size = torch.linalg.vector_norm(other[finite]).item()
    if off > tolerance * max(size, floor):
        yield f"off by {off / max(size, floor):.2g} of {size:.3g} ({tuple(expected.shape)})"


def sharing(
    output: Any, arguments: Any, weights: Mapping[str, Tensor]
) -> dict[str, tuple[str, str]]:
    """For each tensor of an output: which tensor it is, and which it has elements in common with.

    Both by the way to the first such tensor among weights, arguments and the output itself.
    """
    known = [(f"weight {name}", weight) for name, weight in weights.items()]
    known += [(f"argument{where}", tensor) for where, tensor in _leaves(arguments)]
    told: dict[str, tuple[str, str]] = {}
    for where, tensor in _leaves(output):
        is_same = next((name for name, other in known if other is tensor), where)
        overlaps = next((name for name, other in known if _overlap(tensor, other)), where)
        told[where] = (is_same, overlaps)
        known.append((where, tensor))
    return told


def _overlap(one: Tensor, other: Tensor) -> bool:
    """Whether writing to the one could change the other.

    Two views of one storage need not overlap: rows handed out by `unbind` do not.
    """
    if one.layout != torch.strided or other.layout != torch.strided or one.is_meta or other.is_meta:
        return one is other
    storages = one.untyped_storage(), other.untyped_storage()
    if not one.numel() or not other.numel() or storages[0].data_ptr() != storages[1].data_ptr():
        return False
    return bool(set(_bytes(one)) & set(_bytes(other)))


def _bytes(tensor: Tensor) -> list[int]:
    """Offsets in its storage of the first byte of each element."""
    size = tensor.element_size()
    held = torch.arange(tensor.untyped_storage().nbytes() // size)
    return (
        held.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).flatten() * size
    ).tolist()


def _leaves(value: Any, where: str = "", seen: set[int] | None = None) -> list[tuple[str, Tensor]]:
    seen = set() if seen is None else seen
    if isinstance(value, Tensor):
        return [(where, value)]
    if isinstance(value, str | bytes | int | float | complex | type | None) or id(value) in seen:
        return []
    seen.add(id(value))
    parts = _parts(value)
    return [leaf for name, part in parts for leaf in _leaves(part, where + name, seen)]
