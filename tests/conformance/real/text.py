"""Encoders and encoder-decoders of text."""

from __future__ import annotations

import torch

from conformance.drawing import integers, of
from conformance.entries import call
from conformance.real.building import encoder, seq2seq
from conformance.real.tiny import OMIT

BOXES = of(lambda t: t.sort(-1).values, integers(0, 60, "B", "L", 4))
SEGMENTS = {"token_type_ids": integers(0, 2, "B", "L")}

encoder("albert", "AlbertForMaskedLM", parts=SEGMENTS)
encoder("bert", "BertForMaskedLM", parts=SEGMENTS)
encoder("bert", "BertForSequenceClassification", name="bert-classifier")
encoder("bert", "BertForNextSentencePrediction", name="bert-next-sentence", parts=SEGMENTS)
encoder("big_bird", "BigBirdModel", config={"attention_type": "original_full"})
encoder(
    "bros",
    "BrosModel",
    config={"hidden_size": 64},
    parts={"bbox": of(lambda t: t.float() / 60, BOXES)},
)
encoder("camembert", "CamembertForTokenClassification")
encoder("canine", "CanineForSequenceClassification")
encoder("convbert", "ConvBertForQuestionAnswering")
encoder("data2vec-text", "Data2VecTextForMaskedLM")
encoder(
    "deberta",
    "DebertaForMaskedLM",
    config={
        "relative_attention": True,
        "pos_att_type": ["c2p", "p2c"],
        "max_relative_positions": 16,
    },
)
encoder(
    "deberta-v2",
    "DebertaV2ForTokenClassification",
    config={
        "relative_attention": True,
        "pos_att_type": ["c2p", "p2c"],
        "position_buckets": 8,
    },
)
encoder("distilbert", "DistilBertForQuestionAnswering")
encoder("dpr", "DPRQuestionEncoder")
encoder("electra", "ElectraForPreTraining")
encoder("ernie", "ErnieForSequenceClassification")
encoder(
    "esm",
    "EsmForMaskedLM",
    config={
        "pad_token_id": 1,
        "mask_token_id": 4,
        "vocab_size": 99,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "max_position_embeddings": 64,
        "position_embedding_type": "rotary",
    },
)
encoder("eurobert", "EuroBertForMaskedLM")
encoder("flaubert", "FlaubertModel")
encoder(
    "fnet",
    "FNetForMaskedLM",
    drop=["attention_mask"],
    config={"use_tpu_fourier_optimizations": False},
)
encoder(
    "funnel",
    "FunnelForMaskedLM",
    config={
        "num_hidden_layers": OMIT,
        "num_blocks": OMIT,
        "block_sizes": [1, 1],
        "num_decoder_layers": 1,
    },
)
encoder("gte", "GteModel")
encoder("ibert", "IBertForMaskedLM")
encoder("jina_embeddings_v3", "JinaEmbeddingsV3Model")
encoder("layoutlm", "LayoutLMForTokenClassification", parts={"bbox": BOXES})
encoder("lilt", "LiltForTokenClassification", config={"hidden_size": 48}, parts={"bbox": BOXES})
encoder("longformer", "LongformerForMaskedLM", config={"attention_window": 4})
encoder("luke", "LukeModel", config={"entity_emb_size": 16})
encoder("markuplm", "MarkupLMModel")
encoder("megatron-bert", "MegatronBertForMaskedLM")
encoder("mobilebert", "MobileBertForSequenceClassification")
encoder("modernbert", "ModernBertForMaskedLM", config={"local_attention": 6})
encoder("mpnet", "MPNetForMaskedLM")
encoder("nomic_bert", "NomicBertModel")
encoder(
    "nystromformer",
    "NystromformerForMaskedLM",
    size=(2, 8),
    lengths=(),
    config={"num_landmarks": 8, "segment_means_seq_len": 8},
)
encoder("openai_privacy_filter", "OpenAIPrivacyFilterForTokenClassification")
encoder("rembert", "RemBertForMaskedLM")
encoder(
    "roberta",
    "RobertaForMultipleChoice",
    parts={
        "input_ids": integers(5, 99, "B", 2, "L"),
        "attention_mask": of(lambda t: (t > 0).long(), integers(0, 4, "B", 2, "L")),
    },
    others={"beyond the vocabulary": lambda: call(input_ids=torch.full((1, 2, 4), 990))},
)
encoder("roberta-prelayernorm", "RobertaPreLayerNormForMaskedLM")
encoder(
    "roc_bert",
    "RoCBertModel",
    config={
        "shape_vocab_size": 20,
        "pronunciation_vocab_size": 20,
        "shape_embed_dim": 8,
        "pronunciation_embed_dim": 8,
    },
    parts={
        "input_shape_ids": integers(0, 20, "B", "L"),
        "input_pronunciation_ids": integers(0, 20, "B", "L"),
    },
)
encoder("roformer", "RoFormerForMaskedLM")
encoder("splinter", "SplinterModel")
encoder("squeezebert", "SqueezeBertForSequenceClassification")
encoder("tapas", "TapasModel")
encoder("ultrabert", "UltrabertModel")
encoder("visual_bert", "VisualBertModel")
encoder("xlm", "XLMWithLMHeadModel")
encoder("xlm-roberta", "XLMRobertaForQuestionAnswering")
encoder("xlm-roberta-xl", "XLMRobertaXLModel")
encoder(
    "xlnet",
    "XLNetLMHeadModel",
    config={"max_position_embeddings": OMIT, "d_head": 8, "d_inner": 48},
)
encoder("xmod", "XmodModel", config={"default_language": "en_XX", "languages": ["en_XX"]})
encoder("yoso", "YosoForMaskedLM")
encoder("mra", "MraForMaskedLM")

seq2seq("bart", "BartForConditionalGeneration")
seq2seq("bigbird_pegasus", "BigBirdPegasusModel", config={"attention_type": "original_full"})
seq2seq("blenderbot", "BlenderbotForConditionalGeneration")
seq2seq("blenderbot-small", "BlenderbotSmallModel")
seq2seq("fsmt", "FSMTForConditionalGeneration", config={"src_vocab_size": 99, "tgt_vocab_size": 99})
seq2seq("led", "LEDForConditionalGeneration", config={"attention_window": 4})
seq2seq("longt5", "LongT5ForConditionalGeneration", config={"local_radius": 3})
seq2seq(
    "longt5",
    "LongT5Model",
    name="longt5-global",
    config={
        "local_radius": 3,
        "encoder_attention_type": "transient-global",
        "global_block_size": 4,
    },
)
seq2seq("m2m_100", "M2M100ForConditionalGeneration")
seq2seq("marian", "MarianMTModel")
seq2seq("mbart", "MBartForConditionalGeneration")
seq2seq("mt5", "MT5ForConditionalGeneration")
seq2seq("mvp", "MvpForConditionalGeneration")
seq2seq(
    "nllb-moe",
    "NllbMoeForConditionalGeneration",
    "experts",
    config={
        "encoder_sparse_step": 2,
        "decoder_sparse_step": 2,
    },
)
seq2seq("pegasus", "PegasusForConditionalGeneration")
seq2seq("pegasus_x", "PegasusXModel", config={"block_size": 4, "num_global_tokens": 2})
seq2seq("plbart", "PLBartForConditionalGeneration")
seq2seq(
    "prophetnet",
    "ProphetNetForConditionalGeneration",
    config={
        "num_hidden_layers": OMIT,
        "num_encoder_layers": 1,
        "num_decoder_layers": 1,
        "num_encoder_attention_heads": 4,
        "num_decoder_attention_heads": 4,
    },
)
seq2seq(
    "switch_transformers",
    "SwitchTransformersForConditionalGeneration",
    "experts",
    drop=["use_cache"],
    config={"use_cache": False},
)
seq2seq("t5", "T5ForConditionalGeneration")
seq2seq("t5", "T5EncoderModel", name="t5-encoder", drop=["decoder_input_ids", "use_cache"])
seq2seq("t5", "T5Model", name="t5-gated", config={"feed_forward_proj": "gated-gelu"})
seq2seq("t5gemma", "T5GemmaForConditionalGeneration")
seq2seq("umt5", "UMT5ForConditionalGeneration")
