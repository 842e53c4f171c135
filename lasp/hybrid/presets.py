"""Named models."""

from __future__ import annotations

from lasp.hybrid.config import AttentionConfig, HybridConfig
from moe_parallel import MoEConfig

MINIMAX_TEXT_01 = HybridConfig(
    num_layers=80,
    vocab_size=200_064,
    attention=AttentionConfig(
        num_heads=64, num_kv_heads=8, head_dim=128, rotary_dim=64, rope_base=10_000_000.0
    ),
    moe=MoEConfig(hidden_size=6144, ffn_size=9216, num_experts=32, top_k=2),
)

NAMED_CONFIGS = {"minimax-text-01": MINIMAX_TEXT_01}
