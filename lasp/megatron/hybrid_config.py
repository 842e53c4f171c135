"""The one HybridConfig against Megatron's config, and what of that hybrid layers refuse."""

from __future__ import annotations

from dataclasses import replace
from operator import attrgetter
from typing import Any

from megatron.core.transformer.transformer_config import (
    MLATransformerConfig,
    TransformerConfig,
)

from lasp._core.checks import check_part
from lasp._core.rotary import RopeScaling
from lasp.hybrid.attention import AttentionConfig, LatentConfig
from lasp.hybrid.config import DenseConfig, HybridConfig, VocabularyConfig
from lasp.hybrid.presets import MINIMAX_TEXT_01
from lasp.megatron.checks import require
from lasp.megatron.experts.config import ExpertOptions, moe_config
from lasp.megatron.hybrid_options import PART
from lasp.megatron.ring_latent import scaling_of

# What Megatron's config decides; by attention layers num_layers and pattern besides.
_OPTIONS = {
    "attention.num_heads": "num_attention_heads",
    "attention.num_kv_heads": "num_query_groups",
    "attention.head_dim": "kv_channels",
    "attention.qk_norm": "qk_layernorm",
    "attention.gated": "attention_output_gate",
    "norm_eps": "layernorm_epsilon",
    "mtp_loss_weight": "mtp_loss_scaling_factor, with mtp_num_layers=1,",
}
_LATENT_OPTIONS = {
    "attention.latent.kv_lora_rank": "kv_lora_rank",
    "attention.latent.qk_nope_head_dim": "qk_head_dim",
    "attention.latent.qk_rope_head_dim": "qk_pos_emb_head_dim",
    "attention.latent.v_head_dim": "v_head_dim",
    "attention.latent.q_lora_rank": "q_lora_rank",
    "attention.rope_base": "rotary_base",
}
_EXPERT_OPTIONS = {
    "moe.hidden_size": "hidden_size",
    "moe.ffn_size": "moe_ffn_hidden_size",
    "moe.num_experts": "num_moe_experts",
    "moe.top_k": "moe_router_topk",
    "moe.capacity_factor": "moe_expert_capacity_factor",
    "moe.drop_policy": "moe_token_drop_policy",
    "moe.aux_loss_coefficient": "moe_aux_loss_coeff",
    "moe.pad_to_capacity": "moe_pad_expert_input_to_capacity",
    "moe.router.score_function": "moe_router_score_function",
    "moe.router.normalize": "moe_router_pre_softmax",
    "moe.router.scaling": "moe_router_topk_scaling_factor",
    "moe.router.expert_bias": "moe_router_enable_expert_bias",
    "moe.router.num_groups": "moe_router_num_groups",
    "moe.router.top_groups": "moe_router_group_topk",
    "moe.router.sequence_loss_coefficient": "moe_aux_loss_coeff",
    "moe.router.z_loss_coefficient": "moe_z_loss_coeff",
    "moe.shared_ffn_size": "moe_shared_expert_intermediate_size",
    "moe.shared_gate": "moe_shared_expert_gate",
}


def hybrid_of(
    config: TransformerConfig, like: HybridConfig = MINIMAX_TEXT_01, symbols: str | None = None
) -> HybridConfig:
    """The hybrid model of Megatron's config: what that decides from there, the rest as in ``like``.

    Megatron decides the number and kinds of the layers, heads, epsilon of the norms, what experts
    compute and how wide dense MLPs are. ``like`` has residuals, positions, decay, what is around
    lightning attention, who computes, and how many rows; its pattern counts where
    ``config.linear_attention_freq`` is None.

    Args:
        config: Megatron's.
        like: a hybrid model of any size.
        symbols: ``hybrid_layer_pattern`` of a HybridModel; None: a GPTModel, whose layers are
            attention and MLP together.

    Raises:
        ValueError: for options that hybrid layers do not have.
    """
    check_part("config", config, TransformerConfig)
    check_part("like", like, HybridConfig)
    num_layers = config.num_layers if symbols is None else len(attention_of(symbols))
    kinds = _configured_kinds(config, num_layers) if symbols is None else attention_of(symbols)
    has_experts, dense = _mlps(config, like, num_layers, symbols)
    options = ExpertOptions() if like.moe is None else ExpertOptions.of(like.moe)
    return replace(
        like,
        num_layers=num_layers,
        attention=_attention(config, like.attention),
        moe=moe_config(config, options) if has_experts else None,
        dense=dense,
        pattern=kinds or like.pattern,
        norm_eps=config.layernorm_epsilon,
        mtp_loss_weight=_mtp_loss_weight(config),
    )


def _mtp_loss_weight(config: TransformerConfig) -> float | None:
    """Weight of the loss of the one layer that multi-token prediction has."""
    if not config.mtp_num_layers:
        return None
    require(config, PART, mtp_num_layers=1)
    weight: float = config.mtp_loss_scaling_factor
    return weight


def _attention(config: TransformerConfig, like: AttentionConfig) -> AttentionConfig:
    """The attention layers of Megatron's config."""
    heads = replace(
        like,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_query_groups,
        head_dim=config.kv_channels,
        qk_norm=config.qk_layernorm,
        gated=config.attention_output_gate,
        latent=None,
    )
    if not isinstance(config, MLATransformerConfig) or not config.multi_latent_attention:
        return heads
    if not config.qk_layernorm:
        raise ValueError(
            f"config.qk_layernorm must be True for {PART} with multi_latent_attention, got False:"
            " latents are normed"
        )
    if config.rope_type == "rope":
        require(config, PART, mscale_all_dim=0.0)  # Megatron reads it whatever rope_type is
    return replace(
        heads,
        rotary_dim=config.qk_pos_emb_head_dim,
        rope_base=config.rotary_base,
        rope_scaling=scaling_of(config),
        qk_norm=False,
        latent=LatentConfig(
            config.kv_lora_rank,
            config.qk_head_dim,
            config.qk_pos_emb_head_dim,
            config.v_head_dim,
            config.q_lora_rank,
            rope_interleaved=True,
        ),
    )


def _mlps(
    config: TransformerConfig, like: HybridConfig, num_layers: int, symbols: str | None
) -> tuple[bool, DenseConfig | None]:
    """Whether there are experts; and the dense MLPs, unsaid where all are dense as in ``like``."""
    if symbols is None:
        num_dense = _num_dense(config, num_layers)
        has_experts = num_dense < num_layers
    else:
        require(config, PART, moe_layer_freq=1)  # the pattern says it
        num_dense = (like.dense and like.dense.num_layers) or 0
        has_experts = "E" in symbols
    sizes = (config.hidden_size, config.ffn_hidden_size)
    if has_experts:
        return True, DenseConfig(*sizes, num_dense) if num_dense else None
    return False, DenseConfig(*sizes) if like.dense else None


def _num_dense(config: TransformerConfig, num_layers: int) -> int:
    """How many of the first layers have a dense MLP, in a GPTModel."""
    frequency = config.moe_layer_freq
    if config.num_moe_experts is None:
        return num_layers
    if isinstance(frequency, int):
        frequency = [int(index % frequency == 0) for index in range(num_layers)]
    if len(frequency) != num_layers or frequency != sorted(frequency):
        raise ValueError(
            f"config.moe_layer_freq must be 1 or a list of {num_layers} zeros, for dense layers,"
            f" and then ones, got {config.moe_layer_freq}: only the first layers may be dense"
        )
    return int(frequency.count(0))


def attention_of(symbols: str) -> str:
    """The attention layers of a HybridModel."""
    return "".join(symbol for symbol in symbols if symbol in "G*")


def check_same_model(
    config: TransformerConfig, hybrid: HybridConfig, symbols: str | None = None
) -> None:
    """Raise ValueError, naming field and option, where Megatron's config is of another model.

    Args: see :func:`hybrid_of`.
    """
    check_part("config", config, TransformerConfig)
    check_part("hybrid", hybrid, HybridConfig)
    _check_fields(hybrid)
    if symbols is not None and hybrid.mtp_loss_weight is not None:
        raise ValueError(
            f"mtp_loss_weight must be None for HybridModel, got {hybrid.mtp_loss_weight}: GPTModel"
            " has multi-token prediction, by hybrid_mtp_spec"
        )
    num_layers = config.num_layers if symbols is None else len(attention_of(symbols))
    if hybrid.num_layers != num_layers:
        _refuse("num_layers", hybrid.num_layers, "num_layers", num_layers)
    configured = _configured_kinds(config, num_layers)
    if configured not in (None, hybrid.kinds):
        raise ValueError(
            f"config.linear_attention_freq must give the layers of pattern {hybrid.pattern!r}, got"
            f" {config.linear_attention_freq}, which gives {configured} instead of {hybrid.kinds}"
            " (G lightning, * softmax): change one, or set None, the pattern says it all"
        )
    megatrons = hybrid_of(config, replace(hybrid, pattern=hybrid.kinds), symbols)
    latent = hybrid.attention.latent
    if (latent is None) != (megatrons.attention.latent is None):
        _refuse("attention.latent", latent, "multi_latent_attention", config.multi_latent_attention)
    if (hybrid.moe is None) != (megatrons.moe is None):
        _refuse("moe", hybrid.moe, "num_moe_experts", config.num_moe_experts)
    if hybrid.dense != megatrons.dense:
        _refuse("dense", hybrid.dense, "ffn_hidden_size and moe_layer_freq", megatrons.dense)
    options = dict(_OPTIONS)
    options.update(_EXPERT_OPTIONS if hybrid.moe else {})
    options.update(_LATENT_OPTIONS if latent else {})
    scalings = [model.attention.rope_scaling for model in (hybrid, megatrons)]
    if latent and _numbers(scalings[0]) != _numbers(scalings[1]):
        named = "rope_type, with rotary_scaling_factor, beta_fast and mscale,"
        _refuse("attention.rope_scaling", scalings[0], named, scalings[1])
    for field, option in options.items():
        wanted, value = (attrgetter(field)(model) for model in (hybrid, megatrons))
        if wanted != value:
            _refuse(field, wanted, option, value)


def _check_fields(hybrid: HybridConfig) -> None:
    """Raise ValueError for what of a hybrid model these layers do not have."""
    latent = hybrid.attention.latent
    if latent is not None and not latent.rope_interleaved:
        raise ValueError(
            f"attention.latent.rope_interleaved must be True for {PART}, got False: Megatron's"
            " latent attention rotates pairs of neighbours; reorder the rows of the weights"
        )
    for name, value in (("gated", False), ("dense_len", None)):
        if latent is not None and getattr(hybrid.attention, name) != value:
            raise ValueError(
                f"attention.{name} must be {value} for {PART} with latent attention, got"
                f" {getattr(hybrid.attention, name)}: Megatron's does not have it;"
                " lasp.hybrid.HybridModel has"
            )
    if hybrid.vocabulary != VocabularyConfig():
        raise ValueError(
            f"vocabulary must be VocabularyConfig() for {PART}, got {hybrid.vocabulary}: embedding"
            " and head are Megatron's, which no layer sees; tie them by"
            " share_embeddings_and_output_weights, and multiply their weights by the scales"
        )


def _refuse(field: str, wanted: Any, option: str, value: Any) -> None:
    raise ValueError(
        f"config.{option} must be that of the HybridConfig, {field}={wanted!r}, got {value!r}:"
        " change one, or take lasp.megatron.hybrid_of(config, like=...)"
    )


def _numbers(scaling: RopeScaling | None) -> tuple[object, ...] | None:
    """What a scaling computes by; its fields may say it in several ways."""
    if scaling is None:
        return None
    ramp = (scaling.original_max_position_embeddings, scaling.beta_fast, scaling.beta_slow)
    factors = (scaling.factor, scaling.rotated_factor, scaling.latent_factor)
    return scaling.rope_type, *ramp, scaling.truncate, *factors


def _configured_kinds(config: TransformerConfig, num_layers: int) -> str | None:
    """The kinds of the layers by ``linear_attention_freq``: every n-th softmax, or zeros are."""
    frequency = config.linear_attention_freq
    if frequency is None:
        return None
    listed = isinstance(frequency, list)
    if len(frequency) != num_layers or not set(frequency) <= {0, 1} if listed else frequency < 1:
        raise ValueError(
            "config.linear_attention_freq must be a number above 0 or a list of"
            f" {num_layers} ones (lightning) and zeros (softmax), got {frequency}: give one for"
            " each attention layer"
        )
    linear = frequency if listed else [(index + 1) % frequency for index in range(num_layers)]
    return "".join("G" if of_layer else "*" for of_layer in linear)
