"""Named models, as their released configs have them.

Sources: MiniMax-AI/MiniMax-01 and MiniMax-M1 ``config.json`` (the same shapes, other weights);
openbmb/MiniCPM-SALA ``config.json`` and arXiv:2602.11761; inclusionAI/Ring-mini-linear-2.0
``config.json`` and arXiv:2510.19338. No config was seen of Ring-flash-linear-2.0, nor of
Ling-2.5-1T and Ring-2.5-1T, which have one shape: their sizes are those of Ling-flash-2.0, Ling-1T
and Ling-2.6-flash and give the published numbers of parameters. Compare ``rope_base``,
``norm_groups``, ``latent`` and the dense layers with the config of the weights that you load.

Warning: MiniCPM-SALA's softmax layers choose blocks of keys (InfLLM-V2) in contexts of 8192 tokens,
``dense_len`` of its config, and more. Here they are dense attention, the same model below; longer
documents are refused unless ``attention.dense_len`` is set to None.
"""

from __future__ import annotations

from dataclasses import replace

from lasp.hybrid.attention import AttentionConfig, LatentConfig
from lasp.hybrid.config import DenseConfig, HybridConfig, Residuals, ResidualScale, VocabularyConfig
from lasp.layers.options import LightningOptions
from moe_parallel import MoEConfig, RouterConfig

MINIMAX_TEXT_01 = HybridConfig(
    num_layers=80,
    vocab_size=200_064,
    attention=AttentionConfig(
        num_heads=64, num_kv_heads=8, head_dim=128, rotary_dim=64, rope_base=10_000_000.0
    ),
    moe=MoEConfig(hidden_size=6144, ffn_size=9216, num_experts=32, top_k=2),
)

_LING_ROUTER = RouterConfig("sigmoid", scaling=2.5, expert_bias=True, num_groups=8, top_groups=4)


def _ling_experts(hidden_size: int, ffn_size: int) -> MoEConfig:
    """Experts of inclusionAI's models: 8 of 256, and one more for every token."""
    return MoEConfig(
        hidden_size,
        ffn_size,
        num_experts=256,
        top_k=8,
        router=_LING_ROUTER,
        shared_ffn_size=ffn_size,
    )


def _ling_layers(norm_groups: int, rope_base: float) -> LightningOptions:
    """Lightning layers of inclusionAI's models: half of each head is rotated."""
    return LightningOptions(
        activation="none",
        qk_norm=True,
        rotary_dim=64,
        rope_base=rope_base,
        scale=None,
        norm_groups=norm_groups,
    )


_SALA_RESIDUAL = ResidualScale(beta=1.4 / 32**0.5)

MINICPM_SALA = HybridConfig(
    num_layers=32,
    vocab_size=73_448,
    attention=AttentionConfig(
        num_heads=32, num_kv_heads=2, head_dim=128, rotary_dim=0, gated=True, dense_len=8192
    ),
    moe=None,
    dense=DenseConfig(hidden_size=4096, ffn_size=16_384),
    pattern="*GGGGGGGG*GGGGGG**GGGG*GGGGGG***",
    lightning=LightningOptions(
        activation="none", qk_norm=True, rotary_dim=128, rope_base=10_000.0, scale=None
    ),
    vocabulary=VocabularyConfig(embedding_scale=12.0, logit_scale=256 / 4096),
    residuals=Residuals("pre", _SALA_RESIDUAL, _SALA_RESIDUAL, _SALA_RESIDUAL),
    norm_eps=1e-6,
    decay="sala",
)

RING_MINI_LINEAR_2_0 = HybridConfig(
    num_layers=20,
    vocab_size=157_184,
    attention=AttentionConfig(16, 4, 128, rotary_dim=64, rope_base=1_000_000.0, qk_norm=True),
    moe=_ling_experts(hidden_size=2048, ffn_size=512),
    pattern="4:1",
    dense=DenseConfig(hidden_size=2048, ffn_size=5120, num_layers=1),
    lightning=_ling_layers(norm_groups=4, rope_base=1_000_000.0),
    residuals=Residuals(),
    norm_eps=1e-6,
    decay="bailing",
)

RING_FLASH_LINEAR_2_0 = replace(
    RING_MINI_LINEAR_2_0,
    num_layers=32,
    attention=replace(RING_MINI_LINEAR_2_0.attention, num_heads=32),
    moe=_ling_experts(hidden_size=4096, ffn_size=1024),
    pattern="7:1",
    dense=DenseConfig(hidden_size=4096, ffn_size=9216, num_layers=1),
)

LING_2_5_1T = HybridConfig(
    num_layers=80,
    vocab_size=157_184,
    attention=AttentionConfig(
        num_heads=64,
        num_kv_heads=64,
        head_dim=128,
        rotary_dim=64,
        rope_base=6_000_000.0,
        latent=LatentConfig(
            kv_lora_rank=512,
            qk_nope_head_dim=128,
            qk_rope_head_dim=64,
            v_head_dim=128,
            q_lora_rank=1536,
            rope_interleaved=True,
        ),
    ),
    moe=_ling_experts(hidden_size=8192, ffn_size=2048),
    dense=DenseConfig(hidden_size=8192, ffn_size=18_432, num_layers=4),
    lightning=_ling_layers(norm_groups=8, rope_base=6_000_000.0),
    residuals=Residuals(),
    norm_eps=1e-6,
    decay="bailing",
)

NAMED_CONFIGS = {
    "minimax-text-01": MINIMAX_TEXT_01,
    "minimax-m1": MINIMAX_TEXT_01,
    "minicpm-sala": MINICPM_SALA,
    "ring-mini-linear-2.0": RING_MINI_LINEAR_2_0,
    "ring-flash-linear-2.0": RING_FLASH_LINEAR_2_0,
    "ling-2.5-1t": LING_2_5_1T,
    "ring-2.5-1t": LING_2_5_1T,
}
