"""Packed micro-batches for every layer of a hybrid model, the experts' router included."""

from __future__ import annotations

from collections.abc import Sequence

from lasp.hybrid.batch import replica_layouts, router_order
from lasp.layout import Order, SequenceLayout
from lasp.megatron import PackedSequence


def pack_sequences(
    document_lengths: Sequence[Sequence[int]],
    *,
    dp_rank: int,
    cp_size: int,
    tp_size: int = 1,
    order: Order,
    padded_lengths: Sequence[Sequence[int]] | None = None,
) -> PackedSequence:
    """This replica's layout and the router's order over all ranks, for one micro-batch.

    With ``tp_size`` > 1 the last document is padded until the tokens of a rank divide over sequence
    parallelism. No expert sees padding; :func:`lasp.megatron.shard_batch` pads the tensors.

    Args:
        document_lengths: for every data-parallel replica the lengths of its documents.
        dp_rank: this replica.
        cp_size: context-parallel ranks.
        tp_size: tensor-parallel ranks that split the tokens further.
        order: of every layout.
        padded_lengths: likewise with the padding after each document, see
            :class:`lasp.SequenceLayout`.
    """
    layouts = [
        _divisible(layout, tp_size)
        for layout in replica_layouts(document_lengths, padded_lengths, cp_size, order)
    ]
    return PackedSequence(layout=layouts[dp_rank], token_order=router_order(layouts, tp_size))


def _divisible(layout: SequenceLayout, tp_size: int) -> SequenceLayout:
    """The layout with as much more padding at its tail as ``tp_size`` needs."""
    if tp_size == 1:
        return layout
    cp_size, order = layout.num_ranks, layout.order
    *padded, last = layout.padded_lengths or layout.document_lengths
    multiple = cp_size * tp_size * (2 if order in ("zigzag", "document_zigzag") else 1)
    last += -(sum(padded) + last) % multiple
    return SequenceLayout(layout.document_lengths, cp_size, order, (*padded, last))
