"""Small language models with random weights, one of each sort that is decoded."""

from __future__ import annotations

import os
from typing import Any

# Nothing is downloaded; read once, when transformers is imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers as hf
from torch import nn

WINDOW = 8
TOKENS = {"vocab_size": 99, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_LLAMA = {
    **TOKENS,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
_GPT = {**TOKENS, "n_layer": 2, "n_head": 4}
_NARROW = {"head_dim": 12}
_MIXED = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": WINDOW}
_EXPERTS = {"num_experts_per_tok": 2, "num_experts": 4, "moe_intermediate_size": 32}

CONFIGS: dict[str, Any] = {
    "llama": lambda: hf.LlamaConfig(**_LLAMA),
    "mistral": lambda: hf.MistralConfig(**_LLAMA, **_NARROW, sliding_window=WINDOW),
    "gemma2": lambda: hf.Gemma2Config(**_LLAMA, **_NARROW, sliding_window=WINDOW),
    "gemma3": lambda: hf.Gemma3TextConfig(**_LLAMA, **_NARROW, **_MIXED),
    "phi3": lambda: hf.Phi3Config(**_LLAMA),
    "qwen2": lambda: hf.Qwen2Config(**_LLAMA),
    "qwen3": lambda: hf.Qwen3Config(**_LLAMA, **_NARROW),
    "opt": lambda: hf.OPTConfig(
        **TOKENS,
        hidden_size=48,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        word_embed_proj_dim=48,
    ),
    "gpt2": lambda: hf.GPT2Config(**_GPT, n_embd=48, n_positions=128),
    "gpt-neox": lambda: hf.GPTNeoXConfig(
        **TOKENS,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
    ),
    "bloom": lambda: hf.BloomConfig(**_GPT, hidden_size=48),
    "mixtral": lambda: hf.MixtralConfig(**_LLAMA, num_local_experts=4, num_experts_per_tok=2),
    "qwen2-moe": lambda: hf.Qwen2MoeConfig(
        **_LLAMA, **_EXPERTS, shared_expert_intermediate_size=32
    ),
}


_SOURCES = {"vocab_size": 99, "pad_token_id": 0, "decoder_start_token_id": 3, "d_model": 48}
_ATTENTION = {
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
}

ENCODER_DECODERS: dict[str, Any] = {
    "t5": lambda: hf.T5ForConditionalGeneration(
        hf.T5Config(**_SOURCES, d_kv=12, d_ff=64, num_layers=2, num_heads=4)
    ),
    "switch": lambda: hf.SwitchTransformersForConditionalGeneration(
        hf.SwitchTransformersConfig(
            **_SOURCES,
            d_kv=12,
            d_ff=64,
            num_layers=2,
            num_decoder_layers=2,
            num_heads=4,
            num_experts=4,
        )
    ),
    "bart": lambda: hf.BartForConditionalGeneration(
        hf.BartConfig(**_SOURCES, **_ATTENTION, max_position_embeddings=128)
    ),
    "whisper": lambda: hf.WhisperForConditionalGeneration(
        hf.WhisperConfig(
            **_SOURCES,
            **_ATTENTION,
            bos_token_id=1,
            eos_token_id=2,
            num_mel_bins=16,
            max_source_positions=50,
            max_target_positions=64,
            suppress_tokens=None,
            begin_suppress_tokens=None,
        )
    ),
    "vision": lambda: hf.VisionEncoderDecoderModel(
        hf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(
            hf.ViTConfig(
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=4,
                intermediate_size=64,
                image_size=32,
                patch_size=8,
            ),
            hf.GPT2Config(**_GPT, n_embd=48, n_positions=128, add_cross_attention=True),
        )
    ),
}


def make_encoder_decoder(name: str) -> tuple[Any, dict[str, Any]]:
    """A model with an encoder, and what its `generate` is given."""
    torch.manual_seed(0)
    model = ENCODER_DECODERS[name]().eval()
    settings = model.generation_config
    settings.eos_token_id = settings.forced_eos_token_id = None
    settings.decoder_start_token_id, settings.pad_token_id = 3, 0
    if name == "whisper":
        return model, {"input_features": torch.randn(2, 16, 100)}
    if name == "vision":
        return model, {"pixel_values": torch.randn(2, 3, 32, 32)}
    ids = torch.randint(4, 90, (2, 7))
    mask = torch.ones_like(ids)
    mask[0, 4:] = 0
    return model, {"inputs": ids, "attention_mask": mask}


def make(name: str, seed: int = 0) -> nn.Module:
    """A model that never says it is done, so that every test has tokens enough."""
    torch.manual_seed(seed)
    model = hf.AutoModelForCausalLM.from_config(CONFIGS[name]()).eval()
    model.generation_config.eos_token_id = None
    return model  # type: ignore[no-any-return]
