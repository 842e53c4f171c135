"""ring_flash_attn 0.1.8, the public ring attention, over PyTorch's own FlashAttention-2.

It asks for the package ``flash_attn``, which has to be built. Where that is missing, a module of
that name with the two varlen functions stands in for it: the same FlashAttention-2 as PyTorch ships
it on GPUs, and a dense one on CPUs, where only its answers count. Its adapters for Hugging Face are
left out: they need ``transformers``.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
from collections.abc import Iterator
from itertools import pairwise
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.harness import Forward
from lasp import SequenceLayout
from ring.blocks.eager import EagerBlock
from ring.blocks.interface import QKV
from ring.blocks.merge import Partial
from ring.planner.window import CAUSAL, EVERYTHING

VERSION = "0.1.8"
ZIGZAG, LLAMA3 = (f"ring_flash_attn {VERSION} {name}" for name in ("zigzag", "llama3"))
aten = torch.ops.aten
EAGER = EagerBlock()


def obstacle() -> str | None:
    """Why the peer cannot run here; None if it can."""
    if importlib.util.find_spec("ring_flash_attn") is None:
        return "ring_flash_attn is not installed"
    found = importlib.metadata.version("ring_flash_attn")
    return None if found == VERSION else f"ring_flash_attn is {found}, not {VERSION}"


def zigzag(layout: SequenceLayout) -> Forward:
    """One document in the zigzag order, causal: the only case that both can do."""
    module = _module("zigzag_ring_flash_attn_varlen")
    tokens = layout.num_local_tokens

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cu_seqlens = torch.tensor([0, tokens], dtype=torch.int32, device=q.device)
        output: Tensor = module.zigzag_ring_flash_attn_varlen_func(
            q, k, v, cu_seqlens, tokens, causal=True, group=dist.group.WORLD
        )
        return output

    return forward


def llama3(layout: SequenceLayout, causal: bool, device: str) -> Forward:
    """Any pack in the contiguous order; two key heads gathered at a time, as in its own tests."""
    module = _module("llama3_flash_attn_varlen")
    borders = torch.tensor(layout.borders, dtype=torch.int32, device=device)
    cu_q, cu_k, max_q, max_k, keys = module.llama3_flash_attn_prepare_cu_seqlens(
        borders, causal, dist.get_rank(), layout.num_ranks
    )

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        output: Tensor = module.llama3_flash_attn_varlen_func(
            q, k, v, cu_q, cu_k, max_q, max_k, 1 if k.shape[1] % 2 else 2, keys,
            causal=causal, group=dist.group.WORLD,
        )  # fmt: skip
        return output

    return forward


def _module(name: str) -> Any:
    if "ring_flash_attn" not in sys.modules:
        adapters: Any = ModuleType("ring_flash_attn.adapters")
        adapters.substitute_hf_flash_attn = adapters.update_ring_flash_attn_params = None
        sys.modules[adapters.__name__] = adapters
        if importlib.util.find_spec("flash_attn") is None:
            interface: Any = ModuleType("flash_attn.flash_attn_interface")
            interface._flash_attn_varlen_forward = varlen_forward
            interface._flash_attn_varlen_backward = varlen_backward
            interface._flash_attn_forward = interface._flash_attn_backward = None  # of batches
            sys.modules["flash_attn"] = ModuleType("flash_attn")
            sys.modules[interface.__name__] = interface
    return importlib.import_module(f"ring_flash_attn.{name}")


# Their parameters are those of flash-attn 2.8: callers look at the names.
def varlen_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    return_softmax: bool = False,
) -> tuple[Tensor, Tensor, None, None]:
    """Output ``[T, Hq, D]`` and lse ``[Hq, T]``."""
    if q.is_cuda:
        output, lse, *_ = aten._flash_attention_forward(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
            0.0, causal, False, scale=softmax_scale,
        )  # fmt: skip
        return output, lse, None, None
    parts, window = [], CAUSAL if causal else EVERYTHING
    for rows, keys in _segments(cu_seqlens_q, cu_seqlens_k):
        first = keys.stop - keys.start - (rows.stop - rows.start)
        qkv = QKV(_aligned(q[rows], first), k[keys], v[keys])
        parts.append([x[first:] for x in EAGER.forward(qkv, window=window, scale=softmax_scale)])
    outputs, lses = zip(*parts)
    return torch.cat(outputs).to(q.dtype), torch.cat(lses).T.float(), None, None


def varlen_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
) -> None:
    """Into dq, dk and dv."""
    if q.is_cuda:
        gradients = aten._flash_attention_backward(
            dout, q, k, v, out, softmax_lse.contiguous(), cu_seqlens_q, cu_seqlens_k,
            max_seqlen_q, max_seqlen_k, 0.0, causal,
            torch.zeros(2, dtype=torch.uint64, device=q.device), q.new_empty(0),
            scale=softmax_scale,
        )  # fmt: skip
        for into, gradient in zip((dq, dk, dv), gradients):
            into.copy_(gradient)
        return
    for rows, keys in _segments(cu_seqlens_q, cu_seqlens_k):
        first = keys.stop - keys.start - (rows.stop - rows.start)
        own = (q[rows], dout[rows], out[rows], softmax_lse[:, rows].T)
        q_SHD, do_SHD, *merged = (_aligned(x, first) for x in own)
        gradients = EAGER.backward(
            do_SHD, Partial(*merged), QKV(q_SHD, k[keys], v[keys]),
            window=CAUSAL if causal else EVERYTHING, scale=softmax_scale,
        )  # fmt: skip
        for into, gradient in ((dq[rows], gradients.q[first:]), (dk[keys], gradients.k),
                               (dv[keys], gradients.v)):  # fmt: skip
            into.copy_(gradient)


def _segments(cu_q: Tensor, cu_k: Tensor) -> Iterator[tuple[slice, slice]]:
    for rows, keys in zip(pairwise(cu_q.tolist()), pairwise(cu_k.tolist())):
        yield slice(*rows), slice(*keys)


def _aligned(x: Tensor, first: int) -> Tensor:
    """Rows before the first, so that the last row sees the last key under a causal mask."""
    return torch.cat([x.new_zeros(first, *x.shape[1:]), x])
