"""Where the store is, how large it may get, and whether it may be used."""

from __future__ import annotations

import logging
import os
import stat
import sys
from pathlib import Path

import platformdirs

from ovshim.cache import files

__all__ = ["MAX_SIZE", "directory_of", "largest", "usable"]

MAX_SIZE = 10 * 10**9  # bytes

_log = logging.getLogger("ovshim")


def largest() -> int:
    """The bytes that `OVSHIM_CACHE_MAX_SIZE` allows, or 10 GB."""
    text = os.environ.get("OVSHIM_CACHE_MAX_SIZE", "").strip()
    try:
        return files.parse_size(text) if text else MAX_SIZE
    except ValueError as error:
        _log.warning("OVSHIM_CACHE_MAX_SIZE is ignored: %s", error)
        return MAX_SIZE


def directory_of(directory: str | os.PathLike[str] | None) -> Path:
    """The directory that was named, by the environment or by nobody. Raises RuntimeError where
    there is no home to put it."""
    if directory is None:
        directory = os.environ.get("OVSHIM_CACHE_DIR") or None
    path = Path(platformdirs.user_cache_dir("ovshim") if directory is None else directory)
    try:
        return path.expanduser().absolute()
    except RuntimeError as error:
        raise RuntimeError(f"{error} OVSHIM_CACHE_DIR names another place.") from error


def usable(path: Path) -> Path:
    """The directory, made where there was none. Raises OSError where it cannot be used, or should
    not be."""
    os.makedirs(path, mode=0o700, exist_ok=True)
    root = path.resolve()
    for directory in (root, root / "v1"):
        directory.mkdir(mode=0o700, exist_ok=True)
        os.listdir(directory)
        _refuse_strangers(directory)
    return root


def _refuse_strangers(directory: Path) -> None:
    """Raises `PermissionError` where another user could plant an entry, and nobody has said that
    those who can are trusted."""
    if sys.platform == "win32" or os.environ.get("OVSHIM_CACHE_SHARED", "").strip() == "1":
        return
    found = directory.stat()
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(f"others can write to {directory}; remedy: chmod go-w {directory}")
    if found.st_uid not in (0, os.geteuid()):
        raise PermissionError(f"{directory} is another user's; OVSHIM_CACHE_DIR names another")
