"""What a hybrid layer needs beside Megatron's config, and what of that it refuses."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

from megatron.core.transformer.transformer_config import TransformerConfig

from lasp._core.impl import Impl, check_impl
from lasp.hybrid.pattern import is_softmax
from lasp.lightning.decay import Variant
from lasp.lightning.validation import check_exchange
from lasp.megatron.checks import require
from lasp.megatron.experts.config import ExpertOptions
from lasp.megatron.packs import PackedCut, check_packed_cut
from lasp.state_exchange import Exchange


class ResidualScale(NamedTuple):
    """``alpha * residual + beta * f(x)``."""

    alpha: float = 1.0
    beta: float = 1.0


_NO_SCALE, _BY_RULES = ResidualScale(), ExpertOptions()


@dataclass(frozen=True)
class HybridOptions:
    """What a hybrid layer needs beside Megatron's TransformerConfig.

    Attributes:
        residual: ``post``, the residual is the *normed* input (MiniMax-01), or ``pre``.
        lightning: residual weights around lightning attention.
        softmax: around softmax attention.
        mlp: around the experts or the dense MLP.
        rotary_dim: rotated dims of each head in softmax layers.
        rope_base: of the wavelengths.
        decay: formula of the decay rates in lightning layers.
        impl: who computes lightning attention, see :func:`lasp.lightning_attention`.
        exchange: how its states cross the context-parallel ranks, see ``lasp.state_exchange``.
        expert_init_gain: factor of the experts' initial values, which Megatron's config draws.
        experts: how the experts compute, see :class:`moe_parallel.megatron.ExpertOptions`.
        packed_cut: how Megatron's own packs are cut over context-parallel ranks, see
            :data:`lasp.megatron.PackedCut`; None: they are refused there.
    """

    residual: Literal["pre", "post"] = "pre"
    lightning: ResidualScale = _NO_SCALE
    softmax: ResidualScale = _NO_SCALE
    mlp: ResidualScale = _NO_SCALE
    rotary_dim: int = 0
    rope_base: float = 10_000.0
    decay: Variant = "minimax"
    impl: Impl = "auto"
    exchange: Exchange = "auto"
    expert_init_gain: float = 1.0
    experts: ExpertOptions = _BY_RULES
    packed_cut: PackedCut | None = None

    def __post_init__(self) -> None:
        if self.residual not in ("pre", "post"):
            raise ValueError(
                f"residual must be 'pre' or 'post', got {self.residual!r}: 'post' is MiniMax-01's"
            )
        check_impl(self.impl)
        check_exchange(self.exchange)
        check_packed_cut(self.packed_cut)
        if self.decay not in get_args(Variant):
            raise ValueError(
                f"decay must be one of {get_args(Variant)}, got {self.decay!r}: see"
                " lasp.lightning.decay"
            )

    @classmethod
    def deepnorm(cls, num_layers: int, **fields: Any) -> HybridOptions:
        """Post-norm with alpha = (2 N)^(1/4), beta 1 and experts drawn (8 N)^(-1/4) smaller."""
        scale = ResidualScale(alpha=math.pow(2 * num_layers, 0.25))
        gain = math.pow(8 * num_layers, -0.25)
        return cls("post", scale, scale, scale, expert_init_gain=gain, **fields)


PRE_NORM = HybridOptions()


def minimax_options(num_layers: int, packed_cut: PackedCut | None = None) -> HybridOptions:
    """MiniMax-Text-01's residuals and RoPE for a model of so many layers; it has 80."""
    rope = {"rotary_dim": 64, "rope_base": 10_000_000.0}
    return HybridOptions.deepnorm(num_layers, **rope, packed_cut=packed_cut)


def softmax_layers(
    config: TransformerConfig, pattern: str | None, num_layers: int
) -> tuple[bool, ...]:
    """For each of ``num_layers`` attention layers whether it is softmax attention.

    Args:
        config: Megatron's; its ``linear_attention_freq`` n makes every n-th layer softmax, a list
            has 1 for lightning and 0 for softmax.
        pattern: see :func:`lasp.hybrid.is_softmax`; None: by ``linear_attention_freq`` alone.
        num_layers: attention layers of the model.

    Raises:
        ValueError: if the two differ, neither is given, or the list is of another length.
    """
    stated = None if pattern is None else tuple(is_softmax(pattern, i) for i in range(num_layers))
    frequency = config.linear_attention_freq
    if frequency is None:
        if stated is None:
            raise ValueError(
                "pattern must be given with config.linear_attention_freq None, got None: set one"
                " of them"
            )
        return stated
    listed = isinstance(frequency, list)
    if len(frequency) != num_layers or not set(frequency) <= {0, 1} if listed else frequency < 1:
        raise ValueError(
            "config.linear_attention_freq must be a number above 0 or a list of"
            f" {num_layers} ones (lightning) and zeros (softmax), got {frequency}: give one for"
            " each attention layer"
        )
    if listed:
        configured = tuple(linear == 0 for linear in frequency)
    else:
        configured = tuple((index + 1) % frequency == 0 for index in range(num_layers))
    if stated not in (None, configured):
        raise ValueError(
            f"config.linear_attention_freq must give the layers of pattern {pattern!r}, got"
            f" {frequency}, which gives {kinds_of(configured)} instead of {kinds_of(stated)} (G"
            " lightning, * softmax): change one, or leave the pattern out"
        )
    return configured


def kinds_of(softmax: Iterable[bool]) -> str:
    """Attention layers in the symbols of HybridModel."""
    return "".join("*" if layer else "G" for layer in softmax)


PART = "hybrid layers"


def check_layers(config: TransformerConfig) -> None:
    """Raise ValueError, naming the option, for what hybrid layers do not support."""
    require(config, PART, hidden_dropout=0.0, attention_dropout=0.0)
    require(config, PART, apply_residual_connection_post_layernorm=False)
    require(config, PART, fp32_residual_connection=False, overlap_moe_expert_parallel_comm=False)
    require(config, PART, fine_grained_activation_offloading=False, heterogeneous_block_specs=False)
    require(config, PART, moe_layer_freq=1, experimental_attention_variant=None)
    require(config, PART, enable_mhc_connections=False, mlp_chunks_for_training=1)
    modules = set(config.recompute_modules or ()) if config.recompute_granularity else set()
    if config.recompute_granularity == "selective" and not modules <= {"core_attn", "moe"}:
        raise ValueError(
            "config.recompute_modules must be among ['core_attn', 'moe'] for hybrid layers, got"
            f" {sorted(modules)}: name these alone, or set recompute_granularity 'full'"
        )


def check_config(config: TransformerConfig) -> None:
    """The same for layers of a TransformerBlock, whose checkpoint keys an option decides."""
    check_layers(config)
    freq = config.linear_attention_freq
    if (isinstance(freq, list) or (freq or 0) > 1) or config.hetereogenous_dist_checkpoint:
        return
    raise ValueError(
        f"config.linear_attention_freq must be above 1 or a list for hybrid layers, got {freq}: it"
        " gives the layers of a checkpoint keys of their own; set 8 for the pattern '7:1', a list"
        " for any other"
    )
