"""Block attention in plain torch: the kernel that runs anywhere."""

from __future__ import annotations

import torch
from torch import Tensor

from lasp._core.dtypes import wide_dtype
from ring.blocks.interface import QKV, Block, Operands
from ring.blocks.merge import Partial
from ring.planner.window import EVERYTHING, Window


class EagerBlock(Block):
    """Plain torch for any device and dtype: every score is in memory, in float32 or float64.

    Results stay in that precision, so that what is merged from several tiles is rounded once.
    """

    name = "eager"
    in_place = True

    def result_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """float32, or float64 for float64."""
        return wide_dtype(dtype)

    def obstacle(self, operands: Operands) -> str | None:
        """Return None: it runs anywhere."""
        return None

    def forward(self, qkv: QKV, *, window: Window, scale: float) -> Partial:
        """Softmax of all scores at once."""
        scores_HGTS = _scores(_grouped(qkv.q, qkv.k), _wide(qkv.k), window, scale)
        lse_HGT = scores_HGTS.logsumexp(-1)
        p_HGTS = (scores_HGTS - lse_HGT.unsqueeze(-1)).exp()
        output_THGV = torch.einsum("hgts,shv->thgv", p_HGTS, _wide(qkv.v))
        return Partial(output_THGV.flatten(1, 2), lse_HGT.flatten(0, 1).T)

    def backward(
        self, doutput: Tensor, merged: Partial, qkv: QKV, *, window: Window, scale: float
    ) -> QKV:
        """Recompute the scores and differentiate them."""
        k_SHD, v_SHV = _wide(qkv.k), _wide(qkv.v)
        q_THGD, do_THGV, o_THGV = (_grouped(x, qkv.k) for x in (qkv.q, doutput, merged.output))
        lse_HGT = merged.lse.T.unflatten(0, q_THGD.shape[1:3])
        delta_HGT = (do_THGV * o_THGV).sum(-1).permute(1, 2, 0)
        p_HGTS = (_scores(q_THGD, k_SHD, window, scale) - lse_HGT.unsqueeze(-1)).exp()
        dp_HGTS = torch.einsum("thgv,shv->hgts", do_THGV, v_SHV)
        ds_HGTS = scale * p_HGTS * (dp_HGTS - delta_HGT.unsqueeze(-1))
        return QKV(
            torch.einsum("hgts,shd->thgd", ds_HGTS, k_SHD).flatten(1, 2),
            torch.einsum("hgts,thgd->shd", ds_HGTS, q_THGD),
            torch.einsum("hgts,thgv->shv", p_HGTS, do_THGV),
        )


def _wide(x: Tensor) -> Tensor:
    return x.to(wide_dtype(x.dtype))


def _grouped(x_THD: Tensor, k: Tensor) -> Tensor:
    """Query heads by the key head they read: [T, Hkv, Hq / Hkv, D]."""
    return _wide(x_THD).reshape(len(x_THD), k.shape[1], -1, x_THD.shape[-1])


def _scores(q_THGD: Tensor, k_SHD: Tensor, window: Window, scale: float) -> Tensor:
    scores_HGTS: Tensor = scale * torch.einsum("thgd,shd->hgts", q_THGD, k_SHD)
    if window == EVERYTHING:
        return scores_HGTS
    seen_TS = torch.ones_like(scores_HGTS[0, 0], dtype=torch.bool)
    ahead = seen_TS.shape[1] - seen_TS.shape[0]  # the last row stands at the last key
    if window.right >= 0:
        seen_TS = seen_TS.tril(ahead + window.right)
    if window.left >= 0:
        seen_TS = seen_TS.triu(ahead - window.left)
    return scores_HGTS.masked_fill_(seen_TS.logical_not_(), float("-inf"))
