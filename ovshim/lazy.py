"""Names of a package that are imported when they are asked for."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["attach"]


def attach(
    namespace: dict[str, Any],
    places: Mapping[str, str],
    before: Callable[[str], Any] | None = None,
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """A package's `__getattr__` and `__dir__`.

    Args:
        namespace: the package's `globals()`, into which a name goes when it was asked for.
        places: names, with the module of the package that each is in; a module of the package
            itself stands under its own name.
        before: called with the module, before it is imported.
    """
    package = namespace["__name__"]

    def get(name: str) -> Any:
        place = places.get(name)
        if place is None:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        if before is not None:
            before(place)
        module = importlib.import_module(f"{package}.{place}")
        value = namespace[name] = module if name == place else getattr(module, name)
        return value

    return get, lambda: sorted({*namespace, *places})
