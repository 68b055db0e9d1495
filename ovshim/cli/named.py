"""Modules and examples that commands are given by name: `pkg.module:function`."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from collections.abc import Callable
from typing import Any

from ovshim.report import Report

__all__ = ["add_arguments", "named", "show"]


def add_arguments(command: argparse.ArgumentParser, *, several: bool = False) -> None:
    """The arguments that name a module and an example of a call (with `several`, one or more), and
    say how it is to be built and told of."""
    command.add_argument(
        "module",
        metavar="pkg.module:factory",
        type=named,
        help="called without arguments, gives the torch.nn.Module, in evaluation mode",
    )
    command.add_argument(
        "--example",
        metavar="pkg.module:function",
        type=named,
        required=True,
        action="append" if several else "store",
        help="called without arguments, gives the arguments of a call: a tensor, a tuple "
        f"(positional) or a mapping (keywords){'; may be given more than once' if several else ''}",
    )
    command.add_argument(
        "--device", default="CPU", help="as `ovshim devices` names it (%(default)s)"
    )
    command.add_argument("--precision", help="fp32, bf16 or fp16 (the module's own)")
    command.add_argument("--json", action="store_true", help="print explain(...).to_dict() instead")


def show(report: Report, chosen: argparse.Namespace) -> None:
    """Print a report, as was chosen."""
    print(json.dumps(report.to_dict(), indent=2) if chosen.json else report)


def named(text: str) -> Callable[[], Any]:
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
