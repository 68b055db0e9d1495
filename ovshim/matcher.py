"""From a signature to two small functions, compiled once and run on every call.

A *matcher* tells in about a microsecond whether a call has the signature and hands out its
tensors; a *builder* puts a plan's output tensors back into the module's own containers. Neither
walks a tree: torch's pytree takes 8 µs to flatten a call of one tensor.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree

from ovshim.signature import (
    Const,
    Kind,
    Pattern,
    Structure,
    TensorLeaf,
    UnknownLeafError,
    fits,
    flatten_call,
    kind_of,
    layout_of,
    text_of,
    unflatten,
)
from ovshim.views import View

__all__ = [
    "Builder",
    "Glance",
    "Matcher",
    "Output",
    "compile_builder",
    "compile_glance",
    "compile_matcher",
    "first_computed",
    "model_output_maker",
]

# --- the matcher ------------------------------------------------------------------------------

Matcher = Callable[[tuple[Any, ...], dict[str, Any]], "tuple[torch.Tensor, ...] | None"]


def compile_matcher(
    kind: Kind,
    pattern: Pattern,
    size_guards: Sequence[str] = (),
    ordered: Sequence[str] = (),
    strict: bool = False,
) -> Matcher:
    """A function `(args, kwargs) -> tensors | None` for calls of this kind and these sizes.

    Args:
        kind: what a call must look like.
        pattern: sizes of its tensors, None for any.
        size_guards: further conditions over sizes, as expressions in `s<tensor>[<dimension>]`.
        ordered: keywords that have to come in this order (`shapes.ordered_keywords`).
        strict: whether strides of contiguous tensors are asked for as well, of sizes of 1.

    Only plain strided `torch.Tensor`s on the CPU match: every other sort needs eager.
    """
    writer = _Writer(kind, pattern, ordered, strict)
    accessible = writer.containers()
    if accessible is None:
        return _generic_matcher(kind, pattern, size_guards)
    source = ["def match(args, kwargs):", *accessible, *writer.leaves()]
    if size_guards:  # a size that they divide by may be 0
        asked = [f"        if not ({guard}): return None" for guard in size_guards]
        source += ["    try:", *asked, "    except ZeroDivisionError: return None"]
    source.append(f"    return ({''.join(f'{name}, ' for name in writer.tensor_names)})")
    exec("\n".join(source), writer.scope)
    return writer.scope.pop("match")  # type: ignore[no-any-return]


Glance = Callable[[tuple[Any, ...], dict[str, Any]], "tuple[torch.Size, ...] | None"]


def compile_glance(kind: Kind, ordered: Sequence[str] = ()) -> Glance | None:
    """A function `(args, kwargs) -> sizes | None` in a third of a matcher's time.

    Of tensors it looks at nothing but class and dtype: of a call that it takes for one of this kind
    no more is said than that it looks like one. None where only torch's pytree knows the inside.
    """
    writer = _Writer(kind, (), ordered)
    accessible = writer.containers()
    if accessible is None:
        return None
    lines = writer.leaves(glance=True)
    sizes = "".join(f"{name}.shape, " for name in writer.tensor_names)
    source = ["def glance(args, kwargs):", *accessible, *lines, f"    return ({sizes})"]
    exec("\n".join(source), writer.scope)
    return writer.scope.pop("glance")  # type: ignore[no-any-return]


class _Writer:
    """Writes the checks of a matcher, line by line."""

    def __init__(
        self, kind: Kind, pattern: Pattern, ordered: Sequence[str], strict: bool = False
    ) -> None:
        self.kind = kind
        self.ordered = ordered
        self.pattern = pattern
        self.strict = strict
        self.access: list[str] = []
        self.scope: dict[str, Any] = {
            "Tensor": torch.Tensor,
            "strided": torch.strided,
            "text_of": text_of,
            "layout_of": layout_of,
        }
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
        # In this order: a module may go through them.
        if spec.type is dict and keys and not top:
            lines.append(f"    if list({place}) != {keys!r}: return None")
        elif name == "dict" and self.ordered:
            free = set(self.ordered)
            order = f"[k for k in {place} if k in {free!r}] != {list(self.ordered)!r}"
            lines.append(f"    if {order}: return None")
        for key, child in zip(keys, spec.children(), strict=True):
            if spec.type is dict and top:
                lines.append(f"    if {key!r} not in {place}: return None")
            if not self._walk(f"{place}[{key!r}]", child, lines):
                return False
        return True

    def leaves(self, glance: bool = False) -> list[str]:
        lines: list[str] = []
        names: dict[int, str] = {}
        for i, (place, leaf) in enumerate(zip(self.access, self.kind.leaves, strict=True)):
            if isinstance(leaf, Const):
                lines += self._const(i, place, leaf)
                continue
            t = len(self.tensor_names)
            name = names[i] = f"a{t}"
            self.tensor_names.append(name)
            lines += self._glance(t, place, leaf) if glance else self._tensor(t, place, leaf)
            for earlier, other in names.items():
                if earlier != i and leaf.same_as in (earlier, i):
                    wanted = "is not" if leaf.same_as == earlier else "is"
                    lines.append(f"    if {name} {wanted} {other}: return None")
        return lines

    def _tensor(self, t: int, place: str, leaf: TensorLeaf) -> list[str]:
        self.scope[f"d{t}"] = leaf.dtype
        otherwise = f"not a{t}.is_contiguous()"
        if leaf.layout or self.strict:
            otherwise = f"layout_of(a{t}) != {leaf.layout!r}"
        dims = [f"s{t}[{d}] != {n}" for d, n in enumerate(self.pattern[t]) if n is not None]
        asked = leaf.requires_grad is not None
        grad = f" or a{t}.requires_grad is not {leaf.requires_grad}" if asked else ""
        return [
            f"    a{t} = {place}",
            f"    if type(a{t}) is not Tensor or a{t}.dtype is not d{t}"
            f" or not a{t}.is_cpu or a{t}.layout is not strided or a{t}.is_nested"
            f" or {otherwise}{grad}: return None",
            f"    s{t} = a{t}.shape",
            f"    if {' or '.join([f'len(s{t}) != {leaf.rank}', *dims])}: return None",
        ]

    def _glance(self, t: int, place: str, leaf: TensorLeaf) -> list[str]:
        self.scope[f"d{t}"] = leaf.dtype
        return [
            f"    a{t} = {place}",
            f"    if type(a{t}) is not Tensor or a{t}.dtype is not d{t}: return None",
        ]

    def _const(self, i: int, place: str, leaf: Const) -> list[str]:
        if leaf.value is None or leaf.value is True or leaf.value is False:
            return [f"    if {place} is not {leaf.value}: return None"]
        self.scope[f"c{i}"], self.scope[f"t{i}"] = leaf.value, leaf.type
        if leaf.type in (int, str, bytes):
            return [f"    if type({place}) is not t{i} or {place} != c{i}: return None"]
        # As text, not by ==: that tells 0.0 from -0.0 and finds a NaN equal to itself.
        text = "repr" if leaf.type in (float, complex) else "text_of"
        return [
            f"    if type({place}) is not t{i} or {text}({place}) != {leaf.text!r}: return None"
        ]


def _generic_matcher(kind: Kind, pattern: Pattern, size_guards: Sequence[str]) -> Matcher:
    """For containers whose inside only torch's pytree knows: flatten, then compare."""
    names = ", ".join(f"s{t}" for t in range(len(pattern)))
    text = " and ".join(f"({guard})" for guard in size_guards) or "True"
    sizes_hold = eval(f"lambda {names}: {text}")

    grad = any(getattr(leaf, "requires_grad", None) is not None for leaf in kind.leaves)

    def match(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[torch.Tensor, ...] | None:
        leaves, structure = flatten_call(args, kwargs)
        try:
            if kind_of(leaves, structure, grad) != kind:
                return None
        except UnknownLeafError:
            return None
        tensors = tuple(leaf for leaf in leaves if isinstance(leaf, torch.Tensor))
        for tensor, sizes in zip(tensors, pattern, strict=True):
            if type(tensor) is not torch.Tensor or not tensor.is_cpu:
                return None
            if tensor.layout is not torch.strided or not fits(tuple(tensor.shape), sizes):
                return None
        try:
            return tensors if sizes_hold(*(tensor.shape for tensor in tensors)) else None
        except ZeroDivisionError:
            return None

    return match


# --- the builder ------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Output:
    """Where one leaf of an output comes from: a tensor that the graph computed (`computed`, by
    index; as a Python int if it is a `number`, or what is taken of it as a `view`), a tensor of the
    call itself (`given`, by index), or a constant."""

    computed: int | None = None
    number: bool = False
    view: View | None = None
    given: int | None = None
    value: Any = None


Builder = Callable[[Sequence[torch.Tensor], Sequence[torch.Tensor]], Any]


def compile_builder(structure: Structure, leaves: Sequence[Output]) -> Builder:
    """A function `(computed, given) -> value` that builds an output of the module."""
    scope: dict[str, Any] = {"unflatten": unflatten, "structure": structure}
    names = []
    for i, leaf in enumerate(leaves):
        if leaf.computed is not None:
            name = f"computed[{leaf.computed}]"
            if leaf.view is not None:
                scope[f"take{i}"] = leaf.view.taken
                name = f"take{i}({name})"
            names.append(f"int({name})" if leaf.number else name)
        elif leaf.given is not None:
            names.append(f"given[{leaf.given}]")
        else:
            scope[f"c{i}"] = leaf.value
            names.append(f"c{i}")
    text = None if structure.nested else _constructor(structure.spec, iter(names), scope)
    if text is None:
        text = f"unflatten([{', '.join(names)}], structure)"
    if text == "computed[0]":
        return first_computed
    return eval(f"lambda computed, given: {text}", scope)  # type: ignore[no-any-return]


def first_computed(computed: Sequence[torch.Tensor], given: Sequence[torch.Tensor]) -> torch.Tensor:
    """The builder of an output that is a single tensor."""
    return computed[0]


def _constructor(spec: pytree.TreeSpec, names: Iterator[str], scope: dict[str, Any]) -> str | None:
    """The expression that builds one container; None where only pytree knows how."""
    if spec.is_leaf():
        return next(names)
    parts = [_constructor(child, names, scope) for child in spec.children()]
    if any(part is None for part in parts):
        return None
    inner = [part for part in parts if part is not None]
    if spec.type in (tuple, torch.Size):  # pytree itself would make a tuple of a Size
        scope["Size"] = torch.Size
        return f"{'Size' if spec.type is torch.Size else ''}({_tuple(inner)})"
    if spec.type is list:
        return f"[{', '.join(inner)}]"
    items = None
    if spec.type is dict or _is_model_output(spec.type):
        items = ", ".join(f"{key!r}: {part}" for key, part in zip(spec.context, inner, strict=True))
    if spec.type is dict:
        return f"{{{items}}}" if all(isinstance(key, (str, int)) for key in spec.context) else None
    if items is not None:
        name = f"make{len(scope)}"
        scope[name] = model_output_maker(spec.type)
        return f"{name}({{{items}}})"
    return None


def _tuple(parts: Sequence[str]) -> str:
    return f"({''.join(f'{part}, ' for part in parts)})"


def _is_model_output(cls: Any) -> bool:
    return isinstance(cls, type) and issubclass(cls, OrderedDict) and dataclasses.is_dataclass(cls)


def model_output_maker(cls: Any) -> Callable[[dict[str, Any]], Any]:
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
