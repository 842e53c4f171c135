"""Shapes of hybrid decoders; one small config a component."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lasp._core.impl import Impl
from lasp.hybrid.pattern import is_softmax
from moe_parallel import MoEConfig


@dataclass(frozen=True)
class AttentionConfig:
    """Heads of both kinds of attention; lightning layers have ``num_heads`` of q, k and v each."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotary_dim: int
    rope_base: float = 10_000.0


@dataclass(frozen=True)
class HybridConfig:
    """Shape of a hybrid decoder.

    Attributes:
        num_layers: all layers.
        vocab_size: rows of the embedding and of the untied head.
        attention: heads of the attention layers.
        moe: the expert layer in every decoder layer; its ``hidden_size`` is the model's.
        pattern: lightning and softmax layers in turn, see :func:`lasp.hybrid.is_softmax`.
        norm_eps: of the residual norms.
        lightning_impl: who computes lightning attention, see :func:`lasp.lightning_attention`.

    Raises:
        ValueError: if ``num_layers`` or ``vocab_size`` is below 1, or ``pattern`` is not one.
    """

    num_layers: int
    vocab_size: int
    attention: AttentionConfig
    moe: MoEConfig
    pattern: str = "7:1"
    norm_eps: float = 1e-5
    lightning_impl: Impl = "auto"

    def __post_init__(self) -> None:
        for name in ("num_layers", "vocab_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        is_softmax(self.pattern, 0)

    @property
    def deepnorm_alpha(self) -> float:
        """Weight of the residual, (2 N)^(1/4)."""
        return math.pow(2 * self.num_layers, 0.25)

    @property
    def deepnorm_beta(self) -> float:
        """Gain of the initial v, output and expert weights, (8 N)^(-1/4)."""
        return math.pow(8 * self.num_layers, -0.25)

    def is_softmax(self, layer_index: int) -> bool:
        """Whether this layer (from 0) is softmax attention."""
        return is_softmax(self.pattern, layer_index)


MINIMAX_TEXT_01 = HybridConfig(
    num_layers=80,
    vocab_size=200_064,
    attention=AttentionConfig(
        num_heads=64, num_kv_heads=8, head_dim=128, rotary_dim=64, rope_base=10_000_000.0
    ),
    moe=MoEConfig(hidden_size=6144, ffn_size=9216, num_experts=32, top_k=2),
)

NAMED_CONFIGS = {"minimax-text-01": MINIMAX_TEXT_01}
