"""`ovshim explain`: the dry run of `ovshim.explain(module, example)` for a module given by name."""

from __future__ import annotations

import argparse

import ovshim
from ovshim.cli.named import add_arguments, show

__all__ = ["add"]


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the parser."""
    command = commands.add_parser(
        "explain",
        help="say how a module would be served",
        description="Build a module's plan without caching it, and say how calls like the example "
        "would be served: by OpenVINO or by eager, why, how exactly and how fast.",
    )
    add_arguments(command)
    command.set_defaults(run=run)


def run(chosen: argparse.Namespace) -> int:
    report = ovshim.explain(
        chosen.module(), chosen.example(), device=chosen.device, precision=chosen.precision
    )
    show(report, chosen)
    return 0
