"""Models of the transformers library, with random weights and small sizes.

The library is imported only when a model is built, so that the rest of the zoo works without it.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from zoo.entry import VOCAB, Entry, Inputs, entry, integers, normal, tokens

FAMILY = "hub"
CLASSES = 8

# The usual weights are so small that most of what a model computes would be lost in its biases.
WEIGHTS: dict[str, Any] = {"initializer_range": 0.2, "init_std": 0.2}
SPECIAL: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
ENCODER: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 32,
    "num_labels": CLASSES,
    **SPECIAL,
}
DECODER: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "intermediate_size": 96,
    "max_position_embeddings": 32,
    **SPECIAL,
}
GROUPED: dict[str, Any] = {**DECODER, "num_key_value_heads": 4}
PATCHES: dict[str, Any] = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "num_labels": CLASSES,
}
STAGES: dict[str, Any] = {"num_channels": 3, "num_labels": CLASSES}


def hub(model: str, config: str, attention: str | None = None, **options: Any) -> Callable[[], nn.Module]:
    """Return the maker of a model of the library with this configuration, in training mode."""

    def make() -> nn.Module:
        import transformers

        chosen = {} if attention is None else {"attn_implementation": attention}
        settings = getattr(transformers, config)(**WEIGHTS, **chosen, **options)
        built: nn.Module = getattr(transformers, model)(settings)
        return built.train()

    return make


def clip() -> nn.Module:
    """Return a CLIP of two small towers."""
    from transformers import CLIPConfig, CLIPModel

    text = {k: v for k, v in {**ENCODER, **WEIGHTS}.items() if k != "num_labels"}
    vision = {k: v for k, v in {**PATCHES, **WEIGHTS}.items() if k != "num_labels"}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).train()


def by_name(**tensors: Callable[[], Tensor]) -> Inputs:
    """Return inputs by keyword."""
    return lambda: {name: make() for name, make in tensors.items()}


def ids(length: int = 10, seed: int = 1) -> Callable[[], Tensor]:
    """Return the maker of a batch of token ids."""
    return lambda: integers(2, length, seed=seed)


def padded_text() -> dict[str, Tensor]:
    """Return token ids with an attention mask and segment ids."""
    input_ids = integers(2, 10)
    input_ids[1, 7:] = 0
    segments = (input_ids > 50).long()
    return {"input_ids": input_ids, "attention_mask": (input_ids != 0).long(), "token_type_ids": segments}


GPT2: dict[str, Any] = {
    "vocab_size": VOCAB,
    "n_positions": 32,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    **SPECIAL,
}
BART: dict[str, Any] = {
    "vocab_size": VOCAB,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 32,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": 2,
    **SPECIAL,
}
T5: dict[str, Any] = {
    "vocab_size": VOCAB,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 2,
    "num_heads": 4,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
}
RESIDUAL: dict[str, Any] = {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 2], **STAGES}
AUDIO: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "conv_dim": [16, 16],
    "conv_kernel": [10, 3],
    "conv_stride": [5, 2],
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "classifier_proj_size": 16,
    "num_labels": CLASSES,
    "apply_spec_augment": False,
    "layerdrop": 0.0,
    **SPECIAL,
}

sequence_pair = by_name(input_ids=ids(10), decoder_input_ids=ids(7, seed=2))
text = by_name(input_ids=ids())
picture = by_name(pixel_values=lambda: normal(2, 3, 32, 32))
sound = by_name(input_values=lambda: normal(2, 400))

ENTRIES: tuple[Entry, ...] = (
    # Encoders of text.
    entry("hub_bert", hub("BertForSequenceClassification", "BertConfig", **ENCODER), text, FAMILY),
    entry(
        "hub_bert_eager",
        hub("BertForSequenceClassification", "BertConfig", "eager", **ENCODER),
        padded_text,
        FAMILY,
    ),
    entry(
        "hub_bert_padded",
        hub("BertForSequenceClassification", "BertConfig", "sdpa", **ENCODER),
        padded_text,
        FAMILY,
    ),
    entry("hub_bert_model", hub("BertModel", "BertConfig", **ENCODER), text, FAMILY),
    entry("hub_bert_mlm", hub("BertForMaskedLM", "BertConfig", **ENCODER), text, FAMILY),
    entry("hub_roberta", hub("RobertaForSequenceClassification", "RobertaConfig", **ENCODER), text, FAMILY),
    entry(
        "hub_distilbert",
        hub(
            "DistilBertForSequenceClassification",
            "DistilBertConfig",
            vocab_size=VOCAB,
            dim=32,
            hidden_dim=64,
            n_layers=2,
            n_heads=4,
            max_position_embeddings=32,
            num_labels=CLASSES,
            pad_token_id=0,
        ),
        text,
        FAMILY,
    ),
    entry(
        "hub_albert",
        hub("AlbertForSequenceClassification", "AlbertConfig", embedding_size=16, **ENCODER),
        text,
        FAMILY,
    ),
    entry(
        "hub_electra",
        hub("ElectraForSequenceClassification", "ElectraConfig", embedding_size=16, **ENCODER),
        text,
        FAMILY,
    ),
    entry("hub_mpnet", hub("MPNetForSequenceClassification", "MPNetConfig", **ENCODER), text, FAMILY),
    entry(
        "hub_modernbert",
        hub(
            "ModernBertForSequenceClassification",
            "ModernBertConfig",
            "sdpa",
            cls_token_id=1,
            sep_token_id=2,
            **ENCODER,
        ),
        text,
        FAMILY,
    ),
    entry(
        "hub_deberta_v2",
        hub(
            "DebertaV2ForSequenceClassification",
            "DebertaV2Config",
            relative_attention=True,
            pos_att_type=["p2c", "c2p"],
            **ENCODER,
        ),
        text,
        FAMILY,
    ),
    # Decoders of text.
    entry("hub_gpt2", hub("GPT2LMHeadModel", "GPT2Config", **GPT2), text, FAMILY),
    entry(
        "hub_gpt2_no_cache",
        hub("GPT2LMHeadModel", "GPT2Config", "eager", use_cache=False, **GPT2),
        tokens(),
        FAMILY,
    ),
    entry(
        "hub_llama_loss",
        hub("LlamaForCausalLM", "LlamaConfig", use_cache=False, **GROUPED),
        by_name(input_ids=ids(), labels=ids()),
        FAMILY,
    ),
    entry("hub_gpt_bigcode", hub("GPTBigCodeForCausalLM", "GPTBigCodeConfig", **GPT2), text, FAMILY),
    entry("hub_gptj", hub("GPTJForCausalLM", "GPTJConfig", rotary_dim=4, **GPT2), text, FAMILY),
    entry("hub_llama", hub("LlamaForCausalLM", "LlamaConfig", **GROUPED), text, FAMILY),
    entry(
        "hub_llama_tied_eager",
        hub("LlamaForCausalLM", "LlamaConfig", "eager", use_cache=False, tie_word_embeddings=True, **GROUPED),
        text,
        FAMILY,
    ),
    entry(
        "hub_mistral",
        hub("MistralForCausalLM", "MistralConfig", sliding_window=6, use_cache=False, **GROUPED),
        text,
        FAMILY,
    ),
    entry("hub_qwen2", hub("Qwen2ForCausalLM", "Qwen2Config", use_cache=False, **GROUPED), text, FAMILY),
    entry(
        "hub_qwen3",
        hub("Qwen3ForCausalLM", "Qwen3Config", head_dim=8, use_cache=False, **GROUPED),
        text,
        FAMILY,
    ),
    entry(
        "hub_gemma2",
        hub("Gemma2ForCausalLM", "Gemma2Config", head_dim=8, sliding_window=6, use_cache=False, **GROUPED),
        text,
        FAMILY,
    ),
    entry("hub_phi", hub("PhiForCausalLM", "PhiConfig", use_cache=False, **DECODER), text, FAMILY),
    entry(
        "hub_gpt_neox", hub("GPTNeoXForCausalLM", "GPTNeoXConfig", use_cache=False, **DECODER), text, FAMILY
    ),
    entry(
        "hub_opt",
        hub(
            "OPTForCausalLM",
            "OPTConfig",
            vocab_size=VOCAB,
            hidden_size=32,
            ffn_dim=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=32,
            word_embed_proj_dim=32,
            use_cache=False,
            **SPECIAL,
        ),
        text,
        FAMILY,
    ),
    entry(
        "hub_bloom",
        hub(
            "BloomForCausalLM",
            "BloomConfig",
            vocab_size=VOCAB,
            hidden_size=32,
            n_layer=2,
            n_head=4,
            use_cache=False,
            **SPECIAL,
        ),
        text,
        FAMILY,
    ),
    entry("hub_falcon", hub("FalconForCausalLM", "FalconConfig", use_cache=False, **DECODER), text, FAMILY),
    # Pairs of sequences.
    entry(
        "hub_t5", hub("T5ForConditionalGeneration", "T5Config", use_cache=False, **T5), sequence_pair, FAMILY
    ),
    entry(
        "hub_t5_gated",
        hub(
            "T5ForConditionalGeneration",
            "T5Config",
            use_cache=False,
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,
            **T5,
        ),
        sequence_pair,
        FAMILY,
    ),
    entry(
        "hub_bart",
        hub("BartForConditionalGeneration", "BartConfig", use_cache=False, **BART),
        sequence_pair,
        FAMILY,
    ),
    # Images.
    entry("hub_vit", hub("ViTForImageClassification", "ViTConfig", **PATCHES), picture, FAMILY),
    entry("hub_deit", hub("DeiTForImageClassification", "DeiTConfig", **PATCHES), picture, FAMILY),
    entry(
        "hub_beit",
        hub(
            "BeitForImageClassification",
            "BeitConfig",
            use_relative_position_bias=True,
            out_indices=[1, 2],
            **PATCHES,
        ),
        picture,
        FAMILY,
    ),
    entry("hub_dinov2", hub("Dinov2ForImageClassification", "Dinov2Config", **PATCHES), picture, FAMILY),
    entry(
        "hub_swin",
        hub(
            "SwinForImageClassification",
            "SwinConfig",
            image_size=32,
            patch_size=4,
            embed_dim=16,
            depths=[2, 1],
            num_heads=[4, 4],
            window_size=4,
            **STAGES,
        ),
        picture,
        FAMILY,
    ),
    entry(
        "hub_convnext",
        hub(
            "ConvNextForImageClassification",
            "ConvNextConfig",
            hidden_sizes=[16, 32],
            depths=[1, 1],
            num_stages=2,
            image_size=32,
            **STAGES,
        ),
        picture,
        FAMILY,
    ),
    entry(
        "hub_convnext_v2",
        hub(
            "ConvNextV2ForImageClassification",
            "ConvNextV2Config",
            hidden_sizes=[16, 32],
            depths=[1, 1],
            num_stages=2,
            image_size=32,
            **STAGES,
        ),
        picture,
        FAMILY,
    ),
    entry(
        "hub_resnet",
        hub("ResNetForImageClassification", "ResNetConfig", layer_type="basic", **RESIDUAL),
        picture,
        FAMILY,
    ),
    entry(
        "hub_resnet_bottleneck",
        hub("ResNetForImageClassification", "ResNetConfig", layer_type="bottleneck", **RESIDUAL),
        picture,
        FAMILY,
    ),
    entry(
        "hub_regnet",
        hub("RegNetForImageClassification", "RegNetConfig", groups_width=4, **RESIDUAL),
        picture,
        FAMILY,
    ),
    entry(
        "hub_mobilenet_v1",
        hub("MobileNetV1ForImageClassification", "MobileNetV1Config", depth_multiplier=0.25, **STAGES),
        picture,
        FAMILY,
    ),
    entry(
        "hub_mobilenet_v2",
        hub("MobileNetV2ForImageClassification", "MobileNetV2Config", depth_multiplier=0.35, **STAGES),
        picture,
        FAMILY,
    ),
    entry(
        "hub_segformer",
        hub(
            "SegformerForSemanticSegmentation",
            "SegformerConfig",
            num_encoder_blocks=2,
            depths=[1, 1],
            sr_ratios=[2, 1],
            hidden_sizes=[16, 32],
            patch_sizes=[7, 3],
            strides=[4, 2],
            num_attention_heads=[4, 4],
            mlp_ratios=[2, 2],
            decoder_hidden_size=16,
            **STAGES,
        ),
        picture,
        FAMILY,
    ),
    # Sound, and images with text.
    entry(
        "hub_wav2vec2",
        hub("Wav2Vec2ForSequenceClassification", "Wav2Vec2Config", **AUDIO),
        sound,
        FAMILY,
    ),
    entry("hub_hubert", hub("HubertForCTC", "HubertConfig", **AUDIO), sound, FAMILY),
    entry(
        "hub_clip",
        clip,
        by_name(input_ids=ids(), pixel_values=lambda: normal(2, 3, 32, 32)),
        FAMILY,
    ),
)
