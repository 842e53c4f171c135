"""Activation, norm and rotation of the heads of a fused projection: one pass each way.

A row is one head of one token: K queries, K keys and K values side by side. With a, the row's
queries or keys, activated where SILU says so, and ``r = 1 / sqrt(sum(a^2) / K + eps)``::

    n = a r weight           y_i = n_i cos_i - n_j sin_i,  y_j = n_j cos_i + n_i sin_i

for pairs (i, j = i + HALF) of the first 2 HALF dims. The backward reads the projection and the
tables again, turns the gradient back, and goes through the norm::

    u = dn weight            da = r u - a r^3 sum(u a) / K           dweight = sum dn a r
"""

# No ``from __future__ import annotations``: Triton's interpreter reads the annotations of kernels.

import triton
import triton.language as tl


@triton.jit
def _row(first, num_rows, num_heads, stride_t, stride_h, ROWS: tl.constexpr):
    """Rows from ``first`` on, their tokens, where they begin in the projection, which exist."""
    rows = first + tl.arange(0, ROWS)
    token, head = (rows // num_heads).to(tl.int64), (rows % num_heads).to(tl.int64)
    return rows.to(tl.int64), token, token * stride_t + head * stride_h, rows < num_rows


@triton.jit
def _load(x, begins, cols, live, WIDTH: tl.constexpr):
    mask = live[:, None] & (cols < WIDTH)[None, :]
    return tl.load(x + begins[:, None] + cols[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _activated(x, SILU: tl.constexpr):
    if SILU:
        x = x * tl.sigmoid(x)
    return x


@triton.jit
def _partners(cols, HALF: tl.constexpr):
    """The other column of each one's pair; of columns that do not rotate themselves."""
    other = tl.where(cols < HALF, cols + HALF, cols - HALF)
    return tl.where(cols < 2 * HALF, other, cols)


@triton.jit
def _turn(cos, sin, token, cols, live, HALF: tl.constexpr):
    """What each element, and its partner, is multiplied with."""
    mask = live[:, None] & (cols < 2 * HALF)[None, :]
    offsets = token[:, None] * HALF + (cols % HALF)[None, :]
    c = tl.load(cos + offsets, mask=mask, other=1.0)
    s = tl.load(sin + offsets, mask=mask, other=0.0)
    return c, tl.where((cols < HALF)[None, :], -s, s)


@triton.jit
def _root(value, eps, K: tl.constexpr):
    return 1.0 / tl.sqrt(tl.sum(value * value, axis=1) / K + eps)


@triton.jit
def _forward_part(
    x, y, weight, cos, sin, rows, token, begins, live, eps,
    K: tl.constexpr, BLOCK: tl.constexpr, SILU: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    cols = tl.arange(0, BLOCK)
    value = _activated(_load(x, begins, cols, live, K), SILU)
    if weight is not None:
        r = _root(value, eps, K)
        w = tl.load(weight + cols, mask=cols < K, other=0.0).to(tl.float32)
        value = value * r[:, None] * w[None, :]
    if HALF > 0:
        others = _partners(cols, HALF)
        partner = _activated(_load(x, begins, others, live, K), SILU)
        if weight is not None:
            w = tl.load(weight + others, mask=others < K, other=0.0).to(tl.float32)
            partner = partner * r[:, None] * w[None, :]
        c, s = _turn(cos, sin, token, cols, live, HALF)
        value = value * c + partner * s
    offsets = rows[:, None] * K + cols[None, :]
    mask = live[:, None] & (cols < K)[None, :]
    tl.store(y + offsets, value.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _backward_part(
    x, dy, dx, weight, cos, sin, rows, token, begins, live, column, eps,
    K: tl.constexpr, BLOCK: tl.constexpr, SILU: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Store the gradient of x; return what each element adds to the one of the weight."""
    cols = tl.arange(0, BLOCK)
    grad = _load(dy, rows * K, cols, live, K)
    if HALF > 0:
        partner = _load(dy, rows * K, _partners(cols, HALF), live, K)
        c, s = _turn(cos, sin, token, cols, live, HALF)
        grad = grad * c - partner * s
    plain = _load(x, begins + column, cols, live, K)
    added = grad
    if weight is not None:
        value = _activated(plain, SILU)
        r = _root(value, eps, K)
        w = tl.load(weight + cols, mask=cols < K, other=0.0).to(tl.float32)
        normed = value * r[:, None]
        added = grad * normed
        u = grad * w[None, :]
        grad = r[:, None] * (u - normed * (r * tl.sum(u * value, axis=1) / K)[:, None])
    if SILU:
        gate = tl.sigmoid(plain)
        grad *= gate * (1.0 + plain * (1.0 - gate))
    offsets = rows[:, None] * (3 * K) + (column + cols)[None, :]
    mask = live[:, None] & (cols < K)[None, :]
    tl.store(dx + offsets, grad.to(dx.dtype.element_ty), mask=mask)
    return added


@triton.jit(do_not_specialize=["num_rows", "num_heads"])
def heads_kernel(
    x,  # [T, H, 3K], any strides but that of the last dim, which is 1
    q_weight,  # [K], or None without norms
    k_weight,  # [K]
    cos,  # [T, HALF] float32; None where nothing rotates
    sin,  # [T, HALF]
    q,  # [T, H, K], contiguous
    k,  # [T, H, K]
    v,  # [T, H, K]
    num_rows,  # T H
    num_heads, stride_t, stride_h, eps, K: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    SILU: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """q, k and v of some rows."""
    first = tl.program_id(0) * ROWS
    rows, token, begins, live = _row(first, num_rows, num_heads, stride_t, stride_h, ROWS)
    _forward_part(x, q, q_weight, cos, sin, rows, token, begins, live, eps, K, BLOCK, SILU, HALF)
    begins += K
    _forward_part(x, k, k_weight, cos, sin, rows, token, begins, live, eps, K, BLOCK, SILU, HALF)
    begins += K
    _forward_part(x, v, None, None, None, rows, token, begins, live, eps, K, BLOCK, SILU, 0)


@triton.jit(do_not_specialize=["num_rows", "num_heads"])
def heads_backward_kernel(
    x,  # [T, H, 3K]
    q_weight,  # [K], or None
    k_weight,  # [K]
    cos,  # [T, HALF] float32, or None
    sin,  # [T, HALF]
    dq,  # [T, H, K], contiguous
    dk,  # [T, H, K]
    dv,  # [T, H, K]
    dx,  # [T, H, 3K], contiguous
    dweights,  # [programs, 2, K] float32: what the rows of each program add, or None
    num_rows, num_heads, stride_t, stride_h, eps, K: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr, SILU: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Gradients of x and of the weights; a program takes every so many-th block of rows."""
    of_q = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    of_k = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    for first in range(tl.program_id(0) * ROWS, num_rows, tl.num_programs(0) * ROWS):
        rows, token, begins, live = _row(first, num_rows, num_heads, stride_t, stride_h, ROWS)
        q_added = _backward_part(
            x, dq, dx, q_weight, cos, sin, rows, token, begins, live, 0, eps, K, BLOCK, SILU, HALF
        )
        k_added = _backward_part(
            x, dk, dx, k_weight, cos, sin, rows, token, begins, live, K, eps, K, BLOCK, SILU, HALF
        )
        _backward_part(
            x, dv, dx, None, None, None, rows, token, begins, live, 2 * K, eps, K, BLOCK, SILU, 0
        )
        if dweights is not None:
            of_q += q_added
            of_k += k_added
    if dweights is not None:
        cols = tl.arange(0, BLOCK)
        dweights += tl.program_id(0).to(tl.int64) * (2 * K)
        tl.store(dweights + cols, tl.sum(of_q, axis=0), mask=cols < K)
        tl.store(dweights + K + cols, tl.sum(of_k, axis=0), mask=cols < K)
