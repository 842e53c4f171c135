"""SwiGLU, forward and backward: each element is read once and written once.

A row of ``hidden`` is ``[gate, up]``, F elements each. A program takes a block of rows and of the F
columns. Arithmetic is in float32, rounded once to the dtype of the result.
"""

import triton
import triton.language as tl


@triton.jit
def _tile(num_rows, F: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows, columns, and which elements exist, of this program."""
    blocks = tl.cdiv(F, COLUMNS)
    program = tl.program_id(0)
    rows = (program // blocks) * ROWS + tl.arange(0, ROWS)
    cols = (program % blocks) * COLUMNS + tl.arange(0, COLUMNS)
    mask = (rows < num_rows)[:, None] & (cols < F)[None, :]
    return rows.to(tl.int64)[:, None], cols[None, :], mask


@triton.jit(do_not_specialize=["num_rows"])
def swiglu_kernel(
    hidden,  # [A, 2F], contiguous
    act,  # [A, F], contiguous
    num_rows,  # A
    F: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """``act = silu(gate) up``."""
    rows, cols, mask = _tile(num_rows, F, ROWS, COLUMNS)
    halves = hidden + rows * (2 * F) + cols
    gate = tl.load(halves, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(halves + F, mask=mask, other=0.0).to(tl.float32)
    result = gate * tl.sigmoid(gate) * up
    tl.store(act + rows * F + cols, result.to(act.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def swiglu_backward_kernel(
    grad,  # [A, F], contiguous
    hidden,  # [A, 2F], contiguous
    dhidden,  # [A, 2F], contiguous
    act,  # [A, F], contiguous: the activation again, times its row's weight
    weights,  # [A] float32: of rows, or None for ones: grad is then of what they are multiplied by
    dweights,  # [blocks of columns, A] float32: parts of the gradients of weights, or None
    num_rows, F: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """``dgate = grad up s (1 + gate (1 - s))``, ``dup = grad gate s``, s = sigmoid(gate)."""
    rows, cols, mask = _tile(num_rows, F, ROWS, COLUMNS)
    halves = rows * (2 * F) + cols
    gate = tl.load(hidden + halves, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(hidden + halves + F, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(grad + rows * F + cols, mask=mask, other=0.0).to(tl.float32)
    weight = 1.0
    if weights is not None:  # with the other loads: behind the sum it would wait for memory again
        weight = tl.load(weights + rows, mask=rows < num_rows, other=0.0)
    s = tl.sigmoid(gate)
    silu = gate * s
    product = silu * up
    dot = g * product
    if weights is not None:
        g *= weight
        product *= weight
    tl.store(act + rows * F + cols, product.to(act.dtype.element_ty), mask=mask)
    dgate, dup = g * up * (s + silu * (1.0 - s)), g * silu
    tl.store(dhidden + halves, dgate.to(dhidden.dtype.element_ty), mask=mask)
    tl.store(dhidden + halves + F, dup.to(dhidden.dtype.element_ty), mask=mask)
    if weights is not None:  # last: its warps wait for each other
        block = (tl.program_id(0) % tl.cdiv(F, COLUMNS)).to(tl.int64)
        total = tl.sum(dot, axis=1, keep_dims=True)
        tl.store(dweights + block * num_rows + rows, total, mask=rows < num_rows)
