"""Rules: which module gets which precision.

A rule is a pattern (`fnmatch`) of module paths as `named_modules` gives them, and covers what lies
below a module that it matches. The last rule that matches a module wins; "default" is for what none
matches.
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterable, Mapping

from torch import nn

from ovshim.errors import OptionError

__all__ = ["DEFAULT", "by_module", "check"]

DEFAULT = "default"


def by_module(rules: Mapping[str, str], paths: Iterable[str], own: str) -> dict[str, str]:
    """The precision of each module.

    Args:
        paths: of the modules, "" for the root.
        own: the precision of modules that no rule covers, where there is no default.
    """
    default = rules.get(DEFAULT, own)
    found = {}
    for path in paths:
        found[path] = default
        for pattern, precision in rules.items():
            if pattern != DEFAULT and _covers(pattern, path):
                found[path] = precision
    return found


def check(rules: Mapping[str, str], module: nn.Module) -> None:
    """Raise OptionError for a pattern that matches none of the module's submodules."""
    paths = [path for path, _ in module.named_modules(remove_duplicate=False) if path]
    for pattern in rules:
        if pattern == DEFAULT or any(_covers(pattern, path) for path in ["", *paths]):
            continue
        near = difflib.get_close_matches(pattern, paths, n=3, cutoff=0.5)
        near += [path for path in fnmatch.filter(paths, f"*.{pattern}")[:3] if path not in near]
        meant = f"Did you mean {' or '.join(near)}?" if near else "Name one of those."
        some = ", ".join(paths[:8]) + (", ..." if len(paths) > 8 else "")
        raise OptionError(
            "precision",
            {pattern: rules[pattern]},
            f"'default' and patterns of the paths of submodules ({some or 'there are none'})",
            meant,
        )


def _covers(pattern: str, path: str) -> bool:
    """Whether a pattern matches a module or one that it is within."""
    parts = path.split(".") if path else []
    within = [".".join(parts[:n]) for n in range(len(parts) + 1)]
    # The root lies above everything: only a pattern that matches all names matches it.
    return any(fnmatch.fnmatchcase(name, pattern) for name in within)
