"""Names that are composed while code runs: what it looks up by them cannot be read from it."""

from __future__ import annotations

import builtins
import dis
import importlib
import inspect
import operator
import os
import sys
import types
from collections.abc import Iterator

from ovshim.captured_code import variables
from ovshim.fingerprint.bytecode import LONGEST_NAME, once_for_each

__all__ = [
    "ANY",
    "ATTRIBUTES",
    "METHODS",
    "asks_for_any",
    "getattr_asks",
    "names_variables",
    "unbounded",
]

METHODS, ANY = "<any method>", "<any>"
"""Names that stand for all others, of methods and of whatever there is: known once code has been
met that may ask for any."""

ATTRIBUTES = frozenset({"__dict__", "__getattribute__"})
"""By what is read from these, any name may be asked for."""

# By identity: whatever else code holds need be neither hashable nor comparable.
_LOOKING = {id(f) for f in (getattr, vars, operator.attrgetter, operator.methodcaller,
                            inspect.getmembers, inspect.getattr_static)}  # fmt: skip
_UNBOUNDED = {id(f): name for f, name in (
    (eval, "eval"), (exec, "exec"), (globals, "globals()"), (builtins.__import__, "__import__"),
    (importlib.import_module, "importlib.import_module"), (sys.modules, "sys.modules"),
    (os.getenv, "os.getenv"))}  # fmt: skip

_JUMPS = frozenset({*dis.hasjrel, *dis.hasjabs})


def asks_for_any(value: object) -> bool:
    """Whether it looks up attributes by names that it is given."""
    return id(value) in _LOOKING


def unbounded(value: object) -> str | None:
    """The name of something that may reach all code of a process; None for anything else."""
    return _UNBOUNDED.get(id(value))


def names_variables(code: types.CodeType) -> bool:
    """Whether the variables of the environment that `code` reads are all named in place."""
    return variables(_nested(code)) is not None


@once_for_each
def getattr_asks(code: types.CodeType) -> tuple[str, ...]:
    """What `code` may ask `getattr` for that `facts` does not name: nothing where all names are
    short constants, as most are, or else METHODS, and ANY where it asks others than `self`."""
    asked: set[str] = set()
    for one in _nested(code):
        steps = [step for step in dis.get_instructions(one) if step.opname != "EXTENDED_ARG"]
        for n, step in enumerate(steps):
            if step.argval == "getattr" and step.opname.startswith("LOAD"):
                asked.update(_asked(steps[n + 1 :]))
    return tuple(sorted(asked))


def _asked(steps: list[dis.Instruction]) -> tuple[str, ...]:
    """The same of one call, from where its function is loaded.

    The name is a constant where that comes to lie second on the stack, and under nothing but a
    third until the call takes it. A jump before it lies there leaves it unknown: there is a second
    way to the call, which may be written out a second time (Python 3.12).
    """
    first = steps[0].argval  # of an instruction that loads two, both
    own, constant, depth = (first[0] if isinstance(first, tuple) else first) == "self", False, 0
    for n, step in enumerate(steps):
        before, depth = depth, depth + dis.stack_effect(step.opcode, step.arg, jump=False)
        if depth < 1 and step.opname.startswith(("PRECALL", "CALL")):
            return () if constant else (METHODS,) if own else (ANY, METHODS)
        if depth == 2 and before == 1:
            value = step.argval if step.opname == "LOAD_CONST" else None
            constant = isinstance(value, str) and len(value) <= LONGEST_NAME
        elif depth <= 2:
            constant = constant and depth == 2 and step.opcode in _JUMPS
        if step.opcode in _JUMPS and (depth == 1 or (depth == 2 and not constant)):
            break
        own = own and (n == 0 or depth > 1)
    return ANY, METHODS


def _nested(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for const in code.co_consts:
        if isinstance(const, types.CodeType):
            yield from _nested(const)
