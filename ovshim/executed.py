"""What a compiled graph really runs in, read from its execution graph."""

import logging
from collections import Counter
from collections.abc import Iterator
from typing import Any

__all__ = ["computes", "keys_and_values", "operations", "precision_run"]

_log = logging.getLogger("ovshim")

# The kinds of nodes whose precision decides speed and error; the others convert, move or add.
_COMPUTE = frozenset(
    {
        "BrgemmConv",
        "Convolution",
        "Deconvolution",
        "FullyConnected",
        "FullyConnectedCompressed",
        "Gemm",
        "GroupConvolution",
        "GRUCell",
        "GRUSequence",
        "LLMMLP",
        "LSTMCell",
        "LSTMSequence",
        "MatMul",
        "MHA",
        "QKVProjection",
        "RNNCell",
        "RNNSeq",
        "RNNSequence",
        "ScaledDotProductAttention",
        "ScaledDotProductAttentionWithKVCache",
    }
)
_SCAFFOLDING = frozenset({"Const", "Convert", "Input", "Output", "Parameter", "Reorder", "Result"})


def precision_run(compiled: Any) -> str:
    """What most of the compute nodes run in: `f32`, `bf16`, `f16`, `i8`, ...

    Read from the execution graph: the property of the compiled model says what was asked for.
    Where there is nothing to multiply, the other nodes count; `unknown` when the device shows
    no graph.
    """
    compute: Counter[str] = Counter()
    other: Counter[str] = Counter()
    for kind, ran, _ in operations(compiled):
        (compute if kind in _COMPUTE else other)[ran] += 1
    count = compute or other
    # Of equals the first by name, so that the answer does not depend on the order of nodes.
    return min(count, key=lambda ran: (-count[ran], ran)) if count else "unknown"


def keys_and_values(compiled: Any) -> str | None:
    """What keys and values of attention over a state are kept in; None where the device does not
    say."""
    try:
        return str(compiled.get_property("KV_CACHE_PRECISION").get_type_name())
    except RuntimeError as error:
        _log.debug("No precision of keys and values: %s", error)
        return None


def operations(compiled: Any) -> Iterator[tuple[str, str, str]]:
    """The operations of the execution graph that do more than convert or move: the kind of each,
    what it runs in, and the names of the operations that it was made of, separated by commas."""
    try:
        nodes = compiled.get_runtime_model().get_ordered_ops()
    except RuntimeError as error:
        _log.debug("No execution graph: %s", error)
        return
    for node in nodes:
        info = node.get_rt_info()
        if "layerType" not in info or "runtimePrecision" not in info:
            continue
        kind = info["layerType"].astype(str)
        ran = info["runtimePrecision"].astype(str)
        if kind not in _SCAFFOLDING:
            names = info["originalLayersNames"].astype(str) if "originalLayersNames" in info else ""
            yield kind, _computed_in(node, ran) if kind in _COMPUTE else ran, names


def _computed_in(node: Any, ran: str) -> str:
    """What a product runs in. With compressed weights the plugin names the weights' type, also
    where they are multiplied as floats."""
    if ran not in ("i8", "u8", "i4", "u4"):
        return ran
    source = node.input(0).get_source_output()
    types = source.get_node().get_rt_info()["outputPrecisions"].astype(str).split(",")
    given = types[source.get_index()] if len(types) > source.get_index() else types[0]
    return given if given in ("f32", "bf16", "f16") else "i8"


def computes(kind: str) -> bool:
    """Whether operations of this kind of the execution graph multiply: their precision decides."""
    return kind in _COMPUTE
