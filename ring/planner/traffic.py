"""Which fragment goes to which rank, along which route, in which stage: one answer for all ranks.

Another rank needs a fragment of a cut document *whole* or not at all: causally, if that rank
holds a later fragment of the document (whose rows see everything before it); without causality, if
it holds any. Under a sliding window fragments are cut where windows of others begin and end, so
that this is true for their parts. So the traffic is a table of fragments x ranks: how many rows of
a rank see a fragment. It is made from the layout alone, with a few operations on CPU tensors, so
that one long document on 256 ranks (65 thousand entries) takes milliseconds.

A fragment takes one of two routes, and each receipt falls into one of 1 to 4 stages.

direct
    The owner sends it to everyone who needs it. A receiver takes its sources in ring order, from
    the rank before it backwards, and cuts the whole into stages that take the same time: as many
    (query, key) pairs in each (:mod:`ring.planner.stages`).
chain
    The ranks that need it, in ring order after the owner, are dealt into chains of as many ranks as
    there are stages. The owner sends to the first of each chain; who got it in one stage sends it
    on in the next. Where many need one fragment, its owner sends a quarter of what it would::

        owner 0, needed by ranks 1 to 8, 4 stages

        stage         1    2    3    4
        chain 1  0 -> 1 -> 2 -> 3 -> 4
        chain 2  0 -> 5 -> 6 -> 7 -> 8

Neighbour exchange, truncated ring and full ring are what these become where the layout is
contiguous or holds one document; they are not separate code. Every rank receives what it needs once
either way.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from lasp.sequence.layout import SequenceLayout
from ring.planner.fragments import cut_at_windows, cut_documents, rows_in_windows
from ring.planner.stages import StageRule, stage_tokens, stages_asked, stages_filled
from ring.planner.window import Window


class KVDelivery(NamedTuple):
    """Tokens [start, stop) of the pack that ``consumer`` receives.

    Attributes:
        fragment: index of the fragment that holds them.
        start: first position, within the fragment.
        stop: end, within the fragment.
        owner: the rank that holds the fragment.
        stage: the stage in which they come.
        sender: the owner, or a rank that received them in the stage before.
        consumer: the rank that attends to them.
        returns_to: where their gradients go after the stage: to the next rank of the chain, which
            adds its own, or to the owner.
    """

    fragment: int
    start: int
    stop: int
    owner: int
    stage: int
    sender: int
    consumer: int
    returns_to: int


class KVTraffic:
    """Everything that crosses ranks under one layout.

    Attributes:
        fragments: of documents that are cut, by owner, then position.
        route: ``none``, ``direct`` or ``chain``.
        num_stages: the same for all ranks; 0 where nothing moves.
    """

    def __init__(self, layout: SequenceLayout, window: Window, rule: StageRule) -> None:
        self.layout, self.window, self.rule = layout, window, rule
        self.fragments = whole = cut_documents(layout)
        if window.slides:
            self.fragments = cut_at_windows(whole, layout, window)
        self._owners, starts, stops, documents = (
            torch.tensor(column, dtype=torch.int64, device="cpu")
            for column in (zip(*self.fragments) if self.fragments else [()] * 4)
        )
        self._lengths = stops - starts
        if window.slides and whole:
            self._rows = rows_in_windows(self.fragments, whole, layout, window)
        else:
            self._rows = self._rows_that_see(starts, documents)
        ranks = torch.arange(layout.num_ranks, device="cpu")
        self._needs = (self._rows > 0) & (self._owners[:, None] != ranks)  # bool [fragments, P]
        self._tokens = self._needs * self._lengths[:, None]  # [fragments, P], int64
        self.route, self.num_stages = "none", 0
        if self.fragments and bool(self._needs.any()):
            self._borders = self._stage_borders()
            self._offsets = self._offsets_of(self._tokens)
            self._turns = self._chain_turns()
            self.route, self.num_stages = self._choose()

    # ---- who needs what ----------------------------------------------------------------------

    def _rows_that_see(self, starts: Tensor, documents: Tensor) -> Tensor:
        """Rows of each rank that attend to a fragment from outside it: int64 ``[fragments, P]``.

        No window slides: they are rows of the same document, after the fragment if causal, and may
        be its owner's: sums over fragments sorted by position.
        """
        order = starts.argsort()
        held = torch.zeros(
            len(order), self.layout.num_ranks, dtype=torch.int64, device="cpu"
        ).scatter_(1, self._owners[order, None], self._lengths[order, None])
        from_here = torch.cat((held.flip(0).cumsum(0).flip(0), torch.zeros_like(held[:1])))
        documents = documents[order]
        first = torch.searchsorted(documents, documents)
        end = torch.searchsorted(documents, documents, right=True)
        rows = from_here[1:] if self.window.right == 0 else from_here[first] - held
        return torch.zeros_like(rows).index_copy_(0, order, rows - from_here[end])

    @cached_property
    def received(self) -> list[int]:
        """Tokens that each rank receives."""
        tokens: list[int] = self._tokens.sum(0).tolist()
        return tokens

    # ---- direct: offsets in the order of receipt, cut into stages ------------------------------

    def _offsets_of(self, amounts: Tensor) -> Tensor:
        """Where a fragment begins in what a rank receives, int64 ``[fragments, P]``.

        Sources come from the rank before the receiver backwards: what lies behind in the order of
        owners, less all that later ranks own, round the ring. ``amounts`` are 0 where not needed.
        """
        behind = amounts.flip(0).cumsum(0).flip(0) - amounts
        ranks = torch.arange(self.layout.num_ranks, device="cpu")
        later = (amounts * (self._owners[:, None] > ranks)).sum(0)
        return (behind - later) % amounts.sum(0).clamp(min=1)

    def _stage_borders(self) -> Tensor:
        """Tokens that each rank has after 0, 1, 2 ... stages: int64 ``[stages + 1, P]``."""
        own_tokens, rule = self.layout.num_local_tokens, self.rule
        count = max(
            stages_asked(needed, local, own_tokens, rule)
            for needed, local in zip(self.received, self._local_pairs())
        )
        filled = [stages_filled(needed, count, rule) for needed in self.received]
        buffer_tokens = max(own_tokens, -(-max(self.received) // count))
        sizes = [
            stage_tokens(needed, equal[1:stages], buffer_tokens, rule)
            for needed, stages, equal in zip(self.received, filled, self._equal_borders(filled))
        ]
        padded = [[0, *some, *[0] * (count - len(some))] for some in sizes]
        return torch.tensor(padded, device="cpu").cumsum(1).T

    def _equal_borders(self, filled: list[int]) -> list[list[int]]:
        """Tokens that a rank has after 0, 1, 2 ... of its stages of as many pairs each, by rank."""
        pairs = self._tokens * self._rows
        offsets, share = self._offsets_of(pairs), pairs.sum(0) // torch.tensor(filled, device="cpu")
        # Before a border lie whole fragments, a part of one, and nothing of those behind it.
        tokens = [
            ((stage * share - offsets) // self._rows.clamp(min=1))
            .clamp(min=0)
            .minimum(self._tokens)
            .sum(0)
            for stage in range(max(filled))
        ]
        by_rank: list[list[int]] = torch.stack(tokens, 1).tolist()
        return by_rank

    def _local_pairs(self) -> list[int]:
        """(query, key) pairs of each rank within its fragments."""
        layout = self.layout
        return [
            sum(self.window.pairs(some.stop - some.start) for some in layout.fragments(rank))
            for rank in range(layout.num_ranks)
        ]

    def _direct_time(self) -> int:
        """Tokens on the busiest link of each stage, summed over the stages."""
        time = 0
        stop = self._offsets + self._tokens
        for low, high in pairwise(self._borders):
            part = (torch.minimum(stop, high) - torch.maximum(self._offsets, low)).clamp(min=0)
            time += self._busiest(part.sum(1), (high - low).max())
        return time

    def _busiest(self, sent: Tensor, most_received: Tensor) -> int:
        """Most tokens that a rank sends or receives, if owners send ``sent`` of each fragment."""
        by_rank = torch.zeros(self.layout.num_ranks, dtype=torch.int64, device="cpu")
        return int(torch.maximum(by_rank.index_add_(0, self._owners, sent).max(), most_received))

    # ---- chains --------------------------------------------------------------------------------

    def _chain_turns(self) -> Tensor:
        """Place of a rank among those that need a fragment, in ring order after its owner."""
        before = self._needs.cumsum(1) - self._needs.long()
        at_owner = before.gather(1, self._owners[:, None])
        return (before - at_owner) % self._needs.sum(1, keepdim=True).clamp(min=1)

    def _chain_time(self, stages: int) -> int:
        time = 0
        number = self._needs.sum(1, keepdim=True)
        forwarding = self._tokens * (self._turns + 1 < number)
        for stage in range(stages):
            now = self._tokens * (self._turns % stages == stage)
            if stage == 0:
                time += self._busiest(now.sum(1), now.sum(0).max())
            else:
                sent = (forwarding * (self._turns % stages == stage - 1)).sum(0)
                time += int(torch.maximum(sent.max(), now.sum(0).max()))
        return time

    def _choose(self) -> tuple[str, int]:
        """The route that keeps the busiest link busy for the shorter time, and its stages."""
        stages = min(self.rule.max_stages, int(self._needs.sum(1).max()))
        direct = self._direct_time()
        if stages > 1 and direct > self.rule.chain_gain * self._chain_time(stages):
            return "chain", stages
        return "direct", len(self._borders) - 1

    # ---- one fragment, one rank ----------------------------------------------------------------

    def needed_by(self, rank: int) -> list[int]:
        """Fragments that ``rank`` receives, by index."""
        fragments: list[int] = self._needs[:, rank].nonzero().flatten().tolist()
        return fragments

    def consumers(self, fragment: int) -> list[int]:
        """Ranks that need a fragment, in ring order after its owner."""
        owner = self.fragments[fragment].owner
        ranks: list[int] = self._needs[fragment].nonzero().flatten().tolist()
        return [r for r in ranks if r > owner] + [r for r in ranks if r < owner]

    def deliveries(self, fragment: int, rank: int) -> Iterator[KVDelivery]:
        """How ``rank`` gets a fragment that it needs."""
        owner, start, stop, _ = self.fragments[fragment]
        if self.route == "chain":
            ranks = self.consumers(fragment)
            turn = ranks.index(rank)
            stage = turn % self.num_stages
            ends = turn + 1 == len(ranks) or stage + 1 == self.num_stages
            sender, after = ranks[turn - 1] if stage else owner, owner if ends else ranks[turn + 1]
            yield KVDelivery(fragment, start, stop, owner, stage, sender, rank, after)
            return
        offset = int(self._offsets[fragment, rank])
        for stage, (low, high) in enumerate(pairwise(self._borders[:, rank].tolist())):
            first, last = max(low, offset), min(high, offset + stop - start)
            if first < last:
                a, b = start + first - offset, start + last - offset
                yield KVDelivery(fragment, a, b, owner, stage, owner, rank, owner)


@lru_cache(maxsize=8)
def plan_traffic(layout: SequenceLayout, window: Window, rule: StageRule) -> KVTraffic:
    """The traffic under a layout; the last ones are kept."""
    return KVTraffic(layout, window, rule)
