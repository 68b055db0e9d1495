"""What an operator asks of a cache: what is in it, is it sound, empty it, why was this a miss.

Every function takes the directory of a cache; None is the one that `accelerate` would use
(`OVSHIM_CACHE_DIR`, else the user's cache directory).
"""

from __future__ import annotations

import json
import numbers
import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ovshim.arguments import path_of
from ovshim.cache import files, upkeep
from ovshim.cache.entry import MANIFEST, MARKER, Foreign, read, read_details
from ovshim.cache.store import Store
from ovshim.errors import OptionError

_MOST_LINES = 10  # of one part, in words
_ABSENT = "not there"

Directory = str | os.PathLike[str] | None


@dataclass(frozen=True)
class Info:
    """A cache as a whole.

    Attributes:
        directory: None where there is none that can be used; `problem` says why.
        entries: how many.
        bytes: of all entries and of what is in quarantine.
        quarantined: bytes of what was found damaged in the last day.
        max_size: bytes that it may grow to.
    """

    directory: Path | None
    problem: str | None
    entries: int
    bytes: int
    quarantined: int
    max_size: int

    def to_dict(self) -> dict[str, Any]:
        """The same for programs."""
        return {**vars(self), "directory": None if self.directory is None else str(self.directory)}


@dataclass(frozen=True)
class EntryInfo:
    """What one entry says of itself. Its files are not compared with their checksums: see `verify`.

    Attributes:
        key: `<family>/<variant>`: of everything that decides the graph, and of the graph.
        module, method, signature: what was converted, for which calls; None where nobody knows.
        verdict: the code of the reason why eager serves in its place; None where it serves.
        precision, error: asked for; the largest relative L2 error that the proof found.
        bytes: of all its files.
        created, last_used: seconds since 1970.
        seconds: what each stage took that made it.
        fingerprint: texts of `code`, `weights`, `inputs`, `options` and `environment`.
        problem: why its manifest cannot be read, or is not this version's.
    """

    path: Path
    key: str
    bytes: int
    last_used: float
    created: float | None = None
    module: str | None = None
    method: str | None = None
    signature: str | None = None
    verdict: str | None = None
    precision: str | None = None
    error: float | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    fingerprint: Mapping[str, str] = field(default_factory=dict)
    graph: Mapping[str, Any] = field(default_factory=dict, repr=False)
    problem: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The same for programs."""
        return {**vars(self), "path": str(self.path)}


@dataclass(frozen=True)
class Verification:
    """What a look at every byte has found.

    Attributes:
        sound: the paths of entries that are as they were written.
        damaged: (path, what is wrong); they are in quarantine now, and never serve.
        foreign: of another version's schema: left alone.
        unreadable: (path, why): nothing can be said of them.
    """

    sound: Sequence[Path]
    damaged: Sequence[tuple[Path, str]]
    foreign: Sequence[Path]
    unreadable: Sequence[tuple[Path, str]]

    def to_dict(self) -> dict[str, Any]:
        """The same for programs."""
        return {
            "sound": list(map(str, self.sound)),
            "damaged": [[str(path), why] for path, why in self.damaged],
            "foreign": list(map(str, self.foreign)),
            "unreadable": [[str(path), why] for path, why in self.unreadable],
        }


@dataclass(frozen=True)
class Removed:
    """What was removed: a number of entries, the bytes of all that went (quarantine too), and how
    many entries are left, those that a process holds among them."""

    entries: int
    bytes: int
    left: int

    def to_dict(self) -> dict[str, int]:
        """The same for programs."""
        return dict(vars(self))


@dataclass(frozen=True)
class Difference:
    """In what two entries differ.

    Attributes:
        a, b: the entries.
        parts: for each part of the fingerprint that differs the two texts. Where a part is a
            record, what differs in it: `environment.torch`; of code and weights the places
            (`code.app.Net.forward`, `weights.fc.bias`) and digests of what stands there, or, where
            that is a plain number, the number. With equal fingerprints, what differs of the
            graphs: `graph.pattern`.
    """

    a: EntryInfo
    b: EntryInfo
    parts: Mapping[str, tuple[str, str]]

    def to_dict(self) -> dict[str, Any]:
        """The same for programs."""
        return {
            "a": self.a.key,
            "b": self.b.key,
            "parts": {k: list(v) for k, v in self.parts.items()},
        }

    def __str__(self) -> str:
        lines = [f"a: {_titled(self.a)}", f"b: {_titled(self.b)}"]
        told: Counter[str] = Counter()
        for name, (a, b) in self.parts.items():
            part = name.partition(".")[0]
            told[part] += 1
            if told[part] <= _MOST_LINES:
                lines.append(f"{name}:\n  a: {a}\n  b: {b}")
        lines += [f"{part}: {count - _MOST_LINES} more differences" for part, count in told.items()
                  if count > _MOST_LINES]  # fmt: skip
        return "\n".join(lines if self.parts else [*lines, "they do not differ"])


def info(directory: Directory = None) -> Info:
    """How large a cache is, where, and how large it may grow.

    Raises OptionError for a directory that does not exist.
    """
    store = _store(directory)
    sizes = (store.size(), store.spoilt(), store.max_size)
    return Info(store.root, store.problem, len(store.paths()), *sizes)


def entries(directory: Directory = None) -> list[EntryInfo]:
    """What is in a cache, last used first.

    Raises OptionError for a directory that does not exist.
    """
    found = map(_described, _store(directory).paths())
    return sorted(found, key=lambda one: (-one.last_used, one.key))


def verify(directory: Directory = None) -> Verification:
    """Compare every byte of every entry with its checksum. Damaged entries go to quarantine.

    Raises OptionError for a directory that does not exist.
    """
    store = _store(directory)
    sound, damaged, foreign, unreadable = [], [], [], []
    for path in store.paths():
        try:
            read(path)
        except Foreign:
            foreign.append(path)
        except (ValueError, FileNotFoundError) as error:
            if os.path.lexists(path):  # else somebody has removed it meanwhile
                store.set_aside(path)
                damaged.append((path, str(error)))
        except OSError as error:
            unreadable.append((path, str(error)))
        else:
            sound.append(path)
    return Verification(sound, damaged, foreign, unreadable)


def prune(directory: Directory = None, *, max_size: int | str | None = None) -> Removed:
    """Remove what dead writers left over a day ago, old quarantine, and, least recently used
    first, entries until the cache is within its size. One that a process holds stays.

    Args:
        max_size: bytes, or a text such as "500MB"; None: `OVSHIM_CACHE_MAX_SIZE`.

    Raises OptionError for a directory that does not exist, and for a size that is none.
    """
    if isinstance(max_size, str):
        try:
            max_size = files.parse_size(max_size)
        except ValueError as error:
            allowed = "a number of bytes, or 500MB, 10GB, 2GiB"
            raise OptionError("max_size", max_size, allowed, "Write one of those.") from error
    elif max_size is not None:
        whole = isinstance(max_size, numbers.Integral) and not isinstance(max_size, bool)
        if not whole or max_size < 0:
            raise OptionError("max_size", max_size, "a number of bytes", "Give 0 or more.")
    return _removed(_store(directory), max_size)


def clear(directory: Directory = None) -> Removed:
    """Remove every entry that no process holds, and what is in quarantine.

    Raises OptionError for a directory that does not exist.
    """
    return _removed(_store(directory), 0)


def why_miss(
    a: EntryInfo | str | os.PathLike[str],
    b: EntryInfo | str | os.PathLike[str],
    directory: Directory = None,
) -> Difference:
    """Why what made entry `b` did not find entry `a`: which parts of their fingerprints differ.

    Args:
        a, b: entries, their paths, or the beginnings of their keys as far as they are unique (of
            one family the entry used last).

    Raises OptionError for a name that no entry has, or several.
    """
    known = entries(directory)
    one, other = _found("a", a, known), _found("b", b, known)
    parts = _located(_differing(one.fingerprint, other.fingerprint), one, other)
    if not parts and one.path != other.path:
        graphs = ({f"graph.{k}": json.dumps(v, sort_keys=True) for k, v in e.graph.items()}
                  for e in (one, other))  # fmt: skip
        parts = _differing(*graphs)
    return Difference(one, other, parts)


def _store(directory: Directory) -> Store:
    if directory is None:
        return Store(None)
    path = path_of("directory", directory)
    if not path.is_dir():
        allowed = "the directory of a cache"
        raise OptionError("directory", str(path), allowed, "There is none: correct it.")
    return Store(path)


def _removed(store: Store, max_size: int | None) -> Removed:
    before = store.paths()
    freed = store.prune(max_size)
    left = [path for path in before if os.path.lexists(path)]
    return Removed(len(before) - len(left), freed, len(left))


def _described(path: Path) -> EntryInfo:
    size, used = upkeep.bytes_of(path), upkeep.modified(path / MARKER)
    known: dict[str, Any] = {"path": path, "key": f"{path.parent.name}/{path.name}"}
    try:
        manifest = files.read_sealed(path / MANIFEST)
    except (OSError, ValueError) as error:
        return EntryInfo(**known, bytes=size, last_used=used, problem=str(error))
    graph, proof, verdict = (_record(manifest.get(k)) for k in ("graph", "proof", "verdict"))
    return EntryInfo(
        **known,
        bytes=size,
        last_used=used,
        created=_number(manifest.get("created")),
        module=_text(manifest.get("module")),
        method=_text(manifest.get("method")),
        signature=_text(graph.get("signature")),
        verdict=_text(verdict.get("code")),
        precision=_text(proof.get("precision")),
        error=_number(proof.get("error")),
        seconds={
            stage: spent
            for stage, spent in _record(proof.get("seconds")).items()
            if _number(spent) is not None
        },
        fingerprint={k: str(v) for k, v in _record(manifest.get("fingerprint")).items()},
        graph=graph,
    )


def _found(name: str, wanted: Any, known: Sequence[EntryInfo]) -> EntryInfo:
    if isinstance(wanted, EntryInfo):
        return wanted
    allowed = "the path of an entry, or the beginning of one entry's key"
    if not isinstance(wanted, str | os.PathLike):
        raise OptionError(name, wanted, allowed, "`ovshim cache ls` lists the keys.")
    text = os.fspath(wanted)
    match = [e for e in known if e.key.startswith(text)]
    if not match and os.path.isdir(text):
        return _described(Path(text).absolute())
    if len({e.key.partition("/")[0] for e in match}) == 1:
        return match[0]  # the one used last
    what = f"{len(match)} entries begin so." if match else "No entry begins so."
    raise OptionError(name, text, allowed, f"{what} `ovshim cache ls` lists their keys.")


def _differing(a: Mapping[str, str], b: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    found: dict[str, tuple[str, str]] = {}
    for name in sorted(a.keys() | b.keys()):
        mine, other = a.get(name, "not recorded"), b.get(name, "not recorded")
        if mine == other:
            continue
        inner = [_record(_parsed(text)) for text in (mine, other)]
        if all(inner):
            texts = ({k: str(v) for k, v in record.items()} for record in inner)
            within = _differing(*texts)
            found.update({f"{name}.{key}": pair for key, pair in within.items()})
        else:
            found[name] = (mine, other)
    return found


def _located(
    parts: dict[str, tuple[str, str]], one: EntryInfo, other: EntryInfo
) -> dict[str, tuple[str, str]]:
    """The same, with the places where code and weights differ in the place of their hashes."""
    details = read_details(one.path), read_details(other.path)
    found: dict[str, tuple[str, str]] = {}
    for name, pair in parts.items():
        a, b = (one.get(name, {}) for one in details)
        places = {f"{name}.{k}": (a.get(k, _ABSENT), b.get(k, _ABSENT)) for k in sorted({*a, *b})}
        differing = {place: both for place, both in places.items() if both[0] != both[1]}
        # An entry without details has nothing to compare with.
        found.update(differing if a and b and differing else {name: pair})
    return found


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _record(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _number(value: Any) -> float | None:
    return value if isinstance(value, float | int) and not isinstance(value, bool) else None


def _titled(entry: EntryInfo) -> str:
    made = "?"
    if entry.created is not None:
        made = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(entry.created))
    return f"{entry.key} {entry.module or '?'}.{entry.method or '?'}, made {made}"
