"""Calibration data: example inputs out of a DataLoader, a dataset, a list, in the form of a call.

An item is whatever the user's source gives: a tensor, a tuple, a mapping, perhaps with labels. What
it has to become are the leaves of a call of one kind, as the example was.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xxhash

from ovshim.checks import first_items
from ovshim.errors import CalibrationError
from ovshim.signature import Kind, TensorLeaf, flatten_call, text_of

__all__ = ["Misfit", "Samples", "collect", "digest_of"]

# What calibration data may take of memory, in bytes. Ten samples there are in any case.
_MOST_BYTES = 256 << 20
_FEWEST = 10
# One in so many samples is held out, to choose and to prove with.
_HELD_OUT = 5
_MOST_HELD_OUT = 32

_FORMS = "a tensor, a tuple or list (positional arguments) or a mapping (by name)"


class Misfit(CalibrationError):
    """Items that can be read, but are no calls of the kind that they are needed for."""


@dataclass(frozen=True)
class Samples:
    """Example inputs of one kind of call.

    Attributes:
        tensors: for each sample the tensors of the call, in order.
        items: what the user's source gave for each.
        digest: of all the tensors' bytes, in order.
    """

    tensors: tuple[tuple[torch.Tensor, ...], ...]
    items: tuple[Any, ...]
    digest: str

    @property
    def held_out(self) -> list[int]:
        """Indices of the samples that a quantized graph is judged by."""
        count = len(self.tensors)
        chosen = list(range(count))[_HELD_OUT - 1 :: _HELD_OUT][:_MOST_HELD_OUT]
        return chosen or [count - 1]

    @property
    def learned_from(self) -> list[int]:
        """Indices of the samples that ranges are taken from: all the others."""
        out = set(self.held_out)
        return [i for i in range(len(self.tensors)) if i not in out] or [0]


def collect(
    source: Any,
    transform: Callable[[Any], Any] | None,
    call: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    kind: Kind,
) -> Samples:
    """The samples of a source, for calls of one kind.

    Args:
        call: the module's method; the names of its parameters are those of mappings.
        args, kwargs: of the example.

    Raises:
        CalibrationError: there are none, or an item is in no form that can be read.
        Misfit: the items are no such calls.
    """
    names = _names(call, args)
    tensors: list[tuple[torch.Tensor, ...]] = []
    items = []
    size = 0
    # A shuffling loader draws random numbers, which would not be drawn without us.
    with torch.random.fork_rng(devices=[]):
        for item, given in _items(source, transform):
            filled = _filled(given, names, args, kwargs, transform is not None)
            leaves, structure = flatten_call(*filled)
            if structure != kind.structure:
                raise Misfit("calibration", _shown(leaves), f"{kind}", _remedy())
            sample = _tensors(leaves, kind)
            tensors.append(sample)
            items.append(item)
            size += sum(tensor.numel() * tensor.element_size() for tensor in sample)
            if size > _MOST_BYTES and len(tensors) >= _FEWEST:
                break
    if not tensors:
        raise CalibrationError(
            "calibration", source, "one example input or more", "The source gave none."
        )
    return Samples(tuple(tensors), tuple(items), digest_of(tensors))


def digest_of(samples: Iterable[Iterable[torch.Tensor]]) -> str:
    """A digest of all the tensors' bytes, dtypes and sizes, in order."""
    digest = xxhash.xxh3_128()
    for tensor in itertools.chain.from_iterable(samples):
        digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _items(source: Any, transform: Callable[[Any], Any] | None) -> Iterator[tuple[Any, Any]]:
    """Each item, and what is in it.

    Raises:
        CalibrationError: the source or the function raises.
    """
    try:
        for item in first_items(source, None):
            yield item, item if transform is None else transform(item)
    except Exception as error:  # whatever the user's code raises
        what = f"{type(error).__name__}: {error}"
        raise CalibrationError(
            "calibration", source, "what can be gone through", f"It raised {what}"
        ) from error


def _names(call: Callable[..., Any], args: Sequence[Any]) -> list[str]:
    """Names of the arguments that the example gives by position."""
    try:
        parameters = list(inspect.signature(call).parameters.values())
    except (TypeError, ValueError):  # a method of C's: its arguments have no names
        return []
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [p.name for p in parameters if p.kind in positional][: len(args)]


def _filled(
    item: Any,
    names: Sequence[str],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    transformed: bool,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of the example with the item's values in them."""
    if isinstance(item, Mapping):
        position = dict(zip(names, args, strict=False))
        by_position = [_named(item, name, example) for name, example in position.items()]
        by_name = {name: _named(item, name, example) for name, example in kwargs.items()}
        return (*by_position, *args[len(by_position) :]), by_name
    values = list(item) if isinstance(item, list | tuple) else [item]
    if not isinstance(item, list | tuple | torch.Tensor | np.ndarray):
        what = "what transform= gives" if transformed else "an item"
        raise CalibrationError("calibration", item, f"{what}: {_FORMS}", _remedy())
    if not args and len(kwargs) == 1 and len(values) >= 1:
        return (), dict.fromkeys(kwargs, values[0])
    if len(values) < len(args) or not args:
        allowed = f"{len(args)} positional arguments, as in the example"
        raise Misfit("calibration", item, allowed, _remedy())
    # What follows the arguments are labels; and what an item leaves out is as in the example.
    return tuple(values[: len(args)]), dict(kwargs)


def _named(item: Mapping[str, Any], name: str, example: Any) -> Any:
    if name in item:
        return item[name]
    if isinstance(example, torch.Tensor):
        allowed = f"items with {name!r}, which the example has"
        raise Misfit("calibration", sorted(map(str, item)), allowed, _remedy())
    return example


def _tensors(leaves: Sequence[Any], kind: Kind) -> tuple[torch.Tensor, ...]:
    """Copies of the tensors among the leaves, one dimension added in front where the items of a
    dataset lack the batch's.

    Raises:
        Misfit: they are not of the dtypes and ranks of the kind, or a constant is another.
    """
    given: list[torch.Tensor] = []
    wanted = [leaf for leaf in kind.leaves if isinstance(leaf, TensorLeaf)]
    for leaf, known in zip(leaves, kind.leaves, strict=True):
        if isinstance(known, TensorLeaf):
            tensor = torch.from_numpy(leaf) if isinstance(leaf, np.ndarray) else leaf
            if not isinstance(tensor, torch.Tensor) or tensor.dtype != known.dtype:
                raise Misfit("calibration", _shown(leaves), _allowed(wanted), _remedy())
            given.append(tensor.detach().to("cpu", copy=True).contiguous())
        elif type(leaf) is not known.type or text_of(leaf) != known.text:
            raise Misfit("calibration", leaf, f"the example's constant {known.text}", _remedy())
    lacking = {known.rank - tensor.dim() for tensor, known in zip(given, wanted, strict=True)}
    if lacking == {1}:
        given = [tensor.unsqueeze(0) for tensor in given]
    elif lacking != {0}:
        raise Misfit("calibration", _shown(leaves), _allowed(wanted), _remedy())
    # One object at two places of a call is one in every call of the kind.
    place = {i: n for n, i in enumerate(kind.tensors)}
    return tuple(given[place[leaf.same_as]] for leaf in wanted)


def _allowed(wanted: Sequence[TensorLeaf]) -> str:
    dtypes = (f"{str(leaf.dtype).removeprefix('torch.')} of rank {leaf.rank}" for leaf in wanted)
    return f"inputs as the example's: {', '.join(dtypes)}"


def _shown(leaves: Sequence[Any]) -> list[Any]:
    """Leaves for a message: of a tensor its dtype and sizes."""
    arrays = (torch.Tensor, np.ndarray)
    return [f"{x.dtype}{list(x.shape)}" if isinstance(x, arrays) else x for x in leaves]


def _remedy() -> str:
    return "Give items like the example, or transform= to take the inputs out of them."
