"""Block kernels: softmax attention of some rows over some keys, forward and backward.

Four kinds behind one interface (:class:`Block`): dense, for the rectangles of the schedule, and
varlen, for the fragments of a rank. Only where queries and keys are the same tokens is there
``causal``: its conventions for unequal lengths never matter.

A backward gets the *merged* output and lse of its rows, so exp(score - lse) is a probability over
all keys: the dq of the blocks add up, dk and dv are final contributions of the rows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ring.merge import Partial

aten = torch.ops.aten


class QKV(NamedTuple):
    """Queries ``[Tq, Hq, D]``, keys and values ``[Tk, Hkv, D]``; or the gradients to them."""

    q: Tensor
    k: Tensor
    v: Tensor


class Segments(NamedTuple):
    """Intervals of the same rows and keys, each attending to itself only; never an empty one.

    Attributes:
        borders: cumulative lengths on the host, 0 first.
        cu_seqlens: the same on the device of the queries, int32.
        causal: whether a row sees only itself and what comes before it.
    """

    borders: tuple[int, ...]
    cu_seqlens: Tensor
    causal: bool

    @property
    def lengths(self) -> tuple[Tensor, Tensor, int, int]:
        """What varlen kernels ask: cu_seqlens and longest segment, of rows and of keys."""
        longest = max(stop - start for start, stop in pairwise(self.borders))
        return self.cu_seqlens, self.cu_seqlens, longest, longest


class Block(ABC):
    """A kind of kernel.

    Query head h reads key head h // (Hq / Hkv). The lse is a natural log in float32 (float64 for
    float64); outputs and gradients come in the dtype of q or wider. Never call it with zero rows
    or zero keys: some kernels fault on them.
    """

    name: str

    @abstractmethod
    def obstacle(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
        """Why this kind cannot run there; None if it can."""

    @abstractmethod
    def forward(self, qkv: QKV, *, causal: bool, scale: float) -> Partial:
        """All rows over all keys; ``causal`` only with Tq = Tk."""

    @abstractmethod
    def backward(
        self, doutput: Tensor, merged: Partial, qkv: QKV, *, causal: bool, scale: float
    ) -> QKV:
        """What these keys contribute to dq, and these rows to dk and dv."""

    def forward_varlen(self, qkv: QKV, segments: Segments, *, scale: float) -> Partial:
        """Each segment over itself."""
        parts = [
            self.forward(QKV(*(x[a:b] for x in qkv)), causal=segments.causal, scale=scale)
            for a, b in pairwise(segments.borders)
        ]
        return Partial(*(torch.cat(tensors) for tensors in zip(*parts)))

    def backward_varlen(
        self, doutput: Tensor, merged: Partial, qkv: QKV, segments: Segments, *, scale: float
    ) -> QKV:
        """What each segment contributes to its own dq, dk and dv."""
        parts = [
            self.backward(
                doutput[a:b],
                Partial(*(x[a:b] for x in merged)),
                QKV(*(x[a:b] for x in qkv)),
                causal=segments.causal,
                scale=scale,
            )
            for a, b in pairwise(segments.borders)
        ]
        return QKV(*(torch.cat(tensors) for tensors in zip(*parts)))


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
            *(_bhtd(x) for x in qkv), 0.0, causal, scale=scale
        )
        return Partial(_thd(output), lse[0].T)

    def backward(
        self, doutput: Tensor, merged: Partial, qkv: QKV, *, causal: bool, scale: float
    ) -> QKV:
        gradients = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *(_bhtd(x) for x in (doutput, *qkv, merged.output)),
            *(merged.lse.T[None], 0.0, causal),
            scale=scale,
        )
        return QKV(*(_thd(x) for x in gradients))


def _bhtd(x_THD: Tensor) -> Tensor:
    return x_THD.transpose(0, 1)[None]


def _thd(x_BHTD: Tensor) -> Tensor:
    return x_BHTD[0].transpose(0, 1)


class _Flash(Block):
    """FlashAttention-2 as PyTorch ships it: one varlen call for all fragments.

    Its dq is bit-reproducible under ``torch.use_deterministic_algorithms(True)`` only.
    """

    name = "flash"
    max_head_dim = 256

    def obstacle(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
        if device.type != "cuda" or torch.version.cuda is None:
            return "needs tensors on an NVIDIA GPU"
        if torch.cuda.get_device_capability(device) < (8, 0):
            return "needs compute capability 8.0 or above"
        if dtype not in (torch.bfloat16, torch.float16):
            return "needs bfloat16 or float16"
        if head_dim % 8 or head_dim > self.max_head_dim:
            return f"needs a head dim that 8 divides, {self.max_head_dim} at most"
        return None

    def forward(self, qkv: QKV, *, causal: bool, scale: float) -> Partial:
        lengths = (None, None, len(qkv.q), len(qkv.k))
        output, lse, *_ = aten._flash_attention_forward(
            *(x[None] for x in qkv), *lengths, 0.0, causal, False, scale=scale
        )
        return Partial(output[0], lse[0].T)

    def backward(
        self, doutput: Tensor, merged: Partial, qkv: QKV, *, causal: bool, scale: float
    ) -> QKV:
        tensors = (doutput, *qkv, merged.output, merged.lse.T.contiguous())
        lengths = (None, None, len(qkv.q), len(qkv.k))
        gradients = aten._flash_attention_backward(
            *(x[None] for x in tensors), *lengths, 0.0, causal, *_no_dropout(qkv.q), scale=scale
        )
        return QKV(*(x[0] for x in gradients))

    def forward_varlen(self, qkv: QKV, segments: Segments, *, scale: float) -> Partial:
        output, lse, *_ = aten._flash_attention_forward(
            *qkv, *segments.lengths, 0.0, segments.causal, False, scale=scale
        )
        return Partial(output, lse.T)

    def backward_varlen(
        self, doutput: Tensor, merged: Partial, qkv: QKV, segments: Segments, *, scale: float
    ) -> QKV:
        args = (doutput, *qkv, merged.output, merged.lse.T.contiguous(), *segments.lengths)
        rest = (0.0, segments.causal, *_no_dropout(qkv.q))
        return QKV(*aten._flash_attention_backward(*args, *rest, scale=scale))


def _no_dropout(q: Tensor) -> tuple[Tensor, Tensor]:
    """The two random-state arguments of a flash backward, which only dropout reads."""
    return torch.zeros(2, dtype=torch.uint64, device=q.device), q.new_empty(0)


class _Cudnn(_Flash):
    """cuDNN for rectangles, FlashAttention-2 for the fragments (cuDNN's varlen form is slower).

    cuDNN runs rectangles faster, but builds a plan for any new (rows, keys) and direction: where
    every batch brings new, small ones choose ``flash``. Thin ones go to it: cuDNN wants two keys.
    """

    name = "cudnn"
    max_head_dim = 128
    min_side = 64

    def forward(self, qkv: QKV, *, causal: bool, scale: float) -> Partial:
        if min(len(qkv.q), len(qkv.k)) < self.min_side:
            return super().forward(qkv, causal=causal, scale=scale)
        output, lse, *_ = aten._scaled_dot_product_cudnn_attention(
            *(_bhtd(x.contiguous()) for x in qkv), None, True, 0.0, causal, scale=scale
        )
        return Partial(_thd(output), lse[0, :, :, 0].T)

    def backward(
        self, doutput: Tensor, merged: Partial, qkv: QKV, *, causal: bool, scale: float
    ) -> QKV:
        if min(len(qkv.q), len(qkv.k)) < self.min_side:
            return super().backward(doutput, merged, qkv, causal=causal, scale=scale)
        lse_BHT1 = merged.lse.T.contiguous()[None, :, :, None]
        seed = torch.zeros((), dtype=torch.int64, device=doutput.device)  # only dropout reads it
        bias, lengths = None, (None, None, len(qkv.q), len(qkv.k))
        gradients = aten._scaled_dot_product_cudnn_attention_backward(
            *(_bhtd(x.contiguous()) for x in (doutput, *qkv, merged.output)),
            *(lse_BHT1, seed, seed, bias, *lengths, 0.0, causal),
            scale=scale,
        )
        return QKV(*(_thd(x) for x in gradients))


BLOCKS: dict[str, Block] = {b.name: b for b in (_Cudnn(), _Flash(), _CpuFlash(), _Eager())}


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
