"""Tiles as kernels take them: rows and keys side by side, one call for a group of tiles."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from ring.blocks.interface import QKV, Block, Segments, segments_of
from ring.blocks.merge import Partial
from ring.exchange import KV
from ring.planner.schedule import RingStage
from ring.planner.tiles import KVTile, key_ranges
from ring.planner.window import EVERYTHING, Window

Groups = Sequence[Sequence[KVTile]]  # tiles, those together that one call of a kernel takes


def groups_of(stage: RingStage, block: Block) -> Groups:
    """The tiles of a stage, those together that one call of the kernel takes."""
    return stage.groups if block.joins_tiles else [(tile,) for tile in stage.tiles]


def partials_of(
    group: Sequence[KVTile], part: QKV, block: Block, scale: float
) -> Iterator[tuple[int, Partial]]:
    """Attention of a group with the rectangle of each partial, one call for several tiles."""
    seen, first = seen_by(group, part.q.device), group[0].rows.start
    if isinstance(seen, Window):
        for partial in block.forward_parts(part, window=seen, scale=scale):
            yield group[0].rectangle, partial
        return
    output, lse = block.forward_varlen(part, seen, scale=scale)
    for tile in group:
        rows = slice(tile.rows.start - first, tile.rows.stop - first)
        yield tile.rectangle, Partial(output[rows], lse[rows])


def seen_by(group: Sequence[KVTile], device: torch.device) -> Window | Segments:
    """Which keys the rows of one tile see, or of several, each its own keys."""
    if len(group) == 1:
        return group[0].window
    rows, keys = (
        tuple(accumulate(lengths, initial=0))
        for lengths in zip(*((tile.rows.length, tile.num_keys) for tile in group))
    )
    return segments_of(rows, device, EVERYTHING, keys)


def gather(group: Sequence[KVTile], q: Tensor, own: Sequence[Tensor], kv: KV) -> QKV:
    """Rows and keys of a group; copied only where the keys lie in several ranges."""
    rows = q[group[0].rows.start : group[-1].rows.stop]
    ranges = key_ranges(group)
    received, (start, stop) = ranges[0]
    for also, keys in ranges[1:]:
        if (also, keys.start) != (received, stop):
            break
        stop = keys.stop
    else:
        return QKV(rows, *(x[start:stop] for x in (kv if received else own)))
    return QKV(
        rows,
        *(torch.cat([pair[i][slice(*keys)] for i, keys in ranges]) for pair in zip(own, kv)),
    )
