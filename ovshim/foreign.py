"""`ovshim.from_onnx`: modules that were never PyTorch's."""

from __future__ import annotations

import dataclasses
import os
from typing import TYPE_CHECKING, Any, Unpack

import torch
from torch import nn

from ovshim.api import accelerate
from ovshim.errors import OptionError
from ovshim.options import OptionFields, Options, resolve

if TYPE_CHECKING:
    from onnx import ModelProto

__all__ = ["from_onnx"]

_LOW = {torch.float16: "fp16", torch.bfloat16: "bf16"}


def from_onnx(
    model: str | os.PathLike[str] | bytes | ModelProto,
    *,
    options: Options | None = None,
    **fields: Unpack[OptionFields],
) -> nn.Module:
    """A module that runs an ONNX model through OpenVINO, as `accelerate` runs one of PyTorch's.

        net = ovshim.from_onnx("net.onnx")
        with torch.inference_mode():
            y = net(x)

    Its eager, by which graphs are proved and which answers what they cannot, is ONNX Runtime where
    that is installed, else ONNX's reference evaluator. It takes tensors by position or by the
    model's names, and gives a tensor, or a tuple of them where the model has several outputs. The
    sizes that the model leaves open may change, unless `dynamic_shapes` says which.

    Args:
        model: a path, beside which lie the files of its external data; the bytes of a model; or an
            `onnx.ModelProto`.
        options, fields: see `ovshim.Options`.

    Raises:
        ArtifactError: what is wrong with the model.
        OptionError: a value that cannot be right.
    """
    import onnx

    from ovshim.onnx_module import opened

    sorts = (str, os.PathLike, bytes, bytearray, memoryview, onnx.ModelProto)
    if not isinstance(model, sorts):
        allowed = "a path, the bytes of a model, or an onnx.ModelProto"
        raise OptionError("model", model, allowed, "Save the model to a file, and give its path.")
    chosen = resolve(options, dict(fields))
    if chosen.methods != ("forward",):
        raise OptionError("methods", chosen.methods, "('forward',)", "An ONNX model has no other.")
    module = opened(model)
    if chosen.precision is None and module.dtype in _LOW:
        # There is no upcast to compare with: what runs otherwise is told, as if it had been asked.
        chosen = dataclasses.replace(chosen, precision=_LOW[module.dtype])
    if chosen.dynamic_shapes is None:
        chosen = dataclasses.replace(chosen, dynamic_shapes=_open_sizes(module))
    return accelerate(module, options=dataclasses.replace(chosen, inplace=True))


def _open_sizes(module: Any) -> dict[str, Any]:
    """The sizes that a model leaves open, each by a name of its own: whether two are one is for
    the proof to find out."""
    return {
        port.parameter: {
            d: f"{port.parameter}_{d}" for d, dim in enumerate(port.dims) if isinstance(dim, str)
        }
        for port in module.inputs
    }
