"""RMSNorm over all heads times a sigmoid gate: rows are read once and written once.

With ``s = sigmoid(gate)`` and ``r = 1 / sqrt(sum(x^2) / size + eps)``, for each row::

    y  = x r weight s
    u  = dy weight s                  c = sum(u x)
    dx = r u - x r^3 c / size         dgate = dy x r weight s (1 - s)        dweight = sum dy x r s

Where tensor-parallel ranks share a row, ``sum(x^2)`` and c are sums over the ranks: two small
kernels give each rank's part, and the main ones take the whole.
"""

import triton
import triton.language as tl


@triton.jit
def _rows_of(first, num_rows, W: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Rows from ``first`` on, the columns, and which elements exist."""
    rows = first + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK)
    live = rows < num_rows
    return rows.to(tl.int64), cols, live, live[:, None] & (cols < W)[None, :]


@triton.jit
def _load(x, rows, cols, mask, stride):
    offsets = rows[:, None] * stride + cols[None, :]
    return tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["num_rows"])
def row_squares_kernel(
    x,  # [T, W], rows in one piece
    squares,  # [T] float32
    num_rows,  # T
    x_stride,
    W: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``sum(x^2)`` of each row."""
    rows, cols, live, mask = _rows_of(tl.program_id(0) * ROWS, num_rows, W, ROWS, BLOCK)
    value = _load(x, rows, cols, mask, x_stride)
    tl.store(squares + rows, tl.sum(value * value, axis=1), mask=live)


@triton.jit(do_not_specialize=["num_rows"])
def norm_gate_kernel(
    x,  # [T, W]
    gate,  # [T, W]
    weight,  # [W]
    squares,  # [T] float32: sums over all ranks, or None to take those of the row
    y,  # [T, W], contiguous
    rstd,  # [T] float32: r, for the backward
    num_rows,
    size,  # features of a row over all ranks
    eps,
    x_stride,
    gate_stride,
    W: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``y = x r weight sigmoid(gate)``."""
    rows, cols, live, mask = _rows_of(tl.program_id(0) * ROWS, num_rows, W, ROWS, BLOCK)
    value = _load(x, rows, cols, mask, x_stride)
    g = _load(gate, rows, cols, mask, gate_stride)
    w = tl.load(weight + cols, mask=cols < W, other=0.0).to(tl.float32)
    if squares is None:
        total = tl.sum(value * value, axis=1)
    else:
        total = tl.load(squares + rows, mask=live, other=0.0)
    r = 1.0 / tl.sqrt(total / size + eps)
    tl.store(rstd + rows, r, mask=live)
    result = value * r[:, None] * w[None, :] * tl.sigmoid(g)
    offsets = rows[:, None] * W + cols[None, :]
    tl.store(y + offsets, result.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def row_dots_kernel(
    dy,  # [T, W]
    x,  # [T, W]
    gate,  # [T, W]
    weight,  # [W]
    dots,  # [T] float32
    num_rows,
    dy_stride,
    x_stride,
    gate_stride,
    W: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``c = sum(dy weight sigmoid(gate) x)`` of each row."""
    rows, cols, live, mask = _rows_of(tl.program_id(0) * ROWS, num_rows, W, ROWS, BLOCK)
    grad = _load(dy, rows, cols, mask, dy_stride)
    value = _load(x, rows, cols, mask, x_stride)
    g = _load(gate, rows, cols, mask, gate_stride)
    w = tl.load(weight + cols, mask=cols < W, other=0.0).to(tl.float32)
    c = tl.sum(grad * w[None, :] * tl.sigmoid(g) * value, axis=1)
    tl.store(dots + rows, c, mask=live)


@triton.jit(do_not_specialize=["num_rows"])
def norm_gate_backward_kernel(
    dy,  # [T, W]
    x,  # [T, W]
    gate,  # [T, W]
    weight,  # [W]
    rstd,  # [T] float32
    dots,  # [T] float32: c over all ranks, or None to take that of the row
    dx,  # [T, W], contiguous
    dgate,  # [T, W], contiguous
    dweights,  # [programs, W] float32: what the rows of each program add to dweight
    num_rows,
    size,
    dy_stride,
    x_stride,
    gate_stride,
    W: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """All three gradients; a program takes every so many-th block of rows."""
    program = tl.program_id(0)
    cols = tl.arange(0, BLOCK)
    w = tl.load(weight + cols, mask=cols < W, other=0.0).to(tl.float32)
    dweight = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    for first in tl.range(program * ROWS, num_rows, tl.num_programs(0) * ROWS, num_stages=STAGES):
        rows, _, live, mask = _rows_of(first, num_rows, W, ROWS, BLOCK)
        grad = _load(dy, rows, cols, mask, dy_stride)
        value = _load(x, rows, cols, mask, x_stride)
        g = _load(gate, rows, cols, mask, gate_stride)
        r = tl.load(rstd + rows, mask=live, other=0.0)
        s = tl.sigmoid(g)
        u = grad * w[None, :] * s
        if dots is None:
            c = tl.sum(u * value, axis=1)
        else:
            c = tl.load(dots + rows, mask=live, other=0.0)
        normed = value * r[:, None]
        offsets = rows[:, None] * W + cols[None, :]
        result = r[:, None] * (u - normed * (r * c / size)[:, None])
        tl.store(dx + offsets, result.to(dx.dtype.element_ty), mask=mask)
        result = u * normed * (1.0 - s)
        tl.store(dgate + offsets, result.to(dgate.dtype.element_ty), mask=mask)
        dweight += grad * normed * s
    dweights += program.to(tl.int64) * W
    tl.store(dweights + cols, tl.sum(dweight, axis=0), mask=cols < W)
