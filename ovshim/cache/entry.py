"""One entry: what is in its directory, and whether that is as it was written."""

from __future__ import annotations

import logging
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from ovshim.cache import files

SCHEMA = 1
MANIFEST, MARKER, DETAILS = "manifest.json", "in-use", "fingerprint.json"
OURS = frozenset({"schema", "family", "variant", "created", "files"})

_log = logging.getLogger("ovshim")

_HEX = re.compile(r"[0-9a-f]{1,64}")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,120}")


class Foreign(Exception):
    """An entry of another schema: not ours to judge, and not ours to move away."""


@dataclass(frozen=True)
class Entry:
    """One directory of the store, every byte of it checked when this object was made.

    `manifest` holds `schema`, `family`, `variant`, `created` (seconds since 1970), `files`
    (name to `{"size": bytes, "xxh3": 32 hex digits}`) and the sections its publisher gave.
    """

    path: Path
    family: str
    variant: str
    manifest: Mapping[str, Any]

    def file(self, name: str) -> Path:
        """Where a file of the entry lies. `KeyError` for one that the manifest does not name."""
        if name not in self.manifest["files"]:
            raise KeyError(name)
        return self.path / name


def is_key(name: str) -> bool:
    """Whether a family or variant may be called so: lower-case hexadecimal, up to 64 digits."""
    return _HEX.fullmatch(name) is not None


def check_key(*names: str) -> None:
    """`ValueError` for what `is_key` denies."""
    for name in names:
        if not is_key(name):
            raise ValueError(f"{name!r} is no key: lower-case hexadecimal, up to 64 digits")


def complete(directory: Path, head: dict[str, Any]) -> dict[str, Any]:
    """Adds marker and manifest to a directory of plain files; then all of it is on the disk.

    Returns the manifest. `ValueError` for a subdirectory, a link or an odd name among the files.
    """
    sealed = files.seal({**head, "files": listed(directory)})
    files.write_new(directory / MARKER, b"")
    files.write_new(directory / MANIFEST, sealed)
    files.sync(directory)
    return files.unseal(sealed)  # as the next reader will see it: lists for tuples


def read(path: Path, unread: str | None = None) -> Entry:
    """The entry in a directory, all of its files read; of `unread` only the size.

    `ValueError` or `FileNotFoundError` for a damaged one, `Foreign` for another schema.
    """
    manifest = _manifest(path)
    check(path, manifest.get("files"), unread)
    return Entry(path, path.parent.name, path.name, manifest)


def read_one(path: Path, name: str) -> bytes:
    """One file of the entry in a directory; its others are not looked at.

    `ValueError` or `FileNotFoundError` for a damaged one, `Foreign` for another schema.
    """
    expected = _manifest(path).get("files")
    record = expected.get(name) if isinstance(expected, dict) else None
    _check_file(name)
    with os.fdopen(files.open_regular(path / name), "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        # What is much too large is not read.
        data = file.read() if isinstance(record, dict) and record.get("size") == size else b""
    if record != {"size": len(data), "xxh3": xxhash.xxh3_128_hexdigest(data)}:
        raise ValueError(f"{name} does not match its checksum")
    return data


def _manifest(path: Path) -> dict[str, Any]:
    if not stat.S_ISDIR(os.lstat(path).st_mode):
        raise ValueError("it is no directory")
    # Without it nobody can hold the entry, and who makes it anew would find it in its place.
    files.size(path / MARKER)
    manifest = files.read_sealed(path / MANIFEST)
    if manifest.get("schema") != SCHEMA:
        raise Foreign(f"{path} has schema {manifest.get('schema')!r}")
    names = (manifest.get("family"), manifest.get("variant"))
    if names != (path.parent.name, path.name):
        raise ValueError(f"its manifest belongs to {names}")
    if not isinstance(manifest.get("created"), float):
        raise ValueError("its manifest is incomplete")
    return manifest


def listed(directory: Path) -> dict[str, Any]:
    """Size and checksum of every file in a directory, by name; all of them are on the disk then.

    `ValueError` for a subdirectory, a link or an odd name among them.
    """
    found: dict[str, Any] = {}
    for name in sorted(os.listdir(directory)):
        _check_file(name)
        files.sync(directory / name)
        size, digest = files.checksum(directory / name)
        found[name] = {"size": size, "xxh3": digest}
    return found


def check(directory: Path, expected: Any, unread: str | None = None) -> None:
    """`ValueError` or `FileNotFoundError` unless a directory's files are as `listed` found them;
    `unread`, as far as its size tells."""
    if not isinstance(expected, dict):
        raise ValueError("its manifest is incomplete")
    for name, record in expected.items():
        _check_file(name)
        if name == unread and isinstance(record, dict):
            same = files.size(directory / name) == record.get("size")
        else:
            size, digest = files.checksum(directory / name)
            same = record == {"size": size, "xxh3": digest}
        if not same:
            raise ValueError(f"{name} does not match its checksum")


def write_details(directory: Path, details: Mapping[str, Mapping[str, str]]) -> None:
    """Puts into an entry, before it is complete, what two fingerprints are compared by: digests by
    part and place. A file of its own: manifests are parsed by every hit, this one by nobody."""
    files.write_new(directory / DETAILS, files.seal(details))


def read_details(directory: Path) -> dict[str, dict[str, str]]:
    """What `write_details` wrote; empty for an entry that has none, or none that can be read."""
    try:
        found = files.read_sealed(directory / DETAILS)
    except (OSError, ValueError) as error:
        _log.debug("no details of %s: %s", directory, error)
        return {}
    return {
        part: {str(place): str(digest) for place, digest in places.items()}
        for part, places in found.items()
        if isinstance(places, dict)
    }


def _check_file(name: str) -> None:
    if not _NAME.fullmatch(name) or name in (MANIFEST, MARKER):
        raise ValueError(f"no file may be called {name!r}")
