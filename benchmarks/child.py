"""A script of ours in a process of its own, which prints what it found as one line of JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ovshim

__all__ = ["run"]


def run(script: str, arguments: Sequence[str], directory: Path) -> dict[str, Any]:
    """What a script of this directory finds.

    Args:
        directory: where Python keeps what it compiles.
    """
    # A checkout on pytest's own path is not on that of a child.
    paths = [str(Path(ovshim.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    # Compiled by Python once, as what is installed is, wherever it lies.
    environment = {**os.environ, "PYTHONPYCACHEPREFIX": str(directory / "bytecode")}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    path = str(Path(__file__).with_name(script))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", path, *arguments],
        env={**environment, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found
