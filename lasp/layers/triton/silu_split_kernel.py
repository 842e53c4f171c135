"""SiLU of a fused projection and its split into queries, keys and values: one pass each way.

A row is one head of one token: K queries, K keys and V values side by side. A program takes a block
of rows; the activation is computed again in the backward, which needs the projection alone.
"""

import triton
import triton.language as tl


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
