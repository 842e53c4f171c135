"""Ring attention, forward and backward: what one rank queues, in which order.

Forward, with transfers under the attention::

    transfer   | stage 1 | stage 2 | | stage 3    |
    compute    | local, own tiles | tiles of 1 | tiles of 2 | tiles of 3 |

Two transfers start first. After the tiles of a stage, its memory is free and the transfer of the
stage after the next starts.

A block that writes in place (:attr:`ring.blocks.interface.Block.in_place`) attends to the fragment
of its rows in the tile of a stage, where the other fragments hide the transfer: nothing is merged.

Backward, where such a block computes some fragments first, and other blocks all of them last::

    transfer  | keys 1     | keys 2 |        | gradients 1, keys 3 | gradients 2 | gradients 3     |
    compute   | some local | tiles of 1      | tiles of 2          | tiles of 3  | own tiles, rest |

After its tiles a stage sends the gradients of its kv buffer on, to the next rank of a chain or to
their owner, under the tiles of the next stage. The last ones go under the rest of the local
attention: they have twice the bytes of the keys in 16 bits. What comes from other ranks is added
before a kv buffer's gradients go on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ring import tile_groups
from ring.blocks.gradients import LocalGradients, RowGradients
from ring.blocks.interface import QKV, Block, segments_of
from ring.blocks.merge import Accumulator, Partial
from ring.blocks.sinks import add_sinks
from ring.exchange import (
    KV,
    GradientSums,
    KVPrefetcher,
    KVTransfer,
    accumulate_kv_grads,
    send_kv_grads,
)
from ring.expansion import LatentExpansion
from ring.planner.ranges import TokenIndex
from ring.planner.schedule import RingSchedule, RingStage
from ring.planner.tiles import KeySource, KVTile, key_ranges
from ring.tile_groups import Groups, gather, groups_of, partials_of, seen_by, segments_over


class RingContext(NamedTuple):
    """Everything about a call that is not a tensor.

    Attributes:
        schedule: of this rank.
        cp_group: the context-parallel group; None for one rank.
        block: the kernel.
        scale: factor of the scores.
        expansion: makes keys and values of what moves; None: they move themselves.
    """

    schedule: RingSchedule
    cp_group: dist.ProcessGroup | None
    block: Block
    scale: float
    expansion: LatentExpansion | None = None

    def keys_and_values(self, moving: KV) -> KV:
        """Keys ``[tokens, Hkv, D]`` and values ``[tokens, Hkv, V]`` of what moves."""
        return moving if self.expansion is None else self.expansion.expand(moving[0])


def forward(q: Tensor, moving: KV, context: RingContext, sinks: Tensor | None = None) -> Partial:
    """Output and lse of this rank's tokens.

    Args:
        q: ``[T, Hq, D]``, contiguous.
        moving: k ``[T, Hkv, D]`` and v ``[T, Hkv, V]``, or what an expansion makes them of;
            contiguous.
        context: schedule, group, block, scale and expansion.
        sinks: ``[Hq]``, a logit of each head that no key has; None: none.

    Returns:
        The output in the dtype of ``q`` and the lse in float32 (float64 for float64).
    """
    schedule, block, scale = context.schedule, context.block, context.scale
    stages = KVPrefetcher(moving, schedule, context.cp_group)
    own = context.keys_and_values(moving)
    if block.in_place and schedule.alone != ((0, len(q)),):
        local = tile_groups.local_parts(QKV(q, *own), schedule, block, scale)
    else:
        segments = segments_of(schedule.fragment_borders, q.device, schedule.window)
        local = block.forward_varlen(QKV(q, *own), segments, scale=scale)
    accumulators = _accumulators(local, schedule, block) if schedule.rows else []

    def attend(groups: Groups, kv: KV, release: Callable[[], None]) -> None:
        """Merge tiles; ``release`` when all that reads kv is queued, before the last merge."""
        whole = [group for group in groups if group[0].whole]
        for group in whole:
            rows = slice(group[0].rows.start, group[-1].rows.stop)
            out, part = Partial(*(x[rows] for x in local)), gather(group, q, own, kv)
            segments = segments_over(group, q.device, schedule.window)
            block.forward_to(out, part, segments, scale=scale)
        groups = groups[len(whole) :]
        left = sum(len(_row_tiles(tile, block)) for group in groups for tile in group)
        if not left:
            release()
        for group in groups:
            for number, partial in partials_of(group, gather(group, q, own, kv), block, scale):
                left -= 1
                if not left:
                    release()
                accumulators[number].add(partial)

    if schedule.own_tiles:
        attend([(tile,) for tile in schedule.own_tiles], own, lambda: None)
    for stage, received in stages:
        attend(groups_of(stage, block), context.keys_and_values(received), stages.release)
        del received  # the next kv buffer may have to be put together
    if sinks is not None:
        local = add_sinks(local, sinks)
    return Partial(local.output.to(q.dtype), local.lse) if local.output.dtype != q.dtype else local


def backward(
    doutput: Tensor,
    dlse: Tensor | None,
    merged: Partial,
    q: Tensor,
    moving: KV,
    context: RingContext,
) -> tuple[Tensor, ...]:
    """Gradients to q and to what moves, of this rank's tokens, in their dtypes.

    Sums are in float32 (float64 for float64), rounded once, and in a fixed order. To dq: tiles
    stage by stage, own tiles, own documents. To dk and dv: those of own keys in tiles and of what
    comes back, rank by rank, as they are made, then own documents. A kernel's contributions come
    rounded to its own dtype. With an expansion dk and dv are those of own rows, of which it makes
    the gradient of what moves; what comes back is added to that.

    Args:
        doutput: ``[T, Hq, V]``.
        dlse: ``[T, Hq]``; None if nothing depends on the lse. Else every tile is two calls of a
            block that takes no dlse.
        merged: output and lse from :func:`forward`.
        q: of the forward.
        moving: likewise.
        context: of the forward; its expansion gets the gradient of its weight.
    """
    schedule, expansion = context.schedule, context.expansion
    stages = KVPrefetcher(moving, schedule, context.cp_group)
    own = context.keys_and_values(moving)
    rows = RowGradients(context.block, doutput.contiguous(), dlse, merged, context.scale)
    local, dtype = LocalGradients(QKV(q, *own), rows, schedule), merged.lse.dtype
    if not (schedule.stages or schedule.own_tiles):
        gradients: tuple[Tensor, ...] = local.after_stages()
        returned = None
    else:
        gradients, returned = _over_all_keys(stages, moving, local, context, dtype)
    if expansion is not None:
        dq, dk, dv = gradients
        dmoving = expansion.gradients(moving[0], dk.to(dtype), dv.to(dtype))
        if returned is not None:
            returned.add_to((dmoving,))
        gradients = (dq, dmoving)
    return tuple([x if x.dtype == q.dtype else x.to(q.dtype) for x in gradients])


def _over_all_keys(
    stages: KVPrefetcher,
    moving: KV,
    local: LocalGradients,
    context: RingContext,
    dtype: torch.dtype,
) -> tuple[QKV, GradientSums]:
    """Gradients of own tokens, and sums of what comes back, which are in them but for latents."""
    schedule, alone = context.schedule, context.expansion is not None
    sums = _TileGradients(local, schedule, dtype, alone)
    returned = sums.lent
    if alone:
        returned = GradientSums(schedule.lent.tokens, moving, dtype, once=False)
    returning: KVTransfer | None = None
    local.before_stages()
    for stage, received in stages:
        memory, sent = sums.of_stage(stage, received, context)
        del received
        stages.release()
        if returning is not None:
            accumulate_kv_grads(returning, returned, sent)
        returning = send_kv_grads(stage, memory, sent, context.cp_group)
    sums.add([(tile,) for tile in schedule.own_tiles], local.qkv[1:], sums.lent)
    within = local.after_stages()
    if returning is not None:
        accumulate_kv_grads(returning, returned, returned.kv)  # after the last is no next stage
    sums.add_to(within)
    return within, returned


class _TileGradients:
    """Sums, in ``dtype``, of what tiles contribute to the gradients of this rank's tokens.

    ``lent`` holds dk and dv of own tokens, with ``alone`` those of own tiles only.
    """

    def __init__(
        self, local: LocalGradients, schedule: RingSchedule, dtype: torch.dtype, alone: bool
    ) -> None:
        self._local, self._schedule, self._dtype = local, schedule, dtype
        self._dq: list[Tensor | None] = [None] * len(schedule.rows)
        tokens, once = schedule.lent
        self.lent = GradientSums(tokens, local.qkv[1:], dtype, once=once and not alone)

    def add(self, groups: Groups, kv: KV, sums: GradientSums) -> None:
        """Add gradients of tiles over ``kv``: to dq, and to ``sums`` of the same shapes."""
        q, *own = self._local.qkv
        for group in groups:
            part = gather(group, q, own, kv)
            rows = slice(group[0].rows.start, group[-1].rows.stop)
            if group[0].whole:
                gradients = self._of_whole(group, rows, part)
            else:
                gradients = self._of_tiles(group, rows, part)
            ranges = key_ranges(group)
            lengths = [keys.length for _, keys in ranges]
            for (source, keys), *found in zip(ranges, *(x.split(lengths) for x in gradients)):
                if source is KeySource.ROWS:
                    for memory, gradient in zip(self._local.memory[1:], found):
                        memory[slice(*keys)] = gradient
                else:
                    (self.lent if source is KeySource.OWN else sums).add(keys, found)

    def _of_whole(self, group: Sequence[KVTile], rows: slice, part: QKV) -> KV:
        """Leave dq of whole fragments in its place; dk and dv of all their keys."""
        local = self._local
        out = local.rows.result_memory(part)._replace(q=local.memory.q[rows])
        segments = segments_over(group, part.q.device, self._schedule.window)
        local.rows.write(rows, segments, part, out)
        return out[1:]

    def _of_tiles(self, group: Sequence[KVTile], rows: slice, part: QKV) -> KV:
        """Keep the sums of dq; dk and dv of the keys."""
        found = self._local.rows.over(rows, part, seen_by(group, part.q.device))
        for tile in group:
            of_tile = slice(tile.rows.start - rows.start, tile.rows.stop - rows.start)
            self._add_rows(tile, found.q[of_tile])
        return found[1:]

    def of_stage(self, stage: RingStage, received: KV, context: RingContext) -> tuple[Tensor, KV]:
        """Memory ``[tokens, W]`` with the gradients to what a stage received, and its views."""
        kv, tokens = context.keys_and_values(received), TokenIndex([(0, stage.tokens)])
        sums = GradientSums(tokens, kv, self._dtype, once=stage.seen_once)
        self.add(groups_of(stage, context.block), kv, sums)
        if context.expansion is None:
            return sums.memory, sums.kv
        del kv
        dlatent = context.expansion.gradients(received[0], *sums.kv)
        return dlatent.flatten(1), (dlatent,)

    def _add_rows(self, tile: KVTile, found: Tensor) -> None:
        """Add to the dq of a rectangle; after one tile of all rows it is what the kernel made."""
        rows, dq = self._schedule.rows[tile.rectangle], self._dq[tile.rectangle]
        if dq is None and tile.rows == rows:
            self._dq[tile.rectangle] = found
            return
        if dq is None:
            dq = found.new_zeros(rows.length, *found.shape[1:], dtype=self._dtype)
        self._dq[tile.rectangle] = dq = dq.to(self._dtype)
        dq[tile.rows.start - rows.start : tile.rows.stop - rows.start] += found

    def add_to(self, local: QKV) -> None:
        """Add the sums to the local attention's gradients, in place, and round to their dtype."""
        for rows, dq in zip(self._schedule.rows, self._dq):
            if dq is not None:
                local.q[slice(*rows)].add_(dq)
        self.lent.add_to(local[1:])


def _accumulators(local: Partial, schedule: RingSchedule, block: Block) -> list[Accumulator]:
    """One for each rectangle: only these rows are accumulated, in the precision of the lse."""
    coming: list[list[slice]] = [[] for _ in schedule.rows]  # rows within the rectangle
    for tile in (*schedule.own_tiles, *(tile for stage in schedule.stages for tile in stage.tiles)):
        first = tile.rows.start - schedule.rows[tile.rectangle].start
        for rows in _row_tiles(tile, block):
            coming[tile.rectangle].append(slice(first + rows.start, first + rows.stop))
    return [
        Accumulator(Partial(*(x[slice(*rows)] for x in local)), some)
        for rows, some in zip(schedule.rows, coming)
    ]


def _row_tiles(tile: KVTile, block: Block) -> tuple[slice, ...]:
    return block.row_tiles(tile.rows.length, tile.num_keys)
