"""Models that take more than one sort of input, and models of time series."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from conformance.drawing import constant, draw, integers, mask, normal, of, uniform
from conformance.real.building import IDS, MASK, VOCABULARY, architecture

PIXELS = normal("B", 3, 32, 32)
BOTH = draw(input_ids=IDS, attention_mask=MASK, pixel_values=PIXELS)
LENGTHS = (4, 9)

for model_type, model, config in (
    ("aimv2", "Aimv2Model", {}),
    ("altclip", "AltCLIPModel", {}),
    ("blip", "BlipForImageTextRetrieval", {}),
    ("chinese_clip", "ChineseCLIPModel", {}),
    ("clip", "CLIPModel", {}),
    ("clipseg", "CLIPSegForImageSegmentation", {"extract_layers": [0, 1], "reduce_dim": 8}),
    ("flava", "FlavaModel", {}),
    ("groupvit", "GroupViTModel", {}),
    ("metaclip_2", "MetaClip2Model", {}),
    ("owlv2", "Owlv2ForObjectDetection", {}),
    ("owlvit", "OwlViTForObjectDetection", {}),
    ("siglip", "SiglipModel", {}),
    ("tipsv2", "Tipsv2Model", {}),
    ("vilt", "ViltForQuestionAnswering", {}),
):
    architecture("multimodal", model_type, model, BOTH, config=config, lengths=LENGTHS)

architecture(
    "multimodal",
    "git",
    "GitForCausalLM",
    draw(
        input_ids=IDS,
        attention_mask=MASK,
        pixel_values=PIXELS,
        use_cache=constant(False),
    ),
    lengths=LENGTHS,
)
architecture(
    "multimodal",
    "layoutlmv3",
    "LayoutLMv3ForTokenClassification",
    draw(
        input_ids=IDS,
        attention_mask=MASK,
        pixel_values=PIXELS,
        bbox=of(lambda t: t.sort(-1).values, integers(0, 60, "B", "L", 4)),
    ),
    config={
        "input_size": 32,
        "coordinate_size": 5,
        "shape_size": 6,
        "max_2d_position_embeddings": 64,
        "rel_pos_bins": 8,
        "max_rel_pos": 16,
        "rel_2d_pos_bins": 8,
        "max_rel_2d_pos": 16,
    },
    lengths=LENGTHS,
)
architecture(
    "multimodal",
    "lxmert",
    "LxmertForQuestionAnswering",
    draw(
        input_ids=IDS,
        attention_mask=MASK,
        visual_feats=normal("B", 4, 8),
        visual_pos=uniform("B", 4, 4),
    ),
    config={
        "l_layers": 1,
        "x_layers": 1,
        "r_layers": 1,
        "visual_feat_dim": 8,
        "num_qa_labels": 6,
        "num_hidden_layers": {"vision": 1, "cross_encoder": 1, "language": 1},
    },
    lengths=LENGTHS,
)
architecture(
    "multimodal",
    "visual_bert",
    "VisualBertForQuestionAnswering",
    draw(
        input_ids=IDS,
        attention_mask=mask(full=True),
        visual_embeds=normal("B", 3, 16),
        visual_attention_mask=of(torch.ones_like, uniform("B", 3)),
    ),
    config={"visual_embedding_dim": 16},
    lengths=LENGTHS,
)
architecture(
    "multimodal",
    "bridgetower",
    "BridgeTowerModel",
    BOTH,
    config={
        "text_config": {"hidden_size": 32},
        "vision_config": {"hidden_size": 64, "image_size": 32},
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
    },
    lengths=LENGTHS,
)
architecture(
    "multimodal",
    "vision-text-dual-encoder",
    "VisionTextDualEncoderModel",
    BOTH,
    config={
        "vision_config": {
            "model_type": "vit",
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "intermediate_size": 32,
            "image_size": 32,
            "patch_size": 8,
        },
        "text_config": {
            "model_type": "bert",
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "intermediate_size": 32,
            "vocab_size": 99,
        },
    },
    lengths=LENGTHS,
)
VIT = {
    "model_type": "vit",
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 32,
    "image_size": 32,
    "patch_size": 8,
}
GPT = {
    "model_type": "gpt2",
    "n_embd": 32,
    "n_layer": 1,
    "n_head": 4,
    "vocab_size": 99,
    "add_cross_attention": True,
    "is_decoder": True,
}
architecture(
    "multimodal",
    "vision-encoder-decoder",
    "VisionEncoderDecoderModel",
    draw(
        pixel_values=PIXELS,
        decoder_input_ids=IDS,
        use_cache=constant(False),
    ),
    config={"encoder": VIT, "decoder": GPT},
    lengths=LENGTHS,
)


def _with_images(token: int, count: int) -> Any:
    """[batch, length] of ids whose places 1 to `count` stand for an image."""

    def make(batch: int, length: int) -> Tensor:
        ids = torch.randint(5, 80, (batch, length))
        ids[:, 1 : 1 + count] = token
        return ids

    return make


def _picture(token: int, count: int) -> Any:
    return draw(
        input_ids=_with_images(token, count),
        attention_mask=mask(full=True),
        pixel_values=PIXELS,
        use_cache=constant(False),
    )


WIDE: dict[str, Any] = {"size": (2, 24), "lengths": (22, 30)}
LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
}
CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
SIGLIP = {**CLIP, "model_type": "siglip_vision_model", "vision_use_head": False}
architecture(
    "multimodal",
    "llava",
    "LlavaForConditionalGeneration",
    _picture(90, 16),
    config={
        "vision_config": CLIP,
        "text_config": LLAMA,
        "image_token_id": 90,
        "vision_feature_layer": -1,
    },
    **WIDE,
)
architecture(
    "multimodal",
    "vipllava",
    "VipLlavaForConditionalGeneration",
    _picture(90, 16),
    config={
        "vision_config": CLIP,
        "text_config": LLAMA,
        "image_token_id": 90,
        "vision_feature_layers": [-1, -2],
    },
    **WIDE,
)
architecture(
    "multimodal",
    "paligemma",
    "PaliGemmaForConditionalGeneration",
    _picture(90, 16),
    config={
        "vision_config": SIGLIP,
        "text_config": {**LLAMA, "model_type": "gemma", "head_dim": 8},
        "image_token_id": 90,
        "projection_dim": 32,
    },
    **WIDE,
)
architecture(
    "multimodal",
    "aya_vision",
    "AyaVisionForConditionalGeneration",
    _picture(90, 4),
    config={
        "vision_config": SIGLIP,
        "text_config": {**LLAMA, "model_type": "cohere2"},
        "image_token_id": 90,
        "vision_feature_layer": -1,
        "downsample_factor": 2,
    },
    **WIDE,
)
architecture(
    "multimodal",
    "internvl",
    "InternVLForConditionalGeneration",
    _picture(90, 4),
    config={
        "vision_config": {
            "model_type": "internvl_vision",
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 48,
            "image_size": [32, 32],
            "patch_size": [8, 8],
        },
        "text_config": {**LLAMA, "model_type": "qwen2"},
        "image_token_id": 90,
        "vision_feature_layer": -1,
    },
    **WIDE,
)
architecture(
    "multimodal",
    "blip-2",
    "Blip2ForConditionalGeneration",
    draw(
        input_ids=_with_images(90, 4),
        attention_mask=mask(full=True),
        pixel_values=PIXELS,
    ),
    config={
        "vision_config": {},
        "qformer_config": {"encoder_hidden_size": 32},
        "num_query_tokens": 4,
        "text_config": {
            "model_type": "opt",
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "ffn_dim": 32,
            "vocab_size": 99,
            "word_embed_proj_dim": 32,
            "max_position_embeddings": 64,
        },
        "image_token_index": 90,
        "image_token_id": 90,
        "use_decoder_only_language_model": True,
    },
    size=(2, 9),
    lengths=(8, 12),
)
