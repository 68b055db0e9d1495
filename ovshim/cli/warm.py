"""`ovshim warm`: fill a cache before anybody waits for it, as in the build of an image."""

from __future__ import annotations

import argparse
import warnings

import ovshim
from ovshim.cli.named import add_arguments, show

__all__ = ["add"]


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the parser."""
    command = commands.add_parser(
        "warm",
        help="convert a module into the cache",
        description="Convert a module for calls like the examples, prove it and keep it in the "
        "cache, so that no later process has to. The cache may be mounted read-only afterwards. "
        "Exit code 1 where something is not in the cache at the end; the report says why.",
    )
    add_arguments(command, several=True)
    command.add_argument("--cache-dir", metavar="DIR", help="the cache (OVSHIM_CACHE_DIR)")
    command.set_defaults(run=run)


def run(chosen: argparse.Namespace) -> int:
    with warnings.catch_warnings():
        # The report says the same.
        warnings.simplefilter("ignore", ovshim.OvshimWarning)
        fast = ovshim.accelerate(
            chosen.module(),
            device=chosen.device,
            precision=chosen.precision,
            cache_dir=chosen.cache_dir,
        )
        for example in chosen.example:
            fast.ovshim.warm(example())
    report = ovshim.explain(fast)
    show(report, chosen)
    # A plan that eager serves because it is faster here is in the cache: elsewhere it may win.
    kept = [plan["cache_path"] is not None and plan["error"] is not None for plan in report.plans]
    return 0 if kept and all(kept) else 1
