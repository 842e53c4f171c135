"""What the Megatron parts refuse: a part, what is set or passed, what the message must name.

The rows are the refusals of docs/megatron.md; tests/megatron/test_refusals.py runs them.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnBackend, AttnMaskType

from lasp.hybrid import DenseConfig, VocabularyConfig
from lasp.megatron import PackedSequence
from lasp.sequence.layout import SequenceLayout
from moe_parallel import RouterConfig
from tests.megatron.attention import HIDDEN
from tests.megatron.block import HYBRID as LIKE
from tests.megatron.block import LING
from tests.megatron.refused_parts import (
    RANKS,
    Row,
    block,
    calls,
    core,
    derived,
    experts,
    hybrid,
    lightning,
    ling,
    norm,
    options,
    ring,
)

EVERYWHERE = {
    "batch_invariant_mode": True,
    "cpu_offloading": True,
    "cuda_graph_impl": "local",
    "fp4": "e2m1",
    "expert_gtp_weight_remat_size": 2,
    "fp8": "hybrid",
    "gtp_weight_remat_size": 2,
    "hierarchical_context_parallel_sizes": [2, 2],
    "hybrid_context_parallel": True,
    "init_model_with_meta_device": True,
    "quant_recipe": "recipe",
    "tp_comm_overlap": True,
    "use_kitchen": True,
    "use_mup": True,
    "use_transformer_engine_op_fuser": True,
}
SOFTMAX = {
    "apply_query_key_layer_scaling": True,
    "attention_backend": AttnBackend.flash,
    "attention_dropout": 0.1,
    "flash_attention_version": 3,
    "log_max_attention_logit": True,
    "qk_clip": True,
    "softmax_type": "other",
    "window_size": (4, 1),
}
OWN_POSITIONS = {
    "apply_rope_fusion": True,
    "fused_single_qkv_rope": True,
    "multi_latent_attention": True,
    "qk_l2_norm": True,
    "rotary_interleaved": True,
}
LATENT = LING.attention
ANY = torch.zeros(1)
TP = {"tp": RANKS}
OTHER_RANKS = PackedSequence(layout=SequenceLayout((4,), 2 * RANKS))
BORDERS = torch.tensor([0, 8], dtype=torch.int32)
MEGATRONS = {"qkv_format": "thd", "cu_seqlens_q": BORDERS, "cu_seqlens_kv": BORDERS}
PER_DOCUMENT = PackedSeqParams(**MEGATRONS)
OTHER_FORMAT = PackedSeqParams(**(MEGATRONS | {"qkv_format": "sbhd"}))
OWN_GROUP = PackedSeqParams(**MEGATRONS, local_cp_size=1)
PACKS = [(OTHER_RANKS, "layout must be for"), (PER_DOCUMENT, "PackedSequence")]
PACKS += [(OTHER_FORMAT, "qkv_format must be 'thd', got 'sbhd'")]
PACK = PackedSequence(layout=SequenceLayout((5, 3), RANKS))
PACKS += [(OWN_GROUP, "local_cp_size must be None")]

ROWS = [
    *(
        row
        for part in (lightning, core, ring, experts, hybrid)
        for row in options(part, **EVERYWHERE)
    ),
    # lightning
    *options(lightning, attention_dropout=0.1, qk_clip=True),
    *options(lightning, add_bias_linear=True, add_qkv_bias=True, mtp_num_layers=1),
    *options(lightning, fine_grained_activation_offloading=True, linear_conv_kernel_dim=2),
    *options(lightning, linear_key_head_dim=64, linear_num_key_heads=8, linear_num_value_heads=8),
    *options(lightning, linear_value_head_dim=64),
    *(Row(lightning, arguments={name: "fast"}) for name in ("impl", "exchange")),
    Row(lightning, {"num_attention_heads": 3}, names="num_attention_heads must divide", sizes=TP),
    *calls(lightning, attention_bias=ANY, inference_context=ANY, inference_params=ANY),
    *calls(lightning, key_value_states=ANY),
    # ring core attention
    *options(core, **SOFTMAX),
    Row(core, arguments={"attention_dropout": 0.1}, names="without dropout"),
    Row(core, arguments={"cp_comm_type": "a2a"}),
    Row(core, arguments={"attention_type": "cross"}, names="must be self-attention"),
    Row(core, arguments={"attn_mask_type": AttnMaskType.padding}),
    *calls(core, attention_bias=ANY, attn_mask_type=AttnMaskType.padding),
    Row(core, passed={"packed_seq_params": PACK}, names="positions_of_layout must be True"),
    # ring self-attention
    *options(ring, **SOFTMAX, **OWN_POSITIONS, fine_grained_activation_offloading=True),
    Row(ring, arguments={"rotary_dim": 3}),
    Row(ring, {"num_attention_heads": 3}, names="num_attention_heads and num_q", sizes=TP),
    Row(ring, {"num_query_groups": 1}, names="num_query_groups must divide", sizes=TP),
    *calls(ring, attention_bias=ANY, inference_context=ANY, inference_params=ANY),
    *calls(ring, key_value_states=ANY, rotary_pos_emb=ANY),
    Row(
        ring,
        arguments={"dense_len": 5},
        passed={"packed_seq_params": PACK},
        names="attention.dense_len must be None or above 5 tokens, the longest document, got 5",
    ),
    # experts
    *options(experts, activation_func=torch.nn.functional.gelu, activation_func_clamp_value=7.0),
    *options(experts, add_bias_linear=True, fine_grained_activation_offloading=True),
    *options(experts, gated_linear_unit=False, glu_linear_offset=1.0),
    *options(experts, moe_apply_probs_on_input=True, moe_enable_routing_replay=True),
    *options(experts, moe_combine_bwd_dtype="mxfp8", moe_dispatch_fwd_dtype="mxfp8"),
    *options(experts, moe_enable_deepep=True, moe_extended_tp=True),
    *options(experts, moe_router_quantile_balancing_ema=0.9, moe_token_dispatcher_type="flex"),
    *options(experts, moe_expert_rank_capacity_factor=1.0, moe_input_jitter_eps=0.1),
    *options(experts, moe_latent_size=4, moe_mlp_glu_interleave_size=32, moe_paged_stash=True),
    *options(experts, moe_permute_fusion=True),
    *(
        Row(experts, {"moe_pad_expert_input_to_capacity": True, name: value}, names=f"{name} must")
        for name, value in (
            ("moe_token_drop_policy", "probs"),
            ("moe_expert_capacity_factor", None),
        )
    ),
    Row(
        experts,
        {"moe_router_dtype": "fp64", "params_dtype": torch.float32},
        names="moe_router_dtype must",
    ),
    *options(experts, moe_router_force_biased=1.0, moe_router_force_load_balancing=True),
    *options(experts, moe_router_fusion=True),
    *options(experts, moe_router_padding_for_quantization=True),
    *options(experts, moe_router_score_function="sqrtsoftplus", moe_router_topk_limited_devices=2),
    *options(experts, overlap_dispatch_backward_with_experts_wgrad=True),
    *options(experts, overlap_moe_expert_parallel_comm=True),
    Row(
        experts,
        {
            "moe_router_load_balancing_type": ["aux_loss", "seq_aux_loss"],
            "moe_aux_loss_coeff": [1, 1],
        },
        names=r"moe_router_load_balancing_type must .* no more than one of",
    ),
    *options(experts, moe_router_load_balancing_type="sinkhorn"),
    Row(experts, {"moe_aux_loss_coeff": [0.1]}, names=r"moe_router_load_balancing_type must"),
    Row(
        experts,
        {"recompute_granularity": "selective", "recompute_modules": ["moe_act"]},
        names=r"config\.recompute_modules must be without 'moe_act'",
    ),
    Row(experts, {"sequence_parallel": False}, sizes=TP),
    Row(experts, {"num_moe_experts": 3}, sizes={"ep": RANKS}),
    *options(experts, num_moe_experts=None),
    Row(experts, {"moe_ffn_hidden_size": 13}, sizes={"tp": RANKS, "etp": RANKS}),
    *calls(experts, intermediate_tensors=ANY),
    # hybrid layers
    *options(hybrid, apply_residual_connection_post_layernorm=True, attention_dropout=0.1),
    *options(hybrid, fine_grained_activation_offloading=True, fp32_residual_connection=True),
    *options(hybrid, heterogeneous_block_specs=True, hidden_dropout=0.1, moe_layer_freq=2),
    *(options(hybrid, linear_attention_freq=freq)[0] for freq in (None, 1)),
    *options(hybrid, enable_mhc_connections=True, experimental_attention_variant="gdn"),
    *options(hybrid, mlp_chunks_for_training=2, overlap_moe_expert_parallel_comm=True),
    *options(hybrid, no_rope_freq=2, qk_layernorm=True, softmax_type="learnable"),
    *options(hybrid, window_size=(4, 0)),
    Row(
        hybrid,
        {"recompute_granularity": "selective", "recompute_modules": ["layernorm"]},
        names=r"config\.recompute_modules must be among",
    ),
    *(Row(part, arguments={"pattern": "7"}) for part in (hybrid, block)),
    *options(block, kv_channels=8, layernorm_epsilon=1e-6, moe_ffn_hidden_size=16),
    *options(block, moe_expert_capacity_factor=2.0, moe_router_topk=3, num_query_groups=4),
    *options(block, num_attention_heads=2, num_layers=6, num_moe_experts=None),
    *options(block, attention_output_gate=True, mtp_num_layers=2),
    Row(block, {"mtp_num_layers": 1}, names="mtp_num_layers=1, must be .* mtp_loss_weight=None"),
    *options(derived, moe_router_fusion=True),
    *(
        Row(part, {"linear_attention_freq": frequency}, {"pattern": "2:1"}, names=names)
        for part in (hybrid, block)
        for frequency, names in (
            (2, r"linear_attention_freq must give .* '2:1', got 2, which gives G\*G\* instead of"),
            ([1, 0, 1, 1], r"got \[1, 0, 1, 1\], which gives G\*GG instead of GG\*G"),
            ([1, 1, 0], r"linear_attention_freq must be .* list of 4 ones"),
        )
    ),
    *(
        Row(block, arguments={name: value}, names=names)
        for name, value, names in (
            (
                "mtp_loss_weight",
                0.1,
                "mtp_loss_scaling_factor, with mtp_num_layers=1, must be that",
            ),
            ("vocabulary", VocabularyConfig(True), r"vocabulary must be VocabularyConfig\(\)"),
            (
                "attention",
                replace(LIKE.attention, gated=True),
                "config.attention_output_gate must be that of the HybridConfig",
            ),
            ("attention", LATENT, "config.multi_latent_attention must be that of the HybridConfig"),
            ("attention", replace(LATENT, gated=True), "attention.gated must be False .* latent"),
            ("attention", replace(LATENT, dense_len=9), "attention.dense_len must be None"),
            (
                "attention",
                replace(LATENT, latent=replace(LATENT.latent, rope_interleaved=False)),
                "attention.latent.rope_interleaved must be True",
            ),
            ("dense", DenseConfig(HIDDEN, 8, 1), "ffn_hidden_size and moe_layer_freq must be that"),
            (
                "moe",
                replace(LIKE.moe, router=RouterConfig("sigmoid")),
                "moe_router_score_function must be that of the HybridConfig",
            ),
            (
                "moe",
                replace(LIKE.moe, shared_ffn_size=8),
                "moe_shared_expert_intermediate_size must be that",
            ),
        )
    ),
    *options(block, hidden_dropout=0.1, linear_attention_freq=1),
    *options(ling, kv_lora_rank=4, q_lora_rank=4, qk_head_dim=6, v_head_dim=8, rotary_base=1e3),
    *options(ling, qk_layernorm=False),
    *(
        Row(ling, given, names="config.rope_type, with .* must be that of the HybridConfig")
        for given in ({"rotary_scaling_factor": 2.0}, {"rope_type": "rope", "mscale_all_dim": 0.0})
    ),
    Row(ling, {"rope_type": "rope"}, names="config.mscale_all_dim must be 0.0"),
    *calls(hybrid, attention_bias=ANY, context=ANY, inference_context=ANY, inference_params=ANY),
    *calls(hybrid, padding_mask=ANY, rotary_pos_emb=ANY),
    # norm
    *options(norm, fused_residual_rmsnorm=True, layernorm_zero_centered_gamma=True),
    *options(norm, normalization="LayerNorm"),
    # groups
    *(
        Row(part, names=rf"pg_collection must have .*'{group}'", without=group)
        for part, missing in (
            (lightning, ("tp", "cp")),
            (core, ("cp",)),
            (ring, ("tp", "cp")),
            (experts, ("tp", "cp", "ep", "expt_tp", "expt_dp", "tp_ep", "tp_dp_cp")),
            (hybrid, ("pp", "tp", "cp", "ep")),
        )
        for group in missing
    ),
    *(
        Row(part, names="pg_collection must be given", without="all")
        for part in (lightning, core, ring, experts, hybrid, block)
    ),
    # batches
    *(
        Row(part, passed={"packed_seq_params": pack}, names=names)
        for part in (lightning, core, ring, hybrid)
        for pack, names in PACKS
    ),
]
