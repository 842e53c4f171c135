"""The small model that the training examples share."""

from __future__ import annotations

from typing import Literal

from hybrid_training.corpus import VOCAB_SIZE
from lasp.hybrid import AttentionConfig, HybridConfig
from moe_parallel import MoEConfig


def small_hybrid(
    capacity_factor: float,
    *,
    drop_policy: Literal["position", "probability"] = "position",
    impl: Literal["auto", "eager", "triton"] = "auto",
) -> HybridConfig:
    """MiniMax-Text-01's shape at hidden size 64: 8 layers (7 lightning, 1 softmax), 8 experts.

    Args:
        capacity_factor: of the experts; negative for dropless.
        drop_policy: which tokens a full expert drops.
        impl: who computes lightning attention.
    """
    return HybridConfig(
        num_layers=8,
        vocab_size=VOCAB_SIZE,
        attention=AttentionConfig(num_heads=6, num_kv_heads=2, head_dim=16, rotary_dim=8),
        moe=MoEConfig(
            hidden_size=64,
            ffn_size=64,
            num_experts=8,
            top_k=2,
            capacity_factor=None if capacity_factor < 0 else capacity_factor,
            drop_policy=drop_policy,
            aux_loss_coefficient=0.01,
        ),
        lightning_impl=impl,
    )
