"""Small configurations of Hugging Face architectures: few layers, no size like another."""

from __future__ import annotations

SIZES = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
ENCODER = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}
LLAMA_31 = {
    **SIZES,
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 256,
    },
}
QWEN3 = {**SIZES, "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "head_dim": 16}
GEMMA3 = {
    **SIZES,
    "model_type": "gemma3_text",
    "architectures": ["Gemma3ForCausalLM"],
    "num_hidden_layers": 6,
    "head_dim": 16,
    "sliding_window": 16,
}
GEMMA3_WITH_IMAGES = {
    "model_type": "gemma3",
    "architectures": ["Gemma3ForConditionalGeneration"],
    "text_config": {**GEMMA3, "model_type": "gemma3_text"},
    "vision_config": {
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 28,
        "patch_size": 14,
    },
}
GPT_OSS = {
    **SIZES,
    "model_type": "gpt_oss",
    "architectures": ["GptOssForCausalLM"],
    "num_hidden_layers": 4,
    "head_dim": 16,
    "sliding_window": 16,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}
SMOLLM3 = {
    **SIZES,
    "model_type": "smollm3",
    "architectures": ["SmolLM3ForCausalLM"],
    "num_hidden_layers": 5,
    "pad_token_id": 0,
}
MIXTRAL = {**SIZES, "model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "num_local_experts": 4}
QWEN3_MOE = {
    **SIZES,
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "head_dim": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}
DEEPSEEK_V3 = {
    **SIZES,
    "model_type": "deepseek_v3",
    "architectures": ["DeepseekV3ForCausalLM"],
    "num_key_value_heads": 8,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 32,
    "n_group": 2,
    "topk_group": 1,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "kv_lora_rank": 24,
    "q_lora_rank": 40,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}
BERT = {**ENCODER, "model_type": "bert", "architectures": ["BertForMaskedLM"]}
VIT = {
    **ENCODER,
    "model_type": "vit",
    "architectures": ["ViTForImageClassification"],
    "image_size": 24,
    "patch_size": 8,
    "num_labels": 10,
}
T5 = {
    "model_type": "t5",
    "architectures": ["T5ForConditionalGeneration"],
    "vocab_size": 320,
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 160,
    "num_layers": 3,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
OPT = {
    "model_type": "opt",
    "architectures": ["OPTForCausalLM"],
    "vocab_size": 320,
    "hidden_size": 64,
    "word_embed_proj_dim": 64,
    "ffn_dim": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
GEMMA2 = {**GEMMA3, "model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"], "num_hidden_layers": 2}
BLOOM = {
    "model_type": "bloom",
    "architectures": ["BloomForCausalLM"],
    "vocab_size": 320,
    "hidden_size": 64,
    "n_layer": 2,
    "n_head": 4,
}
FALCON = {**ENCODER, "model_type": "falcon", "architectures": ["FalconForCausalLM"], "num_hidden_layers": 2}
PHI = {**SIZES, "model_type": "phi", "architectures": ["PhiForCausalLM"], "num_hidden_layers": 2}
MAMBA = {
    "model_type": "mamba",
    "architectures": ["MambaForCausalLM"],
    "vocab_size": 320,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "state_size": 8,
}

OWN_LOSS = {"loss": "model", "inputs": {"input_ids": "input_ids", "labels": "targets"}}
"""For masked language models and encoder-decoders, which do not shift `labels`."""
OF_IMAGES = {"loss": "model", "inputs": {"pixel_values": "pixel_values", "labels": "targets"}}
