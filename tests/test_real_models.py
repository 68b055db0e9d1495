"""Modules as people have them: trained, from transformers' configurations, recurrent."""

import copy
import warnings
from typing import Any

import pytest
import torch
from checks import (
    check,
    counts,
    eager_reasons,
    paths,
    plans,
    quietly,
    same,
    served,
    settle,
)
from modules import (
    DigitsCnn,
    Recurrent,
    make,
    small_bert,
    small_resnet,
    small_vit,
)
from torch import Tensor, nn

import ovshim
from ovshim.capture import recurrent

# The digits CNN: real handwriting, trained here


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images [n, 1, 16, 16] in 0..1 and labels: for training, for testing."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.from_numpy(data.images).float()[:, None] / 16
    images = nn.functional.interpolate(images, scale_factor=2, mode="bilinear")
    labels = torch.from_numpy(data.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    images, labels = images[order], labels[order]
    return images[:1300], labels[:1300], images[1300:], labels[1300:]


@pytest.fixture(scope="module")
def classifier(digits: tuple[Tensor, Tensor, Tensor, Tensor]) -> nn.Module:
    images, labels, _, _ = digits
    module = make(DigitsCnn).train()
    optimizer = torch.optim.AdamW(module.parameters(), lr=3e-3)
    for _ in range(4):
        for batch, target in zip(images.split(64), labels.split(64), strict=True):
            optimizer.zero_grad()
            nn.functional.cross_entropy(module(batch), target).backward()
            optimizer.step()
    return module.eval()


def test_digits_are_classified_as_eager_classifies_them(
    classifier: nn.Module, digits: tuple[Tensor, Tensor, Tensor, Tensor]
) -> None:
    _, _, images, labels = digits
    fast = ovshim.accelerate(
        classifier, images[:64], device="CPU", precision="fp32", prefer="openvino"
    )
    for size in (64, 256, 1):
        eager, accelerated = [], []
        before = counts(fast)
        with torch.inference_mode():
            batches = images[: 20 * size].split(size)
            for batch in batches:
                eager.append(classifier(batch))
                accelerated.append(fast(batch))
        after = counts(fast)
        assert after["openvino"] - before["openvino"] == len(batches)
        same(accelerated, eager)
        assert torch.equal(torch.cat(accelerated).argmax(1), torch.cat(eager).argmax(1))
    with torch.inference_mode():
        accuracy = (fast(images).argmax(1) == labels).float().mean()
    assert accuracy > 0.9
    assert counts(fast)["eager"] == 0
    assert len(plans(fast)) == 1


def test_digits_in_bf16_lose_next_to_nothing(
    classifier: nn.Module, digits: tuple[Tensor, Tensor, Tensor, Tensor]
) -> None:
    _, _, images, _ = digits
    fast = ovshim.accelerate(classifier, images[:64], precision="bf16", prefer="openvino")
    with served(fast, "openvino"), torch.inference_mode():
        agreed = fast(images).argmax(1) == classifier(images).argmax(1)
    assert agreed.float().mean() > 0.98


def test_training_goes_on_and_serving_after_it(
    classifier: nn.Module, digits: tuple[Tensor, Tensor, Tensor, Tensor]
) -> None:
    """Evaluation between epochs, the way training scripts do it."""
    images, labels, held_out, _ = digits
    module = copy.deepcopy(classifier)
    fast = ovshim.accelerate(module, held_out[:64], prefer="openvino")
    optimizer = torch.optim.SGD(fast.parameters(), lr=0.05)
    for _ in range(2):
        fast.train()
        for batch, target in zip(images[:256].split(64), labels[:256].split(64), strict=True):
            optimizer.zero_grad()
            nn.functional.cross_entropy(fast(batch), target).backward()
            optimizer.step()
        fast.eval()
        settle(fast, module, held_out[:64])
        check(fast, module, held_out)


# transformers


@pytest.fixture(scope="module")
def bert() -> tuple[nn.Module, nn.Module]:
    """The plain one and the accelerated one, for ids and mask by keyword, both sizes dynamic."""
    module = small_bert()
    fast = ovshim.accelerate(
        module,
        {
            "input_ids": torch.randint(0, 100, (2, 9)),
            "attention_mask": torch.ones(2, 9, dtype=torch.int64),
        },
        dynamic_shapes={
            "input_ids": {0: "batch", 1: "length"},
            "attention_mask": {0: "batch", 1: "length"},
        },
        prefer="openvino",
    )
    return module, fast


def padded(batch: int, length: int) -> dict[str, Tensor]:
    lengths = torch.randint(1, length + 1, (batch,))
    mask = (torch.arange(length) < lengths[:, None]).to(torch.int64)
    return {"input_ids": torch.randint(0, 100, (batch, length)), "attention_mask": mask}


def test_bert_with_padding(bert: tuple[nn.Module, nn.Module]) -> None:
    module, fast = bert
    for batch, length in ((2, 9), (1, 5), (7, 12), (3, 33)):
        output = check(fast, module, **padded(batch, length))
        assert type(output).__name__ == "BaseModelOutputWithPoolingAndCrossAttentions"
        assert output.pooler_output is output[1]
    assert paths(fast) == ["openvino"]


def test_bert_with_left_padding(bert: tuple[nn.Module, nn.Module]) -> None:
    module, fast = bert
    batch = padded(3, 10)
    batch["attention_mask"] = batch["attention_mask"].flip(1)
    check(fast, module, **batch)


def test_bert_with_a_row_that_is_all_padding(bert: tuple[nn.Module, nn.Module]) -> None:
    module, fast = bert
    batch = padded(3, 10)
    batch["attention_mask"][1] = 0
    with torch.inference_mode():
        expected = module(**batch).last_hidden_state
        actual = fast(**batch).last_hidden_state
    rows = [0, 2]
    same(actual[rows], expected[rows])
    assert torch.equal(actual.isnan(), expected.isnan())


def test_bert_refuses_ids_beyond_its_vocabulary(bert: tuple[nn.Module, nn.Module]) -> None:
    _, fast = bert
    batch = padded(2, 9)
    batch["input_ids"][1, 2] = 100
    with torch.inference_mode(), pytest.raises(IndexError, match="index out of range"):
        fast(**batch)


def test_bert_refuses_more_positions_than_it_has(bert: tuple[nn.Module, nn.Module]) -> None:
    module, fast = bert
    check(fast, module, **padded(2, 64), path=None)
    with torch.inference_mode():
        with pytest.raises((IndexError, RuntimeError)) as refused:
            module(**padded(1, 65))
        with pytest.raises(type(refused.value)):
            fast(**padded(1, 65))


@pytest.mark.slow
def test_bert_called_in_other_ways(bert: tuple[nn.Module, nn.Module]) -> None:
    module, fast = bert
    batch = padded(2, 9)
    for arguments in (
        {"return_dict": False},
        {"token_type_ids": torch.randint(0, 2, (2, 9))},
    ):
        settle(fast, module, **batch, **arguments)
    settle(fast, module, batch["input_ids"], batch["attention_mask"])  # positional
    settle(fast, module, batch["input_ids"])
    settle(fast, module, inputs_embeds=torch.randn(2, 9, 32))
    check(fast, module, **batch)


@pytest.mark.slow
def test_bert_asked_for_hidden_states() -> None:
    """transformers collects them by hooks on the layers, which it leaves there."""
    module = small_bert()
    with quietly():
        fast = ovshim.accelerate(module, padded(2, 9), prefer="openvino")
        for wanted in (True, False, True):
            for _ in range(2):
                check(fast, module, **padded(2, 9), output_hidden_states=wanted, path=None)


def test_bert_keeps_what_it_is(bert: tuple[nn.Module, nn.Module]) -> None:
    module, fast = bert
    assert type(fast) is type(module)
    assert fast.config is module.config
    assert fast.device == torch.device("cpu")
    assert fast.dtype == torch.float32
    assert fast.num_parameters() == module.num_parameters()
    assert fast.get_input_embeddings().weight is module.get_input_embeddings().weight


def test_nothing_of_the_models_own_code_runs_but_forward() -> None:
    """Properties of models and configurations warn, log and count when they are read."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module = small_bert()
        ovshim.accelerate(module, {"input_ids": torch.randint(0, 100, (2, 9))}, prefer="openvino")

    class Watched(nn.Module):
        reads = 0

        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 4)

        @property
        def expensive(self) -> int:
            type(self).reads += 1
            return 3

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x)

    watched = Watched().eval()
    fast = ovshim.accelerate(watched, torch.randn(3, 8), prefer="openvino")
    check(fast, watched, torch.randn(3, 8))
    assert Watched.reads == 0


def test_a_saved_and_loaded_transformers_model(tmp_path: Any) -> None:
    module = small_bert()
    fast = ovshim.accelerate(
        module, {"input_ids": torch.randint(0, 100, (2, 9))}, prefer="openvino"
    )
    fast.save_pretrained(tmp_path)
    loaded = type(module).from_pretrained(tmp_path).eval()
    check(fast, loaded, input_ids=torch.randint(0, 100, (2, 9)))


def test_vit() -> None:
    module = small_vit()
    fast = ovshim.accelerate(module, torch.randn(2, 3, 32, 32), prefer="openvino")
    for batch in (2, 1, 5):
        output = check(fast, module, torch.randn(batch, 3, 32, 32))
        assert output.logits.shape == (batch, 7)
    assert paths(fast) == ["openvino"]
    with torch.inference_mode(), pytest.raises(ValueError, match="match"):
        fast(torch.randn(2, 3, 64, 64))


def test_resnet() -> None:
    module = small_resnet()
    fast = ovshim.accelerate(module, {"pixel_values": torch.randn(2, 3, 32, 32)}, prefer="openvino")
    for batch in (2, 1, 5):
        check(fast, module, pixel_values=torch.randn(batch, 3, 32, 32))
    settle(fast, module, pixel_values=torch.randn(2, 3, 48, 32))
    check(fast, module, pixel_values=torch.randn(1, 3, 64, 32))
    # Another layout is another kind of call: what eager thinks of it is not what it thinks of this.
    images = torch.randn(2, 3, 32, 32).to(memory_format=torch.channels_last)
    settle(fast, module, pixel_values=images)


@pytest.mark.slow
def test_classification_with_labels_gives_a_loss() -> None:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=100,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=48,
        num_labels=3,
    )
    config.problem_type = "single_label_classification"
    module = make(BertForSequenceClassification, config)
    batch = {**padded(2, 9), "labels": torch.tensor([0, 2])}
    with quietly():
        fast = ovshim.accelerate(module, batch, prefer="openvino")
        check(fast, module, **batch, path=None)
        check(fast, module, **padded(2, 9), labels=torch.tensor([1, 1]), path=None)
    settle(fast, module, **padded(2, 9))


@pytest.mark.slow
def test_a_causal_model_generates_the_same() -> None:
    """`generate` calls the module itself, with a cache that grows: right, however it is served."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    config.bos_token_id, config.eos_token_id, config.pad_token_id = 1, None, 0
    module = make(LlamaForCausalLM, config)
    module.generation_config.eos_token_id = None
    module.generation_config.pad_token_id = 0
    ids = torch.randint(2, 64, (2, 5))
    arguments = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "do_sample": False}
    with quietly():
        fast = ovshim.accelerate(module, prefer="openvino")
        assert torch.equal(fast.generate(ids, **arguments), module.generate(ids, **arguments))
        mask = torch.ones_like(ids)
        settle(fast, module, input_ids=ids, attention_mask=mask, use_cache=False)


# Recurrent


def test_an_lstm() -> None:
    module = make(Recurrent)
    fast = ovshim.accelerate(module, torch.randn(2, 5, 8), prefer="openvino")
    output, state = check(fast, module, torch.randn(2, 5, 8))
    assert isinstance(state, tuple)
    assert output.shape == (2, 5, 4)
    settle(fast, module, torch.randn(3, 5, 8))
    settle(fast, module, torch.randn(3, 11, 8))


def test_an_lstm_that_is_given_its_state() -> None:
    module = make(nn.LSTM, 8, 16, batch_first=True)
    state = (torch.zeros(1, 2, 16), torch.zeros(1, 2, 16))
    fast = ovshim.accelerate(module, (torch.randn(2, 5, 8), state), prefer="openvino")
    for _ in range(3):
        _, state = check(fast, module, torch.randn(2, 5, 8), state)
    assert state[0].abs().sum() > 0


@pytest.mark.slow
def test_an_lstm_of_packed_sequences_is_right() -> None:
    from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(8, 6, batch_first=True)

        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
            return pad_packed_sequence(self.lstm(packed)[0], batch_first=True)[0]

    module = make(Packed)
    with quietly():
        fast = ovshim.accelerate(
            module, (torch.randn(3, 5, 8), torch.tensor([5, 3, 1])), prefer="openvino"
        )
        for lengths in ([5, 3, 1], [5, 5, 5], [2, 5, 4], [2, 2, 1]):
            check(fast, module, torch.randn(3, 5, 8), torch.tensor(lengths), path=None)


@pytest.mark.parametrize("cls", [nn.GRU, nn.RNN])
def test_other_recurrent_layers(cls: type[nn.Module]) -> None:
    """Dynamo takes them apart into a step for each moment; the graph is one for all lengths."""
    before = [dict(layer.py_kernels) for layer in recurrent.LAYERS]
    module = make(cls, 8, 6, num_layers=2, bidirectional=True)
    fast = ovshim.accelerate(module, torch.randn(5, 2, 8), prefer="openvino")
    assert [layer.py_kernels for layer in recurrent.LAYERS] == before
    for length in (5, 1, 9, 40):
        settle(fast, module, torch.randn(length, 2, 8))
    (plan,) = plans(fast)
    assert plan["signature"] == "[0]: float32[?, 2, 8]"
    for each in (module, fast):
        with pytest.raises(RuntimeError, match="length to be larger than 0"):
            each(torch.randn(0, 2, 8))


def test_a_transformer_encoder_of_torch() -> None:
    """It has a fast path of its own outside of training, and another when gradients are on."""
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    module = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    with quietly():
        fast = ovshim.accelerate(module, torch.randn(2, 5, 16), prefer="openvino")
        for _ in range(2):
            check(fast, module, torch.randn(2, 5, 16), path=None)
        mask = torch.tensor([[False] * 5, [False, False, True, True, True]])
        for _ in range(2):
            check(fast, module, torch.randn(2, 5, 16), src_key_padding_mask=mask, path=None)


def test_a_quantized_module_of_torch_is_right() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = torch.ao.quantization.quantize_dynamic(
            nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).eval(), {nn.Linear}
        )
    with quietly():
        fast = ovshim.accelerate(module, torch.randn(3, 8), prefer="openvino")
        check(fast, module, torch.randn(3, 8), path=None, tolerance=0.0)


def test_scripted_and_traced_modules_are_right() -> None:
    class Calls(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.linear(x))

    module = make(Calls)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        scripted = torch.jit.script(module)
        traced = torch.jit.trace(module, torch.randn(3, 8))
        with quietly():
            for one in (scripted, traced):
                fast = ovshim.accelerate(one, torch.randn(3, 8), prefer="openvino")
                for batch in (3, 5):
                    with torch.inference_mode():
                        x = torch.randn(batch, 8)
                        same(fast(x), module(x))


def test_exported_modules_are_right() -> None:
    module = make(DigitsCnn)
    exported = torch.export.export(module, (torch.randn(2, 1, 16, 16),)).module()
    with quietly():
        fast = ovshim.accelerate(exported, torch.randn(2, 1, 16, 16), prefer="openvino")
        x = torch.randn(2, 1, 16, 16)
        with torch.inference_mode():
            for _ in range(2):
                same(fast(x), module(x))


def test_a_graph_module() -> None:
    module = make(DigitsCnn)
    graph = torch.fx.symbolic_trace(module)
    fast = ovshim.accelerate(graph, torch.randn(2, 1, 16, 16), prefer="openvino")
    assert type(fast) is type(graph)
    check(fast, graph, torch.randn(3, 1, 16, 16))


def test_a_compiled_module_is_to_be_accelerated_before() -> None:
    compiled = torch.compile(make(DigitsCnn), backend="eager")
    with pytest.raises(ovshim.OptionError, match="Accelerate the module first"):
        ovshim.accelerate(compiled, torch.randn(2, 1, 16, 16))


@pytest.mark.slow
def test_hidden_states_that_hooks_of_transformers_take_down() -> None:
    """Its hooks stay on the layers once they were asked for, and do nothing by themselves; but a
    model around an accelerated part listens to those inside of it."""
    ids = torch.arange(12).view(2, 6)
    module, fast = small_bert(), ovshim.accelerate(small_bert(), prefer="openvino")
    for asked in (False, True, False, True):
        settle(fast, module, ids, output_hidden_states=asked)
        with served(fast, "openvino"), torch.inference_mode():
            fast(ids, output_hidden_states=asked)

    module, outer = small_bert(), small_bert()
    part: Any = ovshim.accelerate(outer.get_submodule("encoder"), prefer="openvino")
    outer.encoder = part
    with quietly(), torch.inference_mode():
        for asked in (False, True) * 6:
            before = counts(part)["eager"]
            same(outer(ids, output_hidden_states=asked), module(ids, output_hidden_states=asked))
            assert not asked or counts(part)["eager"] == before + 1
    assert counts(part)["openvino"] + counts(part)["mixed"] > 0
    assert eager_reasons(part)["inner-hooks"] > 0
