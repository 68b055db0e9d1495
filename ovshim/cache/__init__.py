"""The cache: directories of files that many processes share for years.

For operators: `info`, `entries`, `verify`, `prune`, `clear` and `why_miss`. What the rest of the
package uses is `Store`:

    <root>/v1/<family>/<variant>/   model.xml, model.bin, ..., manifest.json, in-use
    <root>/v1/locks/                lock files
    <root>/v1/tmp/                  what is being written
    <root>/v1/quarantine/           what was found damaged

An entry appears by one rename and is never written to again, but for its manifest, which is
replaced by one rename. So locks only save work: without any, two processes do the same work and
one result wins. Nothing is served whose seal, sizes or checksums do not match. JSON only: a
pickle from a shared directory would run what others wrote.

    OSError
      StoreError    the entry could not be written; nothing of it is left behind
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ovshim.cache.admin import (
        Difference,
        EntryInfo,
        Info,
        Removed,
        Verification,
        clear,
        entries,
        info,
        prune,
        verify,
        why_miss,
    )
from ovshim.cache.entry import Entry
from ovshim.cache.files import Lease
from ovshim.cache.store import Store, StoreError
from ovshim.lazy import attach

__all__ = [
    "Difference",
    "Entry",
    "EntryInfo",
    "Info",
    "Lease",
    "Removed",
    "Store",
    "StoreError",
    "Verification",
    "clear",
    "entries",
    "info",
    "prune",
    "verify",
    "why_miss",
]

if not TYPE_CHECKING:  # type checkers would take every misspelt name for one of these
    # What is for operators: a program that only runs a module does without.
    __getattr__, __dir__ = attach(globals(), dict.fromkeys(__all__, "admin"))
