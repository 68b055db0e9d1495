"""The forms in which an example of a call is given."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ovshim.errors import OptionError

__all__ = ["FORMS", "as_call"]

FORMS = "a tensor (one positional argument), a tuple (positional arguments) or a mapping (keywords)"


def as_call(
    example_input: Any, example_kwargs: Mapping[str, Any] | None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments that an example stands for.

    Raises:
        OptionError: it is in none of the forms.
    """
    if isinstance(example_input, Mapping):
        if example_kwargs is not None:
            raise OptionError(
                "example_kwargs",
                example_kwargs,
                "keywords beside a tensor or a tuple",
                "Put all keywords into one mapping.",
            )
        return (), _checked_kwargs("example_input", example_input)
    kwargs = _checked_kwargs("example_kwargs", example_kwargs or {})
    if example_input is None:
        return (), kwargs
    if type(example_input) is tuple:
        return example_input, kwargs
    if isinstance(example_input, torch.Tensor):
        return (example_input,), kwargs
    raise OptionError(
        "example_input", example_input, FORMS, "Put a single argument into a tuple: (x,)."
    )


def _checked_kwargs(name: str, given: Any) -> dict[str, Any]:
    if not isinstance(given, Mapping) or not all(isinstance(key, str) for key in given):
        raise OptionError(
            name, given, "a mapping from argument names", "Give for example {'x': x}."
        )
    return dict(given)
