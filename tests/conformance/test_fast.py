"""A part of the corpus that runs on every change: something of each kind, in this process."""

from pathlib import Path

import pytest

from conformance.check import check
from conformance.entries import entries

FAST = [
    "values/rare-branch",
    "shapes/causal-mask",
    "recurrent/lstm",
    "state/buffer-counter",
    "state/input-written",
    "reads/config-object",
    "reads/tensor-attribute",
    "signatures/keywords",
    "structures/views-of-one-output",
    "dtypes/floor-division",
    "numbers/softmax",
    "indexing/embedding",
    "layers/sdpa-rows-masked",
    "encoder/distilbert",
    "vision/vit",
]


@pytest.mark.parametrize("name", FAST)
def test_answers_are_eagers(name: str, tmp_path: Path) -> None:
    record = check(entries()[name], str(tmp_path))
    assert not record.wrong, "\n".join(record.wrong)
    assert record.as_expected, f"{record.path} for {record.expected}: {record.message}"
