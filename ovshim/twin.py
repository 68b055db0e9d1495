"""The copy that carries an acceleration, so that the user's own module is never touched.

A twin is an object of the user's own class with its own tree. Every submodule in it is a shallow
copy over the original's `_parameters` and `_buffers`, the dictionaries themselves: tensors are one,
and `.half()`, `load_state_dict(assign=True)` or a new parameter through either is seen by both.
Children, hooks, flags and plain attributes are each one's own.

Sharing less (the root's dictionaries copied) leaves a model half old and half new after
`load_state_dict(assign=True)`; sharing more (the children) lets `twin.eval()` flip the original.
"""

from __future__ import annotations

import copy
import functools
import weakref
from collections import OrderedDict
from types import CellType, FunctionType, MethodType
from typing import Any

import torch
from torch import nn
from torch.jit._script import RecursiveScriptModule
from torch.nn.modules.module import _WrappedHook
from torch.nn.parameter import is_lazy
from torch.utils.hooks import RemovableHandle

from ovshim.bound import BoundMethod, Original, claim, installed
from ovshim.captured_code import is_torchs
from ovshim.errors import OptionError
from ovshim.scripted import is_frozen

_SHARED = frozenset({"_parameters", "_buffers", "_non_persistent_buffers_set"})
_OWN_DICTS = frozenset(
    name for name, value in nn.Module().__dict__.items() if isinstance(value, dict)
).difference(_SHARED)
# torch.compile's result for the original's own call: a twin that kept it would run the original.
_DROPPED = frozenset({"_compiled_call_impl"})
# What `_construct` made for the twin of a scripted module.
_SCRIPTED = frozenset(
    {"_initializing", "_c", "_concrete_type", "_modules", "_non_persistent_buffers_set"}
).union(_SHARED)
# Plain attributes are searched for modules this deep, as in {"stages": [(norm, block)]}.
_DEPTH = 3


def make_twin(module: nn.Module) -> nn.Module:
    """Returns a twin of `module`, with the same class, tensors and hooks, and a tree of its own.

    Modules, and methods bound to modules, that are found in plain attributes (directly, by a weak
    reference, or in lists, tuples, dicts, sets and partials) become their twins too, so that a
    reference back to a parent leads into the twin's tree; in closures and in objects that are no
    modules they stay the original's, as in a deep copy. A module used in two places is one
    object in both trees. Methods accelerated in the original are accelerated anew in the twin.

    Raises OptionError for a module with uninitialised parameters (a lazy module), and for a class
    whose objects cannot be made without calling its constructor.
    """
    return _Tree().grow(module)


def make_watched_twin(module: nn.Module) -> nn.Module | None:
    """Returns a twin as `make_twin` does; None where it would have something of its own in which no
    `Generation` of the module sees a change of the original's."""
    tree = _Tree()
    twin = tree.grow(module)
    return twin if tree.watched else None


class _Tree:
    """One pass over everything reachable from one module."""

    def __init__(self) -> None:
        self.watched = True
        self.inside: set[int] = set()
        self.twins: dict[int, nn.Module] = {}
        self.todo: list[tuple[nn.Module, nn.Module]] = []
        self.weak: list[tuple[dict[str, Any], str, nn.Module]] = []
        self.methods: dict[int, BoundMethod] = {}
        self.hooks: dict[int, dict[int, Any]] = {}  # id of the original's -> the twin's
        self.handles: list[tuple[RemovableHandle, RemovableHandle]] = []

    def grow(self, root: nn.Module) -> nn.Module:
        self.inside = _ids(root)
        twin = self.twin(root)
        # A list of work instead of recursion: trees refer back to parents, and may be deep.
        while self.todo:
            self.fill(*self.todo.pop())
        for entries, key, target in self.weak:
            if id(target) in self.twins:  # else nothing would keep the twin alive
                entries[key] = weakref.ref(self.twins[id(target)])
        for old, new in self.handles:
            new.id = old.id
            new.hooks_dict_ref = self.moved(old.hooks_dict_ref)
            new.extra_dict_ref = tuple(map(self.moved, old.extra_dict_ref))
        for made in self.twins.values():
            if installed(made):
                claim(made)
        return twin

    def twin(self, module: nn.Module) -> nn.Module:
        """Returns the twin of `module`, empty until its turn comes."""
        made = self.twins.get(id(module))
        if made is None:
            if isinstance(module, RecursiveScriptModule) and is_frozen(module):
                return self.twins.setdefault(id(module), module)
            self.watched &= id(module) in self.inside
            if isinstance(module, RecursiveScriptModule):
                return self.scripted(module, _copied(module._c))
            made = self.adopt(module, _empty(module))
        return made

    def adopt(self, module: nn.Module, twin: nn.Module) -> nn.Module:
        self.twins[id(module)] = twin
        self.todo.append((module, twin))
        return twin

    def scripted(self, module: nn.Module, cpp: Any) -> nn.Module:
        """Returns the twin of a scripted module over `cpp`, the copy of its C++ tree."""

        def children(twin: nn.Module) -> None:
            twin._concrete_type = module._concrete_type
            for name, below in torch._C.ModuleDict(cpp).items():
                child = module._modules[name]
                assert child is not None
                inner = child.__dict__.get("_actual_script_module")
                if inner is None:
                    setattr(twin, name, self.scripted(child, below))
                else:  # a traced module: an object that forwards everything to a scripted one
                    self.scripted(inner, below)
                    setattr(twin, name, self.twin(child))

        twin = RecursiveScriptModule._construct(cpp, children)  # type: ignore[no-untyped-call]
        return self.adopt(module, twin)

    def moved(self, hooks: weakref.ref[Any]) -> weakref.ref[Any]:
        twins = self.hooks.get(id(hooks()))
        return hooks if twins is None else weakref.ref(twins)

    def fill(self, module: nn.Module, twin: nn.Module) -> None:
        entries = twin.__dict__
        scripted = isinstance(twin, RecursiveScriptModule)
        for key, value in module.__dict__.items():
            if key in _DROPPED or (scripted and key in _SCRIPTED):
                continue
            if isinstance(value, torch._C.ScriptMethod):  # a cached one, bound to the original
                continue
            if key in _SHARED:
                entries[key] = value
            elif key in _OWN_DICTS:
                # The classes' own method: `copy.copy` takes ten times as long, and most are empty.
                own = value.copy() if type(value) in (dict, OrderedDict) else copy.copy(value)
                entries[key] = self.hooks[id(value)] = own
                if value:
                    own.update({k: self.hook(v) for k, v in value.items()})
            elif isinstance(value, weakref.ref) and isinstance(target := value(), nn.Module):
                entries[key] = value
                self.weak.append((entries, key, target))
            else:
                entries[key] = made = self.value(value, _DEPTH)
                if isinstance(value, (list, dict, set)) and is_torchs(type(module)):
                    self.watched &= made is value
        for name in _slots(type(module)):
            if hasattr(module, name):
                object.__setattr__(twin, name, self.value(getattr(module, name), _DEPTH))
                self.watched = False

    def hook(self, hook: Any) -> Any:
        """Returns the hook for the twin: what a function holds of this tree, in its closure or as a
        default, is the twin's. (`lambda module, args, out: self.features.append(out)`)"""
        if type(hook) is not FunctionType:
            return self.value(hook, _DEPTH)
        cells, defaults = hook.__closure__ or (), hook.__defaults__ or ()
        held = [self.inner(_content(cell)) for cell in cells]
        given = tuple(self.inner(value) for value in defaults)
        if not any(x is not None for x in held) and not any(x is not None for x in given):
            return hook
        pairs = zip(cells, held, strict=True)
        closure = tuple(cell if twin is None else CellType(twin) for cell, twin in pairs)
        values = zip(defaults, given, strict=True)
        own = tuple(value if twin is None else twin for value, twin in values)
        name, code = hook.__name__, hook.__code__
        made = FunctionType(code, hook.__globals__, name, own or None, closure)
        made.__kwdefaults__ = hook.__kwdefaults__
        made.__dict__.update(hook.__dict__)
        return made

    def inner(self, value: Any) -> nn.Module | None:
        """Returns the twin of a module of this tree; None for anything else."""
        return self.twin(value) if id(value) in self.inside else None

    def value(self, value: Any, depth: int) -> Any:
        """Returns `value` with the modules in it replaced; the very same object if there are none.

        That an untouched container stays the same object is what a shallow copy does: lists that
        a module shares with its surroundings go on being shared.
        """
        kind = type(value)
        if issubclass(kind, nn.Module):
            return self.twin(value)
        if kind is BoundMethod:
            return self.bound(value)
        if kind is MethodType and isinstance(value.__self__, nn.Module):
            return MethodType(value.__func__, self.twin(value.__self__))
        if kind is _WrappedHook:
            target = value.module() if value.with_module else None
            return _WrappedHook(self.value(value.hook, depth), target and self.twin(target))
        if kind is RemovableHandle:
            # handle.remove() in a method of the twin has to find the twin's hook.
            handle = object.__new__(RemovableHandle)
            self.handles.append((value, handle))
            return handle
        if depth == 0:
            return value
        made = self.container(value, kind, depth - 1)
        self.watched &= made is value or _is_watched(value, top=depth == _DEPTH)
        return made

    def bound(self, method: BoundMethod) -> BoundMethod:
        new = self.methods.get(id(method))
        if new is None:
            old = method.original
            beneath = self.value(old.beneath, _DEPTH)
            original = Original(self.twin(old.module), old.name, beneath)
            # claim() replaces the seal when the twin is complete.
            new = self.methods[id(method)] = BoundMethod(original, method.make, method._seal)
        return new

    def container(self, value: Any, kind: type, depth: int) -> Any:
        if kind is functools.partial:
            old = [value.func, *value.args, *value.keywords.values()]
            new = [self.value(v, depth) for v in old]
            if not _differ(old, new):
                return value
            keywords = dict(zip(value.keywords, new[1 + len(value.args) :], strict=True))
            return functools.partial(new[0], *new[1 : 1 + len(value.args)], **keywords)
        if issubclass(kind, dict):
            new = [self.value(v, depth) for v in value.values()]
            if not _differ(value.values(), new):
                return value
            changed = copy.copy(value)
            changed.update(zip(value, new, strict=True))
            return changed
        if issubclass(kind, tuple) and hasattr(kind, "_make"):
            new = [self.value(v, depth) for v in value]
            return kind._make(new) if _differ(value, new) else value
        if kind in (list, tuple, set, frozenset):
            old = list(value)
            new = [self.value(v, depth) for v in old]
            return kind(new) if _differ(old, new) else value
        return value


def _ids(root: nn.Module) -> set[int]:
    """Returns the ids of a tree's modules. `modules()` wants them hashable, and classes with an
    `__eq__` of their own are not."""
    ids, todo = set[int](), [root]
    while todo:
        module = todo.pop()
        if id(module) not in ids:
            ids.add(id(module))
            todo += [child for child in module._modules.values() if child is not None]
    return ids


def _is_watched(container: Any, top: bool) -> bool:
    """Whether it, being other than its twin's, can hold nothing else without being seen. A number,
    or something that is written to at a call, would not be."""
    kind = type(container)
    if kind is functools.partial:
        return not container.keywords and not vars(container)
    if issubclass(kind, (tuple, frozenset)):
        return True
    held = container.values() if kind in (dict, OrderedDict) else container
    known = kind in (dict, OrderedDict, list, set)
    return top and known and all(map(_is_itself, held))


def _is_itself(value: Any) -> bool:
    """Whether it is a module that is equal to no other."""
    return isinstance(value, nn.Module) and type(value).__eq__ is object.__eq__


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None


def _differ(old: Any, new: list[Any]) -> bool:
    return any(a is not b for a, b in zip(old, new, strict=True))


def check_initialised(module: nn.Module) -> None:
    """Raise OptionError for a module with uninitialised parameters or buffers of its own."""
    tensors = (*module._parameters.values(), *module._buffers.values())
    if any(is_lazy(tensor) for tensor in tensors if tensor is not None):
        raise OptionError(
            "module",
            type(module).__qualname__,
            "a module whose parameters are initialised",
            "Run the module once on an example before accelerating it.",
        )


def _empty(module: nn.Module) -> nn.Module:
    """Returns an object of the module's class without attributes."""
    cls = type(module)
    check_initialised(module)
    try:
        # Not cls.__new__: GraphModule's makes a new class, and others want arguments.
        return object.__new__(cls)
    except TypeError as error:
        raise OptionError(
            "module",
            cls.__qualname__,
            f"one whose objects can be copied without their constructor ({error})",
            "Accelerate the module itself: inplace=True.",
        ) from error


def _copied(cpp: Any) -> Any:
    """Returns a copy of a tree of `torch._C.ScriptModule` over the same tensors.

    A scripted module's flags live there; `copy.copy` alone would share those of its children.
    """
    new = copy.copy(cpp)
    for name, child in torch._C.ModuleDict(cpp).items():
        new.setattr(name, _copied(child))
    return new


def _slots(cls: type) -> list[str]:
    """Returns the attributes that objects of `cls` keep outside their `__dict__`."""
    names: list[str] = []
    for base in cls.__mro__:
        slots = base.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name.startswith("__") and not name.endswith("__"):
                name = f"_{base.__name__.lstrip('_')}{name}"
            if name not in ("__dict__", "__weakref__"):
                names.append(name)
    return names
