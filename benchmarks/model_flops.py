"""Floating-point operations of a training step of a hybrid model, by one convention.

A product of [m, k] and [k, n] has 2 m k n operations. Counted are the products that the model asks
for, once, whatever is computed again in a backward: those of weights, three times as many with the
backward as without; of lightning attention, a state's update and its read, 2 D^2 each for a token
and head of dim D, and three times that; of softmax attention, scores and weighted values of the
pairs of tokens that the mask of each document lets see each other, and three and a half times that,
since its backward needs the scores again. Norms, activations, rotations, the embedding and the
optimizer count nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from lasp.hybrid import HybridConfig, HybridModel


class StepFlops(NamedTuple):
    """Operations of forward and backward over a whole batch, on all ranks.

    Attributes:
        weights: products of weights with tokens.
        lightning: states of lightning layers.
        softmax: scores and weighted values of softmax layers.
    """

    weights: float
    lightning: float
    softmax: float

    @property
    def total(self) -> float:
        """All of them."""
        return sum(self)


def step_flops(config: HybridConfig, document_lengths: Sequence[int]) -> StepFlops:
    """The operations of one step; ``config`` must be without latent attention."""
    heads = config.attention
    if heads.latent is not None:
        raise ValueError("config must have no latent attention, got some: its products differ")
    tokens = sum(document_lengths)
    inner = heads.num_heads * heads.head_dim
    num_softmax = config.kinds.count("*")
    num_lightning = config.num_layers - num_softmax
    pairs = sum(length * (length + 1) // 2 for length in document_lengths)
    return StepFlops(
        weights=6.0 * _met_weights(config) * tokens,
        lightning=3 * 4.0 * heads.head_dim * inner * tokens * num_lightning,
        softmax=3.5 * 4.0 * inner * pairs * num_softmax,
    )


def _met_weights(config: HybridConfig) -> float:
    """Elements of the matrices that a token is multiplied with, the head's among them."""
    model = HybridModel(config, device="meta")
    dense = sum(
        parameter.numel()
        for name, parameter in model.dense_parameters()
        if parameter.dim() == 2 and not name.startswith("embedding")
    )
    if config.vocabulary.tied:
        dense += model.embedding.weight.numel()
    if config.moe is None:
        return dense
    experts = sum(parameter.numel() for _, parameter in model.expert_parameters())
    return dense + experts * config.moe.top_k / config.moe.num_experts
