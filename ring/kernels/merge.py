"""Adding a partial of attention to an accumulator: output and log-sum-exp in one pass.

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
    into_output,  # [T, H, D] float32, any strides of rows and heads; changed
    into_lse,  # [T, H] float32, any strides; changed
    output,  # [T, H, D], any dtype, any strides of rows and heads
    lse,  # [T, H] float32, any strides
    num_pairs,  # T * H
    num_heads,
    into_stride_t,
    into_stride_h,
    into_lse_stride_t,
    into_lse_stride_h,
    stride_t,
    stride_h,
    lse_stride_t,
    lse_stride_h,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program a block of pairs."""
    pairs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = pairs < num_pairs
    rows, heads = (pairs // num_heads).to(tl.int64), (pairs % num_heads).to(tl.int64)
    cols = tl.arange(0, BLOCK_D)
    mask = inside[:, None] & (cols < D)[None, :]

    into_lse += rows * into_lse_stride_t + heads * into_lse_stride_h
    lse += rows * lse_stride_t + heads * lse_stride_h
    lse_a = tl.load(into_lse, mask=inside, other=float("-inf"))
    lse_b = tl.load(lse, mask=inside, other=float("-inf"))
    m = tl.maximum(lse_a, lse_b)
    m = tl.where(m == float("-inf"), 0.0, m)
    weight_a, weight_b = tl.exp(lse_a - m), tl.exp(lse_b - m)
    total = weight_a + weight_b
    share_a, share_b = weight_a / tl.maximum(total, 1.0), weight_b / tl.maximum(total, 1.0)

    into_output += (rows * into_stride_t + heads * into_stride_h)[:, None] + cols[None, :]
    output += (rows * stride_t + heads * stride_h)[:, None] + cols[None, :]
    a = tl.load(into_output, mask=mask, other=0.0)
    b = tl.load(output, mask=mask, other=0.0).to(tl.float32)
    tl.store(into_output, share_a[:, None] * a + share_b[:, None] * b, mask=mask)
    tl.store(into_lse, m + tl.log(total), mask=inside)


def merge_into(into_output: Tensor, into_lse: Tensor, output: Tensor, lse: Tensor) -> None:
    """Launch on the current stream of their device; tensors as those of the kernel.

    Raises:
        ValueError: if the last dim of an output is not contiguous.
    """
    if into_output.stride(-1) != 1 or output.stride(-1) != 1:
        raise ValueError(
            "the last dim of both outputs must be contiguous, got strides"
            f" {into_output.stride()} and {output.stride()}: copy them with .contiguous()"
        )
    tokens, num_heads, head_dim = output.shape
    block = 8  # of 128 columns: 8 elements a thread
    with torch.cuda.device_of(output):
        merge_kernel[(triton.cdiv(tokens * num_heads, block),)](
            into_output, into_lse, output, lse, tokens * num_heads, num_heads,
            *into_output.stride()[:2], *into_lse.stride(), *output.stride()[:2], *lse.stride(),
            D=head_dim, BLOCK=block, BLOCK_D=triton.next_power_of_2(head_dim),
        )  # fmt: skip
