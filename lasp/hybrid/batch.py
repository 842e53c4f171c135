"""What every layer of a hybrid decoder must know of a packed batch, besides its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

from lasp.layout import Order, SequenceLayout
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
    document_lengths: Sequence[Sequence[int]], *, dp_rank: int, num_ranks: int, order: Order
) -> PackedBatch:
    """Layout of this replica's pack and the router's order over the packs of all replicas.

    Args:
        document_lengths: for every data-parallel replica the lengths of its documents.
        dp_rank: this replica.
        num_ranks: size of the cp group.
        order: of every layout.

    The router sees the packs of replicas 0, 1, ... end to end, without padding, so that what it
    drops does not depend on the parallel sizes.
    """
    if not 0 <= dp_rank < len(document_lengths):
        raise ValueError(
            f"dp_rank must be in [0, {len(document_lengths)}), the replicas that document_lengths"
            f" names, got {dp_rank}"
        )
    layouts = [SequenceLayout(tuple(lengths), num_ranks, order) for lengths in document_lengths]
    starts = accumulate((layout.num_real_tokens for layout in layouts), initial=0)
    segments = []
    for layout, start in zip(layouts, starts, strict=False):
        for rank in range(num_ranks):
            offset, of_rank = 0, []
            for run in layout.runs(rank):
                length = min(run.stop, layout.num_real_tokens) - run.start
                if length > 0:
                    of_rank.append(TokenSegment(start + run.start, offset, length))
                offset += run.stop - run.start
            segments.append(tuple(of_rank))
    rows = [layout.num_local_tokens for layout in layouts for _ in range(num_ranks)]
    return PackedBatch(layouts[dp_rank], TokenOrder(tuple(segments), tuple(rows)))
