"""The experts as a Megatron-Core layer: :mod:`lasp.megatron.experts` by the name of its package."""

from lasp.megatron.experts import (
    ExpertOptions,
    ExpertParallelMoELayer,
    expert_parallel_moe_spec,
    moe_config,
)

__all__ = ["ExpertOptions", "ExpertParallelMoELayer", "expert_parallel_moe_spec", "moe_config"]
