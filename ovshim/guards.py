"""Guards: the assumptions of a captured graph, as data that can be stored, read and checked.

Two sorts. A *size guard* is a condition over the sizes of a call's tensors, an expression in
`s<tensor>[<dimension>]`; it becomes a line of the matcher (`matcher.compile_matcher`). A *value
guard* is a path from the module, from its forward's globals or from an imported module to
something that the graph read, and what was found there; `generation` watches it.

Both are written to the cache as JSON and come back as data: a size guard is parsed and may hold
nothing but arithmetic, a path is walked by `getattr`, subscription and weak references alone.
"""

from __future__ import annotations

import ast
import dataclasses
import itertools
import operator
import re
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

__all__ = [
    "BadGuardError",
    "Path",
    "Step",
    "Test",
    "ValueGuard",
    "checked_size_guard",
    "from_json",
    "measure",
    "roots_of",
    "sizes_hold",
    "to_json",
    "walk",
]

Step = tuple[Literal["attr", "own", "item", "key", "nth", "weak"], str | int]
"""One step of a path: an attribute; one that the object itself has; an item of a key that is text
or a whole number; of another constant, as its text; at a place of a dict, its key being an object;
what a weak reference refers to."""
Path = tuple[str, tuple[Step, ...]]
"""A root, and the steps from there."""
Test = Literal["value", "length", "keys", "same", "found"]


_TEXTS = {
    "attr": ".{}",
    "own": ".__dict__[{!r}]",
    "item": "[{!r}]",
    "key": "[{}]",
    "nth": ".values()[{}]",
    "weak": "()",
}


class BadGuardError(Exception):
    """A stored guard that is not one, or a path that leads nowhere."""


@dataclasses.dataclass(frozen=True)
class ValueGuard:
    """What the graph read at one place.

    Attributes:
        root: "module", "globals" (of the method's function), or "import:<module name>".
        path: the steps from there.
        test: "value" (equal, and of the same type, as its text says), "length", "keys" (of a
            mapping, in order), "same" (the very object that was there when the plan was made), or
            "found" (whether the last step leads to anything).
        expected: text for "value" and "keys", a number for "length", nothing for "same", 1 or 0 for
            "found".
    """

    root: str
    path: tuple[Step, ...]
    test: Test
    expected: str | int | None = None

    @classmethod
    def now(
        cls, root: str, path: tuple[Step, ...], test: Test, roots: Mapping[str, Any]
    ) -> ValueGuard:
        """The guard that expects what is found there now.

        Raises:
            BadGuardError: nothing is, and it is not asked for whether anything is.
        """
        if test == "found":
            there = cls(root, path, test, 1)
            return there if there.holds(roots) else cls(root, path, test, 0)
        return cls(root, path, test, measure(walk(root, path, roots), test))

    def __str__(self) -> str:
        steps = "".join(_TEXTS[how].format(key) for how, key in self.path)
        expected = f"{self.test} {self.expected}"
        if self.test in ("same", "found"):
            expected = (
                "unchanged" if self.expected is None else "there" if self.expected else "none"
            )
        return f"{self.root}{steps}: {expected}"

    def holds(self, roots: Mapping[str, Any]) -> bool:
        """Whether the test passes now; `roots` gives the objects for "module" and "globals"."""
        try:
            found = walk(self.root, self.path, roots)
        except BadGuardError:
            return self.test == "found" and not self.expected
        if self.test == "found":
            return bool(self.expected)
        return self.test == "same" or measure(found, self.test) == self.expected


def measure(found: Any, test: str) -> str | int | None:
    """What a guard of this test expects to find for this object."""
    if test == "length":
        return len(found)
    if test == "keys":
        return repr(sorted(map(repr, found)) if isinstance(found, set) else list(found))
    return f"{type(found).__qualname__}:{found!r}" if test == "value" else None


def roots_of(module: Any, call: Any) -> dict[str, Any]:
    """The objects that the roots "module", "globals" and "closure" of a path stand for.

    Args:
        call: the bound method that was captured. A scripted one has neither globals nor closure.
    """
    function = getattr(call, "__func__", call)
    code = getattr(function, "__code__", None)
    cells = dict(zip(code.co_freevars, function.__closure__ or (), strict=True)) if code else {}
    return {
        "module": module,
        "globals": getattr(function, "__globals__", {}),
        "closure": _Cells(cells),
    }


class _Cells(Mapping[str, Any]):
    """What the cells of a closure hold at this moment: an enclosing function may rebind them."""

    def __init__(self, cells: Mapping[str, Any]) -> None:
        self._cells = cells

    def __getitem__(self, name: str) -> Any:
        try:
            return self._cells[name].cell_contents
        except ValueError as error:  # an empty cell
            raise KeyError(name) from error

    def __iter__(self) -> Iterator[str]:
        return iter(self._cells)

    def __len__(self) -> int:
        return len(self._cells)


def walk(root: str, path: Sequence[Step], roots: Mapping[str, Any]) -> Any:
    """The object at the end of a path.

    Raises:
        BadGuardError: there is none.
    """
    try:
        found = _root(root, roots)
        for how, key in path:
            found = _TAKERS[how](found, key)
    except (
        LookupError,
        AttributeError,
        TypeError,
        ValueError,
        SyntaxError,
        StopIteration,
    ) as error:
        raise BadGuardError(f"nothing at {root} {path}: {error}") from error
    return found


def _referent(reference: Any, _: Any) -> Any:
    found = reference() if isinstance(reference, weakref.ReferenceType) else None
    if found is None:
        raise KeyError("no weak reference to a living object")
    return found


_TAKERS: Mapping[str, Callable[[Any, Any], Any]] = {
    "attr": getattr,
    "own": lambda held, name: held.__dict__[name],
    "item": operator.getitem,
    "key": lambda held, text: held[ast.literal_eval(text)],
    # As Dynamo counts: without a derived class's own order.
    "nth": lambda held, place: next(itertools.islice(dict.values(held), place, None)),
    "weak": _referent,
}


def _root(root: str, roots: Mapping[str, Any]) -> Any:
    # sys.modules, not importlib: a path read from a file must not import anything.
    return sys.modules[root[7:]] if root.startswith("import:") else roots[root]


_SIZE = re.compile(r"s(\d+)")
_FUNCTIONS = {"min": min, "max": max}
_ALLOWED = (
    ast.Expression,
    ast.BoolOp,
    ast.And,
    ast.Or,
    ast.UnaryOp,
    ast.Not,
    ast.USub,
    ast.BinOp,
    ast.Add,
    ast.Sub,
    ast.Mult,
    ast.FloorDiv,
    ast.Mod,
    ast.Compare,
    ast.Eq,
    ast.NotEq,
    ast.Lt,
    ast.LtE,
    ast.Gt,
    ast.GtE,
    ast.Load,
)


def checked_size_guard(text: str, ranks: Sequence[int]) -> str:
    """The guard itself, when it is arithmetic and comparison over existing sizes.

    Raises:
        BadGuardError: it is anything else.
    """
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise BadGuardError(f"{text[:80]!r} is no expression") from error
    checked: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Subscript):
            checked |= {node, node.value, node.slice}
            _check_size(node, ranks)
        elif isinstance(node, ast.Call) and _is_min_or_max(node):
            checked |= {node, node.func}
    for node in ast.walk(tree):
        if node in checked or isinstance(node, _ALLOWED):
            continue
        if not (isinstance(node, ast.Constant) and type(node.value) in (int, bool)):
            raise BadGuardError(f"{text[:80]!r} holds {type(node).__name__}")
    return text


def _is_min_or_max(node: ast.Call) -> bool:
    return isinstance(node.func, ast.Name) and node.func.id in _FUNCTIONS and not node.keywords


def _check_size(node: ast.Subscript, ranks: Sequence[int]) -> None:
    name, place = node.value, node.slice
    if isinstance(name, ast.Name) and isinstance(place, ast.Constant):
        match = _SIZE.fullmatch(name.id)
        dim = place.value
        known = match is not None and int(match[1]) < len(ranks)
        if match and known and isinstance(dim, int) and 0 <= dim < ranks[int(match[1])]:
            return
    raise BadGuardError(f"{ast.unparse(node)} is no size of this signature")


def sizes_hold(size_guards: Sequence[str], sizes: Sequence[Sequence[int]]) -> bool:
    """Whether every size guard holds. `checked_size_guard` has seen that they are arithmetic; one
    that divides by a size does not hold where that is 0."""
    scope = {f"s{t}": dims for t, dims in enumerate(sizes)}
    try:
        return all(eval(guard, {"__builtins__": _FUNCTIONS}, scope) for guard in size_guards)
    except ZeroDivisionError:
        return False


def to_json(guards: Sequence[ValueGuard]) -> list[dict[str, Any]]:
    """Guards as manifests keep them."""
    return [
        {"root": g.root, "path": [list(s) for s in g.path], "test": g.test, "expected": g.expected}
        for g in guards
    ]


def from_json(stored: Any) -> tuple[ValueGuard, ...]:
    """Guards out of a manifest.

    Raises:
        BadGuardError: what is stored is not a list of guards.
    """
    try:
        return tuple(_one_from_json(item) for item in stored)
    except (TypeError, KeyError, ValueError) as error:
        raise BadGuardError(f"stored guards are malformed: {error}") from error


def _one_from_json(item: Mapping[str, Any]) -> ValueGuard:
    path = tuple((how, key) for how, key in item["path"])
    fine = (
        isinstance(item["root"], str)
        and item["test"] in get_args(Test)
        and all(how in _TAKERS and isinstance(key, (str, int)) for how, key in path)
        and isinstance(item["expected"], (str, int, type(None)))
    )
    if not fine:
        raise ValueError(repr(item)[:80])
    return ValueGuard(item["root"], path, item["test"], item["expected"])
