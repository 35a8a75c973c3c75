"""Models of the transformers library, with random weights and small sizes.

The library is imported only when a model is built, so that the rest of the zoo works without it.
"""

from collections.abc import Callable
from typing import Any

import torch
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
# One layer is enough where a model differs from another in what a layer does.
ONCE: dict[str, Any] = {"num_hidden_layers": 1}
DECODER_ONCE: dict[str, Any] = {**DECODER, **ONCE}
GROUPED_ONCE: dict[str, Any] = {**GROUPED, **ONCE}
ENCODER_ONCE: dict[str, Any] = {**ENCODER, **ONCE}
PATCHES: dict[str, Any] = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "num_labels": CLASSES,
}
PATCHES_ONCE: dict[str, Any] = {**PATCHES, **ONCE}
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


def experts(model: str, config: str, **options: Any) -> Callable[[], nn.Module]:
    """Return the maker of a decoder whose experts are looked up by index and run as one batched product."""
    return hub(model, config, use_cache=False, experts_implementation="batched_mm", **GROUPED_ONCE, **options)


def clip() -> nn.Module:
    """Return a CLIP of two small towers."""
    from transformers import CLIPConfig, CLIPModel

    text = {k: v for k, v in {**ENCODER, **WEIGHTS}.items() if k != "num_labels"}
    vision = {k: v for k, v in {**PATCHES, **WEIGHTS}.items() if k != "num_labels"}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).train()


def siglip() -> nn.Module:
    """Return a SigLIP of two small towers."""
    from transformers import SiglipConfig, SiglipModel

    text = {k: v for k, v in {**ENCODER_ONCE, **WEIGHTS}.items() if k != "num_labels"}
    vision = {k: v for k, v in {**PATCHES_ONCE, **WEIGHTS}.items() if k != "num_labels"}
    return SiglipModel(SiglipConfig(text_config=text, vision_config=vision)).train()


def llava() -> nn.Module:
    """Return a Llava: a tower of vision whose tokens stand among those of a decoder."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        **{k: v for k, v in {**PATCHES, **WEIGHTS, "num_hidden_layers": 1}.items() if k != "num_labels"}
    )
    text = LlamaConfig(**{**GROUPED_ONCE, **WEIGHTS, "use_cache": False})
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=VOCAB - 1, vision_feature_layer=-1
    )
    return LlavaForConditionalGeneration(config).train()


def upernet() -> nn.Module:
    """Return a UperNet on a small ConvNeXt."""
    from transformers import ConvNextConfig, UperNetConfig, UperNetForSemanticSegmentation

    stages = ["stage1", "stage2", "stage3", "stage4"]
    backbone = ConvNextConfig(
        hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], out_features=stages, **WEIGHTS
    )
    config = UperNetConfig(
        backbone_config=backbone,
        hidden_size=16,
        pool_scales=[1, 2],
        use_auxiliary_head=False,
        num_labels=CLASSES,
    )
    return UperNetForSemanticSegmentation(config).train()


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
    entry(
        "hub_ernie", hub("ErnieForSequenceClassification", "ErnieConfig", **ENCODER_ONCE), text, FAMILY, (2,)
    ),
    entry(
        "hub_xlm_roberta",
        hub("XLMRobertaForSequenceClassification", "XLMRobertaConfig", **ENCODER_ONCE),
        text,
        FAMILY,
        (2,),
    ),
    entry(
        "hub_camembert",
        hub("CamembertForSequenceClassification", "CamembertConfig", **ENCODER_ONCE),
        text,
        FAMILY,
        (2,),
    ),
    entry(
        "hub_layoutlm",
        hub("LayoutLMForSequenceClassification", "LayoutLMConfig", **ENCODER_ONCE),
        text,
        FAMILY,
        (2,),
    ),
    entry("hub_fnet", hub("FNetForSequenceClassification", "FNetConfig", **ENCODER_ONCE), text, FAMILY, (2,)),
    entry(
        "hub_deberta",
        hub(
            "DebertaForSequenceClassification",
            "DebertaConfig",
            relative_attention=True,
            pos_att_type=["p2c", "c2p"],
            **ENCODER_ONCE,
        ),
        text,
        FAMILY,
        (2,),
    ),
    entry(
        "hub_convbert",
        hub(
            "ConvBertForSequenceClassification",
            "ConvBertConfig",
            embedding_size=16,
            conv_kernel_size=3,
            **ENCODER_ONCE,
        ),
        text,
        FAMILY,
        (2,),
    ),
    entry(
        "hub_mobilebert",
        hub(
            "MobileBertForSequenceClassification",
            "MobileBertConfig",
            embedding_size=16,
            true_hidden_size=16,
            intra_bottleneck_size=16,
            num_feedforward_networks=2,
            **ENCODER_ONCE,
        ),
        text,
        FAMILY,
        (2,),
    ),
    entry(
        "hub_xlnet",
        hub(
            "XLNetForSequenceClassification",
            "XLNetConfig",
            vocab_size=VOCAB,
            d_model=32,
            n_layer=1,
            n_head=4,
            d_inner=64,
            num_labels=CLASSES,
            use_mems_eval=False,
            pad_token_id=0,
        ),
        text,
        FAMILY,
        (2,),
    ),
    entry(
        "hub_roformer",
        hub("RoFormerForSequenceClassification", "RoFormerConfig", embedding_size=16, **ENCODER_ONCE),
        text,
        FAMILY,
        (2,),
    ),
    entry(
        "hub_xlm",
        hub(
            "XLMForSequenceClassification",
            "XLMConfig",
            vocab_size=VOCAB,
            emb_dim=32,
            n_layers=1,
            n_heads=4,
            max_position_embeddings=32,
            num_labels=CLASSES,
            pad_index=0,
        ),
        text,
        FAMILY,
        (2,),
    ),
    entry(
        "hub_squeezebert",
        hub("SqueezeBertForSequenceClassification", "SqueezeBertConfig", embedding_size=32, **ENCODER_ONCE),
        text,
        FAMILY,
        (2,),
    ),
    entry(
        "hub_esm",
        hub(
            "EsmForMaskedLM",
            "EsmConfig",
            position_embedding_type="rotary",
            mask_token_id=3,
            token_dropout=True,
            **ENCODER_ONCE,
        ),
        text,
        FAMILY,
    ),
    entry(
        "hub_perceiver",
        hub(
            "PerceiverForSequenceClassification",
            "PerceiverConfig",
            num_latents=8,
            d_latents=32,
            d_model=32,
            num_blocks=1,
            num_self_attends_per_block=1,
            num_self_attention_heads=4,
            num_cross_attention_heads=4,
            vocab_size=VOCAB,
            max_position_embeddings=32,
            num_labels=CLASSES,
        ),
        by_name(inputs=ids()),
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
    entry(
        "hub_gemma",
        hub("GemmaForCausalLM", "GemmaConfig", use_cache=False, **GROUPED_ONCE, head_dim=8),
        text,
        FAMILY,
        (2,),
    ),
    entry(
        "hub_cohere",
        hub("CohereForCausalLM", "CohereConfig", use_cache=False, **GROUPED_ONCE),
        text,
        FAMILY,
        (2, 4),
    ),
    entry(
        "hub_olmo2",
        hub("Olmo2ForCausalLM", "Olmo2Config", use_cache=False, **GROUPED_ONCE),
        text,
        FAMILY,
        (2,),
    ),
    entry(
        "hub_stablelm",
        hub("StableLmForCausalLM", "StableLmConfig", use_cache=False, **GROUPED_ONCE),
        text,
        FAMILY,
        (2,),
    ),
    entry(
        "hub_phi3",
        hub(
            "Phi3ForCausalLM",
            "Phi3Config",
            use_cache=False,
            **GROUPED_ONCE,
            original_max_position_embeddings=32,
        ),
        text,
        FAMILY,
        (2, 4),
    ),
    entry(
        "hub_starcoder2",
        hub("Starcoder2ForCausalLM", "Starcoder2Config", use_cache=False, **GROUPED_ONCE),
        text,
        FAMILY,
        (2,),
    ),
    entry(
        "hub_granite",
        hub("GraniteForCausalLM", "GraniteConfig", use_cache=False, **GROUPED_ONCE),
        text,
        FAMILY,
        (2,),
    ),
    entry(
        "hub_nemotron",
        hub("NemotronForCausalLM", "NemotronConfig", use_cache=False, **GROUPED_ONCE),
        text,
        FAMILY,
        (2,),
    ),
    entry(
        "hub_persimmon",
        hub("PersimmonForCausalLM", "PersimmonConfig", use_cache=False, **GROUPED_ONCE),
        text,
        FAMILY,
        (2,),
    ),
    entry(
        "hub_smollm3",
        hub("SmolLM3ForCausalLM", "SmolLM3Config", use_cache=False, **GROUPED_ONCE),
        text,
        FAMILY,
        (2,),
    ),
    entry(
        "hub_bitnet",
        hub("BitNetForCausalLM", "BitNetConfig", use_cache=False, **GROUPED_ONCE),
        text,
        FAMILY,
        (2,),
    ),
    entry(
        "hub_lfm2",
        hub("Lfm2ForCausalLM", "Lfm2Config", use_cache=False, **GROUPED_ONCE, layer_types=["conv"]),
        text,
        FAMILY,
        (2, 4),
    ),
    entry(
        "hub_diffllama",
        hub(
            "DiffLlamaForCausalLM",
            "DiffLlamaConfig",
            use_cache=False,
            **{**GROUPED_ONCE, "num_attention_heads": 4, "num_key_value_heads": 2},
        ),
        text,
        FAMILY,
    ),
    entry(
        "hub_gpt_neo",
        hub(
            "GPTNeoForCausalLM",
            "GPTNeoConfig",
            vocab_size=VOCAB,
            hidden_size=32,
            num_layers=2,
            num_heads=4,
            attention_types=[[["global", "local"], 1]],
            window_size=4,
            max_position_embeddings=32,
            use_cache=False,
            **SPECIAL,
        ),
        text,
        FAMILY,
    ),
    entry(
        "hub_codegen",
        hub("CodeGenForCausalLM", "CodeGenConfig", rotary_dim=4, use_cache=False, **{**GPT2, "n_layer": 1}),
        text,
        FAMILY,
    ),
    entry(
        "hub_openai_gpt",
        hub("OpenAIGPTLMHeadModel", "OpenAIGPTConfig", **{**GPT2, "n_layer": 1}),
        text,
        FAMILY,
    ),
    entry(
        "hub_ctrl",
        hub("CTRLLMHeadModel", "CTRLConfig", dff=64, use_cache=False, **{**GPT2, "n_layer": 1}),
        text,
        FAMILY,
    ),
    entry(
        "hub_xglm",
        hub(
            "XGLMForCausalLM",
            "XGLMConfig",
            vocab_size=VOCAB,
            d_model=32,
            ffn_dim=64,
            num_layers=1,
            attention_heads=4,
            max_position_embeddings=32,
            use_cache=False,
            **SPECIAL,
        ),
        text,
        FAMILY,
    ),
    entry(
        "hub_biogpt", hub("BioGptForCausalLM", "BioGptConfig", use_cache=False, **ENCODER_ONCE), text, FAMILY
    ),
    entry(
        "hub_mpt",
        hub(
            "MptForCausalLM",
            "MptConfig",
            vocab_size=VOCAB,
            d_model=32,
            n_heads=4,
            n_layers=1,
            max_seq_len=32,
            expansion_ratio=2,
            use_cache=False,
        ),
        text,
        FAMILY,
    ),
    entry(
        "hub_falcon_grouped",
        hub(
            "FalconForCausalLM",
            "FalconConfig",
            new_decoder_architecture=True,
            num_kv_heads=4,
            use_cache=False,
            **DECODER_ONCE,
        ),
        text,
        FAMILY,
    ),
    entry(
        "hub_gemma3",
        hub(
            "Gemma3ForCausalLM",
            "Gemma3TextConfig",
            sliding_window=4,
            use_cache=False,
            **{**GROUPED_ONCE, "head_dim": 8},
        ),
        text,
        FAMILY,
    ),
    entry(
        "hub_apertus",
        hub("ApertusForCausalLM", "ApertusConfig", use_cache=False, **GROUPED_ONCE),
        text,
        FAMILY,
        (2,),
    ),
    entry(
        "hub_deepseek_v2",
        hub(
            "DeepseekV2ForCausalLM",
            "DeepseekV2Config",
            first_k_dense_replace=1,
            q_lora_rank=16,
            kv_lora_rank=16,
            qk_rope_head_dim=8,
            qk_nope_head_dim=8,
            v_head_dim=8,
            use_cache=False,
            **{**GROUPED_ONCE, "num_key_value_heads": 8},
        ),
        text,
        FAMILY,
    ),
    entry(
        "hub_decision_transformer",
        hub(
            "DecisionTransformerModel",
            "DecisionTransformerConfig",
            state_dim=6,
            act_dim=3,
            hidden_size=32,
            max_ep_len=32,
            n_layer=1,
            n_head=4,
            n_positions=32,
        ),
        by_name(
            states=lambda: normal(2, 4, 6),
            actions=lambda: normal(2, 4, 3, seed=2),
            rewards=lambda: normal(2, 4, 1, seed=3),
            returns_to_go=lambda: normal(2, 4, 1, seed=4),
            timesteps=lambda: integers(2, 4, high=20),
            attention_mask=lambda: torch.ones(2, 4),
        ),
        FAMILY,
    ),
    # Mixtures of experts.
    entry(
        "hub_mixtral",
        experts("MixtralForCausalLM", "MixtralConfig", num_local_experts=4, num_experts_per_tok=2),
        text,
        FAMILY,
    ),
    entry(
        "hub_mixtral_grouped",
        hub("MixtralForCausalLM", "MixtralConfig", num_local_experts=4, use_cache=False, **GROUPED_ONCE),
        text,
        FAMILY,
        (2,),
    ),
    entry(
        "hub_qwen2_moe",
        experts(
            "Qwen2MoeForCausalLM",
            "Qwen2MoeConfig",
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=32,
            shared_expert_intermediate_size=32,
        ),
        text,
        FAMILY,
        (2,),
    ),
    entry(
        "hub_qwen3_moe",
        experts(
            "Qwen3MoeForCausalLM",
            "Qwen3MoeConfig",
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=32,
            head_dim=8,
        ),
        text,
        FAMILY,
        (2,),
    ),
    entry(
        "hub_olmoe",
        experts("OlmoeForCausalLM", "OlmoeConfig", num_experts=4, num_experts_per_tok=2),
        text,
        FAMILY,
        (2,),
    ),
    entry(
        "hub_gpt_oss",
        experts("GptOssForCausalLM", "GptOssConfig", num_local_experts=4, num_experts_per_tok=2, head_dim=8),
        text,
        FAMILY,
    ),
    # State spaces and other recurrences.
    entry(
        "hub_mamba",
        hub(
            "MambaForCausalLM",
            "MambaConfig",
            vocab_size=VOCAB,
            hidden_size=32,
            state_size=4,
            num_hidden_layers=1,
            use_cache=False,
            **SPECIAL,
        ),
        by_name(input_ids=ids(4)),
        FAMILY,
        (2,),
    ),
    entry(
        "hub_recurrent_gemma",
        hub(
            "RecurrentGemmaForCausalLM",
            "RecurrentGemmaConfig",
            vocab_size=VOCAB,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=4,
            lru_width=32,
            attention_window_size=8,
            use_cache=False,
            **SPECIAL,
        ),
        by_name(input_ids=ids(4)),
        FAMILY,
        (2,),
    ),
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
    entry(
        "hub_swinv2",
        hub(
            "Swinv2ForImageClassification",
            "Swinv2Config",
            image_size=32,
            patch_size=4,
            embed_dim=16,
            depths=[1, 1],
            num_heads=[4, 4],
            window_size=4,
            **STAGES,
        ),
        picture,
        FAMILY,
        (2,),
    ),
    entry(
        "hub_hiera",
        hub(
            "HieraForImageClassification",
            "HieraConfig",
            image_size=[32, 32],
            patch_size=[7, 7],
            patch_stride=[4, 4],
            patch_padding=[3, 3],
            embed_dim=16,
            depths=[1, 1],
            num_heads=[4, 8],
            masked_unit_size=[4, 4],
            masked_unit_attention=[True, False],
            num_query_pool=1,
            **STAGES,
        ),
        picture,
        FAMILY,
    ),
    entry(
        "hub_pvt",
        hub(
            "PvtForImageClassification",
            "PvtConfig",
            image_size=32,
            num_encoder_blocks=2,
            depths=[1, 1],
            sequence_reduction_ratios=[2, 1],
            hidden_sizes=[16, 32],
            patch_sizes=[4, 2],
            strides=[4, 2],
            num_attention_heads=[4, 4],
            mlp_ratios=[2, 2],
            **STAGES,
        ),
        picture,
        FAMILY,
        (2,),
    ),
    entry(
        "hub_poolformer",
        hub(
            "PoolFormerForImageClassification",
            "PoolFormerConfig",
            num_encoder_blocks=2,
            depths=[1, 1],
            hidden_sizes=[16, 32],
            patch_sizes=[7, 3],
            strides=[4, 2],
            padding=[2, 1],
            **STAGES,
        ),
        picture,
        FAMILY,
    ),
    entry(
        "hub_focalnet",
        hub(
            "FocalNetForImageClassification",
            "FocalNetConfig",
            image_size=32,
            patch_size=4,
            embed_dim=16,
            depths=[1, 1],
            focal_levels=[2, 2],
            focal_windows=[3, 3],
            **STAGES,
        ),
        picture,
        FAMILY,
        (2,),
    ),
    entry(
        "hub_swin2sr",
        hub(
            "Swin2SRForImageSuperResolution",
            "Swin2SRConfig",
            image_size=8,
            patch_size=1,
            embed_dim=16,
            depths=[1],
            num_heads=[4],
            window_size=4,
            upscale=2,
            num_channels=3,
        ),
        by_name(pixel_values=lambda: normal(2, 3, 8, 8)),
        FAMILY,
        (2,),
    ),
    entry(
        "hub_vitdet",
        hub(
            "VitDetModel",
            "VitDetConfig",
            use_relative_position_embeddings=True,
            window_block_indices=[0],
            window_size=2,
            pretrain_image_size=32,
            **{name: value for name, value in PATCHES_ONCE.items() if name != "num_labels"},
        ),
        picture,
        FAMILY,
    ),
    entry("hub_upernet", upernet, by_name(pixel_values=lambda: normal(2, 3, 64, 64)), FAMILY, (2,)),
    entry(
        "hub_videomae",
        hub(
            "VideoMAEForVideoClassification",
            "VideoMAEConfig",
            tubelet_size=2,
            **{**PATCHES_ONCE, "image_size": 16, "num_frames": 4},
        ),
        by_name(pixel_values=lambda: normal(2, 4, 3, 16, 16)),
        FAMILY,
    ),
    entry(
        "hub_timesformer",
        hub(
            "TimesformerForVideoClassification",
            "TimesformerConfig",
            **{**PATCHES_ONCE, "image_size": 16, "num_frames": 4},
        ),
        by_name(pixel_values=lambda: normal(2, 4, 3, 16, 16)),
        FAMILY,
        (2,),
    ),
    # Detection.
    entry(
        "hub_yolos",
        hub(
            "YolosForObjectDetection",
            "YolosConfig",
            num_detection_tokens=4,
            **{**PATCHES_ONCE, "image_size": [32, 32]},
        ),
        picture,
        FAMILY,
        (2,),
    ),
    # Sound, and images with text.
    entry(
        "hub_unispeech", hub("UniSpeechForCTC", "UniSpeechConfig", **{**AUDIO, **ONCE}), sound, FAMILY, (2,)
    ),
    entry(
        "hub_ast",
        hub(
            "ASTForAudioClassification",
            "ASTConfig",
            max_length=24,
            num_mel_bins=16,
            frequency_stride=8,
            time_stride=8,
            **{name: value for name, value in PATCHES_ONCE.items() if name != "image_size"},
        ),
        by_name(input_values=lambda: normal(2, 24, 16)),
        FAMILY,
        (2,),
    ),
    entry(
        "hub_patchtst",
        hub(
            "PatchTSTForPrediction",
            "PatchTSTConfig",
            num_input_channels=2,
            context_length=16,
            patch_length=4,
            patch_stride=4,
            d_model=16,
            ffn_dim=32,
            num_hidden_layers=1,
            num_attention_heads=4,
            prediction_length=4,
            loss="mse",
        ),
        by_name(past_values=lambda: normal(2, 16, 2)),
        FAMILY,
    ),
    entry(
        "hub_siglip",
        siglip,
        by_name(input_ids=ids(), pixel_values=lambda: normal(2, 3, 32, 32)),
        FAMILY,
        (2,),
    ),
    entry(
        "hub_llava",
        llava,
        by_name(
            input_ids=lambda: torch.cat([torch.full((2, 16), VOCAB - 1), integers(2, 6, high=90)], 1),
            pixel_values=lambda: normal(2, 3, 32, 32),
        ),
        FAMILY,
        (2,),
    ),
    entry(
        "hub_whisper",
        hub(
            "WhisperForConditionalGeneration",
            "WhisperConfig",
            num_mel_bins=8,
            max_source_positions=10,
            max_target_positions=16,
            use_cache=False,
            **{name: value for name, value in BART.items() if name != "max_position_embeddings"},
        ),
        by_name(input_features=lambda: normal(2, 8, 20), decoder_input_ids=ids(5)),
        FAMILY,
    ),
    entry(
        "hub_wavlm",
        hub("WavLMForCTC", "WavLMConfig", num_buckets=16, max_bucket_distance=32, **{**AUDIO, **ONCE}),
        sound,
        FAMILY,
        (2,),
    ),
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
