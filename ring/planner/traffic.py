"""Which fragment goes to which rank, along which way, in which stage: one answer for all ranks.

A fragment of a cut document is needed *whole* or not at all by another rank: causally, if that rank
holds a later fragment of the document (whose rows see everything before it); without causality, if
it holds any. So what moves is a table of fragments x ranks: how many rows of a rank see a fragment.
It is made from the layout alone, with a few operations on CPU tensors, so that one long document on
256 ranks (65 thousand entries) takes milliseconds.

There are two ways to move a fragment, and each receipt falls into one of 1 to 4 stages.

direct
    The owner sends it to everyone who needs it. A receiver takes its sources in ring order, from
    the rank before it backwards, and cuts the whole into stages that take the same time: of as many
    (query, key) pairs each (:mod:`ring.planner.stages`).
chain
    The ranks that need it, in ring order after the owner, are dealt into chains of as many ranks as
    there are stages. The owner sends to the first of each chain; who got it in one stage sends it
    on in the next. Where many need one fragment, its owner sends a quarter of what it would.

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
from ring.planner.stages import StageRule, stage_tokens, stages_asked, stages_filled


class Piece(NamedTuple):
    """A fragment of a cut document, in pack positions."""

    owner: int
    start: int
    stop: int
    document: int


class Delivery(NamedTuple):
    """Tokens [start, stop) of the pack that ``consumer`` receives.

    Attributes:
        piece: the fragment they are of, by index.
        start: within the fragment.
        stop: likewise.
        owner: the rank that holds it.
        stage: when it comes.
        sender: from whom: the owner, or a rank that got it in the stage before.
        consumer: the rank that attends to it.
        returns_to: where its gradient goes after the stage: to the next of the chain, which adds
            its own, or to the owner.
    """

    piece: int
    start: int
    stop: int
    owner: int
    stage: int
    sender: int
    consumer: int
    returns_to: int


class Traffic:
    """Everything that crosses ranks under one layout.

    Attributes:
        pieces: fragments of documents that are cut, by owner, then position.
        way: ``none``, ``direct`` or ``chain``.
        num_stages: the same for all ranks; 0 where nothing moves.
    """

    def __init__(self, layout: SequenceLayout, causal: bool, rule: StageRule) -> None:
        self.layout, self.causal, self.rule = layout, causal, rule
        self.pieces = _cut_documents(layout)
        self._owners, starts, stops, documents = (
            torch.tensor(column, dtype=torch.int64, device="cpu")
            for column in (zip(*self.pieces) if self.pieces else [()] * 4)
        )
        self._lengths = stops - starts
        self._rows = self._rows_that_see(starts, documents)
        ranks = torch.arange(layout.num_ranks, device="cpu")
        self._needs = (self._rows > 0) & (self._owners[:, None] != ranks)  # bool [pieces, P]
        self._tokens = self._needs * self._lengths[:, None]  # [pieces, P], int64
        self.way, self.num_stages = "none", 0
        if self.pieces and bool(self._needs.any()):
            self._cuts = self._stage_cuts()
            self._offsets = self._offsets_of(self._tokens)
            self._turns = self._chain_turns()
            self.way, self.num_stages = self._choose()

    # ---- who needs what ----------------------------------------------------------------------

    def _rows_that_see(self, starts: Tensor, documents: Tensor) -> Tensor:
        """Rows of a rank outside a piece that attend to it, its owner's too: int64 ``[pieces, P]``.

        Those of the same document, and if causal after it: sums over pieces sorted by position.
        """
        order = starts.argsort()
        held = torch.zeros(
            len(order), self.layout.num_ranks, dtype=torch.int64, device="cpu"
        ).scatter_(1, self._owners[order, None], self._lengths[order, None])
        from_here = torch.cat((held.flip(0).cumsum(0).flip(0), torch.zeros_like(held[:1])))
        documents = documents[order]
        first = torch.searchsorted(documents, documents)
        end = torch.searchsorted(documents, documents, right=True)
        rows = from_here[1:] if self.causal else from_here[first] - held
        return torch.zeros_like(rows).index_copy_(0, order, rows - from_here[end])

    @cached_property
    def received(self) -> list[int]:
        """Tokens that each rank receives."""
        tokens: list[int] = self._tokens.sum(0).tolist()
        return tokens

    # ---- direct: offsets in the order of receipt, cut into stages ------------------------------

    def _offsets_of(self, amounts: Tensor) -> Tensor:
        """Where a piece begins in what a rank receives, int64 ``[pieces, P]``.

        Sources come from the rank before the receiver backwards: what lies behind in the order of
        owners, less all that later ranks own, round the ring.

        Args:
            amounts: of each piece for each rank, in tokens or in pairs, 0 where it is not needed.
        """
        behind = amounts.flip(0).cumsum(0).flip(0) - amounts
        ranks = torch.arange(self.layout.num_ranks, device="cpu")
        later = (amounts * (self._owners[:, None] > ranks)).sum(0)
        return (behind - later) % amounts.sum(0).clamp(min=1)

    def _stage_cuts(self) -> Tensor:
        """Cumulative tokens of the stages of each rank, 0 first: int64 ``[stages + 1, P]``."""
        own_tokens, rule = self.layout.num_local_tokens, self.rule
        count = max(
            stages_asked(needed, local, own_tokens, rule)
            for needed, local in zip(self.received, self._local_pairs())
        )
        filled = [stages_filled(needed, count, rule) for needed in self.received]
        pairs = self._tokens * self._rows
        offsets, share = self._offsets_of(pairs), pairs.sum(0) // torch.tensor(filled, device="cpu")
        # Before a cut lie whole pieces, a part of one, and nothing of those behind it.
        equal_cuts = [
            ((stage * share - offsets) // self._rows.clamp(min=1))
            .clamp(min=0)
            .minimum(self._tokens)
            .sum(0)
            .tolist()
            for stage in range(1, count)
        ]
        slab_tokens = max(own_tokens, -(-max(self.received) // count))
        cuts = []
        for rank, (needed, stages) in enumerate(zip(self.received, filled)):
            equal = [some[rank] for some in equal_cuts[: stages - 1]]
            sizes = stage_tokens(needed, equal, slab_tokens, rule)
            cuts.append([0, *sizes, *[0] * (count - len(sizes))])
        return torch.tensor(cuts, device="cpu").cumsum(1).T

    def _local_pairs(self) -> list[int]:
        """(query, key) pairs of each rank whose keys it holds."""
        by_rank = torch.zeros(self.layout.num_ranks, dtype=torch.int64, device="cpu")
        seen_at_home = self._rows.gather(1, self._owners[:, None])[:, 0] * self._lengths
        across: list[int] = by_rank.index_add_(0, self._owners, seen_at_home).tolist()
        for rank in range(self.layout.num_ranks):
            for fragment in self.layout.fragments(rank):
                length = fragment.stop - fragment.start
                across[rank] += length * (length + 1) // 2 if self.causal else length**2
        return across

    def _direct_time(self) -> int:
        """Tokens on the busiest link of each stage, summed over the stages."""
        time = 0
        stop = self._offsets + self._tokens
        for low, high in pairwise(self._cuts):
            part = (torch.minimum(stop, high) - torch.maximum(self._offsets, low)).clamp(min=0)
            time += self._busiest(part.sum(1), (high - low).max())
        return time

    def _busiest(self, sent: Tensor, most_received: Tensor) -> int:
        """Most tokens that a rank sends or receives, given those that owners send of each piece."""
        by_rank = torch.zeros(self.layout.num_ranks, dtype=torch.int64, device="cpu")
        return int(torch.maximum(by_rank.index_add_(0, self._owners, sent).max(), most_received))

    # ---- chains --------------------------------------------------------------------------------

    def _chain_turns(self) -> Tensor:
        """Place of a rank among those that need a piece, in ring order after its owner."""
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
        """The way that keeps the busiest link busy for the shorter time, and its stages."""
        stages = min(self.rule.max_stages, int(self._needs.sum(1).max()))
        direct = self._direct_time()
        if stages > 1 and direct > self.rule.chain_gain * self._chain_time(stages):
            return "chain", stages
        return "direct", len(self._cuts) - 1

    # ---- one piece, one rank -------------------------------------------------------------------

    def needed_by(self, rank: int) -> list[int]:
        """Pieces that ``rank`` receives, by index."""
        pieces: list[int] = self._needs[:, rank].nonzero().flatten().tolist()
        return pieces

    def consumers(self, piece: int) -> list[int]:
        """Ranks that need a piece, in ring order after its owner."""
        owner = self.pieces[piece].owner
        ranks: list[int] = self._needs[piece].nonzero().flatten().tolist()
        return [r for r in ranks if r > owner] + [r for r in ranks if r < owner]

    def deliveries(self, piece: int, rank: int) -> Iterator[Delivery]:
        """How ``rank`` gets a piece that it needs."""
        owner, start, stop, _ = self.pieces[piece]
        if self.way == "chain":
            ranks = self.consumers(piece)
            turn = ranks.index(rank)
            stage = turn % self.num_stages
            ends = turn + 1 == len(ranks) or stage + 1 == self.num_stages
            sender, after = ranks[turn - 1] if stage else owner, owner if ends else ranks[turn + 1]
            yield Delivery(piece, start, stop, owner, stage, sender, rank, after)
            return
        offset = int(self._offsets[piece, rank])
        for stage, (low, high) in enumerate(pairwise(self._cuts[:, rank].tolist())):
            first, last = max(low, offset), min(high, offset + stop - start)
            if first < last:
                a, b = start + first - offset, start + last - offset
                yield Delivery(piece, a, b, owner, stage, owner, rank, owner)


@lru_cache(maxsize=8)
def traffic_of(layout: SequenceLayout, causal: bool, rule: StageRule) -> Traffic:
    """The traffic under a layout; the last ones are kept."""
    return Traffic(layout, causal, rule)


def _cut_documents(layout: SequenceLayout) -> list[Piece]:
    """Fragments of documents that have several; padding attends to its own fragment only."""
    pieces: list[Piece] = []
    counts: dict[int, int] = {}
    for rank in range(layout.num_ranks):
        for fragment in layout.fragments(rank):
            if fragment.document < layout.num_documents:
                base = layout.document_starts[fragment.document]
                where = (base + fragment.start, base + fragment.stop)
                pieces.append(Piece(rank, *where, fragment.document))
                counts[fragment.document] = counts.get(fragment.document, 0) + 1
    return [piece for piece in pieces if counts[piece.document] > 1]
