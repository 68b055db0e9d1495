"""`python -m conformance [pattern ...]`: run entries and print what became of each.

With `--out FILE` the records are appended to it as lines of JSON, and what it has is left out.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

from conformance.entries import select
from conformance.worker import Worker


def main() -> None:
    parser = argparse.ArgumentParser(prog="conformance")
    parser.add_argument("patterns", nargs="*")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--list", action="store_true")
    given = parser.parse_args()
    chosen = list(select(*given.patterns))
    if given.list:
        print("\n".join(entry.name for entry in chosen))
        return
    had = set()
    if given.out is not None and given.out.exists():
        had = {json.loads(line)["name"] for line in given.out.read_text().splitlines()}
    worker = Worker()
    for entry in chosen:
        if entry.name in had:
            continue
        record = worker.run(entry.name, entry.path)
        verdict = "WRONG" if record.wrong else "right"
        told = record.reason or record.route or ""
        odd = "" if record.as_expected else f"  NOT {record.expected}"
        print(
            f"{verdict} {record.name} {record.path} {told} {record.calls} {record.after_edit} "
            f"{record.cache} {record.seconds} s{odd}",
            flush=True,
        )
        for line in record.wrong:
            print(f"    {line}", flush=True)
        if record.message:
            print(f"    {record.message}", flush=True)
        if given.out is not None:
            with given.out.open("a") as file:
                file.write(json.dumps(dataclasses.asdict(record)) + "\n")
    worker.close()


if __name__ == "__main__":
    main()
