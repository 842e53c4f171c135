"""SiLU of a fused projection and its split into queries, keys and values: one pass each way.

A row is one head of one token: K queries, K keys and V values side by side. A program takes a block
of rows; the activation is computed again in the backward, which needs the projection alone.
"""

# No ``from __future__ import annotations``: Triton's interpreter reads the annotations of kernels.

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lasp._core.derivatives import Reference
from lasp._core.launcher import aligned, launcher_of
from lasp._core.operators import Operators
from lasp.layers.triton.norm_gate import dense_rows
from lasp.lightning.triton import tuning


@triton.jit
def _tile(x, column, columns_stride, rows, live, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Pointers to ``column`` and the ``WIDTH - 1`` after it of each row, and which exist."""
    cols = tl.arange(0, BLOCK)
    pointers = x + rows[:, None] * columns_stride + (column + cols)[None, :]
    return pointers, live[:, None] & (cols < WIDTH)[None, :]


@triton.jit
def _forward_tile(x, y, x_rows, rows, live, column, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    pointers, mask = _tile(x, column, 1, x_rows, live, WIDTH, BLOCK)
    value = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    pointers, mask = _tile(y, 0, WIDTH, rows, live, WIDTH, BLOCK)
    tl.store(pointers, (value * tl.sigmoid(value)).to(y.dtype.element_ty), mask=mask)


@triton.jit
def _backward_tile(
    x, dy, dx, x_rows, rows, live, column, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    TOTAL: tl.constexpr,
):  # fmt: skip
    pointers, mask = _tile(x, column, 1, x_rows, live, WIDTH, BLOCK)
    value = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    pointers, mask = _tile(dy, 0, WIDTH, rows, live, WIDTH, BLOCK)
    grad = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    gate = tl.sigmoid(value)
    grad *= gate * (1.0 + value * (1.0 - gate))
    pointers, mask = _tile(dx, column, TOTAL, rows, live, WIDTH, BLOCK)
    tl.store(pointers, grad.to(dx.dtype.element_ty), mask=mask)


@triton.jit
def _rows(num_rows, num_heads, stride_t, stride_h, ROWS: tl.constexpr):
    """The rows of this program, where they begin in the projection, and which exist."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token, head = (rows // num_heads).to(tl.int64), (rows % num_heads).to(tl.int64)
    return rows.to(tl.int64), token * stride_t + head * stride_h, rows < num_rows


@triton.jit(do_not_specialize=["num_rows", "num_heads"])
def silu_split_kernel(
    x,  # [T, H, 2K + V], any strides but that of the last dim, which is 1
    q,  # [T, H, K], contiguous
    k,  # [T, H, K]
    v,  # [T, H, V]
    num_rows,  # T H
    num_heads,
    stride_t,
    stride_h,
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    ROWS: tl.constexpr,
):
    """``q, k, v = split(x sigmoid(x))``."""
    rows, x_rows, live = _rows(num_rows, num_heads, stride_t, stride_h, ROWS)
    _forward_tile(x, q, x_rows, rows, live, 0, K, BLOCK_K)
    _forward_tile(x, k, x_rows, rows, live, K, K, BLOCK_K)
    _forward_tile(x, v, x_rows, rows, live, 2 * K, V, BLOCK_V)


@triton.jit(do_not_specialize=["num_rows", "num_heads"])
def silu_split_backward_kernel(
    x,  # [T, H, 2K + V]
    dq,  # [T, H, K], contiguous
    dk,  # [T, H, K]
    dv,  # [T, H, V]
    dx,  # [T, H, 2K + V], contiguous
    num_rows,
    num_heads,
    stride_t,
    stride_h,
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    ROWS: tl.constexpr,
):
    """``dx = join(dq, dk, dv) s (1 + x (1 - s))`` with ``s = sigmoid(x)``."""
    rows, x_rows, live = _rows(num_rows, num_heads, stride_t, stride_h, ROWS)
    _backward_tile(x, dq, dx, x_rows, rows, live, 0, K, BLOCK_K, 2 * K + V)
    _backward_tile(x, dk, dx, x_rows, rows, live, K, K, BLOCK_K, 2 * K + V)
    _backward_tile(x, dv, dx, x_rows, rows, live, 2 * K, V, BLOCK_V, 2 * K + V)


def silu_split(x_THW: Tensor, key_dim: int, value_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """``q, k, v = split(SiLU(x))``, each contiguous; ``[T, H, 2K + V]`` of any strides."""
    x_THW = dense_rows(x_THW)
    q, k, v = _fake_split(x_THW, key_dim, value_dim)
    if q.numel():
        _launch_split(silu_split_kernel, x_THW, q, k, v)
    return q, k, v


def silu_split_backward(x_THW: Tensor, dq: Tensor, dk: Tensor, dv: Tensor) -> Tensor:
    """The gradient of x, contiguous."""
    dx = torch.empty_like(x_THW, memory_format=torch.contiguous_format)
    if dx.numel():
        grads = (aligned(grad.contiguous()) for grad in (dq, dk, dv))
        _launch_split(silu_split_backward_kernel, dense_rows(x_THW), *grads, dx)
    return dx


def _launch_split(kernel: Any, x: Tensor, q: Tensor, k: Tensor, v: Tensor, *dx: Tensor) -> None:
    num_tokens, num_heads, key_dim = q.shape
    value_dim = v.shape[2]
    rows = tuning.split_rows(key_dim, value_dim)
    launch = launcher_of(
        kernel,
        x.device,
        (x.dtype, q.dtype),
        stride_t=x.stride(0),
        stride_h=x.stride(1),
        K=key_dim,
        V=value_dim,
        BLOCK_K=rows.blocks[0],
        BLOCK_V=rows.blocks[1],
        ROWS=rows.rows,
        num_warps=rows.num_warps,
    )
    num_rows = num_tokens * num_heads
    launch(-(-num_rows // rows.rows), x, q, k, v, *dx, num_rows, num_heads)


def _fake_split(x_THW: Tensor, key_dim: int, value_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    num_tokens, num_heads, _ = x_THW.shape
    return (
        x_THW.new_empty(num_tokens, num_heads, key_dim),
        x_THW.new_empty(num_tokens, num_heads, key_dim),
        x_THW.new_empty(num_tokens, num_heads, value_dim),
    )


def _save_split(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(inputs[0])


def _split_gradients(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
    return call_backward(*ctx.saved_tensors, *grads), None, None


_REFERENCE = Reference("lasp.layers.norm_gate.silu_split with impl='triton'", "impl='eager'")
_OPERATORS = Operators("lasp")
_OPERATORS.define(
    "silu_split(Tensor x, int key_dim, int value_dim) -> (Tensor, Tensor, Tensor)",
    silu_split,
    _fake_split,
)
_OPERATORS.define(
    "silu_split_backward(Tensor x, Tensor dq, Tensor dk, Tensor dv) -> Tensor",
    silu_split_backward,
    lambda x, *_: x.new_empty(x.shape),
)
call = _OPERATORS.differentiate("silu_split", _split_gradients, _save_split, _REFERENCE)
call_backward = _OPERATORS.refuse_second_derivatives("silu_split_backward", _REFERENCE)
