"""Key-value caches that transformers' models make and hand out where nobody says `use_cache=False`:
outputs like others, with the class and the attributes that eager's have."""

import copy
import dataclasses
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from checks import check, counts, plans, same, served
from language_models import CONFIGS, ENCODER_DECODERS, WINDOW, make
from torch import nn
from transformers import cache_utils

import ovshim

SOURCES = torch.randint(5, 90, (2, 7), generator=torch.Generator().manual_seed(1))


def ids(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(5, 90, (batch, length), generator=torch.Generator().manual_seed(seed))


def base(name: str) -> nn.Module:
    torch.manual_seed(0)
    made: nn.Module = hf.AutoModel.from_config(CONFIGS[name]()).eval()
    return made


def accelerated(module: nn.Module, **example: Any) -> Any:
    fast = ovshim.accelerate(module, example_kwargs=example, prefer="openvino")
    assert [plan["path"] for plan in plans(fast)] == ["openvino"], plans(fast)
    return fast


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_a_decoder_without_a_head_hands_out_its_cache(name: str) -> None:
    module = base(name)
    fast = accelerated(module, input_ids=ids(2, 6))
    output = check(fast, module, input_ids=ids(2, 6, seed=1))
    assert type(output.past_key_values) is hf.DynamicCache
    check(fast, module, input_ids=ids(3, 6))


def test_a_state_space_model_hands_out_its_states() -> None:
    """Its code asks libraries for versions, by functions that are marked as constant."""
    torch.manual_seed(0)
    config = hf.MambaConfig(vocab_size=99, hidden_size=16, num_hidden_layers=2, state_size=4)
    module = hf.MambaModel(config).eval()
    fast = accelerated(module, input_ids=ids(2, 6))
    assert plans(fast)[0]["route"] == "dynamo"
    output = check(fast, module, input_ids=ids(3, 6, seed=1))
    assert output.cache_params.layers[0].recurrent_states[0].shape == (3, 32, 4)


def test_lengths_beyond_a_window_are_cut_as_eager_cuts_them() -> None:
    module = base("mistral")
    long = ids(2, WINDOW + 5)
    output = check(accelerated(module, input_ids=long), module, input_ids=long)
    layer = output.past_key_values.layers[0]
    assert layer.keys.shape[2] == WINDOW - 1
    assert layer.cumulative_length == WINDOW + 5


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_an_encoder_with_a_decoder_hands_out_both_caches(name: str) -> None:
    torch.manual_seed(0)
    module = ENCODER_DECODERS[name]().eval()
    fast = accelerated(module, input_ids=SOURCES, decoder_input_ids=ids(2, 5))
    output = check(fast, module, input_ids=SOURCES.flip(0), decoder_input_ids=ids(2, 5, seed=2))
    assert type(output.past_key_values) is hf.EncoderDecoderCache
    assert output.past_key_values.is_updated == {0: True, 1: True}


def test_a_loss_of_a_language_model() -> None:
    torch.manual_seed(0)
    module = hf.AutoModelForCausalLM.from_config(CONFIGS["qwen2"]()).eval()
    fast = accelerated(module, input_ids=ids(2, 6), labels=ids(2, 6))
    check(fast, module, input_ids=ids(2, 6, 3), labels=ids(2, 6, 3))


def test_a_cache_belongs_to_the_caller() -> None:
    module = base("llama")
    fast = accelerated(module, input_ids=ids(2, 6))
    with torch.inference_mode():
        expected, one, other = (f(input_ids=ids(2, 6)) for f in (module, fast, fast))
        assert one.past_key_values is not other.past_key_values
        assert one.past_key_values.layers is not other.past_key_values.layers
        one.past_key_values.layers[0].keys.zero_()
        one.past_key_values.layers.clear()
        same(other, expected)
        with served(fast, "openvino"):
            same(fast(input_ids=ids(2, 6)), expected)


def test_eager_goes_on_with_a_cache_that_a_plan_has_made() -> None:
    module = base("llama")
    fast = accelerated(module, input_ids=ids(2, 6))
    with torch.inference_mode():
        caches = [f(input_ids=ids(2, 6)).past_key_values for f in (module, fast)]
        expected = module(input_ids=ids(2, 1), past_key_values=caches[0])
        with served(fast, "eager", "unknown-leaf"), pytest.warns(ovshim.FallbackWarning):
            same(fast(input_ids=ids(2, 1), past_key_values=caches[1]), expected)
        same(vars(caches[1]), vars(caches[0]))
        same(pickle.loads(pickle.dumps(copy.deepcopy(caches[1]))), caches[0])


@pytest.mark.parametrize(
    ("cls", "method"),
    [
        (cache_utils.DynamicLayer, "update"),
        pytest.param(hf.DynamicCache, "__init__", marks=pytest.mark.slow),
        pytest.param(hf.Cache, "update", marks=pytest.mark.slow),
    ],
)
def test_a_method_of_caches_that_is_patched(
    cls: type, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = base("llama")
    fast = accelerated(module, input_ids=ids(2, 6))
    check(fast, module, input_ids=ids(2, 6, seed=1))
    before = getattr(cls, method)

    def patched(cache: Any, *args: Any, **kwargs: Any) -> Any:
        given = before(cache, *args, **kwargs)
        cache.patched = True
        return given if given is None else (given[0] * 2, given[1])

    with monkeypatch.context() as patch:
        patch.setattr(cls, method, patched)
        check(fast, module, input_ids=ids(2, 6, seed=2), path="eager", reason="stale")
        check(fast, module, input_ids=ids(2, 6, seed=3))
    check(fast, module, input_ids=ids(2, 6, seed=4), path=None)


def test_a_method_of_caches_that_is_patched_between_two_conversations(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = make("llama")
    fast = ovshim.accelerate(module, prefer="openvino")
    told: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(fast.generate(ids(2, 6), **told), module.generate(ids(2, 6), **told))  # type: ignore[operator]
    before = cache_utils.DynamicLayer.update

    def patched(layer: Any, keys: Any, values: Any, *args: Any, **kwargs: Any) -> Any:
        return before(layer, keys * 0, values * -3, *args, **kwargs)

    monkeypatch.setattr(cache_utils.DynamicLayer, "update", patched)
    for _ in range(2):
        assert torch.equal(fast.generate(ids(2, 6), **told), module.generate(ids(2, 6), **told))  # type: ignore[operator]


def test_gradients_go_through_a_cache() -> None:
    module = base("llama")
    fast = accelerated(module, input_ids=ids(2, 6))
    fast(input_ids=ids(2, 6))  # of which the plan with gradients is made
    found = []
    for one in (module, fast):
        module.zero_grad()
        output = one(input_ids=ids(2, 6))
        layer = output.past_key_values.layers[1]
        (output.last_hidden_state.sum() + layer.keys.square().sum() + layer.values.sum()).backward()
        found.append({name: p.grad.clone() for name, p in module.named_parameters()})
    assert counts(fast)["openvino"] == 1, ovshim.explain(fast)
    same(found[1], found[0])


class Keeps(nn.Module):
    """A module with a cache of its own."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.how = how
        self.cache = hf.DynamicCache()
        self.cache.update(torch.zeros(1, 1, 1, 4), torch.ones(1, 1, 1, 4), 0)

    def forward(self, x: torch.Tensor) -> tuple[Any, ...]:
        y = self.linear(x)
        made = hf.DynamicCache()
        if self.how == "same":
            return y, self.cache
        if self.how == "layers":
            made.layers = self.cache.layers
            return y, made
        made.update(y[None, None], y[None, None] + 1, 0)
        if self.how == "strange":
            made.keeper = self
        return (y, made, made) if self.how == "twice" else (y, made)


@pytest.mark.parametrize(
    ("how", "code"),
    [
        ("same", "aliases-input"),
        ("layers", "aliases-input"),
        ("twice", "aliases-input"),
        ("strange", "unknown-leaf"),
    ],
)
def test_what_is_not_the_calls_own_stays_what_it_is(how: str, code: str) -> None:
    module = Keeps(how).eval()
    x = torch.randn(3, 4)
    with pytest.warns(ovshim.FallbackWarning):
        fast = ovshim.accelerate(module, x, prefer="openvino")
    [plan] = plans(fast)
    assert plan["reason"]["code"] == code
    assert plan["path"] != "openvino"
    with torch.inference_mode():
        output, expected = fast(x), module(x)
    same(output[0], expected[0])
    assert (output[1] is module.cache) == (expected[1] is module.cache)
    assert (output[1].layers is module.cache.layers) == (expected[1].layers is module.cache.layers)
    assert (output[1] is output[-1]) == (expected[1] is expected[-1])


def test_a_cache_that_a_call_fills() -> None:
    module = Keeps("new").eval()
    x = torch.randn(3, 4)
    check(ovshim.accelerate(module, x, prefer="openvino"), module, x)


@dataclasses.dataclass
class Named:
    """With names that an artifact's own records have for methods."""

    keys: torch.Tensor
    items: torch.Tensor
    _private: torch.Tensor


class NamesFields(nn.Module):
    def forward(self, x: torch.Tensor) -> Named:
        return Named(x + 1, x * 2, x - 1)


def test_an_artifact_gives_a_cache_as_its_fields(tmp_path: Path) -> None:
    module = base("gemma3")
    long = ids(2, WINDOW + 5)
    accelerated(module, input_ids=long).ovshim.save(tmp_path / "artifact")
    with torch.inference_mode():
        output = ovshim.load(tmp_path / "artifact")(input_ids=long)
        expected = module(input_ids=long)
    pairs = zip(output.past_key_values.layers, expected.past_key_values.layers, strict=True)
    for one, other in pairs:
        assert vars(one).keys() == vars(other).keys()
        same(one.keys, other.keys)
        same(vars(one).get("_sliding_window_tensor"), vars(other).get("_sliding_window_tensor"))


def test_an_artifact_gives_fields_of_any_name(tmp_path: Path) -> None:
    x = torch.randn(3, 4)
    ovshim.accelerate(NamesFields().eval(), x, prefer="openvino").ovshim.save(tmp_path / "artifact")
    output = ovshim.load(tmp_path / "artifact")(x)
    same((output.keys, output["items"], output._private), (x + 1, x * 2, x - 1))


@dataclasses.dataclass
class Hidden:
    __hidden__: torch.Tensor


class HidesField(nn.Module):
    def forward(self, x: torch.Tensor) -> Hidden:
        return Hidden(x + 1)


def test_what_no_artifact_can_name_is_not_saved(tmp_path: Path) -> None:
    fast: Any = ovshim.accelerate(HidesField().eval(), torch.randn(3, 4), prefer="openvino")
    with pytest.raises(ovshim.ArtifactError, match="__hidden__"):
        fast.ovshim.save(tmp_path / "artifact")
