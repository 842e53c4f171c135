"""Tokens to rows, the weighted sum of each token's rows, and what flows back: no atomics.

Token t has k slots; ``row[t, j]`` is the row of slot j, or -1. Sums run in the order of the slots
in float32, so they are the same from run to run.

Example, k = 2: row = (1, 0), (-1, 3)    out_0 = w_00 rows_1 + w_01 rows_0    out_1 = w_11 rows_3
"""

import triton
import triton.language as tl


@triton.jit
def copy_slots_kernel(
    x,  # [T, M]
    row,  # [T, K] int64, contiguous
    rows,  # [A, M]
    M: tl.constexpr, K: tl.constexpr, COLUMNS: tl.constexpr,
    X_STRIDE: tl.constexpr,  # between rows, whose numbers lie side by side
    ROWS_STRIDE: tl.constexpr,
):  # fmt: skip
    """One program a token and block of columns: read once, written to each of its rows."""
    blocks = tl.cdiv(M, COLUMNS)
    token = (tl.program_id(0) // blocks).to(tl.int64)
    cols = (tl.program_id(0) % blocks) * COLUMNS + tl.arange(0, COLUMNS)
    value = tl.load(x + token * X_STRIDE + cols, mask=cols < M, other=0.0)
    for slot in tl.static_range(K):
        place = tl.load(row + token * K + slot)
        tl.store(rows + place * ROWS_STRIDE + cols, value, mask=cols < tl.where(place >= 0, M, 0))


@triton.jit
def sum_slots_kernel(
    rows,  # [A, M]
    weights,  # [T, K] float32, contiguous, or None for ones
    row,  # [T, K] int64, contiguous
    out,  # [T, M]
    M: tl.constexpr, K: tl.constexpr, COLUMNS: tl.constexpr,
    ROWS_STRIDE: tl.constexpr,  # between rows, whose numbers lie side by side
    OUT_STRIDE: tl.constexpr,
):  # fmt: skip
    """One program a token and block of columns."""
    blocks = tl.cdiv(M, COLUMNS)
    token = (tl.program_id(0) // blocks).to(tl.int64)
    cols = (tl.program_id(0) % blocks) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([COLUMNS], dtype=tl.float32)
    for slot in tl.static_range(K):
        source = tl.load(row + token * K + slot)
        mask = cols < tl.where(source >= 0, M, 0)
        value = tl.load(rows + source * ROWS_STRIDE + cols, mask=mask, other=0.0).to(tl.float32)
        if weights is not None:
            value *= tl.load(weights + token * K + slot)
        total += value
    tl.store(out + token * OUT_STRIDE + cols, total.to(out.dtype.element_ty), mask=cols < M)


@triton.jit
def sum_slots_backward_kernel(
    grad,  # [T, M], contiguous
    rows,  # [A, M], contiguous
    weights,  # [T, K] float32, contiguous
    row,  # [T, K] int64, contiguous
    drows,  # [A, M], contiguous
    dweights,  # [T, K] float32, contiguous
    M: tl.constexpr, K: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program a token: a row belongs to one slot, so each is written once."""
    token = tl.program_id(0).to(tl.int64)
    for slot in tl.static_range(K):
        place = tl.load(row + token * K + slot)
        weight = tl.load(weights + token * K + slot)
        dot = tl.zeros([COLUMNS], dtype=tl.float32)
        for first in range(0, M, COLUMNS):
            cols = first + tl.arange(0, COLUMNS)
            mask = cols < tl.where(place >= 0, M, 0)
            g = tl.load(grad + token * M + cols, mask=mask, other=0.0).to(tl.float32)
            value = tl.load(rows + place * M + cols, mask=mask, other=0.0).to(tl.float32)
            dot += g * value
            tl.store(drows + place * M + cols, (g * weight).to(drows.dtype.element_ty), mask=mask)
        tl.store(dweights + token * K + slot, tl.sum(dot, axis=0))
