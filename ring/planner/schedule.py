"""What a rank computes and exchanges, stage by stage: from the layout alone, equal everywhere.

Only the first fragment of a run can continue a document that began outside the run, and *all* its
rows need *all* of the document before the run: one rectangle without a mask. Without causality
the last fragment of a run likewise needs all of the document after it. So a rank's attention is
one local varlen call over its fragments plus at most one rectangle for each fragment at an edge of
a run, and no row is in two rectangles.

The keys of a rectangle need no order (softmax without a mask is a sum over a set), so it is cut
into tiles along its keys: those that other runs of the rank hold, and those that each stage brings
into its slab (:mod:`ring.planner.traffic` says in which stage what comes, and from whom).

Example: one document of 8 tokens, 2 ranks, zigzag, causal::

    pack      0 1 2 3 4 5 6 7
    rank      0 0 1 1 1 1 0 0
    rank 0    local: rows 0:2 (tokens 0:2) and rows 2:4 (tokens 6:8)
              rectangle of rows 2:4 with keys 0:6: own keys 0:2, and 2:6 from rank 1
    rank 1    local: rows 0:4 (tokens 2:6); rectangle of rows 0:4 with keys 0:2 from rank 0

In two stages rank 0 would receive 2:4 and 4:6 into a slab of two tokens each, while rank 1 receives
0:2 in the first and nothing in the second: both still start two exchanges.
"""

from __future__ import annotations

import sys
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

from lasp.sequence.layout import SequenceLayout
from ring.planner.stages import RULE, StageRule
from ring.planner.traffic import Delivery, Traffic, traffic_of


class Interval(NamedTuple):
    """Tokens [start, stop); of the pack, of a rank or of a slab, as the holder says."""

    start: int
    stop: int

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return self.stop - self.start


class Tile(NamedTuple):
    """All rows of a rectangle over some of its keys, without a mask.

    Attributes:
        rectangle: index into ``RingSchedule.rows``.
        keys: of the rank's tokens or of the slab of a stage; disjoint, sorted, never empty.
    """

    rectangle: int
    keys: tuple[Interval, ...]

    @property
    def num_keys(self) -> int:
        """How many."""
        return sum(interval.tokens for interval in self.keys)


class Part(NamedTuple):
    """Where tokens of an exchange lie.

    Attributes:
        of_slab: in the slab of a stage; else among the rank's own tokens.
        tokens: there.
    """

    of_slab: bool
    tokens: Interval


Parts = tuple[Part, ...]  # to or from one rank; joined where one lies right after the other


class Exchange(NamedTuple):
    """What one rank sends and receives in one all-to-all-v.

    Attributes:
        sends: to each rank.
        send_tokens: likewise.
        receives: from each rank.
        receive_tokens: likewise.
    """

    sends: tuple[Parts, ...]
    send_tokens: tuple[int, ...]
    receives: tuple[Parts, ...]
    receive_tokens: tuple[int, ...]


class Stage(NamedTuple):
    """What comes, what is computed with it, and where its gradients go.

    Attributes:
        keys: intervals of the pack; the slab holds them end to end.
        fetch: sends own tokens, or parts of the slab before; receives the slab.
        tiles: over the slab.
        give_back: the way of the gradients after the tiles: sends all of the slab, to the next
            rank of a chain or to the owner; receives for own tokens or for the *next* slab.
    """

    keys: tuple[Interval, ...]
    fetch: Exchange
    tiles: tuple[Tile, ...]
    give_back: Exchange

    @property
    def tokens(self) -> int:
        """Tokens of the slab."""
        return sum(interval.tokens for interval in self.keys)


@dataclass(frozen=True)
class RingSchedule:
    """What one rank does.

    Attributes:
        layout: the layout it was made from.
        rank: rank within the context-parallel group.
        causal: whether a query sees only itself and what comes before it.
        way: ``none``, ``direct`` or ``chain``: see :mod:`ring.planner.traffic`. The same on every
            rank.
        rows: query rows of each rectangle, of the rank's tokens; disjoint, never empty.
        own_tiles: over keys that other runs of the rank hold: no transfer.
        stages: as many on every rank, each two matching exchanges; none where nothing moves.
    """

    layout: SequenceLayout
    rank: int
    causal: bool
    way: str
    rows: tuple[Interval, ...]
    own_tiles: tuple[Tile, ...]
    stages: tuple[Stage, ...]

    @property
    def received_tokens(self) -> int:
        """Tokens received: those needed, once. In bytes, times 2 (k, v) x Hkv x D x item size."""
        return sum(stage.tokens for stage in self.stages)

    @property
    def sent_tokens(self) -> int:
        """Tokens sent, of others as well where they are forwarded."""
        return sum(sum(stage.fetch.send_tokens) for stage in self.stages)


@lru_cache(maxsize=32)
def plan_ring(
    layout: SequenceLayout, rank: int, causal: bool, rule: StageRule = RULE
) -> RingSchedule:
    """Schedule of ``rank``; the last 32 are kept, so that all layers of a batch share one.

    Padding attends to the padding of its own fragment only: its rows are finite, they mean
    nothing, and nothing of them moves.

    Args:
        layout: the same on every rank.
        rank: in [0, P).
        causal: whether a query sees only itself and what comes before it.
        rule: the same on every rank.

    Raises:
        ValueError: if ``rank`` is not in [0, P).
    """
    own = layout.runs(rank)  # refuses a rank that is none
    traffic = traffic_of(layout, causal, rule)
    rectangles = _rectangles(layout, rank, causal)
    own_tiles = _tiles(rectangles, _Held(own))
    stages = _stages(traffic, rank, rectangles) if traffic.num_stages else ()
    rows = tuple(rows for rows, _ in rectangles)
    return RingSchedule(layout, rank, causal, traffic.way, rows, own_tiles, stages)


Rectangle = tuple[Interval, list[Interval]]  # rows of the rank, keys of the pack


def _rectangles(layout: SequenceLayout, rank: int, causal: bool) -> list[Rectangle]:
    found: list[Rectangle] = []
    for fragment in layout.fragments(rank):
        if fragment.document == layout.num_documents:
            continue
        start = layout.document_starts[fragment.document]
        stop = start + layout.document_lengths[fragment.document]
        before = Interval(start, start + fragment.start)
        after = Interval(start + fragment.stop, stop)
        keys = [side for side in ((before,) if causal else (before, after)) if side.tokens]
        if keys:
            end = fragment.offset + fragment.stop - fragment.start
            found.append((Interval(fragment.offset, end), keys))
    return found


def _tiles(rectangles: list[Rectangle], held: _Held) -> tuple[Tile, ...]:
    """Tiles over what is held of the keys of each rectangle."""
    tiles = (Tile(number, held.overlap(keys)) for number, (_, keys) in enumerate(rectangles))
    return tuple(tile for tile in tiles if tile.keys)


def _stages(traffic: Traffic, rank: int, rectangles: list[Rectangle]) -> tuple[Stage, ...]:
    incoming, sent, returned = _deliveries(traffic, rank)
    own = _Held(traffic.layout.runs(rank))
    slabs = [
        _Held(Interval(d.start, d.stop) for d in _in_order(incoming, s, "sender"))
        for s in range(traffic.num_stages)
    ]
    slabs.append(_Held(()))  # nothing is forwarded after the last stage

    def side(
        deliveries: list[Delivery], stage: int, peer: str, slab: _Held
    ) -> tuple[tuple[Parts, ...], tuple[int, ...]]:
        """What goes to, or comes from, each ``peer`` in a stage: where it lies, and how much."""
        by_rank: list[list[Part]] = [[] for _ in range(traffic.layout.num_ranks)]
        tokens = [0] * traffic.layout.num_ranks
        for d in _in_order(deliveries, stage, peer):
            tokens[getattr(d, peer)] += d.stop - d.start
            parts, of_slab = by_rank[getattr(d, peer)], d.owner != rank
            start, stop = (slab if of_slab else own).find(d.start, d.stop)
            if parts and parts[-1].of_slab == of_slab and parts[-1].tokens.stop == start:
                start = parts.pop().tokens.start
            parts.append(Part(of_slab, Interval(start, stop)))
        return tuple(map(tuple, by_rank)), tuple(tokens)

    stages = []
    for s, slab in enumerate(slabs[:-1]):
        fetch = Exchange(
            *side(sent, s, "consumer", slabs[s - 1]), *side(incoming, s, "sender", slab)
        )
        give_back = Exchange(
            *side(incoming, s, "returns_to", slab), *side(returned, s, "consumer", slabs[s + 1])
        )
        stages.append(Stage(slab.intervals, fetch, _tiles(rectangles, slab), give_back))
    return tuple(stages)


def _deliveries(
    traffic: Traffic, rank: int
) -> tuple[list[Delivery], list[Delivery], list[Delivery]]:
    """Those that the rank receives, those that it sends, those whose gradients come to it."""
    incoming = [d for i in traffic.needed_by(rank) for d in traffic.deliveries(i, rank)]
    owned = (i for i, piece in enumerate(traffic.pieces) if piece.owner == rank)
    lent = [d for i in owned for r in traffic.consumers(i) for d in traffic.deliveries(i, r)]
    sent = [d for d in lent if d.sender == rank]
    returned = [d for d in lent if d.returns_to == rank]
    for d in incoming:
        if d.returns_to != d.owner:  # the next of the chain
            sent += traffic.deliveries(d.piece, d.returns_to)
        if d.sender != d.owner:  # the one before
            returned += traffic.deliveries(d.piece, d.sender)
    return incoming, sent, returned


def _in_order(deliveries: list[Delivery], stage: int, peer: str) -> list[Delivery]:
    """Those of a stage, by peer, then by position: the order of an all-to-all on both sides."""
    some = (d for d in deliveries if d.stage == stage)
    return sorted(some, key=lambda d: (getattr(d, peer), d.start))


class _Held:
    """Disjoint pack intervals, end to end: the tokens of a rank, or a slab."""

    def __init__(self, intervals: Iterable[tuple[int, int]]) -> None:
        self.intervals = tuple(Interval(*interval) for interval in intervals)
        ends = accumulate((i.tokens for i in self.intervals), initial=0)
        self._sorted = sorted((i.start, i.stop, offset) for i, offset in zip(self.intervals, ends))

    def find(self, start: int, stop: int) -> Interval:
        """Where pack positions [start, stop), all within one of the intervals, lie."""
        first, _, offset = self._sorted[bisect_right(self._sorted, (start, sys.maxsize)) - 1]
        return Interval(start - first + offset, stop - first + offset)

    def overlap(self, wanted: Iterable[Interval]) -> tuple[Interval, ...]:
        """Where what is held of some pack intervals lies: sorted, as few intervals as can be."""
        found = (
            (max(start, want.start) - start + offset, min(stop, want.stop) - start + offset)
            for start, stop, offset in self._sorted
            for want in wanted
            if max(start, want.start) < min(stop, want.stop)
        )
        union: list[Interval] = []
        for start, stop in sorted(found):
            if union and start == union[-1].stop:
                union[-1] = Interval(union[-1].start, stop)
            else:
                union.append(Interval(start, stop))
        return tuple(union)
