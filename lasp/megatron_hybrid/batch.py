"""Packed micro-batches for every layer of a hybrid model, the experts' router included."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from lasp.layout import Order, SequenceLayout
from lasp.megatron import PackedSequence
from moe_parallel import TokenOrder, TokenSegment


def pack_sequences(
    document_lengths: Sequence[Sequence[int]],
    *,
    dp_rank: int,
    cp_size: int,
    tp_size: int = 1,
    order: Order,
) -> PackedSequence:
    """This replica's layout and the router's order over all ranks, for one micro-batch.

    With ``tp_size`` > 1 the pack is padded to tokens that divide over sequence parallelism, by a
    last document that no expert sees; :func:`lasp.megatron.shard_batch` pads the tensors.

    Args:
        document_lengths: for every data-parallel replica the lengths of its documents.
        dp_rank: this replica.
        cp_size: context-parallel ranks.
        tp_size: tensor-parallel ranks that split the tokens further.
        order: of every layout.
    """
    real = [sum(lengths) for lengths in document_lengths]
    layouts = [_divisible(tuple(lengths), cp_size, tp_size, order) for lengths in document_lengths]
    segments, rows = [], []
    for layout, first, tokens in zip(layouts, accumulate(real, initial=0), real):
        length = layout.num_local_tokens // tp_size
        for cp_rank in range(cp_size):
            for tp_rank in range(tp_size):
                window = (tp_rank * length, (tp_rank + 1) * length)
                segments.append(_segments(layout, cp_rank, window, first, tokens))
                rows.append(length)
    token_order = TokenOrder(tuple(segments), tuple(rows))
    layout = layouts[dp_rank]
    padding = layout.num_real_tokens - real[dp_rank]
    return PackedSequence(layout=layout, token_order=token_order, padding=padding)


def _divisible(
    lengths: tuple[int, ...], cp_size: int, tp_size: int, order: Order
) -> SequenceLayout:
    multiple = cp_size * tp_size * (2 if order == "zigzag" else 1)
    padding = -sum(lengths) % multiple if tp_size > 1 else 0
    return SequenceLayout(lengths + (padding,) * (padding > 0), cp_size, order)


def _segments(
    layout: SequenceLayout, rank: int, window: tuple[int, int], first: int, num_real: int
) -> tuple[TokenSegment, ...]:
    """Real tokens among rows ``window`` of a rank, pack position 0 at global position ``first``."""
    segments, row = [], 0
    for run in layout.runs(rank):
        start = max(row, window[0])
        stop = min(row + run.stop - run.start, window[1], row + num_real - run.start)
        if stop > start:
            position = first + run.start + start - row
            segments.append(TokenSegment(position, start - window[0], stop - start))
        row += run.stop - run.start
    return tuple(segments)
