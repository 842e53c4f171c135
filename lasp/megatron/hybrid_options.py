"""What hybrid layers do not support of Megatron's options, whatever the model."""

from __future__ import annotations

from megatron.core.transformer.transformer_config import TransformerConfig

from lasp.megatron.checks import require

PART = "hybrid layers"


def check_layers(config: TransformerConfig) -> None:
    """Raise ValueError, naming the option, for what hybrid layers do not support."""
    require(config, PART, hidden_dropout=0.0, attention_dropout=0.0)
    require(config, PART, apply_residual_connection_post_layernorm=False)
    require(config, PART, fp32_residual_connection=False, overlap_moe_expert_parallel_comm=False)
    require(config, PART, fine_grained_activation_offloading=False, heterogeneous_block_specs=False)
    require(config, PART, experimental_attention_variant=None)
    # Ring attention reads these, but a HybridConfig has none of them.
    require(config, PART, window_size=None, softmax_type="vanilla")
    require(config, PART, no_rope_freq=None)
    require(config, PART, enable_mhc_connections=False, mlp_chunks_for_training=1)
    modules = set(config.recompute_modules or ()) if config.recompute_granularity else set()
    if config.recompute_granularity == "selective" and not modules <= {"core_attn", "moe"}:
        raise ValueError(
            "config.recompute_modules must be among ['core_attn', 'moe'] for hybrid layers, got"
            f" {sorted(modules)}: name these alone, or set recompute_granularity 'full'"
        )


def check_block(config: TransformerConfig) -> None:
    """The same for layers of a TransformerBlock, whose checkpoint keys an option decides."""
    check_layers(config)
    freq = config.linear_attention_freq
    if (isinstance(freq, list) or (freq or 0) > 1) or config.hetereogenous_dist_checkpoint:
        return
    raise ValueError(
        f"config.linear_attention_freq must be above 1 or a list for hybrid layers, got {freq}: it"
        " gives the layers of a checkpoint keys of their own; set 8 for the pattern '7:1', a list"
        " for any other"
    )
