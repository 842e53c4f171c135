"""RMSNorm over groups of heads and a gate: rows are read once and written once.

With the gate's factor f, ``s = sigmoid(gate)`` or ``gate s`` (SiLU), ``r = 1 / sqrt(sum(v^2) / size
+ eps)``, for each row and group. The gate comes after the norm, or before (FIRST)::

    after    v = x        y = v r weight f    u = dy weight f    dweight = sum dy v r f
             dx = dv                          df = dy weight v r
    before   v = x f      y = v r weight      u = dy weight      dweight = sum dy v r
             dx = dv f                        df = dv x
    both     c = sum(u v)    dv = r (u - v r^2 c / size)    dgate = df f'(gate)

Where tensor-parallel ranks share a row, ``sum(v^2)`` and c are sums over the ranks: two small
kernels give each rank's part, and the main ones take the whole.
"""

# No ``from __future__ import annotations``: Triton's interpreter reads the annotations of kernels.

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


@triton.jit
def _gate_of(gate, rows, cols, mask, stride, SILU: tl.constexpr):
    """The gate's sigmoid and its factor."""
    g = _load(gate, rows, cols, mask, stride)
    s = tl.sigmoid(g)
    f = s
    if SILU:
        f = g * s
    return s, f


@triton.jit
def _gated(x, gate, rows, cols, mask, x_stride, gate_stride, SILU: tl.constexpr):
    """x, times the factor of its gate where there is one."""
    value = _load(x, rows, cols, mask, x_stride)
    if gate is not None:
        _, f = _gate_of(gate, rows, cols, mask, gate_stride, SILU)
        value *= f
    return value


@triton.jit(do_not_specialize=["num_rows"])
def row_squares_kernel(
    x,  # [T, W], rows in one piece
    gate,  # [T, W], where it comes before the norm, or None
    squares,  # [T] float32
    num_rows,  # T
    x_stride, gate_stride, W: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    SILU: tl.constexpr,
):  # fmt: skip
    """``sum(v^2)`` of each row."""
    rows, cols, live, mask = _rows_of(tl.program_id(0) * ROWS, num_rows, W, ROWS, BLOCK)
    value = _gated(x, gate, rows, cols, mask, x_stride, gate_stride, SILU)
    tl.store(squares + rows, tl.sum(value * value, axis=1), mask=live)


@triton.jit(do_not_specialize=["num_rows"])
def norm_gate_kernel(
    x,  # [T, GROUPS W]
    gate,  # [T, GROUPS W], or None
    weight,  # [GROUPS W]
    squares,  # [T] float32: sums over all ranks, or None to take those of the row
    y,  # [T, GROUPS W], contiguous
    rstd,  # [T, GROUPS] float32: r, for the backward
    num_rows,
    size,  # features of a group over all ranks
    eps, x_stride, gate_stride, W: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    GROUPS: tl.constexpr, SILU: tl.constexpr, FIRST: tl.constexpr,
):  # fmt: skip
    """Each program computes y of some rows of one group."""
    group = tl.program_id(0) % GROUPS
    first = tl.program_id(0) // GROUPS * ROWS
    rows, cols, live, mask = _rows_of(first, num_rows, W, ROWS, BLOCK)
    w = tl.load(weight + group * W + cols, mask=cols < W, other=0.0).to(tl.float32)
    cols += group * W
    value = _load(x, rows, cols, mask, x_stride)
    if gate is not None:
        _, f = _gate_of(gate, rows, cols, mask, gate_stride, SILU)
        if FIRST:
            value *= f
        else:
            w = w[None, :] * f
    if squares is None:
        total = tl.sum(value * value, axis=1)
    else:
        total = tl.load(squares + rows, mask=live, other=0.0)
    r = 1.0 / tl.sqrt(total / size + eps)
    tl.store(rstd + rows * GROUPS + group, r, mask=live)
    if gate is None or FIRST:
        w = w[None, :]
    result = value * r[:, None] * w
    offsets = rows[:, None] * (GROUPS * W) + cols[None, :]
    tl.store(y + offsets, result.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def row_dots_kernel(
    dy,  # [T, W]
    x,  # [T, W]
    gate,  # [T, W], or None
    weight,  # [W]
    dots,  # [T] float32
    num_rows, dy_stride, x_stride, gate_stride, W: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """Each program computes c of some rows: ``sum(dy weight x f)``, wherever the gate is."""
    rows, cols, live, mask = _rows_of(tl.program_id(0) * ROWS, num_rows, W, ROWS, BLOCK)
    grad = _load(dy, rows, cols, mask, dy_stride)
    value = _gated(x, gate, rows, cols, mask, x_stride, gate_stride, SILU)
    w = tl.load(weight + cols, mask=cols < W, other=0.0).to(tl.float32)
    tl.store(dots + rows, tl.sum(grad * w[None, :] * value, axis=1), mask=live)


@triton.jit(do_not_specialize=["num_rows"])
def norm_gate_backward_kernel(
    dy,  # [T, GROUPS W]
    x,  # [T, GROUPS W]
    gate,  # [T, GROUPS W], or None
    weight,  # [GROUPS W]
    rstd,  # [T, GROUPS] float32
    dots,  # [T] float32: c over all ranks, or None to take that of the row
    dx,  # [T, GROUPS W], contiguous
    dgate,  # [T, GROUPS W], contiguous; empty without a gate
    dweights,  # [programs of a group, GROUPS W] float32: what the rows of each add to dweight
    num_rows, size, dy_stride, x_stride, gate_stride,
    W: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
    GROUPS: tl.constexpr, SILU: tl.constexpr, FIRST: tl.constexpr,
):  # fmt: skip
    """All three gradients; a program takes every so many-th block of rows of one group."""
    group = tl.program_id(0) % GROUPS
    program = tl.program_id(0) // GROUPS
    step = tl.num_programs(0) // GROUPS * ROWS
    own = tl.arange(0, BLOCK)
    w = tl.load(weight + group * W + own, mask=own < W, other=0.0).to(tl.float32)
    dweight = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    for first in tl.range(program * ROWS, num_rows, step, num_stages=STAGES):
        rows, cols, live, mask = _rows_of(first, num_rows, W, ROWS, BLOCK)
        cols += group * W
        grad = _load(dy, rows, cols, mask, dy_stride)
        value = _load(x, rows, cols, mask, x_stride)
        r = tl.load(rstd + rows * GROUPS + group, mask=live, other=0.0)
        u = grad * w[None, :]
        if gate is not None:
            s, f = _gate_of(gate, rows, cols, mask, gate_stride, SILU)
            plain, plain_u = value, u
            if FIRST:
                value = value * f
            else:
                u = u * f
        if dots is None:
            c = tl.sum(u * value, axis=1)
        else:
            c = tl.load(dots + rows, mask=live, other=0.0)
        normed = value * r[:, None]
        dv = r[:, None] * (u - normed * (r * c / size)[:, None])
        offsets = rows[:, None] * (GROUPS * W) + cols[None, :]
        if gate is None:
            tl.store(dx + offsets, dv.to(dx.dtype.element_ty), mask=mask)
            dweight += grad * normed
        else:
            slope = s * (1.0 - s)
            if SILU:
                slope = s + f * (1.0 - s)
            if FIRST:
                df, result = dv * plain, dv * f
                dweight += grad * normed
            else:
                df, result = plain_u * normed, dv
                dweight += grad * normed * f
            tl.store(dx + offsets, result.to(dx.dtype.element_ty), mask=mask)
            result = df * slope
            tl.store(dgate + offsets, result.to(dgate.dtype.element_ty), mask=mask)
    dweights += program.to(tl.int64) * (GROUPS * W) + group * W
    tl.store(dweights + own, tl.sum(dweight, axis=0), mask=own < W)
