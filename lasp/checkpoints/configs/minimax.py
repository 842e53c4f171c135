"""config.json of MiniMax-Text-01, M1 and VL-01 as released, and of transformers' ``minimax``.

The two name the same things otherwise. transformers cannot read the released one: it takes layer
kinds, alphas and rotation from its defaults. It has no rotation of a part of a head.
"""

from __future__ import annotations

import math
from typing import Any

from lasp.checkpoints.configs.fields import (
    Json,
    check_not_quantised,
    kinds,
    needed,
    refuse_others,
    rope_scaling,
    scaling_fields,
)
from lasp.hybrid.attention import AttentionConfig
from lasp.hybrid.config import HybridConfig, Residuals, ResidualScale, VocabularyConfig
from moe_parallel import MoEConfig

_SIZES = (
    "num_hidden_layers",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "num_local_experts",
    "num_experts_per_tok",
)
# Our residuals, and the names of their factors in both configs.
_RELEASED = {
    "lightning": "layernorm_linear_attention_{}",
    "softmax": "layernorm_full_attention_{}",
    "mlp": "layernorm_mlp_{}",
}
_NATIVE = {
    "lightning": "linear_attn_{}_factor",
    "softmax": "full_attn_{}_factor",
    "mlp": "mlp_{}_factor",
}
_RELEASED_KINDS = {0: "G", 1: "*"}
_NATIVE_KINDS = {"linear_attention": "G", "full_attention": "*"}
# Tokens of a context in the released configs, which servers ask for and no weight depends on.
_CONTEXT = 10_240_000


def read_released(fields: Json) -> HybridConfig:
    """The model of a released config."""
    fields = fields.get("text_config", fields)
    (layers,) = needed(fields, "attn_type_list")
    head_dim, rotary_dim = needed(fields, "head_dim", "rotary_dim")
    refuse_others(fields, postnorm=True)
    shared = fields.get("shared_intermediate_size", 0)
    if any(shared if isinstance(shared, list) else [shared]):
        raise ValueError(
            f"shared_intermediate_size of config.json must be 0, got {shared}: MiniMax's shared"
            " expert has a coefficient that lasp.hybrid does not have"
        )
    factors = _factors(fields, _RELEASED)
    return _model(
        fields, kinds(layers, _RELEASED_KINDS, "attn_type_list"), factors, head_dim, rotary_dim
    )


def _factors(fields: Json, names: dict[str, str]) -> dict[str, ResidualScale]:
    pairs = {
        ours: needed(fields, name.format("alpha"), name.format("beta"))
        for ours, name in names.items()
    }
    return {ours: ResidualScale(*map(float, pair)) for ours, pair in pairs.items()}


def read_native(fields: Json) -> HybridConfig:
    """The model of transformers' config."""
    (layers,) = needed(fields, "layer_types")
    rope = fields.get("rope_parameters") or {}
    if (
        rope.get("partial_rotary_factor", 1.0) != 1.0
        or rope.get("rope_type", "default") != "default"
    ):
        raise ValueError(
            f"rope_parameters of config.json must rotate whole heads by the position, got {rope}:"
            " transformers' minimax does; the released format has rotary_dim"
        )
    factors = {
        name: ResidualScale(
            float(fields.get(pattern.format("alpha"), 1.0)),
            float(fields.get(pattern.format("beta"), 1.0)),
        )
        for name, pattern in _NATIVE.items()
    }
    (heads, hidden) = needed(fields, "num_attention_heads", "hidden_size")
    head_dim = fields.get("head_dim") or hidden // heads
    base = rope.get("rope_theta", fields.get("rope_theta", 1_000_000.0))
    pattern = kinds(layers, _NATIVE_KINDS, "layer_types")
    return _model({**fields, "rope_theta": base}, pattern, factors, head_dim, head_dim)


def _model(
    fields: Json, pattern: str, factors: dict[str, ResidualScale], head_dim: int, rotary_dim: int
) -> HybridConfig:
    refuse_others(fields, hidden_act="silu", sliding_window=0)
    check_not_quantised(fields)
    layers, vocab, hidden, ffn, heads, kv_heads, experts, top_k = needed(fields, *_SIZES)
    base, eps = needed(fields, "rope_theta", "rms_norm_eps")
    return HybridConfig(
        num_layers=layers,
        vocab_size=vocab,
        attention=AttentionConfig(
            heads, kv_heads, head_dim, rotary_dim, float(base), rope_scaling=rope_scaling(fields)
        ),
        moe=MoEConfig(
            hidden,
            ffn,
            experts,
            top_k,
            aux_loss_coefficient=float(fields.get("router_aux_loss_coef", 0.001)),
        ),
        pattern=pattern,
        residuals=Residuals("post", **factors, init_gain=math.pow(8 * layers, -0.25)),
        norm_eps=float(eps),
        vocabulary=VocabularyConfig(tied=bool(fields.get("tie_word_embeddings", False))),
    )


def write_released(config: HybridConfig) -> dict[str, Any]:
    """The released config of a model."""
    return {
        "architectures": ["MiniMaxText01ForCausalLM"],
        "model_type": "minimax_text_01",
        **_fields(config, _RELEASED),
        "attn_type_list": ["G*".index(kind) for kind in config.kinds],
        "rope_theta": config.attention.rope_base,
        "rotary_dim": config.attention.rotary_dim,
        "rope_scaling": scaling_fields(config.attention.rope_scaling),
        "postnorm": True,
        "shared_intermediate_size": 0,
        "shared_moe_mode": "sigmoid",
    }


def write_native(config: HybridConfig) -> dict[str, Any]:
    """Transformers' config of a model."""
    names = {symbol: name for name, symbol in _NATIVE_KINDS.items()}
    return {
        "architectures": ["MiniMaxForCausalLM"],
        "model_type": "minimax",
        **_fields(config, _NATIVE),
        "layer_types": [names[kind] for kind in config.kinds],
        "rope_parameters": {"rope_theta": config.attention.rope_base, "rope_type": "default"},
        "sliding_window": None,
    }


def _fields(config: HybridConfig, names: dict[str, str]) -> dict[str, Any]:
    heads, moe, residuals = config.attention, config.moe, config.residuals_or_deepnorm
    if moe is None:
        raise ValueError("the model must have experts for a MiniMax format, got moe None")
    sizes = (
        config.num_layers,
        config.vocab_size,
        moe.hidden_size,
        moe.ffn_size,
        heads.num_heads,
        heads.num_kv_heads,
        moe.num_experts,
        moe.top_k,
    )
    fields: dict[str, Any] = dict(zip(_SIZES, sizes))
    for ours, pattern in names.items():
        scale: ResidualScale = getattr(residuals, ours)
        fields |= {pattern.format(name): getattr(scale, name) for name in ("alpha", "beta")}
    return fields | {
        "max_position_embeddings": _CONTEXT,
        "head_dim": heads.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "router_aux_loss_coef": moe.aux_loss_coefficient,
        "tie_word_embeddings": config.vocabulary.tied,
    }
