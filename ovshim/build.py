"""The left road: from a module and an example to a plan.

    fingerprint → entry in the cache
        hit:   guards hold? → compile → one small proof
        miss:  look at eager → capture → publish → compile → proof
    → race → plan

Whatever goes wrong on the way becomes a plan that eager serves, with the reason.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ovshim import proof, runtime
from ovshim.cache import Entry, Store, StoreError
from ovshim.capture import (
    TRACE_LOCK,
    Captured,
    CaptureError,
    Request,
    capture,
    distinct_tensors,
)
from ovshim.fingerprint import Unkeyable, fingerprint
from ovshim.generation import Generation, GuardFailedError
from ovshim.guards import BadGuardError, ValueGuard, checked_size_guard, from_json, roots_of, to_json
from ovshim.infer import Engine, EngineDead
from ovshim.options import Options
from ovshim.plan import Plan, Served
from ovshim.preflight import Look, look
from ovshim.proof import Eager, ProofFailedError
from ovshim.race import race
from ovshim.reasons import TABLE, Reason, reason
from ovshim.shapes import Dims
from ovshim.signature import (
    Kind,
    Output,
    Pattern,
    TensorLeaf,
    compile_builder,
    compile_matcher,
    fits,
    flatten,
    sizes_of,
    unflatten_call,
)

__all__ = ["Job", "build"]

log = logging.getLogger("ovshim")

_OWN_PRECISION = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
# A race may take this share of what a build may take, and never longer than this.
_RACE_SECONDS = 0.5
# A plan must win by this much to serve: what it gains less is within the noise of the clock.
_RACE_MARGIN = 1.0


class BuildStopped(Exception):  # noqa: N818 - a way out of a build, not an error
    """A build ends in eager, for this reason."""

    def __init__(self, why: Reason) -> None:
        super().__init__(str(why))
        self.reason = why


@dataclasses.dataclass
class Job:
    """What is to be built.

    Attributes:
        method: name of the method; `call` is the user's own, bound to `module`.
        kind, leaves: the example, flattened; its tensors are copies that nobody else holds.
        dynamic: the dimensions of each tensor that should be able to change.
        grad: whether grad mode is on in the calls that the plan is for.
        look: what was seen of a call of the user's own, where there was one.
    """

    module: nn.Module
    method: str
    call: Callable[..., Any]
    options: Options
    store: Store
    kind: Kind
    leaves: Sequence[Any]
    dynamic: Dims
    grad: bool
    look: Look | None = None
    precision_run: str | None = None
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    started: float = dataclasses.field(default_factory=time.perf_counter)

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [leaf for leaf in self.leaves if isinstance(leaf, torch.Tensor)]

    @property
    def precision(self) -> str:
        if self.options.precision is not None:
            return self.options.precision
        return _OWN_PRECISION.get(own_dtype(self.module), "fp32")

    @property
    def tolerance(self) -> float | None:
        """None where the module runs in its own low precision and its upcast is the measure."""
        own = _OWN_PRECISION.get(own_dtype(self.module))
        if self.options.tolerance is None and own == self.precision and own != "fp32":
            return None
        return self.options.tolerance_for(self.precision)

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Times a stage, and ends the build before one that has no time left."""
        self.check_time()
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started

    def check_time(self) -> None:
        if time.perf_counter() - self.started > self.options.max_build_seconds:
            raise BuildStopped(reason("build-too-slow", f"{self.options.max_build_seconds:g} s"))

    def call_with(self, leaves: Sequence[Any]) -> Any:
        args, kwargs = unflatten_call(leaves, self.kind.structure)
        return self.call(*args, **kwargs)


def own_dtype(module: nn.Module) -> torch.dtype:
    """The dtype of most of the module's floating parameters; float32 where it has none."""
    amounts: dict[torch.dtype, int] = {}
    for parameter in module.parameters():
        if parameter.dtype.is_floating_point:
            amounts[parameter.dtype] = amounts.get(parameter.dtype, 0) + parameter.numel()
    return max(amounts, key=lambda dtype: amounts[dtype]) if amounts else torch.float32


def build(job: Job) -> Plan:
    """The plan for a job. Never raises but for KeyboardInterrupt and its like."""
    # Under inference mode every tensor made here would be one for ever, and without versions.
    with torch.inference_mode(False), torch.set_grad_enabled(job.grad):
        try:
            plan = _build(job)
        except BuildStopped as stopped:
            plan = _eager_plan(job, stopped.reason)
        except CaptureError as refused:
            plan = _eager_plan(job, refused.reason)
        except Exception as error:  # a fault of ours must not become one of the user's program
            log.debug("the build failed", exc_info=True)
            plan = _eager_plan(job, reason("build-failed", f"{type(error).__name__}: {error}"))
    name = type(job.module).__qualname__
    spent = time.perf_counter() - job.started
    why = f" ({plan.reason.code})" if plan.reason else ""
    log.info("%s.%s: %s%s in %.2f s, cache %s", name, job.method, plan.path, why, spent, plan.cache)
    return plan


def _build(job: Job) -> Plan:
    _refuse_at_sight(job)
    with job.stage("fingerprint"):
        family, trouble = _family(job)
    if trouble:
        log.info("%s is not cached: %s", type(job.module).__qualname__, trouble)
    if family is None:
        return _from_capture(job, None, "off")
    found = _from_cache(job, family)
    if found is not None:
        return found
    # Whoever else builds the same thing is waited for: its entry is then a hit.
    left = job.options.max_build_seconds - (time.perf_counter() - job.started)
    with job.store.lock(family, timeout=max(0.0, left)):
        found = _from_cache(job, family)
        return found if found is not None else _from_capture(job, family, "miss")


def _refuse_at_sight(job: Job) -> None:
    for name, tensor in [*job.module.named_parameters(), *job.module.named_buffers()]:
        if not tensor.is_cpu:
            raise BuildStopped(reason("not-on-cpu", f"{name} is on {tensor.device}"))
        if tensor.is_inference():
            raise BuildStopped(reason("untracked-weights", name))
    if job.options.precision is None and own_dtype(job.module) is torch.float64:
        raise BuildStopped(reason("double-precision"))
    for name, module in job.module.named_modules():
        if name and (module._forward_hooks or module._forward_pre_hooks):
            raise BuildStopped(reason("inner-hooks", name))


# --- the cache --------------------------------------------------------------------------------


def _family(job: Job) -> tuple[str | None, str | None]:
    """The key of the job, or None and why it has none."""
    if not job.store.enabled:
        return None, job.store.problem
    try:
        found = fingerprint(
            job.module,
            job.method,
            inputs=f"{job.kind} grad={job.grad}",
            options=f"{job.precision} {job.options.device} {sorted(job.options.properties.items())}",
            environment={"torch": torch.__version__, "openvino": runtime.version()},
        )
    except Unkeyable as unkeyable:
        return None, str(unkeyable)
    return found.key, None


def _from_cache(job: Job, family: str) -> Plan | None:
    """A plan out of an entry that fits the job; None where there is none."""
    entries = job.store.entries(family)
    for entry in entries:
        try:
            record = _Record.of(entry, job.kind)
        except (BadGuardError, KeyError, TypeError, ValueError) as error:
            log.info("the entry %s is passed over: %s", entry.path, error)
            continue
        if not record.fits(sizes_of(job.leaves)):
            _widen(job, record)
            continue
        plan = _from_entry(job, entry, record)
        if plan is not None:
            return plan
    return None


def _widen(job: Job, record: _Record) -> None:
    """Open the sizes in which this job differs from an entry: another process, with other sizes,
    has built for the same module, so they do change."""
    dynamic = [set(dims) for dims in job.dynamic]
    for t, (sizes, known) in enumerate(zip(sizes_of(job.leaves), record.pattern, strict=True)):
        for d, (mine, other) in enumerate(zip(sizes, known, strict=True)):
            if (other is None or other != mine) and (t, d) not in record.pinned:
                dynamic[t].add(d)
    job.dynamic = tuple(frozenset(dims) for dims in dynamic)


def _from_entry(job: Job, entry: Entry, record: _Record) -> Plan | None:
    if record.verdict is not None:
        return _eager_plan(job, record.verdict, entry)
    try:
        generation = _generation(job, record.value_guards)
    except GuardFailedError as failed:
        log.debug("the entry %s is for something else: %s", entry.path, failed)
        return None
    lease = job.store.hold(entry)
    if lease is None:
        return None
    try:
        with job.stage("compile"):
            engine = _compile(job, entry.file("model.xml"), record.dtypes)
        with job.stage("proof"):
            served, error = _proved_small(job, engine, record)
    except (BuildStopped, ProofFailedError, EngineDead) as trouble:
        lease.release()
        if isinstance(trouble, BuildStopped) and trouble.reason.code == "build-too-slow":
            raise
        # What an older processor, driver or torch has left does not prove here: build anew.
        log.info("the entry %s does not serve: %s", entry.path, trouble)
        job.store.discard(entry)
        return None
    weakref.finalize(engine, lease.release)
    return _plan(job, served, record, generation, max(error, record.error), "hit", entry)


@dataclasses.dataclass(frozen=True)
class _Record:
    """What a manifest says of a graph."""

    pattern: Pattern
    pinned: frozenset[tuple[int, int]]
    size_guards: tuple[str, ...]
    value_guards: tuple[ValueGuard, ...]
    route: str
    dtypes: tuple[torch.dtype, ...]
    error: float = 0.0
    sizes: tuple[tuple[int, ...], ...] = ()
    verdict: Reason | None = None
    race: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    rung: str | None = None

    def fits(self, sizes: Sequence[Sequence[int]]) -> bool:
        exact = tuple(map(tuple, sizes))
        alike = all(fits(mine, dims) for mine, dims in zip(sizes, self.pattern, strict=True))
        return alike and proof.sizes_hold(self.size_guards, exact)

    @staticmethod
    def of(entry: Entry, kind: Kind) -> _Record:
        """Raises KeyError, TypeError, ValueError or BadGuardError for what is no such record."""
        graph, proved = entry.manifest["graph"], entry.manifest.get("proof") or {}
        ranks = [kind.leaves[i].rank for i in kind.tensors]  # type: ignore[union-attr]
        pattern = tuple(tuple(None if n is None else int(n) for n in s) for s in graph["pattern"])
        if [len(dims) for dims in pattern] != ranks:
            raise ValueError("its sizes are not of this call")
        dtypes = tuple(getattr(torch, name) for name in graph["dtypes"])
        if not all(isinstance(dtype, torch.dtype) for dtype in dtypes):
            raise ValueError(f"no dtypes: {graph['dtypes']}")
        verdict = entry.manifest.get("verdict")
        if verdict is None and not proved:
            raise ValueError("it was never proved")
        return _Record(
            pattern=pattern,
            pinned=frozenset((int(t), int(d)) for t, d in proved.get("pinned", ())),
            size_guards=tuple(checked_size_guard(g, ranks) for g in graph["size_guards"]),
            value_guards=from_json(graph["value_guards"]),
            route=str(graph["route"]),
            dtypes=dtypes,
            error=float(proved.get("error", 0.0)),
            sizes=tuple(tuple(map(int, dims)) for dims in proved.get("sizes", ())),
            verdict=None if verdict is None else _stored_reason(verdict),
            race=entry.manifest.get("race") or {},
            rung=entry.manifest.get("rung"),
        )


def _stored_reason(stored: Mapping[str, Any]) -> Reason:
    if stored["code"] not in TABLE:
        raise ValueError(f"no reason: {stored['code']}")
    return Reason(stored["code"], str(stored["message"]), str(stored["remedy"]))


# --- a miss -----------------------------------------------------------------------------------


def _from_capture(job: Job, family: str | None, cache: str) -> Plan:
    with job.stage("preflight"):
        seen = _seen(job)
    if seen.reason is not None:
        raise BuildStopped(seen.reason)
    outputs, dtypes = _computed(seen)
    if not outputs:
        raise BuildStopped(reason("capture-failed", "no output is a tensor that is computed"))
    with job.stage("capture"), TRACE_LOCK:
        request = Request(job.module, job.call, job.kind, _copies(job.leaves), job.dynamic, outputs)
        captured = capture(request)
        record = _record_of(captured, dtypes)
        generation = _generation(job, captured.value_guards)
        source, entry, keep = _publish(job, family, captured, record)
    # From here on the graph is a file: torch's weights and OpenVINO's share nothing.
    del captured
    try:
        with job.stage("compile"):
            engine = _compile(job, source, dtypes)
        if keep is not None:
            weakref.finalize(engine, keep)
        served = _served(job, engine, seen)
        with job.stage("proof"):
            proved = _prove(job, served, record)
    except BuildStopped as stopped:
        if entry is not None and stopped.reason.code in ("proof-failed", "compile-failed"):
            entry = job.store.amend(entry, "verdict", stopped.reason.to_dict())
        return _eager_plan(job, stopped.reason, entry)
    record = dataclasses.replace(
        record, pinned=proved.pinned, error=proved.error, sizes=proved.sizes
    )
    if entry is not None:
        section = {
            "error": proved.error,
            "sizes": [list(dims) for dims in proved.sizes],
            "pinned": sorted(map(list, proved.pinned)),
            "precision": job.precision,
        }
        entry = job.store.amend(entry, "proof", section)
    return _plan(job, served, record, generation, proved.error, cache if entry else "off", entry)


def _seen(job: Job) -> Look:
    """What eager does on the example, and that it does so twice."""
    first = job.look
    try:
        if first is None:
            trial = _copies(job.leaves)
            first = _look(job, trial)
        if first.reason is not None:
            return first
        second = _look(job, _copies(job.leaves))
    except BuildStopped:
        raise
    except Exception as error:
        raise BuildStopped(reason("eager-refuses", f"{type(error).__name__}: {error}")) from error
    if second.reason is not None:
        return second
    if not proof.alike(first, second):
        raise BuildStopped(reason("nondeterministic"))
    return first


def _look(job: Job, leaves: Sequence[Any]) -> Look:
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    return look(job.module, lambda: job.call_with(leaves), tensors, restore=True)


def _copies(leaves: Sequence[Any]) -> list[Any]:
    """The leaves with copies of their tensors: one object at two places stays one object."""
    made: dict[int, torch.Tensor] = {}
    for leaf in leaves:
        if isinstance(leaf, torch.Tensor) and id(leaf) not in made:
            made[id(leaf)] = leaf.detach().clone()
    return [made[id(leaf)] if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]


def _computed(seen: Look) -> tuple[tuple[int, ...], tuple[torch.dtype, ...]]:
    """The output leaves that a graph has to compute, each object once, and their dtypes."""
    first: dict[int, int] = {}
    for i, leaf in enumerate(seen.leaves):
        if isinstance(leaf, torch.Tensor) and seen.given[i] is None:
            first.setdefault(id(leaf), i)
    places = tuple(first.values())
    return places, tuple(seen.leaves[i].dtype for i in places)


def _record_of(captured: Captured, dtypes: tuple[torch.dtype, ...]) -> _Record:
    return _Record(
        pattern=captured.pattern,
        pinned=frozenset(),
        size_guards=captured.size_guards,
        value_guards=captured.value_guards,
        route=captured.route,
        dtypes=dtypes,
    )


def _publish(
    job: Job, family: str | None, captured: Captured, record: _Record
) -> tuple[Path, Entry | None, Callable[[], None] | None]:
    """Write the graph to a file: in the cache, or, where that cannot be, in a directory of our
    own. Returns the IR, the entry, and what removes the directory when it is not needed any more.
    """

    def write(directory: Path) -> None:
        # Not compressed: fp16 weights would be off by 2e-3 on a BERT.
        runtime.openvino().save_model(
            captured.model, str(directory / "model.xml"), compress_to_fp16=False
        )

    if family is not None:
        graph = {
            "signature": str(job.kind),
            "pattern": [list(dims) for dims in record.pattern],
            "size_guards": list(record.size_guards),
            "value_guards": to_json(record.value_guards),
            "route": record.route,
            "dtypes": [str(dtype).removeprefix("torch.") for dtype in record.dtypes],
        }
        text = json.dumps(graph, sort_keys=True).encode()
        variant = hashlib.blake2b(text, digest_size=8).hexdigest()
        head = {"module": type(job.module).__qualname__, "method": job.method, "graph": graph}
        try:
            entry = job.store.publish(family, variant, write, head)
        except StoreError as error:
            log.warning("%s is not cached: %s", type(job.module).__qualname__, error)
        else:
            lease = job.store.hold(entry)
            return entry.file("model.xml"), entry, None if lease is None else lease.release
    directory = tempfile.TemporaryDirectory(prefix="ovshim-", ignore_cleanup_errors=True)
    write(Path(directory.name))
    return Path(directory.name) / "model.xml", None, directory.cleanup


# --- what both roads end in -------------------------------------------------------------------


def _generation(job: Job, guards: Sequence[ValueGuard]) -> Generation:
    return Generation(job.module, guards, roots_of(job.module, job.call))


def _compile(job: Job, source: Path, outputs: Sequence[torch.dtype]) -> Engine:
    options = job.options
    threads = options.threads or torch.get_num_threads()
    safe = runtime.safe_precision(
        job.precision,
        device=options.device,
        hint=options.hint,
        streams=options.streams,
        threads=threads,
    )
    settings = runtime.settings(
        device=options.device,
        precision=safe,
        hint=options.hint,
        streams=options.streams,
        threads=threads,
        properties=options.properties,
    )
    inputs = [job.leaves[i].dtype for i in distinct_tensors(job.kind)]
    try:
        compiled = runtime.compile_model(source, options.device, settings)
        job.precision_run = runtime.precision_run(compiled)
        return Engine(compiled, inputs, outputs)
    except (RuntimeError, TypeError, ValueError) as error:
        detail = f"{type(error).__name__}: {str(error).strip().splitlines()[-1][:200]}"
        raise BuildStopped(reason("compile-failed", detail)) from error


def _served(job: Job, engine: Engine, seen: Look) -> Served:
    tensors = distinct_tensors(job.kind)
    every = list(job.kind.tensors)
    inputs = None if tensors == every else tuple(every.index(i) for i in tensors)
    places, _ = _computed(seen)
    number = {id(seen.leaves[i]): n for n, i in enumerate(places)}
    outputs = []
    for leaf, given in zip(seen.leaves, seen.given, strict=True):
        if given is not None:
            outputs.append(Output(given=given))
        elif isinstance(leaf, torch.Tensor):
            outputs.append(Output(computed=number[id(leaf)]))
        else:
            outputs.append(Output(value=leaf))
    return Served(engine, inputs, compile_builder(seen.structure, outputs))


def _eager_of(job: Job) -> Eager:
    return Eager(job.module, job.method, job.call, job.kind, job.leaves, job.tolerance)


def _prove(job: Job, served: Served, record: _Record) -> proof.Proof:
    try:
        return proof.prove(
            _eager_of(job),
            served,
            job.tensors,
            record.pattern,
            record.size_guards,
            job.check_time,
        )
    except ProofFailedError as failed:
        raise BuildStopped(reason("proof-failed", str(failed))) from failed
    except EngineDead as dead:
        raise BuildStopped(reason("infer-failed", str(dead))) from dead


def _proved_small(job: Job, engine: Engine, record: _Record) -> tuple[Served, float]:
    """The plan's server, after one look at eager and one comparison, both on a small input."""
    small = proof.small_leaves(job.kind, job.leaves, record.pattern, record.sizes)
    try:
        seen = _look(job, small)
    except Exception as error:
        raise BuildStopped(reason("eager-refuses", f"{type(error).__name__}: {error}")) from error
    if seen.reason is not None:
        raise BuildStopped(seen.reason)
    served = _served(job, engine, seen)
    tensors = [leaf for leaf in small if isinstance(leaf, torch.Tensor)]
    return served, proof.prove_small(_eager_of(job), served, tensors, seen)


def _plan(
    job: Job,
    served: Served,
    record: _Record,
    generation: Generation,
    error: float,
    cache: str,
    entry: Entry | None,
) -> Plan:
    pattern = _pin(record.pattern, record.pinned, sizes_of(job.leaves))
    # A plan never meets a size of 0 that its proof has not seen: kernels differ there.
    open_ = [f"s{t}[{d}] > 0" for t, s in enumerate(pattern) for d, n in enumerate(s) if n is None]
    plan = Plan(
        kind=job.kind,
        pattern=pattern,
        match=compile_matcher(job.kind, pattern, [*record.size_guards, *open_]),
        served=served,
        reason=None,
        generation=generation,
        precision=job.precision,
        precision_run=job.precision_run,
        error=error,
        cache=cache,
        cache_path=None if entry is None else str(entry.path),
        route=record.route,
        rung=record.rung,
        size_guards=record.size_guards,
        value_guards=record.value_guards,
        pinned=record.pinned,
        seconds=job.seconds,
    )
    if job.options.prefer == "faster":
        _race(job, plan, record, entry)
    return plan


def _pin(pattern: Pattern, pinned: frozenset[tuple[int, int]], sizes: Pattern) -> Pattern:
    return tuple(
        tuple(sizes[t][d] if (t, d) in pinned else n for d, n in enumerate(dims))
        for t, dims in enumerate(pattern)
    )


def _race(job: Job, plan: Plan, record: _Record, entry: Entry | None) -> None:
    """Let the plan run against eager, or read what an earlier race on such a machine found."""
    served, generation = plan.served, plan.generation
    assert served is not None and generation is not None
    where = f"{runtime.processor()} threads={torch.get_num_threads()} sizes={sizes_of(job.leaves)}"
    known = record.race.get(where)
    if isinstance(known, list) and len(known) == 2 and all(isinstance(m, float) for m in known):
        plan.medians = (known[0], known[1])
    else:
        args, kwargs = unflatten_call(job.leaves, job.kind.structure)

        def candidate() -> Any:
            tensors = plan.match(args, kwargs)
            return served.answer(tensors) if tensors is not None and generation.holds() else None

        left = job.options.max_build_seconds - (time.perf_counter() - job.started)
        with job.stage("race"):
            budget = max(0.0, min(_RACE_SECONDS, left / 4))
            plan.medians = race(lambda: job.call(*args, **kwargs), candidate, budget)
        if entry is not None:
            job.store.amend(entry, "race", {**record.race, where: list(plan.medians)})
    eager, ours = plan.medians
    plan.speedup = eager / ours
    if plan.speedup < _RACE_MARGIN:
        plan.served = None
        plan.reason = reason("slower", f"{eager * 1e3:.3g} ms against {ours * 1e3:.3g} ms")


def _eager_plan(job: Job, why: Reason, entry: Entry | None = None) -> Plan:
    """A plan for every size of this kind, because the reason is one of the module's."""
    pattern: Pattern = tuple((None,) * tensor.dim() for tensor in job.tensors)
    try:
        generation = Generation(job.module)
    except (ValueError, GuardFailedError):
        generation = None
    return Plan(
        kind=job.kind,
        pattern=pattern,
        match=compile_matcher(job.kind, pattern),
        served=None,
        reason=why,
        generation=generation,
        precision=job.precision,
        cache="off" if entry is None else "hit",
        cache_path=None if entry is None else str(entry.path),
        seconds=job.seconds,
    )
