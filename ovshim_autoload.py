"""What `import torch` calls when ovshim is installed, by the entry point `torch.backends`.

It stands outside of the package, so that nothing of it is loaded where nobody asked: torch calls
this in every process, and whatever is raised here makes `import torch` fail.
"""

import os

__all__ = ["start"]


def start() -> None:
    """Accelerate the program if the variable OVSHIM asks for it. Never raises."""
    if os.environ.get("OVSHIM", "").strip().lower() not in ("1", "on", "true", "yes"):
        return
    try:
        from ovshim.scope import program

        program.start()
    except Exception as error:
        _tell(f"ovshim: OVSHIM=1 has no effect: {type(error).__name__}: {error}")


def _tell(text: str) -> None:
    import sys

    try:
        sys.stderr.write(text + "\n")
    except Exception:  # no stderr, or a closed one
        return
