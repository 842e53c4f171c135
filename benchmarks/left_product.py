"""Lightning Attention-1 (TransNormerLLM, arXiv:2307.14995): the step before ours, as a baseline.

The left product: scores of a tile of queries and a tile of keys, weighed by the decay, times the
values, tile by tile as in FlashAttention but without a softmax. Time grows with the square of the
length; nothing is stored besides the results::

    o_t = sum_(s <= t) lambda^(t - s) (q_t k_s) v_s

Every gradient is the same sum in other roles, dk and dv in the reverse direction, so forward and
backward are one kernel. The backward takes six products of tiles where five would do, and in return
adds nothing in memory. As in the paper no tile is skipped, however little of it the decay leaves.

Source: Qin et al., TransNormerLLM, section 3.4 and algorithms 1 and 2.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

ROWS, COLUMNS = 128, 64  # of a tile of scores; COLUMNS divides ROWS
NUM_WARPS, NUM_STAGES = 8, 3

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _add_tile(query_RD, key, value, output_RD, weights, start, column):
    """``output + (query key^T * weights) value`` for the keys and values from ``start`` on."""
    k = key.load([start, column])
    v = value.load([start, column])
    scores = tl.dot(query_RD, tl.trans(k)) * weights
    return tl.dot(scores.to(v.dtype), v, output_RD)


@triton.jit
def left_product_kernel(
    query,  # descriptors of [T, H * D]: what lies beyond T is read as zero and not written
    key,
    value,
    output,
    rates,  # [H] float32
    num_tokens,
    num_heads,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    REVERSE: tl.constexpr,  # a token sees those after it, not those before
):
    """One program a tile of rows and head, those with the most to do first.

    With an edge of the tile between row t and a key s of another tile, the weight is
    lambda^(from t to the edge) lambda^(from the edge to s): a factor of the row that is paid once
    and one of the column, neither above 1.
    """
    program = tl.program_id(0)
    head, tile = program % num_heads, program // num_heads
    if not REVERSE:
        tile = tl.cdiv(num_tokens, ROWS) - 1 - tile
    first = tile * ROWS
    rate = tl.load(rates + head) * LOG2E
    rows, cols = first + tl.arange(0, ROWS), tl.arange(0, COLUMNS)

    q = query.load([first, head * D])
    result = tl.zeros([ROWS, D], tl.float32)
    if REVERSE:
        begin, end, edge = first + ROWS, num_tokens, first + ROWS - 1
    else:
        begin, end, edge = 0, first, first
    for start in range(begin, end, COLUMNS):
        weights = tl.exp2(-rate * tl.abs(start + cols - edge).to(tl.float32))
        result = _add_tile(q, key, value, result, weights[None, :], start, head * D)
    result *= tl.exp2(-rate * tl.abs(rows - edge).to(tl.float32))[:, None]

    for start in range(first, first + ROWS, COLUMNS):
        back = rows[:, None] - (start + cols)[None, :]
        if REVERSE:
            back = -back
        weights = tl.exp2(tl.where(back >= 0, -rate * back.to(tl.float32), float("-inf")))
        result = _add_tile(q, key, value, result, weights, start, head * D)
    output.store([first, head * D], result.to(q.dtype))


def _launch(query: Tensor, key: Tensor, value: Tensor, rates: Tensor, *, reverse: bool) -> Tensor:
    """The sum over the tokens up to each one, or in reverse from each one on; ``[T, H, D]``."""
    num_tokens, num_heads, dim = query.shape
    output = torch.empty_like(query, memory_format=torch.contiguous_format)

    def tiles(x: Tensor, height: int) -> TensorDescriptor:
        columns = num_heads * dim
        x = x.contiguous().view(num_tokens, columns)
        return TensorDescriptor(x, [num_tokens, columns], [columns, 1], [height, dim])

    left_product_kernel[(triton.cdiv(num_tokens, ROWS) * num_heads,)](
        tiles(query, ROWS),
        tiles(key, COLUMNS),
        tiles(value, COLUMNS),
        tiles(output, ROWS),
        rates,
        num_tokens,
        num_heads,
        D=dim,
        ROWS=ROWS,
        COLUMNS=COLUMNS,
        REVERSE=reverse,
        num_warps=NUM_WARPS,
        num_stages=NUM_STAGES,
    )
    return output


class _LeftProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, rates: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, v, rates)
        return _launch(q, k, v, rates, reverse=False)

    @staticmethod
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, rates = ctx.saved_tensors
        dq = _launch(do, v, k, rates, reverse=False)
        dk = _launch(v, do, q, rates, reverse=True)
        dv = _launch(k, q, do, rates, reverse=True)
        return dq, dk, dv, None


def left_product_attention(q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, rates_H: Tensor) -> Tensor:
    """Lightning attention of one document by the left product.

    Args:
        q_THD: queries ``[T, H, D]``, bf16 or fp16, D = 64 or 128.
        k_THD: keys, alike.
        v_THD: values, alike.
        rates_H: decay rates ``[H]`` float32, on the device of ``q_THD``.

    Returns:
        output ``[T, H, D]``, contiguous.

    Gradients: to q, k and v; none to the rates.

    Raises:
        ValueError: for another dtype or other head dims.
    """
    if q_THD.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"q must be bf16 or fp16, got {q_THD.dtype}: cast it")
    if not (q_THD.shape == k_THD.shape == v_THD.shape and q_THD.shape[2] in (64, 128)):
        shapes = [tuple(x.shape) for x in (q_THD, k_THD, v_THD)]
        raise ValueError(f"q, k and v must be [T, H, 64] or [T, H, 128] alike, got {shapes}")
    return _LeftProduct.apply(q_THD, k_THD, v_THD, rates_H)
