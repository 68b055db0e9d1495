"""The one checker: every entry of the corpus is accelerated, called, edited and called again.

Two modules with equal weights stand side by side: one accelerated, one plain. Each gets the same
calls in the same order from the same random states, so that a module with a memory is compared as
rightly as one without.
"""

from __future__ import annotations

import copy
import dataclasses
import random
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import ovshim
from conformance.compare import differences, sharing
from conformance.entries import Call, Entry

__all__ = ["Record", "check"]


@dataclasses.dataclass
class Record:
    """What became of one entry.

    Attributes:
        wrong: in what way an answer was not eager's, as sentences. Any is a failure.
        path: which way the example went once all sizes had been called: "openvino", "mixed",
            "eager"; "crashed" and "timeout" where the process did not live to tell.
        reason, message: of the plan, where that was eager.
        route: how the graph was captured.
        calls: number of calls by path, of those that eager itself did not refuse.
        after_edit: the path of the example after its weights had been edited.
        seconds: for all of it, the builds among it.
    """

    name: str
    expected: str = "either"
    wrong: list[str] = dataclasses.field(default_factory=list)
    path: str = ""
    reason: str | None = None
    message: str | None = None
    route: str | None = None
    calls: dict[str, int] = dataclasses.field(default_factory=dict)
    eager_reasons: dict[str, int] = dataclasses.field(default_factory=dict)
    after_edit: str = ""
    cache: str = ""
    parameters: int = 0
    seconds: float = 0.0

    @property
    def as_expected(self) -> bool:
        if self.expected == "openvino":
            return self.path in ("openvino", "mixed")
        if self.expected == "eager":  # in part is allowed, where something can be had by it
            return self.path in ("eager", "mixed")
        return self.expected in ("either", self.path)


def check(entry: Entry, cache_dir: str) -> Record:
    """Run one entry; never raises for what the entry's modules or ovshim do."""
    started = time.perf_counter()
    record = Record(entry.name, entry.path)
    with warnings.catch_warnings():
        # Fallbacks are the record's subject, and modules may warn as they please.
        warnings.simplefilter("ignore")
        try:
            _Checker(entry, record, cache_dir).run()
        except Exception:
            record.wrong.append("unexpected: " + traceback.format_exc(limit=-4))
    record.seconds = round(time.perf_counter() - started, 1)
    return record


class _Checker:
    def __init__(self, entry: Entry, record: Record, cache_dir: str) -> None:
        self.entry = entry
        self.record = record
        self.options = {"prefer": "openvino", "cache_dir": cache_dir, "max_build_seconds": 300.0}
        self.options |= entry.options
        self.plain = self.module()
        self.original = self.module()
        self.fast: nn.Module = self.original
        self.calls = 0
        # (what, actual, expected): looked at again at the end.
        self.kept: list[tuple[str, Any, Any]] = []

    def module(self) -> nn.Module:
        _seed(0)
        return self.entry.factory()

    def call(self, seed: int, batch: int, length: int) -> Call:
        _seed(seed)
        return self.entry.redraw(seed, batch, length)

    def run(self) -> None:
        self.record.parameters = sum(p.numel() for p in self.plain.parameters())
        self.accelerate()
        self.sizes()
        self.settle()
        for name, make in self.entry.others.items():
            _seed(1)
            self.compare(name, make())
        self.edits()
        self.second_module()
        for what, actual, expected in self.kept:
            self.wrong(
                f"{what}, looked at again later",
                differences(actual, expected, self.entry.tolerance),
            )

    def wrong(self, what: str, found: list[str]) -> None:
        self.record.wrong.extend(f"{what}: {told}" for told in found[:3])

    def accelerate(self) -> None:
        example = self.call(0, *self.entry.size)
        _seed(7)
        before = torch.get_rng_state()
        try:
            self.fast = ovshim.accelerate(
                self.original,
                tuple(example.args),
                example_kwargs=dict(example.kwargs),
                **self.options,  # type: ignore[arg-type]
            )
        except Exception as error:
            self.wrong("accelerate", [f"raised {type(error).__name__}: {error}"])
            raise
        if not torch.equal(torch.get_rng_state(), before):
            self.wrong("accelerate", ["moved the random state"])
        state = dict(self.original.state_dict()), dict(self.plain.state_dict())
        self.wrong("accelerate: state", differences(*state, 0.0, "state"))
        modes = [[m.training for m in one.modules()] for one in (self.original, self.plain)]
        self.wrong("accelerate: training flags", differences(*modes, 0.0, "training"))

    def sizes(self) -> None:
        batch, length = self.entry.size
        self.compare("example", self.call(0, batch, length))
        for seed in range(1, self.entry.seeds + 1):
            self.compare(f"draw {seed}", self.call(seed, batch, length))
        sizes = [(other, length) for other in self.entry.batches]
        sizes += [(batch, other) for other in self.entry.lengths]
        if self.entry.batches and self.entry.lengths:
            # Both at once, and back: what the former size left behind must not show.
            sizes += [(self.entry.batches[-1], self.entry.lengths[-1])]
            sizes += [(self.entry.batches[0], self.entry.lengths[0]), (batch, length)]
        for seed, (one, other) in enumerate(sizes, start=10):
            self.compare(f"batch {one} length {other}", self.call(seed, one, other))

    def settle(self) -> None:
        """The example twice in a row, and which way the second went."""
        for _ in range(2):
            before = _counts(self.fast)
            self.compare("example again", self.call(0, *self.entry.size))
            moved = _counts(self.fast) - before
        self.record.path = next((path for path in moved if ":" not in path), "none")
        reasons = [path.partition(":")[2] for path in moved if ":" in path]
        self.record.reason = reasons[0] if reasons else None
        plans = ovshim.explain(self.fast).to_dict()["plans"]
        for plan in plans:
            told = plan["reason"]
            if told is not None and told["code"] == self.record.reason:
                self.record.message = told["message"]
            if plan["route"]:
                self.record.route = plan["route"]
        counts = _counts(self.fast)
        self.record.calls = {path: count for path, count in counts.items() if ":" not in path}
        self.record.eager_reasons = {
            path.partition(":")[2]: count for path, count in counts.items() if ":" in path
        }

    def edits(self) -> None:
        for edit in self.entry.edits:
            edit.apply(self.fast)
            edit.apply(self.plain)
            self.after(f"after {edit.name}")
        if any(p.is_floating_point() for p in self.plain.parameters()):
            # Through the original, whose weights the accelerated one shares; but where edits have
            # given the latter parts of its own, through that.
            _add(self.fast if self.entry.edits else self.original)
            _add(self.plain)
            self.after("after a weight edit")
            before = _counts(self.fast)
            self.compare("later after a weight edit", self.call(0, *self.entry.size))
            moved = _counts(self.fast) - before
            self.record.after_edit = next((path for path in moved if ":" not in path), "none")

    def after(self, what: str) -> None:
        for _ in range(2):
            self.compare(what, self.call(0, *self.entry.size))
        self.compare(what, self.call(3, *self.entry.size))

    def second_module(self) -> None:
        """An equal module, which may find in the cache what the first one left there."""
        self.plain, self.original = self.module(), self.module()
        self.accelerate()
        self.compare("a second module", self.call(4, *self.entry.size))
        if self.entry.batches:
            size = self.entry.batches[-1], self.entry.size[1]
            self.compare("a second module, another batch", self.call(5, *size))
        plans = ovshim.explain(self.fast).to_dict()["plans"]
        self.record.cache = plans[0]["cache"] if plans else ""

    def compare(self, what: str, given: Call) -> None:
        """One call of each, and whatever tells them apart."""
        self.calls += 1
        # Alternately, because whatever serves one mode may not serve the other.
        under = torch.no_grad if self.calls % 3 == 0 else torch.inference_mode
        for_plain, for_fast = copy.deepcopy(given), copy.deepcopy(given)
        expected, refused, state = _called(self.plain, for_plain, under, self.calls)
        actual, raised, state_after = _called(self.fast, for_fast, under, self.calls)
        if refused is not None or raised is not None:
            if type(refused) is not type(raised):
                self.wrong(what, [f"{_told(raised)} for {_told(refused)}"])
            elif str(refused) != str(raised):
                self.wrong(what, [f"message {str(raised)[:200]!r} for {str(refused)[:200]!r}"])
            return
        self.wrong(what, differences(actual, expected, self.entry.tolerance))
        # What is written to an argument is an answer too.
        self.wrong(what, differences(for_fast, for_plain, self.entry.tolerance, "argument"))
        if state != state_after:
            self.wrong(what, ["random state after it"])
        shared = sharing(actual, for_fast, _weights(self.fast))
        should = sharing(expected, for_plain, _weights(self.plain))
        self.wrong(what, differences(shared, should, 0.0, "is, and shares memory with"))
        if self.calls <= 12:
            self.kept.append((what, actual, expected))


def _called(
    module: nn.Module, given: Call, under: Any, seed: int
) -> tuple[Any, Exception | None, tuple[bytes, Any, bytes]]:
    _seed(seed)
    answer, error = None, None
    try:
        with under():
            answer = module(*given.args, **given.kwargs)
    except Exception as raised:
        error = raised
    numpy_state = np.random.get_state()[1].tobytes()  # type: ignore[index, union-attr]
    state = (torch.get_rng_state().numpy().tobytes(), random.getstate(), numpy_state)
    return answer, error, state


def _seed(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


def _told(error: Exception | None) -> str:
    return "an answer" if error is None else f"{type(error).__name__}: {str(error)[:200]}"


def _counts(fast: nn.Module) -> Counter[str]:
    """Calls by path, and eager ones by `eager:reason` as well."""
    report = ovshim.explain(fast)
    counts = Counter(dict(report.calls))
    counts.update({f"eager:{code}": count for code, count in report.eager.items()})
    return +counts


def _weights(module: nn.Module) -> Mapping[str, Tensor]:
    return dict(module.named_parameters()) | dict(module.named_buffers())


def _add(module: nn.Module) -> None:
    """An edit in place of the first and the last floating parameter that may be written to."""
    weights = [p for p in module.parameters() if p.is_floating_point() and p.numel()]
    with torch.no_grad():
        for weight in dict.fromkeys([weights[0], weights[-1]]):
            weight.add_(torch.full_like(weight, 0.125))
