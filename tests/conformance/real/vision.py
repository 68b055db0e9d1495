"""Backbones, classifiers, detectors, segmentation, depth and restoration of images and videos."""

from __future__ import annotations

from typing import Any

from conformance.drawing import draw, normal, of
from conformance.real.building import architecture, images
from conformance.real.tiny import OMIT

# Of convolutions alone: any size of image.
OPEN = {"lengths": (5, 8)}
STAGES: dict[str, Any] = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}
CONVNEXT: dict[str, Any] = {**STAGES, "num_stages": 4}
RESNET: dict[str, Any] = {**STAGES, "embedding_size": 8, "layer_type": "basic"}
SWIN: dict[str, Any] = {
    "embed_dim": 8,
    "depths": [1, 2],
    "num_heads": [1, 2],
    "window_size": 2,
    "patch_size": 4,
}

images("vision", "aimv2_vision_model", "Aimv2VisionModel")
images("vision", "beit", "BeitForImageClassification")
images("vision", "bit", "BitModel", config={**STAGES, "embedding_size": 8, "num_groups": 4}, **OPEN)
images("vision", "clip_vision_model", "CLIPVisionModelWithProjection")
images(
    "vision",
    "convnext",
    "ConvNextForImageClassification",
    config=CONVNEXT,
    size=(2, 8),
    lengths=(9, 12),
)
images(
    "vision",
    "convnextv2",
    "ConvNextV2ForImageClassification",
    config=CONVNEXT,
    size=(2, 8),
    lengths=(9, 12),
)
images(
    "vision",
    "cvt",
    "CvtForImageClassification",
    config={
        "embed_dim": [8, 16, 32],
        "num_heads": [1, 2, 4],
        "depth": [1, 2, 3],
        "patch_sizes": [7, 3, 3],
        "patch_stride": [4, 2, 2],
        "patch_padding": [2, 1, 1],
        "num_hidden_layers": OMIT,
        "hidden_size": OMIT,
    },
)
images("vision", "data2vec-vision", "Data2VecVisionForImageClassification")
images("vision", "deit", "DeiTForImageClassificationWithTeacher")
images("vision", "dinov2", "Dinov2ForImageClassification", **OPEN)
images("vision", "dinov2_with_registers", "Dinov2WithRegistersModel")
images("vision", "dinov3_convnext", "DINOv3ConvNextModel", config=STAGES, **OPEN)
images("vision", "dinov3_vit", "DINOv3ViTModel", **OPEN)
images(
    "vision",
    "efficientnet",
    "EfficientNetForImageClassification",
    config={
        "in_channels": [32, 16],
        "out_channels": [16, 24],
        "kernel_sizes": [3, 5],
        "strides": [2, 1],
        "num_block_repeats": [1, 2],
        "expand_ratios": [1, 6],
        "depthwise_padding": [],
        "hidden_dim": 1280,
        "width_coefficient": 1.0,
        "depth_coefficient": 1.0,
    },
)
images(
    "vision",
    "focalnet",
    "FocalNetForImageClassification",
    config={
        "embed_dim": 8,
        "depths": [1, 1],
        "focal_levels": [2, 2],
        "focal_windows": [3, 3],
        "patch_size": 4,
        "hidden_sizes": [8, 16],
    },
)
images(
    "vision",
    "hgnet_v2",
    "HGNetV2ForImageClassification",
    config={
        **STAGES,
        "embedding_size": 8,
        "stem_channels": [3, 8, 8],
        "stage_in_channels": [8, 16, 24, 32],
        "stage_mid_channels": [8, 8, 8, 8],
        "stage_out_channels": [16, 24, 32, 32],
        "stage_num_blocks": [1, 1, 1, 1],
        "stage_numb_of_layers": [2, 2, 2, 2],
        "stage_downsample": [False, True, True, True],
        "stage_light_block": [False, False, True, True],
        "stage_kernel_size": [3, 3, 5, 5],
    },
    **OPEN,
)
images(
    "vision",
    "hiera",
    "HieraForImageClassification",
    config={
        "image_size": [32, 32],
        "patch_size": [3, 3],
        "patch_stride": [2, 2],
        "patch_padding": [1, 1],
        "embed_dim": 8,
        "depths": [1, 1, 2],
        "num_heads": [1, 2, 4],
        "masked_unit_size": [4, 4],
        "query_stride": [2, 2],
        "num_query_pool": 2,
    },
)
images("vision", "ijepa", "IJepaForImageClassification")
images(
    "vision",
    "internvl_vision",
    "InternVLVisionModel",
    config={
        "image_size": [32, 32],
        "patch_size": [8, 8],
    },
)
images(
    "vision",
    "levit",
    "LevitForImageClassification",
    config={
        "image_size": 64,
        "patch_size": 16,
        "hidden_sizes": [16, 24, 32],
        "num_attention_heads": [1, 2, 2],
        "depths": [1, 1, 1],
        "key_dim": [8, 8, 8],
        "mlp_ratio": [2, 2, 2],
        "attention_ratio": [2, 2, 2],
    },
    size=(2, 8),
)
images(
    "vision",
    "mgp-str",
    "MgpstrForSceneTextRecognition",
    config={
        "image_size": [32, 32],
        "patch_size": [8, 8],
        "max_token_length": 6,
        "num_character_labels": 12,
        "num_bpe_labels": 20,
        "num_wordpiece_labels": 24,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
    },
)
images(
    "vision",
    "mobilenet_v1",
    "MobileNetV1ForImageClassification",
    config={"depth_multiplier": 0.25},
    **OPEN,
)
images(
    "vision",
    "mobilenet_v2",
    "MobileNetV2ForImageClassification",
    config={"depth_multiplier": 0.25},
    **OPEN,
)
images(
    "vision",
    "mobilevit",
    "MobileViTForImageClassification",
    config={
        "hidden_sizes": [16, 24, 32],
        "neck_hidden_sizes": [8, 8, 16, 16, 24, 24, 32],
        "patch_size": 2,
    },
)
images(
    "vision",
    "mobilevitv2",
    "MobileViTV2ForImageClassification",
    config={
        "width_multiplier": 0.25,
        "n_attn_blocks": [1, 1, 1],
        "base_attn_unit_dims": [64, 64, 64],
        "patch_size": 2,
    },
    size=(2, 8),
)
images("vision", "pixio", "PixioModel")
images(
    "vision",
    "poolformer",
    "PoolFormerForImageClassification",
    config={**STAGES, "num_encoder_blocks": 4},
    **OPEN,
)
images(
    "vision",
    "pvt",
    "PvtForImageClassification",
    config={
        "depths": [1, 1, 1, 1],
        "hidden_sizes": [8, 16, 24, 32],
        "num_attention_heads": [1, 2, 3, 4],
        "patch_sizes": [4, 2, 2, 2],
        "image_size": 64,
    },
    size=(2, 8),
)
images(
    "vision",
    "pvt_v2",
    "PvtV2ForImageClassification",
    config={
        "depths": [1, 1, 1, 1],
        "hidden_sizes": [8, 16, 24, 32],
        "num_attention_heads": [1, 2, 3, 4],
        "image_size": 64,
        "patch_sizes": [7, 3, 3, 3],
    },
    size=(2, 8),
)
images("vision", "radio", "RadioModel")
images(
    "vision",
    "regnet",
    "RegNetForImageClassification",
    config={
        **STAGES,
        "embedding_size": 8,
        "groups_width": 4,
    },
    **OPEN,
)
images("vision", "resnet", "ResNetForImageClassification", config=RESNET, **OPEN)
images(
    "vision",
    "resnet",
    "ResNetBackbone",
    name="resnet-bottleneck",
    config={
        **RESNET,
        "layer_type": "bottleneck",
        "out_features": ["stage2", "stage4"],
    },
    **OPEN,
)
images("vision", "siglip_vision_model", "SiglipVisionModel")
images(
    "vision",
    "swiftformer",
    "SwiftFormerForImageClassification",
    config={
        "depths": [1, 1, 1, 1],
        "embed_dims": [8, 16, 24, 32],
        "mlp_ratio": 2,
        "image_size": 64,
    },
    size=(2, 8),
)
images("vision", "swin", "SwinForImageClassification", config=SWIN, lengths=(5, 8))
images("vision", "swinv2", "Swinv2ForImageClassification", config=SWIN)
images(
    "vision",
    "textnet",
    "TextNetForImageClassification",
    config={
        "stem_out_channels": 8,
        "hidden_sizes": [8, 8, 16, 16, 24],
    },
    **OPEN,
)
images("vision", "vit", "ViTForImageClassification")
images(
    "vision",
    "vit",
    "ViTForMaskedImageModeling",
    name="vit-masked",
    config={"encoder_stride": 8},
    parts={
        "bool_masked_pos": of(lambda t: t > 0, normal("B", 16)),
    },
)
images("vision", "vit_msn", "ViTMSNForImageClassification")
images("vision", "vit_mae", "ViTMAEModel", "random")
images(
    "vision",
    "vitdet",
    "VitDetModel",
    config={"window_size": 2, "window_block_indices": [0], "image_size": 32},
)

VIDEO = {"pixel_values": normal("B", 4, 3, 32, 32)}
for model_type, model, config in (
    ("timesformer", "TimesformerForVideoClassification", {"num_frames": 4}),
    ("videomae", "VideoMAEForVideoClassification", {"num_frames": 4, "tubelet_size": 2}),
    (
        "vivit",
        "VivitForVideoClassification",
        {
            "num_frames": 4,
            "tubelet_size": [2, 8, 8],
            "image_size": 32,
        },
    ),
):
    images("video", model_type, model, config=config, parts=VIDEO)
architecture(
    "video",
    "vjepa2",
    "VJEPA2Model",
    draw(pixel_values_videos=normal("B", 4, 3, 32, 32)),
    config={
        "crop_size": 32,
        "frames_per_clip": 4,
        "pred_hidden_size": 32,
        "pred_num_attention_heads": 4,
        "pred_num_hidden_layers": 2,
        "num_pooler_layers": 1,
        "hidden_size": 48,
        "num_attention_heads": 4,
    },
)
images(
    "vision",
    "perceiver",
    "PerceiverForImageClassificationLearned",
    config={
        "num_latents": 8,
        "d_latents": 32,
        "d_model": 32,
        "num_blocks": 1,
        "image_size": 32,
        "num_self_attends_per_block": 2,
        "num_self_attention_heads": 2,
        "num_cross_attention_heads": 1,
        "num_labels": 4,
    },
)
