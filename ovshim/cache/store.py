"""`Store`: finding, publishing, amending and removing entries."""

from __future__ import annotations

import contextlib
import inspect
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import filelock

from ovshim.cache import files, hints, marks, upkeep
from ovshim.cache.entry import (
    MANIFEST,
    MARKER,
    OURS,
    SCHEMA,
    Entry,
    Foreign,
    check_key,
    complete,
    read,
    read_one,
)
from ovshim.cache.files import Lease
from ovshim.cache.place import directory_of, largest, usable
from ovshim.signals import raise_heard

_log = logging.getLogger("ovshim")

_AMEND_SECONDS = 5.0
# How often one who waits for a lock looks whether it should still wait.
_LOOK_UP_SECONDS = 0.5

# Without flock newer releases fall back to lock files that outlive their process; better none.
_HARD_ONLY: dict[str, Any] = (
    {"fallback_to_soft": False}
    if "fallback_to_soft" in inspect.signature(filelock.FileLock.__init__).parameters
    else {}
)


class StoreError(OSError):
    """An entry could not be written: full disk, no permission, no directory, a failing writer."""


class Store:
    """The entries under one directory. No method but `publish` fails: it logs and finds nothing.

    directory: None for `OVSHIM_CACHE_DIR` or the user's cache directory, False for no store.
    max_size: bytes; None for `OVSHIM_CACHE_MAX_SIZE` (`500MB`, `10GB`) or 10 GB.
    quiet: another object says what is wrong with the directory.

    Where the directory cannot be used the store is off: `enabled` is False, `root` None, and
    `problem` says why. A directory that can only be read serves what is in it.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str] | Literal[False] | None = None,
        *,
        max_size: int | None = None,
        quiet: bool = False,
    ) -> None:
        self.root: Path | None = None
        self.problem: str | None = None
        self.max_size = largest() if max_size is None else max_size
        self._said: set[str] = set()
        if directory is False:
            return
        try:
            self.root = usable(directory_of(directory))
        except (OSError, RuntimeError, ValueError) as error:  # ValueError: a NUL in the path
            self.problem = str(error)
            _log.log(logging.DEBUG if quiet else logging.WARNING, "the cache is off: %s", error)

    @property
    def enabled(self) -> bool:
        """Whether entries can be found at all."""
        return self.root is not None

    @contextmanager
    def lock(
        self, family: str, timeout: float, meanwhile: Callable[[], None] | None = None
    ) -> Iterator[bool]:
        """Holds the family's lock for the block: True. After `timeout` seconds without: False.

        False also where locks do not work. It serves to do a work once, nothing depends on it.
        Not re-entrant. `meanwhile` is called now and then while it waits; what it raises, this
        raises.
        """
        check_key(family)
        with self._locked(f"{family}.lock", timeout, meanwhile) as held:
            yield held

    @contextmanager
    def _locked(
        self, name: str, timeout: float, meanwhile: Callable[[], None] | None = None
    ) -> Iterator[bool]:
        held: filelock.BaseFileLock | None = None
        if self.root is not None:
            path = self._room / "locks" / name
            try:
                path.parent.mkdir(mode=0o700, exist_ok=True)
                lock = filelock.FileLock(path, thread_local=False, **_HARD_ONLY)
                _acquire(lock, timeout, meanwhile)
                held = lock
            except filelock.Timeout:
                _log.debug("somebody else holds %s", path)
            except (OSError, NotImplementedError) as error:
                self._once("lock", "locks do not work in %s: %s", self.root, error)
        try:
            yield held is not None
        finally:
            if held is not None:
                upkeep.attempt("unlock", held.release)

    @contextmanager
    def marked(self, family: str) -> Iterator[None]:
        """Lets others know, for the block, that this process builds the family."""
        check_key(family)
        with contextlib.ExitStack() as stack:
            if self.root is not None:
                stack.enter_context(marks.marked(self._room / "marks", family, **_HARD_ONLY))
            yield

    def died_building(self, family: str) -> bool:
        """Whether a process died while it built the family. Asked once: its mark goes."""
        check_key(family)
        if self.root is None:
            return False
        return marks.left_behind(self._room / "marks", family)

    def entries(self, family: str) -> list[Entry]:
        """The family's sound entries, newest first.

        Reads every byte of them. Damaged ones are moved into quarantine, with a log line; those
        of another schema, and those that cannot be read, are left alone and left out.
        """
        check_key(family)
        if self.root is None:
            return []
        found = [self.sound(path) for path in upkeep.children(self._room / family)]
        sound = [entry for entry in found if entry is not None]
        return sorted(sound, key=lambda e: (e.manifest["created"], e.variant), reverse=True)

    def hint(self, key: str, entry: Entry) -> None:
        """Keeps under a key which entry was used last."""
        if self.root is not None and os.access(self._room, os.W_OK):
            hints.keep(self._room, key, entry)

    def hinted(self, key: str) -> Path | None:
        """Where the entry lies that was used last under a key, if it is there still. It is not
        read: see `sound`."""
        return None if self.root is None else hints.find(self._room, key)

    def hold(self, entry: Entry) -> Lease | None:
        """Marks an entry as used now, and in use by this process until the lease is released.

        None when the entry is gone. Where nothing can be marked (read-only, no locks) a lease
        is given all the same; so it is where it would take a descriptor that the program may need
        more (a loaded graph outlives its files).
        """
        marker = entry.path / MARKER
        try:
            lease = Lease.take(marker)
        except (OSError, ValueError) as error:
            self._once("hold", "%s cannot be held: %s", marker, error)
            return Lease(-1)
        if lease is not None:
            # By path: Windows has no times by descriptor. Failing is usual, as in a read-only
            # store; the entry then only looks older than it is.
            upkeep.attempt("touch", lambda: os.utime(marker))
            if lease.is_dear:
                lease.release()
        return lease

    def publish(
        self,
        family: str,
        variant: str,
        write: Callable[[Path], None],
        manifest: Mapping[str, Any],
    ) -> Entry:
        """Makes an entry of the files that `write` puts into the directory it is given.

        Whoever publishes a variant first wins; the entry returned is the winner's. `manifest`
        holds sections of JSON values, none of them named as the store's own. Raises
        `StoreError` when the entry cannot be made, an exception of `write` as its cause.
        """
        check_key(family, variant)
        if OURS & manifest.keys():
            raise ValueError(f"reserved in a manifest: {sorted(OURS & manifest.keys())}")
        if self.root is None:
            raise StoreError(f"there is no cache: {self.problem or 'it is switched off'}")
        final = self._room / family / variant
        temporary: Path | None = None
        try:
            temporary = upkeep.temporary(self._room)
            write(temporary)
            head = {"schema": SCHEMA, "family": family, "variant": variant, "created": time.time()}
            entry = Entry(final, family, variant, complete(temporary, {**manifest, **head}))
            entry = self._settle(temporary, entry)
        except Exception as error:  # whatever a writer raises: a cache that fails costs time only
            upkeep.attempt("remove an empty family", final.parent.rmdir)
            raise StoreError(f"{final} could not be written: {error}") from error
        finally:
            if temporary is not None:
                upkeep.erase(temporary)
        upkeep.sweep(self._room)
        upkeep.evict(self._room, self.max_size, keep=final)
        return entry

    def _settle(self, temporary: Path, entry: Entry) -> Entry:
        """Renames a complete directory to its place, or finds the winner's there."""
        problem = StoreError("it is removed as often as it is written")
        for _ in range(4):
            try:
                entry.path.parent.mkdir(mode=0o700, exist_ok=True)
                os.rename(temporary, entry.path)  # what exists is a race lost, on Windows too
            except FileNotFoundError:
                continue  # the family was empty and somebody tidied it away
            except OSError:
                if not os.path.lexists(entry.path):
                    raise
                winner = self.sound(entry.path)
                if winner is not None:
                    return winner
                self.set_aside(entry.path)  # another schema under our key
                continue
            upkeep.attempt("sync", lambda: files.sync(entry.path.parent))
            return entry
        raise problem

    def amend(self, entry: Entry, section: str, value: Any) -> Entry:
        """Replaces one section of the entry's manifest, as it now stands on the disk.

        Returns the entry with the manifest that results; the same entry, and a log line, when
        that failed or the entry is no longer the one that was given.
        """
        if section in OURS:
            raise ValueError(f"reserved in a manifest: {section!r}")
        if self.root is None:
            return entry
        if not os.access(self._room, os.W_OK):
            self._once("read-only", "%s can only be read: nothing more is kept in it", self.root)
            return entry
        # Not the family's own lock: a builder holds that for as long as it builds.
        with self._locked(f"{entry.family}.amend.lock", _AMEND_SECONDS):
            temporary: Path | None = None
            try:
                now = files.read_sealed(entry.path / MANIFEST)
                if now.get("files") != entry.manifest["files"]:
                    raise ValueError("another entry has taken its place")
                now[section] = value
                temporary = upkeep.temporary(self._room)
                sealed = files.seal(now)
                files.write_new(temporary / MANIFEST, sealed)
                os.replace(temporary / MANIFEST, entry.path / MANIFEST)
            except (OSError, ValueError, TypeError, RecursionError) as error:
                _log.warning("%s in %s could not be amended: %s", section, entry.path, error)
                return entry
            finally:
                if temporary is not None:
                    upkeep.erase(temporary)
        return Entry(entry.path, entry.family, entry.variant, files.unseal(sealed))

    def discard(self, entry: Entry) -> None:
        """Takes an entry out of the store, in use or not; who has its files open keeps them.

        Raises what a signal handler has raised: it says nothing of an entry."""
        raise_heard()
        moved = self.set_aside(entry.path)
        if moved is not None:
            upkeep.erase(moved)

    def size(self) -> int:
        """Bytes of all files of all entries, and of what is in quarantine."""
        return 0 if self.root is None else upkeep.size(self._room)

    def spoilt(self) -> int:
        """Bytes of what is in quarantine."""
        return 0 if self.root is None else upkeep.spoilt(self._room)

    def prune(self, max_size: int | None = None) -> int:
        """Removes what dead writers left over a day ago, old quarantine, and entries over size.

        max_size: bytes, in place of the store's own. Entries least recently held go first; one
        that a process holds stays. Returns the bytes freed of entries and quarantine.
        """
        if self.root is None:
            return 0
        before = self.size()
        upkeep.sweep(self._room)
        upkeep.evict(self._room, self.max_size if max_size is None else max_size)
        return max(0, before - self.size())

    def clear(self) -> int:
        """Removes every entry that no process holds. Returns the bytes freed."""
        return self.prune(max_size=0)

    def paths(self) -> list[Path]:
        """Where all entries lie, sound or not."""
        return [] if self.root is None else upkeep.paths(self._room)

    @property
    def _room(self) -> Path:
        assert self.root is not None
        return self.root / "v1"

    def sound(self, path: Path, unread: str | None = None) -> Entry | None:
        """The entry in a directory, every byte of it read, but for one file, if its name is given:
        of that only the size is looked at. A damaged one is moved into quarantine, with a log
        line."""
        try:
            return read(path, unread)
        except Foreign as error:
            _log.debug("%s", error)
        except (ValueError, FileNotFoundError) as error:
            if os.path.lexists(path):  # else it was evicted while we read
                _log.warning("%s is damaged and set aside: %s", path, error)
                self.set_aside(path)
        except OSError as error:
            self._once(f"read {path}", "%s cannot be read: %s", path, error)
        return None

    def content(self, family: str, variant: str, name: str) -> bytes | None:
        """One file of an entry, compared with its checksum; None where there is none that is sound.

        In one piece: chunk by chunk, a thread waits for the interpreter at each.
        """
        check_key(family, variant)
        path = self._room / family / variant if self.root is not None else None
        try:
            return None if path is None else read_one(path, name)
        except (Foreign, FileNotFoundError) as error:
            _log.debug("%s", error)
        except ValueError as error:
            assert path is not None
            _log.warning("%s is damaged and set aside: %s", path, error)
            self.set_aside(path)
        except OSError as error:
            self._once(f"read {path}", "%s cannot be read: %s", path, error)
        return None

    def set_aside(self, path: Path) -> Path | None:
        """Moves a path into quarantine. Returns the directory that holds it now; None: it stays."""
        try:
            return upkeep.set_aside(self._room, path)
        except FileNotFoundError as error:
            _log.debug("somebody else moved %s: %s", path, error)
        except OSError as error:
            self._once(f"move {path}", "%s cannot be moved away: %s", path, error)
        return None

    def _once(self, topic: str, message: str, *values: object) -> None:
        if topic not in self._said:
            self._said.add(topic)
            _log.warning(message, *values)


def _acquire(
    lock: filelock.BaseFileLock, timeout: float, meanwhile: Callable[[], None] | None
) -> None:
    """Raises filelock.Timeout after `timeout` seconds, and what `meanwhile` raises."""
    deadline = time.monotonic() + timeout
    while meanwhile is not None and deadline - time.monotonic() > _LOOK_UP_SECONDS:
        try:
            lock.acquire(timeout=_LOOK_UP_SECONDS)
            return
        except filelock.Timeout:
            meanwhile()
    lock.acquire(timeout=max(0.0, deadline - time.monotonic()))
