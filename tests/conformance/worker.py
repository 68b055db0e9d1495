"""Entries in a child process, which a crash in the frontend or in a kernel may kill.

As a program: reads names, a line each, and answers each with its record as a line of JSON.
"""

from __future__ import annotations

import dataclasses
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from conformance.check import Record

__all__ = ["Worker"]

TESTS = Path(__file__).parents[1]


class Worker:
    """Runs entries one after the other in a child, a fresh one after each `batch` and each crash.

    A child to each entry would import torch and transformers each time; one child for all would
    pile up what transformers and Dynamo keep.
    """

    def __init__(self, batch: int = 10, timeout: float = 900.0) -> None:
        self._batch = batch
        self._timeout = timeout
        self._done = 0
        self._child: subprocess.Popen[str] | None = None
        self._lines: queue.Queue[str] = queue.Queue()

    def run(self, name: str, expected: str = "either") -> Record:
        """The record of that entry; its path is "crashed" or "timeout" where the child died."""
        from conformance.check import Record

        if self._done >= self._batch:
            self.close()
        child = self._child or self._start()
        assert child.stdin is not None
        child.stdin.write(name + "\n")
        child.stdin.flush()
        self._done += 1
        try:
            line = self._lines.get(timeout=self._timeout)
        except queue.Empty:
            self.close()
            told = f"no answer within {self._timeout:.0f} s"
            return Record(name, expected, [told], "timeout", seconds=self._timeout)
        if line:
            return Record(**json.loads(line))
        died = child.wait()
        self.close()
        return Record(name, expected, [f"the process died: {_death(died)}"], "crashed")

    def close(self) -> None:
        """End the child, if there is one."""
        child, self._child, self._done = self._child, None, 0
        if child is not None:
            child.kill()
            child.communicate()

    def _start(self) -> subprocess.Popen[str]:
        places = [str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(places), "HF_HUB_OFFLINE": "1"}
        self._child = child = subprocess.Popen(
            [sys.executable, "-X", "faulthandler", "-m", "conformance.worker"],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        # A thread and a queue of its own to each child: the last words of a former one are not
        # taken for those of the next.
        self._lines = queue.Queue()
        assert child.stdout is not None
        reader = threading.Thread(target=_read, args=(child.stdout, self._lines), daemon=True)
        reader.start()
        return child


def _read(stream: IO[str], lines: queue.Queue[str]) -> None:
    for line in stream:
        lines.put(line)
    lines.put("")


def _death(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"


def main() -> None:
    # Modules of the corpus print: the records get the standard output to themselves.
    records = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import torch

    from conformance.check import check
    from conformance.entries import entries

    # Agreement is what is measured, and the workers share the machine.
    torch.set_num_threads(1)
    for line in sys.stdin:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as cache:
            record = check(entries()[line.strip()], cache)
        records.write(json.dumps(dataclasses.asdict(record)) + "\n")
        records.flush()


if __name__ == "__main__":
    main()
