"""docs/benchmarks.md, made from one run."""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence

import machine
import quiet
from interleave import Ratio
from rows import HEAD, LOSES, QUIET, Row, markdown

__all__ = ["BUILD_HEAD", "COLD_HEAD", "busy", "facts_of", "measured_on", "page"]


COLD_HEAD = (
    *("cold start", "way", "import", "ready", "first call", "total, s"),
    *("over raw, s", "over raw without its import, s", "first call by OpenVINO, s"),
)
BUILD_HEAD = (
    *("cold build", "way", "capture", "compile", "further", "proof", "race"),
    *("all but proof and race, s", "× by hand"),
)

_TOP = f"""# Benchmarks

Made by `nox -s bench -- benchmarks --write-docs`; nobody edits it. `{LOSES}` marks each figure in
which ovshim loses. [Precision](precision.md) and [performance](performance.md) have pages of their
own.

All figures of a group were taken in one process, the backends in turns: each round times every
backend once, in shuffled order. A ratio says how many times as fast as the reference a backend
is: the ratio of the medians, and in brackets the quartiles of the ratios round by round. *Eager
again* is eager measured a second time in the same rounds: what the machine makes of one and the
same program. A group in which that is off by more than {QUIET - 1:.0%} was measured again, up
to three times. Rounds in which our threads waited for a processor that another program had were
taken anew, as far as patience went.
Before anything is timed, outputs are compared with eager's (relative L2 error); a backend that is
wrong is not timed. Everything runs in `torch.inference_mode()`, with torch's number of threads, and
in fp32 but for the rows that say bf16.

*Raw OpenVINO* is what its best technique gives: the model reshaped to these very sizes, compiled
from a file for latency (for one thread where that is faster), inputs bound once, outputs left in
the request's own memory, where the next call overwrites them. ovshim takes any batch size and
inputs from any memory, checks on each call that the module is what it was, and hands out outputs
that belong to the caller.

`ovshim` is the default, `prefer="faster"`: a race decides whether OpenVINO or eager serves.
`prefer="openvino"` leaves out the race.
"""

_CALLS = """
## Calls
"""

_THROUGHPUT = """
## Throughput

Many items, one after the other, through a model compiled for throughput; *raw OpenVINO* is its
AsyncInferQueue here, over the same compiled model, outputs copied.
"""

_GENERATION = """
## generate()

New tokens after a prompt, one call of `generate()` each, greedy, of models with random weights; of
one token: what passes before the first.
"""

_OVERHEAD = """
## Overhead of a call

`fast(x)` beside a bare `infer` of the very model that it runs.
"""

_COLD = """
## Cold start

Seconds in a new process that has loaded torch and the model, with everything cached: importing,
getting ready (raw OpenVINO: `compile_model(path)`; ovshim: `accelerate`, which reads and checks the
cache, hashes the weights, compiles and proves), and the first call. Some of ovshim's own import is
done while OpenVINO compiles, and counts as getting ready; so does its import of OpenVINO. The last
column but one compares with `compile_model(path)` and the first call alone, as if whoever calls
OpenVINO had imported it before. The first call is of the example: OpenVINO has computed its answer
for the proof, and it is handed over. Another input costs a call. Without an example the first call
has eager's answer while OpenVINO begins to compile, and the second goes on with the plan. With
`background=True` the first call is eager's too, and all the rest is done beside the calls after it.
Of both the last column says when OpenVINO has answered one of these, made without a break. Medians;
processes of all ways in turns.
"""

_BUILD = """
## Cold build

Seconds in a new process that has loaded torch and the model, with nothing cached. *By hand* are the
steps that no build can leave out, each called directly: torch's capture by Dynamo and a trace of
its graph, OpenVINO's PyTorch frontend, `compile_model` of what that gave; the imports of all three
are in. ovshim's further work: imports, the fingerprint, two calls of eager that are watched.
Writing the graph to the cache is in its capture. Proof and race are shown apart; they end at
`max_build_seconds`. Medians; processes of both ways in turns.
"""


def page(
    found: Sequence[Row],
    cold: Sequence[Sequence[str]],
    built: Sequence[Sequence[str]],
    load: float,
) -> str:
    """The whole page.

    Args:
        cold, built: rows of cold starts and of builds.
        load: the share of the processors that other programs took before the run.
    """
    many = [row.cells() for row in found if row.group.startswith("throughput")]
    tokens = [row.cells() for row in found if row.group.startswith("generate")]
    rest = [row for row in found if not row.group.startswith(("throughput", "generate"))]
    calls = [row.cells() for row in rest if not row.overhead]
    overhead = [row.cells() for row in found if row.overhead]
    lines = [_TOP, *measured_on(found, load), _CALLS, *markdown(HEAD, calls)]
    lines += [_THROUGHPUT, *markdown(HEAD, many), _GENERATION, *markdown(HEAD, tokens)]
    lines += [_OVERHEAD, *markdown(HEAD, overhead), _COLD, *markdown(COLD_HEAD, cold)]
    lines += [_BUILD, *markdown(BUILD_HEAD, built)]
    return "\n".join(lines) + "\n"


def measured_on(found: Sequence[Row], load: float) -> list[str]:
    """The table of hardware, versions and noise.

    Args:
        load: see `page`.
    """
    facts = [*facts_of(load), ("eager against itself, whole run", _noise(found))]
    return [*busy(load), *markdown(("measured on", ""), facts)]


def facts_of(load: float) -> list[tuple[str, str]]:
    """What stands on every page: hardware, versions, and the machine's load before the run."""
    others = ("taken by other programs before the run", f"{load:.0%} of the processors")
    return [*machine.describe(), ("date", dt.date.today().isoformat()), others]


def busy(load: float) -> list[str]:
    """A warning where the machine had other work."""
    if load <= quiet.BUSY_SHARE:
        return []
    return ["**The machine was busy while this was measured: the figures are worth little.**", ""]


def _noise(found: Sequence[Row]) -> str:
    """The least and the most that eager was as fast as itself."""
    ratios: list[Ratio] = [r.eager for r in found if r.eager and r.remark.startswith("noise")]
    low, high = min(r.median for r in ratios), max(r.median for r in ratios)
    return f"{low:.2f} to {high:.2f}"
