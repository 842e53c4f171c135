"""Tiling for two kernels: the faster one for dense tiles of few shapes, another for the rest.

cuDNN is the fastest dense kernel, but it builds a plan for every new (rows, keys) and direction, of
about 100 ms, and packs bring new lengths with every batch. So the sides of its tiles are 4 to 7
times a power of two (:func:`ring.planner.stages.bucket`): four sizes an octave and about 600 pairs
up to 65536, each planned once. The rest, less than 1024 rows or keys at the edges of a rectangle,
goes to the other kernel::

                     keys: bucket   bucket   rest
    rows: bucket           dense    dense    other
    rows: rest             other    other    other

A long fragment under a causal mask is cut into squares of such sizes and a rest. Each but the first
also has a rectangle over all that comes before it in the fragment. Short fragments and rests that
lie side by side go into one varlen call::

                     keys: square     square     rest
    rows: square           dense
    rows: square           rectangle  dense
    rows: rest             rectangle  rectangle  varlen

Measured on an H100 (64 query and 8 key heads of 128, bfloat16): dense causal 580 and 533 TFLOP/s
forward and backward at 32768 tokens, 570 and 487 at 8192, against 351 and 323 of the varlen call.
The thresholds below were chosen from these, not measured.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

from torch import Tensor

from ring.blocks.interface import QKV, Block, Operands, Segments, segments_of, wide_like
from ring.blocks.merge import Accumulator, Partial
from ring.planner.stages import bucket
from ring.planner.window import CAUSAL, EVERYTHING, Window

MIN_SIDE = 1024  # rows and keys of a dense tile, at least
MAX_SIDE = 65536  # and at most: offsets within 64 heads of 128 stay far below 2^31
MIN_SQUARE = 4096  # shorter fragments stay in the varlen call


class KernelTile(NamedTuple):
    """Some rows over some keys; ``dense``: the dense kernel takes them, else the other one."""

    rows: slice
    keys: slice
    dense: bool


class LocalTiling(NamedTuple):
    """How the fragments of a rank are tiled.

    Attributes:
        squares: long fragments or parts of them, each attending to itself.
        stretches: borders of adjacent segments, for one varlen call each.
        rectangles: rows of a square or a rest, and the keys before them in their fragment.
    """

    squares: tuple[slice, ...]
    stretches: tuple[tuple[int, ...], ...]
    rectangles: tuple[tuple[slice, slice], ...]


def tile_side(length: int, smallest: int) -> list[int]:
    """Buckets from ``smallest`` to ``MAX_SIDE``, then the rest if any; they sum to ``length``."""
    sizes = []
    while length >= smallest:
        sizes.append(min(bucket(length), MAX_SIDE))
        length -= sizes[-1]
    return [*sizes, length] if length else sizes


@lru_cache(maxsize=4096)
def tile_rectangle(rows: int, keys: int) -> tuple[KernelTile, ...]:
    """Dense tiles, then what is left: keys beyond the last bucket, and rows beyond it."""
    sides = [[n for n in tile_side(length, MIN_SIDE) if n >= MIN_SIDE] for length in (rows, keys)]
    dense_rows, dense_keys = map(sum, sides)
    if not dense_rows or not dense_keys:
        return (KernelTile(slice(0, rows), slice(0, keys), False),)
    tiles = [KernelTile(r, k, True) for r in _slices(sides[0]) for k in _slices(sides[1])]
    if dense_keys < keys:
        tiles.append(KernelTile(slice(0, dense_rows), slice(dense_keys, keys), False))
    if dense_rows < rows:
        tiles.append(KernelTile(slice(dense_rows, rows), slice(0, keys), False))
    return tuple(tiles)


@lru_cache(maxsize=256)
def tile_segments(borders: tuple[int, ...], causal: bool) -> LocalTiling:
    """Tile the segments with these borders."""
    squares: list[slice] = []
    stretches: list[list[int]] = []
    rectangles: list[tuple[slice, slice]] = []
    for start, stop in pairwise(borders):
        # Without a mask a long segment is a square of any size, which is cut like a rectangle.
        long = stop - start >= MIN_SQUARE
        sizes = tile_side(stop - start, MIN_SQUARE) if causal else [stop - start]
        position = start
        for size in sizes:
            end = position + size
            if long and (not causal or size >= MIN_SQUARE):
                squares.append(slice(position, end))
            elif stretches and stretches[-1][-1] == position:
                stretches[-1].append(end)
            else:
                stretches.append([position, end])
            if position > start:
                rectangles.append((slice(position, end), slice(start, position)))
            position = end
    return LocalTiling(tuple(squares), tuple(map(tuple, stretches)), tuple(rectangles))


class TiledBlock(Block):
    """``dense`` for tiles of few shapes, ``other`` for what is left.

    Args:
        name: name of the block.
        dense: the faster kernel; its obstacles are those of the block.
        other: a kernel that runs wherever ``dense`` does.
    """

    def __init__(self, name: str, dense: Block, other: Block) -> None:
        self.name, self.dense, self.other = name, dense, other

    def obstacle(self, operands: Operands) -> str | None:
        """Return the obstacle of ``dense``."""
        return self.dense.obstacle(operands)

    def forward(self, qkv: QKV, *, window: Window, scale: float) -> Partial:
        """Run a causal square in one call, a rectangle tile by tile."""
        tiles = tile_rectangle(len(qkv.q), len(qkv.k))
        if window == CAUSAL or len(tiles) == 1:
            block = self.dense if tiles[0].dense else self.other
            return block.forward(qkv, window=window, scale=scale)
        lse = wide_like(qkv.q[..., 0]).fill_(float("-inf"))
        into = Partial(lse.new_zeros(*lse.shape, qkv.v.shape[-1]), lse)
        self._merge(into, qkv, scale)
        return into

    def row_tiles(self, rows: int, keys: int) -> tuple[slice, ...]:
        """Rows of each tile."""
        return tuple(tile.rows for tile in tile_rectangle(rows, keys))

    def forward_parts(self, qkv: QKV, *, window: Window, scale: float) -> Iterator[Partial]:
        """One partial for each tile, so that each is merged once; without a mask."""
        for tile in tile_rectangle(len(qkv.q), len(qkv.k)):
            block = self.dense if tile.dense else self.other
            part = QKV(qkv.q[tile.rows], qkv.k[tile.keys], qkv.v[tile.keys])
            yield block.forward(part, window=EVERYTHING, scale=scale)

    def _merge(self, into: Partial, qkv: QKV, scale: float) -> None:
        """Merge all rows over all keys into what these rows have so far."""
        accumulator = Accumulator(into, self.row_tiles(len(qkv.q), len(qkv.k)))
        for partial in self.forward_parts(qkv, window=EVERYTHING, scale=scale):
            accumulator.add(partial)

    def backward(
        self, doutput: Tensor, merged: Partial, qkv: QKV, *, window: Window, scale: float
    ) -> QKV:
        """Gradients; those of several tiles are summed in float32 (float64 for float64)."""
        tiles = tile_rectangle(len(qkv.q), len(qkv.k))
        if window == CAUSAL or len(tiles) == 1:
            block = self.dense if tiles[0].dense else self.other
            return block.backward(doutput, merged, qkv, window=window, scale=scale)
        sums = QKV(*(wide_like(x).zero_() for x in qkv))
        for rows, keys, dense in tiles:
            block = self.dense if dense else self.other
            part = QKV(qkv.q[rows], qkv.k[keys], qkv.v[keys])
            of_rows = Partial(*(x[rows] for x in merged))
            grads = block.backward(doutput[rows], of_rows, part, window=EVERYTHING, scale=scale)
            for into, gradient in zip(_at(sums, rows, keys), grads):
                into += gradient
        return sums

    def forward_varlen(self, qkv: QKV, segments: Segments, *, scale: float) -> Partial:
        """Segments in tiles; rows of a rectangle are merged in float32 (float64 for float64)."""
        local = tile_segments(segments.borders, segments.window == CAUSAL)
        if not local.squares:
            return self.other.forward_varlen(qkv, segments, scale=scale)
        if local.squares == (slice(0, len(qkv.q)),):
            return self.forward(qkv, window=segments.window, scale=scale)
        output = qkv.q.new_empty(*qkv.q.shape[:2], qkv.v.shape[-1])
        lse = wide_like(qkv.q[..., 0])
        for rows in local.squares:
            part = QKV(*(x[rows] for x in qkv))
            partial = self.forward(part, window=segments.window, scale=scale)
            output[rows], lse[rows] = partial
        for rows, stretch in _stretches(local, segments):
            part = QKV(*(x[rows] for x in qkv))
            output[rows], lse[rows] = self.other.forward_varlen(part, stretch, scale=scale)
        for rows, keys in local.rectangles:
            part = QKV(qkv.q[rows], qkv.k[keys], qkv.v[keys])
            self._merge(Partial(output[rows], lse[rows]), part, scale)
        return Partial(output, lse)

    def backward_varlen(
        self, doutput: Tensor, merged: Partial, qkv: QKV, segments: Segments, *, scale: float
    ) -> QKV:
        """Gradients of the tiles; with long segments summed in float32 (float64 for float64)."""
        local = tile_segments(segments.borders, segments.window == CAUSAL)
        if not local.squares:
            return self.other.backward_varlen(doutput, merged, qkv, segments, scale=scale)
        if local.squares == (slice(0, len(qkv.q)),):
            return self.backward(doutput, merged, qkv, window=segments.window, scale=scale)

        def of(rows: slice, keys: slice) -> tuple[Tensor, Partial, QKV]:
            part = QKV(qkv.q[rows], qkv.k[keys], qkv.v[keys])
            return doutput[rows], Partial(*(x[rows] for x in merged)), part

        sums = QKV(*(wide_like(x) for x in qkv))
        # Squares and stretches have every token once: theirs is stored, not added.
        for rows in local.squares:
            grads = self.backward(*of(rows, rows), window=segments.window, scale=scale)
            for into, gradient in zip(sums, grads):
                into[rows] = gradient
        for rows, stretch in _stretches(local, segments):
            grads = self.other.backward_varlen(*of(rows, rows), stretch, scale=scale)
            for into, gradient in zip(sums, grads):
                into[rows] = gradient
        for rows, keys in local.rectangles:
            grads = self.backward(*of(rows, keys), window=EVERYTHING, scale=scale)
            for into, gradient in zip(_at(sums, rows, keys), grads):
                into += gradient
        return sums


def _slices(sizes: list[int]) -> Iterator[slice]:
    position = 0
    for size in sizes:
        yield slice(position, position + size)
        position += size


def _at(sums: QKV, rows: slice, keys: slice) -> QKV:
    return QKV(sums.q[rows], sums.k[keys], sums.v[keys])


def _stretches(local: LocalTiling, segments: Segments) -> Iterator[tuple[slice, Segments]]:
    for start, *ends in local.stretches:
        borders = (0, *(end - start for end in ends))
        device = segments.cu_seqlens.device
        yield slice(start, ends[-1]), segments_of(borders, device, segments.window)
