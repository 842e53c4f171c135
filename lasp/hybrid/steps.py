"""What steps of a hybrid model over a cache are made of: tokens, batches, checks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lasp.generation.cache import GenerationCache
from lasp.generation.step import CacheStep
from lasp.hybrid.packing import PackedBatch, router_order
from lasp.sequence.layout import SequenceLayout
from moe_parallel import TokenOrder, TokenSegment

if TYPE_CHECKING:
    from lasp.hybrid.model import HybridModel

Tokens = Sequence[int] | Tensor


def check_ready(model: HybridModel, cache: GenerationCache) -> None:
    """:func:`check_model`, and raise ValueError in training mode."""
    check_model(model, cache)
    if model.training:
        raise ValueError(
            "the model must be in eval mode to generate, got training mode: capacities would drop"
            " tokens; call model.eval()"
        )


def check_model(model: HybridModel, cache: GenerationCache) -> None:
    """Raise ValueError unless the cache is of this model as it is now, ready to generate."""
    weight = model.embedding.weight
    if not isinstance(cache, GenerationCache) or cache.model() is not model:
        raise ValueError(
            "cache must be one of this model, got one of another: make it by model.new_cache()"
        )
    if (weight.dtype, weight.device) != (cache.shape.dtype, cache.device):
        raise ValueError(
            f"cache must have dtype and device of the model, {weight.dtype} on {weight.device}, got"
            f" {cache.shape.dtype} on {cache.device}: make a new one after the model is moved"
        )
    if cache.cp_group is not model.groups.cp:
        raise ValueError(
            "cache must be over the cp group of the model, got one over another group: make it by"
            " model.new_cache() after the groups are set"
        )


def packed(
    tokens: Sequence[Tokens] | Tensor, vocab_size: int, device: torch.device
) -> tuple[Tensor, list[int]]:
    """All new tokens end to end on the device, and how many there are of each document.

    Raises:
        ValueError: unless they are whole numbers, those on the host below ``vocab_size``.
    """
    if isinstance(tokens, Tensor) and tokens.dim() == 2:
        counts, pack = [tokens.shape[1]] * len(tokens), tokens.flatten()
    else:
        try:
            parts = [torch.as_tensor(part) for part in tokens]
        except (TypeError, ValueError):
            raise ValueError(
                f"tokens must be ids, [[1, 2]] for one text, got {tokens!r}: encode texts before"
            ) from None
        counts = [part.numel() for part in parts]
        if not parts or 0 in counts or any(part.dim() != 1 for part in parts):
            raise ValueError(
                "tokens must be given for every slot, a list of at least one id each, got shapes"
                f" {[tuple(part.shape) for part in parts]}: an empty prompt has nothing to continue"
            )
        pack = parts[0] if len(parts) == 1 else torch.cat(parts)
    if pack.is_floating_point() or pack.dtype == torch.bool:
        raise ValueError(f"tokens must be whole numbers, got {pack.dtype}")
    if pack.device.type == "cpu":  # a look at others would wait for the device
        low, high = (int(x) for x in pack.aminmax())
        if low < 0 or high >= vocab_size:
            raise ValueError(
                f"tokens must be ids in [0, {vocab_size}), got {low if low < 0 else high}: is this"
                " the tokenizer of the model?"
            )
    return pack.to(device, torch.int64), counts


def batch_of(model: HybridModel, plan: CacheStep) -> PackedBatch:
    """The batch of a step, as the model takes it."""
    token_group = model.groups.token
    num_ranks = 1 if token_group is None else token_group.size()
    if plan.few:
        return PackedBatch(plan.layout, _order_of_few(plan.layout.num_tokens, num_ranks))
    num_replicas = num_ranks // plan.layout.num_ranks
    return PackedBatch(plan.layout, _order_of_cut(plan.layout, num_replicas))


@lru_cache(maxsize=256)  # the ranks compare each order once
def _order_of_few(num_tokens: int, num_ranks: int) -> TokenOrder:
    """Every rank has all rows, and its share of them goes to experts."""
    borders = [num_tokens * rank // num_ranks for rank in range(num_ranks + 1)]
    segments = tuple(
        (TokenSegment(start, start, stop - start),) for start, stop in pairwise(borders)
    )
    return TokenOrder(segments, (num_tokens,) * num_ranks)


@lru_cache(maxsize=256)
def _order_of_cut(layout: SequenceLayout, num_replicas: int) -> TokenOrder:
    """Every replica has the same pack, cut over its ranks."""
    return router_order([layout] * num_replicas)
