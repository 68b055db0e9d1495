"""Functions and classes: their code, and what it reaches by name."""

from __future__ import annotations

import builtins
import functools
import os
import sys
import types
from typing import Any

from torch import nn

from ovshim.fingerprint.bytecode import (
    Facts,
    candidates,
    facts,
    is_library_file,
    pinned_file,
    pinned_module,
    users_module,
)
from ovshim.fingerprint.composed import (
    ANY,
    ATTRIBUTES,
    METHODS,
    asks_for_any,
    getattr_asks,
    names_variables,
    unbounded,
)
from ovshim.fingerprint.errors import Unkeyable
from ovshim.fingerprint.values import cells, digests, functions, label, plain, text
from ovshim.fingerprint.writer import Writer

_CONSTRUCTORS = ("__init__", "__new__", "__post_init__", "__set_name__")
# Methods that Python calls by itself, but not while a module computes.
_LIFECYCLE = frozenset({
    "__init_subclass__", "__class_getitem__", "__del__", "__reduce__", "__reduce_ex__",
    "__getstate__", "__setstate__", "__copy__", "__deepcopy__", "__repr__", "__str__", "__dir__",
    "__sizeof__", "__getnewargs__", "__getnewargs_ex__",
})  # fmt: skip
# Too seldom called by a forward to follow what a library's do: its configurations build others.
_COMPARISONS = frozenset({"__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__", "__hash__",
                          "__setattr__", "__delattr__"})  # fmt: skip
# Functions of torch that no layer computes by, and that libraries replace (Lightning compile).
_NOT_COMPUTING = frozenset({"compile", "load", "save"})
# What Python keeps in a class for itself.
_OF_CLASSES = frozenset({"_abc_impl", "__dict__", "__weakref__", "__doc__", "__module__",
                         "__slots__", "__annotations__", "__firstlineno__", "__static_attributes__",
                         "__dataclass_fields__", "__dataclass_params__", "__orig_bases__",
                         "__parameters__", "__abstractmethods__",
                         # Of enumerations; members that are composed come to be in it by and by.
                         "_value2member_map_", "_member_map_", "_member_names_",
                         "_unhashable_values_", "_unhashable_values_map_",
                         "_hashable_values_"})  # fmt: skip
_NOT_GLOBALS = frozenset({"__name__", "__file__", "__spec__", "__loader__", "__package__",
                          "__path__", "__doc__", "__builtins__", "__debug__"})  # fmt: skip
# Calls within libraries that are followed. Attention is two below a layer's forward, the repetition
# of keys three; what is deeper is keyed by its bytecode and the version of its package.
_DEEPEST = 3
_OF_ENVIRONMENT = frozenset({"environ", "getenv"})
_HEAP_TYPE = 1 << 9  # not an immutable type of the interpreter
_MISSING = object()


class Reach(Writer):
    """Follows code.

    All methods of a class that no version number stands for are written by their bytecode; those
    whose name is in `names` are followed into what they use. A transformers model inherits
    hundreds (saving, uploading, generating) whose helpers have no part in `forward`.

    Where a user's function looks something up by a name that it composes, the name `METHODS` is
    known, and all methods of users' classes are followed; where it may ask modules, `ANY` is, and
    so are all members of users' modules.

    made: classes of modules at hand. What their constructors did shows in the modules.
    """

    def __init__(self, known: dict[int, str], made: set[type]) -> None:
        super().__init__(known)
        self.made = made
        self.constructed: set[type] = set()
        self.pinned: dict[type, bool] = {}
        self.followed: list[types.CodeType] = []
        self.offered: set[int] = set()  # users' modules

    # Classes

    def cls(self, cls: type, *, referenced: bool) -> None:
        """Writes which class this is. referenced: by code, which may then make instances."""
        self.learn((cls.__qualname__,))
        self.look_up(cls)
        if self.is_pinned(cls):
            self.out += [b"class", text(label(cls))]
            if cls.__flags__ & _HEAP_TYPE and self.first(cls):
                self.later(self.class_patches, cls)
            return
        self.refer(cls, self.class_members)
        if referenced and cls not in self.constructed and cls not in self.made:
            self.constructed.add(cls)
            self.later(self.constructors, cls)

    def is_pinned(self, cls: type) -> bool:
        """Whether a version number stands for a class: found by its name in a pinned module.

        Not one that was made at run time, such as a parametrized Linear or a GraphModule.
        """
        known = self.pinned.get(cls)
        if known is None:
            module = sys.modules.get(cls.__module__)
            found: Any = module
            for name in cls.__qualname__.split("."):
                found = getattr(found, "__dict__", {}).get(name)
            # Types of the interpreter need not be found by their name.
            known = module is not None and pinned_module(module)
            known = known and (found is cls or not cls.__flags__ & _HEAP_TYPE)
            self.pinned[cls] = known
        return known

    def is_library(self, cls: type) -> bool:
        module = sys.modules.get(cls.__module__)
        filename = getattr(module, "__file__", None) or ""
        return is_library_file(filename) or pinned_file(filename) or self.is_pinned(cls)

    def class_members(self, cls: type) -> None:
        self.library = self.is_library(cls)
        self.version(cls.__module__)
        where = f"{cls.__module__}.{cls.__qualname__}"
        self.mark(where=where)
        self.out += [b"class", text(cls.__qualname__)]
        for base in (*cls.__mro__[1:-1], type(cls)):
            self.cls(base, referenced=False)
        for name, member in sorted(vars(cls).items()):
            code = functions(member)
            if name in _OF_CLASSES:
                continue
            self.mark(".", name, where)
            if name.startswith("__") and name.endswith("__") and not (code or callable(member)):
                self.when(name, self.member, (cls, name, member))  # nothing that Python asks for
                continue
            if code:
                self.out += [text(name), *(d for f in code for d in digests(f))]
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
        if name in _CONSTRUCTORS:
            return
        called = name.startswith("__") and name.endswith("__") and name not in _LIFECYCLE
        if called and not (self.library and name in _COMPARISONS):
            self.member((cls, name, member))
        else:
            self.when(name, self.member, (cls, name, member))
            # Not what a library has put into a class: transformers gives nn.Module a method as soon
            # as it has made a model, and the key would depend on that.
            of_library = any(map(self.from_library, functions(member)))
            if not (self.library or of_library or name.startswith("__")):
                self.when(METHODS, self.member, (cls, name, member))

    def member(self, what: tuple[type, str, Any]) -> None:
        cls, name, member = what
        self.library = self.is_library(cls)
        self.attribute = name
        self.mark(".", name, f"{cls.__module__}.{cls.__qualname__}")
        self.out += [b"member@%d;" % self.number[id(cls)], text(name)]
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
            foreign = (f for f in functions(member) if not pinned_file(f.__code__.co_filename))
            if not all(getattr(f, "_ovshim_transparent", False) for f in foreign):
                self.offer(cls, name, member)

    def module_patches(self, module: types.ModuleType) -> None:
        """Writes what in a pinned module is not what its name says.

        For torch itself: its own layers, which are not followed, compute by these.
        """
        for name, member in list(vars(module).items()):
            if type(member) is types.FunctionType and name not in _NOT_COMPUTING:
                self.patch(module, name, member)
            elif type(member) is types.BuiltinFunctionType and member.__name__ != name:
                self.mark(".", name, module.__name__)
                self.out += [b"alias", text(name), text(member.__name__)]

    def patch(self, module: types.ModuleType, name: str, member: types.FunctionType) -> None:
        if not pinned_file(member.__code__.co_filename):
            self.mark(".", name, module.__name__)
            self.out += [b"patch", text(module.__name__), text(name)]
            self.function(member)

    # Functions

    def function(self, function: types.FunctionType) -> None:
        if not pinned_file(function.__code__.co_filename):
            self.refer(function, self.follow)
            return
        self.look_up(function)
        self.out += [b"function", text(label(function))]
        if function.__closure__ and self.first(function):
            # A wrapper made by a library (torch.no_grad, contextmanager) around other code.
            self.later(self.wrapped, function)

    def wrapped(self, function: types.FunctionType) -> None:
        self.out.append(text(label(function)))
        for cell in cells(function):
            if plain(cell) or isinstance(
                cell, types.FunctionType | types.MethodType | type | nn.Module | functools.partial
            ):
                self.value(cell)

    def follow(self, function: types.FunctionType) -> None:
        self.where = f"{function.__module__}.{function.__qualname__}"
        self.library = self.from_library(function)
        depth = self.depth + 1 if self.library else 0
        self.version(function.__module__)
        self.mark()
        found = facts(function.__code__)
        self.out += [b"function", found.digest]
        if depth > _DEEPEST:
            return
        named = sorted((function.__kwdefaults__ or {}).items())
        self.mark(" defaults")
        self.parts(b"defaults", function.__defaults__, *named)
        for name, cell in zip(function.__code__.co_freevars, cells(function), strict=True):
            self.attribute = name
            self.mark(" closure ", name)
            if name == "__class__" and isinstance(cell, type):  # what super() goes by
                self.cls(cell, referenced=False)
            else:
                self.value(cell)
        self.attributes(vars(function), frozenset({"__signature__"}))
        self.depth = depth  # a function in a closure is as deep as the wrapper around it
        self.learn(found.names)
        self.followed.append(function.__code__)
        self.globals(function, found)

    def look_up(self, value: object) -> None:
        """Of what looks things up by names that it is given, where users' code has it."""
        if self.library:
            return  # its version stands for what it does with names
        if asks_for_any(value):
            self.learn((ANY, METHODS))
        elif (name := unbounded(value)) is not None:
            raise Unkeyable(self.where, f"code that calls or reads {name}")

    def callable_or_object(self, value: Any) -> None:
        self.look_up(value)
        super().callable_or_object(value)

    def from_library(self, function: types.FunctionType) -> bool:
        filename = function.__code__.co_filename
        if filename.startswith("<"):  # generated, as the methods of a dataclass are
            filename = str(function.__globals__.get("__file__", ""))
        return is_library_file(filename)

    def version(self, module: str | None) -> None:
        """Writes the version of the installed package that a module belongs to, once."""
        top = sys.modules.get((module or "").partition(".")[0])
        if self.library and top is not None and self.first(top):
            self.out += [text(top.__name__), text(str(getattr(top, "__version__", "")))]

    def globals(self, function: types.FunctionType, found: Facts) -> None:
        scope = function.__globals__
        for name in found.globals:
            if name in _NOT_GLOBALS or name.startswith("@"):  # @: pytest's, for its assertions
                continue
            self.attribute = name
            self.mark(" global ", name)
            self.out.append(text(name))
            value = scope.get(name, vars(builtins).get(name, _MISSING))
            if value is _MISSING:
                self.out.append(b"missing")
            elif isinstance(value, types.ModuleType):
                self.namespace(value, found.names, set())
            elif name == "getattr" and value is getattr and not self.library:
                self.learn(getattr_asks(function.__code__))
            elif name not in _OF_ENVIRONMENT:
                self.value(value)
        if not self.library:  # there it would depend on what the process happens to have imported
            for name in found.imports:
                for full in candidates(name, scope.get("__package__")):
                    if full in sys.modules:  # what never was imported has not run either
                        self.mark(" import ", name)
                        self.namespace(sys.modules[full], found.names, set())
            self.any_name(found)
        if not _OF_ENVIRONMENT.isdisjoint(found.names):
            if not self.library and not names_variables(function.__code__):
                raise Unkeyable(self.where, "code that composes names of environment variables")
            for name in found.strings:
                if name in os.environ:
                    self.mark(" environment ", name)
                    self.out += [b"environ", text(name), text(os.environ[name])]

    def any_name(self, found: Facts) -> None:
        """Notes attributes by which more than what is named can be reached."""
        if not ATTRIBUTES.isdisjoint(found.names):
            self.learn((ANY, METHODS))
        if "__subclasses__" in found.names:
            raise Unkeyable(self.where, "code that calls __subclasses__")

    def namespace(self, module: types.ModuleType, names: tuple[str, ...], seen: set[int]) -> None:
        """Writes what code with these names may take out of a module."""
        if id(module) in seen:
            return
        seen.add(id(module))
        foreign = not pinned_module(module)
        self.out.append(b"namespace" if foreign else text(module.__name__))
        if users_module(module):
            self.answers_of(module)
        elif foreign and type(module) is not types.ModuleType:
            return  # filled when asked: what is in it depends on who asked before
        members = vars(module)
        for name in names:
            member = members.get(name, _MISSING)
            if not foreign and name not in _OF_ENVIRONMENT:
                self.look_up(member)
            if isinstance(member, types.ModuleType):
                self.namespace(member, names, seen)
            elif foreign and member is not _MISSING:
                self.attribute = name
                self.mark(f" global {module.__name__}.", name)
                self.out.append(text(name))
                self.value(member)
            elif type(member) is types.FunctionType:
                self.patch(module, name, member)

    def answers_of(self, module: types.ModuleType) -> None:
        """Offers all of it to composed names, and writes what it answers by for names that it does
        not have."""
        if id(module) in self.offered:
            return
        self.offered.add(id(module))
        self.when(ANY, self.whole, module)
        if type(module) is not types.ModuleType:
            self.cls(type(module), referenced=False)
        if "__getattr__" in vars(module):
            self.value(vars(module)["__getattr__"])

    def whole(self, module: types.ModuleType) -> None:
        """Writes all that is in a user's module. Of other modules in it those that belong to it:
        others are found by who imports them."""
        self.library = False
        self.out.append(b"whole")
        inner = module.__name__ + "."
        for name in sorted(vars(module)):
            member = vars(module)[name]
            if name.startswith("__"):
                continue
            if not isinstance(member, types.ModuleType):
                self.attribute = name
                self.mark(f" global {module.__name__}.", name)
                self.out.append(text(name))
                self.value(member)
            elif member.__name__.startswith(inner):
                self.namespace(member, (), set())

    def python_module(self, module: types.ModuleType) -> None:
        """A module kept as a value: whatever any code asks for may be asked of it."""
        self.out.append(b"module")
        if users_module(module):
            self.answers_of(module)
        for name in sorted(vars(module)):
            if not name.startswith("__"):
                self.when(name, self.module_member, (module, name))

    def module_member(self, what: tuple[types.ModuleType, str]) -> None:
        module, name = what
        self.attribute = name
        self.mark(".", name, module.__name__)
        self.out += [b"member@%d;" % self.number[id(module)], text(name)]
        if isinstance(vars(module).get(name), types.ModuleType):
            return  # sub-modules of sub-modules are found by who imports them
        if not pinned_module(module):
            self.value(vars(module).get(name))
