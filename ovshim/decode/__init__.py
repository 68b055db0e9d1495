"""Stateful decoding: `generate()` of transformers' language models, causal or with an encoder.

    step        the module's forward as a function of tensors alone, its past among them
    states      the captured step, with its keys and values kept inside OpenVINO
    engine      the compiled graph, and a request for each conversation
    cache       what the caller holds of it: a `DynamicCache`, until somebody looks into it
    calls       which calls are steps
    manner      what steps are given, and what eager is asked; `seq2seq` with an encoder
    experts     mixtures of experts, in the form of which a graph can be made
    build       capture, and the entry in the cache, by its `key`, with its `record`
    overflow    whether float16 holds the values
    prove       compiling, and the proof by `probes`; `finish`: what a build ends in, and the race
    decoding    the plan that comes of it
    maker       when that is made, and when it is given up
    room        who serves a call: what the dispatcher asks

Nothing here is imported, but for this file, before a module is called that transformers' own
`generate` belongs to.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from torch import nn

from ovshim.options import Options

if TYPE_CHECKING:
    from ovshim.cache import Store
    from ovshim.decode.room import Room
    from ovshim.tally import Tally

__all__ = ["NOT_OURS", "encoder_of", "room_for"]

log = logging.getLogger("ovshim")

NOT_OURS = object()
"""What a room answers to a call that is no step of decoding."""


def room_for(
    module: nn.Module, method: str, original: Any, options: Options, store: Store, tally: Tally
) -> Room | None:
    """The room that serves a module's steps; None for what does not generate.

    Args:
        original: the user's own method; its `resolve()` gives the bound method.
    """
    if method != "forward" or not _generates(module):
        return None
    from ovshim.decode.room import Room

    try:
        return Room(module, original, options, store, tally)
    except Exception as error:  # whatever a configuration of the user's own makes of questions
        log.debug("%s is not decoded: %s", type(module).__qualname__, error)
        return None


def encoder_of(module: nn.Module) -> nn.Module | None:
    """What `generate()` calls on its own before the first step; None where there is no encoder."""
    if not _generates(module):
        return None
    try:
        generating: Any = module
        found = generating.get_encoder() if generating.config.is_encoder_decoder else None
        is_part = any(found is inner for inner in module.modules() if inner is not module)
    except Exception as error:  # see `room_for`
        log.debug("%s has no encoder: %s", type(module).__qualname__, error)
        return None
    return found if is_part else None


def _generates(module: nn.Module) -> bool:
    # By name: transformers may not be installed, and is never imported for the asking.
    names = {f"{base.__module__}.{base.__qualname__}" for base in type(module).__mro__}
    wanted = {
        "transformers.generation.utils.GenerationMixin",
        "transformers.modeling_utils.PreTrainedModel",
    }
    return wanted <= names
