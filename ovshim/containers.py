"""Objects that hold an output's tensors, and are looked into as tuples, lists and dicts are.

Two kinds: dataclasses that torch's registry does not know (it is global: putting users' classes
there would change what torch.export does with them), and the key-value caches that transformers'
models make where nobody says `use_cache=False`. A cache is opened in outputs alone: one that is
given to a call is written to by it.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["Opened", "is_of_caches", "opened"]

_CACHES = "transformers.cache_utils"
# Those whose whole state is in their attributes, and with whom no other thread or stream works.
_CACHE_CLASSES = frozenset(
    {
        "DynamicCache",
        "EncoderDecoderCache",
        "DynamicLayer",
        "DynamicSlidingWindowLayer",
        "DynamicIndexedLayer",
        "DummyLayer",
        "LinearAttentionLayer",
        "LinearAttentionAndFullAttentionLayer",
        "LinearAttentionAndSlidingWindowAttentionLayer",
    }
)


@dataclasses.dataclass(frozen=True)
class Opened:
    """An object by its class and attributes.

    Attributes:
        cls: its class.
        names: those of the attributes that hold values, in the order of the values.
        classes: attributes that hold classes: what they hold is part of what it is.
        order: all of them, as they were set.
    """

    cls: type
    names: tuple[str, ...]
    classes: tuple[tuple[str, type], ...] = ()
    order: tuple[str, ...] = dataclasses.field(default=(), compare=False)

    @property
    def mutable(self) -> bool:
        """Whether such an object may be written to."""
        settings = getattr(self.cls, "__dataclass_params__", None)
        return settings is None or not settings.frozen

    def values(self, of: Any) -> list[Any]:
        """The values of such an object, in order."""
        return [getattr(of, name) for name in self.names]

    def make(self, values: Sequence[Any]) -> Any:
        """The object that has these values."""
        # Not cls(**values): __init__ and __post_init__ ran when the module made its own, and must
        # not run twice.
        made: Any = object.__new__(self.cls)
        held = dict(zip(self.names, values, strict=True)) | dict(self.classes)
        for name in self.order or self.names:
            object.__setattr__(made, name, held[name])
        return made


def opened(value: Any, caches: bool) -> Opened | None:
    """What is to be known of an object to make it again of its values; None for other values.

    Args:
        caches: whether key-value caches are opened.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = _fields_of(value)
        return None if names is None else Opened(type(value), names)
    if caches and _is_cache(type(value)):
        return _opened_cache(value)
    return None


def _fields_of(value: Any) -> tuple[str, ...] | None:
    """The fields of a dataclass instance, where they are all that it holds."""
    names = tuple(field.name for field in dataclasses.fields(value))
    held: Mapping[str, Any] | None = getattr(value, "__dict__", None)
    if any(not hasattr(value, name) for name in names):
        return None
    return names if held is None or held.keys() <= set(names) else None


def _is_cache(cls: type) -> bool:
    """Whether this is a class of transformers' key-value caches, or of their layers."""
    if cls.__module__ != _CACHES or cls.__qualname__ not in _CACHE_CLASSES:
        return False
    return getattr(sys.modules.get(_CACHES), cls.__qualname__, None) is cls


def is_of_caches(cls: type) -> bool:
    """Whether it stands where those classes do: they and what is above them."""
    return cls.__module__ == _CACHES


def _opened_cache(value: Any) -> Opened | None:
    held = vars(value)
    if held.get("offloading"):  # by streams of a device's
        return None
    # Sorted: one that Dynamo's bytecode builds has got its attributes in another order.
    classes = tuple((name, held[name]) for name in sorted(held) if isinstance(held[name], type))
    names = tuple(name for name in sorted(held) if not isinstance(held[name], type))
    return Opened(type(value), names, classes, tuple(held))
