"""Which entry was used last for a module that looks like this one: a guess, so that it can be
compiled while the fingerprint is made that says whether it is the right one."""

from __future__ import annotations

import contextlib
import logging
import os
from pathlib import Path

from ovshim.cache import files, upkeep
from ovshim.cache.entry import Entry, check_key

__all__ = ["find", "keep"]

_log = logging.getLogger("ovshim")


def keep(room: Path, key: str, entry: Entry) -> None:
    """Note under a key which entry was used last; a failure is logged."""
    check_key(key)
    name = f"{entry.family}/{entry.variant}"
    with contextlib.suppress(OSError, ValueError):
        if files.read_sealed(room / "hints" / key).get("entry") == name:
            return
    upkeep.attempt("keep a hint", lambda: _write(room, key, name))


def _write(room: Path, key: str, name: str) -> None:
    (room / "hints").mkdir(mode=0o700, exist_ok=True)
    temporary = upkeep.temporary(room)
    try:
        # Not synced: what a power cut tears is no hint.
        (temporary / key).write_bytes(files.seal({"entry": name}))
        os.replace(temporary / key, room / "hints" / key)
    finally:
        upkeep.erase(temporary)


def find(room: Path, key: str) -> Path | None:
    """Where the entry lies that was noted under a key, if it is there still."""
    check_key(key)
    hint = room / "hints" / key
    try:
        family, _, variant = files.read_sealed(hint)["entry"].partition("/")
        check_key(family, variant)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, AttributeError) as error:
        _log.debug("%s: %s", hint, error)
        return None
    path = room / str(family) / str(variant)
    if not path.is_dir():
        upkeep.erase(hint)
        return None
    return path
