"""What every layer of a hybrid decoder must know of a packed batch, besides its tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch.distributed as dist

from lasp._core.checks import check_part, check_sizes
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
    tp_size: int = 1,
    order: Order,
    padded_lengths: Sequence[Sequence[int]] | None = None,
    group: dist.ProcessGroup | None = None,
) -> PackedBatch:
    """Layout of this replica's pack and the router's order over the packs of all replicas.

    The router sees the packs of replicas 0, 1, ... end to end, without padding, so that what it
    drops does not depend on the parallel sizes.

    Args:
        document_lengths: for every data-parallel replica the lengths of its documents.
        dp_rank: this replica.
        num_ranks: size of the cp group.
        tp_size: tensor-parallel ranks that split a cp rank's tokens further, as Megatron's sequence
            parallelism does; the last document is padded until they divide.
        order: of every layout.
        padded_lengths: likewise with the padding after each document, see
            :class:`lasp.SequenceLayout`.
        group: the ranks that call this for the same batch: compare what they were given. It is all
            of dp x cp (x tp) if every one of them calls. None compares nothing: data loaders may
            run on some ranks only, where a collective that nobody asked for would wait for the
            others.

    Communication: with a group one all-gather of 128 bytes a rank, and a wait for it.

    Raises:
        ValueError: naming the argument; on every rank of ``group``, with the ranks that hold each,
            if their packs differ.
    """
    check_part("group", group, dist.ProcessGroup, optional=True)
    layouts: list[SequenceLayout] = []
    error: ValueError | TypeError | None = None
    try:
        check_sizes(tp_size=tp_size)
        layouts = _replica_layouts(document_lengths, padded_lengths, dp_rank, num_ranks, order)
        layouts = [_divisible(layout, tp_size) for layout in layouts]
    except (ValueError, TypeError) as refused:  # compared too: the others would wait for this rank
        error = refused
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
    return PackedBatch(layouts[dp_rank], router_order(layouts, tp_size))


def _replica_layouts(
    document_lengths: Sequence[Sequence[int]],
    padded_lengths: Sequence[Sequence[int]] | None,
    dp_rank: int,
    num_ranks: int,
    order: Order,
) -> list[SequenceLayout]:
    documents = _of_replicas("document_lengths", document_lengths)
    if dp_rank not in range(len(documents)):
        raise ValueError(
            f"dp_rank must be in [0, {len(documents)}), the replicas that document_lengths"
            f" names, got {dp_rank!r}"
        )
    padded: Sequence[tuple[int, ...] | None] = [None] * len(documents)
    if padded_lengths is not None:
        padded = _of_replicas("padded_lengths", padded_lengths)
    if len(padded) != len(documents):
        raise ValueError(
            f"padded_lengths must hold the documents of the {len(documents)} replicas that"
            f" document_lengths names, got {len(padded)}"
        )
    return [
        SequenceLayout(lengths, num_ranks, order, own) for lengths, own in zip(documents, padded)
    ]


def _of_replicas(name: str, lengths: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
    try:
        return [tuple(own) for own in lengths]
    except TypeError:  # numbers have no parts
        raise ValueError(
            f"{name} must hold the lengths of every replica, [[5, 3]] for one, got {lengths!r}"
        ) from None


def _divisible(layout: SequenceLayout, tp_size: int) -> SequenceLayout:
    """The layout with as much more padding at its tail as ``tp_size`` needs."""
    if tp_size == 1:
        return layout
    num_ranks, order = layout.num_ranks, layout.order
    *padded, last = layout.padded_lengths or layout.document_lengths
    multiple = num_ranks * tp_size * (2 if order in ("zigzag", "document_zigzag") else 1)
    last += -(sum(padded) + last) % multiple
    return SequenceLayout(layout.document_lengths, num_ranks, order, (*padded, last))


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
