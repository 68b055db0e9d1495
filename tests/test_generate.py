"""`generate()` of language models: eager's token ids and logits, and OpenVINO really ran."""

import contextlib
import copy
import gc
import io
import json
import os
import pickle
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import language_models as lm
import pytest
import torch
import transformers as hf
from checks import counts, eager_reasons, falls_back, plans, quietly, run_python, same
from torch import Tensor, nn

import ovshim
from ovshim import deferred, floats, runtime
from ovshim.bound import installed
from ovshim.decode import engine as engine_module
from ovshim.decode.long_steps import LongSteps
from ovshim.race import Finish
from ovshim.version import exact_version

# transformers' own, of arguments that its assisted decoding passes to itself.
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:transformers"),
]

PROMPT = torch.tensor([[5, 6, 7, 8, 9, 5, 6, 7, 8, 9, 5, 6, 7]])
BATCH = torch.tensor([[0, 0, 0, 11, 12, 13, 14], [0, 21, 22, 23, 24, 25, 26], list(range(31, 38))])
PADDED = (BATCH != 0).long()
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"inputs": PROMPT, "do_sample": False},
    "sampling": {"inputs": PROMPT, "do_sample": True, "top_k": 20, "temperature": 0.9},
    "beam": {"inputs": PROMPT, "num_beams": 3, "do_sample": False},
    "beam-sample": {"inputs": PROMPT, "num_beams": 3, "do_sample": True},
    "padded": {"inputs": BATCH, "attention_mask": PADDED, "do_sample": False},
    "padded beam": {"inputs": BATCH, "attention_mask": PADDED, "num_beams": 2, "do_sample": False},
    "several": {"inputs": BATCH, "attention_mask": PADDED, "do_sample": True}
    | {"num_return_sequences": 2},
    "several beams": {"inputs": PROMPT, "num_beams": 4, "num_return_sequences": 3}
    | {"do_sample": False},
    "lookup": {"inputs": PROMPT, "prompt_lookup_num_tokens": 3, "do_sample": False},
    "penalty": {"inputs": PROMPT, "do_sample": False, "repetition_penalty": 1.3},
    "chunked": {"inputs": PROMPT, "do_sample": False, "prefill_chunk_size": 4},
}


def accelerated(model: nn.Module, *example: Any, **options: Any) -> Any:
    return ovshim.accelerate(model, *example, **{"prefer": "openvino", **options})


def generate(model: Any, seed: int = 3, **arguments: Any) -> Any:
    torch.manual_seed(seed)
    given = {"max_new_tokens": 12, "return_dict_in_generate": True, "output_logits": True}
    return model.generate(**{**given, **arguments})


def alike(fast: Any, model: Any, **arguments: Any) -> None:
    """Assert that both generate the same, and that OpenVINO did it."""
    expected = generate(model, **arguments)
    before = counts(fast)
    found = generate(fast, **arguments)
    after = counts(fast)
    assert after["openvino"] >= before["openvino"] + 5
    assert after["eager"] == before["eager"]
    same_generation(found, expected)


def same_generation(found: Any, expected: Any) -> None:
    assert torch.equal(found.sequences, expected.sequences)
    for mine, other in zip(found.logits, expected.logits, strict=True):
        assert (mine - other).norm() <= 1e-5 * other.norm()


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


_made: dict[str, tuple[nn.Module, Any]] = {}


@pytest.fixture(scope="module", autouse=True)
def _forget() -> Iterator[None]:
    yield
    _made.clear()


@pytest.fixture
def pair(cache: Path) -> Callable[[str], tuple[Any, Any]]:
    """Gives a model and its accelerated twin, which has made its plan."""

    def give(name: str) -> tuple[Any, Any]:
        if name not in _made:
            model = lm.make(name)
            fast = accelerated(model, cache_dir=cache)
            fast.ovshim.warm(PROMPT)
            _made[name] = model, fast
        return _made[name]

    return give


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in lm.CONFIGS]
FEW = [name if name in ("llama", "mistral") else slow
       for name, slow in zip(lm.CONFIGS, SLOW, strict=True)]  # fmt: skip

# --- the ways of generating -------------------------------------------------------------------


@pytest.mark.parametrize("name", FEW)
def test_every_way_of_generating_gives_eagers_tokens(
    name: str, pair: Callable[[str], tuple[Any, Any]]
) -> None:
    """Prompts and answers go beyond the sliding window of those models that have one."""
    model, fast = pair(name)
    for way, arguments in WAYS.items():
        try:
            alike(fast, model, **arguments)
        except AssertionError as error:
            raise AssertionError(f"{name}, {way}") from error
    assert eager_reasons(fast) == {}


@pytest.mark.parametrize("name", FEW)
def test_an_assistant_may_be_accelerated_too(
    name: str, pair: Callable[[str], tuple[Any, Any]], cache: Path
) -> None:
    model, fast = pair(name)
    helper = lm.make("llama", seed=1)
    fast_helper = accelerated(helper, cache_dir=cache)
    fast_helper.ovshim.warm(PROMPT)
    asked = {"inputs": PROMPT, "do_sample": False, "max_new_tokens": 20}
    expected = generate(model, assistant_model=helper, **asked)
    before = counts(fast)["openvino"], counts(fast_helper)["openvino"]
    found = generate(fast, assistant_model=fast_helper, **asked)
    same_generation(found, expected)
    assert counts(fast)["openvino"] >= before[0] + 5
    assert counts(fast_helper)["openvino"] >= before[1] + 5


def test_entries_say_what_they_were_made_of(
    pair: Callable[[str], tuple[Any, Any]], cache: Path
) -> None:
    pair("llama")
    (entry, *_) = ovshim.cache.entries(cache)
    assert set(entry.fingerprint) == {"code", "weights", "inputs", "options", "environment"}
    versions = json.loads(entry.fingerprint["environment"])
    assert versions["ovshim"] == exact_version()
    assert versions["transformers"] == hf.__version__
    assert (entry.path / "fingerprint.json").stat().st_size > 1000


def test_a_streamer_gets_the_tokens_as_they_come(pair: Callable[[str], tuple[Any, Any]]) -> None:
    class Recorder(hf.generation.streamers.BaseStreamer):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            self.seen: list[list[int]] = []

        def put(self, value: Tensor) -> None:
            self.seen.append(value.flatten().tolist())

        def end(self) -> None:
            self.seen.append([])

    model, fast = pair("llama")
    mine, other = Recorder(), Recorder()
    alike(fast, model, inputs=PROMPT, do_sample=False, streamer=None)
    generate(model, inputs=PROMPT, do_sample=False, streamer=other)
    generate(fast, inputs=PROMPT, do_sample=False, streamer=mine)
    assert len(other.seen) > 10
    assert mine.seen == other.seen


def test_threads_generate_at_once(pair: Callable[[str], tuple[Any, Any]]) -> None:
    model, fast = pair("llama")
    prompts = [PROMPT[:, n:] for n in range(6)]
    expected = [model.generate(p, max_new_tokens=12, do_sample=False) for p in prompts]
    before = counts(fast)["openvino"]
    found: list[Any] = [None] * 6
    start = threading.Barrier(6)

    def work(n: int) -> None:
        start.wait()
        for _ in range(3):
            found[n] = fast.generate(prompts[n], max_new_tokens=12, do_sample=False)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(map(torch.equal, found, expected))
    assert counts(fast)["openvino"] >= before + 6 * 3 * 11


# --- caches in the user's hands ---------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_a_conversation_goes_on_with_the_cache_that_came_back(
    name: str, pair: Callable[[str], tuple[Any, Any]]
) -> None:
    model, fast = pair(name)
    more = torch.tensor([[40, 41, 42]])
    answers = []
    before = counts(fast)
    for one in (model, fast):
        first = generate(one, inputs=PROMPT, do_sample=False)
        assert isinstance(first.past_key_values, hf.DynamicCache)
        longer = torch.cat([first.sequences, more], dim=1)
        answers.append(
            generate(one, inputs=longer, past_key_values=first.past_key_values, do_sample=False)
        )
    same_generation(answers[1], answers[0])
    assert counts(fast)["openvino"] == before["openvino"] + 24
    assert counts(fast)["eager"] == before["eager"]


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_the_users_own_cache_is_filled_as_eager_fills_it(
    name: str, pair: Callable[[str], tuple[Any, Any]]
) -> None:
    model, fast = pair(name)
    caches = hf.DynamicCache(config=model.config), hf.DynamicCache(config=model.config)
    ids = PROMPT
    for _ in range(3):
        mine = generate(fast, inputs=ids, past_key_values=caches[0], do_sample=False)
        other = generate(model, inputs=ids, past_key_values=caches[1], do_sample=False)
        same_generation(mine, other)
        assert mine.past_key_values is caches[0]
        ids = torch.cat([mine.sequences, PROMPT[:, :4]], dim=1)
    assert caches[0].get_seq_length() == caches[1].get_seq_length() > 30
    same_caches(caches[0], caches[1])
    assert type(caches[0]) is hf.DynamicCache  # somebody has looked into it


def same_caches(mine: Any, other: Any) -> None:
    assert len(mine) == len(other)
    assert mine.get_seq_length() == other.get_seq_length()
    for one, two in zip(mine.layers, other.layers, strict=True):
        assert type(one) is type(two)
        for name in ("keys", "values"):
            a, b = getattr(one, name), getattr(two, name)
            assert a.shape == b.shape
            assert a.dtype == b.dtype
            assert (a - b).norm() <= 1e-5 * b.norm()


def prefilled(model: Any, ids: Tensor = PROMPT) -> Any:
    with torch.no_grad():
        return model(ids, use_cache=True).past_key_values


def in_turn(fast: Any, model: Any, change: Callable[[Any], Any], rows: int = 1) -> None:
    """Assert that both go on alike after the same thing was done to their caches.

    rows: how many the caches have afterwards.
    """
    answers: list[list[Tensor]] = []
    before = counts(fast)["openvino"]
    with torch.no_grad():
        for one in (model, fast):
            cache = one(PROMPT, use_cache=True).past_key_values
            for token in (40, 41, 42):
                cache = one(torch.tensor([[token]]), past_key_values=cache).past_key_values
            cache = change(cache) or cache
            found = []
            for token in (50, 51):
                output = one(torch.full((rows, 1), token), past_key_values=cache)
                cache = output.past_key_values
                found.append(output.logits)
            answers.append(found)
    assert counts(fast)["openvino"] >= before + 4
    for mine, other in zip(answers[1], answers[0], strict=True):
        assert mine.shape == other.shape
        assert (mine - other).norm() <= 1e-5 * other.norm()


ROWS = {"repeated": 3, "selected": 2, "reordered to more rows": 2}
CHANGES: dict[str, Callable[[Any], Any]] = {
    "left alone": lambda cache: None,
    "repeated": lambda cache: cache.batch_repeat_interleave(3),
    "selected": lambda cache: cache.batch_select_indices(torch.tensor([0, 0])),
    "reordered to more rows": lambda cache: cache.reorder_cache(torch.tensor([0, 0])),
    "reordered": lambda cache: cache.reorder_cache(torch.tensor([0])),
    "copied deeply": copy.deepcopy,
    "copied": copy.copy,
    "pickled": lambda cache: pickle.loads(pickle.dumps(cache)),
    "looked into": lambda cache: [layer.keys for layer in cache.layers] and None,
    "written to": lambda cache: cache.layers[0].keys.mul_(0.5) is None,
    "its layers replaced": lambda cache: setattr(cache, "layers", copy.deepcopy(cache.layers)),
    "printed": lambda cache: print(cache, len(cache), cache.is_croppable),
    "saved": lambda cache: torch.save(cache, io.BytesIO()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_cache_may_be_changed_between_steps(
    change: str, pair: Callable[[str], tuple[Any, Any]]
) -> None:
    model, fast = pair("llama")
    in_turn(fast, model, CHANGES[change], ROWS.get(change, 1))


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_tokens_are_cut_off_and_others_go_on(
    name: str, pair: Callable[[str], tuple[Any, Any]]
) -> None:
    model, fast = pair(name)

    def cut(cache: Any) -> None:
        cache.crop(-2)

    if name == "llama":
        in_turn(fast, model, cut)
        in_turn(fast, model, lambda cache: [cut(cache), cut(cache)][0])
        return
    for one in (model, fast):  # what a window has let go of is not there any more
        cache = prefilled(one)
        with pytest.raises(RuntimeError, match="sliding window"):
            cache.crop(-2)


def test_a_copy_of_a_prompts_cache_serves_many_questions(
    pair: Callable[[str], tuple[Any, Any]],
) -> None:
    for name in ("llama", "mistral"):
        model, fast = pair(name)
        caches = prefilled(model), prefilled(fast)
        before = counts(fast)["openvino"]
        for question in (PROMPT[:, :3], PROMPT[:, 4:9], PROMPT[:, :3]):
            ids = torch.cat([PROMPT, question], dim=1)
            other, mine = (
                generate(one, inputs=ids, past_key_values=copy.deepcopy(cache), do_sample=False)
                for one, cache in zip((model, fast), caches, strict=True)
            )
            same_generation(mine, other)
        assert counts(fast)["openvino"] == before + 36
        assert caches[1].get_seq_length() == PROMPT.shape[1]


def test_a_cache_goes_to_eager_and_back(pair: Callable[[str], tuple[Any, Any]]) -> None:
    for name in ("llama", "mistral"):
        model, fast = pair(name)
        expected = generate(model, inputs=PROMPT, do_sample=False).logits
        cache, found, ids = None, [], PROMPT
        with torch.no_grad():
            for n in range(12):
                one = fast if n % 4 else model
                output = one(ids, past_key_values=cache, use_cache=True)
                cache, logits = output.past_key_values, output.logits[:, -1]
                found.append(logits)
                ids = logits.argmax(-1, keepdim=True)
        for mine, other in zip(found, expected, strict=True):
            assert (mine - other).norm() <= 1e-5 * other.norm()


def test_whoever_holds_a_layer_finds_new_keys_in_it(
    pair: Callable[[str], tuple[Any, Any]],
) -> None:
    model, fast = pair("llama")
    for take in (lambda cache: cache.layers, lambda cache: cache.layers[0]):
        cache = hf.DynamicCache(config=model.config)
        held = take(cache)
        with quietly(), torch.no_grad():
            fast(PROMPT, past_key_values=cache, use_cache=True)
        layer = held[0] if isinstance(held, list) else held
        assert layer.keys.shape[2] == PROMPT.shape[1]


def test_a_loop_without_masks_and_positions(pair: Callable[[str], tuple[Any, Any]]) -> None:
    for name in ("llama", "mistral"):
        model, fast = pair(name)
        before = counts(fast)["eager"]
        in_turn(fast, model, CHANGES["left alone"])
        answers = []
        with torch.no_grad():
            for one in (model, fast):
                output = one(BATCH, attention_mask=PADDED, use_cache=True)
                mask = torch.cat([PADDED, torch.ones(3, 1, dtype=torch.long)], dim=1)
                ids, cache = torch.full((3, 1), 50), output.past_key_values
                answers.append(one(ids, attention_mask=mask, past_key_values=cache).logits)
        assert (answers[1] - answers[0]).norm() <= 1e-5 * answers[0].norm()
        assert counts(fast)["eager"] == before


def test_no_warning_of_padding_is_used_up(
    pair: Callable[[str], tuple[Any, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers says it once in a process: the program's own padding is to have that."""
    said: list[str] = []
    monkeypatch.setattr(hf.modeling_utils.logger, "warning_once", said.append)
    model = lm.make("gpt2")
    for pad in (0, 3):
        model.config.pad_token_id = pad
        fast = ovshim.accelerate(copy.deepcopy(model), prefer="openvino")
        ids = torch.randint(10, 50, (1, 7))
        with quietly(), torch.no_grad():
            fast(ids)
            torch.testing.assert_close(fast(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)
        assert counts(fast)["openvino"]
    assert said == []


# --- encoders and decoders --------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", lm.ENCODER_DECODERS)
def test_a_decoder_goes_on_after_its_encoder(name: str, cache: Path) -> None:
    model, given = lm.make_encoder_decoder(name)
    fast = accelerated(model, cache_dir=cache)
    fast.generate(**given, max_new_tokens=3)
    for way in (
        {"do_sample": False},
        {"do_sample": True, "top_k": 20},
        {"num_beams": 3, "do_sample": False},
        {"num_beams": 2, "do_sample": True, "num_return_sequences": 2},
    ):
        torch.manual_seed(3)
        expected = model.generate(**given, max_new_tokens=16, **way)
        before = counts(fast)["openvino"]
        torch.manual_seed(3)
        found = fast.generate(**given, max_new_tokens=16, **way)
        assert torch.equal(found, expected), way
        assert counts(fast)["openvino"] == before + 15
    assert set(eager_reasons(fast)) == {"first-step", "building"}


@pytest.mark.slow
def test_long_sound_is_transcribed_piece_by_piece(cache: Path) -> None:
    model = lm.make_encoder_decoder("whisper")[0]
    settings = model.generation_config
    settings.no_timestamps_token_id, settings.is_multilingual = 50, False
    fast = accelerated(model, cache_dir=cache)
    sound, frames = torch.randn(2, 16, 260), torch.ones(2, 260, dtype=torch.long)
    asked = {"attention_mask": frames, "return_timestamps": True, "max_new_tokens": 20}
    for _ in range(2):
        expected = model.generate(sound, do_sample=False, **asked)
        before = counts(fast)["openvino"]
        assert torch.equal(fast.generate(sound, do_sample=False, **asked), expected)
    assert counts(fast)["openvino"] >= before + 50


@pytest.mark.slow
def test_a_pipeline_transcribes_long_sound(cache: Path) -> None:
    model = lm.make_encoder_decoder("whisper")[0]
    settings = model.generation_config
    settings.no_timestamps_token_id, settings.is_multilingual = 50, False
    tokens = ["<|pad|>", "<|bos|>", "<|eos|>", "<|startoftranscript|>", *map(chr, range(64, 110))]
    tokens += ["<|notimestamps|>", *(f"<|{n * 0.02:.2f}|>" for n in range(48))]
    tokenizer = hf.WhisperTokenizer(
        vocab={token: number for number, token in enumerate(tokens)},
        merges=[],
        unk_token="<|eos|>",
        bos_token="<|bos|>",
        eos_token="<|eos|>",
        pad_token="<|pad|>",
    )
    # The model's table of positions is for a second of sound.
    extractor = hf.WhisperFeatureExtractor(feature_size=16, chunk_length=1)
    fast = accelerated(model, cache_dir=cache)
    sound = torch.randn(40_000, generator=torch.Generator().manual_seed(0)).numpy()
    asked = {"return_timestamps": True, "generate_kwargs": {"max_new_tokens": 20}}
    told = []
    for one in (model, fast, fast):
        before = counts(fast)["openvino"]
        pipe = hf.pipeline(
            "automatic-speech-recognition",
            model=one,
            tokenizer=tokenizer,
            feature_extractor=extractor,
            device="cpu",
        )
        told.append(pipe(sound.copy(), **asked))
    assert len(told[0]["text"]) > 40  # three pieces of a second at most
    assert told[1] == told[2] == told[0]
    assert counts(fast)["openvino"] >= before + 50


@pytest.mark.slow
def test_a_decoders_cache_may_be_looked_into(cache: Path) -> None:
    model, given = lm.make_encoder_decoder("bart")
    fast = accelerated(model, cache_dir=cache)
    fast.generate(**given, max_new_tokens=3)
    caches = [generate(one, **given, do_sample=False).past_key_values for one in (fast, model)]
    assert type(caches[0]) is hf.EncoderDecoderCache
    same_caches(copy.deepcopy(caches[0]).self_attention_cache, caches[1].self_attention_cache)
    caches[0].crop(-2)
    caches[1].crop(-2)
    same_caches(caches[0].self_attention_cache, caches[1].self_attention_cache)
    same_caches(caches[0].cross_attention_cache, caches[1].cross_attention_cache)


# --- encoders ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["t5", "whisper", pytest.param("vision", marks=pytest.mark.slow)])
def test_an_encoder_runs_in_openvino_as_well(name: str, cache: Path) -> None:
    model, given = lm.make_encoder_decoder(name)
    fast = accelerated(model, cache_dir=cache)
    expected = model.generate(**given, do_sample=False, max_new_tokens=3)
    for _ in range(3):
        found = fast.generate(**given, do_sample=False, max_new_tokens=3)
        assert torch.equal(found, expected)
    told = ovshim.explain(fast).to_dict()["encoder"]
    assert told["calls"] == {"openvino": 2, "mixed": 0, "eager": 1}
    assert told["module"] == type(model.get_encoder()).__qualname__
    assert f"with the encoder {told['module']}" in str(ovshim.explain(fast))
    assert not installed(model.get_encoder())  # the user's own stays as it was
    fast.ovshim.reset_stats()
    assert counts(fast.get_encoder())["openvino"] == 0
    fast.ovshim.refresh()
    assert not plans(fast.get_encoder())


@pytest.mark.slow
def test_copies_take_their_encoder_along(cache: Path) -> None:
    model, given = lm.make_encoder_decoder("t5")
    fast = accelerated(model, cache_dir=cache)
    fast.generate(**given, max_new_tokens=2)
    for copied in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        for _ in range(2):
            copied.generate(**given, max_new_tokens=2)
        assert ovshim.explain(copied).to_dict()["encoder"]["calls"]["openvino"] == 1
    assert ovshim.explain(fast).to_dict()["encoder"]["calls"]["openvino"] == 0


def test_an_encoder_that_is_accelerated_keeps_its_own_options(cache: Path) -> None:
    model, given = lm.make_encoder_decoder("t5")
    encoder = ovshim.accelerate(model.get_encoder(), inplace=True, prefer="eager", cache_dir=cache)
    fast = accelerated(model, inplace=True, cache_dir=cache)
    fast.generate(**given, max_new_tokens=2)
    assert encoder.ovshim.options.prefer == "eager"
    assert ovshim.explain(fast).to_dict()["encoder"]["eager_reasons"] == {"prefer-eager": 1}


def test_an_encoder_has_the_options_that_its_model_was_given_last(cache: Path) -> None:
    model, given = lm.make_encoder_decoder("t5")
    fast = pickle.loads(pickle.dumps(accelerated(model, cache_dir=cache)))
    again = ovshim.accelerate(fast, prefer="eager", cache_dir=cache)
    again.generate(**given, max_new_tokens=2)
    assert again.get_encoder().ovshim.options.prefer == "eager"
    assert ovshim.explain(again).to_dict()["encoder"]["eager_reasons"] == {"prefer-eager": 1}
    assert fast.get_encoder().ovshim.options.prefer == "openvino"
    ovshim.accelerate(fast, inplace=True, precision="int8_weights", cache_dir=cache)
    assert ovshim.explain(fast).to_dict()["encoder"] is None
    assert not installed(fast.get_encoder())
    assert "ovshim" not in fast.get_encoder().__dict__


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ovshim.PrecisionWarning")  # where there is no unit for it
def test_calibration_data_of_a_model_are_none_of_its_encoder(cache: Path) -> None:
    model, given = lm.make_encoder_decoder("t5")
    ids = given["inputs"]
    data = [{"input_ids": ids, "decoder_input_ids": ids[:, :2]}]
    # Where all is masked, float16 that is computed has another answer than float32: off by 0.5.
    options = {"precision": "fp16", "tolerance": 1.0}
    fast = accelerated(model, cache_dir=cache, calibration=data, **options)
    for _ in range(2):
        fast.generate(**given, max_new_tokens=2)
    told = ovshim.explain(fast).to_dict()["encoder"]
    assert told["calls"] == {"openvino": 1, "mixed": 0, "eager": 1}
    assert told["eager_reasons"] == {"building": 1}


def test_an_encoder_is_left_alone_where_the_options_are_of_the_whole(cache: Path) -> None:
    model, _ = lm.make_encoder_decoder("t5")
    for options in ({"precision": "int8_weights"}, {"methods": ("generate",)}):
        fast = ovshim.accelerate(model, cache_dir=cache, **options)
        assert ovshim.explain(fast).to_dict()["encoder"] is None
        assert not installed(fast.get_encoder())


def test_an_encoder_of_other_weights_is_not_the_old_one(cache: Path) -> None:
    model, given = lm.make_encoder_decoder("t5")
    fast = accelerated(model, cache_dir=cache)
    for _ in range(2):
        fast.generate(**given, max_new_tokens=2)
    with torch.no_grad():
        for weight in model.get_encoder().parameters():
            weight.mul_(-1.5)
    for _ in range(2):
        expected = generate(model, **given, do_sample=False, output_logits=True)
        found = generate(fast, **given, do_sample=False, output_logits=True)
        same(found.logits, expected.logits)


# --- what is left to eager --------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"cache_implementation": "static"}, "cache-unknown"),
        ({"output_hidden_states": True}, "decode-call"),
        ({"output_attentions": True}, "decode-call"),
    ],
)
def test_what_is_asked_for_beyond_logits_comes_from_eager(
    arguments: dict[str, Any], reason: str, cache: Path
) -> None:
    model: Any = lm.make("llama")
    if "output_attentions" in arguments:
        model.set_attn_implementation("eager")
    fast = accelerated(model, cache_dir=cache)
    expected = generate(model, inputs=PROMPT, do_sample=False, **arguments)
    with falls_back(reason):
        found = generate(fast, inputs=PROMPT, do_sample=False, **arguments)
    assert torch.equal(found.sequences, expected.sequences)
    assert set(eager_reasons(fast)) == {reason}


class OwnCache(hf.DynamicCache):  # type: ignore[misc]
    """A cache of the user's making, of which nobody knows what it does."""


OTHERS: dict[str, Callable[[Any], Any]] = {
    "static": lambda config: hf.StaticCache(config=config, max_cache_len=40),
    "own": lambda config: OwnCache(config=config),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_a_cache_of_another_class_is_left_to_eager(
    kind: str, pair: Callable[[str], tuple[Any, Any]]
) -> None:
    model, fast = pair("llama")
    caches = [OTHERS[kind](model.config) for _ in range(2)]
    expected = generate(model, inputs=PROMPT, past_key_values=caches[0], do_sample=False)
    before, told = counts(fast)["openvino"], eager_reasons(fast).get("cache-unknown", 0)
    with quietly():
        found = generate(fast, inputs=PROMPT, past_key_values=caches[1], do_sample=False)
    same_generation(found, expected)
    assert found.past_key_values is caches[1]
    assert counts(fast)["openvino"] == before
    assert eager_reasons(fast)["cache-unknown"] == told + 12


def test_embeddings_in_the_place_of_ids_begin_in_eager(
    pair: Callable[[str], tuple[Any, Any]],
) -> None:
    model, fast = pair("llama")
    embedded = model.get_input_embeddings()(PROMPT).detach()
    expected = generate(model, inputs_embeds=embedded, do_sample=False)
    before = counts(fast)["openvino"]
    with quietly():
        found = generate(fast, inputs_embeds=embedded, do_sample=False)
    same_generation(found, expected)
    assert counts(fast)["openvino"] == before + 11


def test_an_id_outside_of_the_table_raises_eagers_error_and_harms_nothing(
    pair: Callable[[str], tuple[Any, Any]],
) -> None:
    model, fast = pair("llama")

    def spoil(cache: Any) -> None:
        one = fast if type(cache) is not hf.DynamicCache else model
        for wrong in (99, -1, 2**32 + 5):
            with pytest.raises(IndexError), quietly():
                one(torch.tensor([[wrong]]), past_key_values=cache, use_cache=True)

    in_turn(fast, model, spoil)


@pytest.mark.slow
def test_training_and_gradients_are_eagers(cache: Path) -> None:
    model = lm.make("llama")
    fast = accelerated(model, cache_dir=cache)
    output = generate(fast, inputs=PROMPT, do_sample=False)
    with quietly():
        answer = fast(torch.tensor([[50]]), past_key_values=output.past_key_values)
        assert answer.logits.requires_grad
        answer.logits.sum().backward()
        assert model.lm_head.weight.grad is not None
        fast.train()
        assert fast(PROMPT, labels=PROMPT).loss.requires_grad


def test_the_plan_of_a_decoder_draws_nothing_of_the_programs() -> None:
    for model, given in ((lm.make("llama"), {"inputs": PROMPT}), lm.make_encoder_decoder("t5")):
        fast = accelerated(model, cache_dir=False)
        generate(fast, **given, do_sample=False)
        assert counts(fast)["openvino"] >= 5
        after = torch.get_rng_state()
        torch.manual_seed(3)
        assert torch.equal(torch.get_rng_state(), after)


# --- things that change -----------------------------------------------------------------------


def test_weights_that_change_in_the_middle_are_seen(cache: Path) -> None:
    answers = []
    for accelerate in (False, True):
        model: Any = lm.make("llama")
        one = accelerated(model, cache_dir=cache) if accelerate else model
        if accelerate:
            one.ovshim.warm(PROMPT)
        found = []
        with torch.no_grad(), quietly():
            output = one(PROMPT, use_cache=True)
            for n, token in enumerate((40, 41, 42, 43)):
                if n == 3:
                    model.lm_head.weight.mul_(2.0)
                ids = torch.tensor([[token]])
                output = one(ids, past_key_values=output.past_key_values, use_cache=True)
                found.append(output.logits)
        answers.append(found)
    for mine, other in zip(answers[1], answers[0], strict=True):
        assert (mine - other).norm() <= 1e-5 * other.norm()
    assert eager_reasons(one)["stale"] >= 1


@pytest.mark.slow
def test_a_model_that_has_changed_is_built_anew(cache: Path) -> None:
    model: Any = lm.make("llama")
    fast = accelerated(model, cache_dir=cache)
    generate(fast, inputs=PROMPT, do_sample=False)
    with torch.no_grad():
        model.lm_head.weight.add_(torch.randn_like(model.lm_head.weight))
    for _ in range(2):
        expected = generate(model, inputs=PROMPT, do_sample=False)
        before = counts(fast)["openvino"]
        same_generation(generate(fast, inputs=PROMPT, do_sample=False), expected)
    assert counts(fast)["openvino"] == before + 12


def test_a_failure_in_openvino_loses_no_token(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, fast = lm.make("llama"), None
    fast = accelerated(model, cache_dir=cache)
    fast.ovshim.warm(PROMPT)
    expected = generate(model, inputs=PROMPT, num_beams=3, do_sample=False)
    from ovshim.decode.engine import StatefulEngine

    ran: list[int] = []
    step = StatefulEngine.step

    def failing(self: Any, slot: Any, tensors: Any) -> Any:
        ran.append(1)
        if len(ran) == 5:
            monkeypatch.setattr(self, "_infer", _raises)
        return step(self, slot, tensors)

    monkeypatch.setattr(StatefulEngine, "step", failing)
    with falls_back("infer-failed"):
        found = generate(fast, inputs=PROMPT, num_beams=3, do_sample=False)
    assert len(ran) == 5
    same_generation(found, expected)


def _raises(*args: Any) -> Any:
    raise RuntimeError("no memory, say")


@pytest.mark.slow
def test_a_graph_that_is_wrong_at_sizes_met_later_never_serves_again(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = lm.make("llama")
    fast = accelerated(model, cache_dir=cache / "wrong")
    fast.ovshim.warm(PROMPT)
    from ovshim.decode.engine import StatefulEngine

    step = StatefulEngine.step

    def wrong(self: Any, slot: Any, tensors: Any) -> Any:
        logits, *rest = step(self, slot, tensors)
        return [logits + (len(tensors[0]) > 4), *rest]

    monkeypatch.setattr(StatefulEngine, "step", wrong)
    given = {"inputs": PROMPT.expand(6, -1), "do_sample": False}
    expected = generate(model, **given)
    with falls_back("first-use-mismatch"):
        found = generate(fast, **given)
    same_generation(found, expected)
    assert counts(fast)["openvino"] == 0
    assert plans(fast)[-1]["reason"]["code"] == "first-use-mismatch"


# --- precision, options, processes ------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "int8_weights", "int4_weights"])
def test_lower_precisions_come_close(precision: str, cache: Path) -> None:
    model = lm.make("llama")
    fast = accelerated(model, precision=precision, cache_dir=cache, tolerance="loose")
    fast.ovshim.warm(PROMPT)
    expected = generate(model, inputs=PROMPT, do_sample=False, max_new_tokens=1)
    found = generate(fast, inputs=PROMPT, do_sample=False, max_new_tokens=1)
    assert (found.logits[0] - expected.logits[0]).norm() <= 0.05 * expected.logits[0].norm()
    assert counts(fast)["openvino"] == 1


def on_a_grid(model: nn.Module) -> nn.Module:
    """The model with weights that lose nothing in eight bits."""
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                weight.copy_(torch.randint(-128, 128, weight.shape) / 2048)
                weight[:, 0], weight[:, 1] = -128 / 2048, 127 / 2048
    return model


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tolerance", "properties", "low", "ran"),
    [
        ("loose", {}, 1.8, "bf16"),
        ("loose", {}, 0.4, "f32"),
        (2e-4, {}, 1.8, "f32"),
        ("loose", {"KV_CACHE_PRECISION": "f32"}, 1.8, "f32"),
        ("loose", {"DYNAMIC_QUANTIZATION_GROUP_SIZE": 32}, 1.8, "f32"),
    ],
    ids=["faster", "slower", "inexact", "exact cache", "activations"],
)
def test_floats_beside_integer_weights(
    tolerance: Any,
    properties: dict[str, Any],
    low: float,
    ran: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not any(d.name == "CPU" and "bf16" in d.precisions for d in runtime.devices()):
        pytest.skip("the processor has no bf16")
    races: list[Finish] = []

    def race(*_: Any) -> Finish:
        races.append(Finish(low, 1.0, low, low + 0.1))
        return races[-1]

    monkeypatch.setattr(floats, "race", race)
    model = on_a_grid(lm.make("llama"))
    for cache in ("miss", "hit"):
        fast = accelerated(
            model,
            precision="int8_weights",
            tolerance=tolerance,
            properties=properties,
            cache_dir=tmp_path,
        )
        fast.ovshim.warm(PROMPT)
        (plan,) = plans(fast)
        assert (plan["cache"], plan["path"], plan["precision_run"]) == (cache, "openvino", ran)
        assert plan["keys_and_values"] == ran
        assert f"OpenVINO in {ran}, keys and values in {ran}" in str(ovshim.explain(fast))
        expected = generate(model, inputs=PROMPT, do_sample=False, max_new_tokens=1).logits[0]
        found = generate(fast, inputs=PROMPT, do_sample=False, max_new_tokens=1).logits[0]
        assert (found - expected).norm() <= 0.05 * expected.norm()
        assert counts(fast) == {"openvino": 1, "mixed": 0, "eager": 0}
    assert len(races) == (not properties)


@pytest.mark.slow
def test_floats_in_bf16_are_proved_wholly_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not any(d.name == "CPU" and "bf16" in d.precisions for d in runtime.devices()):
        pytest.skip("the processor has no bf16")
    from ovshim.decode.prove import Prover

    asked_of: list[int] = []
    proved = Prover.proved

    def noted(self: Any, engine: Any, record: Any, asked: Any) -> Any:
        asked_of.append(len(asked))
        return proved(self, engine, record, asked)

    monkeypatch.setattr(Prover, "proved", noted)
    ran = []
    for low, high in ((0.9, 1.2), (1.8, 1.9), (1.8, 1.9)):  # the first decides nothing
        monkeypatch.setattr(floats, "race", lambda *_, at=(low, high): Finish(2.0, 1.0, *at))
        fast = accelerated(lm.make("llama"), PROMPT, precision="int8_weights", cache_dir=tmp_path)
        ran.append((plans(fast)[0]["cache"], plans(fast)[0]["precision_run"]))
    assert ran == [("miss", "f32"), ("hit", "bf16"), ("hit", "bf16")]
    assert asked_of == [asked_of[0], asked_of[0], 1]
    assert asked_of[0] > 1


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "int8_weights"])
def test_keys_and_values_in_eight_bits_are_had_by_name(precision: str, cache: Path) -> None:
    model = lm.make("llama")
    asked: dict[str, Any] = {"precision": precision, "cache_dir": cache, "tolerance": "loose"}
    exact = accelerated(model, **asked)
    rounded = accelerated(model, **asked, properties={"KV_CACHE_PRECISION": "u8"})
    logits = []
    for fast in (exact, rounded):
        fast.ovshim.warm(PROMPT)
        with torch.no_grad():
            past = fast(PROMPT, use_cache=True).past_key_values
            logits.append(fast(torch.tensor([[40]]), past_key_values=past).logits)
        assert counts(fast) == {"openvino": 2, "mixed": 0, "eager": 0}
    error = (logits[1] - logits[0]).norm() / logits[0].norm()
    assert 0 < error <= 0.05  # it is another precision, and a near one
    # Looked into, they are of the model's own type.
    assert past.layers[0].keys.dtype is torch.float32


def tall(model: Any) -> Any:
    """One layer reaches some 1e6; what comes of it is normalized."""
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(1e3)
        model.model.layers[1].mlp.down_proj.weight.mul_(1e6)
    return model


def test_overflow_of_float16_is_refused_with_its_module(cache: Path) -> None:
    model = tall(lm.make("llama"))
    with falls_back("overflow") as told:
        fast = accelerated(model, PROMPT, precision="fp16", cache_dir=cache / "tall")
    assert "model.layers.1.mlp.down_proj reaches" in told[0].reason.message
    found = generate(fast, inputs=PROMPT, do_sample=False)
    same_generation(found, generate(model, inputs=PROMPT, do_sample=False))
    assert counts(fast)["openvino"] == 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ovshim.PrecisionWarning")
@pytest.mark.parametrize("half", ["encoder", "decoder"])
def test_float16_is_asked_of_what_is_decoded(half: str, cache: Path) -> None:
    """The encoder runs in eager."""
    model, given = lm.make_encoder_decoder("t5")
    feed = getattr(model, half).block[1].layer[-1].DenseReluDense
    with torch.no_grad():
        feed.wi.weight.mul_(1e2)
        feed.wo.weight.mul_(1e4)
    assert feed.wo.weight.abs().max() < 65504
    fast = accelerated(model, precision="fp16", tolerance="loose", cache_dir=cache / half)
    with quietly():
        for _ in range(2):
            found = fast.generate(**given, max_new_tokens=6, do_sample=False)
    assert torch.equal(found, model.generate(**given, max_new_tokens=6, do_sample=False))
    (plan,) = plans(fast)
    if half == "encoder":
        assert plan["path"] == "openvino"
    else:
        assert plan["reason"]["code"] == "overflow"
        assert "decoder.block.1.layer.2.DenseReluDense.wo reaches" in plan["reason"]["message"]


@pytest.mark.slow
def test_bf16_survives_what_float16_does_not(cache: Path) -> None:
    model = tall(lm.make("llama"))
    brain = accelerated(model, PROMPT, precision="bf16", cache_dir=cache / "tall")
    generate(brain, inputs=PROMPT, do_sample=False)
    assert counts(brain)["openvino"] == 12


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ovshim.PrecisionWarning")
def test_overflow_that_only_the_callers_tokens_show(cache: Path) -> None:
    torch.manual_seed(0)
    config = lm.CONFIGS["llama"]()
    config.vocab_size = 50_000
    model: Any = hf.LlamaForCausalLM(config).eval()
    loud = torch.tensor([[5, 49_321, 7]])
    with torch.no_grad():
        model.model.embed_tokens.weight[49_321] = 3e3  # its square is beyond
    asked: Any = {"precision": "fp16", "cache_dir": cache / "loud"}
    for known in ("miss", "hit"):
        fast = accelerated(model, PROMPT, **asked)
        assert (plans(fast)[0]["cache"], plans(fast)[0]["path"]) == (known, "openvino")
    for example, data in ((loud, {}), (PROMPT, {"calibration": [{"input_ids": loud}]})):
        with falls_back("overflow") as told:
            fast = accelerated(model, example, **asked, **data)
        assert "model.layers.0.input_layernorm reaches 9e+06" in told[0].reason.message
    for data, code in (({}, "overflow"), ({"calibration": [torch.randn(3)]}, "calibration-unfit")):
        first = accelerated(model, **asked, **data)
        with falls_back(code):
            found = generate(first, inputs=loud, do_sample=False)
        same_generation(found, generate(model, inputs=loud, do_sample=False))
    with pytest.raises(ovshim.CalibrationError, match="float"):
        accelerated(model, PROMPT, **asked, calibration=[torch.randn(3)])


@pytest.mark.slow
def test_a_model_in_bf16_is_decoded_in_bf16(cache: Path) -> None:
    model = lm.make("llama").to(torch.bfloat16)
    fast = accelerated(model, cache_dir=cache)
    found = generate(fast, inputs=PROMPT, do_sample=False)
    assert counts(fast)["openvino"] == 11
    found.past_key_values.crop(-2)
    copied = copy.deepcopy(found.past_key_values)
    assert copied.layers[0].keys.dtype is torch.bfloat16


@pytest.mark.slow
def test_a_precision_that_is_not_offered_is_said_to_be_none(cache: Path) -> None:
    model = lm.make("llama")
    fast = accelerated(model, precision={"default": "fp32", "lm_head": "bf16"}, cache_dir=cache)
    with falls_back("decode-precision"):
        found = generate(fast, inputs=PROMPT, do_sample=False)
    same_generation(found, generate(model, inputs=PROMPT, do_sample=False))


@pytest.mark.slow
def test_a_plan_is_made_in_the_background(cache: Path) -> None:
    model = lm.make("llama")
    fast = accelerated(model, cache_dir=cache / "background", background=True)
    expected = generate(model, inputs=PROMPT, do_sample=False)
    same_generation(generate(fast, inputs=PROMPT, do_sample=False), expected)
    assert set(eager_reasons(fast)) == {"building"}
    assert counts(fast)["openvino"] == 0
    assert fast.ovshim.wait(60)
    before = counts(fast)["openvino"]
    same_generation(generate(fast, inputs=PROMPT, do_sample=False), expected)
    assert counts(fast)["openvino"] == before + 12


def test_a_failed_proof_is_of_one_processor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ovshim.decode.build import _Build
    from ovshim.job import BuildStopped
    from ovshim.reasons import reason

    model = lm.make("llama")
    proofs: list[str] = []

    def fails(self: Any, family: str | None) -> Any:
        proofs.append(runtime.processor())
        raise BuildStopped(reason("proof-failed", "a fault"))

    with quietly(), monkeypatch.context() as patched:
        patched.setattr(_Build, "_from_capture", fails)
        for _ in range(2):  # the second finds the verdict
            accelerated(model, cache_dir=tmp_path).ovshim.warm(PROMPT)
        assert len(proofs) == 1
    monkeypatch.setattr(runtime, "processor", lambda: "another one")
    fast = accelerated(model, cache_dir=tmp_path)
    fast.ovshim.warm(PROMPT)
    alike(fast, model, inputs=PROMPT, do_sample=False)


@pytest.mark.slow
def test_the_race_is_asked_who_serves(cache: Path) -> None:
    model = lm.make("llama")
    fast = ovshim.accelerate(model, PROMPT, cache_dir=cache / "raced")
    (plan,) = plans(fast)
    assert plan["speedup"] > 0
    expected = generate(model, inputs=PROMPT, do_sample=False)
    same_generation(generate(fast, inputs=PROMPT, do_sample=False), expected)
    assert (counts(fast)["openvino"] == 12) == (plan["path"] == "openvino")


LONG = PROMPT.repeat(1, 5)


@pytest.fixture
def eager_wins_long_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    add = LongSteps.add
    monkeypatch.setattr(LongSteps, "add", lambda self, bucket, *_: add(self, bucket, 1.0, 2.0))


@pytest.mark.usefixtures("eager_wins_long_steps")
@pytest.mark.parametrize("name", FEW)
def test_a_long_prompt_is_eagers_where_that_is_faster_and_its_tokens_openvinos(
    name: str, pair: Callable[[str], tuple[Any, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, fast = pair(name)
    (decoding,) = installed(fast)["forward"].dispatcher._room.plans  # type: ignore[attr-defined]
    kept: list[Any] = []
    monkeypatch.setattr(decoding, "long_steps", LongSteps(None, kept.append))
    given: dict[str, Any] = {"inputs": LONG, "do_sample": False}
    expected = generate(model, **given)
    for _ in range(3):
        assert not kept
        alike(fast, model, **given)  # both have answered it
    assert len(kept) == 1
    before, reasons = counts(fast), eager_reasons(fast).get("slower", 0)
    for _ in range(2):
        same_generation(generate(fast, **given), expected)
    assert counts(fast)["openvino"] == before["openvino"] + 22
    assert counts(fast)["eager"] == before["eager"] + 2
    assert eager_reasons(fast)["slower"] == reasons + 2
    alike(fast, model, inputs=PROMPT, do_sample=False)
    report = ovshim.explain(fast)
    (row,) = report.to_dict()["plans"][0]["sizes"]
    assert row == {"bucket": [1, 7, 7, 0], "path": "eager", "medians": [1.0, 2.0]}
    assert "eager at steps of 64 to 127 tokens" in str(report)


@pytest.mark.usefixtures("eager_wins_long_steps")
@pytest.mark.parametrize("name", FEW)
def test_a_long_turn_is_eagers_and_the_conversation_goes_on_in_openvino(
    name: str, pair: Callable[[str], tuple[Any, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, fast = pair(name)
    (decoding,) = installed(fast)["forward"].dispatcher._room.plans  # type: ignore[attr-defined]
    monkeypatch.setattr(decoding, "long_steps", LongSteps(None, lambda found: None))

    def talk(one: Any) -> tuple[list[Tensor], Any]:
        """Two turns with some tokens after each; the logits, and the cache itself."""
        cache = hf.DynamicCache(config=model.config)
        logits: list[Tensor] = []
        with torch.no_grad():
            for turn in (PROMPT[:, :9], PROMPT.repeat(1, 2)):
                steps = (turn, *([turn[:, :1]] * 9))
                logits += [one(ids, past_key_values=cache, use_cache=True).logits for ids in steps]
        return logits, cache

    expected, filled = talk(model)
    for n in range(5):
        before = counts(fast)
        found, cache = talk(fast)
        for mine, other in zip(found, expected, strict=True):
            assert (mine - other).norm() <= 1e-5 * other.norm()
        same_caches(cache, filled)
        eagers = counts(fast)["eager"] - before["eager"]
        assert eagers == (0 if n < 3 else 1)
        assert counts(fast)["openvino"] == before["openvino"] + 20 - eagers


def test_a_model_of_few_positions_is_raced_within_them(monkeypatch: pytest.MonkeyPatch) -> None:
    from ovshim.decode import finish

    raced: list[Any] = []

    def race(*ways: Any) -> Finish:
        for way in ways[:2]:
            way()
        raced.append(ways)
        return Finish(2.0, 1.0, 1.9, 2.1)

    monkeypatch.setattr(finish, "race", race)
    model = hf.GPT2LMHeadModel(hf.GPT2Config(**lm._GPT, n_embd=48, n_positions=16)).eval()
    fast = ovshim.accelerate(model, PROMPT[:, :6], cache_dir=None)
    assert len(raced) == 1
    alike(fast, model, inputs=PROMPT[:, :6], do_sample=False, max_new_tokens=8)


def test_long_turns_that_we_leave_to_eager_are_nobodys_look(
    pair: Callable[[str], tuple[Any, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, fast = pair(FEW[0])
    (decoding,) = installed(fast)["forward"].dispatcher._room.plans  # type: ignore[attr-defined]
    lost = {f"1,5,{columns},0": [[1.0, 2.0]] * 3 for columns in range(4, 10)}
    monkeypatch.setattr(decoding, "long_steps", LongSteps(lost, lambda found: None))
    before, refused = counts(fast)["openvino"], eager_reasons(fast).get("cache-unknown", 0)
    mine, theirs = (hf.DynamicCache(config=model.config) for _ in range(2))
    with torch.no_grad():
        for _ in range(6):
            for ids in (PROMPT.repeat(1, 2)[:, :16], PROMPT[:, :1], PROMPT[:, 1:2]):
                found = fast(ids, past_key_values=mine, use_cache=True).logits
                expected = model(ids, past_key_values=theirs, use_cache=True).logits
                assert (found - expected).norm() <= 1e-5 * expected.norm()
    assert counts(fast)["openvino"] == before + 12
    assert eager_reasons(fast).get("cache-unknown", 0) == refused


@contextlib.contextmanager
def interrupted(
    patch: pytest.MonkeyPatch, owner: Any, name: str, count: int = 1, behind: bool = False
) -> Iterator[None]:
    """A block that an interrupt ends: in place of the n-th call of the function, or behind it."""
    left, plain = [count], getattr(owner, name)

    def late(*given: Any) -> Any:
        left[0] -= 1
        found = plain(*given) if left[0] or behind else None
        if not left[0]:
            raise KeyboardInterrupt
        return found

    with patch.context() as inner:
        inner.setattr(owner, name, late)
        with pytest.raises(KeyboardInterrupt):
            yield
    assert left[0] <= 0


def after_a_step(fast: Any, patch: pytest.MonkeyPatch) -> AbstractContextManager[None]:
    """A block in which an interrupt comes when a step has been computed."""
    (decoding,) = installed(fast)["forward"].dispatcher._room.plans  # type: ignore[attr-defined]
    return interrupted(patch, decoding.ready.engine, "_run", behind=True)


def as_a_state_is_set(count: int, patch: pytest.MonkeyPatch) -> AbstractContextManager[None]:
    """A block in which an interrupt comes as the n-th tensor of a state is set."""
    return interrupted(patch, engine_module, "_as_openvino", count)


@pytest.mark.parametrize("reordered", ["never", "before", "after"])
def test_a_conversation_goes_on_after_a_step_that_ended_halfway(
    reordered: str, pair: Callable[[str], tuple[Any, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, fast = pair(FEW[0])
    prompt = torch.cat([PROMPT, PROMPT.flip(1)])
    mine, theirs = (hf.DynamicCache(config=model.config) for _ in range(2))

    def reorder() -> None:
        for cache in (mine, theirs):
            cache.reorder_cache(torch.tensor([1, 0]))

    with torch.no_grad():
        for n, ids in enumerate((prompt, prompt[:, :1], prompt[:, 1:2], prompt[:, 2:3])):
            if reordered == "before" and n:
                reorder()
            with after_a_step(fast, monkeypatch):
                fast(ids, past_key_values=mine, use_cache=True)
            if reordered == "after" and n:
                reorder()
            before = counts(fast)["openvino"]
            found = fast(ids, past_key_values=mine, use_cache=True).logits
            expected = model(ids, past_key_values=theirs, use_cache=True).logits
            assert (found - expected).norm() <= 1e-5 * expected.norm()
            assert counts(fast)["openvino"] == before + 1
    same_caches(mine, theirs)


@pytest.mark.parametrize("count", range(1, 5))
def test_what_was_written_halfway_is_written_again(
    count: int, pair: Callable[[str], tuple[Any, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, fast = pair(FEW[0])
    prompt = torch.cat([PROMPT, PROMPT.flip(1)])
    mine, theirs = (hf.DynamicCache(config=model.config) for _ in range(2))
    with torch.no_grad():
        fast(prompt, past_key_values=mine, use_cache=True)
        with after_a_step(fast, monkeypatch):
            fast(prompt[:, :1], past_key_values=mine, use_cache=True)
        model(prompt, past_key_values=theirs, use_cache=True)
        with as_a_state_is_set(count, monkeypatch):
            mine.reorder_cache(torch.tensor([1, 0]))
        same_caches(copy.deepcopy(mine), theirs)
        for cache in (mine, theirs):
            cache.reorder_cache(torch.tensor([1, 0]))
        before = counts(fast)["openvino"]
        found = fast(prompt[:, :1], past_key_values=mine, use_cache=True).logits
        expected = model(prompt[:, :1], past_key_values=theirs, use_cache=True).logits
    assert (found - expected).norm() <= 1e-5 * expected.norm()
    assert counts(fast)["openvino"] == before + 1
    same_caches(mine, theirs)


@pytest.mark.parametrize("count", range(1, 5))
def test_a_cache_that_is_bound_halfway_is_as_it_was_and_harms_no_other(
    count: int, pair: Callable[[str], tuple[Any, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, fast = pair(FEW[0])

    def step(cache: Any, ids: Tensor) -> None:
        found = fast(ids, past_key_values=cache, use_cache=True).logits
        expected = model(ids, past_key_values=theirs, use_cache=True).logits
        assert (found - expected).norm() <= 1e-5 * expected.norm()

    with torch.no_grad():
        for _ in range(3):
            plain, theirs = (hf.DynamicCache(config=model.config) for _ in range(2))
            for cache in (plain, theirs):
                model(PROMPT, past_key_values=cache, use_cache=True)
            with as_a_state_is_set(count, monkeypatch):
                fast(PROMPT[:, :1], past_key_values=plain, use_cache=True)
            gc.collect()  # the interrupt holds the cache, and in Python 3.13 itself
            assert type(plain) is hf.DynamicCache
            same_caches(plain, theirs)
            before = counts(fast)["openvino"]
            step(plain, PROMPT[:, :1])
            theirs, other = (hf.DynamicCache(config=model.config) for _ in range(2))
            for ids in (PROMPT, PROMPT[:, :1], PROMPT[:, 1:2]):
                step(other, ids)
            assert counts(fast)["openvino"] == before + 4


def test_a_cache_in_which_eager_was_interrupted_is_left_to_eager(
    pair: Callable[[str], tuple[Any, Any]],
) -> None:
    model, fast = pair(FEW[0])
    torn, fine = (hf.DynamicCache(config=model.config) for _ in range(2))
    with torch.no_grad():
        for cache in (torn, fine):
            model(PROMPT, past_key_values=cache, use_cache=True)
        torn.layers[0].values = torn.layers[0].values[:, :, :-1]
        before = eager_reasons(fast).get("cache-unknown", 0)
        with contextlib.suppress(RuntimeError):
            fast(PROMPT[:, :1], past_key_values=torn, use_cache=True)
        assert eager_reasons(fast)["cache-unknown"] == before + 1
        found = fast(PROMPT[:, :1], past_key_values=fine, use_cache=True).logits
        expected = model(torch.cat([PROMPT, PROMPT[:, :1]], 1)).logits[:, -1:]
    assert (found - expected).norm() <= 1e-5 * expected.norm()


def test_a_cache_that_cannot_be_copied_is_left_to_eager(
    pair: Callable[[str], tuple[Any, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, fast = pair(FEW[0])
    (decoding,) = installed(fast)["forward"].dispatcher._room.plans  # type: ignore[attr-defined]
    monkeypatch.setattr(decoding, "long_steps", LongSteps(None, lambda found: None))
    cache = hf.DynamicCache(config=model.config)
    cache.lock = threading.Lock()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore", ovshim.FallbackWarning)  # another test may have met it
        found = fast(LONG, past_key_values=cache, use_cache=True)
        expected = model(LONG, use_cache=True)
    assert found.past_key_values is cache
    assert torch.equal(found.logits, expected.logits)
    assert eager_reasons(fast)["cache-unknown"] > 0


def test_a_weight_that_is_changed_while_both_answer_condemns_nothing(
    pair: Callable[[str], tuple[Any, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, fast = pair(FEW[0])
    room = installed(fast)["forward"].dispatcher._room  # type: ignore[attr-defined]
    (decoding,) = room.plans
    monkeypatch.setattr(decoding, "met", set())
    ours, weight = room._by_eager, model.get_output_embeddings().weight
    kept = weight.detach().clone()

    def changed(*given: Any) -> Any:
        answer = ours(*given)
        with torch.no_grad():
            weight.mul_(2.0)  # as another thread does
        return answer

    monkeypatch.setattr(room, "_by_eager", changed)
    cache = hf.DynamicCache(config=model.config)
    with torch.no_grad():
        expected = model(PROMPT, use_cache=True).logits
        monkeypatch.setattr(decoding.ready.engine, "step", wrong(decoding.ready.engine.step))
        try:
            found = fast(PROMPT, past_key_values=cache, use_cache=True).logits
        finally:
            weight.copy_(kept)
    assert torch.equal(found, expected)
    assert cache.get_seq_length() == PROMPT.shape[1]
    assert decoding.reason is None
    assert eager_reasons(fast)["stale"] > 0


def wrong(step: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *given: [output + 1 for output in step(*given)]


@pytest.mark.slow
@pytest.mark.usefixtures("eager_wins_long_steps")
def test_who_is_faster_at_long_steps_is_kept(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ovshim.decode import finish

    monkeypatch.setattr(finish, "race", lambda *ways: Finish(2.0, 1.0, 1.9, 2.1))
    model = lm.make("llama")
    given = {"inputs": LONG, "do_sample": False}
    expected = generate(model, **given)
    for told in ("miss", "hit"):
        fast = ovshim.accelerate(model, PROMPT, cache_dir=cache / "long")
        (plan,) = plans(fast)
        assert (plan["cache"], plan["path"], plan["speedup"]) == (told, "openvino", 2.0)
        for _ in range(3 if told == "miss" else 0):
            alike(fast, model, **given)
        deferred.later(lambda: None)
        assert deferred._writer is not None
        deferred._writer.submit(int).result(30)  # what is found is kept by then
        before = counts(fast)["openvino"]
        same_generation(generate(fast, **given), expected)
        assert counts(fast)["openvino"] == before + 11
        assert eager_reasons(fast)["slower"] == 1


@pytest.mark.slow
def test_one_thread_is_enough(cache: Path) -> None:
    model = lm.make("llama")
    fast = accelerated(model, cache_dir=cache, threads=1)
    fast.ovshim.warm(PROMPT)
    for way in ("greedy", "padded beam", "lookup"):
        alike(fast, model, **WAYS[way])


def test_nothing_stays_behind(pair: Callable[[str], tuple[Any, Any]]) -> None:
    fast = pair("llama")[1]
    room = ovshim.bound.installed(fast)["forward"].dispatcher._room  # type: ignore[attr-defined]
    engine = room.plans[0].ready.engine
    gc.collect()
    before = len(engine._all)
    for _ in range(8):
        fast.generate(PROMPT, max_new_tokens=3, do_sample=False)
    gc.collect()
    assert len(engine._all) <= max(before, 2)


@pytest.mark.slow
def test_another_process_starts_warm(tmp_path: Path) -> None:
    source = """
import sys
import language_models as lm, ovshim, torch
model = lm.make("mistral")
fast = ovshim.accelerate(model, prefer="openvino", cache_dir=sys.argv[1])
ids = torch.tensor([list(range(5, 18))])
for _ in range(2):
    found = fast.generate(ids, max_new_tokens=12, do_sample=False)
assert torch.equal(found, model.generate(ids, max_new_tokens=12, do_sample=False))
report = ovshim.explain(fast).to_dict()
print(report["plans"][0]["cache"], report["calls"]["openvino"], "torch._dynamo" in sys.modules)
"""
    assert run_python(source, str(tmp_path)).split()[:2] == ["miss", "23"]
    assert run_python(source, str(tmp_path)).split()[:2] == ["hit", "23"]


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_child_goes_on_where_its_parent_forked(tmp_path: Path) -> None:
    source = """
import os, sys, warnings
import language_models as lm, ovshim, torch
warnings.simplefilter("ignore", DeprecationWarning)
model = lm.make("llama")
fast = ovshim.accelerate(model, prefer="openvino", cache_dir=sys.argv[1])
ids = torch.tensor([list(range(5, 18))])
fast.ovshim.warm(ids)
with torch.no_grad():
    cache = fast(ids, use_cache=True).past_key_values
    expected = model(ids, use_cache=True).past_key_values
    expected = model(torch.tensor([[40]]), past_key_values=expected).logits
    pid = os.fork()
    torch.set_num_threads(1)
    found = fast(torch.tensor([[40]]), past_key_values=cache).logits
    assert (found - expected).norm() <= 1e-5 * expected.norm()
    assert ovshim.explain(fast).to_dict()["calls"]["openvino"] == 2
    assert fast.generate(ids, max_new_tokens=3).shape == (1, 16)
if pid == 0:
    sys.exit(0)
print(os.waitpid(pid, 0)[1])
"""
    assert run_python(source, str(tmp_path)).split() == ["0"]


@pytest.mark.slow
def test_ovshim_does_without_transformers() -> None:
    source = """
import sys, torch, ovshim
fast = ovshim.accelerate(torch.nn.Linear(4, 4).eval(), torch.randn(2, 4))
assert "transformers" not in sys.modules and "ovshim.decode.room" not in sys.modules
"""
    run_python(source)


def test_the_twin_leaves_the_original_as_it_was(pair: Callable[[str], tuple[Any, Any]]) -> None:
    model, fast = pair("llama")
    assert type(fast) is type(model)
    assert "forward" not in vars(model)
    assert model.config._attn_implementation == "sdpa"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generate(fast, inputs=PROMPT, do_sample=False)
    assert sys.modules["transformers"].cache_utils.DynamicCache is hf.DynamicCache
