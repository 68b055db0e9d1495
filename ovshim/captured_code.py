"""The code that was captured: which functions, what their defaults hold, which variables of the
environment they read."""

from __future__ import annotations

import copy
import dis
import types
from collections.abc import Collection, Iterable, Iterator
from typing import Any

__all__ = ["copied_defaults", "is_torchs", "mentions", "methods", "own", "variables"]


def methods(
    classes: Iterable[type], code: Collection[str] | None
) -> Iterator[tuple[type, list[str], list[types.FunctionType]]]:
    """For each class: the names of its captured methods, and those functions. A method may be
    patched on a class or on one below it, and its code or its defaults replaced where they are."""
    for cls in dict.fromkeys(classes):
        found = {"forward": getattr(cls, "forward", None)}
        for base in reversed(cls.__mro__):
            if not is_torchs(base) and base is not object:
                found.update(_captured_functions(base, code))
        functions = [f for f in found.values() if isinstance(f, types.FunctionType)]
        yield cls, [name for name in found if hasattr(cls, name)], functions


def _captured_functions(base: type, code: Collection[str] | None) -> dict[str, Any]:
    return {
        name: value
        for name, value in base.__dict__.items()
        if isinstance(value, types.FunctionType)
        and (code is None or value.__code__.co_qualname in code)
    }


def copied_defaults(found: tuple[Any, Any]) -> tuple[Any, Any]:
    """Defaults and keyword defaults: with what mutable ones hold now."""
    defaults, keywords = found
    held = (list, dict, set)
    if defaults is not None:
        defaults = tuple(copy.copy(x) if isinstance(x, held) else x for x in defaults)
    if keywords is not None:
        keywords = {k: copy.copy(x) if isinstance(x, held) else x for k, x in keywords.items()}
    return defaults, keywords


def variables(codes: Iterable[types.CodeType]) -> list[str] | None:
    """The variables of the environment that these read; None where not all are named in place."""
    found: dict[str, None] = {}
    for code in codes:
        if "environ" not in code.co_names and "getenv" not in code.co_names:
            continue
        steps, targets = _steps(code)
        for n, step in enumerate(steps):
            if step.argval in ("environ", "getenv"):
                name = _named(steps, targets, n)
                if name is None or name.opname != "LOAD_CONST" or not isinstance(name.argval, str):
                    return None
                found[name.argval] = None
    return list(found)


def _steps(code: types.CodeType) -> tuple[list[dis.Instruction], set[int]]:
    """The instructions, and the offsets of those that are jumped to. One with a large argument
    begins with an instruction of its own, which is what is jumped to then."""
    steps: list[dis.Instruction] = []
    targets, jumped_to = set(), False
    for step in dis.get_instructions(code):
        jumped_to = jumped_to or step.is_jump_target
        if step.opname != "EXTENDED_ARG":
            steps.append(step)
            if jumped_to:
                targets.add(step.offset)
            jumped_to = False
    return steps, targets


def _named(
    steps: list[dis.Instruction], targets: Collection[int], n: int
) -> dis.Instruction | None:
    """What loads the name of the variable that is asked for where step `n` loads `os.environ` or
    `os.getenv`; None where it is a part of what does."""
    if steps[n + 1].opname == "CONTAINS_OP":
        first = n if steps[n].opname == "LOAD_GLOBAL" else n - 1
        return None if steps[first].offset in targets else steps[first - 1]
    n += 1
    while steps[n].argval == "get" or steps[n].opname == "PUSH_NULL":
        n += 1
    depth = 1
    for step in steps[n + 1 :]:
        depth += dis.stack_effect(step.opcode, step.arg, jump=False)
        if depth <= 1:  # what comes above it is another argument, or is joined with it
            return steps[n] if depth < 1 else None
    return None


def mentions(code: types.CodeType, words: frozenset[str]) -> bool:
    """Whether this code, or code within it, has one of these words for an attribute, a global or a
    text."""
    if not words.isdisjoint(code.co_names):
        return True
    return any(
        mentions(const, words) if isinstance(const, types.CodeType) else const in words
        for const in code.co_consts
        if isinstance(const, (types.CodeType, str))
    )


def own(functions: Iterable[types.FunctionType]) -> Iterator[types.FunctionType]:
    """Those that are not torch's."""
    return (f for f in functions if not (f.__module__ or "").startswith("torch."))


def is_torchs(cls: type) -> bool:
    """Whether it is one of torch's own modules."""
    return cls.__module__.startswith("torch.nn.")
