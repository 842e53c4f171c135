"""Which keys each rank needs from which rank: computed from the layout alone, equal everywhere.

Only the first fragment of a run can continue a document that began outside the run, and *all* its
rows need *all* of the document before the run: one rectangle without a mask. Without causality
the last fragment of a run likewise needs all of the document after it. So a rank's attention is
one local varlen call over its fragments plus at most one rectangle for each fragment at an edge of
a run, and no row is in two rectangles.

Example: one document of 8 tokens, 2 ranks, zigzag, causal::

    pack      0 1 2 3 4 5 6 7
    rank      0 0 1 1 1 1 0 0
    rank 0    local: rows 0:2 (tokens 0:2) and rows 2:4 (tokens 6:8)
              rectangle: rows 2:4 with keys 0:6, of which 0:2 are its own and 2:6 come from rank 1
    rank 1    local: rows 0:4 (tokens 2:6); rectangle: rows 0:4 with keys 0:2 from rank 0

The keys of a rectangle need no order (softmax without a mask is a sum over a set), so they are
taken as they lie: slices of the rank's own tokens, then slices of the receive buffer, which holds
the transfers in the order of their source rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from lasp.layout import Fragment, SequenceLayout


class Interval(NamedTuple):
    """Tokens [start, stop); of the pack, of a rank or of a buffer, as the holder says."""

    start: int
    stop: int

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return self.stop - self.start


class Rectangle(NamedTuple):
    """Query rows that attend to keys outside their run, all rows to all keys.

    Attributes:
        rows: of the rank's tokens.
        own_keys: of the rank's tokens: what other runs of the same rank hold.
        received_keys: of the receive buffer.
    """

    rows: Interval
    own_keys: tuple[Interval, ...]
    received_keys: tuple[Interval, ...]


@dataclass(frozen=True)
class RingSchedule:
    """What one rank computes and what it exchanges.

    Attributes:
        layout: the layout it was made from.
        rank: rank within the context-parallel group.
        causal: whether a query sees only itself and what comes before it.
        rectangles: attention beside the local varlen call; disjoint rows, never an empty one.
        sends: for each destination rank, intervals of this rank's tokens; each at most once.
        receives: for each source rank, intervals of the pack; the receive buffer holds them end
            to end, rank by rank.
        moves: whether any rank receives anything. If not, no rank starts a collective.
    """

    layout: SequenceLayout
    rank: int
    causal: bool
    rectangles: tuple[Rectangle, ...]
    sends: tuple[tuple[Interval, ...], ...]
    receives: tuple[tuple[Interval, ...], ...]
    moves: bool

    @property
    def sent_tokens(self) -> list[int]:
        """Tokens sent to each rank. In bytes, times 2 (k, v) x Hkv x D x element size."""
        return [_tokens(intervals) for intervals in self.sends]

    @property
    def received_tokens(self) -> list[int]:
        """Tokens received from each rank. In bytes, times 2 (k, v) x Hkv x D x element size."""
        return [_tokens(intervals) for intervals in self.receives]


@lru_cache(maxsize=32)
def plan_ring(layout: SequenceLayout, rank: int, causal: bool) -> RingSchedule:
    """Schedule of ``rank``; the last 32 are kept, so that all layers of a batch share one.

    Tail padding attends to the padding of its own fragment only: its rows are finite, they mean
    nothing, and nothing of them moves.

    Raises:
        ValueError: if ``rank`` is not in [0, P).
    """
    own = layout.runs(rank)
    needs = [_needed(layout, r, causal) for r in range(layout.num_ranks)]
    remote = [r for r in range(layout.num_ranks) if r != rank]
    receives = {source: _overlap(needs[rank], layout.runs(source)) for source in remote}
    sends = {receiver: _positions(needs[receiver], own) for receiver in remote}
    buffer = [interval for source in remote for interval in receives[source]]
    rectangles = tuple(
        Rectangle(
            Interval(fragment.offset, fragment.offset + fragment.stop - fragment.start),
            own_keys=_positions(keys, own),
            received_keys=_positions(keys, buffer),
        )
        for fragment in layout.fragments(rank)
        if (keys := _outside_keys(layout, fragment, causal))
    )
    return RingSchedule(
        layout,
        rank,
        causal,
        rectangles,
        sends=tuple(sends.get(r, ()) for r in range(layout.num_ranks)),
        receives=tuple(receives.get(r, ()) for r in range(layout.num_ranks)),
        moves=any(
            _tokens(_overlap(keys, layout.runs(r))) < _tokens(keys) for r, keys in enumerate(needs)
        ),
    )


def _outside_keys(layout: SequenceLayout, fragment: Fragment, causal: bool) -> list[Interval]:
    """Pack intervals of the fragment's document that its rows need beside the fragment."""
    if fragment.document == layout.num_documents:
        return []
    start, stop = layout.borders[fragment.document : fragment.document + 2]
    before = Interval(start, start + fragment.start)
    after = Interval(start + fragment.stop, stop)
    return [side for side in ((before,) if causal else (before, after)) if side.tokens]


def _needed(layout: SequenceLayout, rank: int, causal: bool) -> tuple[Interval, ...]:
    """Pack intervals that some rectangle of ``rank`` needs, its own tokens included, each once."""
    keys = [k for f in layout.fragments(rank) for k in _outside_keys(layout, f, causal)]
    return _union(keys)


def _tokens(intervals: Iterable[Interval]) -> int:
    return sum(interval.tokens for interval in intervals)


def _union(intervals: Iterable[tuple[int, int]]) -> tuple[Interval, ...]:
    """Sorted disjoint intervals that cover the same tokens."""
    union: list[Interval] = []
    for start, stop in sorted(intervals):
        if union and start <= union[-1].stop:
            union[-1] = Interval(union[-1].start, max(stop, union[-1].stop))
        else:
            union.append(Interval(start, stop))
    return tuple(union)


def _overlap(
    wanted: Sequence[tuple[int, int]], held: Sequence[tuple[int, int]]
) -> tuple[Interval, ...]:
    """What two sorted lists of disjoint pack intervals share, one interval for each pair."""
    pairs = (
        Interval(max(want[0], hold[0]), min(want[1], hold[1])) for hold in held for want in wanted
    )
    return tuple(pair for pair in pairs if pair.tokens > 0)


def _positions(
    wanted: Sequence[tuple[int, int]], held: Sequence[tuple[int, int]]
) -> tuple[Interval, ...]:
    """Where wanted pack intervals lie in a buffer that holds ``held`` pack intervals end to end."""
    found: list[Interval] = []
    offset = 0
    for start, stop in held:
        shift = offset - start
        found += [Interval(a + shift, b + shift) for a, b in _overlap(wanted, [(start, stop)])]
        offset += stop - start
    return _union(found)
