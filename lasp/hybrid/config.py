"""The description of a hybrid decoder, in plain torch and in Megatron; one small config a part."""

from __future__ import annotations

import math
import re
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lasp._core.checks import (
    check_finite,
    check_flags,
    check_one_of,
    check_part,
    check_positive,
    check_positive_or_none,
    check_sizes,
    check_sizes_or_none,
)
from lasp._core.impl import Impl, check_impl
from lasp.hybrid.attention import AttentionConfig
from lasp.layers.options import MINIMAX_OPTIONS, LightningOptions
from lasp.lightning.decay import Variant, check_rates, check_variant
from lasp.lightning.validation import check_exchange
from lasp.state_exchange import Exchange
from moe_parallel import MoEConfig


class ResidualScale(NamedTuple):
    """Weights of a residual and of what is added to it."""

    alpha: float = 1.0
    beta: float = 1.0

    def add(self, residual: Tensor, output: Tensor) -> Tensor:
        """``alpha * residual + beta * output``."""
        if self.beta == 1.0:  # one pass, rounded once
            return torch.add(output, residual, alpha=self.alpha)
        return self.alpha * residual + self.beta * output


_UNSCALED = ResidualScale()
Norm = Literal["pre", "post"]


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
        ValueError: naming the field.
    """

    norm: Norm = "pre"
    lightning: ResidualScale = _UNSCALED
    softmax: ResidualScale = _UNSCALED
    mlp: ResidualScale = _UNSCALED
    init_gain: float = 1.0

    def __post_init__(self) -> None:
        check_one_of(Norm, norm=self.norm)
        for name in ("lightning", "softmax", "mlp"):
            scale = getattr(self, name)
            check_part(name, scale, ResidualScale)
            check_finite(**{f"{name}.alpha": scale.alpha, f"{name}.beta": scale.beta})
        check_positive(init_gain=self.init_gain)

    @classmethod
    def deepnorm(cls, num_layers: int) -> Residuals:
        """Post-norm with alpha (2 N)^(1/4), beta 1 and gain (8 N)^(-1/4), arXiv:2203.00555."""
        check_sizes(num_layers=num_layers)
        scale = ResidualScale(alpha=math.pow(2 * num_layers, 0.25))
        return cls("post", scale, scale, scale, init_gain=math.pow(8 * num_layers, -0.25))


@dataclass(frozen=True)
class DenseConfig:
    """The SwiGLU MLP of layers without experts.

    Attributes:
        hidden_size: the model's.
        ffn_size: width of the MLP.
        num_layers: the first so many layers have it, the others experts (Ling, Ring: 1 or more);
            None: every layer, of a model without experts.

    Raises:
        ValueError: naming the field.
    """

    hidden_size: int
    ffn_size: int
    num_layers: int | None = None

    def __post_init__(self) -> None:
        check_sizes(hidden_size=self.hidden_size, ffn_size=self.ffn_size)
        check_sizes_or_none(num_layers=self.num_layers)


@dataclass(frozen=True)
class VocabularyConfig:
    """What is special about the embedding and the head; by default nothing is.

    Attributes:
        tied: the head has the weight of the embedding.
        float32_head: the head and its product are float32 (float64 of a float64 model) whatever
            the rest is: MiniMax-M1's remedy for probabilities of trainer and server that differ.
            With a tied head only the product is float32; its weight has the dtype of the embedding.
        embedding_scale: factor of the embedded tokens (muP).
        logit_scale: factor of the logits (muP).
    """

    tied: bool = False
    float32_head: bool = False
    embedding_scale: float = 1.0
    logit_scale: float = 1.0

    def __post_init__(self) -> None:
        check_flags(tied=self.tied, float32_head=self.float32_head)
        check_positive(embedding_scale=self.embedding_scale, logit_scale=self.logit_scale)


_USUAL = VocabularyConfig()


@dataclass(frozen=True)
class HybridConfig:
    """A hybrid decoder, for :class:`lasp.hybrid.HybridModel` and the specs of ``lasp.megatron``.

    Attributes:
        num_layers: all layers.
        vocab_size: rows of the embedding and of the head. Megatron's models take theirs, a
            multiple of the tensor parallel ranks, as an argument.
        attention: heads of the attention layers.
        moe: the expert layers; its ``hidden_size`` is the model's. None: every MLP is dense.
        pattern: the kinds of the layers: "7:1", seven lightning layers and a softmax layer in turn,
            or one symbol a layer, "GG*G", G lightning and * softmax, as in Megatron's HybridModel.
        dense: the layers without experts. None: there are none; with ``moe`` None too only
            Megatron's specs, whose config has the size.
        lightning: what lightning layers compute around the attention.
        vocabulary: what is special about embedding and head.
        residuals: norms and residual weights; None: :meth:`Residuals.deepnorm` of ``num_layers``.
        norm_eps: of the residual norms.
        decay: formula of the rates in lightning layers, see ``lasp.lightning.decay``; or the rates
            themselves, float ``[num_layers, num_heads]``, finite and >= 0, of which rows of softmax
            layers are not read. A tensor is kept as tuples.
        num_decay_layers: layers that the formula counts, where the model is the first part of a
            deeper one; None: ``num_layers``, or ``decay`` has the rates.
        mtp_loss_weight: of the loss of a layer that predicts the token after the next, which the
            model then has (``lasp.hybrid.multi_token``); None: it has none.
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
    dense: DenseConfig | None = None
    lightning: LightningOptions = MINIMAX_OPTIONS
    vocabulary: VocabularyConfig = _USUAL
    residuals: Residuals | None = None
    norm_eps: float = 1e-5
    decay: Variant | Tensor | tuple[tuple[float, ...], ...] = "minimax"
    num_decay_layers: int | None = None
    mtp_loss_weight: float | None = None
    lightning_impl: Impl = "auto"
    exchange: Exchange = "auto"

    def __post_init__(self) -> None:
        check_sizes(num_layers=self.num_layers, vocab_size=self.vocab_size)
        self._check_parts()
        check_positive(norm_eps=self.norm_eps)
        check_positive_or_none(mtp_loss_weight=self.mtp_loss_weight)
        check_impl(self.lightning_impl, "lightning_impl")
        check_exchange(self.exchange)
        if isinstance(self.decay, str):
            check_variant(self.decay, "decay")
        else:
            self._keep_rates(self.decay)
        if len(self.kinds) != self.num_layers:
            raise ValueError(
                f"pattern must be 'lightning layers:softmax layers' or {self.num_layers} of G"
                f" (lightning) and * (softmax), got {self.pattern!r}: MiniMax-01's is '7:1'"
            )
        check_sizes_or_none(num_decay_layers=self.num_decay_layers)
        if self.num_decay_layers is not None and self.num_decay_layers < self.num_layers:
            raise ValueError(
                f"num_decay_layers must be at least num_layers {self.num_layers}, got"
                f" {self.num_decay_layers}: it counts all layers of the whole model"
            )
        self._check_dense()

    def _check_parts(self) -> None:
        check_part("attention", self.attention, AttentionConfig)
        check_part("moe", self.moe, MoEConfig, optional=True)
        check_part("dense", self.dense, DenseConfig, optional=True)
        check_part("lightning", self.lightning, LightningOptions)
        check_part("vocabulary", self.vocabulary, VocabularyConfig)
        check_part("residuals", self.residuals, Residuals, optional=True)

    def _keep_rates(self, given: Tensor | tuple[tuple[float, ...], ...]) -> None:
        """Tuples in place of a tensor, so that configs can be compared; float64 of tuples."""
        shape = (self.num_layers, self.attention.num_heads)
        rates = given
        if not isinstance(given, Tensor):
            with suppress(TypeError, ValueError, RuntimeError):  # no numbers, or uneven rows
                rates = torch.tensor(given, dtype=torch.float64, device="cpu")
        is_table = isinstance(rates, Tensor) and rates.is_floating_point() and not rates.is_meta
        if not isinstance(rates, Tensor) or not is_table or rates.shape != shape:
            got = f"a {type(given).__name__}"
            if isinstance(rates, Tensor):
                got = f"{rates.dtype} of {tuple(rates.shape)} on {rates.device}"
            raise ValueError(
                f"decay must be a formula or the float rates of all layers and heads {shape}, got"
                f" {got}: see lasp.lightning.decay"
            )
        if self.num_decay_layers is not None:
            raise ValueError(
                f"num_decay_layers must be None with rates given, got {self.num_decay_layers}: no"
                " formula counts layers"
            )
        rows = tuple(check_rates(tuple(row)) for row in rates.detach().double().tolist())
        object.__setattr__(self, "decay", rows)

    def _check_dense(self) -> None:
        if self.dense is None:
            return
        if self.moe is None and self.dense.num_layers is not None:
            raise ValueError(
                f"dense.num_layers must be None with moe None, got {self.dense.num_layers}: every"
                " layer is dense"
            )
        if self.moe is None:
            return
        if self.dense.hidden_size != self.moe.hidden_size:
            raise ValueError(
                f"dense.hidden_size must be moe.hidden_size {self.moe.hidden_size}, got"
                f" {self.dense.hidden_size}"
            )
        if self.dense.num_layers is None or not 0 < self.dense.num_layers < self.num_layers:
            raise ValueError(
                f"dense.num_layers must be in (0, {self.num_layers}) with moe given, got"
                f" {self.dense.num_layers}: the first layers are dense, the others have experts"
            )

    @cached_property
    def kinds(self) -> str:
        """The kind of each layer, G lightning or * softmax."""
        pattern = str(self.pattern)
        match = re.fullmatch(r"(\d+):(\d+)", pattern)
        if match is None:
            return pattern if set(pattern) <= set("G*") else ""
        lightning, softmax = map(int, match.groups())
        count = self.num_layers
        return (("G" * min(lightning, count) + "*" * min(softmax, count)) * count)[:count]

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream."""
        if (part := self.moe or self.dense) is None:
            raise ValueError(
                "moe or dense must be given, got None for both: without them only Megatron's specs"
                " know the size of the MLPs"
            )
        return part.hidden_size

    @property
    def decay_or_rates(self) -> Variant | Tensor:
        """``decay``, rates as a float64 tensor on the host, ``[num_layers, num_heads]``."""
        if isinstance(self.decay, str):
            return self.decay
        return torch.as_tensor(self.decay, dtype=torch.float64, device="cpu")

    def has_experts(self, layer_index: int) -> bool:
        """Whether a layer has experts; without them it has a dense MLP."""
        first = 0 if self.dense is None else self.dense.num_layers
        return self.moe is not None and first is not None and layer_index >= first

    @property
    def residuals_or_deepnorm(self) -> Residuals:
        """``residuals``, by its default if None."""
        return self.residuals or Residuals.deepnorm(self.num_layers)
