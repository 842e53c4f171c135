"""Merging two softmax partial results over disjoint sets of keys."""

from __future__ import annotations

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


def merge_into(into: Partial, part: Partial) -> None:
    """:func:`merge` in place: ``into``, float32 or float64, becomes the union.

    Float32 accumulators on NVIDIA GPUs are changed by one kernel of :mod:`ring.kernels.merge` that
    reads and writes them once; all others by plain torch.
    """
    if into.output.is_cuda and into.output.dtype == torch.float32:
        from ring.kernels import merge as kernels

        kernels.merge_into(*into, *part)
        return
    merged = merge(into, part)
    into.output.copy_(merged.output)
    into.lse.copy_(merged.lse)
