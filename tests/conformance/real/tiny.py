"""Configurations of a few thousand weights, made from any of transformers' own by names of sizes.

Nothing is downloaded: a configuration's defaults are those of a published model, with the sizes
replaced by small ones, recursively in the configurations that it holds.
"""

from typing import Any

# By name of attribute. Chosen to divide one another: heads into widths, patches into images.
SMALL: dict[str, Any] = {
    # Widths.
    **dict.fromkeys(["hidden_size", "d_model", "n_embd", "embed_dim", "dim", "emb_dim"], 32),
    **dict.fromkeys(["embedding_size", "projection_dim", "word_embed_proj_dim", "output_dim"], 32),
    **dict.fromkeys(["attention_hidden_size", "pooler_hidden_size", "encoder_hidden_size"], 32),
    **dict.fromkeys(["text_hidden_size", "vision_hidden_size", "mm_hidden_size", "dim_model"], 32),
    **dict.fromkeys(["intermediate_size", "ffn_dim", "d_ff", "n_inner", "ffn_hidden_size"], 48),
    **dict.fromkeys(["encoder_ffn_dim", "decoder_ffn_dim", "hidden_dim", "dim_feedforward"], 48),
    **dict.fromkeys(["moe_intermediate_size", "shared_expert_intermediate_size"], 24),
    **dict.fromkeys(["expert_ffn_hidden_size", "dim_ff", "encoder_intermediate_size"], 48),
    # Depths.
    **dict.fromkeys(["num_hidden_layers", "num_layers", "n_layer", "n_layers", "depth"], 2),
    **dict.fromkeys(["encoder_layers", "decoder_layers", "num_decoder_layers", "layers"], 2),
    **dict.fromkeys(["encoder_num_hidden_layers", "num_blocks", "num_encoder_layers"], 2),
    **dict.fromkeys(["decoder_num_hidden_layers", "num_hidden_groups"], 1),
    # Heads.
    **dict.fromkeys(["num_attention_heads", "n_head", "n_heads", "num_heads", "num_head"], 4),
    **dict.fromkeys(["encoder_attention_heads", "decoder_attention_heads"], 4),
    **dict.fromkeys(["decoder_num_attention_heads", "encoder_num_attention_heads"], 4),
    **dict.fromkeys(["num_key_value_heads", "num_kv_heads"], 2),
    **dict.fromkeys(["head_dim", "d_kv", "attention_head_size", "kv_channels"], 8),
    # Vocabularies and positions.
    **dict.fromkeys(["vocab_size", "decoder_vocab_size", "n_vocab", "text_vocab_size"], 99),
    **dict.fromkeys(["max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"], 64),
    **dict.fromkeys(["max_sequence_length", "max_source_positions", "max_target_positions"], 64),
    # Experts.
    **dict.fromkeys(["num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"], 4),
    **dict.fromkeys(["num_experts_per_tok", "moe_k", "moe_topk", "num_experts_per_token"], 2),
    **dict.fromkeys(["expert_capacity"], 64),
    # Images.
    **dict.fromkeys(["image_size", "img_size"], 32),
    **dict.fromkeys(["patch_size"], 8),
    # Special tokens inside the vocabulary.
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 0,
}


class Omit:
    """As an override: leave that size as the configuration has it."""


OMIT = Omit()


def sizes(config_class: type, overrides: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments for `config_class`: small values for its names of sizes, and `overrides`.

    A key of `overrides` that names a configuration inside (`text_config`) holds overrides for it.
    """
    inner = getattr(config_class, "sub_configs", None) or {}
    defaults = config_class()
    chosen: dict[str, Any] = {}
    for name, value in SMALL.items():
        present = getattr(defaults, name, None)
        if isinstance(present, int) and not isinstance(present, bool) and _settable(defaults, name):
            chosen[getattr(config_class, "attribute_map", {}).get(name, name)] = value
    for name, nested in inner.items():
        given = overrides.get(name, {})
        held = getattr(defaults, name, None)
        cls = type(held) if held is not None else nested
        if isinstance(given, dict) and hasattr(cls, "model_type") and cls.__name__ != "AutoConfig":
            chosen[name] = {"model_type": cls.model_type, **sizes(cls, given)}
    chosen.update(
        {key: value for key, value in overrides.items() if key not in chosen.keys() & inner}
    )
    return {name: value for name, value in chosen.items() if value is not OMIT}


def _settable(config: Any, name: str) -> bool:
    member = getattr(type(config), name, None)
    return not isinstance(member, property) or member.fset is not None


def configure(config_class: type, **overrides: Any) -> Any:
    """An instance of `config_class` with small sizes, `overrides` winning."""
    return config_class(**sizes(config_class, overrides))
