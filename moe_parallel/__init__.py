"""Mixture-of-experts layers over EP x ETP ranks."""

from moe_parallel.config import MoEConfig, RouterConfig
from moe_parallel.dense import DenseLayer
from moe_parallel.dispatch.symmetric_memory import SymmetricMemory
from moe_parallel.layer import ExpertParallelMoE, MoEOutput
from moe_parallel.pipeline.timeline import Timeline
from moe_parallel.router.bias import update_expert_bias
from moe_parallel.router.counts import RoutingStats
from moe_parallel.router.losses import TokenSequences
from moe_parallel.router.scores import RoutingReplay
from moe_parallel.router.token_order import TokenOrder, TokenSegment
from moe_parallel.sharding import distribute_experts, parameter_groups
from moe_parallel.static_shapes import check_max_rows
from moe_parallel.topology import ExpertGroups, ExpertTopology, ParallelGroups
from moe_parallel.wrappers import apply_ddp, apply_fsdp, clip_grad_norm_

__all__ = [
    "DenseLayer",
    "ExpertGroups",
    "ExpertParallelMoE",
    "ExpertTopology",
    "MoEConfig",
    "MoEOutput",
    "ParallelGroups",
    "RouterConfig",
    "RoutingReplay",
    "RoutingStats",
    "SymmetricMemory",
    "Timeline",
    "TokenOrder",
    "TokenSegment",
    "TokenSequences",
    "apply_ddp",
    "apply_fsdp",
    "check_max_rows",
    "clip_grad_norm_",
    "distribute_experts",
    "parameter_groups",
    "update_expert_bias",
]
