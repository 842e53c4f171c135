"""Fragments of documents that are cut, as the traffic counts them."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import defaultdict
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from lasp.sequence.layout import SequenceLayout
from ring.planner.ranges import RowRange
from ring.planner.window import Window


class KVFragment(NamedTuple):
    """A fragment of a cut document, or a part of it under a sliding window, in pack positions."""

    owner: int
    start: int
    stop: int
    document: int


def cut_documents(layout: SequenceLayout) -> list[KVFragment]:
    """Fragments of documents that have several; padding attends to its own fragment only."""
    fragments: list[KVFragment] = []
    counts: dict[int, int] = {}
    for rank in range(layout.num_ranks):
        for fragment in layout.fragments(rank):
            if fragment.document < layout.num_documents:
                base = layout.document_starts[fragment.document]
                where = (base + fragment.start, base + fragment.stop)
                fragments.append(KVFragment(rank, *where, fragment.document))
                counts[fragment.document] = counts.get(fragment.document, 0) + 1
    return [fragment for fragment in fragments if counts[fragment.document] > 1]


def cut_at_windows(
    fragments: list[KVFragment], layout: SequenceLayout, window: Window
) -> list[KVFragment]:
    """The fragments, cut where windows of others begin or end: a part is seen whole or not at all.

    Example: fragments 0:4 and 4:8 of one document, causal, 2 tokens to the left: 0:2, 2:4, 4:8.
    """
    borders: dict[int, set[int]] = defaultdict(set)
    for fragment in fragments:
        before, after = _sides(fragment, layout, window)
        borders[fragment.document] |= {before.start, after.stop}
    cuts = {document: sorted(found) for document, found in borders.items()}
    parts = []
    for fragment in fragments:
        found = cuts[fragment.document]
        inside = found[bisect_right(found, fragment.start) : bisect_left(found, fragment.stop)]
        for start, stop in pairwise((fragment.start, *inside, fragment.stop)):
            parts.append(fragment._replace(start=start, stop=stop))
    return parts


def rows_in_windows(
    parts: list[KVFragment], whole: list[KVFragment], layout: SequenceLayout, window: Window
) -> Tensor:
    """Rows of each rank that see some of a part from outside its fragment: int64 ``[parts, P]``.

    Args:
        parts: of :func:`cut_at_windows`.
        whole: the fragments that they are parts of.
        layout: of both.
        window: of the rows.
    """

    def column(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device="cpu")

    order = sorted(range(len(parts)), key=lambda number: parts[number].start)
    starts, stops = (column([parts[i][field] for i in order]) for field in (1, 2))
    owners, first, last = (column([f[field] for f in whole]) for field in (0, 1, 2))
    left, right = (side if side >= 0 else layout.num_tokens for side in window)
    rows = torch.zeros(len(parts), layout.num_ranks, dtype=torch.int64, device="cpu")
    for side, sides in enumerate(zip(*(_sides(fragment, layout, window) for fragment in whole))):
        # Row by row the parts [low, high) that a fragment sees on this side, in pairs with it.
        low, high = (torch.searchsorted(starts, column(list(some))) for some in zip(*sides))
        viewer = torch.arange(len(whole), device="cpu").repeat_interleave(high - low)
        behind = ((high - low).cumsum(0) - high)[viewer]
        seen = torch.arange(len(viewer), device="cpu") - behind
        if side == 0:
            count = (stops[seen] + left).minimum(last[viewer]) - first[viewer]
        else:
            count = last[viewer] - (starts[seen] - right).maximum(first[viewer])
        rows.index_put_((column(order)[seen], owners[viewer]), count, accumulate=True)
    return rows


def _sides(
    fragment: KVFragment, layout: SequenceLayout, window: Window
) -> tuple[RowRange, RowRange]:
    """Positions that a fragment's rows see before it and behind it."""
    start = layout.document_starts[fragment.document]
    stop = start + layout.document_lengths[fragment.document]
    own = RowRange(fragment.start, fragment.stop)
    return window.before(own, start), window.after(own, stop)
