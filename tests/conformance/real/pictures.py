"""Detection, segmentation, depth, keypoints and restoration of images."""

from __future__ import annotations

from typing import Any

from conformance.drawing import normal
from conformance.real.building import images
from conformance.real.vision import RESNET, STAGES, SWIN

BACKBONE = {"model_type": "resnet", **RESNET, "out_features": ["stage4"]}
DETR: dict[str, Any] = {
    "use_timm_backbone": False,
    "backbone": None,
    "use_pretrained_backbone": False,
    "num_queries": 5,
    "backbone_config": BACKBONE,
    "num_labels": 4,
}
images(
    "detection", "conditional_detr", "ConditionalDetrForObjectDetection", config=DETR, size=(2, 8)
)
images("detection", "dab-detr", "DabDetrForObjectDetection", config=DETR, size=(2, 8))
images(
    "detection",
    "deformable_detr",
    "DeformableDetrForObjectDetection",
    config={
        **DETR,
        "backbone_config": {**BACKBONE, "out_features": ["stage2", "stage3", "stage4"]},
        "num_feature_levels": 4,
    },
    size=(2, 8),
    batches=(2, 3, 5),
)
images("detection", "detr", "DetrForObjectDetection", config=DETR, size=(2, 8), lengths=(7,))
images(
    "detection",
    "detr",
    "DetrForSegmentation",
    name="detr-segmentation",
    config={
        **DETR,
        "d_model": 64,
        "encoder_attention_heads": 8,
        "decoder_attention_heads": 8,
        "backbone_config": {**BACKBONE, "out_features": ["stage1", "stage2", "stage3", "stage4"]},
    },
    size=(2, 8),
)
images(
    "detection", "table-transformer", "TableTransformerForObjectDetection", config=DETR, size=(2, 8)
)
RT: dict[str, Any] = {
    "backbone_config": {
        "model_type": "rt_detr_resnet",
        **RESNET,
        "out_features": ["stage2", "stage3", "stage4"],
    },
    "encoder_in_channels": [16, 24, 32],
    "encoder_hidden_dim": 32,
    "decoder_in_channels": [32, 32, 32],
    "num_queries": 6,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "num_labels": 4,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "num_denoising": 0,
    "d_model": 32,
    "freeze_backbone_batch_norms": False,
}
images("detection", "rt_detr", "RTDetrForObjectDetection", config=RT, size=(2, 8))
images(
    "detection",
    "rt_detr_v2",
    "RTDetrV2ForObjectDetection",
    config={
        **RT,
        "decoder_n_levels": 3,
    },
    size=(2, 8),
)
images(
    "detection",
    "yolos",
    "YolosForObjectDetection",
    config={
        "image_size": [32, 32],
        "num_detection_tokens": 5,
        "num_labels": 4,
    },
)

images(
    "segmentation",
    "beit",
    "BeitForSemanticSegmentation",
    config={
        "out_indices": [1, 2, 3, 4],
        "pool_scales": [1, 2],
        "num_labels": 4,
        "num_hidden_layers": 4,
        "use_auxiliary_head": False,
    },
)
images(
    "segmentation",
    "dpt",
    "DPTForSemanticSegmentation",
    config={
        "backbone_out_indices": [0, 1, 2, 3],
        "num_hidden_layers": 4,
        "neck_hidden_sizes": [8, 8, 8, 8],
        "fusion_hidden_size": 8,
        "num_labels": 4,
        "is_hybrid": False,
        "reassemble_factors": [4, 2, 1, 0.5],
    },
)
images(
    "segmentation",
    "maskformer",
    "MaskFormerForInstanceSegmentation",
    config={
        "backbone_config": {
            "model_type": "swin",
            **SWIN,
            "depths": [1, 1, 1, 1],
            "num_heads": [1, 2, 2, 4],
            "image_size": 64,
            "out_features": ["stage1", "stage2", "stage3", "stage4"],
        },
        "decoder_config": {
            "model_type": "detr",
            "d_model": 32,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "num_queries": 5,
            "encoder_ffn_dim": 32,
            "decoder_ffn_dim": 32,
            "decoder_attention_heads": 4,
        },
        "mask_feature_size": 32,
        "fpn_feature_size": 32,
        "num_labels": 4,
    },
    size=(2, 8),
)
images(
    "segmentation",
    "mask2former",
    "Mask2FormerForUniversalSegmentation",
    config={
        "backbone_config": {
            "model_type": "swin",
            "embed_dim": 8,
            "depths": [1, 1, 1, 1],
            "num_heads": [1, 2, 2, 4],
            "window_size": 2,
            "patch_size": 4,
            "image_size": 64,
            "out_features": ["stage1", "stage2", "stage3", "stage4"],
        },
        "feature_size": 32,
        "mask_feature_size": 32,
        "hidden_dim": 32,
        "encoder_feedforward_dim": 32,
        "dim_feedforward": 32,
        "num_attention_heads": 4,
        "decoder_layers": 3,
        "num_queries": 5,
        "encoder_layers": 1,
        "num_labels": 4,
    },
    size=(2, 8),
)
images(
    "segmentation",
    "mobilenet_v2",
    "MobileNetV2ForSemanticSegmentation",
    config={"depth_multiplier": 0.25, "output_stride": 8},
    size=(2, 8),
)
images(
    "segmentation",
    "mobilevit",
    "MobileViTForSemanticSegmentation",
    config={
        "hidden_sizes": [16, 24, 32],
        "neck_hidden_sizes": [8, 8, 16, 16, 24, 24, 32],
        "patch_size": 2,
        "aspp_out_channels": 8,
        "atrous_rates": [1, 2, 3],
    },
    size=(2, 8),
)
images(
    "segmentation",
    "sam_vision_model",
    "SamVisionModel",
    config={"window_size": 2, "global_attn_indexes": [1], "output_channels": 8},
)
images(
    "segmentation",
    "segformer",
    "SegformerForSemanticSegmentation",
    config={
        "depths": [1, 1, 1, 1],
        "hidden_sizes": [8, 16, 24, 32],
        "num_attention_heads": [1, 2, 3, 4],
        "patch_sizes": [7, 3, 3, 3],
        "decoder_hidden_size": 16,
        "num_labels": 4,
    },
    size=(2, 8),
    lengths=(12,),
)
images(
    "segmentation",
    "seggpt",
    "SegGptModel",
    config={"image_size": [64, 32]},
    parts={
        "pixel_values": normal("B", 3, 32, 32),
        "prompt_pixel_values": normal("B", 3, 32, 32),
        "prompt_masks": normal("B", 3, 32, 32),
    },
)
images(
    "segmentation",
    "upernet",
    "UperNetForSemanticSegmentation",
    config={
        "backbone_config": {
            "model_type": "convnext",
            **STAGES,
            "out_features": ["stage1", "stage2", "stage3", "stage4"],
        },
        "hidden_size": 16,
        "pool_scales": [1, 2],
        "auxiliary_in_channels": 24,
        "auxiliary_channels": 8,
        "num_labels": 4,
    },
    size=(2, 8),
)
images("segmentation", "sapiens2", "Sapiens2Model")

images(
    "depth",
    "depth_anything",
    "DepthAnythingForDepthEstimation",
    config={
        "backbone_config": {
            "model_type": "dinov2",
            "hidden_size": 32,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "mlp_ratio": 2,
            "image_size": 32,
            "patch_size": 8,
            "out_indices": [1, 2, 3, 4],
            "apply_layernorm": True,
            "reshape_hidden_states": False,
        },
        "patch_size": 8,
        "reassemble_hidden_size": 32,
        "neck_hidden_sizes": [8, 8, 16, 16],
        "fusion_hidden_size": 16,
        "head_hidden_size": 8,
    },
)
images(
    "depth",
    "dpt",
    "DPTForDepthEstimation",
    config={
        "backbone_out_indices": [0, 1, 2, 3],
        "num_hidden_layers": 4,
        "neck_hidden_sizes": [8, 8, 8, 8],
        "fusion_hidden_size": 8,
    },
)
images(
    "depth",
    "glpn",
    "GLPNForDepthEstimation",
    config={
        "depths": [1, 1, 1, 1],
        "hidden_sizes": [8, 16, 24, 32],
        "num_attention_heads": [1, 2, 3, 4],
        "patch_sizes": [7, 3, 3, 3],
        "decoder_hidden_size": 8,
    },
    size=(2, 8),
)
images(
    "keypoints",
    "superpoint",
    "SuperPointForKeypointDetection",
    config={
        "encoder_hidden_sizes": [8, 8, 16, 16],
        "decoder_hidden_size": 16,
        "keypoint_decoder_dim": 65,
        "descriptor_decoder_dim": 16,
    },
    size=(2, 4),
)
images(
    "keypoints",
    "vitpose",
    "VitPoseForPoseEstimation",
    config={
        "backbone_config": {
            "model_type": "vitpose_backbone",
            "image_size": [32, 32],
            "patch_size": [8, 8],
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "mlp_ratio": 2,
            "out_features": ["stage2"],
            "num_experts": 1,
            "part_features": 0,
        },
        "num_labels": 4,
        "use_simple_decoder": True,
        "initializer_range": 0.02,
    },
)
images(
    "restoration",
    "swin2sr",
    "Swin2SRForImageSuperResolution",
    config={
        "image_size": 16,
        "patch_size": 1,
        "embed_dim": 12,
        "depths": [1, 1],
        "num_heads": [2, 2],
        "window_size": 4,
        "upscale": 2,
    },
    size=(2, 2),
    lengths=(3,),
)
