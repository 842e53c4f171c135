"""What must hold of the arguments, checked on every rank before any communication."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from lasp.sequence.layout import SequenceLayout


def check_kinds(layout: SequenceLayout | None, cp_group: dist.ProcessGroup | None) -> None:
    """Raise ValueError for what is no layout or no group that holds this rank."""
    if layout is not None and not isinstance(layout, SequenceLayout):
        raise ValueError(f"layout must be a SequenceLayout, got {layout!r}: build one from lengths")
    if cp_group is not None and not isinstance(cp_group, dist.ProcessGroup):
        raise ValueError(
            f"cp_group must be a process group that holds this rank, got {cp_group!r}: call the"
            " operator on the members of the group only"
        )


def locate(
    name: str,
    x: Tensor,
    token_dim: int,
    layout: SequenceLayout,
    cp_group: dist.ProcessGroup | None,
) -> int:
    """The rank within ``cp_group`` that holds the tokens of ``x``, the argument ``name``.

    Raises:
        ValueError: if the layout is of another length or of another number of ranks.
    """
    num_tokens = x.shape[token_dim]
    num_ranks = 1 if cp_group is None else cp_group.size()
    if layout.num_ranks != num_ranks:
        raise ValueError(
            f"layout must be for the {num_ranks} ranks of cp_group, got num_ranks"
            f" {layout.num_ranks}: build it with cp_group.size() and pass that group"
        )
    if layout.num_local_tokens != num_tokens:
        raise ValueError(
            f"layout must hold the {num_tokens} tokens a rank of {name} {tuple(x.shape)}, got"
            f" {layout.num_local_tokens}: is this the layout of this batch, and {name} sharded"
            " by it?"
        )
    return 0 if cp_group is None else cp_group.rank()


def check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise ValueError unless the shapes, dtypes and devices are those of one attention."""
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if q.ndim not in (3, 4) or k.shape != v.shape or k.ndim != q.ndim:
        raise ValueError(
            "q must be [T, Hq, D] or [B, T, Hq, D], k and v [T, Hkv, D] or [B, T, Hkv, D],"
            f" got {shapes}"
        )
    if 0 in (*q.shape, *k.shape):
        raise ValueError(f"q, k and v must not be empty, got {shapes}: drop empty batches")
    if q.shape[:-2] != k.shape[:-2] or q.shape[-1] != k.shape[-1]:
        raise ValueError(f"q, k and v must have the same rows, tokens and head dim, got {shapes}")
    if q.shape[-2] % k.shape[-2]:
        raise ValueError(
            f"the heads of k must divide those of q, got {shapes}: under tensor parallelism"
            " repeat key heads or use fewer ranks"
        )
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise ValueError(f"q must be float16, bfloat16, float32 or float64, got {q.dtype}")
    if {k.dtype, v.dtype} != {q.dtype}:
        raise ValueError(f"q, k and v must have one dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    if {k.device, v.device} != {q.device}:
        raise ValueError(
            f"q, k and v must be on one device, got {q.device}, {k.device}, {v.device}"
        )
