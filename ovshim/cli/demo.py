"""`ovshim demo`: train, accelerate, classify, and say what was gained and what it cost."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

import ovshim
from ovshim.options import enabled_in_environment
from ovshim.properties import check_placement
from ovshim.race import race
from ovshim.reasons import reason
from ovshim.report import Report

if TYPE_CHECKING:
    from torch import nn

    from ovshim.cli.digits import Glyphs

__all__ = ["add"]

BATCHES = (1, 64, 256)
_NO_SKLEARN = (
    "ovshim: the demo classifies scikit-learn's handwritten digits, and scikit-learn is not "
    'installed.\nInstall it with: pip install "ovshim[demo]"'
)
# What timing one batch size may take.
_SECONDS_PER_BATCH_SIZE = 1.0


@dataclass(frozen=True)
class Row:
    """What was found at one batch size. Times in seconds a batch."""

    batch: int
    right_eager: int
    right: int
    disagreements: int
    error: float
    seconds_eager: float
    seconds: float


@dataclass(frozen=True)
class FirstCall:
    """A first call with everything before it: accelerate, build, answer.

    Attributes:
        cache: "hit", "miss" or "off"; entry: where it lies, or None.
        first: whether it is the first of this process, which also loads OpenVINO.
    """

    seconds: float
    cache: str
    entry: str | None
    first: bool


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the parser."""
    command = commands.add_parser(
        "demo",
        help="train a small network on handwritten digits and compare it with eager",
        description="Train a small convolutional network on scikit-learn's digits for some "
        "seconds, accelerate it, classify the held-out glyphs, and print what came out. Run it "
        "twice: the second run finds the converted network in the cache.",
    )
    command.add_argument(
        "--device", default="CPU", help="as `ovshim devices` names it (%(default)s)"
    )
    command.add_argument("--precision", default="fp32", help="fp32, bf16 or fp16 (%(default)s)")
    command.add_argument("--seed", type=int, default=0, help="for data and training (%(default)s)")
    command.add_argument(
        "--progress",
        action=argparse.BooleanOptionalAction,
        help="show a bar while training (on a terminal)",
    )
    command.set_defaults(run=run)


def run(chosen: argparse.Namespace) -> int:
    """0; 1 where OpenVINO did not serve every call or, in fp32, a glyph was classified otherwise
    than by eager; 2 without scikit-learn."""
    if not enabled_in_environment():
        raise ovshim.FallbackError(reason("off"))
    # Checked before the training, which takes longer than a mistake in an option should.
    options = ovshim.Options(
        device=chosen.device, precision=chosen.precision, prefer="openvino", strict=True
    )
    check_placement(options)
    from ovshim.cli import digits

    try:
        seen, held = digits.glyphs(chosen.seed)
    except ImportError:
        print(_NO_SKLEARN, file=sys.stderr)
        return 2
    started = time.perf_counter()
    net = digits.train(seen, chosen.seed, chosen.progress)
    print(
        f"A network of {sum(p.numel() for p in net.parameters()):,} parameters, trained on "
        f"{len(seen)} glyphs for {time.perf_counter() - started:.1f} s (seed {chosen.seed})."
    )
    with torch.inference_mode():
        fast, first_calls = _first_calls(net, held, options)
        fast.ovshim.reset_stats()  # type: ignore[operator, union-attr]
        rows = [_row(net, fast, held, batch) for batch in BATCHES]
    report = ovshim.explain(fast)
    _print_rows(rows, len(held), report)
    _print_first_calls(first_calls)
    return _verdict(rows, report)


def _first_calls(
    net: nn.Module, held: Glyphs, options: ovshim.Options
) -> tuple[nn.Module, list[FirstCall]]:
    """The accelerated network, and what its first call took with the cache as it was found, then
    that of a fresh twin with the cache in the other state."""
    example = held.images[:1]
    fast, found = _first_call(net, example, options, first=True)
    if found.cache == "hit":
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as empty:
            elsewhere = dataclasses.replace(options, cache_dir=empty)
            _, other = _first_call(net, example, elsewhere, first=False)
    elif found.cache == "miss":
        _, other = _first_call(net, example, options, first=False)
    else:
        return fast, [found]
    return fast, [found, other]


def _first_call(
    net: nn.Module, example: torch.Tensor, options: ovshim.Options, first: bool
) -> tuple[nn.Module, FirstCall]:
    started = time.perf_counter()
    fast = ovshim.accelerate(net, example, options=options)
    fast(example)
    seconds = time.perf_counter() - started
    plan = ovshim.explain(fast).to_dict()["plans"][0]
    return fast, FirstCall(seconds, plan["cache"], plan["cache_path"], first)


def _row(net: nn.Module, fast: nn.Module, held: Glyphs, batch: int) -> Row:
    """Every held-out glyph by both, in batches; the last one may be smaller."""
    right_eager = right = disagreements = 0
    error = 0.0
    batches = zip(torch.split(held.images, batch), torch.split(held.labels, batch), strict=True)
    for images, labels in batches:
        expected, answer = net(images), fast(images)
        right_eager += int((expected.argmax(1) == labels).sum())
        right += int((answer.argmax(1) == labels).sum())
        disagreements += int((answer.argmax(1) != expected.argmax(1)).sum())
        error = max(error, float((answer - expected).norm() / expected.norm()))
    whole = held.images[:batch]
    finish = race(lambda: net(whole), lambda: fast(whole), _SECONDS_PER_BATCH_SIZE)
    return Row(batch, right_eager, right, disagreements, error, finish.eager, finish.candidate)


def _print_rows(rows: list[Row], count: int, report: Report) -> None:
    plans = report.to_dict()["plans"]
    runs = ", ".join(sorted({str(plan["precision_run"]) for plan in plans}))
    print(
        f"\n{count} held-out glyphs on {report.device}; asked for {report.precision}, OpenVINO "
        f"runs {runs}. Medians of interleaved rounds.\n\n"
        "            accuracy           dis-       largest     ms per batch\n"
        "  batch   eager  ovshim   agreements   rel. error    eager  ovshim   ratio"
    )
    for row in rows:
        accuracy = f"{row.right_eager / count:7.2%} {row.right / count:7.2%}"
        times = f"{row.seconds_eager * 1e3:8.3f} {row.seconds * 1e3:7.3f}"
        ratio = row.seconds_eager / row.seconds
        lost = "" if ratio >= 1 else "  eager is faster"
        print(
            f"{row.batch:7} {accuracy} {row.disagreements:12} {row.error:12.1e} {times} "
            f"{ratio:6.2f}x{lost}"
        )


def _print_first_calls(calls: list[FirstCall]) -> None:
    found = calls[0]
    print("\nfirst call, from accelerate() to its answer:")
    for call in sorted(calls, key=lambda call: call.cache == "hit"):
        how = "from the cache  " if call.cache == "hit" else "nothing cached  "
        what = "the first of this process: loads OpenVINO too"
        if not call.first:
            what = "a fresh twin, " + (
                "the same cache" if call.cache == "hit" else "an empty cache"
            )
        print(f"  {how}{call.seconds:7.2f} s  ({what})")
    said = {
        "hit": "hit: an earlier run converted this network",
        "miss": "miss: this run converted the network; run the demo again for a hit",
        "off": "off: OVSHIM_CACHE_DIR=directory names one that can be used",
    }
    print(f"cache {said[found.cache]}")
    if found.entry is not None:
        print(f"entry {found.entry}")


def _verdict(rows: list[Row], report: Report) -> int:
    calls: dict[str, Any] = dict(report.calls)
    elsewhere = sum(calls.values()) - calls["openvino"]
    if elsewhere or not calls["openvino"]:
        print(f"\nOpenVINO did not serve every call:\n{report}", file=sys.stderr)
        return 1
    print(f"OpenVINO served all {calls['openvino']} calls.")
    if report.precision == "fp32" and any(row.disagreements for row in rows):
        print("\nIn fp32 no glyph may be classified otherwise than by eager.", file=sys.stderr)
        return 1
    return 0
