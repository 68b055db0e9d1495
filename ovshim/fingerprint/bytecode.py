"""What a code object says: a digest of it, and the names by which it reaches other things.

Nothing here depends on where a file lies, on line numbers, or on the process. Code objects never
change, so each is read once for as long as it lives.
"""

from __future__ import annotations

import dis
import functools
import importlib.util
import itertools
import os
import struct
import sysconfig
import types
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from opcode import opmap
from typing import TypeVar

import numpy as np
import torch
import xxhash

T = TypeVar("T")

LONGEST_NAME = 64  # of a string that something may be looked up by; others are prose

_EXTENDED = opmap["EXTENDED_ARG"]
_GLOBAL = opmap["LOAD_GLOBAL"]
_BY_NAME = frozenset(opmap[name] for name in ("LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS")
                     if name in opmap)  # fmt: skip
_IMPORT = opmap["IMPORT_NAME"]
_NAMING = _BY_NAME | {_GLOBAL, _IMPORT}
# Where the order of a container may come to matter.
_ITERATE = frozenset({"GET_ITER", "DICT_MERGE", "DICT_UPDATE", "LIST_EXTEND", "CALL_FUNCTION_EX"})
_ITERATORS = frozenset({"items", "values", "keys", "popitem", "list", "tuple", "iter", "next",
                        "enumerate", "zip", "map", "sum", "sorted", "reduce"})  # fmt: skip
_ITERATE_CODES = frozenset(opmap[name] for name in _ITERATE if name in opmap)
_STATEMENT_ENDS = ("STORE_", "POP_", "JUMP", "RETURN", "RESUME", "FOR_ITER", "YIELD", "DELETE")


@dataclass(frozen=True, slots=True)
class Facts:
    """One code object, those nested in it included. The tuples are sorted.

    `names` are all names and short strings in it: what an attribute look-up, a `getattr` or a
    dict may be asked for.
    """

    digest: bytes
    globals: tuple[str, ...]
    imports: tuple[str, ...]
    names: tuple[str, ...]
    strings: tuple[str, ...]


def once_for_each(read: Callable[[types.CodeType], T]) -> Callable[[types.CodeType], T]:
    """`read`, which remembers its results for as long as the code objects live.

    By identity: equality of code objects compares line numbers and walks all constants.
    """
    known: dict[int, tuple[weakref.ref[types.CodeType], T]] = {}

    @functools.wraps(read)
    def reading(code: types.CodeType) -> T:
        key = id(code)
        entry = known.get(key)
        if entry is not None and entry[0]() is code:
            return entry[1]
        found = read(code)
        known[key] = (weakref.ref(code, lambda _: known.pop(key, None)), found)
        return found

    return reading


@once_for_each
def facts(code: types.CodeType) -> Facts:
    """What `code` says. `ValueError` for a constant that no compiler makes."""
    said = digest(code)
    nested = [facts(const) for const in code.co_consts if isinstance(const, types.CodeType)]
    strings = {text for const in code.co_consts for text in _strings(const)}
    names = set(code.co_names) | {text for text in strings if len(text) <= LONGEST_NAME}
    globals_, imports = _scan(code)
    return Facts(
        digest=said,
        globals=_union(globals_, *(n.globals for n in nested)),
        imports=_union(imports, *(n.imports for n in nested)),
        names=_union(names, *(n.names for n in nested)),
        strings=_union(strings, *(n.strings for n in nested)),
    )


def _union(*parts: object) -> tuple[str, ...]:
    return tuple(sorted(set().union(*parts)))  # type: ignore[arg-type]


def _scan(code: types.CodeType) -> tuple[set[str], set[str]]:
    """Global names loaded, and names imported.

    By hand: `dis` makes an object of each instruction, 0.5 s for a transformers model.
    """
    globals_, imports = set(), set()
    raw, names, extended = code.co_code, code.co_names, 0
    pairs: Iterable[tuple[int, int]] = zip(raw[::2], raw[1::2], strict=True)
    if _EXTENDED not in raw[::2]:
        pairs = set(pairs)  # then their order is of no matter, and half of them are alike
    for operation, argument in pairs:
        if operation in _NAMING:
            argument |= extended
            if operation == _GLOBAL:
                globals_.add(names[argument >> 1])  # the lowest bit is a flag
            elif operation in _BY_NAME:
                globals_.add(names[argument])
            elif operation == _IMPORT:
                imports.add(names[argument])
        extended = (argument | extended) << 8 if operation == _EXTENDED else 0
    return globals_, imports


@once_for_each
def iterated(code: types.CodeType) -> frozenset[str]:
    """Those of the names in `code`, and in code nested in it, whose value may be iterated over."""
    nested = [iterated(const) for const in code.co_consts if isinstance(const, types.CodeType)]
    strings = {text for const in code.co_consts for text in _strings(const)}
    names = set(code.co_names) | {text for text in strings if len(text) <= LONGEST_NAME}
    return frozenset(_iterated(code, names)).union(*nested)


def _iterated(code: types.CodeType, names: set[str]) -> set[str]:
    """Names in statements that iterate over something; all names where that is a local variable.

    A loop over a range counts indices and says nothing about order.
    """
    if not _ITERATE_CODES & set(code.co_code[::2]) and _ITERATORS.isdisjoint(names):
        return set()
    found: set[str] = set()
    statement: list[dis.Instruction] = []
    for instruction in dis.get_instructions(code):
        statement.append(instruction)
        if instruction.opname.startswith(_STATEMENT_ENDS):
            found |= _iterated_in(statement, names)
            statement = []
    return found | _iterated_in(statement, names)


def _iterated_in(statement: list[dis.Instruction], names: set[str]) -> set[str]:
    mentioned = [i.argval for i in statement if isinstance(i.argval, str) and i.argval in names]
    if mentioned[:1] == ["range"]:
        return set()
    iterates = any(i.opname in _ITERATE or i.argval in _ITERATORS for i in statement
                   if i.argval is None or isinstance(i.argval, str | int))  # fmt: skip
    if not iterates:
        return set()
    for instruction, after in itertools.pairwise(statement):
        local = instruction.opname.startswith(("LOAD_FAST", "LOAD_DEREF", "LOAD_CLOSURE"))
        if local and not after.opname.startswith(("LOAD_ATTR", "LOAD_METHOD", "LOAD_FAST")):
            return names
    return set(mentioned)


def _strings(const: object) -> list[str]:
    if isinstance(const, str):
        return [const]
    if isinstance(const, tuple | frozenset):
        return [text for item in const for text in _strings(item)]
    return []


@once_for_each
def digest(code: types.CodeType) -> bytes:
    """16 bytes for all that `code` says. `ValueError` for a constant that no compiler makes."""
    parts = [
        code.co_qualname.encode(),
        struct.pack("<4q", code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount,
                    code.co_flags),
        code.co_code,
        code.co_exceptiontable,
        repr((code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars)).encode(),
    ]  # fmt: skip
    parts += [digest(const) if isinstance(const, types.CodeType) else _const(const)
              for const in code.co_consts]  # fmt: skip
    return xxhash.xxh3_128_digest(b"".join([b"%d:%b" % (len(part), part) for part in parts]))


def _const(const: object) -> bytes:
    """Exact and typed: 1, 1.0 and True differ, and so do 0.0 and -0.0."""
    if isinstance(const, tuple | frozenset):
        items = [_const(item) for item in const]
        if isinstance(const, frozenset):
            items.sort()
        return type(const).__name__.encode() + b"(" + b",".join(items) + b")"
    if isinstance(const, slice):
        return b"slice" + _const((const.start, const.stop, const.step))
    if isinstance(const, float):
        return b"f" + struct.pack("<d", const)
    if isinstance(const, complex):
        return b"c" + struct.pack("<2d", const.real, const.imag)
    if const is None or const is ... or isinstance(const, int | str | bytes):
        return f"{type(const).__name__}{const!r}".encode("utf-8", "surrogatepass")
    raise ValueError(f"a constant of type {type(const).__qualname__}")


def _homes() -> tuple[str, ...]:
    """Directories whose code a version number stands for.

    torch and the standard library are far too large to follow. numpy's Python code reaches
    nothing of a module; this package's own version is in every key.
    """
    own = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    roots = [os.path.dirname(module.__file__ or "") for module in (torch, np)]
    return tuple(os.path.join(root, "") for root in (*roots, own))


_HOMES = _homes()
_LIBRARIES = tuple(
    {os.path.join(sysconfig.get_path(name), "") for name in ("stdlib", "platstdlib")}
)


@functools.lru_cache(maxsize=4096)
def pinned_file(filename: str) -> bool:
    """Whether a version number stands for the code in a file."""
    if filename.startswith(("<frozen ", *_HOMES)):
        return True
    return filename.startswith(_LIBRARIES) and not is_library_file(filename)


@functools.lru_cache(maxsize=4096)
def is_library_file(filename: str) -> bool:
    """Whether a file belongs to an installed package."""
    return "site-packages" in filename or "dist-packages" in filename


def pinned_module(module: types.ModuleType) -> bool:
    """Whether a version number stands for a module."""
    if type(module).__module__.partition(".")[0] == "torch":  # torch.ops, filled when asked
        return True
    filename = getattr(module, "__file__", None)
    if filename is None:  # built into the interpreter; a namespace package; __main__ of python -c
        spec = getattr(module, "__spec__", None)
        return spec is not None and spec.origin in ("built-in", "frozen")
    return pinned_file(filename)


def users_module(module: types.ModuleType) -> bool:
    """Whether no version number stands for a module, nor for the package that it belongs to."""
    return not pinned_module(module) and not is_library_file(getattr(module, "__file__", "") or "")


def candidates(name: str, package: str | None) -> list[str]:
    """The full names that an import of `name` in a module of `package` may mean."""
    levels = package.count(".") + 2 if package else 1
    return [
        *([name] if name else []),
        *(importlib.util.resolve_name("." * n + name, package) for n in range(1, levels)),
    ]
