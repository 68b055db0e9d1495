"""The outermost modules that a program calls, and what serves each of them.

Nothing is put on a user's module. What makes plans and serves them knows a stand-in: an object of
the same class over the very same `__dict__`. It keeps the tensors and submodules alive, as the plan
has to, but not the user's module, whose end takes all of it along. And whoever pickles, copies or
inspects the module meanwhile finds nothing.
"""

from __future__ import annotations

import fnmatch
import logging
import sys
import threading
import time
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.fx import _symbolic_trace
from torch.nn.modules import module as torch_module
from torch.nn.parameter import is_lazy

from ovshim import building
from ovshim.bound import Original
from ovshim.building import building_here
from ovshim.options import Options
from ovshim.scope import calls
from ovshim.scope.calls import forward_all, inside
from ovshim.scope.patient import Patient
from ovshim.scope.summary import Row, Summary, row_of
from ovshim.signals import let_through

__all__ = ["Finder"]

log = logging.getLogger("ovshim")

_tracing_state = torch._C._get_tracing_state
_compiler = torch.compiler
# Seconds that eager must have taken before calls of a module are looked at, kind by kind.
_WORTH_A_LOOK = 0.02
# Of modules that are gone the last so many are told of one by one.
_MOST_ROWS = 256


class Finder:
    """Finds and serves the modules of one scope.

    Args:
        include, exclude: names of classes, or patterns of them. Only modules of included classes
            are served, looked for from the outermost inwards; excluded ones are left alone, with
            everything inside them.
        least: the speedup below which eager goes on serving.
    """

    def __init__(
        self, options: Options, include: Sequence[str], exclude: Sequence[str], least: float
    ) -> None:
        self.options = options
        self.include = include
        self.exclude = exclude
        self.least = least
        self.began = time.perf_counter()
        self._found: dict[int, Found] = {}
        self._gone: list[Row] = []
        self.lock = threading.Lock()

    def call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What `module(*args, **kwargs)` answers, where no other module has called it."""
        found = self._found.get(id(module))
        if found is None or type(module) is not found.cls or module.__dict__ is not found.held:
            try:
                found = self._meet(module)
            except Exception as error:  # a fault of ours must not become one of the user's program
                let_through(error)
                log.debug("%s is left alone", type(module).__qualname__, exc_info=True)
                return forward_all(module, args, kwargs)
        return found.call(module, args, kwargs)

    def summary(self) -> Summary:
        """What was found so far, and how it was served."""
        rows = [*self._gone, *(row for f in list(self._found.values()) if (row := f.row()))]
        rows.sort(key=lambda row: -(row.calls["openvino"] + row.calls["mixed"]))
        return Summary(self.options.device, tuple(rows), time.perf_counter() - self.began)

    def _meet(self, module: nn.Module) -> Found:
        if any(is_lazy(tensor) for tensor in (*module.parameters(), *module.buffers())):
            return Found(module)  # for this call: it may be of another class after it
        found = _found(self, module)
        key = id(module)
        ending = sys.is_finalizing

        # Called wherever the module's last reference goes: it may take no lock that is in use. And
        # at the interpreter's end there may be nothing left of us to be called.
        def gone(_: weakref.ref[nn.Module]) -> None:
            if not ending():
                self._forget(key, found)

        found.alive = weakref.ref(module, gone)
        with self.lock:
            former = self._found.get(key)
            if former is not None and former.cls is found.cls and former.held is found.held:
                return former  # another thread has met it
            self._found[key] = found
        if former is not None:
            self._keep_row(former)
        return found

    def _forget(self, key: int, found: Found) -> None:
        if self._found.get(key) is found:
            del self._found[key]
            self._keep_row(found)
            found.let_go()

    def _keep_row(self, found: Found) -> None:
        row = found.kept = found.row()
        if row is not None:
            self._gone = [*self._gone, row][-_MOST_ROWS:]


def _found(finder: Finder, module: nn.Module) -> Found:
    cls = type(module)
    names = (cls.__name__, cls.__qualname__, f"{cls.__module__}.{cls.__qualname__}")

    def matches(patterns: Sequence[str]) -> bool:
        return any(fnmatch.fnmatchcase(n, pattern) for pattern in patterns for n in names)

    if matches(finder.exclude):
        return Found(module)
    if finder.include and not matches(finder.include):
        return _Passed(module)
    weights = any(True for _ in module.parameters()) or any(True for _ in module.buffers())
    # What torch.compile gives, and modules of TorchScript, keep their flags elsewhere.
    odd = "training" not in module.__dict__ or isinstance(module, torch.jit.ScriptModule)
    if odd or not weights or not _can_stand_in(cls):
        return Found(module)
    return _Served(module, finder)


def _can_stand_in(cls: type) -> bool:
    """Whether an object over another's `__dict__` is all of it, and ends without a word."""
    slots = any(base.__dict__.get("__slots__") for base in cls.__mro__)
    return not slots and not hasattr(cls, "__del__")


class Found:
    """A module that was met as the outermost. This one is left alone, with all that it calls."""

    def __init__(self, module: nn.Module) -> None:
        self.cls = type(module)
        self.held = module.__dict__
        self.alive: weakref.ref[nn.Module] | None = None
        # What there was to tell of it when it went.
        self.kept: Row | None = None

    def call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What `module(*args, **kwargs)` answers."""
        return forward_all(module, args, kwargs)

    def row(self) -> Row | None:
        """What there is to tell of it."""
        return None

    def let_go(self) -> None:
        """The module is gone, and nobody can call it any more."""


class _Passed(Found):
    """A module that is not included; what it calls may be."""

    def call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return calls.unseen(module, args, kwargs)


class _Served(Found):
    """A module that OpenVINO serves when that pays."""

    def __init__(self, module: nn.Module, finder: Finder) -> None:
        super().__init__(module)
        self.finder = finder
        self.dispatcher: Patient | None = None
        # How often eager has served without a look, in training mode, while a dispatcher rested.
        self.early = self.trained = self.rested = 0
        self.seconds = 0.0

    def call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        dispatcher, held = self.dispatcher, self.held
        if held["training"]:
            self.trained += 1
            return forward_all(module, args, kwargs)
        # The user's own, or `accelerate`'s; or torch.compile's.
        if "forward" in held or held.get("_compiled_call_impl") is not None:
            return forward_all(module, args, kwargs)
        if dispatcher is None:
            if self.finder.options.prefer == "faster" and self.seconds < _WORTH_A_LOOK:
                return self._timed(module, args, kwargs)
            dispatcher = self._made_dispatcher(module)
        if dispatcher.closed:
            return calls.unseen(module, args, kwargs)
        if dispatcher.resting > 0:
            dispatcher.resting -= 1
            self.rested += 1
            return forward_all(module, args, kwargs)
        if (
            _compiler._is_compiling_flag
            or _symbolic_trace._is_fx_tracing_flag
            or _tracing_state() is not None
            or (building.running and building_here())
        ):
            return forward_all(module, args, kwargs)
        if _has_hooks(held) or not calls.is_torchs():
            return self._hooked(dispatcher, module, args, kwargs)
        token = inside.set(True)
        try:
            return dispatcher.call(args, kwargs)
        finally:
            inside.reset(token)

    def _timed(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A program may make many modules and call each a few times: that has to cost nothing."""
        started = time.perf_counter()
        output = forward_all(module, args, kwargs)
        self.seconds += time.perf_counter() - started
        self.early += 1
        return output

    def _made_dispatcher(self, module: nn.Module) -> Patient:
        stand_in = object.__new__(self.cls)
        object.__setattr__(stand_in, "__dict__", self.held)
        finder = self.finder
        made = Patient(stand_in, _Users(stand_in, module), finder.options, finder.least)
        made.count(self.early, self.seconds)
        with finder.lock:
            if self.dispatcher is None:
                self.dispatcher = made
        return self.dispatcher

    def _hooked(
        self,
        dispatcher: Patient,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """torch calls the module's own hooks around what it finds as `forward`, which is found
        before they are called: there it stands for this long, and is gone when it is called. So it
        is where somebody else has patched `__call__`."""
        held = self.held

        def forward(*args: Any, **kwargs: Any) -> Any:
            _take_away(held, forward)
            return dispatcher.call(args, kwargs)

        held["forward"] = forward
        try:
            return forward_all(module, args, kwargs)
        finally:
            _take_away(held, forward)

    def row(self) -> Row | None:
        if self.kept is not None:
            return self.kept
        try:
            return row_of(self.cls, self.dispatcher, self.early, self.rested, self.trained)
        except AttributeError:
            if self.dispatcher is not None:
                raise
            return self.kept  # it was let go in the midst of this

    def let_go(self) -> None:
        dispatcher, self.dispatcher = self.dispatcher, None
        # Another thread may be making its plan.
        if dispatcher is not None and not self.finder.options.background:
            dispatcher.let_go()


def _has_hooks(held: dict[str, Any]) -> bool:
    return bool(
        held["_forward_hooks"]
        or held["_forward_pre_hooks"]
        or held["_backward_hooks"]
        or held["_backward_pre_hooks"]
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
        or torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
    )


def _take_away(held: dict[str, Any], forward: Any) -> None:
    if held.get("forward") is forward:
        held.pop("forward", None)


class _Users(Original):
    """Runs the user's own module; plans are made over the stand-in."""

    __slots__ = ("users",)

    def __init__(self, stand_in: nn.Module, module: nn.Module) -> None:
        super().__init__(stand_in, "forward")
        self.users = weakref.ref(module)

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        module = self.users()
        # Gone it is where another thread makes a plan for nobody.
        return (self.module if module is None else module).forward(*args, **kwargs)
