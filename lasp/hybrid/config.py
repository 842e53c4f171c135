"""The description of a hybrid decoder, in plain torch and in Megatron; one small config a part."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

from torch import Tensor

from lasp._core.impl import Impl, check_impl
from lasp.lightning.decay import Variant, check_variant
from lasp.lightning.validation import check_exchange
from lasp.state_exchange import Exchange
from moe_parallel import MoEConfig


@dataclass(frozen=True)
class AttentionConfig:
    """Heads of both kinds of attention; lightning layers have ``num_heads`` of q, k and v each."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotary_dim: int
    rope_base: float = 10_000.0


class ResidualScale(NamedTuple):
    """Weights of a residual and of what is added to it."""

    alpha: float = 1.0
    beta: float = 1.0

    def add(self, residual: Tensor, output: Tensor) -> Tensor:
        """``alpha * residual + beta * output``."""
        return self.alpha * residual + (output if self.beta == 1.0 else self.beta * output)


_UNSCALED = ResidualScale()


@dataclass(frozen=True)
class Residuals:
    """How a layer adds to its input: ``y = alpha r + beta f(norm(x))``.

    Attributes:
        norm: ``pre``, the residual r is x, or ``post``, r is ``norm(x)`` (MiniMax-01).
        lightning: alpha and beta around lightning attention.
        softmax: around softmax attention.
        mlp: around the experts or the dense MLP.
        init_gain: of the initial v, output and expert weights. In Megatron, whose config draws
            all others, of the experts alone.

    Raises:
        ValueError: for another ``norm``.
    """

    norm: Literal["pre", "post"] = "pre"
    lightning: ResidualScale = _UNSCALED
    softmax: ResidualScale = _UNSCALED
    mlp: ResidualScale = _UNSCALED
    init_gain: float = 1.0

    def __post_init__(self) -> None:
        if self.norm not in ("pre", "post"):
            raise ValueError(
                f"norm must be 'pre' or 'post', got {self.norm!r}: 'post' is MiniMax-01's"
            )

    @classmethod
    def deepnorm(cls, num_layers: int) -> Residuals:
        """Post-norm with alpha (2 N)^(1/4), beta 1 and gain (8 N)^(-1/4), arXiv:2203.00555."""
        scale = ResidualScale(alpha=math.pow(2 * num_layers, 0.25))
        return cls("post", scale, scale, scale, init_gain=math.pow(8 * num_layers, -0.25))


@dataclass(frozen=True)
class HybridConfig:
    """A hybrid decoder, for :class:`lasp.hybrid.HybridModel` and the specs of ``lasp.megatron``.

    Attributes:
        num_layers: all layers.
        vocab_size: rows of the embedding and of the untied head. Megatron's models take theirs, a
            multiple of the tensor parallel ranks, as an argument.
        attention: heads of the attention layers.
        moe: the expert layer in every decoder layer; its ``hidden_size`` is the model's. None:
            a dense MLP, in Megatron alone, whose config has its size.
        pattern: the kinds of the layers: "7:1", seven lightning layers and a softmax layer in turn,
            or one symbol a layer, "GG*G", G lightning and * softmax, as in Megatron's HybridModel.
        residuals: norms and residual weights; None: :meth:`Residuals.deepnorm` of ``num_layers``.
        norm_eps: of the residual norms.
        decay: formula of the rates in lightning layers, see ``lasp.lightning.decay``.
        lightning_impl: who computes lightning attention, see :func:`lasp.lightning_attention`.
        exchange: how its states cross the context-parallel ranks, see ``lasp.state_exchange``.

    Raises:
        ValueError: naming the field.
    """

    num_layers: int
    vocab_size: int
    attention: AttentionConfig
    moe: MoEConfig | None
    pattern: str = "7:1"
    residuals: Residuals | None = None
    norm_eps: float = 1e-5
    decay: Variant = "minimax"
    lightning_impl: Impl = "auto"
    exchange: Exchange = "auto"

    def __post_init__(self) -> None:
        for name in ("num_layers", "vocab_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number >= 1, got {value!r}")
        check_impl(self.lightning_impl, "lightning_impl")
        check_exchange(self.exchange)
        check_variant(self.decay, "decay")
        if len(self.kinds) != self.num_layers:
            raise ValueError(
                f"pattern must be 'lightning layers:softmax layers' or {self.num_layers} of G"
                f" (lightning) and * (softmax), got {self.pattern!r}: MiniMax-01's is '7:1'"
            )

    @cached_property
    def kinds(self) -> str:
        """The kind of each layer, G lightning or * softmax."""
        pattern = str(self.pattern)
        match = re.fullmatch(r"(\d+):(\d+)", pattern)
        if match is None:
            return pattern if set(pattern) <= set("G*") else ""
        lightning, softmax = map(int, match.groups())
        return (("G" * lightning + "*" * softmax) * self.num_layers)[: self.num_layers]

    @property
    def residuals_or_deepnorm(self) -> Residuals:
        """``residuals``, by its default if None."""
        return self.residuals or Residuals.deepnorm(self.num_layers)


MINIMAX_TEXT_01 = HybridConfig(
    num_layers=80,
    vocab_size=200_064,
    attention=AttentionConfig(
        num_heads=64, num_kv_heads=8, head_dim=128, rotary_dim=64, rope_base=10_000_000.0
    ),
    moe=MoEConfig(hidden_size=6144, ffn_size=9216, num_experts=32, top_k=2),
)

NAMED_CONFIGS = {"minimax-text-01": MINIMAX_TEXT_01}
