"""`ovshim explain`: the dry run of `ovshim.explain(module, example)` for a module given by name."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from collections.abc import Callable
from typing import Any

import ovshim

__all__ = ["add"]


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the parser."""
    command = commands.add_parser(
        "explain",
        help="say how a module would be served",
        description="Build a module's plan without caching it, and say how calls like the example "
        "would be served: by OpenVINO or by eager, why, how exactly and how fast.",
    )
    command.add_argument(
        "module",
        metavar="pkg.module:factory",
        type=_named,
        help="called without arguments, gives the torch.nn.Module, in evaluation mode",
    )
    command.add_argument(
        "--example",
        metavar="pkg.module:function",
        type=_named,
        required=True,
        help="called without arguments, gives the arguments of a call: a tensor, a tuple "
        "(positional) or a mapping (keywords)",
    )
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


def _named(text: str) -> Callable[[], Any]:
    """What `pkg.module:function` names. An exception raised by the module itself goes through."""
    module_name, colon, name = text.partition(":")
    if not (module_name and colon and name):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form pkg.module:function")
    if os.getcwd() not in sys.path:
        # As for `python -m`: what lies in the current directory can be named.
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from error
    found = getattr(module, name, None)
    if not callable(found):
        raise argparse.ArgumentTypeError(f"{module_name} has no function {name!r}")
    return found  # type: ignore[no-any-return]
