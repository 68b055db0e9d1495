"""docs/precision.md, made from one run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from page import measured_on
from precisions import ACCURACY_HEAD, HEAD, Accuracy, Lowered
from rows import LOSES, markdown

__all__ = ["page"]

_TOP = f"""# Precision, measured

Made by `nox -s bench -- precision --write-docs`; nobody edits it. `{LOSES}` marks each figure in
which ovshim loses. How precisions are asked for is told in the [guide](guide.md#precision).

Figures of a model were taken in one process, all ways in turns, as [benchmarks](benchmarks.md) has
it; batch 1, `torch.inference_mode()`, torch's number of threads. *Error* is the relative L2 error
of the worst output against eager in fp32, on the inputs that are timed; a way that is off by more
than 0.2 would not be timed. *Runs in* is read from what was compiled: a processor without float16
runs `"fp16"` in something else. *Made in* is everything until the first call: conversion,
quantization, proof (`"auto"` decides between some of the rows above it, whose graphs come from the
cache). *On disk* is the graph with its weights; for eager, its tensors.

*Raw OpenVINO* is reshaped to these very sizes and called bare, outputs left in its own memory. On
the graph of `"int8"` it shows what that graph allows at most.
"""

_ACCURACY = """
## Right answers

Models that were trained in seconds, asked what they were not trained on: 500 digits of
scikit-learn's, and 2000 rows of twelve digits to sort, of which each has to be right as a whole.
*Points* are percentage points against eager. Tolerances are the defaults.
"""


def page(
    speed: Mapping[str, Sequence[Lowered]],
    accuracy: Mapping[str, Sequence[Accuracy]],
    load: float,
) -> str:
    """The whole page.

    Args:
        speed, accuracy: rows by model.
        load: the share of the processors that other programs took before the run.
    """
    rows = [row for group in speed.values() for row in group]
    lines = [_TOP, *measured_on([found.row for found in rows], load), "", "## Speed", ""]
    lines += markdown(HEAD, (found.cells() for found in rows))
    answers = [found.cells() for group in accuracy.values() for found in group]
    lines += [_ACCURACY, *markdown(ACCURACY_HEAD, answers)]
    return "\n".join(lines) + "\n"
