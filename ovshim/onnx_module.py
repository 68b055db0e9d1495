"""A module that is an ONNX model: run by ONNX Runtime or, where that is missing, by ONNX's own
reference evaluator. That is its eager; OpenVINO takes the model itself.
"""

from __future__ import annotations

import inspect
import keyword
import logging
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from torch import nn

from ovshim.cache.files import checksum
from ovshim.errors import ArtifactError

__all__ = ["OnnxModule", "Port", "opened"]

log = logging.getLogger("ovshim")

_CORRECT = "Export the model once more, or correct it."


@dataclass(frozen=True)
class Port:
    """An input or an output: its name in the model, as a parameter of `forward`, its dtype, and its
    sizes: a number, or a name (its own, where the model gives none) for one that may change."""

    name: str
    parameter: str
    dtype: torch.dtype
    dims: tuple[int | str, ...]


class Held:
    """What belongs to the process and not to the model: where it came from, and what runs it.

    Attributes:
        source: a path, or the model's bytes.
    """

    _ovshim_transparent = True

    def __init__(self, source: Path | bytes, run: Callable[[dict[str, Any]], list[Any]]) -> None:
        self.source = source
        self.run = run

    def __deepcopy__(self, memo: dict[int, Any]) -> Held:
        return self


class OnnxModule(nn.Module):
    """An ONNX model as a module: tensors in by position or by name, tensors out.

    `forward` gives a tensor where the model has one output, else a tuple of them.

    Attributes:
        inputs, outputs: what it takes and gives.
        dtype: of most of its weights that are floats.
        digest: 32 hex digits of the model and the files that its weights are in.
        held: see `Held`.
    """

    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    dtype: torch.dtype
    digest: str
    held: Held

    def answer(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the model answers. TypeError for arguments that it does not take, RuntimeError in a
        trace, and whatever its runtime raises."""
        if torch._C._get_tracing_state() is not None:
            raise RuntimeError(
                "An ONNX model runs in a runtime of its own: a trace would keep what it"
                " answers here, and answer nothing else."
            )
        known = {port.name: port.parameter for port in self.inputs}
        named = {known.get(name, name): value for name, value in kwargs.items()}
        bound = inspect.signature(self._own_forward()).bind(*args, **named).arguments
        given = {}
        for port in self.inputs:
            tensor = bound[port.parameter]
            if not isinstance(tensor, torch.Tensor) or tensor.dtype is not port.dtype:
                what = getattr(tensor, "dtype", type(tensor).__qualname__)
                raise TypeError(f"{port.name} is {what}; the model takes {port.dtype}")
            given[port.name] = tensor.detach().contiguous().numpy()
        found = [torch.from_numpy(value) for value in self.held.run(given)]
        return found[0] if len(found) == 1 else tuple(found)

    def digest_now(self) -> str:
        """The digest of what is in the files at this moment. Raises ArtifactError."""
        source = self.held.source
        if isinstance(source, bytes):
            return self.digest
        return _digest(source, _parsed(source, str(source)), str(source))

    def _own_forward(self) -> Callable[..., Any]:
        return type(self).forward.__get__(self)  # type: ignore[no-any-return]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The class is made for the model, and what runs it stays in its process.
        state = {name: value for name, value in self.__dict__.items() if name != "held"}
        return _reopened, (self.held.source,), state

    def extra_repr(self) -> str:
        takes = ", ".join(f"{port.name}: {list(port.dims)}" for port in self.inputs)
        return f"{takes} -> {', '.join(port.name for port in self.outputs)}"


def opened(model: Any) -> OnnxModule:
    """The module of a path, of the bytes of a model, or of an `onnx.ModelProto`.

    Raises ArtifactError: what is wrong with the model.
    """
    import onnx

    if isinstance(model, onnx.ModelProto):
        model = _bytes_of(model)
    elif isinstance(model, bytearray | memoryview):
        model = bytes(model)
    elif not isinstance(model, bytes):
        model = Path(model).expanduser().absolute()
    where = "the model" if isinstance(model, bytes) else str(model)
    proto = _parsed(model, where)
    inputs, outputs = _ports(proto, where)
    forward = _forward(inputs)
    name = re.sub(r"\W+", "_", proto.graph.name).strip("_") or "OnnxModel"
    cls = type(name, (OnnxModule,), {"forward": forward, "__module__": __name__})
    module: OnnxModule = cls()
    module.inputs, module.outputs = inputs, outputs
    module.dtype = _dtype_of(proto)
    module.digest = _digest(model, proto, where)
    module.held = Held(model, _runner(model, where, [port.name for port in outputs]))
    return module.eval()


def _reopened(source: Path | bytes) -> OnnxModule:
    return opened(source)


def _bytes_of(proto: Any) -> bytes:
    try:
        return bytes(proto.SerializeToString())
    except Exception as error:  # protobuf's own, by way of several implementations
        what = f"it cannot be written as one message: {error}."
        remedy = "Save it with onnx.save(..., save_as_external_data=True), and give the path."
        raise ArtifactError("the model", what, remedy) from error


def _parsed(model: Path | bytes, where: str) -> Any:
    """The model, without the weights that are in files of their own, checked."""
    import onnx

    try:
        if isinstance(model, bytes):
            proto = onnx.load_from_string(model)
            if _external(proto):
                what = "its weights are in files of their own, and bytes do not say where."
                raise ArtifactError(where, what, "Give the path of the model.")
            onnx.checker.check_model(proto)
        else:
            proto = onnx.load(str(model), load_external_data=False)
            onnx.checker.check_model(str(model))  # by path: it looks at those files too
    except ArtifactError:
        raise
    except Exception as error:  # a file system's, protobuf's or the checker's
        text = " ".join(str(error).split())[:300].rstrip(".")
        what = f"it is no ONNX model that can be read: {text or type(error).__name__}."
        raise ArtifactError(where, what, _CORRECT) from error
    return proto


def _ports(proto: Any, where: str) -> tuple[tuple[Port, ...], tuple[Port, ...]]:
    constants = {tensor.name for tensor in proto.graph.initializer}
    constants |= {tensor.values.name for tensor in proto.graph.sparse_initializer}
    taken: set[str] = set()
    inputs = [i for i in proto.graph.input if i.name not in constants]
    found = (
        tuple(_port(one, taken, where, "input") for one in inputs),
        tuple(_port(one, taken, where, "output") for one in proto.graph.output),
    )
    if not found[1]:
        raise ArtifactError(where, "it has no outputs.", _CORRECT)
    return found


def _port(stored: Any, taken: set[str], where: str, what: str) -> Port:
    from onnx import helper

    tensor = stored.type.tensor_type
    try:
        if stored.type.WhichOneof("value") != "tensor_type":
            raise TypeError
        dtype = torch.from_numpy(
            np.empty(0, helper.tensor_dtype_to_np_dtype(tensor.elem_type))
        ).dtype
    except (TypeError, KeyError) as error:  # text, sequences, and types that NumPy has not got
        problem = f"{what} {stored.name!r} is of a type that NumPy and torch do not share."
        raise ArtifactError(where, problem, "Change its type in the model.") from error
    parameter = re.sub(r"\W", "_", stored.name) or "_"
    if not parameter.isidentifier() or keyword.iskeyword(parameter):
        parameter = f"_{parameter}"
    while parameter in taken:
        parameter += "_"
    taken.add(parameter)
    dims = tuple(
        d.dim_value if d.WhichOneof("value") == "dim_value" else d.dim_param or f"{parameter}_{i}"
        for i, d in enumerate(tensor.shape.dim)
    )
    return Port(stored.name, parameter, dtype, dims)


def _forward(inputs: Sequence[Port]) -> Callable[..., Any]:
    """A `forward` with the model's inputs as its parameters, for who asks for their names."""

    def forward(self: OnnxModule, *args: Any, **kwargs: Any) -> Any:
        return self.answer(args, kwargs)

    either = inspect.Parameter.POSITIONAL_OR_KEYWORD
    own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    parameters = [inspect.Parameter(port.parameter, either) for port in inputs]
    forward.__signature__ = inspect.Signature([own, *parameters])  # type: ignore[attr-defined]
    return forward


def _dtype_of(proto: Any) -> torch.dtype:
    """The dtype of most of the weights that are floats; float32 where there are none."""
    from onnx import TensorProto

    floats = {
        TensorProto.FLOAT: torch.float32,
        TensorProto.FLOAT16: torch.float16,
        TensorProto.DOUBLE: torch.float64,
        TensorProto.BFLOAT16: torch.bfloat16,
    }
    amounts: Counter[torch.dtype] = Counter()
    for tensor in proto.graph.initializer:
        if tensor.data_type in floats:
            amounts[floats[tensor.data_type]] += int(np.prod(tensor.dims, dtype=np.int64))
    return max(amounts, key=lambda dtype: amounts[dtype]) if amounts else torch.float32


def _external(proto: Any) -> list[str]:
    """The files that weights are in, relative to the model."""
    from onnx.external_data_helper import ExternalDataInfo, _get_all_tensors, uses_external_data

    tensors = (t for t in _get_all_tensors(proto) if uses_external_data(t))
    return sorted({ExternalDataInfo(tensor).location for tensor in tensors})


def _digest(model: Path | bytes, proto: Any, where: str) -> str:
    if isinstance(model, bytes):
        return xxhash.xxh3_128_hexdigest(model)
    try:
        _, own = checksum(model)
        others = [checksum(model.parent / name) for name in _external(proto)]
    except (OSError, ValueError) as error:
        raise ArtifactError(where, f"it cannot be read: {error}.", _CORRECT) from error
    return xxhash.xxh3_128_hexdigest(repr([own, *others]).encode()) if others else own


def _runner(
    model: Path | bytes, where: str, outputs: list[str]
) -> Callable[[dict[str, Any]], list[Any]]:
    """What runs the model: ONNX Runtime, where it is installed and takes it."""
    trouble: list[str] = []
    for make in (_by_runtime, _by_reference):
        try:
            return make(model, outputs)
        except ModuleNotFoundError as error:
            log.debug("%s", error)
        except Exception as error:  # whatever either says of operators that it does not know
            log.debug("%s", where, exc_info=True)
            trouble.append(" ".join(str(error).split())[:300])
    what = f"nothing here runs it: {'; '.join(trouble)}."
    raise ArtifactError(where, what, "Install onnxruntime, or replace the operators it names.")


def _by_runtime(model: Path | bytes, outputs: list[str]) -> Callable[[dict[str, Any]], list[Any]]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # errors are raised; on the console they would be told twice
    options.intra_op_num_threads = torch.get_num_threads()
    source = model if isinstance(model, bytes) else str(model)
    session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    return lambda given: list(session.run(outputs, given))


def _by_reference(model: Path | bytes, outputs: list[str]) -> Callable[[dict[str, Any]], list[Any]]:
    import onnx
    from onnx.reference import ReferenceEvaluator

    proto = onnx.load_from_string(model) if isinstance(model, bytes) else onnx.load(str(model))
    evaluator = ReferenceEvaluator(proto)
    # Copies: what it gives may be what it was given, or a weight.
    return lambda given: [np.array(value) for value in evaluator.run(outputs, given)]
