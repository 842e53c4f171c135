"""The three operators as layers of Megatron-Core, and the hybrid model made of them.

    GPTModel(config, hybrid_block_spec(config, hybrid), ..., position_embedding_type="none")
    TransformerLayerSubmodules(self_attention=lightning_attention_spec(), ...)

or, where Megatron wants one static object, ``--spec lasp.megatron minimax_layer_spec``. Tensor
parallel over heads, sequence parallel, context parallel through the layout of the batch. No
TransformerEngine, no Apex, no patch of Megatron.
"""

from __future__ import annotations

import lasp.megatron.version  # noqa: F401 (it refuses other versions)  # isort: skip
from lasp.megatron.batch import PackedSequence, layout_of, order_of_rows, shard_batch
from lasp.megatron.convert import load_plain_weights, plain_weights
from lasp.megatron.experts import (
    ExpertOptions,
    ExpertParallelMoELayer,
    expert_parallel_moe_spec,
    moe_config,
)
from lasp.megatron.hybrid_config import hybrid_of
from lasp.megatron.hybrid_layer import (
    HybridTransformerLayer,
    HybridTransformerLayerSubmodules,
    hybrid_block_spec,
    hybrid_layer_spec,
    minimax_layer_spec,
)
from lasp.megatron.lightning import (
    LightningSelfAttention,
    LightningSelfAttentionSubmodules,
    lightning_attention_spec,
)
from lasp.megatron.loss import fused_loss
from lasp.megatron.multi_token import hybrid_mtp_spec
from lasp.megatron.names import (
    merge_projections,
    split_projections,
    to_megatron,
    to_plain,
)
from lasp.megatron.norm import ResidualNorm
from lasp.megatron.packing import share_packs
from lasp.megatron.packs import PackedCut, cut_of_training_loop
from lasp.megatron.ring import RingSelfAttention, ring_attention_spec
from lasp.megatron.ring_core import RingCoreAttention
from lasp.megatron.ring_latent import RingLatentSelfAttention, ring_latent_attention_spec

__all__ = [
    "ExpertOptions",
    "ExpertParallelMoELayer",
    "HybridTransformerLayer",
    "HybridTransformerLayerSubmodules",
    "LightningSelfAttention",
    "LightningSelfAttentionSubmodules",
    "PackedCut",
    "PackedSequence",
    "ResidualNorm",
    "RingCoreAttention",
    "RingLatentSelfAttention",
    "RingSelfAttention",
    "cut_of_training_loop",
    "expert_parallel_moe_spec",
    "fused_loss",
    "hybrid_block_spec",
    "hybrid_layer_spec",
    "hybrid_mtp_spec",
    "hybrid_of",
    "layout_of",
    "lightning_attention_spec",
    "load_plain_weights",
    "merge_projections",
    "minimax_layer_spec",
    "moe_config",
    "order_of_rows",
    "plain_weights",
    "ring_attention_spec",
    "ring_latent_attention_spec",
    "shard_batch",
    "share_packs",
    "split_projections",
    "to_megatron",
    "to_plain",
]
