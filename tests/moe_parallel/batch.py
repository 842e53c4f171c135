"""Batches dealt to ranks in several ways, and what ranks return put together again."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from moe_parallel import ExpertTopology, ParallelGroups, TokenOrder, TokenSegment
from moe_parallel.experts.experts import Experts


def ragged(num_tokens: int, num_ranks: int) -> TokenOrder:
    """Contiguous; rank 0 holds nothing (unless alone), the others ever more."""
    weights = list(range(num_ranks)) if num_ranks > 1 else [1]
    tokens = [num_tokens * weight // sum(weights) for weight in weights]
    tokens[-1] += num_tokens - sum(tokens)
    return TokenOrder.contiguous(tokens)


def zigzag(num_tokens: int, num_ranks: int) -> TokenOrder:
    """Pieces r and 2P - 1 - r, rows of padding at the tail of every rank."""
    return _deal(num_tokens, [*range(num_ranks), *reversed(range(num_ranks))], padding=2)


def shuffled(num_tokens: int, num_ranks: int) -> TokenOrder:
    """Many uneven pieces, each rank's in falling global order, padding between them."""
    owners = [*range(num_ranks)] * 4
    random.Random(0).shuffle(owners)
    return _deal(num_tokens, owners, padding=1, reverse=True)


def _deal(
    num_tokens: int, owners: Sequence[int], *, padding: int, reverse: bool = False
) -> TokenOrder:
    num_ranks = max(owners) + 1
    cuts = [num_tokens * piece // len(owners) for piece in range(len(owners) + 1)]
    segments: list[list[TokenSegment]] = [[] for _ in range(num_ranks)]
    rows = [0] * num_ranks
    pieces = list(enumerate(owners))
    for piece, rank in reversed(pieces) if reverse else pieces:
        length = cuts[piece + 1] - cuts[piece]
        # Only the order of global positions counts: leave gaps of 7.
        segments[rank].append(TokenSegment(cuts[piece] + 7 * piece, rows[rank], length))
        rows[rank] += length + padding * reverse
    rows = [count + padding for count in rows]
    return TokenOrder(tuple(tuple(s) for s in segments), tuple(rows))


ORDERS = {"ragged": ragged, "zigzag": zigzag, "shuffled": shuffled}


def positions(order: TokenOrder, rank: int) -> tuple[list[int], list[int]]:
    """For each token of a rank, its place among all N tokens and its row on the rank."""
    everything = sorted(segment for segments in order.segments for segment in segments)
    first, total = {}, 0
    for segment in everything:
        first[segment.start] = total
        total += segment.length
    places, rows = [], []
    for segment in order.segments[rank]:
        places += range(first[segment.start], first[segment.start] + segment.length)
        rows += range(segment.offset, segment.offset + segment.length)
    return places, rows


def local_rows(x: Tensor, order: TokenOrder, rank: int, *, padding: float) -> Tensor:
    """The rank's rows of the whole batch ``[N, ...]``; padding rows hold ``padding``."""
    places, rows = positions(order, rank)
    local = x.new_full((order.rows_per_rank[rank], *x.shape[1:]), padding)
    local[rows] = x[places]
    return local


def assemble(parts: Sequence[Tensor], order: TokenOrder) -> Tensor:
    """The whole batch out of every rank's rows; asserts that padding rows are exact zeros."""
    whole = parts[0].new_full((order.num_tokens, *parts[0].shape[1:]), torch.nan)
    for rank, part in enumerate(parts):
        places, rows = positions(order, rank)
        whole[places] = part[rows]
        padding = torch.ones(len(part), dtype=torch.bool)
        padding[rows] = False
        assert not part[padding].any(), "a padding row is not zero"
    return whole


def assemble_expert(parts: Sequence[Tensor], name: str, topology: ExpertTopology) -> Tensor:
    """A whole expert gradient out of every rank's part: summed over edp, joined over etp and ep."""
    dims = Experts.sharding()[name]
    grid: dict[tuple[int, int], Tensor] = {}
    for rank, part in enumerate(parts):
        at = topology.expert_coordinates(rank)
        grid[at.ep, at.etp] = grid[at.ep, at.etp] + part if (at.ep, at.etp) in grid else part
    return torch.cat(
        [
            torch.cat([grid[ep, etp] for etp in range(topology.etp)], dims.etp_dim)
            for ep in range(topology.ep)
        ],
        dims.ep_dim,
    )


@cache
def groups_of(topology: ExpertTopology) -> ParallelGroups:
    """The groups of a topology, built once per pool of ranks."""
    return topology.build_groups()


# ---- lockstep: a function of replicated tensors, computed by all ranks together ------------------


class Replicated(torch.autograd.Function):
    """Identity on a tensor all ranks hold; the gradient is summed over the default group."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad.clone()
        dist.all_reduce(grad)
        return grad


class Summed(torch.autograd.Function):
    """The sum over the default group, which all ranks then hold; its gradient is theirs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class RoutedTokens(NamedTuple):
    """Random tokens of a whole batch and the gradient of the output."""

    x: Tensor
    grad: Tensor


def random_batch(num_tokens: int, hidden_size: int, *, seed: int = 0) -> RoutedTokens:
    """float64; column 0 is 1, so that a gate's column 0 is a bias."""
    generator = torch.Generator().manual_seed(seed)
    shape = (2, num_tokens, hidden_size)
    x, grad = torch.randn(shape, generator=generator, dtype=torch.float64)
    x[:, 0] = 1
    return RoutedTokens(x, grad)
