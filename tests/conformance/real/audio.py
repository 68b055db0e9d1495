"""Speech and sound: waveforms, features, codecs, recognition and synthesis."""

from __future__ import annotations

from typing import Any

from conformance.drawing import constant, draw, integers, mask, normal, of
from conformance.real.building import IDS, MASK, architecture

WAVE: dict[str, Any] = {
    "conv_dim": [8, 8],
    "conv_kernel": [4, 4],
    "conv_stride": [4, 2],
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "num_labels": 4,
    "tdnn_dim": [8, 8],
    "tdnn_kernel": [3, 1],
    "tdnn_dilation": [1, 1],
    "xvector_output_dim": 8,
    "classifier_proj_size": 8,
}
# [batch, samples] with a mask of padding at the right.
SOUND = draw(input_values=normal("B", "40L"))
MASKED_SOUND = draw(
    input_values=normal("B", "40L"),
    attention_mask=lambda batch, length: mask()(batch, 40 * length),
)
SIZES: dict[str, Any] = {"size": (2, 6), "lengths": (5, 9)}

for model_type, model, more in (
    ("data2vec-audio", "Data2VecAudioForCTC", {}),
    ("hubert", "HubertForCTC", {}),
    ("sew", "SEWForCTC", {"squeeze_factor": 1}),
    (
        "sew-d",
        "SEWDForSequenceClassification",
        {
            "squeeze_factor": 1,
            "position_buckets": 8,
            "max_position_embeddings": 16,
            "pos_att_type": ["p2c", "c2p"],
            "share_att_key": True,
        },
    ),
    ("unispeech", "UniSpeechForCTC", {}),
    ("unispeech-sat", "UniSpeechSatForSequenceClassification", {}),
    ("wav2vec2", "Wav2Vec2ForCTC", {}),
    (
        "wav2vec2-conformer",
        "Wav2Vec2ConformerForCTC",
        {"conv_depthwise_kernel_size": 3, "vocab_size": 99},
    ),
    ("wavlm", "WavLMForAudioFrameClassification", {}),
):
    architecture("audio", model_type, model, SOUND, config={**WAVE, **more}, **SIZES)
architecture(
    "audio", "wav2vec2", "Wav2Vec2ForXVector", SOUND, config=WAVE, name="wav2vec2-vector", **SIZES
)
architecture(
    "audio",
    "wav2vec2",
    "Wav2Vec2ForCTC",
    MASKED_SOUND,
    name="wav2vec2-masked",
    config={**WAVE, "feat_extract_norm": "layer", "do_stable_layer_norm": True},
    **SIZES,
)
architecture(
    "audio",
    "wav2vec2-bert",
    "Wav2Vec2BertForCTC",
    draw(
        input_features=normal("B", "2L", 12),
        attention_mask=lambda b, n: mask()(b, 2 * n),
    ),
    config={
        **WAVE,
        "vocab_size": 99,
        "feature_projection_input_dim": 12,
        "conv_depthwise_kernel_size": 3,
        "left_max_position_embeddings": 4,
        "right_max_position_embeddings": 2,
    },
    **SIZES,
)
architecture(
    "audio",
    "audio-spectrogram-transformer",
    "ASTForAudioClassification",
    draw(
        input_values=normal("B", 24, 16),
    ),
    config={
        "num_mel_bins": 16,
        "max_length": 24,
        "patch_size": 8,
        "frequency_stride": 6,
        "time_stride": 6,
    },
)
architecture(
    "audio",
    "clap_audio_model",
    "ClapAudioModelWithProjection",
    draw(
        input_features=normal("B", 1, 32, 16),
        is_longer=of(lambda t: t > 9, normal("B", 1)),
    ),
    config={
        "num_mel_bins": 16,
        "spec_size": 64,
        "patch_size": 4,
        "patch_stride": [4, 4],
        "window_size": 4,
        "depths": [1, 1],
        "num_attention_heads": [2, 2],
        "hidden_size": 32,
        "patch_embeds_hidden_size": 16,
        "enable_fusion": False,
        "num_hidden_layers": 2,
        "projection_dim": 8,
    },
)
WHISPER: dict[str, Any] = {
    "num_mel_bins": 16,
    "max_source_positions": 12,
    "max_target_positions": 20,
    "decoder_start_token_id": 3,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
}
architecture(
    "audio",
    "whisper",
    "WhisperForConditionalGeneration",
    draw(
        input_features=normal("B", 16, 24),
        decoder_input_ids=IDS,
        use_cache=constant(False),
    ),
    config=WHISPER,
    lengths=(4, 11, 1),
)
architecture(
    "audio",
    "whisper",
    "WhisperForAudioClassification",
    draw(
        input_features=normal("B", 16, 24),
    ),
    config=WHISPER,
    name="whisper-classifier",
)
architecture(
    "audio",
    "speech_to_text",
    "Speech2TextForConditionalGeneration",
    draw(
        input_features=normal("B", "4L", 16),
        attention_mask=lambda b, n: mask()(b, 4 * n),
        decoder_input_ids=integers(5, 99, "B", 4),
        use_cache=constant(False),
    ),
    config={
        "input_feat_per_channel": 16,
        "conv_channels": 16,
        "num_conv_layers": 2,
        "conv_kernel_sizes": [3, 3],
    },
    **SIZES,
)
architecture(
    "audio",
    "moonshine",
    "MoonshineForConditionalGeneration",
    draw(
        input_values=normal("B", "400L"),
        decoder_input_ids=integers(5, 99, "B", 4),
        use_cache=constant(False),
    ),
    config={"encoder_num_key_value_heads": 4, "decoder_num_key_value_heads": 4},
    **SIZES,
)
architecture(
    "audio",
    "parakeet_ctc",
    "ParakeetForCTC",
    draw(
        input_features=normal("B", "8L", 16),
        attention_mask=lambda b, n: mask()(b, 8 * n),
    ),
    config={
        "encoder_config": {
            "num_mel_bins": 16,
            "subsampling_conv_channels": 8,
            "conv_kernel_size": 3,
            "subsampling_factor": 4,
        }
    },
    **SIZES,
)
architecture(
    "audio",
    "speecht5",
    "SpeechT5ForSpeechToText",
    draw(
        input_values=normal("B", "40L"),
        decoder_input_ids=integers(5, 81, "B", 4),
        use_cache=constant(False),
    ),
    config={**WAVE, "vocab_size": 81, "positional_dropout": 0.0},
    **SIZES,
)
architecture(
    "audio",
    "univnet",
    "UnivNetModel",
    draw(
        input_features=normal("B", "L", 8),
        noise_sequence=normal("B", "L", 8),
    ),
    config={
        "model_in_channels": 8,
        "model_hidden_channels": 8,
        "num_mel_bins": 8,
        "resblock_kernel_sizes": [3, 3],
        "resblock_stride_sizes": [2, 2],
        "resblock_dilation_sizes": [[1, 3], [1, 3]],
        "kernel_predictor_num_blocks": 1,
        "kernel_predictor_hidden_channels": 8,
    },
    **SIZES,
)
architecture(
    "audio",
    "encodec",
    "EncodecModel",
    draw(input_values=normal("B", 1, "40L")),
    config={
        "num_filters": 4,
        "hidden_size": 16,
        "upsampling_ratios": [4, 2],
        "codebook_size": 16,
        "codebook_dim": 16,
        "num_lstm_layers": 1,
        "sampling_rate": 400,
        "target_bandwidths": [1.0],
        "chunk_length_s": None,
        "num_residual_layers": 1,
    },
    **SIZES,
)
architecture(
    "audio",
    "dac",
    "DacModel",
    draw(input_values=normal("B", 1, "40L")),
    config={
        "encoder_hidden_size": 4,
        "downsampling_ratios": [2, 4],
        "decoder_hidden_size": 16,
        "n_codebooks": 2,
        "codebook_size": 16,
        "codebook_dim": 4,
        "hidden_size": 16,
    },
    **SIZES,
)
architecture(
    "audio",
    "fastspeech2_conformer",
    "FastSpeech2ConformerModel",
    draw(
        input_ids=integers(1, 70, "B", "L"),
        attention_mask=MASK,
    ),
    config={"num_mel_bins": 8, "vocab_size": 78, "speech_decoder_postnet_units": 8},
    lengths=(4, 9),
)
