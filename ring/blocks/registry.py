"""The block kernels by name, and those that run anywhere: plain torch and PyTorch's for CPUs."""

from __future__ import annotations

import torch
from torch import Tensor

from ring.blocks.gpu import CudnnDense, Flash
from ring.blocks.interface import QKV, Block, Segments, bhtd, thd
from ring.blocks.merge import Partial
from ring.blocks.tiling import CutBlock

__all__ = ["BLOCKS", "QKV", "Block", "Segments", "resolve_block"]

aten = torch.ops.aten


class _Eager(Block):
    """Plain torch, any device and dtype: every score in memory, in float32 or float64.

    Results stay in that precision, so that what is merged from several blocks is rounded once.
    """

    name = "eager"

    def obstacle(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
        return None

    def forward(self, qkv: QKV, *, causal: bool, scale: float) -> Partial:
        scores_HGTS = _scores(_grouped(qkv.q, qkv.k), _wide(qkv.k), causal, scale)
        lse_HGT = scores_HGTS.logsumexp(-1)
        p_HGTS = (scores_HGTS - lse_HGT.unsqueeze(-1)).exp()
        output_THGD = torch.einsum("hgts,shd->thgd", p_HGTS, _wide(qkv.v))
        return Partial(output_THGD.flatten(1, 2), lse_HGT.flatten(0, 1).T.contiguous())

    def backward(
        self, doutput: Tensor, merged: Partial, qkv: QKV, *, causal: bool, scale: float
    ) -> QKV:
        k_SHD, v_SHD = _wide(qkv.k), _wide(qkv.v)
        q_THGD, do_THGD, o_THGD = (_grouped(x, qkv.k) for x in (qkv.q, doutput, merged.output))
        lse_HGT = merged.lse.T.unflatten(0, q_THGD.shape[1:3])
        delta_HGT = (do_THGD * o_THGD).sum(-1).permute(1, 2, 0)
        p_HGTS = (_scores(q_THGD, k_SHD, causal, scale) - lse_HGT.unsqueeze(-1)).exp()
        dp_HGTS = torch.einsum("thgd,shd->hgts", do_THGD, v_SHD)
        ds_HGTS = scale * p_HGTS * (dp_HGTS - delta_HGT.unsqueeze(-1))
        return QKV(
            torch.einsum("hgts,shd->thgd", ds_HGTS, k_SHD).flatten(1, 2),
            torch.einsum("hgts,thgd->shd", ds_HGTS, q_THGD),
            torch.einsum("hgts,thgd->shd", p_HGTS, do_THGD),
        )


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _grouped(x_THD: Tensor, k: Tensor) -> Tensor:
    """Query heads by the key head they read: [T, Hkv, Hq / Hkv, D]."""
    return _wide(x_THD).reshape(len(x_THD), k.shape[1], -1, x_THD.shape[-1])


def _scores(q_THGD: Tensor, k_SHD: Tensor, causal: bool, scale: float) -> Tensor:
    scores_HGTS: Tensor = scale * torch.einsum("thgd,shd->hgts", q_THGD, k_SHD)
    if causal:
        future_TS = torch.ones_like(scores_HGTS[0, 0], dtype=torch.bool).triu(1)
        scores_HGTS.masked_fill_(future_TS, float("-inf"))
    return scores_HGTS


class _CpuFlash(Block):
    """PyTorch's flash attention for CPUs. For 16-bit tensors its lse is good to about 1e-5."""

    name = "cpu_flash"

    def obstacle(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
        return None if device.type == "cpu" else "needs CPU tensors"

    def forward(self, qkv: QKV, *, causal: bool, scale: float) -> Partial:
        output, lse = aten._scaled_dot_product_flash_attention_for_cpu(
            *(bhtd(x) for x in qkv), 0.0, causal, scale=scale
        )
        return Partial(thd(output), lse[0].T)

    def backward(
        self, doutput: Tensor, merged: Partial, qkv: QKV, *, causal: bool, scale: float
    ) -> QKV:
        gradients = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *(bhtd(x) for x in (doutput, *qkv, merged.output)),
            *(merged.lse.T[None], 0.0, causal),
            scale=scale,
        )
        return QKV(*(thd(x) for x in gradients))


_FLASH = Flash()
_CUDNN = CutBlock("cudnn", CudnnDense(), _FLASH)
BLOCKS: dict[str, Block] = {b.name: b for b in (_CUDNN, _FLASH, _CpuFlash(), _Eager())}


def resolve_block(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> Block:
    """The kind called ``name``, for tensors like these.

    ``auto`` is the first of ``cudnn``, ``flash``, ``cpu_flash``, ``eager`` without an obstacle:
    ``cudnn`` on NVIDIA GPUs of compute capability 8.0 and above in bfloat16 or float16 with a head
    dim up to 128 (``flash`` up to 256), ``cpu_flash`` on CPUs, ``eager`` for all else.

    Raises:
        ValueError: if the name is unknown or the kind cannot run there.
    """
    if name == "auto":
        return next(b for b in BLOCKS.values() if b.obstacle(device, dtype, head_dim) is None)
    if name not in BLOCKS:
        raise ValueError(f"block must be one of {('auto', *BLOCKS)}, got {name!r}")
    if (obstacle := BLOCKS[name].obstacle(device, dtype, head_dim)) is not None:
        raise ValueError(
            f"block {name!r} {obstacle}, got {dtype} on {device.type}, head dim {head_dim}: use"
            ' "auto", or "eager" for any tensors'
        )
    return BLOCKS[name]
