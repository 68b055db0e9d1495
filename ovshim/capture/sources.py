"""Where a captured graph got things from: what Dynamo guards, as guards of ours."""

from __future__ import annotations

import contextlib
import inspect
import logging
import re
import sys
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from ovshim.capture.paths import steps_of, storable
from ovshim.classes import is_users
from ovshim.guards import BadGuardError, Path, Step, Test, ValueGuard, roots_of, walk
from ovshim.reasons import reason

if TYPE_CHECKING:
    from ovshim.capture import Request

__all__ = ["Sources"]

log = logging.getLogger("ovshim")

# What is asked of a type alone is asked of the object: so it is of all that a path leads through.
_TESTS: Mapping[str, Test] = {
    **dict.fromkeys(("EQUALS_MATCH", "CONSTANT_MATCH", "CONSTANT_SUBCLASS_MATCH"), "value"),
    **dict.fromkeys(("BOOL_MATCH", "NONE_MATCH", "TYPE_MATCH", "NOT_NONE_MATCH"), "value"),
    **dict.fromkeys(("ID_MATCH", "FUNCTION_MATCH", "CLOSURE_MATCH", "BUILTIN_MATCH"), "same"),
    **dict.fromkeys(("CLASS_MATCH", "MODULE_MATCH", "NN_MODULE", "TENSOR_MATCH"), "same"),
    **dict.fromkeys(("WEAKREF_ALIVE", "DUPLICATE_INPUT"), "same"),
    "SEQUENCE_LENGTH": "length",
    # A key was looked for, and found or not: then none may come or go.
    **dict.fromkeys(("DICT_KEYS_MATCH", "MAPPING_KEYS_CHECK", "DICT_CONTAINS"), "keys"),
    **dict.fromkeys(("DICT_NOT_CONTAINS", "SET_CONTAINS", "SET_NOT_CONTAINS"), "keys"),
    **dict.fromkeys(("HASATTR", "NOT_PRESENT_IN_GENERIC_DICT"), "found"),
}
# The generation has all hooks; tensors of other classes are none of OpenVINO's.
_ELSEWHERE = frozenset({"EMPTY_NN_MODULE_HOOKS_DICT"})
_DEFAULTS = frozenset({"__defaults__", "__kwdefaults__"})
_OF_CLASSES = frozenset({"__class__", "__mro__", "__dict__"})
_CODE = (types.FunctionType, types.BuiltinFunctionType, types.WrapperDescriptorType,
         types.MethodDescriptorType, types.GetSetDescriptorType, types.MemberDescriptorType,
         staticmethod, classmethod, property, type)  # fmt: skip
# Globals that Dynamo itself puts there: Python's builtins, and objects named after their ids.
_BUILTINS = re.compile(r"__builtins_dict__.*")
_MADE_UP = re.compile(r"_.*\d{6,}_c\d+")
_PLAIN = (type(None), bool, int, float, complex, str, bytes, tuple, torch.dtype, torch.device)
_KEYED = (dict, set, frozenset, types.MappingProxyType)


class Sources:
    """Resolves the sources of one capture.

    Args:
        args, kwargs: the call, as Dynamo was given it.
        imports: names that Dynamo made up for modules, with the modules' real names.
    """

    def __init__(
        self,
        request: Request,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        imports: Mapping[str, str],
    ) -> None:
        self.request = request
        self.imports = imports
        self.roots = roots_of(request.module, request.call)
        function = request.call.__func__  # type: ignore[attr-defined]
        signature = inspect.signature(function, follow_wrapped=False)
        bound = signature.bind(request.call.__self__, *args, **kwargs)  # type: ignore[attr-defined]
        bound.apply_defaults()
        self.locals = dict(bound.arguments)
        for name in self.roots["closure"]:
            with contextlib.suppress(KeyError):  # an empty cell: nothing was read from it
                self.locals[name] = self.roots["closure"][name]
        self.closure_names = set(self.roots["closure"]) - set(bound.arguments)
        self.tensors = {id(t): i for i, t in enumerate(request.tensors)}
        self.owned = {id(t) for t in request.module.parameters()}
        self.owned |= {id(t) for t in request.module.buffers()}

    # --- sizes --------------------------------------------------------------------------------

    def size_places(self, var_to_sources: Mapping[Any, Any]) -> dict[tuple[int, int], Any]:
        """(tensor, dimension) of the call → the symbol that stands for this size."""
        from torch._dynamo.source import TensorProperty, TensorPropertySource

        places = {}
        for symbol, sources in var_to_sources.items():
            for source in sources:
                if isinstance(source, TensorPropertySource) and source.prop is TensorProperty.SIZE:
                    index = self.tensors.get(id(self._object(source.base)))
                    if index is not None and source.idx is not None:
                        places[index, source.idx] = symbol
        return places

    # --- what was read ------------------------------------------------------------------------

    def owns(self, placeholder: torch.fx.Node) -> bool:
        """Whether this input of a graph is one of the module's parameters or buffers."""
        source: Any = getattr(placeholder, "_dynamo_source", None)
        return source is not None and id(self._object(source)) in self.owned

    def read_tensors(self, placeholders: Iterable[torch.fx.Node]) -> tuple[ValueGuard, ...]:
        """Guards for tensors that are neither inputs nor parameters or buffers: attributes, items
        of lists, globals. They must stay the same objects (`generation` watches their versions).

        Raises:
            CaptureError: the graph takes something that is found nowhere.
        """
        from ovshim.capture import CaptureError

        guards = []
        for node in placeholders:
            if isinstance(node.meta.get("example_value"), torch.SymInt):
                continue
            source: Any = getattr(node, "_dynamo_source", None)
            found = self._object(source) if source is not None else None
            if not isinstance(found, torch.Tensor):
                detail = f"the graph reads {getattr(source, 'name', node.target)}"
                raise CaptureError(reason("capture-failed", detail))
            if id(found) in self.tensors or id(found) in self.owned:
                continue
            path = self._path(source)
            if path is None:
                detail = f"the graph reads a tensor from {source.name}"
                raise CaptureError(reason("capture-failed", detail))
            guards.append(ValueGuard(path[0], path[1], "same"))
        return tuple(guards)

    def read_guards(self, guards: Iterable[Any]) -> tuple[ValueGuard, ...]:
        """Dynamo's guards on values, lengths, keys and identities that nothing else watches.

        Raises:
            CaptureError: there is one that could not be asked again.
        """
        found: dict[ValueGuard, None] = {}
        for guard in guards:
            for source, test in _asked(guard):
                if self.is_given(source) or self._is_of_namedtuple(source):
                    continue
                path = self._path(source) if test else None
                if test is None or path is None:
                    raise _unknown(guard)
                try:
                    found.update(dict.fromkeys(self._guards(path, test, guard)))
                except BadGuardError as error:
                    raise _unknown(guard) from error
        return tuple(found)

    def read_handed_out(self, sources: Iterable[Any]) -> tuple[ValueGuard, ...]:
        """Guards for constants that are handed out: see `handed_out`.

        Raises:
            CaptureError: there is one that could not be asked for again.
        """
        from ovshim.capture import CaptureError

        found: dict[ValueGuard, None] = {}
        for source in sources:
            path = None if self.is_given(source) else self._path(source)
            if path is None:
                continue
            try:
                if isinstance(walk(*path, self.roots), _PLAIN):
                    found.update(dict.fromkeys(self._guards(path, "value", None)))
            except BadGuardError as error:
                detail = f"the output holds {source.name}, which nobody watches"
                why = reason("capture-failed", detail)
                raise CaptureError(why, harmless=True) from error
        return tuple(found)

    def _guards(self, path: Path, test: Test, guard: Any) -> Iterator[ValueGuard]:
        root, steps = path
        passed = [walk(root, steps[:i], self.roots) for i in range(len(steps) + 1)]
        self._refuse(passed[-1], guard)
        if test == "found":
            own = guard.create_fn_name() == "NOT_PRESENT_IN_GENERIC_DICT"
            steps = (*steps, ("own" if own else "attr", guard.create_fn.keywords["attr"]))
        elif test == "value" and not isinstance(passed[-1], _PLAIN):
            test = "same"
            if isinstance(passed[-1], set | frozenset):  # to Dynamo a constant
                yield from self._guards(path, "keys", guard)
        elif test == "keys" and not isinstance(passed[-1], _KEYED):
            return
        if not self._is_covered(root, steps, test, passed):
            yield ValueGuard.now(root, steps, test, self.roots)
        if root == "import:builtins" and steps:  # nor does a global of this name come before it
            yield ValueGuard.now("globals", (("item", steps[0][1]),), "found", self.roots)

    def _refuse(self, found: Any, guard: Any) -> None:
        """What Dynamo reads without a guard that would tell when it changes."""
        if isinstance(found, np.ndarray):
            raise _unknown(guard)  # its shape is written to in place
        # A library says of its own that they answer the same for as long as a process lives.
        if isinstance(found, types.FunctionType) and is_users(found):
            # Its names are guarded in the module that it says it is of.
            names, name = found.__globals__, found.__globals__.get("__name__")
            spaces = getattr(sys.modules.get(str(name)), "__dict__", None), self.roots["globals"]
            elsewhere = name is not None and not any(names is space for space in spaces)
            marked = hasattr(found, "_dynamo_marked_constant")
            if marked or (elsewhere and not _is_namedtuples(found.__globals__)):
                raise _unknown(guard)

    def _is_covered(
        self, root: str, steps: tuple[Step, ...], test: Test, passed: Sequence[Any]
    ) -> bool:
        """Attributes of modules, which `generation` has; code, of which it has the functions and
        classes; what is Dynamo's."""
        if not steps or root.startswith("import:torch._dynamo"):
            return True
        names = [str(key) for how, key in steps if how == "attr"]
        holder, found = passed[len(steps) - 1], passed[-1]
        if "__code__" in names or steps[-1][1] in _DEFAULTS:
            return True
        if len(steps) > 1 and steps[-2][1] in _DEFAULTS and isinstance(found, _PLAIN):
            return True
        if "__closure__" in names and not _are_users(passed):
            return True  # a library's wrapper
        if any(name in _OF_CLASSES for name in names) and test != "value":
            return test != "same" or isinstance(found, _CODE)
        modules = [x for x in passed[: len(steps)] if isinstance(x, nn.Module)]
        if modules and _is_torchs_layer(modules[-1]) and not isinstance(holder, torch.Tensor):
            return True
        if isinstance(holder, nn.Module):
            return test == "found" or _is_own(holder, steps[-1], test)
        return any(key in ("_modules", "_parameters", "_buffers") for _, key in steps[-2:])

    # --- paths --------------------------------------------------------------------------------

    def _object(self, source: Any) -> Any:
        """What a source stands for in this call; None where that cannot be told."""
        steps = steps_of(source)
        if steps is None:
            return None
        scope, name, path = steps
        try:
            if scope == "global" and name in self.imports:
                scope, name = "import", self.imports[name]
            if scope == "import":
                return walk(f"import:{name}", path, self.roots)
            base = (self.locals if scope == "local" else self.roots["globals"])[name]
            return walk("base", path, {"base": base})
        except (BadGuardError, KeyError):
            return None

    def _path(self, source: Any) -> Path | None:
        """The path of ours for a source; None for an input and for sorts that have none."""
        steps = steps_of(source)
        path = None if steps is None else self._rooted(*steps)
        if path is None:
            return None
        try:
            stored = storable(walk(path[0], (), self.roots), path[1])
        except BadGuardError:  # it leads nowhere, which is found out again
            return path
        return None if stored is None else (path[0], stored)

    def _rooted(self, scope: str, name: str, path: tuple[Step, ...]) -> Path | None:
        if scope == "import":
            return f"import:{name}", path
        if scope == "global":
            if _BUILTINS.fullmatch(name):
                return "import:builtins", (*(("attr", key) for _, key in path[:1]), *path[1:])
            if name in self.imports:
                return f"import:{self.imports[name]}", path
            if _MADE_UP.fullmatch(name):
                held = self.roots["globals"].get(name)
                is_module = isinstance(held, types.ModuleType)
                return (f"import:{held.__name__}", path) if is_module else None
            return "globals", (("item", name), *path)
        base, owner = self.locals.get(name), self.request.call.__self__  # type: ignore[attr-defined]
        if base is owner:
            return "module", path
        # forward(*args): self is the first of them
        if isinstance(base, tuple) and path[:1] == (("item", 0),) and base[0] is owner:
            return "module", path[1:]
        return ("closure", (("item", name), *path)) if name in self.closure_names else None

    def is_given(self, source: Any) -> bool:
        """Whether it is an input, of which the signature tells, or a state of torch's that every
        call is asked for (`special_mode`), and no object at all."""
        from torch._dynamo import source as sources

        while hasattr(source, "base"):
            above, source = source, source.base
            if isinstance(source, sources.LocalSource) and self._path(source) is None:
                return self._path(above) is None
        if isinstance(source, sources.LocalSource):
            return self._path(source) is None
        return isinstance(source, (sources.GlobalStateSource, sources.ShapeEnvSource))

    def _is_of_namedtuple(self, source: Any) -> bool:
        """Whether it is in the globals of a named tuple's `__new__`: there is but `tuple`'s."""
        while hasattr(source, "base"):
            source = source.base
        name = str(getattr(source, "global_name", ""))
        held = self.roots["globals"].get(name) if name.startswith("___unnamed_scope") else None
        return isinstance(held, dict) and _is_namedtuples(held)


def _asked(guard: Any) -> Iterator[tuple[Any, Test | None]]:
    """The sources that a guard of Dynamo's looks at, and the test of ours for it."""
    from torch._dynamo import source as sources

    kind, asked = guard.create_fn_name(), [guard.originating_source]
    if kind == "DUPLICATE_INPUT":
        asked.append(guard.create_fn.keywords["source_b"])
    for source in asked:
        if isinstance(
            source, (sources.ConstDictKeySource, sources.NonSerializableSetGetItemSource)
        ):
            yield source.base, "keys"
        elif kind not in _ELSEWHERE:
            yield source, _TESTS.get(kind)


def _unknown(guard: Any) -> Exception:
    from ovshim.capture import CaptureError

    detail = f"the graph rests on {guard.create_fn_name()} of {guard.name}, which nobody watches"
    return CaptureError(reason("capture-failed", detail), harmless=True)


def _is_own(module: nn.Module, step: Step, test: Test) -> bool:
    held = (module.__dict__, module._modules, module._parameters, module._buffers)
    return test in ("value", "same") and any(step[1] in names for names in held)


def _are_users(passed: Sequence[Any]) -> bool:
    return all(is_users(x) for x in passed if isinstance(x, types.FunctionType))


def _is_namedtuples(names: Mapping[str, Any]) -> bool:
    made = str(names.get("__name__")).startswith("namedtuple_")
    return made and set(names) <= {"__builtins__", "__name__", "_tuple_new"}


def _is_torchs_layer(held: Any) -> bool:
    return isinstance(held, nn.Module) and type(held).__module__.startswith("torch.nn.")
