"""Token by token: `generate()` of llamas, greedy, after prompts of several lengths.

A call is a whole `generate` of as many new tokens; eager pays for the same Python around its steps.
Beside it what passes before the first of them. By default whoever is faster has the prompt; with
`prefer="openvino"` OpenVINO has it.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import quiet
import torch
from board import Board
from replay import clock
from ways import Ways, measure_ways

import ovshim

pytestmark = pytest.mark.benchmark(timer=clock)

_PROMPTS = (32, 300, 900)
_NEW = 32
_TITLES = {
    "eager": "eager",
    "ovshim": "ovshim",
    "fp32": 'ovshim, prefer="openvino"',
    "bf16": 'ovshim, prefer="openvino", precision="bf16"',
    "int8_weights": 'ovshim, prefer="openvino", precision="int8_weights"',
}
# Calls after which it is settled who has the prompt.
_SETTLED = 4


@dataclasses.dataclass(frozen=True)
class Size:
    """Of a model: layers, width, heads, tokens that there are; what it is called in tables."""

    layers: int
    width: int
    heads: int
    vocabulary: int
    name: str


_SMALL = Size(2, 64, 8, 8000, "2 layers, 64 wide")
_SIZES = (
    Size(8, 512, 8, 8000, "8 layers, 512 wide"),
    Size(12, 768, 12, 16000, "100 M parameters"),
)


def _model(size: Size) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.width,
        intermediate_size=size.width * 11 // 4,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        max_position_embeddings=2048,
        eos_token_id=None,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def models(
    board: Board, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[Size], dict[str, Any]]]:
    """Gives the ways of decoding, each of which has made its plan; of the last size alone."""
    kept: dict[Size, dict[str, Any]] = {}

    def give(size: Size) -> dict[str, Any]:
        if size not in kept:
            kept.clear()
            quiet.wait(board.effort.patience)
            kept[size] = _accelerated(_model(size), tmp_path_factory.mktemp("cache"))
        return kept[size]

    yield give
    kept.clear()


def _accelerated(model: Any, cache: Path) -> dict[str, Any]:
    example = torch.arange(8)[None]
    found = {"eager": model, "ovshim": ovshim.accelerate(model, example, cache_dir=cache)}
    for precision in [name for name in _TITLES if name not in found]:
        fast = ovshim.accelerate(
            model,
            example,
            precision=precision,
            prefer="openvino",
            # On random weights its error is beyond the default.
            tolerance="loose" if precision == "int8_weights" else None,
            cache_dir=cache,
        )
        assert [p["path"] for p in ovshim.explain(fast).to_dict()["plans"]] == ["openvino"]
        found[precision] = fast
    return found


@pytest.fixture(
    scope="module",
    params=itertools.product(_SIZES, _PROMPTS, (_NEW, 1)),
    ids=lambda given: f"{given[0].layers}-layers-prompt-{given[1]}-new-{given[2]}",
)
def finding(
    request: pytest.FixtureRequest, board: Board, models: Callable[[Size], dict[str, Any]]
) -> Ways:
    """One model after one prompt: all of the tokens, or the first of them."""
    size, prompt, new = request.param
    if board.small:
        if size is not _SIZES[0]:
            pytest.skip("a quick run has one small model")
        size = _SMALL
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, size.vocabulary, (1, prompt), generator=generator)
    ways: dict[str, Callable[[], Any]] = {
        name: functools.partial(model.generate, ids, max_new_tokens=new, do_sample=False)
        for name, model in models(size).items()
    }
    quiet.wait(board.effort.patience)
    for _ in range(_SETTLED):
        tokens = {name: way() for name, way in ways.items()}
        assert torch.equal(tokens["ovshim"], tokens["eager"])
        assert torch.equal(tokens["fp32"], tokens["eager"])
    return measure_ways(
        f"generate {new} token{'s'[: new - 1]}: llama, {size.name}, prompt {prompt}",
        ways,
        _TITLES,
        board,
        ours=frozenset(_TITLES) - {"eager"},
        remark=lambda seconds: f"{new / seconds:.1f} tokens/s",
    )


@pytest.mark.parametrize("way", _TITLES)
def test_generate(way: str, finding: Ways, board: Board, benchmark: Any) -> None:
    finding.show(way, board, benchmark)
