"""`ovshim cache`: what `ovshim.cache` knows and does."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from ovshim import cache

__all__ = ["add"]


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the parser."""
    command = commands.add_parser(
        "cache",
        help="look into the cache, verify it, empty it",
        description="Look into the cache of converted modules, verify it, empty it.",
    )
    actions = command.add_subparsers(title="actions", metavar="action", required=True)
    _action(actions, "info", _info, "where it is, how large, how large it may grow")
    _action(actions, "ls", _ls, "its entries, last used first")
    _action(actions, "verify", _verify, "compare every byte with its checksum; 1: some are damaged")
    prune = _action(
        actions, "prune", _prune, "remove leftovers, and entries until it is within its size"
    )
    prune.add_argument("--max-size", metavar="SIZE", help="500MB, 10GB (OVSHIM_CACHE_MAX_SIZE)")
    _action(actions, "clear", _clear, "remove every entry that no process holds")
    why = _action(actions, "why-miss", _why_miss, "why entry A was not found by what made entry B")
    for name in ("a", "b"):
        why.add_argument(name, metavar=name.upper(), help="a path, or the beginning of a key")


def _action(
    actions: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    run: Callable[[argparse.Namespace], int],
    text: str,
) -> argparse.ArgumentParser:
    action = actions.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
    action.add_argument("--cache-dir", metavar="DIR", help="the cache (OVSHIM_CACHE_DIR)")
    action.add_argument("--json", action="store_true", help="print JSON instead")
    action.set_defaults(run=run)
    return action


def _print(chosen: argparse.Namespace, record: Any, lines: Sequence[str]) -> None:
    print(json.dumps(record, indent=2) if chosen.json else "\n".join(lines))


def _info(chosen: argparse.Namespace) -> int:
    found = cache.info(chosen.cache_dir)
    lines = [
        f"{found.directory}",
        f"{found.entries} entries, {_size(found.bytes)} of {_size(found.max_size)}",
        *([f"{_size(found.quarantined)} in quarantine"] if found.quarantined else []),
    ]
    if found.directory is not None or chosen.json:
        _print(chosen, found.to_dict(), lines)
    return _usable(found)


def _ls(chosen: argparse.Namespace) -> int:
    found = cache.entries(chosen.cache_dir)
    rows: list[tuple[str, ...]] = [("key", "module", "precision", "size", "last used", "")]
    rows += [_row(entry) for entry in found]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    _print(chosen, [entry.to_dict() for entry in found], lines)
    return 0 if found else _usable(cache.info(chosen.cache_dir))


def _row(entry: cache.EntryInfo) -> tuple[str, ...]:
    name = entry.module or "?"
    what = entry.problem or (f"eager: {entry.verdict}" if entry.verdict else entry.signature)
    return (
        _short(entry.key),
        name if entry.method in (None, "forward") else f"{name}.{entry.method}",
        entry.precision or "",
        _size(entry.bytes),
        time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.last_used)),
        what or "",
    )


def _short(key: str) -> str:
    family, _, variant = key.partition("/")
    return f"{family}/{variant[:4]}"


def _verify(chosen: argparse.Namespace) -> int:
    found = cache.verify(chosen.cache_dir)
    lines = [f"{len(found.sound)} entries are sound"]
    lines += [f"damaged, in quarantine now: {path}: {why}" for path, why in found.damaged]
    lines += [f"of another version, left alone: {path}" for path in found.foreign]
    lines += [f"cannot be read: {path}: {why}" for path, why in found.unreadable]
    _print(chosen, found.to_dict(), lines)
    return 1 if found.damaged or found.unreadable else 0


def _prune(chosen: argparse.Namespace) -> int:
    return _told(chosen, cache.prune(chosen.cache_dir, max_size=chosen.max_size))


def _clear(chosen: argparse.Namespace) -> int:
    return _told(chosen, cache.clear(chosen.cache_dir))


def _told(chosen: argparse.Namespace, removed: cache.Removed) -> int:
    text = f"{removed.entries} entries removed, {_size(removed.bytes)} freed, {removed.left} left"
    _print(chosen, removed.to_dict(), [text])
    return 0


def _why_miss(chosen: argparse.Namespace) -> int:
    found = cache.why_miss(chosen.a, chosen.b, chosen.cache_dir)
    _print(chosen, found.to_dict(), [str(found)])
    return 0


def _usable(found: cache.Info) -> int:
    if found.directory is not None:
        return 0
    print(f"ovshim: there is no cache: {found.problem}", file=sys.stderr)
    return 1


def _size(count: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("KB", 10**3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"
