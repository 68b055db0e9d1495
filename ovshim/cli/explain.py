"""`ovshim explain`: the dry run of `ovshim.explain(module, example)` for a module given by name."""

from __future__ import annotations

import argparse
import json

import ovshim
from ovshim.cli.named import add_example, add_module

__all__ = ["add"]


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the parser."""
    command = commands.add_parser(
        "explain",
        help="say how a module would be served",
        description="Build a module's plan without caching it, and say how calls like the example "
        "would be served: by OpenVINO or by eager, why, how exactly and how fast.",
    )
    add_module(command)
    add_example(command)
    command.add_argument(
        "--device", default="CPU", help="as `ovshim devices` names it (%(default)s)"
    )
    command.add_argument("--precision", help="fp32, bf16 or fp16 (the module's own)")
    command.add_argument("--json", action="store_true", help="print explain(...).to_dict() instead")
    command.set_defaults(run=run)


def run(chosen: argparse.Namespace) -> int:
    report = ovshim.explain(
        chosen.module(), chosen.example(), device=chosen.device, precision=chosen.precision
    )
    print(json.dumps(report.to_dict(), indent=2) if chosen.json else report)
    return 0
