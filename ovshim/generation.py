"""The generation of a module: everything about it that a plan took for granted when it was made.

Tensors by identity, version and storage, those that count no versions by their values; the class,
submodules, hooks, flags and plain attributes of every module in the tree; the functions that were
captured; and, beyond the tree, whatever the captured graph says it read (`guards.ValueGuard`).
`holds()` runs on every call, so everything is laid out beforehand in flat lists that C code
compares.
"""

from __future__ import annotations

import os
import types
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from operator import attrgetter
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from ovshim.captured_code import (
    copied_defaults,
    is_torchs,
    mentions,
    methods,
    own,
    variables,
)
from ovshim.classes import classes_of, snapshot
from ovshim.conditions import Conditions
from ovshim.dict_versions import add_order, add_unless_written, ordered_keys
from ovshim.guards import ValueGuard
from ovshim.hooks import are_called, inner_hooks, is_recorded
from ovshim.namespaces import SPACES, add_unless_replaced
from ovshim.reached import OF_MODULES, Reached
from ovshim.scripted import Held, is_plain
from ovshim.settings import READ_BY_CODE
from ovshim.stamps import Values, layout_of
from ovshim.untouched import add_unless_touched
from ovshim.watch import GuardFailedError, Watch, modules_met, replaceable

__all__ = ["Generation", "GuardFailedError"]

_version: Callable[[torch.Tensor], int] = attrgetter("_version")
_wants_grad: Callable[[torch.Tensor], bool] = attrgetter("requires_grad")
# Equal ones may be put in their places, and written to later.
_holding: Callable[[nn.Module], tuple[Any, ...]] = attrgetter(
    "_modules", "_parameters", "_buffers", "_forward_hooks", "_forward_pre_hooks"
)
_data_ptr: Callable[[torch.Tensor], int] = torch.Tensor.data_ptr
_is_gone: Callable[[int], Any] = torch.UntypedStorage._expired
_values: Callable[[Any], Iterable[Any]] = dict.values
_defaults: Callable[[Any], tuple[Any, Any]] = attrgetter("__defaults__", "__kwdefaults__")

# So many tensors or modules are asked one by one, which takes no list of what they answer.
_FEW = 8

# Two different tensors (or arrays) in one attribute answer == with more than a bool; a watched key
# that is gone raises; users' `__eq__` may raise anything. Either way something was replaced, for
# what is the same object is not compared.
_RAISED = Exception
# By which code may do otherwise for other strides and flags of tensors.
_QUESTIONS = {
    "strides": frozenset({"stride", "is_contiguous", "suggest_memory_format"}),
    "requires_grad": frozenset({"requires_grad"}),
}


class Generation:
    """A snapshot of `module` and the check that it still stands.

    Args:
        guards, roots: what the captured graph read beyond the tree (`guards.roots_of`).
        code: qualified names of the functions that were captured; None: it is not known which.
        asks: what they ask of tensors, "strides", "requires_grad"; None: their code is looked at.
        grad: whether it matters which tensors require grad.
        follow: whether the guards do not say what was read, so that all that could be is watched.
        classes: further ones whose code was captured, of objects that no guard leads to.
        values: whether values matter of tensors that count no versions. They do not to eager.

    Attributes:
        asks_layout: whether its code, torch's own aside, asks for the strides of tensors.
        uncounted: the tensors that were made in inference mode, which count no versions.

    Raises (when made):
        GuardFailedError: a value guard does not hold now.
        ValueError: a tensor of the module does not lie in one place (it is sparse), or so does a
            scripted module, so that nobody could tell when it changes.
        UnwatchableError: too much could be read.
    """

    def __init__(
        self,
        module: nn.Module,
        guards: Sequence[ValueGuard] = (),
        roots: Mapping[str, Any] | None = None,
        code: Collection[str] | None = None,
        asks: Collection[str] | None = None,
        grad: bool = False,
        follow: bool = False,
        classes: Iterable[type] = (),
        values: bool = True,
    ) -> None:
        self._module = module
        # Those of the tree, and others that the graph runs: out of lists, globals, other objects.
        beyond = modules_met(guards, roots or {})
        self._modules = list(dict.fromkeys(chain(module.modules(), beyond)))
        self._types = list(map(type, self._modules))
        self._dicts = [m.__dict__ for m in self._modules]
        self._dict_copies = [_copy(d) for d in self._dicts]
        plain = list(filter(is_plain, self._modules))
        self._children = [m._modules for m in plain if m._modules]
        self._child_copies = [dict(d) for d in self._children]
        held = [d for m in plain for d in (m._parameters, m._buffers)]
        self._holders = [d for d in held if d]
        self._empty = tuple(d for d in (*held, *(m._modules for m in plain)) if not d)
        hooks = list(inner_hooks(module, self._modules))
        self._hooks = tuple(held for held in hooks if not held or are_called(held))
        self._recorders = [(held, dict(held)) for held in hooks if held and not are_called(held)]
        self._contents = list(_contents(self._modules))
        self._orders = [(d, list(d)) for d in _ordered(self._modules)]
        self._scripted = Held(self._modules)
        self._watch = Watch(guards, roots or {}, replaceable(self._modules))
        self._captured = list(methods(self._types, code))
        functions = [*(f for _, _, found in self._captured for f in found), *self._watch.functions]
        attributes = chain.from_iterable(map(_values, self._dicts))
        functions += [value for value in attributes if isinstance(value, types.FunctionType)]
        self._reached = Reached(self._modules, functions) if follow else Reached((), ())
        self._functions = list(dict.fromkeys((*functions, *self._reached.functions)))
        classes = (*self._watch.classes, *self._reached.classes, *classes)
        self._classes = snapshot(classes_of(self._modules, classes))
        if asks is None:
            asks = [name for name, words in _QUESTIONS.items() if self._mentions(words)]
        self.asks_layout = "strides" in asks
        whole = self._watch.reads_environment
        self._variables = None if whole else variables(f.__code__ for f in self._functions)
        self._watch_tensors()
        self._values = Values(self.uncounted) if values and self.uncounted else None
        watch_flags = grad or "requires_grad" in asks
        self._flags = list(map(_wants_grad, self.tensors)) if watch_flags else None
        self.holds_but_for_values = self._check()
        """Whether nothing has changed that a plan of eager's would mind. About 0.01 µs a tensor and
        as much a submodule, and ten times that where memory cannot be asked (`untouched`) and the
        objects have to be."""
        self.holds = self._whole_check()
        """Whether nothing has changed: the values too of tensors that count no versions."""

    def _check(self) -> Callable[[], bool]:
        """That nothing changes from now on, compiled."""
        conditions, in_dicts = Conditions(_RAISED), Conditions()
        # Of what a forward makes anew.
        conditions.add("{0}() is {1}", torch.get_default_dtype, torch.get_default_dtype())
        contents = [held for _, held, _ in self._contents if type(held) is dict]
        beyond = self._watch.dicts, self._reached.dicts, contents
        groups = self._dicts, self._children, self._holders, *beyond, SPACES
        self._written = list({id(d): d for d in chain.from_iterable(groups)}.values())
        # First what is compared by identity: users' objects may raise when they are compared.
        self._watch.conditions(conditions, in_dicts, set(map(id, self._written)))
        self._of_dicts(in_dicts)
        self._reached.conditions(conditions, in_dicts)
        add_unless_replaced(in_dicts)
        self._of_contents(conditions, in_dicts)
        self._of_objects(conditions, in_dicts)
        self._of_code(conditions)
        self._of_what_is_rare(conditions)
        return conditions.compiled()

    def _whole_check(self) -> Callable[[], bool]:
        if self._values is None:
            return self.holds_but_for_values
        conditions = Conditions(_RAISED)
        conditions.add("{0}() and {1}()", self.holds_but_for_values, self._values.same)
        return conditions.compiled()

    def _of_objects(self, conditions: Conditions, in_dicts: Conditions) -> None:
        look = Conditions(_RAISED)
        self._of_the_tree(look)
        self._of_versions(look)
        look.add("{0}()", in_dicts.compiled())
        dicts = [*self._written, *self._empty, *self._hooks]
        if not add_unless_touched(conditions, self._tensors, dicts, self._modules, look.compiled()):
            self._of_the_tree(conditions)
            self._of_versions(conditions)
            add_unless_written(conditions, self._written, in_dicts.compiled())

    def _of_contents(self, conditions: Conditions, in_dicts: Conditions) -> None:
        for same, held, then in self._contents:
            where = in_dicts if type(held) is dict else conditions
            where.add("{0}({1}, {2})", same, held, then)
            if isinstance(held, dict):
                add_order(where, held, ordered_keys(held))

    def _of_dicts(self, conditions: Conditions) -> None:
        """What is written in the dictionaries of the tree."""
        conditions.add("{0} == {1}", self._dicts, self._dict_copies)
        plain = list(filter(is_plain, self._modules))
        ids = list(map(id, chain.from_iterable(map(_holding, plain))))
        conditions.add(
            "list({0}({1}, {2}({0}({3}, {4})))) == {5}",
            *(map, id, chain.from_iterable, _holding, plain, ids),
        )
        if self._children:
            conditions.add("{0} == {1}", self._children, self._child_copies)
        held = list(chain.from_iterable(map(_values, self._holders)))
        operands = chain.from_iterable, map, _values, self._holders
        if all(tensor is None or tensor.numel() > 1 for tensor in held):
            # In place of one of these no other tensor is ever equal: the comparison raises.
            conditions.add("list({0}({1}({2}, {3}))) == {4}", *operands, held)
        else:
            conditions.add("list(map(id, {0}({1}({2}, {3})))) == {4}", *operands, self._ids)

    def _of_the_tree(self, conditions: Conditions) -> None:
        conditions.add("not any({0})", (*self._empty, *self._hooks))
        if len(self._modules) <= _FEW:
            for module, cls, held in zip(self._modules, self._types, self._dicts, strict=True):
                conditions.add("type({0}) is {1} and {0}.__dict__ is {2}", module, cls, held)
        else:
            conditions.add("list(map(type, {0})) == {1}", self._modules, self._types)
            ids = list(map(id, self._dicts))
            conditions.add("list(map(id, map(vars, {0}))) == {1}", self._modules, ids)

    def _of_versions(self, conditions: Conditions) -> None:
        # A new storage may come to lie where an old one lay, and its memory too.
        conditions.add("not any(map({0}, {1}))", _is_gone, self._storage_ids)
        if len(self._tensors) <= _FEW:
            for i, tensor in enumerate(self._tensors):
                conditions.add("{0}._version == {1}", tensor, self._versions[i])
                # Out of the list, which `moved` writes to.
                conditions.add(f"{{0}}({{1}}) == {{2}}[{i}]", _data_ptr, tensor, self._pointers)
                conditions.add("{0}({1}) == {2}", layout_of, tensor, self._layouts[i])
        else:
            # In this order: with cold caches it takes an eighth less than the other way around.
            of_each = "list(map({0}, {1})) == {2}"
            conditions.add(of_each, _data_ptr, self._tensors, self._pointers)
            conditions.add(of_each, _version, self._tensors, self._versions)
            conditions.add(of_each, layout_of, self._tensors, self._layouts)

    def _of_code(self, conditions: Conditions) -> None:
        for cls, names, _ in self._captured:
            for name in names:
                found = getattr(cls, name)
                # A method of the class, bound anew each time that it is read, is equal to itself.
                same = "is" if isinstance(found, types.FunctionType) else "=="
                read = f"{{0}}.{name}" if name.isidentifier() else f"getattr({{0}}, {name!r})"
                conditions.add(f"{read} {same} {{1}}", cls, found)
        for function in self._functions:
            conditions.add("{0}.__code__ is {1}", function, function.__code__)
            if function.__defaults__ is not None or function.__kwdefaults__ is not None:
                # Defaults that are added to a function change no call that was right without.
                now = copied_defaults(_defaults(function))
                conditions.add("{0}({1}) == {2}", _defaults, function, now)

    def _of_what_is_rare(self, conditions: Conditions) -> None:
        if self._scripted:
            conditions.add("{0}()", self._scripted.same)
        for ordered, keys in self._orders:
            conditions.add("list({0}) == {1}", ordered, keys)
        for attributes, before in self._classes:
            conditions.add("{0} == {1}", attributes, before)
        # A graph holds what they answered, as constants.
        for words, ask in READ_BY_CODE:
            if self._mentions(words):
                conditions.add("{0}() == {1}", ask, ask())
        if self._flags is not None:
            tensors = self.tensors
            conditions.add("list(map({0}, {1})) == {2}", _wants_grad, tensors, self._flags)
        for held, before in self._recorders:
            conditions.add("{0} == {1}", held, before)
        if self._recorders:
            conditions.add("not {0}()", is_recorded)
        if self._variables is None:
            # As it keeps them: a comparison with itself would decode all of them each time.
            kept = getattr(os.environ, "_data", os.environ)
            conditions.add("{0} == {1}", kept, dict(kept))
            conditions.add("{0}.environ is {1}", os, os.environ)
        for name in self._variables or ():
            read = "{0}.environ.get({1}) == {2}"
            conditions.add(read, os, name, os.environ.get(name))

    @property
    def tensors(self) -> Sequence[torch.Tensor]:
        """Every tensor of the module, and those beyond it that the captured graph read."""
        return [*self._tensors, *self.uncounted]

    def moved(self) -> None:
        """The tensors lie elsewhere now, with the same values: that is to be no change."""
        self._pointers[:] = map(_data_ptr, self._tensors)
        self._hold_storages()

    def tensors_hold(self) -> bool:
        """Whether no tensor was written to or moved, nor anything changed beyond the tree: what has
        become of the tree itself does not matter to a copy of it."""
        conditions = Conditions(_RAISED)
        self._of_versions(conditions)
        self._watch.conditions(conditions, conditions)
        return conditions.compiled()() and (self._values is None or self._values.same())

    def change(self) -> str:
        """What has changed, in words, for a reason or a report."""
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
        return "code, or something outside the module's own attributes, changed"

    def _mentions(self, words: frozenset[str]) -> bool:
        """Whether code that was captured has one of these. Torch's own asks for the strides of what
        it has made itself, and has convolutions with a `stride`."""
        functions = own(self._functions) if "stride" in words else self._functions
        return any(mentions(function.__code__, words) for function in functions)

    def _watch_tensors(self) -> None:
        self._ids = list(map(id, chain.from_iterable(map(_values, self._holders))))
        held: Iterable[Any] = chain.from_iterable(map(_values, self._holders))
        own = chain(self._module.parameters(), self._module.buffers())  # of scripted modules too
        plain = (v for d in self._dicts for v in d.values() if isinstance(v, torch.Tensor))
        beyond = *self._scripted.tensors, *self._watch.tensors, *self._reached.tensors
        found = {id(t): t for t in chain(held, own, plain, beyond) if t is not None}
        for tensor in found.values():
            if tensor.layout is not torch.strided or tensor.is_nested:
                raise ValueError(f"a tensor of layout {tensor.layout} does not lie in one place")
        self._tensors = [tensor for tensor in found.values() if not tensor.is_inference()]
        self.uncounted = [tensor for tensor in found.values() if tensor.is_inference()]
        self._versions = list(map(_version, self._tensors))
        self._pointers = list(map(_data_ptr, self._tensors))
        self._layouts = list(map(layout_of, self._tensors))
        self._storage_ids: list[int] = []
        self._hold_storages()

    def _hold_storages(self) -> None:
        """Weakly: they may go, and it is known then that they have."""
        held = [StorageWeakRef(t.untyped_storage()) for t in self._tensors]  # type: ignore[no-untyped-call]
        storages = {storage.cdata: storage for storage in held}
        self._storage_ids[:] = storages
        self._storages = storages  # not before: another thread may be asking for the old ones

    def _snapshot_of(self, module: nn.Module) -> dict[str, Any] | None:
        for held, before in zip(self._dicts, self._dict_copies, strict=True):
            if held is module.__dict__:
                return before
        return None

    def _unchanged(self, tensor: torch.Tensor) -> bool:
        for i, known in enumerate(self._tensors):
            if known is tensor:
                same_version = tensor._version == self._versions[i]
                same_place = tensor.data_ptr() == self._pointers[i]
                return same_version and same_place and layout_of(tensor) == self._layouts[i]
        known = any(one is tensor for one in self.uncounted)
        return known and (self._values is None or self._values.same_of(tensor))


def _copy(held: dict[str, Any]) -> dict[str, Any]:
    """A copy to compare with. A BoundMethod's seal counts the references on itself: its stand-in,
    which is equal to it, holds none."""
    made = held.copy()
    seal = made.get("__getstate__")
    if seal is not None:
        made["__getstate__"] = getattr(type(seal), "_ovshim_stand_in", seal)
    return made


def _contents(modules: Iterable[nn.Module]) -> Iterator[tuple[Callable[..., Any], Any, Any]]:
    """Lists, dicts and sets in users' attributes, and objects derived from them: what is in them
    may change while they stay the same objects. (Dynamo guards single items of plain ones; not
    those of derived classes, and not modules and parameters that it knows from elsewhere.)"""
    seen: set[int] = set()
    for module in modules:
        if is_torchs(type(module)):
            continue
        for name, value in module.__dict__.items():
            held = isinstance(value, (list, dict, set))
            if held and name not in OF_MODULES and id(value) not in seen:
                seen.add(id(value))
                plain = next(kind for kind in (list, dict, set) if isinstance(value, kind))
                yield plain.__eq__, value, plain(value)


def _ordered(modules: Iterable[nn.Module]) -> Iterator[dict[str, Any]]:
    """Children that are gone through in their order."""
    for module in modules:
        if isinstance(module, nn.ModuleDict):
            yield module._modules


def _count_fused_steps(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """Fused optimizers write to parameters without counting a version: it is counted for them."""
    for group in optimizer.param_groups:
        if group.get("fused"):
            written = [p for p in group["params"] if p.grad is not None and not p.is_inference()]
            torch.autograd.graph.increment_version(written)


register_optimizer_step_post_hook(_count_fused_steps)
