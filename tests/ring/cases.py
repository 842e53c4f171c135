"""Packs, heads and random tensors shared by the ring tests."""

from __future__ import annotations

from itertools import accumulate

import torch
from torch import Tensor

from ring.reference import dense_attention
from tests.closeness import assert_equal_to_rounding, assert_within_budget

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
NAMES = ("output", "lse", "dq", "dk", "dv")


def random_tensors(
    tokens: int, num_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """q, k, v and the gradient of the output of a whole pack."""
    return tuple(
        torch.randn(tokens, heads, head_dim, dtype=torch.float64).to(dtype)
        for heads in (num_heads, num_kv_heads, num_kv_heads, num_heads)
    )


def oracle(
    tensors: tuple[Tensor, ...], lengths: tuple[int, ...], causal: bool, scale: float | None = None
) -> tuple[Tensor, ...]:
    """output, lse, dq, dk, dv in float64."""
    *qkv, doutput = (x.double() for x in tensors)
    qkv = [x.requires_grad_() for x in qkv]
    output, lse = dense_attention(
        *qkv,
        cu_seqlens=list(accumulate(lengths, initial=0)),
        causal=causal,
        scale=qkv[0].shape[-1] ** -0.5 if scale is None else scale,
    )
    gradients = torch.autograd.grad(output, qkv, doutput)
    return output.detach(), lse.detach(), *gradients


def assert_all_equal(actual, expected) -> None:
    for name, a, b in zip(NAMES, actual, expected, strict=True):
        assert_equal_to_rounding(a, b, what=name)


def assert_all_within_budget(actual, expected, honest, dtype: torch.dtype) -> None:
    """Each result against float64, allowed twice the error of the eager block's, rounded to dtype.

    The lse is float32 but only as good as the exponentials of a kernel for ``dtype``: PyTorch's
    16-bit CPU kernel takes a fast one that is off by 1e-5.
    """
    for name, a, b, c in zip(NAMES, actual, expected, honest, strict=True):
        assert a.dtype == (torch.float32 if name == "lse" else dtype)
        assert_within_budget(a, b, c.to(dtype), what=name)
