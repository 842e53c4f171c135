"""Released config.json, as published, are the named models."""

from __future__ import annotations

from typing import Any

import pytest

from lasp.checkpoints.configs import check_same, format_of
from lasp.hybrid import NAMED_CONFIGS

ALPHA = 3.5565588200778455
RELEASED: dict[str, dict[str, Any]] = {
    "minimax-text-01": {
        "architectures": ["MiniMaxText01ForCausalLM"],
        "attn_type_list": [int((layer + 1) % 8 == 0) for layer in range(80)],
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 6144,
        "intermediate_size": 9216,
        "layernorm_full_attention_alpha": ALPHA,
        "layernorm_full_attention_beta": 1.0,
        "layernorm_linear_attention_alpha": ALPHA,
        "layernorm_linear_attention_beta": 1.0,
        "layernorm_mlp_alpha": ALPHA,
        "layernorm_mlp_beta": 1.0,
        "max_position_embeddings": 10_240_000,
        "model_type": "minimax_text_01",
        "num_attention_heads": 64,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 80,
        "num_key_value_heads": 8,
        "num_local_experts": 32,
        "postnorm": True,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10_000_000,
        "rotary_dim": 64,
        "router_aux_loss_coef": 0.001,
        "router_jitter_noise": 0.0,
        "shared_intermediate_size": 0,
        "shared_moe_mode": "sigmoid",
        "sliding_window": None,
        "tie_word_embeddings": False,
        "vocab_size": 200_064,
    },
    "ring-mini-linear-2.0": {
        "architectures": ["BailingMoeLinearV2ForCausalLM"],
        "first_k_dense_replace": 1,
        "group_norm_size": 4,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "intermediate_size": 5120,
        "layer_group_size": 5,
        "linear_silu": False,
        "max_position_embeddings": 131_072,
        "model_type": "bailing_moe_linear",
        "moe_intermediate_size": 512,
        "moe_router_enable_expert_bias": True,
        "moe_shared_expert_intermediate_size": 512,
        "n_group": 8,
        "norm_topk_prob": True,
        "num_attention_heads": 16,
        "num_experts": 256,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 20,
        "num_key_value_heads": 4,
        "num_nextn_predict_layers": 0,
        "num_shared_experts": 1,
        "partial_rotary_factor": 0.5,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1_000_000,
        "routed_scaling_factor": 2.5,
        "router_dtype": "fp32",
        "score_function": "sigmoid",
        "tie_word_embeddings": False,
        "topk_group": 4,
        "use_bias": False,
        "use_qk_norm": True,
        "use_qkv_bias": False,
        "use_rmsnorm": True,
        "vocab_size": 157_184,
    },
    "minicpm-sala": {
        "architectures": ["MiniCPMSALAForCausalLM"],
        "attention_bias": False,
        "attn_use_output_gate": True,
        "attn_use_rope": False,
        "dim_model_base": 256,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 16_384,
        "lightning_head_dim": 128,
        "lightning_nh": 32,
        "lightning_nkv": 32,
        "lightning_scale": "1/sqrt(d)",
        "lightning_use_rope": True,
        "max_position_embeddings": 524_288,
        "mixer_types": [
            "minicpm4" if layer in (0, 9, 16, 17, 22, 29, 30, 31) else "lightning-attn"
            for layer in range(32)
        ],
        "model_type": "minicpm_sala",
        "mup_denominator": 32,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 2,
        "qk_norm": True,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 10_000.0,
        "scale_depth": 1.4,
        "scale_emb": 12,
        "sparse_config": {"dense_len": 8192, "topk": 64, "window_size": 2048},
        "tie_word_embeddings": False,
        "use_output_gate": True,
        "use_output_norm": True,
        "vocab_size": 73_448,
    },
}


@pytest.mark.parametrize("model", RELEASED)
def test_a_released_config_is_the_named_model(model: str) -> None:
    fields = RELEASED[model]
    check_same(NAMED_CONFIGS[model], format_of(fields).read(fields), "the released config")


def test_images_and_text_have_the_config_of_the_text_inside() -> None:
    fields = {
        "architectures": ["MiniMaxVL01ForConditionalGeneration"],
        "text_config": RELEASED["minimax-text-01"],
    }
    read = format_of(fields).read(fields)
    check_same(NAMED_CONFIGS["minimax-m1"], read, "the released config")
