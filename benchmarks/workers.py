"""Two workers of Ray Data or of Spark, each with one accelerated encoder, beside eager.

python benchmarks/workers.py ray      (or: spark)

In one run: every worker has both, takes turns with them on each batch, and is in the other worker's
way as it would be at work. Both are of the same weights, which are mapped from a file.

Told besides: how many workers converted, and how much of the memory that the weights lie in is
counted twice. Linux tells: of each page "Pss" takes the share of one process among those that have
it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import machine
import numpy as np
import torch

import ovshim

WORKERS = 2
ROWS = 16
LENGTH = 64


def encoder() -> torch.nn.Module:
    """Of the size of MiniLM, with random weights: 22.6 million, 90 MB."""
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12}
    torch.manual_seed(0)
    return BertModel(BertConfig(intermediate_size=1536, **sizes)).eval()


class Worker:
    """What each process makes once."""

    def __init__(self, weights: str) -> None:
        self.eager = encoder()
        self.eager.load_state_dict(torch.load(weights, mmap=True), assign=True)
        example = {"input_ids": torch.ones(ROWS, LENGTH, dtype=torch.int64)}
        started = time.perf_counter()
        self.fast = ovshim.accelerate(self.eager, example, prefer="openvino")
        self.ready = time.perf_counter() - started
        self.weights = weights
        self.turn = 0

    def measure(self, ids: np.ndarray[Any, Any]) -> str:
        """The seconds of either on a batch, and the rest, as JSON."""
        batch = torch.tensor(ids, dtype=torch.int64)
        ways = [("eager", self.eager), ("ovshim", self.fast)]
        self.turn += 1
        told: dict[str, Any] = {}
        with torch.inference_mode():
            for name, model in ways[:: 1 if self.turn % 2 else -1]:
                started = time.perf_counter()
                answer = model(input_ids=batch).last_hidden_state
                told[name] = time.perf_counter() - started
                told[f"norm of {name}"] = float(answer.double().norm())
        report = ovshim.explain(self.fast).to_dict()
        (plan,) = report["plans"]
        entry = Path(str(plan["cache_path"]), "model.bin")
        return json.dumps(
            told
            | {"process": os.getpid(), "turn": self.turn, "ready": self.ready}
            | {"cache": plan["cache"], "threads": torch.get_num_threads()}
            | {"calls": report["calls"], "memory": memory({"torch": self.weights, "ovshim": entry})}
        )


def memory(files: Mapping[str, str | Path]) -> dict[str, dict[str, int]]:
    """Bytes of this process in each mapped file, and in all: "Rss", and "Pss"."""
    found = {name: {"Rss": 0, "Pss": 0} for name in [*files, "process"]}
    names = {os.path.realpath(path): name for name, path in files.items()}
    try:
        text = Path("/proc/self/smaps").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    name = None
    for line in text.splitlines():
        if begins := re.match(r"[0-9a-f]+-[0-9a-f]+ \S+ \S+ \S+ \S+ *(.*)", line):
            name = names.get(begins[1])
        elif value := re.match(r"(Rss|Pss): +(\d+) kB", line):
            for key in ("process", name):
                if key is not None:
                    found[key][value[1]] += 1024 * int(value[2])
    return found


# --- engines --------------------------------------------------------------------------------------


def by_ray(weights: str, batches: Sequence[torch.Tensor]) -> list[str]:
    import ray

    class OfRay(Worker):
        def __call__(self, batch: dict[str, np.ndarray[Any, Any]]) -> dict[str, Any]:
            return {"told": np.array([self.measure(batch["ids"])])}

    ray.init(num_cpus=WORKERS, include_dashboard=False, log_to_driver=False)
    rows = [{"ids": row.numpy()} for batch in batches for row in batch]
    workers = ray.data.ActorPoolStrategy(size=WORKERS, max_tasks_in_flight_per_actor=1)
    given = ray.data.from_items(rows, override_num_blocks=len(batches))
    done = given.map_batches(
        OfRay, fn_constructor_args=(weights,), compute=workers, num_cpus=1, batch_size=ROWS
    )
    told = [str(row["told"]) for row in done.take_all()]
    ray.shutdown()
    return told


def by_spark(weights: str, batches: Sequence[torch.Tensor]) -> list[str]:
    from pyspark.ml.functions import predict_batch_udf
    from pyspark.sql import SparkSession
    from pyspark.sql.functions import col
    from pyspark.sql.types import StringType

    def make() -> Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]:
        worker = Worker(weights)
        return lambda ids: np.full(len(ids), worker.measure(ids))

    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    made = SparkSession.builder.master(f"local[{WORKERS}]").config("spark.ui.enabled", "false")
    spark = made.getOrCreate()
    spark.sparkContext.setLogLevel("ERROR")
    measure = predict_batch_udf(
        make, return_type=StringType(), batch_size=ROWS, input_tensor_shapes=[[LENGTH]]
    )
    rows = [(row,) for batch in batches for row in batch.tolist()]
    frame = spark.createDataFrame(rows, "ids array<bigint>").repartition(WORKERS)
    told = [row.told for row in frame.select(measure(col("ids")).alias("told")).collect()]
    spark.stop()
    return sorted(set(told))


# --- what they found ------------------------------------------------------------------------------


def table(told: Sequence[Mapping[str, Any]]) -> str:
    """What the workers found, in words. The first batch of each is left out."""
    workers: dict[int, list[Mapping[str, Any]]] = {}
    for found in told:
        workers.setdefault(found["process"], []).append(found)
    lines = [f"{name}: {value}" for name, value in machine.describe()]
    lines.append(f"workers: {len(workers)}, batches of {ROWS} x {LENGTH} tokens")
    for process, own in workers.items():
        own.sort(key=lambda found: found["turn"])
        last, timed = own[-1], own[1:] or own
        medians = {way: statistics.median(f[way] for f in timed) for way in ("eager", "ovshim")}
        worst = max(abs(f["norm of ovshim"] / f["norm of eager"] - 1) for f in own)
        lines.append(
            f"process {process}, {last['threads']} thread: {len(own)} batches, cache "
            f"{last['cache']}, ready in {last['ready']:.1f} s; eager "
            f"{1e3 * medians['eager']:.1f} ms, ovshim {1e3 * medians['ovshim']:.1f} ms, "
            f"{medians['eager'] / medians['ovshim']:.2f}x; calls {last['calls']}; "
            f"norms differ by {worst:.0e}"
        )
        for name, size in last["memory"].items():
            lines.append(
                f"  {name}: Rss {size['Rss'] / 1e6:.0f} MB, Pss {size['Pss'] / 1e6:.0f} MB"
            )
    converted = sum(own[0]["cache"] == "miss" for own in workers.values())
    lines.append(f"workers that converted: {converted} of {len(workers)}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("engine", choices=["ray", "spark"])
    parser.add_argument("--batches", type=int, default=40)
    chosen = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    sizes = (ROWS, LENGTH)
    batches = [torch.randint(1, 30522, sizes, generator=generator) for _ in range(chosen.batches)]
    with tempfile.TemporaryDirectory() as directory:
        os.environ["OVSHIM_CACHE_DIR"] = str(Path(directory, "cache"))
        weights = str(Path(directory, "weights.pt"))
        torch.save(encoder().state_dict(), weights)
        told = (by_ray if chosen.engine == "ray" else by_spark)(weights, batches)
    print(table([json.loads(text) for text in told]))


if __name__ == "__main__":
    main()
