"""Named models, as their released configs have them.

Sources: MiniMax-AI/MiniMax-01 and MiniMax-M1 ``config.json`` (the same shapes, other weights);
openbmb/MiniCPM-SALA ``config.json`` and arXiv:2602.11761.

Warning: MiniCPM-SALA's softmax layers choose blocks of keys (InfLLM-V2) in contexts above 8192
tokens. Here they are dense attention, which is the same model up to 8192 tokens, ``dense_len`` of
its config, and another one beyond.
"""

from __future__ import annotations

from lasp.hybrid.config import (
    AttentionConfig,
    DenseConfig,
    HybridConfig,
    Residuals,
    ResidualScale,
    VocabularyConfig,
)
from lasp.layers.options import LightningOptions
from moe_parallel import MoEConfig

MINIMAX_TEXT_01 = HybridConfig(
    num_layers=80,
    vocab_size=200_064,
    attention=AttentionConfig(
        num_heads=64, num_kv_heads=8, head_dim=128, rotary_dim=64, rope_base=10_000_000.0
    ),
    moe=MoEConfig(hidden_size=6144, ffn_size=9216, num_experts=32, top_k=2),
)

_SALA_RESIDUAL = ResidualScale(beta=1.4 / 32**0.5)

MINICPM_SALA = HybridConfig(
    num_layers=32,
    vocab_size=73_448,
    attention=AttentionConfig(num_heads=32, num_kv_heads=2, head_dim=128, rotary_dim=0, gated=True),
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

NAMED_CONFIGS = {
    "minimax-text-01": MINIMAX_TEXT_01,
    "minimax-m1": MINIMAX_TEXT_01,
    "minicpm-sala": MINICPM_SALA,
}
