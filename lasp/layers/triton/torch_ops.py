"""``impl="triton"`` of ``lasp.layers.norm_gate``: launches, as operators of ``torch.ops.lasp``.

Backward passes are operators too, so that a compiler sees through to them.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group  # type: ignore[attr-defined]

from lasp._core.derivatives import Reference
from lasp._core.operators import Operators
from lasp.layers.triton.norm_gate_kernel import (
    norm_gate_backward_kernel,
    norm_gate_kernel,
    row_dots_kernel,
    row_squares_kernel,
)
from lasp.layers.triton.silu_split_kernel import silu_split_backward_kernel, silu_split_kernel
from lasp.lightning.triton import tuning

# ---- SiLU and head split ------------------------------------------------------------------------


def silu_split(x_THW: Tensor, key_dim: int, value_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """``q, k, v = split(SiLU(x))``, each contiguous; ``[T, H, 2K + V]`` of any strides."""
    x_THW = _in_pieces(x_THW)
    q, k, v = _fake_split(x_THW, key_dim, value_dim)
    if q.numel():
        _launch_split(silu_split_kernel, x_THW, q, k, v)
    return q, k, v


def silu_split_backward(x_THW: Tensor, dq: Tensor, dk: Tensor, dv: Tensor) -> Tensor:
    """The gradient of x, contiguous."""
    dx = torch.empty_like(x_THW, memory_format=torch.contiguous_format)
    if dx.numel():
        grads = (grad.contiguous() for grad in (dq, dk, dv))
        _launch_split(silu_split_backward_kernel, _in_pieces(x_THW), *grads, dx)
    return dx


def _launch_split(kernel: Any, x: Tensor, q: Tensor, k: Tensor, v: Tensor, *dx: Tensor) -> None:
    num_tokens, num_heads, key_dim = q.shape
    value_dim = v.shape[2]
    rows = tuning.split_rows(key_dim, value_dim)
    with torch.cuda.device_of(x):
        kernel[(-(-num_tokens * num_heads // rows.rows),)](
            x,
            q,
            k,
            v,
            *dx,
            num_tokens * num_heads,
            num_heads,
            *x.stride()[:2],
            K=key_dim,
            V=value_dim,
            BLOCK_K=rows.blocks[0],
            BLOCK_V=rows.blocks[1],
            ROWS=rows.rows,
            num_warps=rows.num_warps,
        )


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
    return torch.ops.lasp.silu_split_backward(*ctx.saved_tensors, *grads), None, None


# ---- norm and gate ------------------------------------------------------------------------------


def norm_gate(
    x_TW: Tensor, gate_TW: Tensor, weight_W: Tensor, eps: float, tp_group: str
) -> tuple[Tensor, Tensor]:
    """``y = RMSNorm(x) weight sigmoid(gate)`` and ``1 / rms`` of each row in float32."""
    num_rows, width = x_TW.shape
    x_TW, gate_TW, weight_W = _in_pieces(x_TW), _in_pieces(gate_TW), weight_W.contiguous()
    y, rstd = _fake_norm(x_TW)
    cut = tuning.norm_rows(width)
    grid = (-(-num_rows // cut.rows),)
    shape = {"W": width, "ROWS": cut.rows, "BLOCK": cut.blocks[0], "num_warps": cut.num_warps}
    squares, ranks = None, 1
    with torch.cuda.device_of(x_TW):
        if tp_group:
            squares = torch.empty_like(rstd)
            if num_rows:
                row_squares_kernel[grid](x_TW, squares, num_rows, x_TW.stride(0), **shape)
            ranks = _sum_over_ranks(squares, tp_group)
        if num_rows:
            norm_gate_kernel[grid](
                x_TW,
                gate_TW,
                weight_W,
                squares,
                y,
                rstd,
                num_rows,
                width * ranks,
                eps,
                x_TW.stride(0),
                gate_TW.stride(0),
                **shape,
            )
    return y, rstd


def norm_gate_backward(
    dy_TW: Tensor, x_TW: Tensor, gate_TW: Tensor, weight_W: Tensor, rstd_T: Tensor, tp_group: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, gate and weight."""
    num_rows, width = x_TW.shape
    dx, dgate, _ = _fake_norm_backward(dy_TW, x_TW, gate_TW, weight_W, rstd_T, tp_group)
    rows = (_in_pieces(dy_TW), _in_pieces(x_TW), _in_pieces(gate_TW))
    strides = tuple(x.stride(0) for x in rows)
    weight_W = weight_W.contiguous()
    cut = tuning.norm_backward_rows(width)
    steps = -(-num_rows // cut.rows)
    programs = min(steps, tuning.NORM_BACKWARD_PROGRAMS * _num_sms(x_TW.device))
    dweights = rstd_T.new_empty(programs, width)
    shape = {"W": width, "ROWS": cut.rows, "BLOCK": cut.blocks[0], "num_warps": cut.num_warps}
    dots, ranks = None, 1
    with torch.cuda.device_of(x_TW):
        if tp_group:
            dots = torch.empty_like(rstd_T)
            if num_rows:
                row_dots_kernel[(steps,)](*rows, weight_W, dots, num_rows, *strides, **shape)
            ranks = _sum_over_ranks(dots, tp_group)
        if num_rows:
            norm_gate_backward_kernel[(programs,)](
                *rows,
                weight_W,
                rstd_T,
                dots,
                dx,
                dgate,
                dweights,
                num_rows,
                width * ranks,
                *strides,
                STAGES=cut.num_stages,
                **shape,
            )
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
    grads = torch.ops.lasp.norm_gate_backward(dy, *ctx.saved_tensors, ctx.tp_group)
    return (*grads, None, None)


# ---- both ---------------------------------------------------------------------------------------


def _in_pieces(x: Tensor) -> Tensor:
    """Kernels take any strides but that of the last dim."""
    return x if x.stride(-1) == 1 else x.contiguous()


@cache
def _num_sms(device: torch.device) -> int:
    if device.type != "cuda":  # interpreted
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count


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
_SPLIT, _NORM = (
    Reference(f"lasp.layers.norm_gate.{name} with impl='triton'", "impl='eager'")
    for name in ("silu_split", "norm_gate")
)
_OPERATORS.differentiate("silu_split", _split_gradients, _save_split, _SPLIT)
_OPERATORS.differentiate("norm_gate", _norm_gradients, _save_norm, _NORM)
_OPERATORS.refuse_second_derivatives("silu_split_backward", _SPLIT)
_OPERATORS.refuse_second_derivatives("norm_gate_backward", _NORM)
