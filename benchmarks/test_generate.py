"""Token by token: `generate()` of a small llama, greedy, after prompts of several lengths.

A call is a whole `generate` of as many new tokens; eager pays for the same Python around its steps.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import quiet
import torch
from board import Board
from interleave import Turns, compare
from measure import AGAIN, settle
from replay import clock, play
from rows import Row, noise

import ovshim

pytestmark = pytest.mark.benchmark(timer=clock)

_PROMPTS = (32, 300, 900)
_NEW = 32
_TITLES = {
    "eager": "eager",
    "fp32": "ovshim, fp32",
    "bf16": 'ovshim, precision="bf16"',
}


def _model(small: bool) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    width = 64 if small else 512
    config = LlamaConfig(
        vocab_size=8000,
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=2 if small else 8,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=2048,
        eos_token_id=None,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def models(board: Board, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The ways of decoding, each of which has made its plan."""
    cache: Path = tmp_path_factory.mktemp("cache")
    model = _model(board.small)
    found = {"eager": model}
    for precision in ("fp32", "bf16"):
        fast = ovshim.accelerate(
            model,
            torch.arange(8)[None],
            precision=precision,
            prefer="openvino",
            cache_dir=cache,
        )
        assert [p["path"] for p in ovshim.explain(fast).to_dict()["plans"]] == ["openvino"]
        found[precision] = fast
    return found


@pytest.fixture(scope="module", params=_PROMPTS)
def finding(
    request: pytest.FixtureRequest, board: Board, models: dict[str, Any]
) -> tuple[str, dict[str, Row], Turns]:
    """The group, its rows by way, and how the measurement went."""
    quiet.wait(board.effort.patience)
    ids = torch.randint(1, 8000, (1, request.param), generator=torch.Generator().manual_seed(0))
    ways: dict[str, Callable[[], Any]] = {
        name: functools.partial(model.generate, ids, max_new_tokens=_NEW, do_sample=False)
        for name, model in models.items()
    }
    tokens = {name: way() for name, way in ways.items()}
    assert torch.equal(tokens["fp32"], tokens["eager"])
    turns = settle({**ways, AGAIN: ways["eager"]}, board.effort)
    size = "2 layers, 64 wide" if board.small else "8 layers, 512 wide"
    group = f"generate {_NEW} tokens: llama, {size}, prompt {request.param}"
    made = {name: _row(group, name, turns) for name in turns.samples}
    board.add(made.values())
    return group, made, turns


def _row(group: str, name: str, turns: Turns) -> Row:
    mine = turns.samples[name]
    against_eager = compare(turns.samples["eager"], mine)
    row = Row(
        group=group,
        backend=_TITLES.get(name, name),
        samples=tuple(mine),
        eager=None if name == "eager" else against_eager,
        remark=noise(against_eager, turns) if name == AGAIN else "",
        ours=name in ("fp32", "bf16"),
    )
    if name == AGAIN or row.seconds is None:
        return row
    return Row(**{**vars(row), "remark": f"{_NEW / row.seconds:.1f} tokens/s"})


@pytest.mark.parametrize("way", _TITLES)
def test_generate(
    way: str, finding: tuple[str, dict[str, Row], Turns], board: Board, benchmark: Any
) -> None:
    group, rows, turns = finding
    benchmark.group = group
    benchmark.extra_info.update(board.facts(rows[way], None, rows[AGAIN], turns))
    play(benchmark, rows[way].samples)
