"""Libraries built on torch are given an accelerated model instead of their own, and know no
difference. Every model is made of a configuration: nothing is downloaded."""

import concurrent.futures
import copy
import json
import multiprocessing
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checks import counts, quietly, same
from modules import Mlp, make
from torch import Tensor, nn

import ovshim

pytestmark = [
    pytest.mark.slow,
    # Libraries warn as they please; of what is ours nothing may be in the way.
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.filterwarnings("error::ovshim.OvshimWarning"),
]

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
}
WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] the a cat dog sat ran on mat who where is this . red green"
SENTENCES = ["the cat sat on the mat .", "a dog ran .", "where is the red cat"]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """Words by their place in a list."""
    import tokenizers
    import transformers
    from tokenizers.processors import TemplateProcessing

    words = {word: number for number, word in enumerate(WORDS.split())}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    inner.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", words["[CLS]"]), ("[SEP]", words["[SEP]"])],
    )
    names = ("pad", "unk", "cls", "sep", "mask")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner,
        model_max_length=48,
        **{f"{name}_token": f"[{name.upper()}]" for name in names},
    )


def bert(cls: str, **changes: Any) -> Any:
    import transformers

    config = transformers.BertConfig(vocab_size=len(WORDS.split()), **SIZES, **changes)
    return make(getattr(transformers, cls), config)


def accelerated(module: Any, **options: Any) -> Any:
    return ovshim.accelerate(copy.deepcopy(module), prefer="openvino", **options)


def alike(use: Callable[[Any], Any], module: Any, path: str = "openvino", **options: Any) -> Any:
    """Assert that what is made of both is the same, and that OpenVINO has served: by `accelerate`,
    and with the module as it is under `enabled()`. The twin."""
    fast = accelerated(module, **options)
    expected = use(module)
    for _ in range(3):  # the first calls of each kind make plans
        rounded(use(fast), expected)
    assert counts(fast)[path] > 0, ovshim.explain(fast)
    alike_when_enabled(lambda: use(module), expected, path)
    return fast


def alike_when_enabled(use: Callable[[], Any], expected: Any, path: str = "openvino") -> None:
    """Assert that an untouched program does the same under `enabled()`, and that OpenVINO has
    served it."""
    with ovshim.enabled(prefer="openvino") as scope:
        # Two calls are eager's and one that a plan is made of; one each to look into a module.
        for _ in range(8):
            rounded(use(), expected)
    assert sum(row.calls[path] for row in scope.report().rows) > 0, scope.report()


def rounded(actual: Any, expected: Any) -> None:
    """As `same`, with Python's floats compared as tensors are."""
    if isinstance(expected, float | np.floating):
        assert actual == pytest.approx(expected, rel=1e-3, abs=1e-5)
    elif isinstance(expected, dict):
        assert list(actual) == list(expected)
        for key, value in expected.items():
            rounded(actual[key], value)
    elif isinstance(expected, list | tuple):
        assert len(actual) == len(expected)
        for one, other in zip(actual, expected, strict=True):
            rounded(one, other)
    elif isinstance(expected, np.ndarray):
        np.testing.assert_allclose(actual, expected, rtol=1e-3, atol=1e-4)
    elif isinstance(expected, Tensor):
        same(actual, expected, 1e-3)
    elif hasattr(expected, "tobytes"):  # an image
        assert actual.tobytes() == expected.tobytes()
    else:
        assert actual == expected


# transformers


def pipeline(task: str, model: Any, **parts: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.pipeline(task, model=model, device="cpu", **parts)


def test_text_classification(tokenizer: Any) -> None:
    def use(model: Any) -> Any:
        pipe = pipeline("text-classification", model, tokenizer=tokenizer)
        return [pipe(SENTENCES), pipe(SENTENCES, batch_size=3, top_k=None), pipe(SENTENCES[0])]

    alike(use, bert("BertForSequenceClassification", num_labels=3))


def test_token_classification(tokenizer: Any) -> None:
    def use(model: Any) -> Any:
        pipe = pipeline(
            "token-classification", model, tokenizer=tokenizer, aggregation_strategy="simple"
        )
        return pipe(SENTENCES)

    alike(use, bert("BertForTokenClassification", num_labels=3))


def test_fill_mask(tokenizer: Any) -> None:
    def use(model: Any) -> Any:
        return pipeline("fill-mask", model, tokenizer=tokenizer)(["the [MASK] sat .", "a [MASK]"])

    alike(use, bert("BertForMaskedLM"))


def test_question_answering(tokenizer: Any) -> None:
    """By hand: transformers has no pipeline for it any more."""

    def use(model: Any) -> Any:
        given = tokenizer(
            ["where is the cat", "who ran"],
            ["the cat is on a mat", "the red dog ran"],
            padding=True,
            return_tensors="pt",
        )
        with torch.no_grad():
            output = model(**given)
        spans = torch.stack([output.start_logits.argmax(-1), output.end_logits.argmax(-1)])
        return [spans, output.start_logits, output.end_logits]

    alike(use, bert("BertForQuestionAnswering"))


def test_feature_extraction(tokenizer: Any) -> None:
    def use(model: Any) -> Any:
        return pipeline("feature-extraction", model, tokenizer=tokenizer)(SENTENCES)

    alike(use, bert("BertModel"))


def test_zero_shot_classification(tokenizer: Any) -> None:
    def use(model: Any) -> Any:
        pipe = pipeline("zero-shot-classification", model, tokenizer=tokenizer)
        return pipe(SENTENCES, ["red", "green", "cat"], hypothesis_template="this is {} .")

    labels = {"entailment": 0, "neutral": 1, "contradiction": 2}
    names = {number: name for name, number in labels.items()}
    alike(use, bert("BertForSequenceClassification", label2id=labels, id2label=names))


@pytest.fixture(scope="module")
def pictures() -> list[Any]:
    """Two, of different sizes."""
    image = pytest.importorskip("PIL.Image")
    numbers = np.random.default_rng(0)
    sizes = [(40, 50, 3), (36, 32, 3)]
    return [image.fromarray(numbers.integers(0, 255, size, dtype=np.uint8)) for size in sizes]


def processor(name: str, **settings: Any) -> Any:
    """One that needs no torchvision."""
    transformers = pytest.importorskip("transformers")
    return getattr(transformers, f"{name}ImageProcessorPil")(**settings)


def test_image_classification(pictures: list[Any]) -> None:
    import transformers

    config = transformers.ViTConfig(image_size=32, patch_size=8, num_labels=5, **SIZES)
    size = {"height": 32, "width": 32}

    def use(model: Any) -> Any:
        return pipeline("image-classification", model, image_processor=processor("ViT", size=size))(
            pictures, batch_size=2
        )

    alike(use, make(transformers.ViTForImageClassification, config))


def test_image_segmentation(pictures: list[Any]) -> None:
    import transformers

    config = transformers.SegformerConfig(
        num_encoder_blocks=2,
        depths=[1, 1],
        sr_ratios=[2, 1],
        hidden_sizes=[16, 32],
        patch_sizes=[3, 3],
        strides=[2, 2],
        num_attention_heads=[1, 2],
        mlp_ratios=[2, 2],
        decoder_hidden_size=16,
        num_labels=4,
    )
    size = {"height": 32, "width": 32}

    def use(model: Any) -> Any:
        pipe = pipeline(
            "image-segmentation", model, image_processor=processor("Segformer", size=size)
        )
        return [pipe(picture) for picture in pictures]

    alike(use, make(transformers.SegformerForSemanticSegmentation, config))


def test_captions_of_images(pictures: list[Any], tokenizer: Any) -> None:
    """By hand: transformers has no pipeline "image-to-text" any more."""
    import language_models
    from transformers.pipelines import SUPPORTED_TASKS

    assert not {"image-to-text", "question-answering"} & set(SUPPORTED_TASKS)
    model, _ = language_models.make_encoder_decoder("vision")
    prepare = processor("ViT", size={"height": 32, "width": 32})

    def use(model: Any) -> Any:
        pixels = prepare(pictures, return_tensors="pt").pixel_values
        return tokenizer.batch_decode(model.generate(pixels, max_new_tokens=6) % 20)

    alike(use, model)


def test_image_and_text_to_text(pictures: list[Any], tokenizer: Any) -> None:
    """The pipeline that has taken the place of captions. This model's steps are not OpenVINO's
    (they do not prove), and are right."""
    transformers = pytest.importorskip("transformers")
    vision = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes = {"intermediate_size": 48, "image_size": 32, "patch_size": 8}
    config = transformers.GitConfig(
        vision_config=vision | sizes, vocab_size=20, pad_token_id=0, eos_token_id=3, **SIZES
    )
    square = {"height": 32, "width": 32}
    prepare = processor("CLIP", size={"shortest_edge": 32}, crop_size=square)

    def use(model: Any) -> Any:
        both = transformers.GitProcessor(prepare, tokenizer)
        pipe = transformers.pipeline(
            "image-text-to-text", model=model, processor=both, device="cpu"
        )
        return pipe(images=pictures[0], text="the cat", max_new_tokens=5)

    module = make(transformers.GitForCausalLM, config)
    expected, fast = use(module), accelerated(module)
    with quietly():
        for _ in range(3):
            rounded(use(fast), expected)
    with ovshim.enabled(prefer="openvino") as scope:
        for _ in range(3):
            rounded(use(module), expected)
    (row,) = scope.report().rows
    assert row.why is not None


def test_object_detection(pictures: list[Any]) -> None:
    import transformers

    config = transformers.YolosConfig(
        image_size=[32, 32], patch_size=8, num_detection_tokens=5, num_labels=3, **SIZES
    )
    size = {"height": 32, "width": 32}

    def use(model: Any) -> Any:
        pipe = pipeline("object-detection", model, image_processor=processor("Yolos", size=size))
        return [pipe(picture, threshold=0.0) for picture in pictures]

    alike(use, make(transformers.YolosForObjectDetection, config))


def small_wav2vec() -> Any:
    import transformers

    config = transformers.Wav2Vec2Config(
        vocab_size=8,
        conv_dim=[16, 16],
        conv_stride=[5, 4],
        conv_kernel=[10, 8],
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
        **SIZES,
    )
    return make(transformers.Wav2Vec2ForCTC, config)


def test_speech_recognition(tmp_path: Path) -> None:
    import transformers

    letters = {letter: number for number, letter in enumerate(["<pad>", "<unk>", "|", *"abcde"])}
    words = tmp_path / "vocab.json"
    words.write_text(str(letters).replace("'", '"'))
    tokenizer = transformers.Wav2Vec2CTCTokenizer(str(words), pad_token="<pad>", unk_token="<unk>")
    extractor = transformers.Wav2Vec2FeatureExtractor(feature_size=1, sampling_rate=16000)
    numbers = np.random.default_rng(0)
    sounds = [numbers.normal(size=size).astype(np.float32) for size in (3200, 4000, 3200)]

    def use(model: Any) -> Any:
        pipe = pipeline(
            "automatic-speech-recognition",
            model,
            tokenizer=tokenizer,
            feature_extractor=extractor,
        )
        return pipe(copy.deepcopy(sounds))

    alike(use, small_wav2vec())


def test_whisper() -> None:
    """The pipeline of sequence to sequence; `test_generate.py` has the long form."""
    import transformers

    letters = {letter: number for number, letter in enumerate("abcdefghij")}
    tokenizer = transformers.WhisperTokenizer(vocab=letters, merges=[])
    names = ("endoftext", "startoftranscript", "transcribe", "startofprev", "notimestamps")
    tokenizer.add_tokens([f"<|{name}|>" for name in names], special_tokens=True)
    end, start = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|startoftranscript|>"])
    config = transformers.WhisperConfig(
        vocab_size=len(tokenizer),
        num_mel_bins=8,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_target_positions=32,
        pad_token_id=end,
        bos_token_id=end,
        eos_token_id=end,
        decoder_start_token_id=start,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    module = make(transformers.WhisperForConditionalGeneration, config)
    extractor = transformers.WhisperFeatureExtractor(feature_size=8)
    sounds = [np.sin(np.arange(8000, dtype=np.float32) / rate) for rate in (3, 7)]

    def use(model: Any) -> Any:
        pipe = pipeline(
            "automatic-speech-recognition",
            model,
            tokenizer=tokenizer,
            feature_extractor=extractor,
            generate_kwargs={"max_new_tokens": 6},
        )
        return pipe(copy.deepcopy(sounds))

    assert any(answer["text"].strip() for answer in use(module))
    alike(use, module)


def test_audio_classification() -> None:
    import transformers

    config = small_wav2vec().config
    config.num_labels = 3
    extractor = transformers.Wav2Vec2FeatureExtractor(feature_size=1, sampling_rate=16000)
    sounds = [np.sin(np.arange(3200, dtype=np.float32) / rate) for rate in (3, 7)]

    def use(model: Any) -> Any:
        return pipeline("audio-classification", model, feature_extractor=extractor)(
            copy.deepcopy(sounds)
        )

    alike(use, make(transformers.Wav2Vec2ForSequenceClassification, config))


class Sentences(torch.utils.data.Dataset[Any]):
    """Ids of words, and labels."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(index)
        ids = torch.randint(5, 20, (8,), generator=generator)
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "labels": torch.tensor(index % 3),
        }


@pytest.mark.parametrize("workers", [0, 2])
def test_trainer_predicts_and_evaluates(tmp_path: Path, workers: int) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")

    def use(model: Any) -> Any:
        settings = transformers.TrainingArguments(
            str(tmp_path),
            per_device_eval_batch_size=5,
            use_cpu=True,
            report_to=[],
            dataloader_num_workers=workers,
            disable_tqdm=True,
        )
        trainer = transformers.Trainer(model=model, args=settings, eval_dataset=Sentences())
        predicted = trainer.predict(Sentences())
        return [predicted.predictions, predicted.label_ids, trainer.evaluate()["eval_loss"]]

    # It passes labels along: the loss that they ask for is OpenVINO's too.
    alike(use, bert("BertForSequenceClassification", num_labels=3))


def test_trainer_trains(tmp_path: Path) -> None:
    """In eager; then the weights of now are served."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")

    def use(model: Any) -> Any:
        settings = transformers.TrainingArguments(
            str(tmp_path), max_steps=2, use_cpu=True, report_to=[], disable_tqdm=True, seed=1
        )
        model = copy.deepcopy(model)
        trainer = transformers.Trainer(model=model, args=settings, train_dataset=Sentences())
        trainer.train()
        model.eval()
        ids = torch.arange(5, 13)[None]
        with torch.inference_mode():
            answers = [model(input_ids=ids).logits for _ in range(4)]
        if "ovshim" in vars(model):
            assert counts(model)["openvino"] > 0
        return answers

    module = bert("BertForSequenceClassification", num_labels=3)
    rounded(use(accelerated(module)), use(module))


# Other libraries


def test_peft_a_lora_merged_and_swapped(tokenizer: Any) -> None:
    peft = pytest.importorskip("peft")
    given = tokenizer(SENTENCES, padding=True, return_tensors="pt")

    def adapted() -> Any:
        module = bert("BertModel")
        config = peft.LoraConfig(r=2, target_modules=["query", "value"], init_lora_weights=False)
        torch.manual_seed(1)
        model = peft.get_peft_model(module, config)
        model.add_adapter("other", config)
        return model.eval()

    def use(model: Any) -> Any:
        answers = []
        with torch.inference_mode():
            for step in ("default", "other", "merged", "unmerged"):
                if step in ("default", "other"):
                    model.set_adapter(step)
                elif step == "merged":
                    with torch.inference_mode(False), torch.no_grad():
                        model.merge_adapter()
                else:
                    with torch.inference_mode(False), torch.no_grad():
                        model.unmerge_adapter()
                answers += [model(**given).last_hidden_state for _ in range(4)]
        return answers

    module = adapted()
    fast = accelerated(module)
    expected = use(module)
    rounded(use(fast), expected)
    assert counts(fast)["openvino"] >= 4, ovshim.explain(fast)


def test_peft_a_base_that_is_accelerated_beforehand(tokenizer: Any) -> None:
    peft = pytest.importorskip("peft")
    given = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    config = peft.LoraConfig(r=2, target_modules=["query", "value"], init_lora_weights=False)

    def use(model: Any) -> Any:
        torch.manual_seed(1)
        model = peft.get_peft_model(model, config).eval()
        with torch.inference_mode():
            answers = [model(**given).last_hidden_state for _ in range(4)]
            with model.disable_adapter():
                answers += [model(**given).last_hidden_state for _ in range(4)]
        merged = model.merge_and_unload()
        with torch.inference_mode():
            return answers + [merged(**given).last_hidden_state for _ in range(4)]

    module = bert("BertModel")
    fast = accelerated(module)
    rounded(use(fast), use(module))
    assert counts(fast)["openvino"] > 0, ovshim.explain(fast)


def test_sentence_transformers(tokenizer: Any, tmp_path: Path) -> None:
    library = pytest.importorskip("sentence_transformers")
    bert("BertModel").save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = library.SentenceTransformer(str(tmp_path), device="cpu")
    expected = model.encode(SENTENCES, normalize_embeddings=True)
    alike_when_enabled(lambda: model.encode(SENTENCES, normalize_embeddings=True), expected)
    # The transformer is where the time goes; what is around it belongs to the library.
    first = model[0]
    name = "auto_model" if "auto_model" in first._modules else "model"
    fast = ovshim.accelerate(getattr(first, name), prefer="openvino")
    setattr(first, name, fast)
    for _ in range(3):
        rounded(model.encode(SENTENCES, normalize_embeddings=True), expected)
    assert counts(fast)["openvino"] > 0, ovshim.explain(fast)


def test_sentence_transformers_cross_encoder(tokenizer: Any, tmp_path: Path) -> None:
    library = pytest.importorskip("sentence_transformers")
    bert("BertForSequenceClassification", num_labels=1).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = library.CrossEncoder(str(tmp_path), device="cpu")
    pairs = [(SENTENCES[0], other) for other in SENTENCES]
    expected = model.predict(pairs)
    alike_when_enabled(lambda: model.predict(pairs), expected)
    holder, name, inner = next(
        (holder, name, inner)
        for holder in model.modules()
        for name, inner in holder.named_children()
        if type(inner).__name__ == "BertForSequenceClassification"
    )
    fast = ovshim.accelerate(inner, prefer="openvino")
    setattr(holder, name, fast)
    for _ in range(3):
        rounded(model.predict(pairs), expected)
    assert counts(fast)["openvino"] > 0, ovshim.explain(fast)


def test_skorch() -> None:
    library = pytest.importorskip("skorch")
    xs = torch.randn(20, 8).numpy()

    def use(model: Any) -> Any:
        net = library.NeuralNetClassifier(model, train_split=None, batch_size=10, device="cpu")
        net.initialize()
        return [net.predict_proba(xs), net.predict(xs)]

    alike(use, nn.Sequential(make(Mlp), nn.Softmax(-1)).eval())


def test_lightning(tmp_path: Path) -> None:
    library = pytest.importorskip("lightning")

    class Classifier(library.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self, body: nn.Module) -> None:
            super().__init__()
            self.body = body

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x)

    def predictions(classifier: Any, size: int) -> Any:
        trainer = library.Trainer(
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            default_root_dir=tmp_path,
        )
        batches = torch.utils.data.DataLoader(torch.arange(96.0).view(12, 8) / 96, batch_size=size)
        return trainer.predict(classifier, batches)

    alike(lambda body: predictions(Classifier(body), 2), make(Mlp))
    module = Classifier(make(Mlp)).eval()
    fast = accelerated(module)
    rounded(predictions(fast, 4), predictions(module, 4))
    assert counts(fast)["openvino"] > 0


def test_torchmetrics() -> None:
    library = pytest.importorskip("torchmetrics")
    xs, labels = torch.randn(30, 8), torch.randint(0, 4, (30,))

    def use(model: Any) -> Any:
        metric = library.classification.MulticlassAccuracy(4, average="micro")
        with torch.inference_mode():
            for start in range(0, 30, 10):
                metric.update(model(xs[start : start + 10]), labels[start : start + 10])
        return metric.compute()

    alike(use, make(Mlp))


def test_diffusers_a_denoising_loop() -> None:
    library = pytest.importorskip("diffusers")
    model = make(
        library.UNet2DModel,
        sample_size=16,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(16, 32),
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )

    def use(unet: Any) -> Any:
        scheduler = library.DDIMScheduler(num_train_timesteps=50)
        pipe = library.DDIMPipeline(unet, scheduler)
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        return pipe(generator=generator, num_inference_steps=4, output_type="np", eta=0.0).images

    alike(use, model)


def test_diffusers_a_transformer_and_what_decodes_it() -> None:
    library = pytest.importorskip("diffusers")
    transformer = make(
        library.DiTTransformer2DModel,
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        norm_num_groups=8,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=1000,  # the pipeline knows that there are so many
    )
    vae = make(
        library.AutoencoderKL,
        block_out_channels=(16, 16),
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        norm_num_groups=8,
        latent_channels=4,
    )

    def use(transformer: Any) -> Any:
        pipe = library.DiTPipeline(transformer, vae, library.DDIMScheduler())
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        return pipe([1, 2], generator=generator, num_inference_steps=4, output_type="np").images

    alike(use, transformer)


def test_diffusers_a_decoder_of_images() -> None:
    library = pytest.importorskip("diffusers")
    model = make(
        library.AutoencoderKL,
        block_out_channels=(16, 16),
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        norm_num_groups=8,
        latent_channels=4,
    )
    latents = torch.randn(1, 4, 8, 8)
    with torch.inference_mode():
        expected = model.decode(latents).sample
        alike_when_enabled(lambda: model.decode(latents).sample, expected)
        model.decoder = ovshim.accelerate(model.decoder, prefer="openvino")
        for _ in range(3):
            rounded(model.decode(latents).sample, expected)
    assert counts(model.decoder)["openvino"] > 0


# Loops and processes


def answer(module: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """What a worker sends back: the first answer of OpenVINO's, and the report."""
    # As workers of data loaders do it: after a fork, eager's threads are not there any more.
    if multiprocessing.parent_process() is not None:
        torch.set_num_threads(1)
    with torch.inference_mode():
        for _ in range(10):  # while other workers look up the same, eager answers
            y = module(x).clone()
            if counts(module)["openvino"] > 0:
                break
    return y, ovshim.explain(module).to_dict()


def assert_converted_once(told: Sequence[dict[str, Any]], cache: str = "hit") -> None:
    """OpenVINO serves in each worker, by what their parent has built and put into the cache."""
    for report in told:
        assert report["calls"]["openvino"] > 0, report
        assert [plan["cache"] for plan in report["plans"]] == [cache], report
    assert len(list(Path(os.environ["OVSHIM_CACHE_DIR"]).rglob("*.xml"))) == 1


def numbers(index: int) -> Tensor:
    return torch.linspace(-1, 1, 24).view(3, 8) * (index + 1)


def test_joblib() -> None:
    joblib = pytest.importorskip("joblib")
    module = make(Mlp)
    fast = accelerated(module)
    answer(fast, numbers(0))
    for backend in ("loky", "threading"):
        found = joblib.Parallel(n_jobs=2, backend=backend)(
            joblib.delayed(answer)(fast, numbers(index)) for index in range(4)
        )
        with torch.inference_mode():
            same([y for y, _ in found], [module(numbers(index)) for index in range(4)])
        assert_converted_once([told for _, told in found], "hit" if backend == "loky" else "miss")


@pytest.mark.parametrize("method", multiprocessing.get_all_start_methods())
def test_pools_of_processes(method: str) -> None:
    module = make(Mlp)
    fast = accelerated(module)
    answer(fast, numbers(0))
    context = multiprocessing.get_context(method)
    with concurrent.futures.ProcessPoolExecutor(2, mp_context=context) as pool:
        found = list(pool.map(answer, [fast] * 4, map(numbers, range(4)), timeout=200))
    with torch.inference_mode():
        same([y for y, _ in found], [module(numbers(index)) for index in range(4)])
    assert_converted_once([told for _, told in found])


class Features(torch.utils.data.Dataset[Any]):
    """What an accelerated model makes of its items, in workers."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> tuple[Tensor, str]:
        y, told = answer(self.module, numbers(index))
        return y, json.dumps(told)


@pytest.mark.parametrize("method", multiprocessing.get_all_start_methods())
def test_workers_of_data_loaders(method: str) -> None:
    module = make(Mlp)
    fast = accelerated(module)
    answer(fast, numbers(0))
    loader = torch.utils.data.DataLoader(
        Features(fast), batch_size=3, num_workers=2, multiprocessing_context=method
    )
    found = list(loader)
    with torch.inference_mode():
        expected = torch.stack([module(numbers(index)) for index in range(6)])
    same(torch.cat([batch for batch, _ in found]), expected)
    told = [json.loads(text) for _, batch in found for text in batch]
    # A forked worker has the very plan of its parent's.
    assert_converted_once(told, "miss" if method == "fork" else "hit")
