"""Lightning attention as a Megatron-Core layer part, and what all our Megatron parts share.

    TransformerLayerSubmodules(self_attention=lightning_attention_spec(), ...)

Tensor parallel over heads, sequence parallel, context parallel through the layout of the batch. No
TransformerEngine, no Apex, no patch of Megatron.
"""

from __future__ import annotations

from lasp.megatron.version import record_moe_loss  # isort: skip  (it refuses other versions)
from lasp.megatron.attention import (
    LightningSelfAttention,
    LightningSelfAttentionSubmodules,
    lightning_attention_spec,
    merge_projections,
    split_projections,
)
from lasp.megatron.batch import PackedSequence, layout_of, order_of_rows, shard_batch
from lasp.megatron.common import (
    groups_of,
    parameter_device,
    refuse_arguments,
    require,
    training_argument,
)
from lasp.megatron.norm import HeadsNorm, ResidualNorm
from lasp.megatron.packs import (
    PackedCut,
    check_packed_cut,
    cut_of_training_loop,
    names_padding,
)
from lasp.megatron.positions import check_positions

__all__ = [
    "HeadsNorm",
    "LightningSelfAttention",
    "LightningSelfAttentionSubmodules",
    "PackedCut",
    "PackedSequence",
    "ResidualNorm",
    "check_packed_cut",
    "check_positions",
    "cut_of_training_loop",
    "groups_of",
    "layout_of",
    "lightning_attention_spec",
    "merge_projections",
    "names_padding",
    "order_of_rows",
    "parameter_device",
    "record_moe_loss",
    "refuse_arguments",
    "require",
    "shard_batch",
    "split_projections",
    "training_argument",
]
