"""One walk over everything that a module's answer depends on, weights aside.

The walk writes a canonical text and hashes it. Objects get a number when first met and are
described once, in the order in which they were met; names of modules, files and lines never
enter. Functions are followed by name: their code, defaults, closures, and the globals they load.
The methods of a class all enter by their bytecode, but only those whose name occurs somewhere in
the code that was reached are followed further: a transformers model inherits hundreds (saving,
uploading, generating) whose helpers have no part in `forward`.
"""

from __future__ import annotations

import builtins
import contextvars
import enum
import functools
import os
import sys
import types
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
import torch.nn.modules.module as torch_module
import xxhash
from torch import nn

from ovshim.fingerprint import weights
from ovshim.fingerprint.bytecode import Facts, candidates, facts, pinned_file, pinned_module
from ovshim.fingerprint.errors import Unkeyable
from ovshim.fingerprint.values import (
    atom,
    builtin_content,
    functions,
    has_hidden_state,
    label,
    ordered,
    plain,
    rank,
    reduced,
    slots,
    text,
)

_MOST = 200_000  # objects; a BERT has some thousands

_CONSTRUCTORS = ("__init__", "__new__", "__post_init__", "__set_name__")
# Methods that Python calls by itself, but not while a module computes.
_LIFECYCLE = frozenset({
    *_CONSTRUCTORS, "__init_subclass__", "__class_getitem__", "__del__", "__reduce__",
    "__reduce_ex__", "__getstate__", "__setstate__", "__copy__", "__deepcopy__", "__repr__",
    "__str__", "__dir__", "__sizeof__", "__getnewargs__", "__getnewargs_ex__",
})  # fmt: skip
_NOT_GLOBALS = frozenset({"__name__", "__file__", "__spec__", "__loader__", "__package__",
                          "__path__", "__doc__", "__builtins__", "__debug__"})  # fmt: skip

# What nn.Module keeps for itself. The hooks that run in a forward are written separately; those
# of backward and of state dicts, and what is persistent, change no answer.
_MODULES_OWN = frozenset({
    "training", "_parameters", "_buffers", "_modules", "_non_persistent_buffers_set",
    "_backward_pre_hooks", "_backward_hooks", "_is_full_backward_hook", "_forward_hooks",
    "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs", "_state_dict_hooks", "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks", "_compiled_call_impl",
})  # fmt: skip
# Weak references, and the parameters again.
_RNN_OWN = frozenset({"_flat_weights", "_flat_weight_refs"})
# The graph from which `forward` was generated, and what made it; `forward` itself is read.
_GRAPH_OWN = frozenset({
    "_graph", "_code", "_tracer_cls", "_tracer_extras", "_lineno_map", "_prologue_start", "meta",
    "_replace_hooks", "_create_node_hooks", "_erase_node_hooks", "_deepcopy_hooks", "shape_env",
    "_graphmodule_cls_name",
})  # fmt: skip
# Where a transformers model was loaded from, and by which release it was saved.
_PLACES = frozenset({"name_or_path", "_name_or_path", "_commit_hash", "transformers_version"})


def code(module: nn.Module, method: str) -> str:
    """32 hex digits for all that `module.method` computes by, but for parameters and buffers.

    Raises `Unkeyable`.
    """
    try:
        return _Walk(module, method).digest()
    except RecursionError as error:
        raise Unkeyable("an attribute", "data nested too deeply") from error


class _Walk:
    def __init__(self, root: nn.Module, method: str) -> None:
        self.root = root
        self.method = method
        self.out: list[bytes] = []
        self.where = ""
        self.attribute = ""  # the one whose value is being written
        self.number: dict[int, int] = {}
        self.kept: list[object] = []  # an id stays taken while its object lives
        self.queue: deque[tuple[Callable[[Any], None], Any, str]] = deque()
        self.names: set[str] = set()
        self.waiting: dict[str, list[tuple[type, Any]]] = {}  # members whose name is not in names
        self.constructed: set[int] = set()
        self.pinned: dict[int, bool] = {}
        self.open: list[int] = []  # containers around the one being written
        self.orders: list[tuple[str, list[Any]]] = []
        self.iterated: set[str] = set()
        self.tensors: list[torch.Tensor] = []
        self.tree = {id(m) for m in root.modules()}
        # What their constructors did shows in the modules that they made.
        self.made = {base for m in root.modules() for base in type(m).__mro__}
        self.weights = {id(t): name for name, t in (*root.named_parameters(),
                                                    *root.named_buffers())}  # fmt: skip

    def digest(self) -> str:
        versions = (sys.version_info[:3], torch.__version__, np.__version__)
        state = (torch.get_default_dtype(), torch.get_default_device())
        self.out.append(text(f"{versions} {state} {self.method}"))
        self.learn(("__call__", "forward", self.method))
        self.hooks(torch_module._global_forward_pre_hooks, torch_module._global_forward_hooks)
        for space in (torch, nn.functional):
            self.module_patches(space)
        self.cls(torch.Tensor, referenced=False)
        self.value(self.root)
        while self.queue:
            job, subject, self.where = self.queue.popleft()
            job(subject)
        for attribute, order in self.orders:
            if attribute in self.iterated:
                self.out += [text(attribute), *(rank(key) or b"?" for key in order)]
        self.out += weights.digests(self.tensors)
        return xxhash.xxh3_128_hexdigest(b"".join(self.out))

    def refer(self, subject: object, job: Callable[[Any], None]) -> None:
        """Writes an object's number; what it is will be written later, once."""
        number = self.number.get(id(subject))
        if number is None:
            number = self.number[id(subject)] = len(self.kept)
            self.kept.append(subject)
            self.queue.append((job, subject, self.where))
            if number > _MOST:
                raise Unkeyable(self.where, f"more than {_MOST} objects")
        self.out.append(b"@%d;" % number)

    def unkeyable(self, value: object) -> Unkeyable:
        return Unkeyable(self.where, f"an object of type {label(type(value))}")

    # Values

    def value(self, value: Any) -> None:
        encoded = atom(value)
        if encoded is not None:
            self.out.append(encoded)
            return
        kind = type(value)
        if kind in (list, tuple, set, frozenset, dict):
            self.container(value)
        elif isinstance(value, torch.Tensor):
            self.tensor(value)
        elif isinstance(value, nn.Module):
            self.refer(value, self.module)
        elif kind is types.FunctionType:
            self.function(value)
        elif isinstance(value, type):
            self.cls(value, referenced=True)
        elif isinstance(value, enum.Enum):
            self.cls(kind, referenced=False)
            self.out += [b"enum", text(value.name), atom(value.value) or b"?"]
        elif isinstance(value, types.ModuleType):
            self.refer(value, self.held_module)
        else:
            self.callable_or_object(value)

    def callable_or_object(self, value: Any) -> None:
        if isinstance(value, types.MethodType):
            self.parts(b"method", value.__func__, value.__self__)
        elif isinstance(value, functools.partial):
            self.parts(b"partial", value.func, value.args, value.keywords)
        elif isinstance(value, types.BuiltinFunctionType | types.MethodWrapperType):
            self.out += [b"builtin", text(label(value))]
            owner = value.__self__
            if owner is not None and not isinstance(owner, type | types.ModuleType):
                self.value(owner)
        elif isinstance(value, types.WrapperDescriptorType | types.MethodDescriptorType
                        | types.ClassMethodDescriptorType | types.GetSetDescriptorType
                        | types.MemberDescriptorType | np.ufunc):  # fmt: skip
            owner = getattr(value, "__objclass__", np.ufunc)
            self.out += [b"builtin", text(label(owner)), text(value.__name__)]
        elif isinstance(value, weakref.ReferenceType):
            self.parts(b"weak", value())
        elif isinstance(value, contextvars.ContextVar):
            self.parts(b"context", value.name, value.get(None))
        elif isinstance(value, functools._lru_cache_wrapper):
            self.parts(b"lru", value.__wrapped__)
        elif functions(value):
            self.parts(b"member", type(value).__name__, *functions(value))
        else:
            self.refer(value, self.object)

    def parts(self, tag: bytes, *values: object) -> None:
        self.out += [tag, b"%d(" % len(values)]
        for value in values:
            self.value(value)

    def container(self, value: Any) -> None:
        if id(value) in self.open:
            self.out.append(b"^%d;" % self.open.index(id(value)))
            return
        self.open.append(id(value))
        if isinstance(value, dict):
            self.mapping(value)
        else:
            items: Iterable[Any] | None = value
            if isinstance(value, set | frozenset):
                items = ordered(value)
                if items is None:
                    raise Unkeyable(self.where, "a set of objects, which has no order of its own")
            self.out += [type(value).__name__.encode(), b"%d(" % len(value)]
            for item in items or ():
                self.value(item)
        self.open.pop()

    def mapping(self, value: dict[Any, Any]) -> None:
        keys = ordered(value)
        self.out.append(b"dict%d(" % len(value))
        if keys is None:
            keys = list(value)
        elif len(keys) > 1:
            # Whether their order matters is known when all code has been seen.
            self.orders.append((self.attribute, list(value)))
        for key in keys:
            self.value(key)
            self.value(value[key])

    def tensor(self, value: torch.Tensor) -> None:
        name = self.weights.get(id(value))
        if name is not None:
            self.out += [b"weight", text(name)]
            return
        weights.check(value, self.where)
        self.out += [b"tensor%d;" % len(self.tensors), text(weights.describe(value))]
        self.tensors.append(value)

    # Objects and modules

    def object(self, value: Any) -> None:
        kind = type(value)
        self.cls(kind, referenced=False)
        content = builtin_content(value)
        if content is not None:
            self.value(content)
        elif has_hidden_state(kind):
            self.parts(b"reduced", *reduced(value, self.where))
            return
        self.attributes(getattr(value, "__dict__", {}), self.skipped(kind))
        for slot in slots(kind):
            try:
                content = slot.__get__(value, kind)
            except AttributeError:
                continue  # an empty slot
            self.out += [b"slot", text(slot.__name__)]
            self.value(content)

    def skipped(self, kind: type) -> frozenset[str]:
        if any(base.__module__.startswith("transformers.") for base in kind.__mro__):
            return _PLACES
        return frozenset()

    def attributes(self, members: dict[str, Any], skipped: frozenset[str]) -> None:
        where = self.where
        for name in sorted(members):
            member = members[name]
            if name in skipped or getattr(type(member), "_ovshim_transparent", False):
                continue
            self.where, self.attribute = f"{where}.{name}" if where else name, name
            self.out.append(text(name))
            self.value(member)
        self.where = where

    def module(self, module: nn.Module) -> None:
        kind = type(module)
        if isinstance(module, torch.jit.ScriptModule):
            raise Unkeyable(self.where, "a TorchScript module")
        self.cls(kind, referenced=False)
        self.out += [b"module", b"train" if module.training else b"eval"]
        for tensors in (module._parameters, module._buffers):
            for name, tensor in sorted(tensors.items()):
                self.out += [text(name), b"None" if tensor is None else b"tensor"]
                if tensor is not None and id(module) not in self.tree:
                    self.value(tensor)
        self.hooks(module._forward_pre_hooks, module._forward_hooks,
                   module._forward_pre_hooks_with_kwargs, module._forward_hooks_with_kwargs,
                   module._forward_hooks_always_called)  # fmt: skip
        skipped = _MODULES_OWN | self.skipped(kind)
        if isinstance(module, nn.RNNBase):
            skipped |= _RNN_OWN
        elif isinstance(module, torch.fx.GraphModule):
            skipped |= _GRAPH_OWN
        self.attributes(vars(module), skipped)
        where = self.where
        for name, child in module._modules.items():  # in order: containers run in it
            self.where = f"{where}.{name}" if where else name
            self.out.append(text(name))
            self.value(child)
        self.where = where

    def hooks(self, *tables: dict[int, Any]) -> None:
        """Hooks in the order in which they run, with their flags; their ids count up for ever."""
        for table in tables[:2]:
            self.out.append(b"hooks%d" % len(table))
            for key, hook in table.items():
                self.out += [b"+" if key in flags else b"-" for flags in tables[2:]]
                self.value(hook)

    # Classes

    def cls(self, cls: type, *, referenced: bool) -> None:
        """Writes which class this is. referenced: by code, which may then make instances."""
        if self.is_pinned(cls):
            self.out += [b"class", text(label(cls))]
            if id(cls) not in self.number and cls.__flags__ & 1 << 9:  # not an immutable C type
                self.number[id(cls)] = len(self.kept)
                self.kept.append(cls)
                self.queue.append((self.class_patches, cls, self.where))
            return
        self.refer(cls, self.class_members)
        if referenced and id(cls) not in self.constructed and cls not in self.made:
            self.constructed.add(id(cls))
            self.queue.append((self.constructors, cls, self.where))

    def is_pinned(self, cls: type) -> bool:
        """Whether a version number stands for a class: found by its name in a pinned module.

        Not one that was made at run time, such as a parametrized Linear or a GraphModule.
        """
        known = self.pinned.get(id(cls))
        if known is None:
            self.kept.append(cls)
            module = sys.modules.get(cls.__module__)
            found: Any = module
            for name in cls.__qualname__.split("."):
                found = getattr(found, "__dict__", {}).get(name)
            # Types of the interpreter need not be found by their name.
            known = module is not None and pinned_module(module)
            known = known and (found is cls or not cls.__flags__ & 1 << 9)
            self.pinned[id(cls)] = known
        return known

    def class_members(self, cls: type) -> None:
        self.out += [b"class", text(cls.__qualname__)]
        for base in (*cls.__mro__[1:-1], type(cls)):
            self.cls(base, referenced=False)
        for name, member in sorted(vars(cls).items()):
            code = functions(member)
            if name == "_abc_impl" or (name.startswith("__") and not code):
                continue
            if code:
                self.out += [text(name), *(d for f in code for d in _digests(f))]
            elif plain(member):
                self.attribute = name
                self.out.append(text(name))
                self.value(member)
                continue
            self.offer(cls, name, member)

    def offer(self, cls: type, name: str, member: Any) -> None:
        """Follows a member now, or when its name turns up.

        Constructors are followed for classes that code refers to, see `constructors`; that a
        class calls super().__init__ says nothing about other classes.
        """
        dunder = name.startswith("__") and name.endswith("__")
        if name in self.names or (dunder and name not in _LIFECYCLE):
            if name not in _CONSTRUCTORS:
                self.member((cls, name, member))
        else:
            self.waiting.setdefault(name, []).append((cls, member))

    def member(self, what: tuple[type, str, Any]) -> None:
        cls, name, member = what
        self.attribute = name
        self.out += [b"member", b"%d" % self.number[id(cls)], text(name)]
        self.value(member)

    def constructors(self, cls: type) -> None:
        for base in cls.__mro__:
            if id(base) in self.number and not self.is_pinned(base):
                for name in _CONSTRUCTORS:
                    if name in vars(base):
                        self.member((base, name, vars(base)[name]))

    def class_patches(self, cls: type) -> None:
        """Offers the functions in a pinned class that did not come with it."""
        for name, member in list(vars(cls).items()):
            if any(not pinned_file(f.__code__.co_filename) for f in functions(member)):
                self.offer(cls, name, member)

    def module_patches(self, module: types.ModuleType) -> None:
        """Writes what in a pinned module is not what its name says.

        For torch itself: its own layers, which are not followed, compute by these.
        """
        for name, member in list(vars(module).items()):
            if type(member) is types.FunctionType:
                self.patch(module, name, member)
            elif type(member) is types.BuiltinFunctionType and member.__name__ != name:
                self.out += [b"alias", text(name), text(member.__name__)]

    # Functions

    def function(self, function: types.FunctionType) -> None:
        if not pinned_file(function.__code__.co_filename):
            self.refer(function, self.follow)
            return
        self.out += [b"function", text(label(function))]
        if function.__closure__ and id(function) not in self.number:
            # A wrapper made by a library (torch.no_grad, contextmanager) around other code.
            self.number[id(function)] = len(self.kept)
            self.kept.append(function)
            self.queue.append((self.wrapped, function, self.where))

    def wrapped(self, function: types.FunctionType) -> None:
        self.out.append(text(label(function)))
        for cell in _cells(function):
            if plain(cell) or isinstance(
                cell, types.FunctionType | types.MethodType | type | nn.Module | functools.partial
            ):
                self.value(cell)

    def follow(self, function: types.FunctionType) -> None:
        self.where = where = f"{function.__module__}.{function.__qualname__}"
        found = facts(function.__code__)
        self.out += [b"function", found.digest]
        self.parts(b"defaults", function.__defaults__, function.__kwdefaults__)
        for name, cell in zip(function.__code__.co_freevars, _cells(function), strict=True):
            self.attribute = name
            if name == "__class__" and isinstance(cell, type):  # what super() goes by
                self.cls(cell, referenced=False)
            else:
                self.value(cell)
        self.attributes(vars(function), frozenset())
        self.learn(found.names)
        if found.iterates:
            self.iterated.update(found.names)
        self.globals(function, found)
        self.where = where

    def globals(self, function: types.FunctionType, found: Facts) -> None:
        scope = function.__globals__
        for name in found.globals:
            if name in _NOT_GLOBALS or name.startswith("@"):  # @: pytest's, for its assertions
                continue
            self.attribute = name
            self.out.append(text(name))
            value = scope.get(name, vars(builtins).get(name, _MISSING))
            if value is _MISSING:
                self.out.append(b"missing")
            elif isinstance(value, types.ModuleType):
                self.namespace(value, found.names, set())
            else:
                self.value(value)
        for name in found.imports:
            for full in candidates(name, scope.get("__package__")):
                if full in sys.modules:  # what never was imported has not run either
                    self.namespace(sys.modules[full], found.names, set())
        if "environ" in found.names or "getenv" in found.names:
            for name in found.strings:
                if name in os.environ:
                    self.out += [b"environ", text(name), text(os.environ[name])]

    def namespace(self, module: types.ModuleType, names: tuple[str, ...], seen: set[int]) -> None:
        """Writes what code with these names may take out of a module."""
        if id(module) in seen:
            return
        seen.add(id(module))
        members, foreign = vars(module), not pinned_module(module)
        self.out.append(b"namespace" if foreign else text(module.__name__))
        for name in names:
            member = members.get(name, _MISSING)
            if isinstance(member, types.ModuleType):
                self.namespace(member, names, seen)
            elif foreign and member is not _MISSING:
                self.attribute = name
                self.out.append(text(name))
                self.value(member)
            elif type(member) is types.FunctionType:
                self.patch(module, name, member)

    def patch(self, module: types.ModuleType, name: str, member: types.FunctionType) -> None:
        if not pinned_file(member.__code__.co_filename):
            self.out += [b"patch", text(module.__name__), text(name)]
            self.function(member)

    def held_module(self, module: types.ModuleType) -> None:
        """A module kept as a value: whatever any code asks for may be asked of it."""
        self.namespace(module, tuple(sorted(self.names & vars(module).keys())), set())

    def learn(self, names: Iterable[str]) -> None:
        """More names that code mentions; the members called so are followed from now on."""
        for name in names:
            if name not in self.names:
                self.names.add(name)
                for cls, member in () if name in _CONSTRUCTORS else self.waiting.pop(name, ()):
                    self.queue.append((self.member, (cls, name, member), self.where))


_MISSING = object()


def _cells(function: types.FunctionType) -> list[Any]:
    cells = []
    for cell in function.__closure__ or ():
        try:
            cells.append(cell.cell_contents)
        except ValueError:
            cells.append(None)  # not yet filled
    return cells


def _digests(function: Any) -> list[bytes]:
    """Of a function and those that it wraps."""
    found = []
    while isinstance(function, types.FunctionType):
        found.append(facts(function.__code__).digest)
        function = function.__dict__.get("__wrapped__")
    return found
