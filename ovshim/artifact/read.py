"""From an artifact's directory to plans: checked, compiled, and proved on the recorded answers."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ovshim import executed, runtime
from ovshim.artifact.save import MANIFEST, SCHEMA
from ovshim.artifact.structure import (
    const_from_json,
    dtype_named,
    kind_from_json,
    structure_from_json,
    whole,
)
from ovshim.artifact.tensors import Reader
from ovshim.assemble import matcher_of
from ovshim.cache import files
from ovshim.cache.entry import check
from ovshim.errors import ArtifactError, PrecisionWarning
from ovshim.generation import Generation
from ovshim.guards import checked_size_guard
from ovshim.infer import EngineDead
from ovshim.lanes import Lane
from ovshim.matcher import Output, compile_builder
from ovshim.options import Options
from ovshim.plan import Graph, OutOfRangeError, Plan, Served
from ovshim.record import LADDER
from ovshim.signature import Kind, Pattern, TensorLeaf, sizes_of
from ovshim.single import engine_for
from ovshim.values import compile_value_check, usual
from ovshim.verify import Mismatch, compare
from ovshim.views import View
from ovshim.wanted import Placement

__all__ = ["read"]

log = logging.getLogger("ovshim")

_REMEDY = "Save it anew from the module that it was made of."
_HINTS = ("fp32", "bf16", "fp16", "dynamic")
# Another processor may compile wrongly what the one that saved it did not (see `record.LADDER`).
_SNIPPETS_OFF = LADDER[1].properties


def read(where: Path, options: Options, generation: Generation) -> tuple[str, list[Plan]]:
    """The name of the module that was saved, and its plans.

    Raises ArtifactError: it is no artifact, or a damaged one, or does not give the recorded answers
    on this machine.
    """
    manifest = _manifest(where)
    try:
        stored = list(manifest["graphs"])
        name = str(manifest["module"])
        if not stored:
            raise ValueError("it holds no graph")
        plans = [_plan(where, graph, options, generation) for graph in stored]
    except ArtifactError:
        raise
    except Exception as error:  # whatever others have written has no end of forms
        log.debug("an artifact that is none", exc_info=True)
        what = f"its {MANIFEST} is not as ovshim writes it ({type(error).__name__}: {error})."
        raise ArtifactError(str(where), what, _REMEDY) from error
    return name, plans


def _manifest(where: Path) -> dict[str, Any]:
    try:
        manifest = files.read_sealed(where / MANIFEST)
    except FileNotFoundError as error:
        what = f"it holds no {MANIFEST}." if where.is_dir() else "there is no such directory."
        remedy = "Name a directory that fast.ovshim.save() has written."
        raise ArtifactError(str(where), what, remedy) from error
    except (OSError, ValueError) as error:
        raise ArtifactError(str(where), f"{MANIFEST} cannot be read: {error}.", _REMEDY) from error
    if manifest.get("schema") != SCHEMA:
        what = f"its schema is {manifest.get('schema')!r}; this version reads {SCHEMA}."
        raise ArtifactError(str(where), what, "Load it by the version of ovshim that saved it.")
    try:
        check(where, manifest.get("files"))
    except (OSError, ValueError) as error:
        raise ArtifactError(str(where), f"it is damaged: {error}.", "Copy it once more.") from error
    return manifest


def _plan(where: Path, stored: Mapping[str, Any], options: Options, generation: Generation) -> Plan:
    kind = kind_from_json(stored["kind"])
    ranks = [leaf.rank for leaf in kind.leaves if isinstance(leaf, TensorLeaf)]
    pattern: Pattern = tuple(
        tuple(None if n is None else whole(n) for n in dims) for dims in stored["pattern"]
    )
    if [len(dims) for dims in pattern] != ranks:
        raise ValueError("its sizes are not of its calls")
    guards = tuple(checked_size_guard(guard, ranks) for guard in stored["size_guards"])
    reader = Reader(where / f"{_stem(stored)}.tensors")
    cases = [_case(reader, case, len(ranks)) for case in stored["cases"]]
    if not cases:
        raise ValueError("it recorded no call")
    graph = _graph(where, stored, kind, cases[0][0])
    served, ran = _proved(where, stored, kind, graph, cases, options)
    like = _like(kind, stored["infinite"])
    inputs = range(len(like)) if served.inputs is None else served.inputs
    by_engine = {i: n for n, i in enumerate(inputs) if i in usual(like, graph.limits)}
    served.engine.check(by_engine.values())
    plan = Plan(
        kind=kind,
        pattern=pattern,
        match=matcher_of(kind, pattern, guards, graph),
        values_fit=compile_value_check(like, graph.limits),
        other_values_fit=compile_value_check(like, graph.limits, beside=by_engine),
        served=served,
        reason=None,
        generation=generation,
        precision=str(stored["precision"]),
        example=sizes_of(cases[0][0]),
        precision_run=ran,
        error=float(stored["error"]),
        cache="artifact",
        cache_path=str(where),
        route=None if stored["route"] is None else str(stored["route"]),
        size_guards=guards,
        tolerance=float(stored["tolerance"]),
        warnings=_warnings(str(stored["precision_run"]), ran),
        graph=graph,
        # Of sizes that nobody has compared there is no eager to ask.
        bucket=lambda tensors: (),
        key=lambda tensors: (),
        lanes={(): Lane(proved=True, raced=True)},
    )
    plan.settle()
    return plan


def _stem(stored: Mapping[str, Any]) -> str:
    stem = str(stored["stem"])
    if not stem.isalnum():  # it is part of a path
        raise ValueError(f"{stem!r} is no name of a graph")
    return stem


def _graph(
    where: Path, stored: Mapping[str, Any], kind: Kind, example: Sequence[torch.Tensor]
) -> Graph:
    if stored["hint"] not in _HINTS:
        raise ValueError(f"{stored['hint']!r} is no precision")
    properties = tuple((str(key), str(value)) for key, value in stored["properties"])
    if properties not in {rung.properties for rung in LADDER}:
        raise ValueError("its properties are none of ours")
    dtypes = tuple(map(dtype_named, stored["dtypes"]))
    outputs = tuple(_output(one, len(dtypes), len(kind.tensors)) for one in stored["outputs"])
    inputs, computed = (tuple(map(str, part)) for part in stored["names"])
    values = iter(example)
    leaves = [next(values) if isinstance(leaf, TensorLeaf) else leaf.value for leaf in kind.leaves]
    return Graph(
        source=where / f"{_stem(stored)}.xml",
        hint=stored["hint"],
        properties=properties,
        structure=structure_from_json(stored["structure"]),
        outputs=outputs,
        dtypes=dtypes,
        limits={int(t): (int(low), int(high)) for t, (low, high) in stored["limits"].items()},
        ordered=tuple(map(str, stored["ordered"])),
        strict=bool(stored["strict"]),
        leaves=leaves,
        met=(sizes_of(example),),
        drawn=True,
        names=(inputs, computed),
    )


def _output(stored: Mapping[str, Any], computed: int, given: int) -> Output:
    if "computed" in stored:
        index = whole(stored["computed"])
        if index >= computed:
            raise ValueError(f"there is no computed tensor {index}")
        view = None if stored["view"] is None else View.from_json(stored["view"])
        return Output(computed=index, number=bool(stored["number"]), view=view)
    if "given" in stored:
        index = whole(stored["given"])
        if index >= given:
            raise ValueError(f"there is no input {index}")
        return Output(given=index)
    return Output(value=const_from_json(stored["const"]))


def _case(
    reader: Reader, stored: Mapping[str, Any], count: int
) -> tuple[list[torch.Tensor], list[Any]]:
    """Inputs and outputs of a recorded call."""
    inputs = [reader.tensor(one) for one in stored["inputs"]]
    if len(inputs) != count:
        raise ValueError("a recorded call has other tensors than its kind")
    outputs = [
        reader.tensor(one["tensor"]) if "tensor" in one else const_from_json(one["const"])
        for one in stored["outputs"]
    ]
    return inputs, outputs


def _proved(
    where: Path,
    stored: Mapping[str, Any],
    kind: Kind,
    graph: Graph,
    cases: Sequence[tuple[list[torch.Tensor], list[Any]]],
    options: Options,
) -> tuple[Served, str]:
    """What serves the graph, right on every recorded call, and the precision that it runs in."""
    trouble: Exception | None = None
    for properties in dict.fromkeys([graph.properties, _SNIPPETS_OFF]):
        try:
            served, ran = _compiled(stored, kind, graph, properties, options)
            for inputs, outputs in cases:
                answer = served.answer(inputs)
                compare(outputs, graph.structure, answer, float(stored["tolerance"]))
        except (Mismatch, OutOfRangeError, EngineDead, RuntimeError) as error:
            log.info("%s with %s: %s", where, properties, error)
            trouble = trouble or error
        else:
            return served, ran
    what = f"it does not give the recorded answers on this machine: {trouble}."
    remedy = "Save it anew, here or in a higher precision; or load it on another device."
    raise ArtifactError(str(where), what, remedy) from trouble


def _compiled(
    stored: Mapping[str, Any],
    kind: Kind,
    graph: Graph,
    properties: Sequence[tuple[str, str]],
    options: Options,
) -> tuple[Served, str]:
    places = range(len(kind.tensors)) if stored["inputs"] is None else map(whole, stored["inputs"])
    inputs = tuple(places)
    placement: Placement = {
        "device": options.device,
        "hint": options.hint,
        "streams": options.streams,
        "threads": options.threads or torch.get_num_threads(),
    }
    settings = runtime.settings(
        **placement,
        precision=runtime.safe_precision(graph.hint, **placement),
        properties={**dict(properties), **options.properties},
    )
    compiled = runtime.compile_model(graph.source, options.device, settings)
    checked = bool(stored["checked"])
    tensors = [kind.leaves[kind.tensors[i]] for i in inputs]
    dtypes = [leaf.dtype for leaf in tensors if isinstance(leaf, TensorLeaf)]
    outputs = (*graph.dtypes, *((torch.bool,) if checked else ()))
    engine = engine_for(compiled, placement["threads"], dtypes, outputs)
    served = Served(
        engine,
        None if stored["inputs"] is None else inputs,
        compile_builder(graph.structure, graph.outputs),
        graph.outputs,
        graph.structure,
        checked,
        tuple(n for n in map(int, stored["finite"]) if 0 <= n < len(graph.dtypes)),
    )
    return served, executed.precision_run(compiled)


def _like(kind: Kind, infinite: Sequence[bool]) -> list[torch.Tensor]:
    """Tensors of the call's dtypes, with infinities where the example had some."""
    leaves = [leaf for leaf in kind.leaves if isinstance(leaf, TensorLeaf)]
    return [
        torch.full((1,), torch.inf, dtype=leaf.dtype) if has else torch.zeros(1, dtype=leaf.dtype)
        for leaf, has in zip(leaves, infinite, strict=True)
    ]


def _warnings(then: str, now: str) -> list[PrecisionWarning]:
    if "unknown" in (then, now) or then == now:
        return []
    what = f"OpenVINO runs it in {now} on this machine."
    return [PrecisionWarning(then, what, "The recorded answers were met all the same.")]
