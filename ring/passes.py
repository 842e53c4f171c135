"""Ring attention, forward and backward: what one rank queues, in which order.

Forward::

    start two transfers
    local attention; tiles over own keys          } under them
    for each stage: wait; tiles over the slab; start the transfer of the stage after the next

Backward: stages first, own tiles and the local attention last. After its tiles the gradients of a
slab go on, to the next rank of a chain or to their owner, under the tiles of the next stage, those
of the last one under the local attention: they are twice the bytes of the keys in 16 bits, whose
first transfer nothing hides then. What came is added before they go.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ring.blocks.gradients import RowGradients
from ring.blocks.interface import QKV, Block, Segments, cu_seqlens
from ring.blocks.merge import Accumulator, Partial
from ring.exchange import (
    KV,
    Arrivals,
    Transfer,
    add_returned,
    give_back,
)
from ring.planner.schedule import RingSchedule, Tile


class Call(NamedTuple):
    """Everything about a call that is not a tensor.

    Attributes:
        schedule: of this rank.
        cp_group: the context-parallel group; None for one rank.
        block: the kernel.
        scale: factor of the scores.
    """

    schedule: RingSchedule
    cp_group: dist.ProcessGroup | None
    block: Block
    scale: float


def forward(qkv: QKV, call: Call) -> Partial:
    """Output and lse of this rank's tokens.

    Args:
        qkv: ``[T, Hq, D]``, ``[T, Hkv, D]`` twice; the last dim contiguous.
        call: the rest.

    Returns:
        The output in the dtype of ``q`` and the lse in float32 (float64 for float64).
    """
    schedule, block = call.schedule, call.block
    arrivals = Arrivals(qkv.k, qkv.v, schedule, call.cp_group)
    local = block.forward_varlen(qkv, _segments(schedule, qkv.q.device), scale=call.scale)
    tiles = (*schedule.own_tiles, *(tile for stage in schedule.stages for tile in stage.tiles))

    def cuts(tile: Tile) -> tuple[slice, ...]:
        return block.row_cuts(schedule.rows[tile.rectangle].tokens, tile.num_keys)

    # Only rows of rectangles are accumulated: in the precision of the lse, rounded at the end.
    into = [
        Accumulator(
            Partial(*(x[slice(*rows)] for x in local)),
            (cut for tile in tiles if tile.rectangle == number for cut in cuts(tile)),
        )
        for number, rows in enumerate(schedule.rows)
    ]

    def attend(tiles: Sequence[Tile], k: Tensor, v: Tensor, release: Callable[[], None]) -> None:
        """Merge tiles; ``release`` when all that reads k and v is queued, before the last merge."""
        left = sum(len(cuts(tile)) for tile in tiles)
        if not left:
            release()
        for tile in tiles:
            part = _of_tile(tile, qkv.q, k, v, schedule)
            for partial in block.forward_parts(part, scale=call.scale):
                left -= 1
                if not left:
                    release()
                into[tile.rectangle].add(partial)

    attend(schedule.own_tiles, qkv.k, qkv.v, lambda: None)
    for stage, k, v in arrivals:
        attend(stage.tiles, k, v, arrivals.release)
        del k, v  # the next slab may have to be put together
    return Partial(local.output.to(qkv.q.dtype), local.lse)


def backward(
    doutput: Tensor,
    dlse: Tensor | None,
    merged: Partial,
    qkv: QKV,
    call: Call,
) -> QKV:
    """Gradients to q, k and v of this rank's tokens, in their dtypes.

    Sums are in float32 (float64 for float64), rounded once, and in a fixed order. To dq: tiles
    stage by stage, own tiles, own documents. To dk and dv: what comes back from each stage but the
    last, rank by rank, own tiles, what comes back from the last, own documents. A kernel's
    contributions come rounded to its own dtype.

    Args:
        doutput: ``[T, Hq, D]``.
        dlse: ``[T, Hq]``; None if nothing depends on the lse. Else every tile is two calls of the
            block.
        merged: what :func:`forward` returned.
        qkv: what it was given.
        call: likewise.
    """
    schedule, wide = call.schedule, merged.lse.dtype
    arrivals = Arrivals(qkv.k, qkv.v, schedule, call.cp_group)
    of_rows = RowGradients(call.block, doutput.contiguous(), dlse, merged, call.scale)
    dq: list[Tensor | None] = [None] * len(schedule.rows)
    across = bool(schedule.own_tiles or schedule.stages)
    dkv = qkv.k.new_zeros(2, len(qkv.k) if across else 0, *qkv.k.shape[1:], dtype=wide)

    def differentiate(tiles: Iterable[Tile], k: Tensor, v: Tensor, into: KV) -> None:
        for tile in tiles:
            part = _of_tile(tile, qkv.q, k, v, schedule)
            outside = of_rows.over(slice(*schedule.rows[tile.rectangle]), part)
            so_far = dq[tile.rectangle]  # of one tile it stays what the kernel returned
            dq[tile.rectangle] = outside.q if so_far is None else so_far.to(wide).add_(outside.q)
            _scatter_add(tile, outside, into)

    returning: Transfer | None = None
    for stage, k, v in arrivals:
        dslab = k.new_zeros(2, *k.shape, dtype=wide)
        differentiate(stage.tiles, k, v, dslab)
        del k, v
        arrivals.release()
        if returning is not None:
            add_returned(returning, dkv, dslab)
        returning = give_back(stage, dslab, call.cp_group)
    differentiate(schedule.own_tiles, qkv.k, qkv.v, dkv)
    local = of_rows.within(_segments(schedule, qkv.q.device), qkv)
    if returning is not None:
        add_returned(returning, dkv, dkv)  # there is no next slab, and nothing for one
    for rows, outside_q in zip(schedule.rows, dq):
        _add_once(local.q[slice(*rows)], outside_q)
    if across:
        _add_once(local.k, dkv[0])
        _add_once(local.v, dkv[1])
    return QKV(*(x.to(y.dtype) for x, y in zip(local, qkv)))


def _add_once(into: Tensor, outside: Tensor | None) -> None:
    """Add in place, in the wider dtype of the two, and round to that of ``into``."""
    if outside is not None:
        into += outside


def _segments(schedule: RingSchedule, device: torch.device) -> Segments:
    layout, rank = schedule.layout, schedule.rank
    starts = (fragment.offset for fragment in layout.fragments(rank))
    borders = (*starts, layout.num_local_tokens)
    return Segments(borders, cu_seqlens(borders, device), schedule.causal)


def _of_tile(tile: Tile, q: Tensor, k: Tensor, v: Tensor, schedule: RingSchedule) -> QKV:
    """Rows and keys of a tile; copied only where the keys lie in several pieces."""
    rows = q[slice(*schedule.rows[tile.rectangle])]
    if len(tile.keys) == 1:
        keys = slice(*tile.keys[0])
        return QKV(rows, k[keys], v[keys])
    return QKV(rows, *(torch.cat([x[slice(*keys)] for keys in tile.keys]) for x in (k, v)))


def _scatter_add(tile: Tile, grads: QKV, into: KV) -> None:
    """Add a tile's dk and dv where :func:`_of_tile` took k and v from."""
    lengths = [keys.tokens for keys in tile.keys]
    for target, gradient in zip(into, (grads.k, grads.v)):
        for keys, part in zip(tile.keys, gradient.split(lengths)):
            target[slice(*keys)] += part
