"""Merging two partials of attention: outputs and log-sum-exps in one pass.

One program merges BLOCK (row, head) pairs of D columns. With m = max(lse_a, lse_b)::

    w = exp(lse - m)      out = (w_a out_a + w_b out_b) / (w_a + w_b)      lse = m + log(w_a + w_b)

The larger weight is exactly 1 and an lse of -inf weighs exactly 0, so a row without keys on one
side keeps the other side's bits; without keys on both it becomes 0 and -inf.

Example: out_a = (4, 0) with lse_a = 0 and out_b = (0, 8) with lse_b = log 3 become out = (1, 6) and
lse = log 4.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit(do_not_specialize=["num_pairs"])
def merge_kernel(
    out,  # [T, H, D], any float dtype, any strides of rows and heads; written
    lse_out,  # [T, H] float32, any strides; written
    a,  # [T, H, D], like out; may be the same memory
    lse_a,  # [T, H], like lse_out; may be the same memory
    b,  # [T, H, D], like a
    lse_b,  # [T, H], like lse_a
    num_pairs,  # T * H
    num_heads,
    out_stride_t,
    out_stride_h,
    lse_out_stride_t,
    lse_out_stride_h,
    a_stride_t,
    a_stride_h,
    lse_a_stride_t,
    lse_a_stride_h,
    b_stride_t,
    b_stride_h,
    lse_b_stride_t,
    lse_b_stride_h,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program a block of pairs, in float32; rounded when it is written."""
    pairs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = pairs < num_pairs
    rows, heads = (pairs // num_heads).to(tl.int64), (pairs % num_heads).to(tl.int64)
    cols = tl.arange(0, BLOCK_D)
    mask = inside[:, None] & (cols < D)[None, :]

    lse_a += rows * lse_a_stride_t + heads * lse_a_stride_h
    lse_b += rows * lse_b_stride_t + heads * lse_b_stride_h
    value_a = tl.load(lse_a, mask=inside, other=float("-inf"))
    value_b = tl.load(lse_b, mask=inside, other=float("-inf"))
    m = tl.maximum(value_a, value_b)
    m = tl.where(m == float("-inf"), 0.0, m)
    weight_a, weight_b = tl.exp(value_a - m), tl.exp(value_b - m)
    total = weight_a + weight_b
    share_a, share_b = weight_a / tl.maximum(total, 1.0), weight_b / tl.maximum(total, 1.0)

    a += (rows * a_stride_t + heads * a_stride_h)[:, None] + cols[None, :]
    b += (rows * b_stride_t + heads * b_stride_h)[:, None] + cols[None, :]
    merged = share_a[:, None] * tl.load(a, mask=mask, other=0.0).to(tl.float32)
    merged += share_b[:, None] * tl.load(b, mask=mask, other=0.0).to(tl.float32)
    out += (rows * out_stride_t + heads * out_stride_h)[:, None] + cols[None, :]
    lse_out += rows * lse_out_stride_t + heads * lse_out_stride_h
    # Each warp loads the lse of its rows, one stores them all: after the others have loaded.
    tl.debug_barrier()
    tl.store(out, merged.to(out.dtype.element_ty), mask=mask)
    tl.store(lse_out, m + tl.log(total), mask=inside)


def merge_to(
    out: Tensor, lse_out: Tensor, a: Tensor, lse_a: Tensor, b: Tensor, lse_b: Tensor
) -> None:
    """Launch on the current stream of their device; tensors as those of the kernel.

    Raises:
        ValueError: if the last dim of an output is not contiguous.
    """
    if any(x.stride(-1) != 1 for x in (out, a, b)):
        raise ValueError(
            "the last dim of all outputs must be contiguous, got strides"
            f" {out.stride()}, {a.stride()} and {b.stride()}: copy them with .contiguous()"
        )
    tokens, num_heads, head_dim = out.shape
    strides = (
        stride
        for x, lse in ((out, lse_out), (a, lse_a), (b, lse_b))
        for stride in (*x.stride()[:2], *lse.stride())
    )
    block = 8  # of 128 columns: 8 elements a thread
    with torch.cuda.device_of(out):
        merge_kernel[(triton.cdiv(tokens * num_heads, block),)](
            out, lse_out, a, lse_a, b, lse_b, tokens * num_heads, num_heads, *strides,
            D=head_dim, BLOCK=block, BLOCK_D=triton.next_power_of_2(head_dim),
        )  # fmt: skip
