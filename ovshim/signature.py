"""What a call looks like: structure, dtypes, ranks, sizes and constants, and how to recognise it.

A call is flattened when its plan is made, and never on the hot path (see `matcher`).
"""

from __future__ import annotations

import dataclasses
import enum
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree

from ovshim.containers import Opened, opened

__all__ = [
    "Const",
    "Kind",
    "Pattern",
    "Structure",
    "TensorLeaf",
    "UnknownLeafError",
    "describe",
    "fits",
    "flatten",
    "flatten_call",
    "kind_of",
    "sizes_of",
    "text_of",
    "unflatten",
    "unflatten_call",
    "with_paths",
]

# Sizes of every tensor leaf; None is a dimension that may have any size.
Pattern = tuple[tuple[int | None, ...], ...]

_CONSTANTS = (
    type(None),
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    enum.Enum,
    torch.dtype,
    torch.device,
    torch.Size,
    torch.memory_format,
    torch.layout,
    slice,
    type(Ellipsis),
)
# Of which there may be classes of the user's own.
_BASES = (int, float, complex, str, bytes)


class UnknownLeafError(Exception):
    """An argument or an output of a type that ovshim knows nothing of."""


@dataclasses.dataclass(frozen=True)
class Structure:
    """Containers of a value: torch's own spec, and by leaf of that the objects behind it that are
    looked into (`containers`), each with the structure of its values."""

    spec: pytree.TreeSpec
    nested: tuple[tuple[int, Opened, Structure], ...] = ()

    def __str__(self) -> str:
        inner = ", ".join(f"{o.cls.__qualname__}@{i}: {sub}" for i, o, sub in self.nested)
        text = " ".join(str(self.spec).split())
        return f"{text} {{{inner}}}" if inner else text


def flatten(value: Any, caches: bool = True) -> tuple[list[Any], Structure]:
    """Leaves of a nested value, in order, and what is needed to build it again.

    Args:
        caches: see `containers.opened`.
    """
    leaves, spec = pytree.tree_flatten(value)
    found = [opened(leaf, caches) for leaf in leaves]
    if not any(found):
        return leaves, Structure(spec)
    flat: list[Any] = []
    nested = []
    for i, (leaf, inside) in enumerate(zip(leaves, found, strict=True)):
        if inside is None:
            flat.append(leaf)
            continue
        sub_leaves, sub = flatten(inside.values(leaf), caches)
        flat.extend(sub_leaves)
        nested.append((i, inside, sub))
    return flat, Structure(spec, tuple(nested))


def unflatten(leaves: Sequence[Any], structure: Structure) -> Any:
    """The inverse of `flatten`."""
    return _unflatten(iter(leaves), structure)


def _unflatten(leaves: Iterator[Any], structure: Structure) -> Any:
    nested = {i: (inside, sub) for i, inside, sub in structure.nested}
    top = []
    for i in range(structure.spec.num_leaves):
        if i in nested:
            inside, sub = nested[i]
            top.append(inside.make(_unflatten(leaves, sub)))
        else:
            top.append(next(leaves))
    return pytree.tree_unflatten(top, structure.spec)


def flatten_call(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[list[Any], Structure]:
    """Leaves of a call."""
    return flatten((args, dict(kwargs)), caches=False)


def unflatten_call(
    leaves: Sequence[Any], structure: Structure
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments whose leaves and structure `flatten_call` has given."""
    args, kwargs = unflatten(leaves, structure)
    return args, kwargs


@dataclasses.dataclass(frozen=True)
class TensorLeaf:
    """A tensor of a call: its dtype, its rank, how it lies in memory (`layout_of`), the first leaf
    that is the very same object (its own index where there is none: `attention(x, x, x)` is another
    kind than three tensors), and whether it requires grad (None in calls without gradients, for
    which that is nothing)."""

    dtype: torch.dtype
    rank: int
    layout: str
    same_as: int
    requires_grad: bool | None = None


ODD = "odd"
"""The layout of a tensor that is contiguous, with strides of its own where a size is 1: of a grey
image in channels_last, say."""


def layout_of(tensor: torch.Tensor) -> str:
    """How a tensor lies in memory, as far as a view of it, or a question for its strides, may come
    out otherwise: empty if it is contiguous in the usual strides, else `ODD`, or its dimensions
    from the outermost in. `0-2-3-1` is an image in channels_last; dimensions between which there is
    a gap (of a crop) are joined by a blank, and before a `/` the innermost one has gaps itself.
    Those of size 1 are left out."""
    if tensor.layout is not torch.strided:
        return ""
    sizes, strides = tensor.shape, tensor.stride()
    if tensor.is_contiguous():
        usual, expected = True, 1
        for size, stride in zip(reversed(sizes), reversed(strides), strict=True):
            usual = usual and stride == expected
            expected *= max(size, 1)
        return "" if usual else ODD
    order = sorted((d for d, n in enumerate(sizes) if n != 1), key=lambda d: -strides[d])
    joined = [
        f"{a}-" if strides[a] == strides[b] * sizes[b] else f"{a} "
        for a, b in itertools.pairwise(order)
    ]
    return f"{''.join(joined)}{order[-1]}{'' if strides[order[-1]] == 1 else '/'}"


@dataclasses.dataclass(frozen=True)
class Const:
    """A constant of a call. Type and text stand for it: `1`, `1.0` and `True` are not the same,
    neither are `0.0` and `-0.0`, and a NaN is the same as a NaN."""

    type: type
    text: str
    value: Any = dataclasses.field(compare=False)


@dataclasses.dataclass(frozen=True)
class Kind:
    """Everything of a call but its sizes: the key under which plans are looked up."""

    structure: Structure
    leaves: tuple[TensorLeaf | Const, ...]

    @property
    def tensors(self) -> tuple[int, ...]:
        """Indices of the leaves that are tensors."""
        return tuple(i for i, leaf in enumerate(self.leaves) if isinstance(leaf, TensorLeaf))

    @property
    def distinct(self) -> list[int]:
        """Indices of the leaves that are tensors, each object once: the inputs of a graph."""
        return [i for i in self.tensors if self.leaves[i].same_as == i]  # type: ignore[union-attr]

    @property
    def requires_grad(self) -> bool:
        """Whether gradients are recorded, and one of its tensors requires them."""
        return any(isinstance(leaf, TensorLeaf) and leaf.requires_grad for leaf in self.leaves)

    def without_grad(self) -> Kind:
        """The same of calls without gradients."""
        leaves = [
            dataclasses.replace(leaf, requires_grad=None) if isinstance(leaf, TensorLeaf) else leaf
            for leaf in self.leaves
        ]
        return Kind(self.structure, tuple(leaves))

    def requiring(self, leaves: Sequence[Any]) -> list[Any]:
        """These leaves, their tensors requiring grad where the kind's do: as what was computed of
        others, for a leaf of autograd's graph may not be written to."""
        made: dict[int, Any] = {}
        for known, leaf in zip(self.leaves, leaves, strict=True):
            wanted = isinstance(known, TensorLeaf) and known.requires_grad
            if wanted and not leaf.requires_grad:
                with torch.enable_grad():
                    made.setdefault(id(leaf), leaf.detach().requires_grad_().clone())
        return [made.get(id(leaf), leaf) for leaf in leaves]

    def __str__(self) -> str:
        leaves = ", ".join(
            f"{_name(leaf.dtype)}r{leaf.rank}{leaf.layout and f' strided {leaf.layout}'}"
            + (" grad" if leaf.requires_grad else "")
            + ("" if leaf.same_as == i else f"={leaf.same_as}")
            if isinstance(leaf, TensorLeaf)
            else f"{leaf.type.__qualname__}:{leaf.text}"
            for i, leaf in enumerate(self.leaves)
        )
        return f"{self.structure} [{leaves}]"


def text_of(constant: Any) -> str:
    """What stands for the value of a constant, whatever a class of the user's own shows of it."""
    if isinstance(constant, enum.Enum):
        return enum.Enum.__repr__(constant)
    base = next((base for base in _BASES if isinstance(constant, base)), None)
    if base is None or type(constant) in (base, bool):
        return repr(constant)
    beside = getattr(constant, "__dict__", None)
    return f"{base.__repr__(constant)} {beside}" if beside else base.__repr__(constant)


def kind_of(leaves: Sequence[Any], structure: Structure, grad: bool = False) -> Kind:
    """The kind of a flattened call.

    Args:
        grad: whether gradients are recorded in it.

    Raises:
        UnknownLeafError: a leaf is neither a tensor nor a plain constant.
    """
    first: dict[int, int] = {}
    found: list[TensorLeaf | Const] = []
    for i, leaf in enumerate(leaves):
        if isinstance(leaf, torch.Tensor):
            same_as = first.setdefault(id(leaf), i)
            requires_grad = leaf.requires_grad if grad else None
            found.append(
                TensorLeaf(leaf.dtype, leaf.dim(), layout_of(leaf), same_as, requires_grad)
            )
        elif isinstance(leaf, _CONSTANTS):
            found.append(Const(type(leaf), text_of(leaf), leaf))
        else:
            raise UnknownLeafError(f"{type(leaf).__module__}.{type(leaf).__qualname__}")
    return Kind(structure, tuple(found))


def sizes_of(leaves: Sequence[Any]) -> tuple[tuple[int, ...], ...]:
    """Sizes of the tensors among the leaves, in order."""
    return tuple(tuple(leaf.shape) for leaf in leaves if isinstance(leaf, torch.Tensor))


def describe(kind: Kind, pattern: Pattern) -> str:
    """A signature in words that a reader knows: `x: float32[?, 3, 224, 224], flag=True`."""
    names = _leaf_names(kind.structure)
    sizes = iter(pattern)
    words = []
    for name, leaf in zip(names, kind.leaves, strict=True):
        if isinstance(leaf, TensorLeaf):
            dims = ", ".join("?" if n is None else str(n) for n in next(sizes))
            strided = "" if leaf.layout in ("", ODD) else " strided"
            grad = " requiring grad" if leaf.requires_grad else ""
            words.append(f"{name}: {_name(leaf.dtype)}[{dims}]{strided}{grad}")
        else:
            words.append(f"{name}={leaf.text}")
    return ", ".join(words)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def with_paths(value: Any) -> list[tuple[pytree.KeyPath, Any]]:
    """Leaves of a nested value, each with the way to it; with none where a type does not name its
    parts, as types need not that are registered with pytree."""
    try:
        return pytree.tree_flatten_with_path(value)[0]
    except ValueError:
        return [((), leaf) for leaf in pytree.tree_leaves(value)]


def _leaf_names(structure: Structure) -> list[str]:
    count = structure.spec.num_leaves + sum(
        len(_leaf_names(sub)) - 1 for _, _, sub in structure.nested
    )
    names = [str(i) for i in range(count)]
    try:
        marks = unflatten(list(range(count)), structure)
    except (AttributeError, TypeError, ValueError):  # a class that takes nothing but tensors
        return names
    for path, mark in with_paths(marks):
        text = pytree.keystr(path[1:]) if len(path) > 1 else str(mark)
        text = text.replace("['", ".").replace("']", "").removeprefix(".")
        if isinstance(mark, int):
            names[mark] = text
        elif path:
            for field in dataclasses.fields(mark):
                inner = getattr(mark, field.name)
                if isinstance(inner, int):
                    names[inner] = f"{text}.{field.name}"
    return names


def fits(sizes: Sequence[int], pattern: Sequence[int | None]) -> bool:
    """Whether the sizes of one tensor match its part of a pattern."""
    return len(sizes) == len(pattern) and all(
        want is None or have == want for have, want in zip(sizes, pattern, strict=True)
    )
