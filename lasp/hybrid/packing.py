"""What every layer of a hybrid decoder must know of a packed batch, besides its tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch.distributed as dist

from lasp._core.consistency import check_same_on_ranks
from lasp.sequence.layout import Order, RealTokens, SequenceLayout
from moe_parallel import TokenOrder, TokenSegment


class PackedBatch(NamedTuple):
    """What every layer must know of a batch besides its tokens; equal on all ranks of a cp group.

    Attributes:
        layout: which tokens of this data-parallel replica's pack each cp rank holds.
        token_order: where the tokens of all ranks stand in the order of the router.
    """

    layout: SequenceLayout
    token_order: TokenOrder


def pack_batch(
    document_lengths: Sequence[Sequence[int]],
    *,
    dp_rank: int,
    num_ranks: int,
    order: Order,
    padded_lengths: Sequence[Sequence[int]] | None = None,
    group: dist.ProcessGroup | None = None,
) -> PackedBatch:
    """Layout of this replica's pack and the router's order over the packs of all replicas.

    Args:
        document_lengths: for every data-parallel replica the lengths of its documents.
        dp_rank: this replica.
        num_ranks: size of the cp group.
        order: of every layout.
        padded_lengths: likewise with the padding after each document, see
            :class:`lasp.SequenceLayout`.
        group: the ranks that call this for the same batch, all of dp x cp: compare what they were
            given. None: the caller knows that it is equal.

    The router sees the packs of replicas 0, 1, ... end to end, without padding, so that what it
    drops does not depend on the parallel sizes.

    Communication: with a group one all-gather of 128 bytes a rank, and a wait for it.

    Raises:
        ValueError: naming the argument; on every rank of ``group``, with the ranks that hold each,
            if their packs differ.
    """
    layouts = agreed_layouts(
        lambda: replica_layouts(document_lengths, padded_lengths, dp_rank, num_ranks, order), group
    )
    return PackedBatch(layouts[dp_rank], router_order(layouts))


def replica_layouts(
    document_lengths: Sequence[Sequence[int]],
    padded_lengths: Sequence[Sequence[int]] | None,
    dp_rank: int,
    num_ranks: int,
    order: Order,
) -> list[SequenceLayout]:
    """The layout of every replica; ValueError unless the arguments name each, ``dp_rank`` too."""
    if not 0 <= dp_rank < len(document_lengths):
        raise ValueError(
            f"dp_rank must be in [0, {len(document_lengths)}), the replicas that document_lengths"
            f" names, got {dp_rank}"
        )
    padded = [None] * len(document_lengths) if padded_lengths is None else padded_lengths
    if len(padded) != len(document_lengths):
        raise ValueError(
            f"padded_lengths must hold the documents of the {len(document_lengths)} replicas that"
            f" document_lengths names, got {len(padded)}"
        )
    return [
        SequenceLayout(tuple(lengths), num_ranks, order, None if own is None else tuple(own))
        for lengths, own in zip(document_lengths, padded)
    ]


def agreed_layouts(
    make: Callable[[], list[SequenceLayout]], group: dist.ProcessGroup | None, tp_size: int = 1
) -> list[SequenceLayout]:
    """What ``make`` returns, the same on every rank of ``group`` if there is one.

    Raises:
        ValueError: that of ``make``; and on every rank of ``group``, unless all hold the same. A
            rank whose arguments are refused is compared too: the others would wait for it.
    """
    error: ValueError | None = None
    try:
        layouts = make()
    except ValueError as refused:
        if group is None:
            raise
        layouts, error = [], refused
    if group is not None:
        check_same_on_ranks(
            "document_lengths, padded_lengths, order and the parallel sizes",
            [tp_size, *(number for layout in layouts for number in layout.numbers)],
            f"no pack: {error}" if error else _described(layouts, tp_size),
            group,
            "give every rank the lengths of all replicas, for example gathered or broadcast",
        )
    if error is not None:
        raise error
    return layouts


def _described(layouts: Sequence[SequenceLayout], tp_size: int) -> str:
    documents = sum(layout.num_documents for layout in layouts)
    tokens = sum(layout.num_real_tokens for layout in layouts)
    first = layouts[0]
    return (
        f"{documents} documents of {tokens} tokens in {len(layouts)} replicas over"
        f" {first.num_ranks} x {tp_size} ranks, order {first.order}"
    )


def router_order(layouts: Sequence[SequenceLayout], tp_size: int = 1) -> TokenOrder:
    """The documents' tokens of all replicas end to end, as tp x cp x dp ranks hold them.

    Args:
        layouts: of the replicas; their ranks' tokens divide by ``tp_size``.
        tp_size: ranks that split the tokens of a context-parallel rank further, in equal parts.
    """
    segments, rows = [], []
    firsts = accumulate((layout.num_real_tokens for layout in layouts), initial=0)
    for layout, first in zip(layouts, firsts):
        length = layout.num_local_tokens // tp_size
        for cp_rank in range(layout.num_ranks):
            real = layout.real_tokens(cp_rank)
            for start in range(0, layout.num_local_tokens, length):
                segments.append(tuple(_within(real, start, start + length, first)))
                rows.append(length)
    return TokenOrder(tuple(segments), tuple(rows))


def _within(
    real: Sequence[RealTokens], start: int, stop: int, first: int
) -> Iterator[TokenSegment]:
    """What lies in rows [start, stop) of a rank; the first token of the pack is at ``first``."""
    for position, offset, length in real:
        low, high = max(offset, start), min(offset + length, stop)
        if high > low:
            yield TokenSegment(first + position + low - offset, low - start, high - low)
