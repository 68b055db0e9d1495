"""Dynamo's sources as paths of ours."""

from __future__ import annotations

import ast
from typing import Any

from ovshim.guards import Step, walk

__all__ = ["key_step", "steps_of", "storable"]


def steps_of(source: Any) -> tuple[str, str, tuple[Step, ...]] | None:
    """("local" | "global" | "import", name, steps) of a chain of sources; None for sorts without a
    path."""
    from torch._dynamo import source as sources

    path: list[Step] = []
    same = (sources.NNModuleSource, sources.SkipGuardSource)  # what they are around
    ends = (sources.LocalSource, sources.GlobalSource, sources.ImportSource)
    while not isinstance(source, ends):
        steps = () if isinstance(source, same) else _steps(source, sources)
        if steps is None:
            return None
        path += reversed(steps)
        source = source.base
    if isinstance(source, sources.LocalSource):
        return "local", source.local_name, tuple(reversed(path))
    if isinstance(source, sources.ImportSource):
        return "import", source.module_name, tuple(reversed(path))
    return "global", source.global_name, tuple(reversed(path))


def _steps(source: Any, sources: Any) -> tuple[Step, ...] | None:
    if isinstance(source, (sources.AttrSource, sources.GenericAttrSource)):
        return (("attr", source.member),)
    for kind, name in (
        (sources.TypeSource, "__class__"),
        (sources.TypeDictSource, "__dict__"),
        (sources.TypeMROSource, "__mro__"),
        (sources.ClosureSource, "__closure__"),
        (sources.CodeSource, "__code__"),
        (sources.GradSource, "grad"),
    ):
        if isinstance(source, kind):
            return (("attr", name),)
    if isinstance(source, sources.DefaultsSource):
        return ("attr", source.field), ("item", source.idx_key)
    if isinstance(source, sources.WeakRefCallSource):
        plain = type(source) is sources.WeakRefCallSource
        return (("weak", 0),) if plain else None
    items = (sources.DictGetItemSource, sources.GetItemSource, sources.DictSubclassGetItemSource)
    if isinstance(source, items) and not getattr(source, "index_is_slice", False):
        if isinstance(source.index, sources.ConstDictKeySource):
            return (("nth", source.index.index),)
        return (("item", source.index),)
    return None


def key_step(held: Any, key: Any) -> Step | None:
    """The step to the item of this key; None where its key can be written down in no way."""
    if type(key) in (str, int):
        return "item", key
    text = repr(key)
    try:
        if type(ast.literal_eval(text)) is type(key):
            return "key", text
    except (ValueError, SyntaxError):
        pass
    if isinstance(held, dict) and key in held:
        return "nth", list(dict.keys(held)).index(key)
    return None


def storable(base: Any, path: tuple[Step, ...]) -> tuple[Step, ...] | None:
    """The path with such steps only as JSON can hold; None where there are none.

    Raises:
        BadGuardError: it leads nowhere.
    """
    steps: list[Step] = []
    for how, key in path:
        step = (how, key) if how != "item" else key_step(base, key)
        if step is None:
            return None
        base = walk("base", (step,), {"base": base})
        steps.append(step)
    return tuple(steps)
