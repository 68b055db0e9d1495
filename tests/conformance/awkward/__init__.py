"""Modules written to be answered wrongly, by kind of trap. Importing this registers them all."""

from conformance.awkward import (
    arguments,
    dtypes,
    edits,
    framework,
    indexing,
    layers,
    numbers,
    reads,
    recurrent,
    shapes,
    signatures,
    state,
    structures,
    surroundings,
    values,
)

__all__ = [
    "arguments",
    "dtypes",
    "edits",
    "framework",
    "indexing",
    "layers",
    "numbers",
    "reads",
    "recurrent",
    "shapes",
    "signatures",
    "state",
    "structures",
    "surroundings",
    "values",
]
