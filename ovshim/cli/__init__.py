"""The command line: `ovshim demo`, `ovshim devices`, `ovshim explain`, `ovshim run`.

A command parses, calls the library and prints; nothing can be done here that cannot be done in
Python. Exit codes: 0; 1 when what was asked for did not come out; 2 when it could not be asked for
(a wrong argument, a missing package); of `run`, the program's own.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

import ovshim

__all__ = ["main", "parser"]

_COMMANDS = ("demo", "devices", "explain", "run")


def parser(names: Sequence[str] = _COMMANDS) -> argparse.ArgumentParser:
    """The parser of these commands; `run` in what it returns is the function of the one chosen."""
    top = argparse.ArgumentParser(
        prog="ovshim", description="Run PyTorch modules through OpenVINO, proved against eager."
    )
    top.add_argument("--version", action="version", version=f"ovshim {ovshim.__version__}")
    commands = top.add_subparsers(title="commands", metavar="command", required=True)
    for name in names:
        importlib.import_module(f"ovshim.cli.{name}").add(commands)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; `arguments` None: those of the process."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["run"]:
        return _run(arguments[1:])
    chosen = parser().parse_args(arguments)
    try:
        code: int = chosen.run(chosen)
    except ovshim.OvshimError as error:
        return _told(error)
    return code


def _run(arguments: Sequence[str]) -> int:
    """`ovshim run`: what stands after the script's name is not for us to parse."""
    from ovshim.cli import run

    own, scripts = run.split(arguments)
    chosen = parser(["run"]).parse_args(["run", *own])
    chosen.arguments = scripts
    try:
        run.prepare(chosen)
    except ovshim.OvshimError as error:
        return _told(error)
    return run.run(chosen)


def _told(error: ovshim.OvshimError) -> int:
    print(f"ovshim: {error}", file=sys.stderr)
    return 2 if isinstance(error, ovshim.OptionError) else 1
