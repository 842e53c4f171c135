"""Packs, random tensors, rank functions and comparisons shared by the ring tests."""

from __future__ import annotations

import math
from functools import partial
from itertools import accumulate, pairwise
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

from lasp._core.rotary import RopeScaling, rotary_table, rotated
from lasp.sequence.layout import SequenceLayout
from ring import ring_attention
from ring.planner.schedule import plan_ring
from ring.planner.stages import RULE, StageRule
from ring.planner.window import CAUSAL, EVERYTHING, Window
from ring.reference import dense_attention
from tests.closeness import assert_equal_to_rounding, assert_within_budget
from tests.ranks import run_on_ranks

# Borders on, before and after rank and run cuts; lengths 0 and 1; one over all; many tiny ones.
PACKS = (
    (16,),
    (1,),
    (8, 8),
    (7, 9),
    (9, 7),
    (5, 1, 10),
    (0, 4, 0, 0, 7, 1, 0),
    (1,) * 13,
    (37, 1, 2),
    (2, 1, 40, 3),
    (1, 2, 1) * 60 + (23,),
)
HEADS = ((4, 2), (6, 2), (3, 1), (5, 5))
ORDERS = ("contiguous", "zigzag", "fold")
NOTHING_HIDES = 10**9  # pairs per token: as many stages as are allowed
WHOLE = StageRule(4, 1, 1, row_pairs=0, call_pairs=1, call_rows=1)  # any work hides a transfer
# Each route in each number of stages, few keys joined, whole fragments, and the default rule.
RULES = (
    *(StageRule(n, 1, NOTHING_HIDES, chain_gain=math.inf) for n in (1, 2, 3, 4)),
    *(StageRule(n, 1, NOTHING_HIDES, chain_gain=0.0) for n in (2, 3, 4)),
    StageRule(2, 1, NOTHING_HIDES, most_joined=12),
    WHOLE,
    RULE,
)
NAMES = ("output", "lse", "dq", "dk", "dv")


def apply_rotary(
    x: Tensor,
    positions: Tensor,
    *,
    rotary_dim: int,
    base: float,
    scaling: RopeScaling | None = None,
) -> Tensor:
    """``x [..., T, H, D]`` rotated at these positions."""
    return rotated(x, *rotary_table(positions, rotary_dim, base, scaling, x.dtype))


def rank_device() -> torch.device:
    if dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def random_tensors(
    tokens: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    value_dim: int | None = None,
) -> tuple[Tensor, ...]:
    """q, k, v and the gradient of the output of a whole pack."""
    value_dim = head_dim if value_dim is None else value_dim
    return tuple(
        torch.randn(tokens, heads, dim, dtype=torch.float64).to(dtype)
        for heads, dim in zip(
            (num_heads, num_kv_heads, num_kv_heads, num_heads),
            (head_dim, head_dim, value_dim, value_dim),
        )
    )


def mask(causal: bool) -> Window:
    return CAUSAL if causal else EVERYTHING


def oracle(
    tensors: tuple[Tensor, ...],
    lengths: tuple[int, ...],
    causal: bool,
    scale: float | None = None,
    window: tuple[int, int] = EVERYTHING,
) -> tuple[Tensor, ...]:
    """output, lse, dq, dk, dv in float64."""
    *qkv, doutput = (x.double() for x in tensors)
    qkv = [x.requires_grad_() for x in qkv]
    output, lse = dense_attention(
        *qkv,
        cu_seqlens=list(accumulate(lengths, initial=0)),
        causal=causal,
        scale=qkv[0].shape[-1] ** -0.5 if scale is None else scale,
        window=window,
    )
    gradients = torch.autograd.grad(output, qkv, doutput)
    return output.detach(), lse.detach(), *gradients


def forward_backward(
    tensors, *, layout, cp_group=None, rank=0, device="cpu", **kwargs
) -> list[Tensor]:
    """output, lse, dq, dk, dv of this rank's tokens; ``tensors`` are the whole pack's."""
    *qkv, doutput = (layout.shard(x, rank).to(device) for x in tensors)
    qkv = [x.detach().requires_grad_() for x in qkv]
    output, lse = ring_attention(*qkv, layout=layout, cp_group=cp_group, **kwargs)
    output.backward(doutput)
    return [x.detach().cpu() for x in (output, lse, *(x.grad for x in qkv))]


def on_world(tensors, layout, **kwargs) -> list[Tensor]:
    rank, device = dist.get_rank(), rank_device()
    return forward_backward(
        tensors, layout=layout, cp_group=dist.group.WORLD, rank=rank, device=device, **kwargs
    )


def planned_by(rule: StageRule):
    """While it is in force, schedules follow ``rule``."""
    return patch("ring.torch_ops.plan_ring", partial(plan_ring, rule=rule))


def unshard_all(layout: SequenceLayout, results: list[list[Tensor]]) -> list[Tensor]:
    return [layout.unshard(parts) for parts in zip(*results)]


def on_ranks(tensors, layout, backend: str = "gloo", **kwargs) -> list[Tensor]:
    """output, lse, dq, dk, dv of the whole pack, computed on ``layout.num_ranks`` ranks."""
    num_ranks = layout.num_ranks
    results = run_on_ranks(on_world, num_ranks, tensors, layout, backend=backend, **kwargs)
    return unshard_all(layout, results)


def assert_all_equal(actual, expected) -> None:
    for name, a, b in zip(NAMES, actual, expected, strict=True):
        assert_equal_to_rounding(a, b, what=name)


def cancelling_terms(
    tensors: tuple[Tensor, ...], lengths: tuple[int, ...], causal: bool
) -> dict[str, Tensor]:
    """Sizes of what cancels in dq and dk: their score gradient p_s (do v_s - do o).

    With one key all of it cancels, and the exact dq and dk are zero. ``lengths`` are those of the
    keys; with fewer or more rows than keys there is one block.
    """
    q, k, v, doutput = (x.double() for x in tensors)
    kv_heads, scale = k.shape[1], q.shape[-1] ** -0.5
    k, v = (x.repeat_interleave(q.shape[1] // kv_heads, 1) for x in (k, v))
    borders = list(accumulate(lengths, initial=0))
    rows = borders if q.shape[0] == k.shape[0] else [0, q.shape[0]]
    dq, dk = [], []
    for (a, b), (c, d) in zip(pairwise(rows), pairwise(borders)):
        scores = torch.einsum("thd,shd->hts", q[a:b], k[c:d]) * scale
        if causal:
            scores.masked_fill_(torch.ones_like(scores[0], dtype=torch.bool).triu(1), -torch.inf)
        products = torch.einsum("thd,shd->hts", doutput[a:b], v[c:d]).abs()
        terms = scale * scores.softmax(-1) * products
        dq.append(torch.einsum("hts,shd->thd", terms, k[c:d].abs()))
        dk.append(torch.einsum("hts,thd->shd", terms, q[a:b].abs()))
    return {"dq": torch.cat(dq), "dk": torch.cat(dk).unflatten(1, (kv_heads, -1)).sum(2)}


def assert_all_within_budget(
    actual, expected, honest, dtype: torch.dtype, *, terms: dict[str, Tensor] | None = None
) -> None:
    """Each result against float64, allowed twice the error of the eager block's, rounded to dtype.

    The lse is float32 but only as good as the exponentials of a kernel for ``dtype``: PyTorch's
    16-bit CPU kernel takes a fast one that is off by 1e-5.
    """
    for name, a, b, c in zip(NAMES, actual, expected, honest, strict=True):
        assert a.dtype == (torch.float32 if name == "lse" else dtype)
        assert_within_budget(a, b, c.to(dtype), terms=(terms or {}).get(name), what=name)
