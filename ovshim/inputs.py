"""What eager and a candidate are asked about besides the example: other values, and other sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from ovshim.signature import Kind, Pattern, TensorLeaf

__all__ = [
    "once_each",
    "other_sizes",
    "redraw",
    "redraw_all",
    "resize",
    "resize_all",
    "small_leaves",
    "uniform_masks",
]


def redraw(tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Other values of the same distribution: never outside the range seen.

    Floats and masks (two values or fewer) are permuted; integers are drawn anew between the
    smallest and the largest seen, so that an index stays within its table (but bytes over their
    whole range). A single integer, which shows no range, becomes the next. A constant float tensor
    says nothing of its distribution: it gets standard normal values added.
    """
    if tensor.numel() == 0:
        return tensor.clone()
    flat = tensor.detach().reshape(-1)
    order = torch.randperm(flat.numel(), generator=generator)
    if tensor.dtype.is_floating_point:
        if bool((flat == flat[0]).all()):
            noise = torch.randn(flat.shape, generator=generator).to(flat.dtype)
            return (flat + noise).reshape(tensor.shape)
        return flat[order].reshape(tensor.shape)
    if tensor.dtype is torch.bool:
        return flat[order].reshape(tensor.shape)
    low, high = int(flat.min()), int(flat.max())
    if low == high and tensor.dim() == 0:
        return torch.tensor(low + 1, dtype=tensor.dtype)
    if high - low <= 1:
        return flat[order].reshape(tensor.shape)
    if tensor.dtype in (torch.uint8, torch.int8):
        # Pixels and the like use their whole range, and arithmetic on them wraps around.
        info = torch.iinfo(tensor.dtype)
        low, high = info.min, info.max
    drawn = torch.randint(low, high + 1, flat.shape, generator=generator)
    return drawn.to(tensor.dtype).reshape(tensor.shape)


def resize(
    tensors: Sequence[torch.Tensor], pattern: Pattern, new: dict[tuple[int, int], int]
) -> list[torch.Tensor]:
    """The tensors with other sizes: `new` gives them by (tensor, dimension), for dimensions that
    the pattern leaves open. Elements repeat cyclically, so that every value stays a valid one."""
    resized = []
    for t, tensor in enumerate(tensors):
        for d in range(tensor.dim()):
            size = new.get((t, d))
            if size is not None and pattern[t][d] is None and tensor.shape[d] > 0:
                index = torch.arange(size) % tensor.shape[d]
                tensor = tensor.index_select(d, index)
        resized.append(tensor)
    return resized


def redraw_all(tensors: Sequence[torch.Tensor], generator: torch.Generator) -> list[torch.Tensor]:
    """`redraw` of each; tensors that are one stay one."""
    return once_each(tensors, lambda t, tensor: redraw(tensor, generator))


def resize_all(
    tensors: Sequence[torch.Tensor], pattern: Pattern, new: dict[tuple[int, int], int]
) -> list[torch.Tensor]:
    """`resize`; tensors that are one stay one."""
    resized = resize(tensors, pattern, new)
    return once_each(tensors, lambda t, tensor: resized[t])


def once_each(
    tensors: Sequence[torch.Tensor], make: Callable[[int, torch.Tensor], torch.Tensor]
) -> list[torch.Tensor]:
    """What `make` gives for each and its index; tensors that are one stay one."""
    made: dict[int, torch.Tensor] = {}
    for t, tensor in enumerate(tensors):
        if id(tensor) not in made:
            made[id(tensor)] = make(t, tensor)
    return [made[id(tensor)] for tensor in tensors]


def uniform_masks(
    tensors: Sequence[torch.Tensor], hidden: bool = True
) -> Iterator[list[torch.Tensor]]:
    """The same with one value all over each mask: a module may look whether anything is hidden, and
    go another way where nothing is. (transformers does, unless it is being traced.)

    Args:
        hidden: zeros as well, which mostly hide all there is.
    """
    masks = {id(tensor) for tensor in tensors if _is_mask(tensor)}
    fulls = (torch.ones_like, torch.zeros_like)[: 1 + hidden]
    for full in fulls if masks else ():
        yield [full(tensor) if id(tensor) in masks else tensor for tensor in tensors]


def _is_mask(tensor: torch.Tensor) -> bool:
    if tensor.dtype.is_floating_point or tensor.dtype.is_complex or tensor.numel() < 2:
        return False
    return bool(tensor.min() >= 0) and bool(tensor.max() <= 1)


def other_sizes(size: int) -> Iterator[int]:
    """Other sizes to try, small ones first: guards may demand multiples, minimums, or evenness.

    Of a large one a quarter, for each hit is proved on the smallest; not less, or kernels and
    pooling might leave nothing to compare."""
    tried = {size, 0}
    quarter = [size // 4 + 1] if size >= 16 else []
    near = (size - 1, size + 1, size + 2, 2 * size, size // 2, size + 8, size + 32, 1)
    for other in (*quarter, *near):
        if other not in tried and (other > 1 or size > 1):
            tried.add(other)
            yield other


def small_leaves(
    kind: Kind, leaves: Sequence[Any], pattern: Pattern, sizes: Sequence[Sequence[int]]
) -> list[Any]:
    """The example at the smallest sizes that the whole proof has seen."""
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    new = {(t, d): n for t, dims in enumerate(sizes) for d, n in enumerate(dims)}
    small = iter([t.clone() for t in resize_all(tensors, pattern, new)])
    drawn = [next(small) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
    return [
        drawn[leaf.same_as] if isinstance(leaf, TensorLeaf) else drawn[i]
        for i, leaf in enumerate(kind.leaves)
    ]
