"""The version of the package, in what users are told; in keys of the cache with what it was built
of, for between two versions there are states that convert otherwise."""

from __future__ import annotations

import functools
import hashlib
import pkgutil
from pathlib import Path

__all__ = ["WRITTEN", "__version__", "exact_version", "sources_of"]

__version__ = "0.1.0"

WRITTEN = "built_of.txt"
"""What a wheel brings, so that nobody has to read its sources: see `hatch_build`."""


def sources_of(package: Path) -> str:
    """A digest of the Python files below a directory, and of their names."""
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package).as_posix()}\n".encode())
        digest.update(hashlib.blake2b(path.read_bytes()).digest())
    return digest.hexdigest()


@functools.cache
def exact_version() -> str:
    """`0.1.0+0123456789abcdef`: the version, and a digest of the sources."""
    package = Path(__file__).parent
    try:
        # By the loader, which reads out of a zip file as well.
        written = pkgutil.get_data(__package__, WRITTEN)
    except OSError:
        written = None
    # In a checkout they are read: 10 ms.
    sources = sources_of(package) if written is None else written.decode("ascii")
    return f"{__version__}+{sources}"
