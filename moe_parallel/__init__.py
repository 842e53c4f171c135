"""Mixture-of-experts layers over EP x ETP ranks."""

from moe_parallel.config import MoEConfig
from moe_parallel.dispatch.symmetric_memory import SymmetricMemory
from moe_parallel.layer import ExpertParallelMoE, MoEOutput
from moe_parallel.pipeline.timeline import Timeline
from moe_parallel.router.route import RoutingStats
from moe_parallel.router.token_order import TokenOrder, TokenSegment
from moe_parallel.sharding import distribute_experts, parameter_groups
from moe_parallel.topology import ExpertGroups, ExpertTopology, ParallelGroups
from moe_parallel.wrappers import apply_ddp, apply_fsdp, clip_grad_norm_

__all__ = [
    "ExpertGroups",
    "ExpertParallelMoE",
    "ExpertTopology",
    "MoEConfig",
    "MoEOutput",
    "ParallelGroups",
    "RoutingStats",
    "SymmetricMemory",
    "Timeline",
    "TokenOrder",
    "TokenSegment",
    "apply_ddp",
    "apply_fsdp",
    "clip_grad_norm_",
    "distribute_experts",
    "parameter_groups",
]
