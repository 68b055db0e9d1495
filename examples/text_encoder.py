"""Embed sentences with a BERT of any length, from a transformers configuration.

The weights are random, so that nothing is downloaded: with `BertModel.from_pretrained(name)` in
place of `BertModel(config)` the rest stays as it is. Needs transformers: pip install transformers
"""

import torch
from transformers import BertConfig, BertModel

import ovshim

LENGTHS = (12, 7, 30, 19)


def batch_of(rows: int, length: int) -> dict[str, torch.Tensor]:
    """Token ids of `rows` sentences, the first of them two tokens shorter, padded with 0."""
    ids = torch.randint(1, 1000, (rows, length))
    mask = torch.ones_like(ids)
    ids[0, -2:] = mask[0, -2:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def embedding(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The mean over each sentence's own tokens, float32 [rows, hidden]."""
    hidden = model(**batch).last_hidden_state  # transformers' own output class, as ever
    mask = batch["attention_mask"].unsqueeze(-1)
    return (hidden * mask).sum(1) / mask.sum(1)


def main() -> None:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=1000,
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=256,
    )
    model = BertModel(config).eval()

    # Said beforehand, the lengths may change from the first call on. Left out, the second length
    # would cost one rebuild, and every process after that would begin with open lengths.
    names = {0: "batch", 1: "length"}
    fast = ovshim.accelerate(
        model,
        batch_of(2, 16),
        dynamic_shapes={"input_ids": names, "attention_mask": names},
        prefer="openvino",
    )
    worst = 0.0
    with torch.inference_mode():
        for rows, length in enumerate(LENGTHS, start=1):
            batch = batch_of(rows, length)
            expected, answer = embedding(model, batch), embedding(fast, batch)
            worst = max(worst, float((answer - expected).norm() / expected.norm()))
    print(f"{len(LENGTHS)} lengths, largest relative error against eager: {worst:.1e}")
    print(ovshim.explain(fast))


if __name__ == "__main__":
    main()
