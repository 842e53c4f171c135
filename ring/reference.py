"""Dense softmax attention over a pack: the oracle every other path is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens: Sequence[int],
    causal: bool,
    scale: float,
    window: tuple[int, int] = (-1, -1),
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention within each document, with every score in memory.

    For query t and the keys s of its document (s <= t if causal, t - left <= s <= t + right)::

        lse_t = log sum_s exp(scale q_t . k_s)        o_t = sum_s exp(scale q_t . k_s - lse_t) v_s

    Args:
        q: ``[S, Hq, D]``, any floating dtype.
        k: ``[S, Hkv, D]``; query head h reads key head h // (Hq / Hkv).
        v: ``[S, Hkv, V]``.
        cu_seqlens: N + 1 cumulative document lengths, 0 first, S last.
        causal: a query sees itself and what comes before it.
        scale: factor of the scores.
        window: left and right; -1 is no limit.
        sinks: ``[Hq]``, one more term exp(sink) in the sum of every row, without a value.

    Returns:
        Output ``[S, Hq, V]`` and log-sum-exp ``[S, Hq]``, in the dtype of ``q``.

    Gradients: to ``q``, ``k``, ``v`` and ``sinks`` by autograd, any order.
    """
    groups = q.shape[1] // k.shape[1]
    outputs, lses = [], []
    for start, stop in pairwise(cu_seqlens):
        q_LHD = q[start:stop]
        k_LHD = k[start:stop].repeat_interleave(groups, dim=1)
        v_LHV = v[start:stop].repeat_interleave(groups, dim=1)
        scores_HLL = scale * torch.einsum("qhd,khd->hqk", q_LHD, k_LHD)
        t, s = torch.arange(stop - start)[:, None], torch.arange(stop - start)
        seen = (s <= t) if causal else torch.ones(len(t), len(t), dtype=torch.bool)
        seen = seen & (s >= t - window[0]) if window[0] >= 0 else seen
        seen = seen & (s <= t + window[1]) if window[1] >= 0 else seen
        scores_HLL = scores_HLL.masked_fill(~seen.to(q.device), float("-inf"))
        if sinks is not None:
            sinks_HL1 = sinks[:, None, None].expand(*scores_HLL.shape[:2], 1)
            scores_HLL = torch.cat((scores_HLL, sinks_HL1), dim=-1)
        p_HLL = scores_HLL.softmax(-1)[..., : stop - start]
        outputs.append(torch.einsum("hqk,khv->qhv", p_HLL, v_LHV))
        lses.append(scores_HLL.logsumexp(-1).T)
    return torch.cat(outputs), torch.cat(lses)
