"""Ring attention as Megatron-Core layer parts.

    SelfAttentionSubmodules.core_attention = RingCoreAttention     Megatron's RoPE, rows over ranks
    TransformerLayer.self_attention = ring_attention_spec(...)     packs in any order of the layout

Megatron's own torch attention refuses context parallelism and packed sequences; this is both.
"""

from __future__ import annotations

import lasp.megatron  # isort: skip  # noqa: F401 (first: it refuses other versions of Megatron)
from ring.megatron.core import RingCoreAttention
from ring.megatron.self_attention import RingSelfAttention, ring_attention_spec

__all__ = ["RingCoreAttention", "RingSelfAttention", "ring_attention_spec"]
