"""What stands in a module's instance `__dict__` where the class's `forward` would be found.

`install(module, "forward", make)` puts a `BoundMethod` into `module.__dict__["forward"]`. Python
looks there before it looks at the class, so `module(x)`, `self(x)` inside the user's own methods
and `module.forward(x)` all reach it, while the class, `isinstance`, hooks, `state_dict` and `repr`
stay as they were. Everything else that asks about it (inspect, Dynamo, `torch.jit`, transformers'
look at signatures) is shown the user's own method.

A module that is copied by its `__dict__` takes the entries along, so three things are kept right:

* `deepcopy` and pickle rebuild a `BoundMethod` over the copied module (their memo knows it);
* `copy.copy` asks the instance for `__getstate__` first, where a `_Seal` answers with entries that
  find out at their first call whose they are;
* any other copy of the `__dict__` (data parallel replicas, `clone.__dict__.update(...)`) gives the
  seal one reference more than it should have. The seal is an object that calls never touch, so
  its count does not depend on who calls, from where, or how many threads do; the count of the
  `BoundMethod` itself would.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from sys import _getframe, getrefcount
from types import FrameType, FunctionType, MethodType
from typing import Any, Protocol

import torch
from torch import nn
from torch.fx import _symbolic_trace

from ovshim.holders import holders, the_one

_compiler = torch.compiler
_tracing_state = torch._C._get_tracing_state
_SEAL = "__getstate__"


class DispatcherLike(Protocol):
    """Serves the calls of one method of one module."""

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any], /) -> Any:
        """Returns what `original(*args, **kwargs)` would."""


Make = Callable[[nn.Module, Callable[..., Any]], DispatcherLike]
"""`make(module, original)`: must pickle, for it travels with pickled modules."""


class Original:
    """The user's own method of `module`, looked up anew for each call.

    Looked up on the class each time, so that a `forward` replaced later on the class is seen;
    `beneath` is an instance attribute of that name that was there before ours, which wins.

    Attributes:
        usual: what the class had when `resolve` was last asked, and that bound to the module; None
            where it is no plain function. (One attribute, for threads may find another method.)
    """

    __slots__ = ("beneath", "module", "name", "usual")

    def __init__(self, module: nn.Module, name: str, beneath: Any = None) -> None:
        self.__setstate__((module, name, beneath))

    def __getstate__(self) -> tuple[nn.Module, str, Any]:
        return self.module, self.name, self.beneath

    def __setstate__(self, state: tuple[nn.Module, str, Any]) -> None:
        self.module, self.name, self.beneath = state
        self.usual: tuple[FunctionType, MethodType] | None = None

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        usual = self.usual
        if usual is not None and getattr(type(self.module), self.name) is usual[0]:
            return usual[1](*args, **kwargs)
        found = self.resolve()
        self.usual = self._usual(found)
        return found(*args, **kwargs)

    def _usual(self, method: Any) -> tuple[FunctionType, MethodType] | None:
        if type(method) is MethodType and self.beneath is None and method.__self__ is self.module:
            function = method.__func__
            return (function, method) if type(function) is FunctionType else None
        return None

    def resolve(self) -> Any:
        """Returns the bound method (or script method, partial, ...) that eager would call.

        Raises AttributeError when the class has no such attribute.
        """
        if self.beneath is not None:
            return self.beneath
        module, name = self.module, self.name
        if isinstance(module, torch.jit.ScriptModule):
            # Its __getattr__ would write the method into the instance, over our entry.
            return module._c._get_method(name)
        cls = type(module)
        for base in cls.__mro__:
            if name in base.__dict__:
                attribute = base.__dict__[name]
                bind = getattr(type(attribute), "__get__", None)
                return attribute if bind is None else bind(attribute, module, cls)
        raise AttributeError(f"{cls.__name__!r} has no method {name!r}")


class BoundMethod:
    """A callable that serves `module.name(...)` by a dispatcher made at its first call.

    Picklable and copyable with its module. `original` runs the user's own method in eager;
    while torch compiles, exports or traces, only that runs. It holds its module strongly:
    `f = accelerate(m).forward` must go on working when nothing else holds the module.
    """

    _ovshim_transparent = True
    __slots__ = ("__weakref__", "_call", "_made", "_original", "_seal", "make")

    def __init__(self, original: Original, make: Make, seal: _Seal) -> None:
        self.__setstate__((original, make, seal))

    def __setstate__(self, state: tuple[Original, Make, _Seal]) -> None:
        self._original, self.make, self._seal = state
        self._call: Callable[[tuple[Any, ...], dict[str, Any]], Any] | None = None
        self._made: dict[str, DispatcherLike] = {}

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        # is_dynamo_compiling is False here and a constant True to Dynamo, which therefore reads
        # nothing further and inlines the original.
        if (
            _compiler.is_dynamo_compiling()
            or _compiler._is_compiling_flag
            or _symbolic_trace._is_fx_tracing_flag
            or _tracing_state() is not None
        ):
            return self.original.resolve()(*args, **kwargs)
        call = self._call
        if call is None or getrefcount(self._seal) != self._seal.usual:
            return self._settled(_getframe(1))._made_dispatcher().call(args, kwargs)
        return call(args, kwargs)

    @property
    def original(self) -> Original:
        """Runs the user's own method of the module in eager."""
        return self._settled()._original if self._seal.loose else self._original

    @property
    def module(self) -> nn.Module:
        """The module that this method belongs to."""
        return self.original.module

    @property
    def dispatcher(self) -> DispatcherLike:
        """What serves the calls; made when first asked for."""
        return (self._settled() if self._seal.loose else self)._made_dispatcher()

    def _made_dispatcher(self) -> DispatcherLike:
        # No property: an AttributeError of the factory's would be taken for a missing one.
        made = self._made.get("dispatcher")
        if made is None:
            original = self._original
            # setdefault is atomic: of two threads that make one, both take the first.
            made = self._made.setdefault("dispatcher", self.make(original.module, original))
            self._call = made.call
        return made

    def _settled(self, caller: FrameType | None = None) -> BoundMethod:
        """Returns the one that the calling module owns, after giving each module its own.

        caller: the frame that calls this object, where there is one.
        Raises RuntimeError where several modules hold this object and nothing tells whose call
        this is.
        """
        if not self._seal.loose:
            if getrefcount(self._seal) == self._seal.usual:
                return self
            if not (copies := [m for m in holders(self, caller) if m is not self._seal.module]):
                # Something else keeps it: a debugger, somebody's copy of the attributes.
                self._seal.usual = getrefcount(self._seal)
                return self
            owners = [self._seal.module, *copies]
        elif copies := holders(self, caller):
            owners = copies
        else:
            return self
        for module in copies:
            claim(module)
        return installed(the_one(owners, caller, 1)).get(self._original.name, self)

    # A copy gets the copied module through the memo of deepcopy or pickle. The module travels in
    # the state and not in constructor arguments, because it refers back to this object.

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _blank, (), self.__getstate__()

    def __getstate__(self) -> tuple[Original, Make, _Seal]:
        return self._original, self.make, self._seal

    def __deepcopy__(self, memo: dict[int, Any]) -> BoundMethod:
        memo[id(self)] = new = _blank()
        # The module first: it comes back here, to find the original complete.
        copy.deepcopy(self._original.module, memo)
        original, seal = copy.deepcopy((self._original, self._seal), memo)
        new.__setstate__((original, self.make, seal))
        return new

    # What inspect, Dynamo, torch.export and torch.jit ask of a method, answered by the original.

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        return type(self._original.resolve())

    @property
    def __self__(self) -> Any:
        return self.original.resolve().__self__

    def __getattr__(self, name: str) -> Any:
        # What is ours is asked here only while an object is still being unpickled; and the
        # function's __dict__ would pass for ours.
        if name == "__dict__" or name in vars(BoundMethod):
            raise AttributeError(name)
        return getattr(self.original.resolve(), name)

    def __repr__(self) -> str:
        return f"<accelerated {self.original.resolve()!r}>"


# Assigned here because a property of this name inside the class would be its docstring.
BoundMethod.__doc__ = property(lambda self: self.original.resolve().__doc__)  # type: ignore[assignment]


def _blank() -> BoundMethod:
    return object.__new__(BoundMethod)


class _Seal:
    """Stands in `module.__dict__["__getstate__"]` and notices that the module was copied.

    `usual` is its reference count while one module and that module's `bound` methods hold it.
    A `loose` seal came with `copy.copy`, which does not say which object the copy will be.

    Whoever keeps a copy of a module's `__dict__` to compare it with later should put
    `_ovshim_stand_in` into it where the seal would be: it is equal to every seal and counts as
    no reference to any.
    """

    _ovshim_transparent = True
    _ovshim_stand_in = object()
    __slots__ = ("bound", "loose", "module", "usual")

    def __init__(self, module: nn.Module, bound: int, loose: bool = False) -> None:
        self.__setstate__((module, bound))
        self.loose = loose

    def __eq__(self, other: object) -> bool:
        return other is self or other is _Seal._ovshim_stand_in

    __hash__ = object.__hash__

    def __getstate__(self) -> tuple[nn.Module, int]:
        return self.module, self.bound

    def __setstate__(self, state: tuple[nn.Module, int]) -> None:
        self.module, self.bound = state
        self.usual = _ALONE + self.bound
        self.loose = False

    def __call__(self) -> Any:
        """The instance's `__getstate__`: the state by its class, with entries fit for a copy.

        Raises RuntimeError where several modules hold this object and nothing tells which of
        them is being copied or pickled.
        """
        module = self.module
        # Whether a copy holds it too is looked up and not counted: how many references a call
        # of `__getstate__` adds depends on who makes it.
        owners = holders(self, None)
        copies = [m for m in owners if self.loose or m is not module]
        for copied in copies:
            claim(copied)
        if copies:
            module = the_one(owners, _getframe(1), 8)
        state = type(module).__getstate__(module)  # type: ignore[no-untyped-call]
        if not isinstance(state, dict):
            return state
        state = copy.copy(state)
        loose = _Seal(module, self.bound, loose=True)
        for key, value in state.items():
            if isinstance(value, BoundMethod):
                state[key] = BoundMethod(value._original, value.make, loose)
            elif isinstance(value, _Seal):
                state[key] = loose
        return state


class _Probe:
    __slots__ = ("held",)

    def __init__(self) -> None:
        self.held = object()


_probe = _Probe()
# What getrefcount says of an object that one attribute holds: not the same on every Python.
_ALONE = getrefcount(_probe.held)


def install(module: nn.Module, name: str, make: Make) -> BoundMethod:
    """Puts a `BoundMethod` in front of `module.name` and returns it.

    An instance attribute of that name is called instead of the class's as before; an earlier
    `BoundMethod` is replaced. Raises AttributeError when the module has no such method.
    """
    before = module.__dict__.get(name)
    beneath = before._original.beneath if isinstance(before, BoundMethod) else before
    original = Original(module, name, beneath)
    original.resolve()
    module.__dict__[name] = BoundMethod(original, make, _Seal(module, 1))
    claim(module)
    bound: BoundMethod = module.__dict__[name]
    return bound


def uninstall(module: nn.Module, name: str) -> None:
    """Takes the `BoundMethod` away again; does nothing where there is none."""
    bound = module.__dict__.get(name)
    if not isinstance(bound, BoundMethod):
        return
    del module.__dict__[name]
    if bound._original.beneath is not None:
        module.__dict__[name] = bound._original.beneath
    del module.__dict__[_SEAL]
    if installed(module):
        claim(module)


def installed(module: nn.Module) -> dict[str, BoundMethod]:
    """Returns the module's bound methods by the name of the method."""
    values = module.__dict__.values()
    return {v._original.name: v for v in values if isinstance(v, BoundMethod)}


def claim(module: nn.Module) -> None:
    """Gives `module` entries of its own for those in its `__dict__` that are ours.

    Theirs may belong to the module that it was copied from. A `BoundMethod` of the module
    itself keeps its dispatcher. Handles (transparent objects with `renewed`) are renewed.
    """
    methods = installed(module)
    entries = module.__dict__
    seal = _Seal(module, len(methods))
    for key, value in list(entries.items()):
        if isinstance(value, BoundMethod):
            old = value._original
            if old.module is module and not value._seal.loose:
                value._seal = seal
            else:
                original = Original(module, old.name, old.beneath)
                entries[key] = BoundMethod(original, value.make, seal)
        elif getattr(type(value), "_ovshim_transparent", False) and hasattr(value, "renewed"):
            entries[key] = value.renewed(module)
    entries[_SEAL] = seal
