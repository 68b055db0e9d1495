"""What the store asks of a file system: checksums, sealed records, durable writes, leases.

Everything here raises `OSError` as the system gave it, and `ValueError` for content that is not
what it should be; what a failure means is for `ovshim.cache` to decide.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import stat
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import xxhash

if sys.platform != "win32":
    import fcntl
    import resource

_log = logging.getLogger("ovshim")

_CHUNK = 1 << 20  # fits the second-level cache: 17 GB/s, against 29 GB/s of a memory map
_SEALED_MAX = 16 << 20  # bytes; a record is some kilobytes
_HEAD = b'{"seal": "%s",\n"record": '
_TAIL = b"}\n"
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
          "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}  # fmt: skip


def parse_size(text: str) -> int:
    """Bytes meant by `"500MB"`, `"1.5 GiB"` or `"1000000"`. `ValueError` for anything else."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?B)?\s*", text.upper())
    if found is None or (found[2] or "") not in _UNITS:
        raise ValueError(f"{text!r} is no size; write a number of bytes, or 500MB, 10GB, 2GiB")
    return int(float(found[1]) * _UNITS[found[2] or ""])


def open_regular(path: Path) -> int:
    """A descriptor for reading `path`, which must be a regular file and no link.

    Raises `ValueError` where it is something else: a link could lead out of the store, and a
    named pipe would block for ever.
    """
    if not stat.S_ISREG(os.lstat(path).st_mode):
        raise ValueError(f"{path.name} is no regular file")
    flags = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NOFOLLOW", 0)
    return os.open(path, flags | getattr(os, "O_CLOEXEC", 0))


def size(path: Path) -> int:
    """Size in bytes of a regular file."""
    found = os.lstat(path)
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"{path.name} is no regular file")
    return found.st_size


def checksum(path: Path) -> tuple[int, str]:
    """Size in bytes and xxh3_128 (32 hex digits) of a regular file.

    Read, not mapped: a file that another process cuts short, or a disk that fails, is an error
    here, and with a map it would be a SIGBUS that ends the user's process.
    """
    digest, size = xxhash.xxh3_128(), 0
    buffer = bytearray(_CHUNK)
    view = memoryview(buffer)
    with os.fdopen(open_regular(path), "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(view[:count])
            size += count
    return size, digest.hexdigest()


def seal(record: Mapping[str, Any]) -> bytes:
    """`record` as JSON that carries a checksum of its own bytes.

    `ValueError` or `TypeError` for what JSON has no form for, NaN included.
    """
    body = json.dumps(record, indent=1, sort_keys=True, allow_nan=False).encode()
    return _HEAD % xxhash.xxh3_128(body).hexdigest().encode() + body + _TAIL


def unseal(data: bytes) -> dict[str, Any]:
    """The record that `seal` wrote. `ValueError` for any byte that is not as it was written."""
    start = len(_HEAD) - 2 + 32
    body = data[start : -len(_TAIL)]
    if data != _HEAD % xxhash.xxh3_128(body).hexdigest().encode() + body + _TAIL:
        raise ValueError("the seal does not match")
    try:
        record = json.loads(body)
    except RecursionError as error:  # the seal is no signature: anyone can write one
        raise ValueError("nested too deeply") from error
    if not isinstance(record, dict):
        raise ValueError("the record is no object")
    return record


def read_sealed(path: Path) -> dict[str, Any]:
    """The record in a file. `ValueError` where it is damaged, `OSError` where it cannot be read."""
    with os.fdopen(open_regular(path), "rb") as file:
        data = file.read(_SEALED_MAX + 1)
    if len(data) > _SEALED_MAX:
        raise ValueError(f"over {_SEALED_MAX} bytes")
    return unseal(data)


def write_new(path: Path, data: bytes) -> None:
    """Writes a file that does not exist yet and waits until the disk has it."""
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync(path: Path) -> None:
    """Waits until a file, or the names in a directory, are on the disk.

    For a file this is also where a network file system says that its disk is full. Windows
    opens no directories, and some file systems refuse to sync one; checksums find what a power
    cut then tears, so only a file's own failure counts.
    """
    directory = path.is_dir()
    if directory and sys.platform == "win32":
        return
    # Windows flushes only what is open for writing.
    fd = os.open(path, os.O_RDONLY if directory else os.O_RDWR)
    try:
        os.fsync(fd)
    except OSError as error:
        if not directory or error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
        _log.debug("%s cannot be synced: %s", path, error)
    finally:
        os.close(fd)


class Lease:
    """A claim on a directory's `marker` file: while one process has it, nobody may `claim` it.

    A shared `flock`, so it ends with the process however that dies. Windows has no shared locks
    in Python, and needs none: a directory with an open file in it cannot be renamed there.
    """

    __slots__ = ("_fd",)

    def __init__(self, fd: int) -> None:
        self._fd = fd

    @classmethod
    def take(cls, marker: Path) -> Lease | None:
        """A lease; None when the marker is gone or claimed by who is about to remove it.

        Raises `OSError` where the marker cannot be opened. Where locks do not work the lease is
        given all the same: `claim` fails there too, so nothing is removed.
        """
        try:
            fd = open_regular(marker)
        except FileNotFoundError:
            return None
        lease = cls(fd)
        if sys.platform != "win32":
            try:
                fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                lease.release()
                return None
            except (OSError, NotImplementedError) as error:
                _log.debug("no lock on %s: %s", marker, error)
        if not _same(fd, marker):  # removed between open and flock
            lease.release()
            return None
        return lease

    @property
    def is_dear(self) -> bool:
        """Whether the program has half as many files open as it may have: descriptors are given by
        the lowest number that is free."""
        if sys.platform == "win32":
            return False
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        return limit != resource.RLIM_INFINITY and self._fd >= limit // 2

    def release(self) -> None:
        """Ends the claim; a second call does nothing."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            _close(fd)

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *exc: object) -> None:
        self.release()

    def __del__(self) -> None:
        self.release()


def _close(fd: int) -> None:
    try:
        os.close(fd)
    except OSError as error:  # it is closed all the same
        _log.debug("closing: %s", error)


def _same(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.lstat(path))
    except FileNotFoundError:
        return False


@contextmanager
def claim(marker: Path) -> Iterator[bool]:
    """True while nobody has a lease on `marker`, and nobody can get one.

    A missing marker is nobody's. False when it is leased, or when locks do not work: rather a
    store that grows than an entry removed under its reader.
    """
    if sys.platform == "win32":
        yield True
        return
    try:
        fd = os.open(marker, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        _log.debug("cannot claim %s: %s", marker, error)
        yield isinstance(error, FileNotFoundError)
        return
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            free = _same(fd, marker)
        except (OSError, NotImplementedError) as error:
            _log.debug("cannot claim %s: %s", marker, error)
            free = False
        yield free
    finally:
        _close(fd)
