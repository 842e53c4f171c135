"""The tables of all formats, see ``lasp.checkpoints.family``."""

from __future__ import annotations

from lasp.checkpoints.family import Family
from lasp.checkpoints.family import NameRule as R


def _weights(start: str, /, **roles: str) -> tuple[R, ...]:
    """Rules of weights with one atom each, ``start + name + ".weight"``."""
    return tuple(R(f"{start}{name}.weight", role) for name, role in roles.items())


_LATENT = {
    "q_proj": "latent.q",
    "q_a_proj": "latent.q_a",
    "q_a_layernorm": "latent.q_a_norm",
    "q_b_proj": "latent.q_b",
    "kv_a_proj_with_mqa": "latent.kv_a",
    "kv_a_layernorm": "latent.kv_a_norm",
    "kv_b_proj": "latent.kv_b",
    "g_proj": "latent.gate",
}
_LIGHTNING_QKV = "lightning.q lightning.k lightning.v"
_LIGHTNING_BIASES = "lightning.q_bias lightning.k_bias lightning.v_bias"
_SOFTMAX_QKV = "softmax.q softmax.k softmax.v"

PLAIN = Family(
    "plain",
    (
        R("embedding.weight", "embedding"),
        R("final_norm.weight", "final_norm"),
        R("head.weight", "head"),
        R("{layer}attention.qkv_proj.weight", _LIGHTNING_QKV, "heads"),
        R("{layer}attention.qkv_proj.bias", _LIGHTNING_BIASES, "heads"),
        R("{layer}attention.output_gate.bias", "lightning.gate_bias"),
        R("{layer}attention.out_proj.bias", "lightning.out_bias"),
        *_weights(
            "{layer}attention.",
            output_gate="lightning.gate",
            q_norm="lightning.q_norm",
            k_norm="lightning.k_norm",
            norm="lightning.norm",
            out_proj="lightning.out",
        ),
        *_weights(
            "{layer}attention.",
            q_proj="softmax.q",
            k_proj="softmax.k",
            v_proj="softmax.v",
            o_proj="softmax.out",
            q_norm="softmax.q_norm",
            k_norm="softmax.k_norm",
            output_gate="softmax.gate",
        ),
        *_weights("{layer}attention.", **_LATENT, o_proj="latent.out"),
        R("{layer}attention_norm.weight", "attention_norm"),
        R("{layer}moe_norm.weight", "mlp_norm"),
        R("{layer}mlp.w13", "mlp.gate mlp.up", "stack"),
        R("{layer}mlp.w2", "mlp.down"),
        R("{layer}moe.gate.weight", "router"),
        R("{layer}moe.gate.expert_bias", "router_bias"),
        R("{layer}moe.experts.w13", "experts.gate experts.up", "stack"),
        R("{layer}moe.experts.w2", "experts.down"),
        R("{layer}moe.shared.w13", "shared.gate shared.up", "stack"),
        R("{layer}moe.shared.w2", "shared.down"),
        R("{layer}moe.shared.gate", "shared.scale"),
        *_weights(
            "mtp.",
            token_norm="mtp.token_norm",
            hidden_norm="mtp.hidden_norm",
            final_norm="mtp.final_norm",
            projection="mtp.projection",
        ),
    ),
    layer="layers.{}.",
    mtp_layer="mtp.layer.",
    skipped=r".*\.tokens_per_expert|optimizer\..*",
)

_RELEASED = (
    R("model.norm.weight", "final_norm"),
    R("lm_head.weight", "head"),
    R("{layer}input_layernorm.weight", "attention_norm"),
    R("{layer}post_attention_layernorm.weight", "mlp_norm"),
)
_SELF_ATTENTION = _weights(
    "{layer}self_attn.",
    q_proj="softmax.q",
    k_proj="softmax.k",
    v_proj="softmax.v",
    o_proj="softmax.out",
)
_DENSE = _weights("{layer}mlp.", gate_proj="mlp.gate", up_proj="mlp.up", down_proj="mlp.down")

# MiniMax-Text-01, MiniMax-M1, the text tower of MiniMax-VL-01, and transformers' "minimax".
MINIMAX = Family(
    "minimax",
    (
        R("model.embed_tokens.weight", "embedding"),
        *_RELEASED,
        R("{layer}self_attn.qkv_proj.weight", _LIGHTNING_QKV, "heads"),
        *_weights(
            "{layer}self_attn.",
            output_gate="lightning.gate",
            norm="lightning.norm",
            out_proj="lightning.out",
        ),
        *_SELF_ATTENTION,
        R("{layer}block_sparse_moe.gate.weight", "router"),
        *_weights(
            "{layer}block_sparse_moe.experts.{expert}.",
            w1="experts.gate",
            w3="experts.up",
            w2="experts.down",
        ),
    ),
    layer="model.layers.{}.",
    # transformers writes the decay of lightning layers, and makes it itself where it is missing.
    skipped=r".*\.self_attn\.(slope_rate|query_decay|key_decay|diagonal_decay)"
    r"|(vision_tower|multi_modal_projector)\..*|image_newline",
)

# Ring-linear-2.0, Ling-2.5, Ring-2.5 and Ling-2.6.
BAILING = Family(
    "bailing",
    (
        R("model.word_embeddings.weight", "embedding"),
        *_RELEASED,
        R("{layer}attention.query_key_value.weight", _LIGHTNING_QKV),
        R("{layer}attention.query_key_value.weight", _SOFTMAX_QKV),
        *_weights(
            "{layer}attention.",
            g_proj="lightning.gate",
            g_norm="lightning.norm",
            query_layernorm="lightning.q_norm",
            key_layernorm="lightning.k_norm",
            dense="lightning.out",
        ),
        *_weights(
            "{layer}attention.",
            query_layernorm="softmax.q_norm",
            key_layernorm="softmax.k_norm",
            dense="softmax.out",
        ),
        *_weights("{layer}attention.", **_LATENT, dense="latent.out"),
        *_DENSE,
        R("{layer}mlp.gate.weight", "router"),
        R("{layer}mlp.gate.expert_bias", "router_bias"),
        *_weights(
            "{layer}mlp.experts.{expert}.",
            gate_proj="experts.gate",
            up_proj="experts.up",
            down_proj="experts.down",
        ),
        *_weights(
            "{layer}mlp.shared_experts.",
            gate_proj="shared.gate",
            up_proj="shared.up",
            down_proj="shared.down",
        ),
        *_weights(
            "{layer}",
            enorm="mtp.token_norm",
            hnorm="mtp.hidden_norm",
            eh_proj="mtp.projection",
            final_layernorm="mtp.final_norm",
        ),
    ),
    layer="model.layers.{}.",
    skipped=r".*\.attention\.slope",
)

SALA = Family(
    "sala",
    (
        R("model.embed_tokens.weight", "embedding"),
        *_RELEASED,
        *_weights(
            "{layer}self_attn.",
            q_proj="lightning.q",
            k_proj="lightning.k",
            v_proj="lightning.v",
            o_proj="lightning.out",
            z_proj="lightning.gate",
            o_norm="lightning.norm",
            q_norm="lightning.q_norm",
            k_norm="lightning.k_norm",
        ),
        *_SELF_ATTENTION,
        R("{layer}self_attn.o_gate.weight", "softmax.gate"),
        *_DENSE,
    ),
    layer="model.layers.{}.",
    skipped=r".*\.rotary_emb\.inv_freq",
)


def _megatron(name: str, final_norm: str, *, mlps_apart: bool) -> Family:
    attention, mlp = "{layer}self_attention.", "{mlp}mlp."
    rules = (
        R("embedding.word_embeddings.weight", "embedding"),
        R(f"decoder.{final_norm}.weight", "final_norm"),
        R("output_layer.weight", "head"),
        R("{layer}input_layernorm.weight", "attention_norm"),
        R("{mlp}pre_mlp_layernorm.weight", "mlp_norm"),
        R(f"{attention}in_proj.weight", f"{_LIGHTNING_QKV} lightning.gate", "heads"),
        R(
            f"{attention}linear_qkv.weight",
            "softmax.q softmax.gate softmax.k softmax.v",
            "kv_heads",
        ),
        *_weights(
            attention,
            q_norm="lightning.q_norm",
            k_norm="lightning.k_norm",
            out_norm="lightning.norm",
            out_proj="lightning.out",
            q_layernorm="softmax.q_norm",
            k_layernorm="softmax.k_norm",
            linear_proj="softmax.out",
        ),
        *_weights(
            attention,
            linear_q_proj="latent.q",
            linear_q_down_proj="latent.q_a",
            q_layernorm="latent.q_a_norm",
            linear_q_up_proj="latent.q_b",
            linear_kv_down_proj="latent.kv_a",
            kv_layernorm="latent.kv_a_norm",
            linear_kv_up_proj="latent.kv_b",
            linear_proj="latent.out",
        ),
        R(f"{mlp}linear_fc1.weight", "mlp.gate mlp.up"),
        R(f"{mlp}linear_fc2.weight", "mlp.down"),
        R(f"{mlp}router.weight", "router"),
        R(f"{mlp}router.expert_bias", "router_bias"),
        R(f"{mlp}experts.experts.linear_fc1.weight", "experts.gate experts.up"),
        R(f"{mlp}experts.experts.linear_fc2.weight", "experts.down"),
        R(f"{mlp}shared_experts.linear_fc1.weight", "shared.gate shared.up"),
        R(f"{mlp}shared_experts.linear_fc2.weight", "shared.down"),
        R(f"{mlp}shared_experts.gate_weight", "shared.scale"),
    )
    others = r".*\._extra_state(/.*)?|(optimizer|chained_\d+|rng_state|rerun_state|opt_param)\b.*"
    return Family(name, rules, "decoder.layers.{}.", mlps_apart=mlps_apart, skipped=others)


MEGATRON_GPT = _megatron("megatron-gpt", "final_layernorm", mlps_apart=False)
MEGATRON_HYBRID = _megatron("megatron-hybrid", "final_norm", mlps_apart=True)
