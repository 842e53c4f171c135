"""RMSNorm over all heads times a sigmoid gate: rows are read once and written once.

With ``s = sigmoid(gate)`` and ``r = 1 / sqrt(sum(x^2) / size + eps)``, for each row::

    y  = x r weight s
    u  = dy weight s                  c = sum(u x)
    dx = r u - x r^3 c / size         dgate = dy x r weight s (1 - s)        dweight = sum dy x r s

Where tensor-parallel ranks share a row, ``sum(x^2)`` and c are sums over the ranks: two small
kernels give each rank's part, and the main ones take the whole.
"""

# No ``from __future__ import annotations``: Triton's interpreter reads the annotations of kernels.

from functools import cache
from typing import Any

import torch
import torch.distributed as dist
import triton
import triton.language as tl
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group  # type: ignore[attr-defined]

from lasp._core.derivatives import Reference
from lasp._core.launcher import aligned, launcher_of
from lasp._core.operators import Operators
from lasp.lightning.triton import tuning


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


def norm_gate(
    x_TW: Tensor, gate_TW: Tensor, weight_W: Tensor, eps: float, tp_group: str
) -> tuple[Tensor, Tensor]:
    """``y = RMSNorm(x) weight sigmoid(gate)`` and ``1 / rms`` of each row in float32."""
    num_rows, width = x_TW.shape
    x_TW, gate_TW = _dense_rows(x_TW), _dense_rows(gate_TW)
    weight_W = aligned(weight_W.contiguous())
    y, rstd = _fake_norm(x_TW)
    cut = tuning.norm_rows(width)
    programs = -(-num_rows // cut.rows)
    case = (x_TW.dtype, weight_W.dtype, tp_group != "")
    shape = {"W": width, "ROWS": cut.rows, "BLOCK": cut.blocks[0], "num_warps": cut.num_warps}
    strides = {"x_stride": x_TW.stride(0), "gate_stride": gate_TW.stride(0)}
    squares, ranks = None, 1
    if tp_group:
        squares = torch.empty_like(rstd)
        launch = launcher_of(
            row_squares_kernel, x_TW.device, case, x_stride=x_TW.stride(0), **shape
        )
        launch(programs, x_TW, squares, num_rows)
        ranks = _sum_over_ranks(squares, tp_group)
    launch = launcher_of(
        norm_gate_kernel, x_TW.device, case, size=width * ranks, eps=eps, **strides, **shape
    )
    launch(programs, x_TW, gate_TW, weight_W, squares, y, rstd, num_rows)
    return y, rstd


def norm_gate_backward(
    dy_TW: Tensor, x_TW: Tensor, gate_TW: Tensor, weight_W: Tensor, rstd_T: Tensor, tp_group: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, gate and weight."""
    num_rows, width = x_TW.shape
    dx, dgate, _ = _fake_norm_backward(dy_TW, x_TW, gate_TW, weight_W, rstd_T, tp_group)
    rows = (_dense_rows(dy_TW), _dense_rows(x_TW), _dense_rows(gate_TW))
    strides = dict(zip(("dy_stride", "x_stride", "gate_stride"), (x.stride(0) for x in rows)))
    weight_W, rstd_T = aligned(weight_W.contiguous()), aligned(rstd_T)
    cut = tuning.norm_backward_rows(width)
    steps = -(-num_rows // cut.rows)
    programs = min(steps, tuning.NORM_BACKWARD_PROGRAMS * _num_sms(x_TW.device))
    dweights = rstd_T.new_empty(programs, width)
    case = (x_TW.dtype, weight_W.dtype, tp_group != "")
    shape = {"W": width, "ROWS": cut.rows, "BLOCK": cut.blocks[0], "num_warps": cut.num_warps}
    dots, ranks = None, 1
    if tp_group:
        dots = torch.empty_like(rstd_T)
        launch = launcher_of(row_dots_kernel, x_TW.device, case, **strides, **shape)
        launch(steps, *rows, weight_W, dots, num_rows)
        ranks = _sum_over_ranks(dots, tp_group)
    launch = launcher_of(
        norm_gate_backward_kernel, x_TW.device, case,
        size=width * ranks, **strides, STAGES=cut.num_stages, **shape,
    )  # fmt: skip
    launch(programs, *rows, weight_W, rstd_T, dots, dx, dgate, dweights, num_rows)
    return dx, dgate, dweights.sum(0).to(weight_W.dtype)


def _sum_over_ranks(x: Tensor, tp_group: str) -> int:
    """Sum ``x`` over the group in place; how many ranks that are."""
    group = _resolve_process_group(tp_group)  # type: ignore[arg-type]
    dist.all_reduce(x, group=group)
    return group.size()


def _fake_norm(x_TW: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    y = torch.empty_like(x_TW, memory_format=torch.contiguous_format)
    return y, x_TW.new_empty(x_TW.shape[0], dtype=torch.float32)


def _fake_norm_backward(
    dy: Tensor, x: Tensor, gate: Tensor, weight: Tensor, rstd: Tensor, tp_group: str
) -> tuple[Tensor, Tensor, Tensor]:
    dx, dgate = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, gate))
    return dx, dgate, weight.new_empty(weight.shape)


def _save_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, _eps, ctx.tp_group = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.mark_non_differentiable(output[1])


def _norm_gradients(ctx: Any, dy: Tensor, _: object) -> tuple[Tensor | None, ...]:
    grads = call_backward(dy, *ctx.saved_tensors, ctx.tp_group)
    return (*grads, None, None)


def _dense_rows(x: Tensor) -> Tensor:
    return aligned(x if x.stride(-1) == 1 else x.contiguous())


@cache
def _num_sms(device: torch.device) -> int:
    if device.type != "cuda":  # interpreted
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count


_REFERENCE = Reference("lasp.layers.norm_gate.norm_gate with impl='triton'", "impl='eager'")
_OPERATORS = Operators("lasp")
_OPERATORS.define(
    "norm_gate(Tensor x, Tensor gate, Tensor weight, float eps, str tp_group) -> (Tensor, Tensor)",
    norm_gate,
    _fake_norm,
)
_OPERATORS.define(
    "norm_gate_backward(Tensor dy, Tensor x, Tensor gate, Tensor weight, Tensor rstd, str tp_group)"
    " -> (Tensor, Tensor, Tensor)",
    norm_gate_backward,
    _fake_norm_backward,
)
call = _OPERATORS.differentiate("norm_gate", _norm_gradients, _save_norm, _REFERENCE)
call_backward = _OPERATORS.refuse_second_derivatives("norm_gate_backward", _REFERENCE)
