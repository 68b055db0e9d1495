"""Things given on the command line by name: `pkg.module:function`."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

__all__ = ["add_example", "add_module", "named"]


def add_module(command: argparse.ArgumentParser) -> None:
    """The argument that names a module."""
    command.add_argument(
        "module",
        metavar="pkg.module:factory",
        type=named,
        help="called without arguments, gives the torch.nn.Module, in evaluation mode",
    )


def add_example(command: argparse.ArgumentParser, *, several: bool = False) -> None:
    """The argument that names an example of a call; with `several` it may come more than once."""
    command.add_argument(
        "--example",
        metavar="pkg.module:function",
        type=named,
        required=True,
        action="append" if several else "store",
        help="called without arguments, gives the arguments of a call: a tensor, a tuple "
        f"(positional) or a mapping (keywords){'; may be given more than once' if several else ''}",
    )


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
