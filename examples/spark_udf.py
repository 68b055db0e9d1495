"""Embed sentences by PySpark's predict_batch_udf: two Python workers, one conversion.

The worker that is first converts the encoder, the other finds it in the cache. The encoder has
random weights, so that nothing is downloaded; they are mapped from a file, so that all workers of a
machine share the memory that they lie in.

Needs Java, Spark and transformers: pip install "pyspark[sql]" transformers
"""

import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from pyspark.ml.functions import predict_batch_udf
from pyspark.sql import SparkSession
from pyspark.sql.functions import col
from pyspark.sql.types import ArrayType, FloatType, StringType, StructField, StructType
from transformers import BertConfig, BertModel

import ovshim

WORKERS = 2
LENGTH = 16  # token ids of each sentence, padded with 0

ANSWER = StructType(
    [
        StructField("embedding", ArrayType(FloatType())),
        StructField("worker", StringType()),  # its process and whether it has converted
    ]
)


def encoder() -> BertModel:
    config = BertConfig(
        vocab_size=1000,
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=256,
    )
    return BertModel(config).eval()


def batch_of(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def embedding(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """The mean over each sentence's own tokens, float32 [rows, hidden]."""
    batch = batch_of(ids)
    hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"]
    return (hidden * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)


def predictor(weights: str) -> Callable[[], Callable[[np.ndarray], dict[str, np.ndarray]]]:
    """Given to Spark, which calls it once in each worker."""

    def make() -> Callable[[np.ndarray], dict[str, np.ndarray]]:
        model = encoder()
        # Mapped and not copied (assign): every worker looks at the same pages.
        model.load_state_dict(torch.load(weights, mmap=True), assign=True)
        # With an example, the worker that comes second waits here until the first has converted.
        # Without prefer="openvino" eager keeps what it does faster, and this encoder is small.
        example = batch_of(torch.ones(2, LENGTH, dtype=torch.int64))
        fast = ovshim.accelerate(model, example, prefer="openvino")

        def predict(ids: np.ndarray) -> dict[str, np.ndarray]:
            with torch.inference_mode():
                found = embedding(fast, torch.tensor(ids, dtype=torch.int64)).numpy()
            (plan, *_) = ovshim.explain(fast).to_dict()["plans"]
            worker = f"{os.getpid()} {plan['path']} {plan['cache']}"
            return {"embedding": found, "worker": np.full(len(ids), worker)}

        return predict

    return make


def main() -> None:
    torch.manual_seed(0)
    model = encoder()
    ids = torch.randint(1, 1000, (512, LENGTH))
    ids[::3, -4:] = 0

    # Else the workers are whatever python3 is first on the path.
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    spark = (
        SparkSession.builder.master(f"local[{WORKERS}]").config("spark.ui.enabled", "false")
    ).getOrCreate()
    spark.sparkContext.setLogLevel("ERROR")
    with tempfile.TemporaryDirectory() as directory:
        weights = str(Path(directory, "weights.pt"))
        torch.save(model.state_dict(), weights)
        embed = predict_batch_udf(
            predictor(weights),
            return_type=ANSWER,
            batch_size=32,
            input_tensor_shapes=[[LENGTH]],
        )
        sentences = spark.createDataFrame([(row,) for row in ids.tolist()], "ids array<bigint>")
        answers = sentences.repartition(2 * WORKERS).select("ids", embed(col("ids")).alias("found"))
        rows = answers.collect()
    spark.stop()

    given = torch.tensor([row.ids for row in rows])
    with torch.inference_mode():
        expected = embedding(model, given)
    found = torch.tensor([row.found.embedding for row in rows])
    workers = sorted({row.found.worker for row in rows})
    error = (found - expected).norm() / expected.norm()
    print(f"{len(rows)} sentences, relative error against eager: {error:.1e}")
    print(f"workers that converted: {sum('miss' in worker for worker in workers)} of {WORKERS}")
    print(f"workers that OpenVINO served: {sum('openvino' in worker for worker in workers)}")


if __name__ == "__main__":
    main()
