"""What a call looks like: structure, dtypes, ranks, sizes and constants, and how to recognise it.

A call is flattened once, when its plan is made. From the result two small functions are compiled:
a *matcher*, which tells in about a microsecond whether another call has the same signature and
hands out its tensors, and a *builder*, which puts a plan's output tensors back into the module's
own containers. Neither walks a tree on the hot path.
"""

from __future__ import annotations

import dataclasses
import enum
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree

__all__ = [
    "Const",
    "Kind",
    "Output",
    "Pattern",
    "Structure",
    "TensorLeaf",
    "UnknownLeafError",
    "compile_builder",
    "compile_matcher",
    "describe",
    "flatten",
    "flatten_call",
    "kind_of",
    "sizes_of",
    "unflatten",
    "unflatten_call",
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


class UnknownLeafError(Exception):
    """An argument or an output of a type that ovshim knows nothing of."""


@dataclasses.dataclass(frozen=True)
class Structure:
    """Containers of a value: torch's own spec, and behind it the dataclasses that torch's registry
    does not know, each with the structure of its fields (torch's registry is global: putting
    users' classes there would change what torch.export does with them)."""

    spec: pytree.TreeSpec
    nested: tuple[tuple[int, type, tuple[str, ...], Structure], ...] = ()

    def __str__(self) -> str:
        inner = ", ".join(f"{cls.__qualname__}@{i}: {sub}" for i, cls, _, sub in self.nested)
        text = " ".join(str(self.spec).split())
        return f"{text} {{{inner}}}" if inner else text


def flatten(value: Any) -> tuple[list[Any], Structure]:
    """Leaves of a nested value, in order, and what is needed to build it again."""
    leaves, spec = pytree.tree_flatten(value)
    if not any(map(_is_private_container, leaves)):
        return leaves, Structure(spec)
    flat: list[Any] = []
    nested = []
    for i, leaf in enumerate(leaves):
        if not _is_private_container(leaf):
            flat.append(leaf)
            continue
        names = tuple(f.name for f in dataclasses.fields(leaf))
        sub_leaves, sub = flatten([getattr(leaf, name) for name in names])
        flat.extend(sub_leaves)
        nested.append((i, type(leaf), names, sub))
    return flat, Structure(spec, tuple(nested))


def unflatten(leaves: Sequence[Any], structure: Structure) -> Any:
    """The inverse of `flatten`."""
    return _unflatten(iter(leaves), structure)


def _unflatten(leaves: Iterator[Any], structure: Structure) -> Any:
    nested = {i: (cls, names, sub) for i, cls, names, sub in structure.nested}
    top = []
    for i in range(structure.spec.num_leaves):
        if i in nested:
            cls, names, sub = nested[i]
            top.append(_make_dataclass(cls, names, _unflatten(leaves, sub)))
        else:
            top.append(next(leaves))
    return pytree.tree_unflatten(top, structure.spec)


def _make_dataclass(cls: type, names: Sequence[str], values: Sequence[Any]) -> Any:
    # Not cls(**fields): __post_init__ ran when the module made its own and must not run twice.
    made = object.__new__(cls)
    for name, value in zip(names, values, strict=True):
        object.__setattr__(made, name, value)
    return made


def _is_private_container(leaf: Any) -> bool:
    if not dataclasses.is_dataclass(leaf) or isinstance(leaf, type):
        return False
    names = {f.name for f in dataclasses.fields(leaf)}
    held = getattr(leaf, "__dict__", None)
    if any(not hasattr(leaf, name) for name in names):
        return False
    return held is None or held.keys() <= names


def flatten_call(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[list[Any], Structure]:
    """Leaves of a call. Keywords are sorted: their order in the call means nothing to `forward`."""
    return flatten((args, {name: kwargs[name] for name in sorted(kwargs)}))


def unflatten_call(
    leaves: Sequence[Any], structure: Structure
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    args, kwargs = unflatten(leaves, structure)
    return args, kwargs


@dataclasses.dataclass(frozen=True)
class TensorLeaf:
    """A tensor of a call: its dtype, its rank, and the first leaf that is the very same object
    (its own index where there is none: `attention(x, x, x)` is another kind than three tensors)."""

    dtype: torch.dtype
    rank: int
    same_as: int


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

    def __str__(self) -> str:
        leaves = ", ".join(
            f"{_name(leaf.dtype)}r{leaf.rank}" + ("" if leaf.same_as == i else f"={leaf.same_as}")
            if isinstance(leaf, TensorLeaf)
            else f"{leaf.type.__qualname__}:{leaf.text}"
            for i, leaf in enumerate(self.leaves)
        )
        return f"{self.structure} [{leaves}]"


def kind_of(leaves: Sequence[Any], structure: Structure) -> Kind:
    """The kind of a flattened call.

    Raises:
        UnknownLeafError: a leaf is neither a tensor nor a plain constant.
    """
    first: dict[int, int] = {}
    found: list[TensorLeaf | Const] = []
    for i, leaf in enumerate(leaves):
        if isinstance(leaf, torch.Tensor):
            found.append(TensorLeaf(leaf.dtype, leaf.dim(), first.setdefault(id(leaf), i)))
        elif isinstance(leaf, _CONSTANTS):
            found.append(Const(type(leaf), repr(leaf), leaf))
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
            words.append(f"{name}: {_name(leaf.dtype)}[{dims}]")
        else:
            words.append(f"{name}={leaf.text}")
    return ", ".join(words)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _leaf_names(structure: Structure) -> list[str]:
    count = structure.spec.num_leaves + sum(
        len(_leaf_names(sub)) - 1 for _, _, _, sub in structure.nested
    )
    marks = unflatten(list(range(count)), structure)
    names = [str(i) for i in range(count)]
    for path, mark in pytree.tree_flatten_with_path(marks)[0]:
        text = pytree.keystr(path[1:]) if len(path) > 1 else str(mark)
        text = text.replace("['", ".").replace("']", "").removeprefix(".")
        if isinstance(mark, int):
            names[mark] = text
        else:
            for field in dataclasses.fields(mark):
                inner = getattr(mark, field.name)
                if isinstance(inner, int):
                    names[inner] = f"{text}.{field.name}"
    return names


# --- the matcher ------------------------------------------------------------------------------

Matcher = Callable[[tuple[Any, ...], dict[str, Any]], "tuple[torch.Tensor, ...] | None"]


def compile_matcher(kind: Kind, pattern: Pattern, size_guards: Sequence[str] = ()) -> Matcher:
    """A function `(args, kwargs) -> tensors | None` for calls of this kind and these sizes.

    Args:
        kind: what a call must look like.
        pattern: sizes of its tensors, None for any.
        size_guards: further conditions over sizes, as expressions in `s<tensor>[<dimension>]`.

    Only plain strided `torch.Tensor`s on the CPU match: every other sort needs eager.
    """
    writer = _Writer(kind, pattern)
    accessible = writer.containers()
    if accessible is None:
        return _generic_matcher(kind, pattern, size_guards)
    source = ["def match(args, kwargs):", *accessible, *writer.leaves()]
    source += [f"    if not ({guard}): return None" for guard in size_guards]
    source.append(f"    return ({''.join(f'{name}, ' for name in writer.tensor_names)})")
    exec("\n".join(source), writer.scope)
    return writer.scope["match"]  # type: ignore[no-any-return]


class _Writer:
    """Writes the checks of a matcher, line by line."""

    def __init__(self, kind: Kind, pattern: Pattern) -> None:
        self.kind = kind
        self.pattern = pattern
        self.access: list[str] = []
        self.scope: dict[str, Any] = {"Tensor": torch.Tensor, "strided": torch.strided}
        self.tensor_names: list[str] = []

    def containers(self) -> list[str] | None:
        """Checks of the containers; None where one is neither tuple, list nor dict."""
        if self.kind.structure.nested:
            return None
        args, kwargs = self.kind.structure.spec.children()
        if kwargs.type is not dict:
            return None
        lines: list[str] = []
        for name, spec in (("args", args), ("kwargs", kwargs)):
            if not self._walk(name, spec, lines, top=True):
                return None
        return lines

    def _walk(self, place: str, spec: pytree.TreeSpec, lines: list[str], top: bool = False) -> bool:
        if spec.is_leaf():
            self.access.append(place)
            return True
        if spec.type not in (tuple, list, dict):
            return False
        name = spec.type.__name__
        test = f"len({place}) != {spec.num_children}"
        lines.append(
            f"    if {test if top else f'type({place}) is not {name} or {test}'}: return None"
        )
        keys = list(spec.context) if spec.type is dict else list(range(spec.num_children))
        if not all(isinstance(key, (str, int)) for key in keys):
            return False
        for key, child in zip(keys, spec.children(), strict=True):
            if spec.type is dict:
                lines.append(f"    if {key!r} not in {place}: return None")
            if not self._walk(f"{place}[{key!r}]", child, lines):
                return False
        return True

    def leaves(self) -> list[str]:
        lines: list[str] = []
        names: dict[int, str] = {}
        for i, (place, leaf) in enumerate(zip(self.access, self.kind.leaves, strict=True)):
            if isinstance(leaf, Const):
                lines += self._const(i, place, leaf)
                continue
            t = len(self.tensor_names)
            name = names[i] = f"a{t}"
            self.tensor_names.append(name)
            lines += self._tensor(t, place, leaf)
            for earlier, other in names.items():
                if earlier != i and leaf.same_as in (earlier, i):
                    wanted = "is not" if leaf.same_as == earlier else "is"
                    lines.append(f"    if {name} {wanted} {other}: return None")
        return lines

    def _tensor(self, t: int, place: str, leaf: TensorLeaf) -> list[str]:
        self.scope[f"d{t}"] = leaf.dtype
        dims = [f"s{t}[{d}] != {n}" for d, n in enumerate(self.pattern[t]) if n is not None]
        return [
            f"    a{t} = {place}",
            f"    if type(a{t}) is not Tensor or a{t}.dtype is not d{t}"
            f" or not a{t}.is_cpu or a{t}.layout is not strided: return None",
            f"    s{t} = a{t}.shape",
            f"    if {' or '.join([f'len(s{t}) != {leaf.rank}', *dims])}: return None",
        ]

    def _const(self, i: int, place: str, leaf: Const) -> list[str]:
        if leaf.value is None or leaf.value is True or leaf.value is False:
            return [f"    if {place} is not {leaf.value}: return None"]
        self.scope[f"c{i}"], self.scope[f"t{i}"] = leaf.value, leaf.type
        if leaf.type in (int, str, bytes):
            return [f"    if type({place}) is not t{i} or {place} != c{i}: return None"]
        # repr, not ==: it tells 0.0 from -0.0 and finds a NaN equal to itself.
        return [f"    if type({place}) is not t{i} or repr({place}) != {leaf.text!r}: return None"]


def _generic_matcher(kind: Kind, pattern: Pattern, size_guards: Sequence[str]) -> Matcher:
    """For containers whose inside only torch's pytree knows: flatten, then compare."""
    names = ", ".join(f"s{t}" for t in range(len(pattern)))
    text = " and ".join(f"({guard})" for guard in size_guards) or "True"
    sizes_hold = eval(f"lambda {names}: {text}")

    def match(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[torch.Tensor, ...] | None:
        leaves, structure = flatten_call(args, kwargs)
        try:
            if kind_of(leaves, structure) != kind:
                return None
        except UnknownLeafError:
            return None
        tensors = tuple(leaf for leaf in leaves if isinstance(leaf, torch.Tensor))
        for tensor, sizes in zip(tensors, pattern, strict=True):
            if type(tensor) is not torch.Tensor or not tensor.is_cpu:
                return None
            if tensor.layout is not torch.strided or not fits(tuple(tensor.shape), sizes):
                return None
        return tensors if sizes_hold(*(tensor.shape for tensor in tensors)) else None

    return match


def fits(sizes: Sequence[int], pattern: Sequence[int | None]) -> bool:
    """Whether the sizes of one tensor match its part of a pattern."""
    return len(sizes) == len(pattern) and all(
        want is None or have == want for have, want in zip(sizes, pattern, strict=True)
    )


# --- the builder ------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Output:
    """Where one leaf of an output comes from: a tensor that the graph computed (`computed`, by
    index), a tensor of the call itself (`given`, by index), or a constant."""

    computed: int | None = None
    given: int | None = None
    value: Any = None


Builder = Callable[[Sequence[torch.Tensor], Sequence[torch.Tensor]], Any]


def compile_builder(structure: Structure, leaves: Sequence[Output]) -> Builder:
    """A function `(computed, given) -> value` that builds an output of the module."""
    scope: dict[str, Any] = {"unflatten": unflatten, "structure": structure}
    names = []
    for i, leaf in enumerate(leaves):
        if leaf.computed is not None:
            names.append(f"computed[{leaf.computed}]")
        elif leaf.given is not None:
            names.append(f"given[{leaf.given}]")
        else:
            scope[f"c{i}"] = leaf.value
            names.append(f"c{i}")
    text = None if structure.nested else _constructor(structure.spec, iter(names), scope)
    if text is None:
        text = f"unflatten([{', '.join(names)}], structure)"
    return eval(f"lambda computed, given: {text}", scope)  # type: ignore[no-any-return]


def _constructor(spec: pytree.TreeSpec, names: Iterator[str], scope: dict[str, Any]) -> str | None:
    """The expression that builds one container; None where only pytree knows how."""
    if spec.is_leaf():
        return next(names)
    parts = [_constructor(child, names, scope) for child in spec.children()]
    if any(part is None for part in parts):
        return None
    inner = [part for part in parts if part is not None]
    if spec.type is tuple:
        return f"({''.join(f'{part}, ' for part in inner)})"
    if spec.type is list:
        return f"[{', '.join(inner)}]"
    items = None
    if spec.type is dict or _is_model_output(spec.type):
        items = ", ".join(f"{key!r}: {part}" for key, part in zip(spec.context, inner, strict=True))
    if spec.type is dict:
        return f"{{{items}}}" if all(isinstance(key, (str, int)) for key in spec.context) else None
    if items is not None:
        name = f"make{len(scope)}"
        scope[name] = _model_output_maker(spec.type)
        return f"{name}({{{items}}})"
    return None


def _is_model_output(cls: Any) -> bool:
    return isinstance(cls, type) and issubclass(cls, OrderedDict) and dataclasses.is_dataclass(cls)


def _model_output_maker(cls: type) -> Callable[[dict[str, Any]], Any]:
    """Builds transformers' ModelOutput in 2 µs; its own constructor, which pytree calls, takes 10.

    Such an object is an ordered dict of what is not None and has every field as an attribute."""
    fields = {f.name: None for f in dataclasses.fields(cls)}

    def make(items: dict[str, Any]) -> Any:
        made = cls.__new__(cls)
        for name, value in items.items():
            OrderedDict.__setitem__(made, name, value)
        held = made.__dict__
        held.update(fields)
        held.update(items)
        return made

    return make
