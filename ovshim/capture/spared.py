"""What Dynamo does for uses that nobody has: left out while a module is captured.

In six places of torch 2.13 it imports some 360 modules (torch.export, Inductor, networkx,
distributed tensors) and reads whole files of source: a fifth of its time, and 20 MB that stay. The
answers there are the same as ever. What is left out is done where it is asked for, also by a
program that compiles in another thread meanwhile.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import logging
import sys
import threading
from collections.abc import Iterator
from typing import Any

import torch

__all__ = ["leave_exits_alone", "put", "spared"]

log = logging.getLogger("ovshim")

_EXPORT = "torch.export._trace"
_LOCAL_MAP = "torch.distributed.tensor.experimental._func_map"


@contextlib.contextmanager
def spared() -> Iterator[None]:
    """Dynamo without that work. Where a place is not as it was, the work is done as ever. The
    caller holds `capture.TRACE_LOCK`."""
    with contextlib.ExitStack() as stack:
        for replaced in _REPLACED:
            try:
                stack.enter_context(replaced())
            except (ImportError, AttributeError, KeyError) as error:
                log.debug("Dynamo has moved (%s): nothing is spared there", error)
        yield


@contextlib.contextmanager
def put(owner: Any, name: str, value: Any) -> Iterator[None]:
    """An attribute of torch's, replaced inside; not put back where somebody else has replaced it
    since."""
    before = vars(owner)[name]
    setattr(owner, name, value)
    try:
        yield
    finally:
        if vars(owner).get(name) is value:
            setattr(owner, name, before)


def leave_exits_alone() -> None:
    """Have Dynamo, which the program itself has not imported, sum up its times at exit only where
    that is logged: the tables are written by a package whose import then makes Python forget that
    an interrupt ended the program, and its status 1 where a shell expects 130."""
    from torch._dynamo import utils

    def told() -> None:
        if utils.log.isEnabledFor(logging.INFO):
            utils.dump_compile_times()

    with contextlib.suppress(AttributeError):
        atexit.unregister(utils.dump_compile_times)
        atexit.register(told)


def _transforms() -> contextlib.AbstractContextManager[None]:
    """Whether a capture inside of `vmap` or `grad` is by the backend "eager": to look that one up
    imports all backends. Outside of transforms the answer decides nothing."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    theirs: Any = InstructionTranslator._throw_if_in_functorch

    def ours(self: Any) -> None:
        if torch._C._functorch.peek_interpreter_stack() is not None:
            theirs(self)

    return put(InstructionTranslator, "_throw_if_in_functorch", ours)


def _local_maps() -> contextlib.AbstractContextManager[None]:
    """Whether a function is one certain function of distributed tensors: not before somebody has
    imported those."""
    from torch._dynamo.variables.higher_order_ops import LocalMapWrappedHigherOrderVariable

    theirs = LocalMapWrappedHigherOrderVariable.should_wrap_in_hop

    def ours(cls: Any, value: Any) -> bool:
        return _LOCAL_MAP in sys.modules and theirs(value)

    return put(LocalMapWrappedHigherOrderVariable, "should_wrap_in_hop", classmethod(ours))


def _pickler() -> contextlib.AbstractContextManager[None]:
    """What nodes are compared by where a setting asks for like regions of a graph: made for each
    graph, and with it Inductor's cache is imported."""
    from torch._dynamo import graph_region_tracker

    theirs: Any = graph_region_tracker.InputPickler

    class WhenAsked:
        @functools.cached_property
        def dumps(self) -> Any:
            return theirs().dumps

    return put(graph_region_tracker, "InputPickler", WhenAsked)


def _names_of_functions() -> contextlib.AbstractContextManager[None]:
    """The function that a line belongs to, for the line of a log that nobody reads."""
    from torch._dynamo import funcname_cache, output_graph, symbolic_convert

    theirs = funcname_cache.get_funcname
    calls, inlined = output_graph.trace_call_log, symbolic_convert.trace_call_log
    logs = calls, inlined, symbolic_convert.trace_source_log

    def ours(filename: str, lineno: int) -> str | None:
        read = any(log.isEnabledFor(logging.DEBUG) for log in logs)
        return theirs(filename, lineno) if read else None

    return put(symbolic_convert, "get_funcname", ours)


@contextlib.contextmanager
def _places_in_messages() -> Iterator[None]:
    """Which of torch's own files are left out where a message names a line of the program: to know
    them all imports torch.export and Inductor. In this thread only those are that Dynamo runs in
    the place of the standard library."""
    from torch._dynamo import guards, output_graph
    from torch.fx.experimental import symbolic_shapes

    theirs, thread = symbolic_shapes.uninteresting_files, threading.get_ident()

    def ours() -> set[str]:
        here = threading.get_ident() == thread
        return guards.uninteresting_files() if here else theirs()

    name = "uninteresting_files"
    with put(symbolic_shapes, name, ours), put(output_graph, name, ours):
        yield


def _effects_of_exports() -> contextlib.AbstractContextManager[None]:
    """Which side effects are torch.export's own: none before it was imported."""
    from torch._dynamo.output_graph import OutputGraph
    from torch._dynamo.source import _get_source_debug_name
    from torch._dynamo.variables.base import AttributeMutationExisting, ValueMutationExisting

    theirs: Any = OutputGraph.get_replayed_side_effect_source_refs
    seen = AttributeMutationExisting, ValueMutationExisting

    def ours(self: Any, **kwargs: Any) -> list[str]:
        if _EXPORT in sys.modules or self._cached_replayed_side_effect_source_refs is not None:
            found: list[str] = theirs(self, **kwargs)
            return found
        changed = self.side_effects._get_modified_vars()
        effects = [var for var in changed if isinstance(getattr(var, "mutation_type", None), seen)]
        return [_get_source_debug_name(var.source) for var in effects]

    return put(OutputGraph, "get_replayed_side_effect_source_refs", ours)


_REPLACED = (
    _transforms,
    _local_maps,
    _pickler,
    _names_of_functions,
    _places_in_messages,
    _effects_of_exports,
)
