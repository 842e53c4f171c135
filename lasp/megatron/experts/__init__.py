"""Experts over EP x ETP ranks under one router decision, as a Megatron-Core MoE layer.

    TransformerLayerSubmodules.mlp = expert_parallel_moe_spec()

The router, its capacity and its auxiliary loss see all tokens of a pipeline stage. Checkpoints have
the keys of Megatron's own MoELayer with SequentialMLP and load either way.
"""

from lasp.megatron.experts.config import ExpertOptions, moe_config
from lasp.megatron.experts.layer import ExpertParallelMoELayer, expert_parallel_moe_spec

__all__ = ["ExpertOptions", "ExpertParallelMoELayer", "expert_parallel_moe_spec", "moe_config"]
