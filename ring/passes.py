"""Ring attention, forward and backward: what one rank queues, in which order.

Forward::

    start the first transfer
    local attention; tiles over own keys          } under it
    for each stage: wait; start the next transfer; tiles over the slab

Backward: the same with gradients. After its tiles the gradients of a slab go on, to the next rank
of a chain or to their owner, under the tiles of the next stage; what came is added before they go.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ring.exchange import (
    KV,
    Arrivals,
    Transfer,
    add_returned,
    give_back,
    kept_slabs,
    make_buffers,
)
from ring.interface import QKV, Block, Segments
from ring.merge import Partial
from ring.schedule import RingSchedule, Tile


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


def forward(qkv: QKV, call: Call, *, keep_kv: bool) -> tuple[Partial, Tensor]:
    """Output and lse of this rank's tokens, and the received keys and values if they are kept.

    Args:
        qkv: ``[T, Hq, D]``, ``[T, Hkv, D]`` twice; the last dim contiguous.
        call: the rest.
        keep_kv: whether stages have memory of their own, for :func:`backward`.

    Returns:
        The output in the dtype of ``q`` and the lse in float32 (float64 for float64); and
        the messages of all stages ``[2 R, Hkv, D]``, R = 0 if not kept.
    """
    schedule, block = call.schedule, call.block
    kept, buffers = make_buffers(qkv.k, schedule, keep=keep_kv)
    arrivals = Arrivals(qkv.k, qkv.v, schedule, call.cp_group, buffers)
    local = block.forward_varlen(qkv, _segments(schedule, qkv.q.device), scale=call.scale)
    # Only rows of rectangles are accumulated: in the precision of the lse, rounded once at the end.
    into = [
        Partial(local.output[slice(*rows)].to(local.lse.dtype), local.lse[slice(*rows)])
        for rows in schedule.rows
    ]

    def attend(tiles: Iterable[Tile], k: Tensor, v: Tensor) -> None:
        for tile in tiles:
            part = _of_tile(tile, qkv.q, k, v, schedule)
            block.forward_into(into[tile.rectangle], part, scale=call.scale)

    attend(schedule.own_tiles, qkv.k, qkv.v)
    for stage, k, v in arrivals:
        attend(stage.tiles, k, v)
        arrivals.release()
    for rows, partial in zip(schedule.rows, into):
        if partial.output.dtype != local.output.dtype:  # else it is a view
            local.output[slice(*rows)] = partial.output
    return Partial(local.output.to(qkv.q.dtype), local.lse), kept


def backward(doutput: Tensor, merged: Partial, qkv: QKV, call: Call, kept: Tensor | None) -> QKV:
    """Gradients to q, k and v of this rank's tokens, in their dtypes.

    Sums are in float32 (float64 for float64) and in a fixed order: own documents, own tiles, then
    stage by stage what this rank computes (dq) and what comes back, rank by rank (dk and dv). A
    kernel's contributions come rounded to its own dtype.

    Args:
        doutput: ``[T, Hq, D]``.
        merged: what :func:`forward` returned.
        qkv: what it was given.
        call: likewise.
        kept: likewise; None: keys and values are fetched again.
    """
    schedule, block, wide = call.schedule, call.block, merged.lse.dtype
    fetched: Arrivals | None = None
    if kept is None:
        _, buffers = make_buffers(qkv.k, schedule, keep=False)
        fetched = Arrivals(qkv.k, qkv.v, schedule, call.cp_group, buffers)
        arrivals = iter(fetched)
    else:
        arrivals = kept_slabs(kept, schedule)
    doutput = doutput.contiguous()
    segments = _segments(schedule, qkv.q.device)
    local = block.backward_varlen(doutput, merged, qkv, segments, scale=call.scale)
    dq, dkv = local.q.to(wide), (local.k.to(wide), local.v.to(wide))

    def differentiate(tiles: Iterable[Tile], k: Tensor, v: Tensor, into: KV) -> None:
        for tile in tiles:
            rows = slice(*schedule.rows[tile.rectangle])
            of_rows = Partial(*(x[rows] for x in merged))
            part = _of_tile(tile, qkv.q, k, v, schedule)
            outside = block.backward(doutput[rows], of_rows, part, causal=False, scale=call.scale)
            dq[rows] += outside.q
            _scatter_add(tile, outside, into)

    differentiate(schedule.own_tiles, qkv.k, qkv.v, dkv)
    returning: Transfer | None = None
    for stage, k, v in arrivals:
        dslab = k.new_zeros(2, *k.shape, dtype=wide)
        differentiate(stage.tiles, k, v, dslab)
        if fetched is not None:
            fetched.release()
        if returning is not None:
            add_returned(returning, dkv, dslab)
        returning = give_back(stage, dslab, call.cp_group)
    if returning is not None:
        add_returned(returning, dkv, dkv)  # there is no next slab, and nothing for one
    return QKV(dq.to(qkv.q.dtype), *(x.to(qkv.k.dtype) for x in dkv))


def _segments(schedule: RingSchedule, device: torch.device) -> Segments:
    layout, rank = schedule.layout, schedule.rank
    starts = (fragment.offset for fragment in layout.fragments(rank))
    borders = (*starts, layout.num_local_tokens)
    return Segments(borders, layout.cu_seqlens(rank, device), schedule.causal)


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
