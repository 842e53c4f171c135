"""Merging two softmax partial results over disjoint sets of keys."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor


class Partial(NamedTuple):
    """Softmax attention of some query rows over some of their keys.

    Attributes:
        output: ``[T, Hq, D]``, normalised over these keys.
        lse: ``[T, Hq]``, natural log of the sum of exp(score); -inf for a row without a key.
            float32, or float64 where the output is.
    """

    output: Tensor
    lse: Tensor


def merge(a: Partial, b: Partial) -> Partial:
    """Attention over the union of two disjoint sets of keys.

    Equation, with m = max(lse_a, lse_b), w = exp(lse - m)::

        lse = m + log(w_a + w_b)        o = (w_a o_a + w_b o_b) / (w_a + w_b)

    A row without a key on one side takes the other side exactly; without a key on either, its
    output is 0 and its lse -inf. The larger weight is exactly 1, so no NaN and no overflow.

    Args:
        a: one partial; any mixture of dtypes.
        b: the other.

    Returns:
        The merged partial in the dtype of the lse: a 16-bit output is never accumulated in 16 bits.
    """
    m_TH = torch.maximum(a.lse, b.lse)
    m_TH = m_TH.masked_fill(m_TH == float("-inf"), 0.0)
    weight_a_TH, weight_b_TH = (a.lse - m_TH).exp(), (b.lse - m_TH).exp()
    total_TH = weight_a_TH + weight_b_TH
    share_a_TH1 = (weight_a_TH / total_TH.clamp(min=1.0)).unsqueeze(-1)
    share_b_TH1 = (weight_b_TH / total_TH.clamp(min=1.0)).unsqueeze(-1)
    return Partial(share_a_TH1 * a.output + share_b_TH1 * b.output, m_TH + total_TH.log())


def merge_to(out: Partial, a: Partial, b: Partial) -> None:
    """:func:`merge` into memory, which may be that of ``a``; its output is rounded to its dtype.

    On NVIDIA GPUs with a float32 lse by the kernel of :mod:`ring.blocks.merge_kernel`, which reads
    and writes everything once; else by plain torch.
    """
    if out.output.is_cuda and out.lse.dtype == torch.float32:
        from ring.blocks import merge_kernel as kernels

        kernels.merge_to(*out, *a, *b)
        return
    merged = merge(a, b)
    out.output.copy_(merged.output)
    out.lse.copy_(merged.lse)


class Accumulator:
    """Rows to which partials over further keys are merged, one after the other.

    Sums are in the dtype of the lse and are rounded once. A row's first merge reads the output that
    is there, its last one writes the result in its place, and between them it is in a tensor of
    sums. None is needed for rows with one merge, or for an output in the dtype of the lse.

    Args:
        rows: output and lse so far; changed, complete after the last partial.
        coming: the rows of each partial that will be added, in order.
    """

    def __init__(self, rows: Partial, coming: Iterable[slice]) -> None:
        self._rows, self._sums = rows, rows.output
        self._merges = iter(plan_merges(tuple((some.start, some.stop) for some in coming)))

    def add(self, part: Partial) -> None:
        """Merge the next partial, over the rows announced for it."""
        (output, lse), dtype = self._rows, self._rows.lse.dtype
        merges = next(self._merges)
        for start, stop, first, last in merges:
            if self._sums.dtype != dtype and not (first and last):
                self._sums = torch.empty_like(output, dtype=dtype)
            some = slice(start, stop)
            a = Partial((output if first else self._sums)[some], lse[some])
            out = Partial((output if last else self._sums)[some], lse[some])
            offset = merges[0].start
            merge_to(out, a, Partial(*(x[start - offset : stop - offset] for x in part)))


class RowMerge(NamedTuple):
    """Rows [start, stop) of a partial, and whether it is the first or the last one they get."""

    start: int
    stop: int
    first: bool
    last: bool


@lru_cache(maxsize=4096)
def plan_merges(coming: tuple[tuple[int, int], ...]) -> tuple[tuple[RowMerge, ...], ...]:
    """The merges of each partial, as few as possible; partials are given as rows [start, stop).

    Example: with partials of rows 0:4, 4:6 and 0:6 the third is the last one for all rows: one
    merge. With 0:4 and 0:6 the second is the last one for 0:4 and the only one for 4:6: two merges.
    """
    borders = sorted({border for rows in coming for border in rows})
    turns = {  # of rows between borders: the partials that they get
        low: [n for n, (start, stop) in enumerate(coming) if start <= low < stop]
        for low in borders[:-1]
    }
    planned = []
    for number, (start, stop) in enumerate(coming):
        merges: list[RowMerge] = []
        for low, high in pairwise(border for border in borders if start <= border <= stop):
            kind = (number == turns[low][0], number == turns[low][-1])
            if merges and (merges[-1].first, merges[-1].last) == kind:
                low = merges.pop().start
            merges.append(RowMerge(low, high, *kind))
        planned.append(tuple(merges))
    return tuple(planned)
