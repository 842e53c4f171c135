"""What a rank computes and exchanges, stage by stage: from the layout alone, equal everywhere.

Only the first fragment of a run can continue a document that began outside the run, and *all* its
rows need *all* of the document before the run: one rectangle without a mask. Without causality
the last fragment of a run likewise needs all of the document after it. So a rank's attention is
one local varlen call over its fragments plus at most one rectangle for each fragment at an edge of
a run, and no row is in two rectangles. Under a sliding window only rows near an edge have a
rectangle, over the keys within reach, and a tile has the window of its rows and keys.

The keys of a rectangle need no order (softmax without a mask is a sum over a set), so it is cut
into tiles along its keys: those that each stage brings into its kv buffer
(:mod:`ring.planner.traffic` says in which stage what comes, and from whom). Keys that other runs of
the rank hold go with the last of these, or are an own tile where they are many or the only ones.

Example: one document of 8 tokens, 2 ranks, zigzag, causal::

    pack      0 1 2 3 4 5 6 7
    rank      0 0 1 1 1 1 0 0
    rank 0    local: rows 0:2 (tokens 0:2) and rows 2:4 (tokens 6:8)
              rectangle of rows 2:4 with keys 0:6: own keys 0:2, and 2:6 from rank 1, in one tile
    rank 1    local: rows 0:4 (tokens 2:6); rectangle of rows 0:4 with keys 0:2 from rank 0

In two stages both ranks start two exchanges of keys and values, even with nothing to receive::

    stage     rank 0 receives         rank 1 receives
    1         2:4 into a kv buffer    0:2
    2         4:6 likewise            nothing
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise, starmap
from typing import NamedTuple

from lasp.sequence.layout import SequenceLayout
from ring.planner.messages import Message, messages_of
from ring.planner.ranges import LentTokens, RowRange, TokenIndex, union
from ring.planner.stages import RULE, StageRule, around_stages, local_work
from ring.planner.tiles import (
    KVTile,
    grouped_tiles,
    join_own_tiles,
    rectangles_of,
    tiles_over,
    whole_fragments,
)
from ring.planner.traffic import KVTraffic, plan_traffic
from ring.planner.window import EVERYTHING, Window


class KVSlice(NamedTuple):
    """Where tokens of an exchange lie.

    Attributes:
        in_buffer: in the kv buffer of a stage; else among the rank's own tokens.
        rows: there.
    """

    in_buffer: bool
    rows: RowRange


KVSlices = tuple[KVSlice, ...]  # to or from one rank; adjacent ones are joined


class StageExchange(NamedTuple):
    """What one rank sends and receives in one all-to-all-v.

    Attributes:
        sends: slices for each rank.
        send_tokens: number of tokens for each rank.
        receives: slices from each rank.
        receive_tokens: number of tokens from each rank.
    """

    sends: tuple[KVSlices, ...]
    send_tokens: tuple[int, ...]
    receives: tuple[KVSlices, ...]
    receive_tokens: tuple[int, ...]


class RingStage(NamedTuple):
    """What comes, what is computed with it, and where its gradients go.

    Attributes:
        keys: ranges of the pack; the kv buffer holds them end to end.
        kv_exchange: sends own tokens, or parts of the kv buffer before; receives the kv buffer.
        tiles: over the kv buffer.
        groups: the tiles again, with whole fragments where that pays, those together that one
            varlen call can take.
        grad_exchange: sends the gradients of the kv buffer after the tiles, to the next rank of a
            chain or to the owner; receives for own tokens or for the *next* kv buffer.
    """

    keys: tuple[RowRange, ...]
    kv_exchange: StageExchange
    tiles: tuple[KVTile, ...]
    groups: tuple[tuple[KVTile, ...], ...]
    grad_exchange: StageExchange

    @property
    def tokens(self) -> int:
        """Tokens in the kv buffer."""
        return sum(some.length for some in self.keys)

    @property
    def seen_once(self) -> bool:
        """Whether each token of the kv buffer is in one tile; else some are in several."""
        return sum(keys.length for tile in self.tiles for keys in tile.keys) == self.tokens


@dataclass(frozen=True)
class RingSchedule:
    """What one rank does.

    Attributes:
        layout: the layout it was made from.
        rank: rank within the context-parallel group.
        window: which tokens of its document a query sees.
        route: ``none``, ``direct`` or ``chain``: see :mod:`ring.planner.traffic`. The same on every
            rank.
        rows: query rows of each rectangle, of the rank's tokens; disjoint, never empty.
        own_tiles: over keys of other runs of the rank that are in no tile of a stage.
        stages: as many on every rank, each two matching exchanges; none where nothing moves.
        before: rows of fragments, in no group with their own keys, whose local backward goes before
            the stages where a block writes in place.
        after: those whose local backward goes after the stages.
    """

    layout: SequenceLayout
    rank: int
    window: Window
    route: str
    rows: tuple[RowRange, ...]
    own_tiles: tuple[KVTile, ...]
    stages: tuple[RingStage, ...]
    before: tuple[RowRange, ...]
    after: tuple[RowRange, ...]

    @property
    def received_tokens(self) -> int:
        """Tokens received: those needed, once. :mod:`ring.exchange` has the elements of each."""
        return sum(stage.tokens for stage in self.stages)

    @property
    def sent_tokens(self) -> int:
        """Tokens sent, including those that are forwarded for others."""
        return sum(sum(stage.kv_exchange.send_tokens) for stage in self.stages)

    @cached_property
    def slides(self) -> bool:
        """Whether the window is a sliding one."""
        return self.window.slides

    @cached_property
    def lent(self) -> LentTokens:
        """Own tokens whose gradients also come from outside their fragments."""
        exchanges = (stage.grad_exchange for stage in self.stages)
        returned = (p for exchange in exchanges for some in exchange.receives for p in some)
        ranges = [part.rows for part in returned if not part.in_buffer]
        ranges += (keys for tile in self.own_tiles for keys in tile.keys)
        ranges += (keys for stage in self.stages for tile in stage.tiles for keys in tile.own)
        tokens = TokenIndex(union(ranges))
        return LentTokens(tokens, sum(some.length for some in ranges) == tokens.length)

    @cached_property
    def fragment_borders(self) -> tuple[int, ...]:
        """Borders of the rank's fragments among its tokens, 0 first, T last."""
        return _fragment_borders(self.layout, self.rank)

    @cached_property
    def alone(self) -> tuple[RowRange, ...]:
        """Rows of all fragments that are in no group with their own keys."""
        return union((*self.before, *self.after))

    @cached_property
    def borders_within(self) -> dict[RowRange, tuple[int, ...]]:
        """Borders of the fragments of each of these ranges, 0 first."""
        borders = self.fragment_borders
        return {
            rows: tuple(b - rows.start for b in borders if rows.start <= b <= rows.stop)
            for rows in {*self.before, *self.after, *self.alone}
        }


@lru_cache(maxsize=32)
def plan_ring(
    layout: SequenceLayout,
    rank: int,
    causal: bool,
    rule: StageRule = RULE,
    window: tuple[int, int] = EVERYTHING,
    grouped: bool = True,
) -> RingSchedule:
    """Schedule of ``rank``; the last 32 are kept, so that all layers of a batch share one.

    Padding attends to the padding of its own fragment only: its rows are finite and mean nothing,
    and it is never sent.

    Args:
        layout: the same on every rank.
        rank: in [0, P).
        causal: whether a query sees only itself and what comes before it.
        rule: the same on every rank.
        window: how many tokens before and after itself a query sees at most; -1: no limit.
        grouped: whether query heads share key heads, so that copying keys costs less than one more
            pass over the rows; else no tiles join.

    Raises:
        ValueError: if ``rank`` is not in [0, P).
    """
    own = layout.runs(rank)  # refuses a rank that is none
    longest = max(layout.document_lengths, default=0)
    seen = Window(window[0], 0 if causal else window[1]).within(longest)
    traffic = plan_traffic(layout, seen, rule)
    rectangles = rectangles_of(layout, rank, seen)
    own_tiles = tiles_over(rectangles, TokenIndex(own), seen)
    exchanges = _exchanges(traffic, rank) if traffic.num_stages else []
    of_stages = [tiles_over(rectangles, buffer, seen) for buffer, _, _ in exchanges]
    most = rule.most_joined if grouped else 0
    whole: set[int] = set()
    fragments = list(starmap(RowRange, pairwise(_fragment_borders(layout, rank))))
    moved = max(sum(exchanges[0][1].send_tokens), exchanges[0][0].length) if exchanges else 0
    if not seen.slides:
        own_tiles, of_stages = join_own_tiles(own_tiles, of_stages, most)
        left = sum(local_work(some.length, seen, rule) for some in fragments)
        left -= moved * rule.pairs_per_token
        if grouped:
            whole = whole_fragments(own_tiles, of_stages, seen, left, rule)
    stages = tuple(
        RingStage(buffer.ranges, fetch, tiles, grouped_tiles(tiles, whole, most), back)
        for (buffer, fetch, back), tiles in zip(exchanges, of_stages)
    )
    rows = tuple(rectangle.rows for rectangle in rectangles)
    in_tiles = {rows[rectangle] for rectangle in whole}
    alone = [some for some in fragments if some not in in_tiles]
    around = around_stages(alone, seen, moved, rule)
    return RingSchedule(layout, rank, seen, traffic.route, rows, own_tiles, stages, *around)


def _exchanges(
    traffic: KVTraffic, rank: int
) -> list[tuple[TokenIndex, StageExchange, StageExchange]]:
    """The kv buffer of each stage, how it comes, and where its gradients go."""
    num_ranks = traffic.layout.num_ranks
    messages = messages_of(traffic, rank)
    received = [[d for _, d in some] for some in messages.kv_received]
    own, nothing = TokenIndex(traffic.layout.runs(rank)), TokenIndex(())
    buffers = [TokenIndex((d.start, d.stop) for d in some) for some in received]

    def side(
        messages: list[Message], buffer: TokenIndex
    ) -> tuple[tuple[KVSlices, ...], tuple[int, ...]]:
        """Where the tokens to or from each rank lie, and how many they are."""
        slices: list[list[KVSlice]] = [[] for _ in range(num_ranks)]
        tokens = [0] * num_ranks
        for peer, d in messages:
            holder = own if d.owner == rank else buffer
            found = KVSlice(holder is buffer, holder.find(d.start, d.stop))
            tokens[peer] += found.rows.length
            _append_joined(slices[peer], found)
        return tuple(map(tuple, slices)), tuple(tokens)

    exchanges = []
    around = zip([nothing, *buffers], buffers, [*buffers[1:], nothing])
    for number, (before, buffer, after) in enumerate(around):
        kv_sent, kv_received, grads_sent, grads_received = (some[number] for some in messages)
        fetch = StageExchange(*side(kv_sent, before), *side(kv_received, buffer))
        back = StageExchange(*side(grads_sent, buffer), *side(grads_received, after))
        exchanges.append((buffer, fetch, back))
    return exchanges


def _fragment_borders(layout: SequenceLayout, rank: int) -> tuple[int, ...]:
    starts = (fragment.offset for fragment in layout.fragments(rank))
    return (*starts, layout.num_local_tokens)


def _append_joined(slices: list[KVSlice], new: KVSlice) -> None:
    """Append a slice, or lengthen the last one where the new one follows it."""
    if slices and slices[-1].in_buffer == new.in_buffer and slices[-1].rows.stop == new.rows.start:
        new = KVSlice(new.in_buffer, RowRange(slices.pop().rows.start, new.rows.stop))
    slices.append(new)
