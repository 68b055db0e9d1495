"""Which module each operation of a graph comes from, and what it ran in once it was compiled.

While a graph is converted, each operation gets a private mark with the path of its module. Marks
survive fusion, where names do not: of a convolution with folded BatchNorm nothing is left but a
number. Once the graph is settled, operations are named for their modules, and these names come back
out of what OpenVINO has compiled.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ovshim import executed

if TYPE_CHECKING:
    import openvino as ov

__all__ = ["mark", "name_by_module", "path_of", "paths_in_name", "ran_in", "same_origin"]

# One key for each path: of two marks with one key a fused operation would lose both.
_KEY = "ovshim:"
# Of several marks on a fused operation, that of the operator which it is.
_OPERATORS: Mapping[str, tuple[str, ...]] = {
    "Convolution": ("conv",),
    "GroupConvolution": ("conv",),
    "ConvolutionBackpropData": ("conv",),
    "GroupConvolutionBackpropData": ("conv",),
    "MatMul": ("linear", "matmul", "mm", "dot", "conv", "einsum"),
    "MVN": ("norm",),
}
# Between the path and the rest of a name; module paths hold dots and no slashes.
_MARK = "::"


def mark(node: Any, path: str, operator: str) -> None:
    """Note that an operation was made for this operator of that module."""
    node.get_rt_info()[_KEY + path] = operator


def same_origin(node: Any, other: Any) -> None:
    """Mark an operation as another one is."""
    for path, operator in _marks(other).items():
        mark(node, path, operator)


def path_of(node: Any) -> str | None:
    """The path of the module that an operation comes from; None where it is not known."""
    marks = _marks(node)
    if len(marks) > 1:
        wanted = _OPERATORS.get(node.get_type_name(), ())
        of_kind = [path for path, by in marks.items() if any(word in by for word in wanted)]
        # Deeper paths first: a function of the parent's is fused into its child's, not the reverse.
        return max(of_kind or marks, key=lambda path: (path.count("."), bool(path), path))
    return next(iter(marks), None)


def _marks(node: Any) -> dict[str, str]:
    info = node.get_rt_info()
    keys = [key for key in info if key.startswith(_KEY)]
    return {key[len(_KEY) :]: info[key].astype(str) for key in keys}


def name_by_module(model: ov.Model) -> None:
    """Name every marked operation for its module, each name once."""
    for n, node in enumerate(model.get_ordered_ops()):
        path = path_of(node)
        if path is not None:
            node.set_friendly_name(f"{path}{_MARK}{node.get_type_name()}_{n}")


def paths_in_name(names: str) -> list[str]:
    """The paths in the names that a compiled operation goes by, each once."""
    parts = [part.rpartition(_MARK) for part in names.split(",")]
    return list(dict.fromkeys(path for path, found, _ in parts if found))


def ran_in(compiled: Any) -> Iterator[tuple[list[str], str, str]]:
    """Each operation of a compiled model that computes: the paths of its modules, its kind, and
    the precision that it runs in (`f32`, `bf16`, `f16`, `i8`)."""
    for kind, ran, names in executed.operations(compiled):
        paths = paths_in_name(names)
        if paths:
            yield paths, kind, ran
