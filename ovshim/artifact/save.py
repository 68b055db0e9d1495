"""`fast.ovshim.save(directory)`."""

from __future__ import annotations

import logging
import os
import shutil
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ovshim import runtime
from ovshim.artifact.names import names_of
from ovshim.artifact.structure import (
    Unportable,
    const_to_json,
    kind_to_json,
    structure_to_json,
)
from ovshim.artifact.tensors import Writer
from ovshim.building import Building, own_modes
from ovshim.cache import files
from ovshim.cache.entry import listed
from ovshim.eager import Answer, Eager
from ovshim.errors import ArtifactError, FallbackWarning
from ovshim.inputs import small_leaves
from ovshim.plan import OutOfRangeError, Plan
from ovshim.proof import amount, redrawn
from ovshim.signature import describe
from ovshim.verify import Mismatch
from ovshim.version import __version__

__all__ = ["MANIFEST", "SCHEMA", "portable", "save", "written_whole"]

log = logging.getLogger("ovshim")

SCHEMA, MANIFEST = 1, "artifact.json"
# Recorded calls take no more than so much, but for the smallest one.
_RECORDED_BYTES = 64 << 20


def save(module: nn.Module, call: Callable[..., Any], plans: Sequence[Plan], where: Path) -> None:
    """Write the graphs of these plans, and eager's answers to some calls, into a new directory.

    Args:
        call: the module's own method, bound.

    Raises ArtifactError: there is nothing to save, something in it needs code to be told, or the
    directory cannot be written.
    """
    name = type(module).__qualname__
    chosen = portable(where, name, plans)

    def write(directory: Path) -> None:
        graphs = [
            _written(directory, f"graph{n}", module, call, plan) for n, plan in enumerate(chosen)
        ]
        head = {
            "schema": SCHEMA,
            "module": name,
            "created": time.time(),
            "environment": {
                "openvino": runtime.version(),
                "ovshim": __version__,
                "processor": runtime.processor(),
                "torch": torch.__version__,
            },
            "graphs": graphs,
        }
        sealed = files.seal({**head, "files": listed(directory)})
        files.write_new(directory / MANIFEST, sealed)

    try:
        written_whole(where, write)
    except (Unportable, Mismatch) as error:
        remedy = "Accelerate a module without it around, or a part of this one."
        raise ArtifactError(str(where), f"{name} cannot be saved: {error}.", remedy) from error


def portable(where: Path, name: str, plans: Sequence[Plan]) -> list[Plan]:
    """Those of the plans that OpenVINO can serve, one for each kind of call and sizes; a warning
    tells of others.

    Raises ArtifactError where there are none, and where the module is not what they were made for.
    """
    chosen: dict[Any, Plan] = {}
    for plan in plans:
        if plan.served is None or plan.graph is None:
            if plan.reason is not None:
                warnings.warn(FallbackWarning(plan.reason, name), stacklevel=4)
        elif plan.generation is None or not plan.generation.holds():
            what = "the module has changed since its plan was made."
            remedy = "Call it once more, or give an example to fast.ovshim.warm(), and save then."
            raise ArtifactError(str(where), what, remedy)
        else:
            chosen.setdefault((plan.kind.without_grad(), plan.pattern, plan.size_guards), plan)
    if not chosen:
        remedy = "Give an example to accelerate() or fast.ovshim.warm(), and read ovshim.explain."
        raise ArtifactError(str(where), f"{name} has no plan that runs in OpenVINO.", remedy)
    return list(chosen.values())


def written_whole(where: Path, write: Callable[[Path], None]) -> None:
    """Make a directory appear at `where` with all that `write` puts into it, or not at all.

    Raises ArtifactError: it exists and is not empty, or cannot be written.
    """
    try:
        if where.exists() and (not where.is_dir() or any(where.iterdir())):
            remedy = "Name a new directory, or an empty one."
            raise ArtifactError(str(where), "it exists already and is not empty.", remedy)
        where.parent.mkdir(parents=True, exist_ok=True)
        # Not by tempfile: those directories nobody else may read, wherever they are renamed to.
        temporary = where.parent / f".{where.name}.{uuid.uuid4().hex}"
        temporary.mkdir()
        try:
            write(temporary)
            if where.exists():
                where.rmdir()
            os.rename(temporary, where)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        remedy = "Make room, or name a directory that can be written to."
        raise ArtifactError(str(where), f"it cannot be written: {error}.", remedy) from error


def _written(
    directory: Path, stem: str, module: nn.Module, call: Callable[..., Any], plan: Plan
) -> dict[str, Any]:
    """The files of one graph, and what the manifest says of it."""
    graph, kind, served = plan.graph, plan.kind, plan.served
    assert graph is not None
    assert served is not None
    described = {
        "stem": stem,
        "signature": describe(kind, plan.pattern),
        "kind": kind_to_json(kind),
        "pattern": [list(dims) for dims in plan.pattern],
        "size_guards": list(plan.size_guards),
        "ordered": list(graph.ordered),
        "strict": graph.strict,
        "inputs": None if served.inputs is None else list(served.inputs),
        "structure": structure_to_json(graph.structure),
        "outputs": [
            {"computed": o.computed, "number": o.number, "view": o.view and o.view.to_json()}
            if o.computed is not None
            else {"given": o.given}
            if o.given is not None
            else {"const": const_to_json(o.value)}
            for o in graph.outputs
        ],
        "dtypes": [str(dtype).removeprefix("torch.") for dtype in graph.dtypes],
        "checked": served.checked,
        "finite": list(served.finite),
        "limits": {str(t): list(limit) for t, limit in graph.limits.items()},
        "infinite": [
            bool(tensor.dtype.is_floating_point and torch.isinf(tensor).any())
            for tensor in graph.leaves
            if isinstance(tensor, torch.Tensor)
        ],
        "hint": graph.hint,
        "properties": [list(pair) for pair in graph.properties],
        "precision": plan.precision,
        "precision_run": plan.precision_run,
        "route": plan.route,
        "tolerance": plan.tolerance,
        "error": plan.error,
        "names": [list(part) for part in names_of(kind, graph, call)],
    }
    writer = Writer()
    with own_modes(False), Building():  # calls in here are eager's
        cases = [_recorded(writer, *case) for case in _cases(module, call, plan)]
    if not cases:
        raise Mismatch("no call of it could be recorded")
    writer.write(directory / f"{stem}.tensors")
    for suffix in (".xml", ".bin"):
        shutil.copyfile(graph.source.with_suffix(suffix), directory / f"{stem}{suffix}")
    return {**described, "cases": cases}


def _recorded(writer: Writer, values: Sequence[torch.Tensor], answer: Answer) -> dict[str, Any]:
    outputs = [
        {"tensor": writer.add(leaf)}
        if isinstance(leaf, torch.Tensor)
        else {"const": const_to_json(leaf)}
        for leaf in answer.leaves
    ]
    return {"inputs": [writer.add(value) for value in values], "outputs": outputs}


def _cases(
    module: nn.Module, call: Callable[..., Any], plan: Plan
) -> Iterator[tuple[Sequence[torch.Tensor], Answer]]:
    """Calls, and eager's answers to them: at each of the sizes that were proved, the smallest first
    and once more with other values, until they are too much to record."""
    graph, served = plan.graph, plan.served
    assert graph is not None
    assert served is not None
    eager = Eager(module, "forward", call, plan.kind, graph.leaves, plan.tolerance, served.views)
    generator = torch.Generator().manual_seed(0)
    spent = 0
    for n, sizes in enumerate(sorted(graph.met, key=amount)):
        leaves = small_leaves(plan.kind, graph.leaves, plan.pattern, sizes)
        values = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        found = [(eager.answer(values), values)]
        if n == 0 and graph.drawn:
            found.append(redrawn(eager, values, generator))
        for answer, given in found:
            size = sum(t.nbytes for t in [*given, *answer.leaves] if isinstance(t, torch.Tensor))
            if spent and spent + size > _RECORDED_BYTES:
                return
            if not plan.values_fit(given):
                continue
            try:
                eager.judge(answer, served.answer(given))
            except OutOfRangeError:
                continue  # of values drawn anew: nothing to record
            spent += size
            yield given, answer
