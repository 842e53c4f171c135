"""Tiles as kernels take them: rows and keys side by side, one call for a group of tiles."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from lasp._core.dtypes import wide_dtype
from ring.blocks.interface import QKV, Block, Segments, segments_of
from ring.blocks.merge import Partial
from ring.exchange import KV
from ring.planner.schedule import RingSchedule, RingStage
from ring.planner.tiles import KeySource, KVTile, key_ranges
from ring.planner.window import EVERYTHING, Window

Groups = Sequence[Sequence[KVTile]]  # tiles, those together that one call of a kernel takes


def local_parts(qkv: QKV, schedule: RingSchedule, block: Block, scale: float) -> Partial:
    """Attention of rows within their fragments; memory for rows in groups with their own keys."""
    q, lse_dtype = qkv.q, wide_dtype(qkv.q.dtype)
    output = q.new_empty(*q.shape[:2], qkv.v.shape[-1], dtype=block.result_dtype(q.dtype))
    local = Partial(output, q.new_empty(q.shape[1], len(q), dtype=lse_dtype).T)
    for rows in schedule.alone:
        some = slice(*rows)
        part, out = QKV(*(x[some] for x in qkv)), Partial(*(x[some] for x in local))
        segments = segments_of(schedule.borders_within[rows], q.device, schedule.window)
        block.forward_to(out, part, segments, scale=scale)
    return local


def groups_of(stage: RingStage, block: Block) -> Groups:
    """The tiles of a stage, those together that one call of the kernel takes."""
    return stage.groups if block.in_place else [(tile,) for tile in stage.tiles]


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
    return segments_over(group, device, EVERYTHING)


def segments_over(group: Sequence[KVTile], device: torch.device, window: Window) -> Segments:
    """The rows of each tile with its keys, in a window aligned at their last ones."""
    rows, keys = (
        tuple(accumulate(lengths, initial=0))
        for lengths in zip(*((tile.rows.length, tile.num_keys) for tile in group))
    )
    return segments_of(rows, device, window, keys)


def gather(group: Sequence[KVTile], q: Tensor, own: Sequence[Tensor], kv: KV) -> QKV:
    """Rows and keys of a group; copied only where the keys lie in several ranges."""
    rows = q[group[0].rows.start : group[-1].rows.stop]
    ranges = [(source is KeySource.RECEIVED, keys) for source, keys in key_ranges(group)]
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
