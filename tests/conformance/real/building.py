"""How a row of the tables becomes an entry: a model of transformers with tiny sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from conformance.drawing import Part, constant, draw, integers, mask, normal
from conformance.entries import Call, Entry, Redraw, register
from conformance.real.tiny import configure

__all__ = ["IDS", "MASK", "VOCABULARY", "architecture", "decoder", "encoder", "images", "seq2seq"]

VOCABULARY = 99
# Without the first five, which stand for padding, beginning and end.
IDS = integers(5, VOCABULARY, "B", "L")
MASK = mask()
LENGTHS = (4, 11, 2)


def made(model_type: str, model: str, config: Mapping[str, Any]) -> Callable[[], nn.Module]:
    """A factory of `transformers.<model>` with the configuration of that type, made tiny."""

    def factory() -> nn.Module:
        import transformers

        transformers.logging.set_verbosity_error()
        chosen = configure(transformers.CONFIG_MAPPING[model_type], **config)
        module: nn.Module = getattr(transformers, model)(chosen).eval()
        with torch.no_grad():
            for weight in module.parameters():
                # What starts at zero (scales of layers, heads) would hide what stands before it.
                if weight.is_floating_point() and not weight.any():
                    weight.normal_(std=0.1)
        return module

    return factory


def architecture(
    family: str,
    model_type: str,
    model: str,
    redraw: Redraw,
    *tags: str,
    config: Mapping[str, Any] | None = None,
    name: str | None = None,
    **fields: Any,
) -> None:
    """Registers an entry `family/name`, where the name is the type unless given."""
    register(
        Entry(
            name=f"{family}/{name or model_type}",
            factory=made(model_type, model, config or {}),
            redraw=redraw,
            tags=frozenset({"real", family, *tags}),
            **fields,
        )
    )


def _beyond(redraw: Redraw, size: tuple[int, int]) -> Callable[[], Call]:
    """The example with one id beyond every vocabulary."""
    name = "input_ids"

    def make() -> Call:
        given = redraw(0, *size)
        ids = given.kwargs[name].clone()
        ids[-1, 1] = 10 * VOCABULARY
        return Call(given.args, {**given.kwargs, name: ids})

    return make


def _without(redraw: Redraw, size: tuple[int, int], *names: str) -> Callable[[], Call]:
    def make() -> Call:
        given = redraw(1, *size)
        kept = {key: value for key, value in given.kwargs.items() if key not in names}
        return Call(given.args, kept)

    return make


def encoder(model_type: str, model: str, *tags: str, **fields: Any) -> None:
    """Takes ids and a mask of padding at the right."""
    parts: dict[str, Part] = {"input_ids": IDS, "attention_mask": MASK}
    _text("encoder", model_type, model, parts, *tags, **fields)


def decoder(model_type: str, model: str, *tags: str, **fields: Any) -> None:
    """Takes ids and a mask; keeps no cache, which stateful decoding is tested with elsewhere."""
    parts = {"input_ids": IDS, "attention_mask": MASK, "use_cache": constant(False)}
    left = draw(**{**parts, "attention_mask": mask(left=True)})
    others = {"left padded": lambda: left(2, 3, 9), **fields.pop("others", {})}
    family = fields.pop("family", "decoder")
    _text(family, model_type, model, parts, *tags, others=others, **fields)


def seq2seq(model_type: str, model: str, *tags: str, **fields: Any) -> None:
    """Takes ids with a mask, and the decoder's ids, one fewer."""
    parts = {
        "input_ids": IDS,
        "attention_mask": MASK,
        "decoder_input_ids": integers(5, VOCABULARY, "B", 3),
        "use_cache": constant(False),
    }
    _text("seq2seq", model_type, model, parts, *tags, **fields)


def _text(
    family: str, model_type: str, model: str, base: dict[str, Part], *tags: str, **fields: Any
) -> None:
    parts = {**base, **fields.pop("parts", {})}
    for name in fields.pop("drop", ()):
        del parts[name]
    redraw = draw(**parts)
    size = fields.setdefault("size", (2, 7))
    others: dict[str, Callable[[], Call]] = {"beyond the vocabulary": _beyond(redraw, size)}
    if "attention_mask" in parts:
        others["without a mask"] = _without(redraw, size, "attention_mask")
    others |= fields.pop("others", {})
    fields.setdefault("lengths", LENGTHS)
    architecture(family, model_type, model, redraw, *tags, others=others, **fields)


def images(family: str, model_type: str, model: str, *tags: str, **fields: Any) -> None:
    """Takes pixels; the side of an image is 8 times the length."""
    parts: dict[str, Part] = {
        "pixel_values": normal("B", fields.pop("channels", 3), "8L", "8L"),
        **fields.pop("parts", {}),
    }
    fields.setdefault("size", (2, 4))
    architecture(family, model_type, model, draw(**parts), *tags, **fields)


def ramp(batch: int, length: int) -> Tensor:
    """[batch, length] of positions."""
    return torch.arange(length).expand(batch, length).contiguous()
