"""The small models that the training examples share."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from hybrid_training.corpus import VOCAB_SIZE
from lasp import LightningOptions
from lasp.hybrid import (
    AttentionConfig,
    DenseConfig,
    HybridConfig,
    LatentConfig,
    Residuals,
    ResidualScale,
    VocabularyConfig,
)
from moe_parallel import MoEConfig, RouterConfig

Name = Literal["minimax", "ling", "sala"]


def small_hybrid(
    capacity_factor: float,
    *,
    drop_policy: Literal["position", "probability"] = "position",
    impl: Literal["auto", "eager", "triton"] = "auto",
    name: Name = "minimax",
) -> HybridConfig:
    """A model at hidden size 64: 8 layers (7 lightning, 1 softmax), 8 experts.

    Args:
        capacity_factor: of the experts; negative for dropless.
        drop_policy: which tokens a full expert drops.
        impl: who computes lightning attention.
        name: whose shape: MiniMax-Text-01, Ling-2.5, or MiniCPM-SALA, which has no experts.
    """
    minimax = HybridConfig(
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
    return {"minimax": minimax, "ling": ling_like(minimax), "sala": sala_like(minimax)}[name]


def ling_like(model: HybridConfig) -> HybridConfig:
    """Ling-2.5's layers: latent attention, norms of heads, sigmoid scores with a bias, pre-norm."""
    assert model.moe is not None
    router = RouterConfig("sigmoid", scaling=2.5, expert_bias=True, num_groups=4, top_groups=2)
    latent = LatentConfig(
        kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16, q_lora_rank=48
    )
    return replace(
        model,
        attention=AttentionConfig(6, 6, 16, rotary_dim=8, latent=latent),
        moe=replace(model.moe, top_k=4, ffn_size=32, router=router, shared_ffn_size=32),
        dense=DenseConfig(hidden_size=64, ffn_size=160, num_layers=1),
        lightning=LightningOptions(
            activation="none", qk_norm=True, rotary_dim=8, scale=None, norm_groups=2
        ),
        residuals=Residuals(),
        decay="bailing",
    )


def sala_like(model: HybridConfig) -> HybridConfig:
    """MiniCPM-SALA's layers: no positions in gated softmax layers, dense MLPs, muP scales."""
    residual = ResidualScale(beta=1.4 / model.num_layers**0.5)
    return replace(
        model,
        attention=AttentionConfig(6, 2, 16, rotary_dim=0, gated=True),
        moe=None,
        dense=DenseConfig(hidden_size=64, ffn_size=192),
        pattern="*GGGGGG*",
        lightning=LightningOptions(activation="none", qk_norm=True, rotary_dim=16, scale=None),
        vocabulary=VocabularyConfig(embedding_scale=4.0, logit_scale=0.5),
        residuals=Residuals("pre", residual, residual, residual),
        decay="sala",
    )
