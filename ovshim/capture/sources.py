"""Where a captured graph got things from: Dynamo's sources as paths of ours."""

from __future__ import annotations

import contextlib
import inspect
import logging
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from ovshim.guards import BadGuardError, Step, ValueGuard, measure, roots_of, walk
from ovshim.reasons import reason

if TYPE_CHECKING:
    from ovshim.capture import Request

__all__ = ["Sources"]

log = logging.getLogger("ovshim")

_VALUES = frozenset({"EQUALS_MATCH", "CONSTANT_MATCH"})
_IDENTITIES = frozenset(
    {"ID_MATCH", "FUNCTION_MATCH", "CLOSURE_MATCH", "BUILTIN_MATCH", "CLASS_MATCH", "MODULE_MATCH"}
)
# A key was looked for, and found or not: then none may come or go.
_KEYS = frozenset(
    {"DICT_KEYS_MATCH", "DICT_CONTAINS", "DICT_NOT_CONTAINS", "SET_CONTAINS", "SET_NOT_CONTAINS"}
)
_CODE = ("__code__", "__defaults__", "__kwdefaults__")
# Globals that Dynamo itself puts there: Python's builtins, and objects named after their ids.
_MADE_UP = re.compile(r"__builtins_dict__.*|_.*\d{6,}_c\d+")
_PLAIN = (type(None), bool, int, float, complex, str, bytes, tuple, torch.dtype, torch.device)


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
        """Dynamo's guards on values, lengths, keys and identities that nothing else watches."""
        found: dict[ValueGuard, None] = {}
        for guard in guards:
            test = _test_of(guard.create_fn_name())
            path = self._path(guard.originating_source) if test else None
            if test is None or path is None or not self._worth_watching(path, test):
                continue
            try:
                value = walk(path[0], path[1], self.roots)
            except BadGuardError as error:
                log.debug("guard %s is left to the generation: %s", guard.name, error)
                continue
            if test == "value" and not isinstance(value, _PLAIN):
                test = "same"
            if test == "keys" and not isinstance(value, (dict, set, frozenset)):
                continue
            found[ValueGuard(path[0], path[1], test, measure(value, test))] = None
        return tuple(found)

    def _worth_watching(self, path: tuple[str, tuple[Step, ...]], test: str) -> bool:
        """Not attributes of modules of the tree: `generation` has them. Nor what is Dynamo's."""
        root, steps = path
        if not steps:
            return False
        names = [str(key) for how, key in steps if how == "attr"]
        if any(name in _CODE for name in names):
            return False  # the generation compares the code of functions itself
        if any(name.startswith("__") for name in names) and test != "value":
            return False  # methods in classes: the generation has those as well
        try:
            passed = [walk(root, steps[:i], self.roots) for i in range(len(steps))]
        except BadGuardError:
            return False
        if _is_torchs_layer(passed[-1]) or root.startswith("import:torch._dynamo"):
            return False
        if isinstance(passed[-1], nn.Module) and test in ("value", "same"):
            return str(steps[-1][1]) not in passed[-1].__dict__
        return not any(key in ("_modules", "_parameters", "_buffers") for _, key in steps[-2:])

    # --- paths --------------------------------------------------------------------------------

    def _object(self, source: Any) -> Any:
        """What a source stands for in this call; None where that cannot be told."""
        try:
            steps = _steps(source)
            if steps is None:
                return None
            scope, name, path = steps
            if scope == "local":
                base = self.locals[name]
            elif name in self.imports:
                return walk(f"import:{self.imports[name]}", path, self.roots)
            else:
                base = self.roots["globals"][name]
            return walk("base", path, {"base": base})
        except (BadGuardError, KeyError):
            return None

    def _path(self, source: Any) -> tuple[str, tuple[Step, ...]] | None:
        """The path of ours for a source; None for an input and for sorts that have none."""
        steps = _steps(source)
        if steps is None:
            return None
        scope, name, path = steps
        if scope == "global":
            if _MADE_UP.fullmatch(name):
                return None
            if name in self.imports:
                return f"import:{self.imports[name]}", path
            return "globals", (("item", name), *path)
        base, owner = self.locals.get(name), self.request.call.__self__  # type: ignore[attr-defined]
        if base is owner:
            return "module", path
        # forward(*args): self is the first of them
        if isinstance(base, tuple) and path[:1] == (("item", 0),) and base[0] is owner:
            return "module", path[1:]
        return ("closure", (("item", name), *path)) if name in self.closure_names else None


def _is_torchs_layer(held: Any) -> bool:
    return isinstance(held, nn.Module) and type(held).__module__.startswith("torch.nn.")


def _test_of(kind: str) -> Literal["value", "length", "keys", "same"] | None:
    if kind in _VALUES:
        return "value"
    if kind == "SEQUENCE_LENGTH":
        return "length"
    if kind in _KEYS:
        return "keys"
    return "same" if kind in _IDENTITIES else None


def _steps(source: Any) -> tuple[str, str, tuple[Step, ...]] | None:
    """("local" | "global", name, steps) of a chain of sources; None for sorts without a path."""
    from torch._dynamo import source as sources

    path: list[Step] = []
    while not isinstance(source, (sources.LocalSource, sources.GlobalSource)):
        if isinstance(source, sources.NNModuleSource):
            source = source.base
            continue
        step = _step(source, sources)
        if step is None:
            return None
        path.append(step)
        source = source.base
    if isinstance(source, sources.LocalSource):
        return "local", source.local_name, tuple(reversed(path))
    return "global", source.global_name, tuple(reversed(path))


def _step(source: Any, sources: Any) -> Step | None:
    if isinstance(source, (sources.AttrSource, sources.GenericAttrSource)):
        return ("attr", source.member)
    for kind, name in (
        (sources.TypeSource, "__class__"),
        (sources.TypeDictSource, "__dict__"),
        (sources.TypeMROSource, "__mro__"),
        (sources.ClosureSource, "__closure__"),
    ):
        if isinstance(source, kind):
            return ("attr", name)
    items = (sources.DictGetItemSource, sources.GetItemSource, sources.DictSubclassGetItemSource)
    if isinstance(source, items):
        key = source.index
        return ("item", key) if type(key) in (str, int) else None
    return None
