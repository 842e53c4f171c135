"""config.json of MiniCPM-SALA.

Its softmax layers choose blocks of keys above ``sparse_config.dense_len`` tokens and are dense
below, as here: the weights are the same.
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
from lasp.hybrid.config import DenseConfig, HybridConfig, Residuals, ResidualScale, VocabularyConfig
from lasp.layers.options import LightningOptions

CLASSES = ("MiniCPMSALAForCausalLM",)
_KINDS = {"lightning-attn": "G", "lightning_attn": "G", "lightning": "G", "minicpm4": "*"}
# Tokens of a context in the released configs, which servers ask for and no weight depends on.
_CONTEXT = 524_288


def read(fields: Json) -> HybridConfig:
    """The model of a config."""
    refuse_others(fields, hidden_act="silu", attention_bias=False, use_output_norm=True)
    refuse_others(fields, lightning_scale="1/sqrt(d)")
    refuse_others(fields, use_sliding_window=False)
    check_not_quantised(fields)
    layers, vocab, hidden, ffn, heads, kv_heads, mixers = needed(
        fields,
        "num_hidden_layers",
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "num_key_value_heads",
        "mixer_types",
    )
    base, eps, depth = needed(fields, "rope_theta", "rms_norm_eps", "scale_depth")
    scale_emb, width = needed(fields, "scale_emb", "dim_model_base")
    head_dim = fields.get("head_dim") or hidden // heads
    refuse_others(fields, lightning_nh=heads, lightning_nkv=heads, lightning_head_dim=head_dim)
    residual = ResidualScale(beta=float(depth) / math.sqrt(layers))
    return HybridConfig(
        num_layers=layers,
        vocab_size=vocab,
        attention=AttentionConfig(
            heads,
            kv_heads,
            head_dim,
            rotary_dim=head_dim if fields.get("attn_use_rope", False) else 0,
            rope_base=float(base),
            gated=bool(fields.get("attn_use_output_gate", True)),
            dense_len=(fields.get("sparse_config") or {}).get("dense_len"),
            rope_scaling=rope_scaling(fields),
        ),
        moe=None,
        dense=DenseConfig(hidden, ffn),
        pattern=kinds(mixers, _KINDS, "mixer_types"),
        lightning=LightningOptions(
            activation="none",
            qk_norm=bool(fields.get("qk_norm", True)),
            rotary_dim=head_dim if fields.get("lightning_use_rope", True) else 0,
            rope_base=float(base),
            scale=None,
            norm_eps=float(eps),
            gate="sigmoid" if fields.get("use_output_gate", True) else "none",
            rope_scaling=rope_scaling(fields),
        ),
        vocabulary=VocabularyConfig(
            tied=bool(fields.get("tie_word_embeddings", False)),
            embedding_scale=float(scale_emb),
            logit_scale=width / hidden,
        ),
        residuals=Residuals("pre", residual, residual, residual),
        norm_eps=float(eps),
        decay="sala",
    )


def write(config: HybridConfig) -> dict[str, Any]:
    """The config of a model."""
    heads, dense, lightning = config.attention, config.dense, config.lightning
    if dense is None:
        raise ValueError("the model must have dense MLPs for the format sala, got dense None")
    names = {symbol: name for name, symbol in reversed(_KINDS.items())}
    depth = config.residuals_or_deepnorm.mlp.beta * math.sqrt(config.num_layers)
    return {
        "architectures": [CLASSES[0]],
        "model_type": "minicpm_sala",
        "num_hidden_layers": config.num_layers,
        "vocab_size": config.vocab_size,
        "hidden_size": dense.hidden_size,
        "intermediate_size": dense.ffn_size,
        "num_attention_heads": heads.num_heads,
        "num_key_value_heads": heads.num_kv_heads,
        "head_dim": heads.head_dim,
        "mixer_types": [names[kind] for kind in config.kinds],
        "attn_use_rope": heads.rotary_dim > 0,
        "attn_use_output_gate": heads.gated,
        "attention_bias": False,
        "lightning_nh": heads.num_heads,
        "lightning_nkv": heads.num_heads,
        "lightning_head_dim": heads.head_dim,
        "lightning_scale": "1/sqrt(d)",
        "lightning_use_rope": lightning.rotary_dim > 0,
        "qk_norm": lightning.qk_norm,
        "use_output_gate": lightning.gate != "none",
        "use_output_norm": True,
        "rope_theta": heads.rope_base,
        "rope_scaling": scaling_fields(heads.rope_scaling),
        "rms_norm_eps": config.norm_eps,
        "scale_depth": float(f"{depth:.12g}"),  # 1.4 and not 1.4 with the rounding of the root
        "scale_emb": config.vocabulary.embedding_scale,
        "dim_model_base": round(config.vocabulary.logit_scale * dense.hidden_size),
        "sparse_config": {"dense_len": heads.dense_len} if heads.dense_len else None,
        "max_position_embeddings": _CONTEXT,
        "hidden_act": "silu",
        "tie_word_embeddings": config.vocabulary.tied,
    }
