"""The whole corpus: `pytest -m conformance`, an entry a test, each in a child process.

Records are written to the directory that CONFORMANCE_RESULTS names, where it is set.
"""

import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from conformance.entries import Entry, entries
from conformance.worker import Worker

pytestmark = pytest.mark.conformance


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    worker = Worker()
    yield worker
    worker.close()


@pytest.mark.parametrize("entry", entries().values(), ids=lambda entry: entry.name)
def test_answers_are_eagers(entry: Entry, worker: Worker) -> None:
    record = worker.run(entry.name, entry.path)
    results = os.environ.get("CONFORMANCE_RESULTS")
    if results:
        file = Path(results, entry.name.replace("/", "-") + ".json")
        file.write_text(json.dumps(dataclasses.asdict(record)), encoding="utf-8")
    assert not record.wrong, "\n".join(record.wrong)
    assert record.as_expected, f"{record.path} for {record.expected}: {record.message}"
