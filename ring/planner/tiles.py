"""Rectangles, rows of a rank that see keys outside their fragment, and their tiles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from lasp.sequence.layout import SequenceLayout
from ring.planner.ranges import RowRange, TokenIndex
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
    """

    rectangle: int
    rows: RowRange
    keys: tuple[RowRange, ...]
    window: Window = EVERYTHING
    own: tuple[RowRange, ...] = ()

    @property
    def num_keys(self) -> int:
        """Number of keys in all ranges."""
        return sum(some.length for some in (*self.own, *self.keys))


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


def side_by_side(tiles: Sequence[KVTile], most_keys: int) -> tuple[tuple[KVTile, ...], ...]:
    """Tiles in groups that one varlen call can take: rows that follow each other, no window.

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


def key_ranges(group: Sequence[KVTile]) -> list[tuple[bool, RowRange]]:
    """The keys of tiles in order: whether they were received or are own ones, and where."""
    return [
        (received, keys)
        for tile in group
        for received, some in ((False, tile.own), (True, tile.keys))
        for keys in some
    ]
