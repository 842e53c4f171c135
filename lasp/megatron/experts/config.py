"""What our MoE layer computes, out of Megatron's options, and which of them it refuses."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from lasp._core.checks import check_part
from lasp._core.impl import Impl
from lasp.megatron.checks import require
from lasp.megatron.experts.router import aux_losses, router_config
from moe_parallel.config import DropPolicy, Gemm, MoEConfig, Send
from moe_parallel.dispatch.symmetric_memory import SymmetricMemory

PART = "the expert-parallel MoE layer"
_POLICIES: dict[str, DropPolicy] = {"position": "position", "probs": "probability"}
_WANTED: dict[str, object] = {
    # experts: SwiGLU, weighted when their outputs come home
    "activation_func": nn.functional.silu,
    "activation_func_clamp_value": None,
    "add_bias_linear": False,
    "gated_linear_unit": True,
    "glu_linear_offset": 0.0,
    "moe_apply_probs_on_input": False,
    "moe_latent_size": None,
    "moe_mlp_glu_interleave_size": None,
    "moe_shared_expert_glu_interleave_size": None,
    # router
    "moe_enable_routing_replay": False,
    "moe_input_jitter_eps": None,
    "moe_router_force_biased": None,
    "moe_router_force_load_balancing": False,
    "moe_router_fusion": False,
    "moe_router_quantile_balancing_ema": 0.0,
    "moe_router_topk_limited_devices": None,
    # exchange
    "fine_grained_activation_offloading": False,
    "moe_combine_bwd_dtype": "bf16",
    "moe_dispatch_fwd_dtype": "bf16",
    "moe_enable_deepep": False,
    "moe_expert_rank_capacity_factor": None,
    "moe_extended_tp": False,
    "moe_paged_stash": False,
    "moe_permute_fusion": False,
    "moe_router_padding_for_quantization": False,
    "overlap_dispatch_backward_with_experts_wgrad": False,
    "overlap_moe_expert_parallel_comm": False,
}


@dataclass(frozen=True)
class ExpertOptions:
    """What Megatron has no options for: see :class:`moe_parallel.MoEConfig`, which checks them.

    Attributes:
        gemm: how the experts multiply.
        overlap_groups: into how many groups a rank's experts are cut; None: by a rule.
        max_rows: most rows that the experts of one rank may take; None: as many as come.
        impl: of the router, the activation, and the rows of tokens and their sums.
        send: whether tokens cross to a rank once or assignments one by one.
        static_shapes: no shape depends on the routing, and rows beyond ``max_rows`` are dropped:
            what ``moe_expert_rank_capacity_factor`` is for, which Megatron allows its flex backends
            alone. Ask :func:`moe_parallel.check_max_rows` after a step.
        symmetric_memory: memory of the ranks that share experts (Megatron's tp_ep), through which
            rows travel; one object for all layers, see :class:`moe_parallel.SymmetricMemory`.
    """

    gemm: Gemm = "auto"
    overlap_groups: int | None = None
    max_rows: int | None = None
    impl: Impl = "auto"
    symmetric_memory: SymmetricMemory | None = None
    send: Send = "auto"
    static_shapes: bool = False

    @classmethod
    def of(cls, moe: MoEConfig, symmetric_memory: SymmetricMemory | None = None) -> ExpertOptions:
        """Those of a layer's config."""
        options = (moe.gemm, moe.overlap_groups, moe.max_rows, moe.impl)
        return cls(*options, symmetric_memory, moe.send, moe.static_shapes)


DEFAULT_OPTIONS = ExpertOptions()


def moe_config(config: TransformerConfig, options: ExpertOptions = DEFAULT_OPTIONS) -> MoEConfig:
    """What our layer computes, out of Megatron's options and ours.

    Raises:
        ValueError: for options that our layer does not have.
    """
    check_part("options", options, ExpertOptions)
    _check_options(config)
    if config.num_moe_experts is None:
        raise ValueError(
            f"config.num_moe_experts must be a number for {PART}, got None: set it, or take a spec"
            " with a dense MLP"
        )
    return MoEConfig(
        hidden_size=config.hidden_size,
        ffn_size=config.moe_ffn_hidden_size or config.ffn_hidden_size,
        num_experts=config.num_moe_experts,
        top_k=config.moe_router_topk,
        capacity_factor=config.moe_expert_capacity_factor,
        drop_policy=_POLICIES[config.moe_token_drop_policy],
        aux_loss_coefficient=aux_losses(config).get("global_aux_loss", 0.0),
        gemm=options.gemm,
        overlap_groups=options.overlap_groups,
        max_rows=options.max_rows,
        pad_to_capacity=config.moe_pad_expert_input_to_capacity,
        impl=options.impl,
        send=options.send,
        static_shapes=options.static_shapes,
        router=router_config(config),
        shared_ffn_size=config.moe_shared_expert_intermediate_size,
        shared_gate=config.moe_shared_expert_gate,
    )


def _check_options(config: TransformerConfig) -> None:
    """Raise ValueError for options that our layer does not have."""
    require(config, PART, **_WANTED)
    if config.moe_token_dispatcher_type not in ("alltoall", "allgather"):
        raise ValueError(
            f"config.moe_token_dispatcher_type must be 'alltoall' or 'allgather' for {PART}, got"
            f" {config.moe_token_dispatcher_type!r}: it has one exchange of its own, whichever of"
            " the two is set, and none of the flex backends"
        )
    if config.moe_router_dtype == "fp64" and config.params_dtype != torch.float64:
        raise ValueError(
            "config.moe_router_dtype must be None or 'fp32' with parameters of"
            f" {config.params_dtype}, got 'fp64': the router computes in float32 then"
        )
    modules = set(config.recompute_modules or ())
    if config.recompute_granularity == "selective" and modules & {"moe_act", "shared_experts"}:
        raise ValueError(
            f"config.recompute_modules must be without 'moe_act' and 'shared_experts' for {PART},"
            f" got {sorted(modules)}: name 'moe', which recomputes all of it"
        )
    if config.tensor_model_parallel_size > 1 and not config.sequence_parallel:
        raise ValueError(
            "config.sequence_parallel must be True with tensor parallelism, got False: every rank"
            " passes tokens of its own to the experts"
        )
    padded = config.moe_pad_expert_input_to_capacity
    if padded and config.moe_token_drop_policy != "position":
        raise ValueError(
            "config.moe_token_drop_policy must be 'position' with moe_pad_expert_input_to_capacity"
            f" for {PART}, got {config.moe_token_drop_policy!r}: each rank keeps the first of its"
            " assignments to an expert"
        )
    if padded and config.moe_expert_capacity_factor is None:
        raise ValueError(
            "config.moe_expert_capacity_factor must be a number with"
            " moe_pad_expert_input_to_capacity, got None: padding needs a size"
        )


def check_groups(moe: MoEConfig, groups: ProcessGroupCollection) -> None:
    """Raise ValueError unless the experts divide over the ranks."""
    for what, size, group in (
        ("num_moe_experts", moe.num_experts, groups.ep),
        ("moe_ffn_hidden_size", moe.ffn_size, groups.expt_tp),
    ):
        if size % group.size():
            raise ValueError(
                f"config.{what} must divide over {group.size()} ranks, got {size}: choose another"
                " expert_model_parallel_size or expert_tensor_parallel_size"
            )
