"""The command line: `ovshim cache`, `demo`, `devices`, `explain`, `warm`.

A command parses, calls the library and prints; nothing can be done here that cannot be done in
Python. Exit codes: 0; 1 when what was asked for did not come out; 2 when it could not be asked for
(a wrong argument, a missing package).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import ovshim
from ovshim.cli import cache, demo, devices, explain, warm

__all__ = ["main", "parser"]

_COMMANDS = (cache, demo, devices, explain, warm)


def parser() -> argparse.ArgumentParser:
    """The parser of all commands; `run` in what it returns is the function of the one chosen."""
    top = argparse.ArgumentParser(
        prog="ovshim", description="Run PyTorch modules through OpenVINO, proved against eager."
    )
    top.add_argument("--version", action="version", version=f"ovshim {ovshim.__version__}")
    commands = top.add_subparsers(title="commands", metavar="command", required=True)
    for command in _COMMANDS:
        command.add(commands)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; `arguments` None: those of the process."""
    chosen = parser().parse_args(arguments)
    try:
        code: int = chosen.run(chosen)
    except ovshim.OvshimError as error:
        print(f"ovshim: {error}", file=sys.stderr)
        return 2 if isinstance(error, ovshim.OptionError) else 1
    return code
