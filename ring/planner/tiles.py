"""Rectangles, rows of a rank that see keys outside their fragment, and their tiles."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from enum import Enum, auto
from typing import NamedTuple

from lasp.sequence.layout import SequenceLayout
from ring.planner.ranges import RowRange, TokenIndex
from ring.planner.stages import StageRule, local_work
from ring.planner.window import EVERYTHING, Window


class KVTile(NamedTuple):
    """Rows of a rectangle over some of its keys: all rows and no mask, but for sliding windows.

    Attributes:
        rectangle: index into ``RingSchedule.rows``.
        rows: of the rank's tokens, within the rectangle; each sees at least one of the keys.
        keys: ranges of the rank's tokens or of a stage's kv buffer; disjoint, sorted, not empty.
        window: of the rows over the keys, last row and last key aligned; if it is one, they are
            one range.
        own: ranges of the rank's tokens that are keys too, before those of a kv buffer.
        whole: the rows, which are a fragment, are keys too, behind all others: these are all their
            keys, in one call, with the last row and the last key aligned under a causal mask.
    """

    rectangle: int
    rows: RowRange
    keys: tuple[RowRange, ...]
    window: Window = EVERYTHING
    own: tuple[RowRange, ...] = ()
    whole: bool = False

    @property
    def num_keys(self) -> int:
        """Number of keys."""
        others = sum(some.length for some in (*self.own, *self.keys))
        return others + self.rows.length if self.whole else others


class Rectangle(NamedTuple):
    """Rows of a fragment that see keys outside it.

    Attributes:
        rows: of the rank's tokens.
        position: of the first row, in the pack.
        keys: positions in the pack that some of the rows see: before the fragment, behind it.
    """

    rows: RowRange
    position: int
    keys: tuple[RowRange, ...]


def rectangles_of(layout: SequenceLayout, rank: int, window: Window) -> list[Rectangle]:
    """The rectangles of a rank, fragment by fragment; none for padding."""
    found: list[Rectangle] = []
    for fragment in layout.fragments(rank):
        if fragment.document == layout.num_documents:
            continue
        start = layout.document_starts[fragment.document]
        own = RowRange(start + fragment.start, start + fragment.stop)
        stop = start + layout.document_lengths[fragment.document]
        keys = (window.before(own, start), window.after(own, stop))
        sides: list[tuple[RowRange, tuple[RowRange, ...]]]
        sides = [(window.rows(own, some), (some,)) for some in keys if some.length]
        if len(sides) == 2 and sides[0][0].stop > sides[1][0].start:  # they share rows
            sides = [(own, keys)]
        for rows, seen in sides:
            first = fragment.offset + rows.start - own.start
            found.append(Rectangle(RowRange(first, first + rows.length), rows.start, seen))
    return found


def tiles_over(rectangles: list[Rectangle], held: TokenIndex, window: Window) -> tuple[KVTile, ...]:
    """Tiles over the held keys of each rectangle: one, or one a range under a sliding window."""
    tiles: list[KVTile] = []
    for number, (rows, position, keys) in enumerate(rectangles):
        if not window.slides:
            tiles.append(KVTile(number, rows, held.overlap(keys)))
            continue
        places = RowRange(position, position + rows.length)
        for where, seen in (part for side in keys for part in held.parts(side)):
            some = window.rows(places, seen)
            first = rows.start + some.start - position
            of_rank = RowRange(first, first + some.length)
            tiles.append(KVTile(number, of_rank, (where,), window.aligned(some, seen)))
    return tuple(tile for tile in tiles if tile.keys)


def join_own_tiles(
    own_tiles: Sequence[KVTile], of_stages: Sequence[Sequence[KVTile]], most_keys: int
) -> tuple[tuple[KVTile, ...], list[tuple[KVTile, ...]]]:
    """Fewer own tiles, and tiles of stages that have their keys too: the last one of the same rows.

    One tile more costs its rows a merge, and in the backward a second pass over q, output and dq,
    with few keys as much as with many. Joining copies the keys of a tile, at most ``most_keys``.
    """
    held = {tile.rectangle: tile.keys for tile in own_tiles}

    def joined(tile: KVTile) -> KVTile:
        with_own = tile._replace(own=held.get(tile.rectangle, ()))
        if with_own.num_keys > most_keys:
            return tile
        held.pop(tile.rectangle, None)
        return with_own

    tiles = [tuple(joined(tile) for tile in some) for some in reversed(of_stages)]
    return tuple(tile for tile in own_tiles if tile.rectangle in held), tiles[::-1]


def whole_fragments(
    own_tiles: Sequence[KVTile],
    of_stages: Sequence[Sequence[KVTile]],
    window: Window,
    pairs_left: int,
    rule: StageRule,
) -> set[int]:
    """Rectangles whose only tile takes their fragment too, with enough else to do meanwhile.

    Its rows are then read, and their results written, in one call: nothing is merged.

    Args:
        own_tiles: of the rank.
        of_stages: tiles of each stage.
        window: of the rows, not a sliding one.
        pairs_left: pairs within fragments that may wait for a transfer: the others hide it.
        rule: how few rows are not worth it, and how many keys may be copied.
    """
    tiles = [tile for some in of_stages for tile in some]
    times = Counter(tile.rectangle for tile in (*own_tiles, *tiles))
    found = set()
    for tile in tiles:
        pairs = local_work(tile.rows.length, window, rule)
        keys = tile.num_keys + tile.rows.length
        worth_it = tile.rows.length >= rule.call_rows and keys <= rule.most_joined
        if times[tile.rectangle] == 1 and worth_it and pairs <= pairs_left:
            found.add(tile.rectangle)
            pairs_left -= pairs
    return found


def grouped_tiles(
    tiles: Sequence[KVTile], whole: Collection[int], most_keys: int
) -> tuple[tuple[KVTile, ...], ...]:
    """Tiles in groups that one varlen call can take; first those with whole fragments."""
    marked = [tile._replace(whole=tile.rectangle in whole) for tile in tiles]
    first, rest = ([tile for tile in marked if tile.whole is some] for some in (True, False))
    return side_by_side(first, most_keys) + side_by_side(rest, most_keys)


def side_by_side(tiles: Sequence[KVTile], most_keys: int) -> tuple[tuple[KVTile, ...], ...]:
    """Groups of tiles whose rows follow each other, without a sliding window.

    A group of several has at most ``most_keys`` keys, which are copied where they do not lie side
    by side too.
    """
    groups: list[list[KVTile]] = []
    for tile in tiles:
        before = groups[-1] if groups else []
        if (
            before
            and before[-1].rows.stop == tile.rows.start
            and all(some.window == EVERYTHING for some in (before[-1], tile))
            and sum(some.num_keys for some in (*before, tile)) <= most_keys
        ):
            before.append(tile)
        else:
            groups.append([tile])
    return tuple(map(tuple, groups))


class KeySource(Enum):
    """Whose keys they are: of other fragments of the rank, received, or of the rows themselves."""

    OWN = auto()
    RECEIVED = auto()
    ROWS = auto()


def key_ranges(group: Sequence[KVTile]) -> list[tuple[KeySource, RowRange]]:
    """The keys of tiles in order: whose they are, and where."""
    return [
        (source, keys)
        for tile in group
        for source, some in (
            (KeySource.OWN, tile.own),
            (KeySource.RECEIVED, tile.keys),
            (KeySource.ROWS, (tile.rows,) if tile.whole else ()),
        )
        for keys in some
    ]
