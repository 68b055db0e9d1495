"""The canonical text of values: what each is, how they hang together, in one order."""

from __future__ import annotations

import contextvars
import enum
import functools
import heapq
import itertools
import types
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch

from ovshim.fingerprint import weights
from ovshim.fingerprint.bytecode import LONGEST_NAME
from ovshim.fingerprint.composed import ANY
from ovshim.fingerprint.errors import Unkeyable
from ovshim.fingerprint.values import (
    atom,
    builtin_content,
    functions,
    has_hidden_state,
    label,
    ordered,
    reduced,
    slots,
    text,
)

_MOST = 200_000  # objects; a BERT has one thousand

# Where a transformers model was loaded from, by which release it was saved, and a hash that
# Python salts.
_PLACES = frozenset({"name_or_path", "_name_or_path", "_commit_hash", "transformers_version",
                     "_original_object_hash"})  # fmt: skip

# What Enum keeps in a member, but for the value. `_inverted_` comes with its first use.
_OF_ENUMS = frozenset({"_name_", "__objclass__", "_sort_order_", "_hashable_values_", "_inverted_"})

Job = Callable[[Any], None]


class Writer(ABC):
    """Writes values into `out`; objects by number, each described once by a queued job.

    `names` are all names that code mentions and all strings that were met: whatever may be looked
    up by name. Members of classes whose name is not among them wait.

    `library` is True below the globals of an installed package. What is there belongs to the
    process: registries grow with every model that is imported, and hold whole libraries. So of
    a container only what `names` ask for is written, and what cannot be keyed is named by its type;
    the package's version is in the text. What hangs on the module itself gets no such indulgence.
    """

    def __init__(self, known: dict[int, str]) -> None:
        self.out: list[bytes] = []
        self.marks: list[tuple[int, str, str, str]] | None = None  # a list where it is a `trail`
        self.tensors: list[torch.Tensor] = []  # to be hashed together at the end
        self.where = ""
        self.library = False
        self.depth = 0  # calls from library function to library function
        self.attribute = ""  # the one whose value is being written
        self.known = known  # id to name, of tensors that are keyed elsewhere
        self.number: dict[int, int] = {}
        self.kept: list[object] = []  # an id stays taken while its object lives
        # Shallow ones first, so that nothing is met in the depths before it is met near the top.
        self.queue: list[tuple[int, int, Job, Any, str, bool]] = []
        self.count = itertools.count()
        self.names: set[str] = set()
        self.waiting: dict[str, list[tuple[Job, Any]]] = {}
        self.open: list[int] = []  # containers around the one being written
        self.orders: list[tuple[str, list[Any]]] = []  # attribute, keys of a dict in it

    @abstractmethod
    def function(self, function: types.FunctionType) -> None: ...

    @abstractmethod
    def cls(self, cls: type, *, referenced: bool) -> None: ...

    @abstractmethod
    def module(self, module: torch.nn.Module) -> None: ...

    @abstractmethod
    def python_module(self, module: types.ModuleType) -> None: ...

    @abstractmethod
    def is_library(self, cls: type) -> bool: ...

    def run(self) -> None:
        """Does all jobs, those that they add included."""
        while self.queue:
            self.depth, _, job, subject, self.where, self.library = heapq.heappop(self.queue)
            self.mark()
            job(subject)

    def mark(self, what: str = "", name: str = "", where: str | None = None) -> None:
        """What is written next belongs to a place: `where` (None: that at which the walk is) with
        `what` and `name` behind it."""
        if self.marks is not None:
            self.marks.append((len(self.out), self.where if where is None else where, what, name))

    def later(self, job: Job, subject: Any) -> None:
        entry = (self.depth, next(self.count), job, subject, self.where, self.library)
        heapq.heappush(self.queue, entry)

    def first(self, subject: object) -> bool:
        """Numbers an object; whether it had no number."""
        if id(subject) in self.number:
            return False
        self.number[id(subject)] = len(self.kept)
        self.kept.append(subject)
        if len(self.kept) > _MOST:
            raise Unkeyable(self.where, f"more than {_MOST} objects")
        return True

    def refer(self, subject: object, job: Job) -> None:
        """Writes an object's number; what it is will be written later, once."""
        if self.first(subject):
            self.later(job, subject)
        self.out.append(b"@%d;" % self.number[id(subject)])

    def learn(self, names: Iterable[str]) -> None:
        """More names that something may be looked up by."""
        for name in names:
            if name not in self.names:
                self.names.add(name)
                for job, subject in self.waiting.pop(name, ()):
                    self.later(job, subject)

    def when(self, name: str, job: Job, subject: Any) -> None:
        """Does a job now if the name is known, else when it turns up."""
        if name in self.names:
            job(subject)
        else:
            self.waiting.setdefault(name, []).append((job, subject))

    def value(self, value: Any) -> None:
        encoded = atom(value)
        if encoded is not None:
            self.out.append(encoded)
            if type(value) is str and len(value) <= LONGEST_NAME:
                self.learn((value,))
            return
        kind = type(value)
        if kind in (list, tuple, set, frozenset, dict):
            self.container(value)
        elif isinstance(value, torch.Tensor):
            self.tensor(value)
        elif isinstance(value, torch.nn.Module):
            self.refer(value, self.module)
        elif kind is types.FunctionType:
            self.function(value)
        elif isinstance(value, type):
            self.cls(value, referenced=True)
        elif isinstance(value, enum.Enum):
            self.refer(value, self.enum)
        elif isinstance(value, types.ModuleType):
            self.refer(value, self.python_module)
        else:
            self.callable_or_object(value)

    def enum(self, member: enum.Enum) -> None:
        self.library = self.library and self.is_library(type(member))
        self.cls(type(member), referenced=False)
        self.out += [b"enum", text(member.name)]
        self.attributes(vars(member), _OF_ENUMS)

    def callable_or_object(self, value: Any) -> None:
        if isinstance(value, types.MethodType):
            self.parts(b"method", value.__func__, value.__self__)
        elif isinstance(value, functools.partial):
            self.parts(b"partial", value.func, value.args, *sorted(value.keywords.items()))
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
        elif isinstance(value, types.MappingProxyType):
            self.parts(b"proxy", dict(value))
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
        if self.library and type(value) in (dict, set) and all(map(_wanted_by, value)):
            self.registry(value)
        elif isinstance(value, dict):
            self.mapping(value)
        else:
            items: Iterable[Any] | None = value
            if isinstance(value, set | frozenset):
                items = ordered(value)
                if items is None:
                    self.refuse("a set of objects, which has no order of its own")
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

    def registry(self, value: dict[Any, Any] | set[Any]) -> None:
        """Of a library's dict or set by name, or by class: what somebody may ask for."""
        self.first(value)
        self.out.append(b"registry@%d;" % self.number[id(value)])
        for name, key in sorted((_wanted_by(key), key) for key in value if isinstance(key, str)):
            self.when(name, self.item, (value, key))
        classes = {_wanted_by(key): key for key in value if isinstance(key, type)}
        for name in sorted(classes):
            self.when(name, self.item, (value, classes[name]))

    def item(self, what: tuple[Any, Any]) -> None:
        holder, key = what
        self.out.append(b"item@%d;" % self.number[id(holder)])
        self.value(key)
        if isinstance(holder, dict):
            self.value(holder.get(key))

    def tensor(self, value: torch.Tensor) -> None:
        name = self.known.get(id(value))
        if name is not None:
            self.out += [b"weight", text(name)]
            return
        weights.check(value, self.where)
        self.out += [b"tensor%d;" % len(self.tensors), text(weights.describe(value))]
        self.tensors.append(value)
        self.attached(value)

    def attached(self, tensor: torch.Tensor) -> None:
        """Offers a tensor's Python attributes to who names them: libraries leave marks there."""
        for name in sorted(vars(tensor)):
            for wanted in (name, ANY):
                self.when(wanted, self.attachment, (tensor, name))

    def attachment(self, what: tuple[torch.Tensor, str]) -> None:
        tensor, name = what
        self.attribute = name
        self.mark(" of a tensor: ", name)
        self.out += [b"of", text(self.known.get(id(tensor), "")), text(name)]
        self.value(vars(tensor).get(name))

    def object(self, value: Any) -> None:
        kind = type(value)
        self.library = self.library and self.is_library(kind)
        self.cls(kind, referenced=False)
        content = builtin_content(value)
        if content is not None:
            self.value(content)
        elif has_hidden_state(kind):
            try:
                parts = reduced(value)
            except Exception as error:  # whatever such a method raises, it means no
                self.refuse(f"an object of type {label(kind)}", error)
            else:
                self.parts(b"reduced", *parts)
            return
        self.attributes(getattr(value, "__dict__", {}), self.skipped(kind))
        for slot in slots(kind):
            try:
                content = slot.__get__(value, kind)
            except AttributeError:
                continue  # an empty slot
            self.out += [b"slot", text(slot.__name__)]
            self.value(content)

    def refuse(self, what: str, cause: Exception | None = None) -> None:
        """`Unkeyable`, or the bare name of something that a library keeps for itself."""
        if not self.library:
            raise Unkeyable(self.where, what) from cause
        self.out += [b"opaque", text(what)]

    def skipped(self, kind: type) -> frozenset[str]:
        """Attributes of instances that no answer depends on."""
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
            self.mark()
            self.out.append(text(name))
            self.value(member)
        self.where = where
        self.mark()


def _wanted_by(key: object) -> str:
    """The name by which a registry's entry is asked for; empty where it is by something else."""
    if isinstance(key, str):
        return key
    return key.__qualname__ if isinstance(key, type) else ""
