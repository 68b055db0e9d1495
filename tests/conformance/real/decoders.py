"""Decoders: dense ones, mixtures of experts, and those with a state instead of attention."""

from __future__ import annotations

from typing import Any

from conformance.real.building import decoder

DENSE: dict[str, str | tuple[str, dict[str, Any]]] = {
    "apertus": "ApertusForCausalLM",
    "arcee": "ArceeForCausalLM",
    "bert-generation": ("BertGenerationDecoder", {"is_decoder": True}),
    "biogpt": "BioGptForCausalLM",
    "bitnet": "BitNetForCausalLM",
    "bloom": "BloomForCausalLM",
    "codegen": ("CodeGenForCausalLM", {"rotary_dim": 4}),
    "cohere": "CohereForCausalLM",
    "cohere2": ("Cohere2ForCausalLM", {"sliding_window": 4}),
    "cpmant": "CpmAntModel",
    "ctrl": "CTRLLMHeadModel",
    "diffllama": "DiffLlamaForCausalLM",
    "doge": "DogeForCausalLM",
    "ernie4_5": "Ernie4_5ForCausalLM",
    "exaone4": "Exaone4ForCausalLM",
    "falcon": ("FalconForCausalLM", {}),
    "gemma": "GemmaForCausalLM",
    "gemma2": ("Gemma2ForCausalLM", {"sliding_window": 4}),
    "gemma3_text": ("Gemma3ForCausalLM", {"sliding_window": 4}),
    "glm": "GlmForCausalLM",
    "glm4": "Glm4ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "gpt_bigcode": "GPTBigCodeForCausalLM",
    "gpt_neo": (
        "GPTNeoForCausalLM",
        {"attention_types": [[["global", "local"], 1]], "window_size": 4},
    ),
    "gpt_neox": "GPTNeoXForCausalLM",
    "gpt_neox_japanese": "GPTNeoXJapaneseModel",
    "gptj": ("GPTJForCausalLM", {"rotary_dim": 4}),
    "granite": "GraniteForCausalLM",
    "helium": "HeliumForCausalLM",
    "imagegpt": "ImageGPTModel",
    "llama": "LlamaForCausalLM",
    "minicpm3": (
        "MiniCPM3ForCausalLM",
        {
            "num_key_value_heads": 4,
            "q_lora_rank": 16,
            "kv_lora_rank": 8,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 4,
            "v_head_dim": 8,
        },
    ),
    "ministral3": "Ministral3ForCausalLM",
    "mistral": ("MistralForCausalLM", {"sliding_window": 4}),
    "modernbert-decoder": "ModernBertDecoderForCausalLM",
    "mpt": "MptForCausalLM",
    "nanochat": "NanoChatForCausalLM",
    "nemotron": ("NemotronForCausalLM", {"head_dim": 8, "num_key_value_heads": 2}),
    "olmo": "OlmoForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "olmo3": ("Olmo3ForCausalLM", {"sliding_window": 4}),
    "openai-gpt": "OpenAIGPTLMHeadModel",
    "opt": "OPTForCausalLM",
    "persimmon": "PersimmonForCausalLM",
    "phi": "PhiForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "seed_oss": "SeedOssForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
    "stablelm": "StableLmForCausalLM",
    "starcoder2": "Starcoder2ForCausalLM",
    "vaultgemma": "VaultGemmaForCausalLM",
    "xglm": "XGLMForCausalLM",
}

LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
    "head_dim": 4,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}

EXPERTS: dict[str, str | tuple[str, dict[str, Any]]] = {
    "afmoe": "AfmoeForCausalLM",
    "deepseek_v2": ("DeepseekV2ForCausalLM", {**LATENT, "num_experts_per_tok": 2}),
    "deepseek_v3": ("DeepseekV3ForCausalLM", LATENT),
    "ernie4_5_moe": "Ernie4_5_MoeForCausalLM",
    "flex_olmo": "FlexOlmoForCausalLM",
    "glm4_moe": "Glm4MoeForCausalLM",
    "gpt_oss": ("GptOssForCausalLM", {"sliding_window": 4}),
    "granitemoe": "GraniteMoeForCausalLM",
    "granitemoeshared": "GraniteMoeSharedForCausalLM",
    "jetmoe": "JetMoeForCausalLM",
    "llama4_text": "Llama4ForCausalLM",
    "minimax": "MiniMaxForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "olmoe": "OlmoeForCausalLM",
    "phimoe": "PhimoeForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "solar_open": "SolarOpenForCausalLM",
}

STATES: dict[str, str | tuple[str, dict[str, Any]]] = {
    "bamba": (
        "BambaForCausalLM",
        {
            "mamba_n_heads": 8,
            "mamba_d_head": 8,
            "mamba_d_state": 8,
            "mamba_chunk_size": 4,
            "attn_layer_indices": [1],
        },
    ),
    "falcon_h1": (
        "FalconH1ForCausalLM",
        {"mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_state": 8},
    ),
    "falcon_mamba": "FalconMambaForCausalLM",
    "jamba": (
        "JambaForCausalLM",
        {"attn_layer_offset": 1, "attn_layer_period": 2, "use_mamba_kernels": False},
    ),
    "lfm2": "Lfm2ForCausalLM",
    "mamba": "MambaForCausalLM",
    "mamba2": (
        "Mamba2ForCausalLM",
        {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1, "chunk_size": 4},
    ),
    "nemotron_h": "NemotronHForCausalLM",
    "qwen3_next": "Qwen3NextForCausalLM",
    "recurrent_gemma": "RecurrentGemmaForCausalLM",
    "rwkv": "RwkvForCausalLM",
    "xlstm": "xLSTMForCausalLM",
}

DROPPED: dict[str, list[str]] = {
    "cpmant": ["attention_mask"],
    "xlstm": ["attention_mask"],
    "openai-gpt": ["use_cache"],
}

for family, table in {"decoder": DENSE, "experts": EXPERTS, "state-space": STATES}.items():
    for model_type, row in table.items():
        model, config = row if isinstance(row, tuple) else (row, {})
        decoder(model_type, model, family=family, config=config, drop=DROPPED.get(model_type, []))
