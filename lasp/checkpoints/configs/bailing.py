"""config.json of inclusionAI's lightning models: Ring-linear-2.0, and Ling and Ring 2.5.

Ling 3.0 has the ``model_type`` of Ling 2.5, ``bailing_hybrid``, and is another model: the class
decides.
"""

from __future__ import annotations

from typing import Any

from lasp.checkpoints.configs.fields import (
    Json,
    check_not_quantised,
    needed,
    refuse_others,
    rope_scaling,
    scaling_fields,
)
from lasp.hybrid.attention import AttentionConfig, LatentConfig
from lasp.hybrid.config import DenseConfig, HybridConfig, Residuals, VocabularyConfig
from lasp.layers.options import LightningOptions
from moe_parallel import MoEConfig, RouterConfig

GQA_CLASSES = ("BailingMoeLinearV2ForCausalLM", "BailingMoeLinearForCausalLM")
LATENT_CLASSES = ("BailingMoeV2_5ForCausalLM",)
# Weight of the loss of multi-token prediction where the config has none: it is no weight of a file.
_MTP_LOSS_WEIGHT = 0.1
# Tokens of a context in the released configs, which servers ask for and no weight depends on.
_CONTEXT = 131_072


def read(fields: Json) -> HybridConfig:
    """The model of a config."""
    refuse_others(fields, hidden_act="silu", use_bias=False, use_qkv_bias=False)
    refuse_others(fields, linear_silu=False, use_qk_norm=True, use_rmsnorm=True)
    refuse_others(fields, use_sliding_window=False)
    check_not_quantised(fields)
    layers, vocab, hidden, heads = needed(
        fields, "num_hidden_layers", "vocab_size", "hidden_size", "num_attention_heads"
    )
    base, eps, group, norm_groups = needed(
        fields, "rope_theta", "rms_norm_eps", "layer_group_size", "group_norm_size"
    )
    head_dim = fields.get("head_dim") or hidden // heads
    rotary_dim = int(head_dim * fields.get("partial_rotary_factor", 1.0))
    dense = fields.get("first_k_dense_replace", 0)
    next_tokens = fields.get("num_nextn_predict_layers") or 0
    if next_tokens > 1:
        raise ValueError(
            f"num_nextn_predict_layers of config.json must be 0 or 1, got {next_tokens}"
        )
    return HybridConfig(
        num_layers=layers,
        vocab_size=vocab,
        attention=_attention(fields, heads, head_dim, rotary_dim, float(base)),
        moe=_experts(fields, hidden),
        dense=DenseConfig(hidden, needed(fields, "intermediate_size")[0], dense) if dense else None,
        pattern=pattern_of(layers, group),
        lightning=LightningOptions(
            activation="none",
            qk_norm=True,
            rotary_dim=rotary_dim,
            rope_base=float(base),
            scale=None,
            norm_groups=norm_groups,
            norm_eps=float(eps),
            rope_scaling=rope_scaling(fields),
        ),
        vocabulary=VocabularyConfig(tied=bool(fields.get("tie_word_embeddings", False))),
        residuals=Residuals(),
        norm_eps=float(eps),
        decay="bailing",
        mtp_loss_weight=(fields.get("mtp_loss_scaling_factor") or _MTP_LOSS_WEIGHT)
        if next_tokens
        else None,
    )


def pattern_of(num_layers: int, group_size: int) -> str:
    """Every ``group_size``-th layer is softmax, and those that fill no group."""
    whole = num_layers // group_size * group_size
    return ("G" * (group_size - 1) + "*") * (whole // group_size) + "*" * (num_layers - whole)


def _attention(
    fields: Json, heads: int, head_dim: int, rotary_dim: int, base: float
) -> AttentionConfig:
    scaling = rope_scaling(fields)
    if "kv_lora_rank" not in fields:
        (kv_heads,) = needed(fields, "num_key_value_heads")
        return AttentionConfig(
            heads, kv_heads, head_dim, rotary_dim, base, qk_norm=True, rope_scaling=scaling
        )
    rank, nope, rope, values = needed(
        fields, "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"
    )
    interleaved = bool(fields.get("rope_interleave", True))
    latent = LatentConfig(rank, nope, rope, values, fields.get("q_lora_rank"), interleaved)
    return AttentionConfig(heads, heads, head_dim, rope, base, latent=latent, rope_scaling=scaling)


def _experts(fields: Json, hidden: int) -> MoEConfig:
    experts, top_k, ffn = needed(
        fields, "num_experts", "num_experts_per_tok", "moe_intermediate_size"
    )
    shared = fields.get("num_shared_experts") or 0
    width = fields.get("moe_shared_expert_intermediate_size") or ffn
    score = fields.get("score_function", "softmax")
    return MoEConfig(
        hidden,
        ffn,
        experts,
        top_k,
        router=RouterConfig(
            score,
            normalize=bool(fields.get("norm_topk_prob", True)),
            scaling=float(fields.get("routed_scaling_factor", 1.0)),
            expert_bias=bool(fields.get("moe_router_enable_expert_bias", False)),
            num_groups=fields.get("n_group"),
            top_groups=fields.get("topk_group"),
        ),
        shared_ffn_size=shared * width or None,
    )


def write(config: HybridConfig) -> dict[str, Any]:
    """The config of a model."""
    heads, moe, latent = config.attention, config.moe, config.attention.latent
    if moe is None:
        raise ValueError("the model must have experts for the format bailing, got moe None")
    router, dense = moe.router, config.dense
    fields: dict[str, Any] = {
        "architectures": [(LATENT_CLASSES if latent else GQA_CLASSES)[0]],
        "model_type": "bailing_hybrid" if latent else "bailing_moe_linear",
        "num_hidden_layers": config.num_layers,
        "vocab_size": config.vocab_size,
        "hidden_size": moe.hidden_size,
        "intermediate_size": dense.ffn_size if dense else moe.ffn_size,
        "first_k_dense_replace": (dense and dense.num_layers) or 0,
        "num_attention_heads": heads.num_heads,
        "num_key_value_heads": heads.num_kv_heads,
        "head_dim": heads.head_dim,
        "partial_rotary_factor": config.lightning.rotary_dim / heads.head_dim,
        "rope_theta": heads.rope_base,
        "rope_scaling": scaling_fields(heads.rope_scaling),
        "rms_norm_eps": config.norm_eps,
        "layer_group_size": _group_size(config),
        "group_norm_size": config.lightning.norm_groups,
        "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "moe_intermediate_size": moe.ffn_size,
        "num_shared_experts": int(moe.shared_ffn_size is not None),
        "moe_shared_expert_intermediate_size": moe.shared_ffn_size or moe.ffn_size,
        "score_function": router.score_function,
        "norm_topk_prob": router.normalize,
        "routed_scaling_factor": router.scaling,
        "moe_router_enable_expert_bias": router.expert_bias,
        "n_group": router.num_groups,
        "topk_group": router.top_groups,
        "max_position_embeddings": _CONTEXT,
        "hidden_act": "silu",
        "linear_silu": False,
        "use_bias": False,
        "use_qkv_bias": False,
        "use_qk_norm": True,
        "tie_word_embeddings": config.vocabulary.tied,
        "num_nextn_predict_layers": int(config.mtp_loss_weight is not None),
        "mtp_loss_scaling_factor": config.mtp_loss_weight or 0,
    }
    if latent is None:
        return fields
    names = ("kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    fields |= {name: getattr(latent, name) for name in names}
    return fields | {"rope_interleave": latent.rope_interleaved}


def _group_size(config: HybridConfig) -> int:
    for size in range(2, config.num_layers + 1):
        if pattern_of(config.num_layers, size) == config.kinds:
            return size
    raise ValueError(
        "pattern must have softmax layers at the end of each group, and where layers fill no group,"
        f" for the format bailing, got {config.kinds}"
    )
