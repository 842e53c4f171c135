"""Launches of :mod:`lasp.layers.triton.norm_gate_kernel`, as operators of torch."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group  # type: ignore[attr-defined]

from lasp._core.derivatives import Reference
from lasp._core.launcher import aligned, launcher_of
from lasp._core.operators import Operators
from lasp.layers.triton.norm_gate_kernel import (
    norm_gate_backward_kernel,
    norm_gate_kernel,
    row_dots_kernel,
    row_squares_kernel,
)
from lasp.lightning.triton import tuning


class GateRule(NamedTuple):
    """How a row is normed and gated, see :func:`lasp.layers.norm_gate.norm_gate`.

    Attributes:
        num_groups: of this rank's features.
        silu: the gate's factor is SiLU, not the sigmoid.
        gate_first: the gate is under the norm.
        tp_group: name of the group that shares the rows; empty: none.
    """

    num_groups: int
    silu: bool
    gate_first: bool
    tp_group: str


def norm_gate(
    x_TW: Tensor, gate_TW: Tensor | None, weight_W: Tensor, eps: float, *rule: Any
) -> tuple[Tensor, Tensor]:
    """The normed and gated rows, and ``1 / rms`` of each row and group in float32."""
    num_groups, silu, gate_first, tp_group = GateRule(*rule)
    num_rows, width = x_TW.shape[0], x_TW.shape[1] // num_groups
    x_TW, gate_TW = dense_rows(x_TW), gate_TW if gate_TW is None else dense_rows(gate_TW)
    weight_W = aligned(weight_W.contiguous())
    y, rstd = _fake_norm(x_TW, gate_TW, weight_W, eps, *rule)
    cut = tuning.norm_rows(width)
    programs = -(-num_rows // cut.rows)
    case = (x_TW.dtype, weight_W.dtype, tp_group != "", gate_TW is None, gate_first)
    shape = {"W": width, "ROWS": cut.rows, "BLOCK": cut.blocks[0], "num_warps": cut.num_warps}
    shape["SILU"] = silu
    strides = _strides(x=x_TW, gate=gate_TW)
    squares, ranks = None, 1
    if tp_group:
        squares = rstd.new_empty(num_rows)
        launch = launcher_of(row_squares_kernel, x_TW.device, case, **strides, **shape)
        launch(programs, x_TW, gate_TW if gate_first else None, squares, num_rows)
        ranks = _sum_over_ranks(squares, tp_group)
    launch = launcher_of(
        norm_gate_kernel, x_TW.device, case,
        size=width * ranks, eps=eps, GROUPS=num_groups, FIRST=gate_first, **strides, **shape,
    )  # fmt: skip
    launch(programs * num_groups, x_TW, gate_TW, weight_W, squares, y, rstd, num_rows)
    return y, rstd


def norm_gate_backward(
    dy_TW: Tensor, x_TW: Tensor, gate_TW: Tensor | None, weight_W: Tensor, rstd: Tensor, *rule: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, gate (empty without one) and weight."""
    num_groups, silu, gate_first, tp_group = GateRule(*rule)
    num_rows, width = x_TW.shape[0], x_TW.shape[1] // num_groups
    dx, dgate, _ = _fake_norm_backward(dy_TW, x_TW, gate_TW, weight_W, rstd, *rule)
    dy_TW, x_TW = dense_rows(dy_TW), dense_rows(x_TW)
    gate_TW = gate_TW if gate_TW is None else dense_rows(gate_TW)
    rows, strides = (dy_TW, x_TW, gate_TW), _strides(dy=dy_TW, x=x_TW, gate=gate_TW)
    weight_W, rstd = aligned(weight_W.contiguous()), aligned(rstd)
    cut = tuning.norm_backward_rows(width)
    steps = -(-num_rows // cut.rows)
    most = tuning.NORM_BACKWARD_PROGRAMS * num_sms(x_TW.device)
    programs = min(steps, -(-most // num_groups))
    dweights = rstd.new_empty(programs, x_TW.shape[1])
    case = (x_TW.dtype, weight_W.dtype, tp_group != "", gate_TW is None)
    shape = {"W": width, "ROWS": cut.rows, "BLOCK": cut.blocks[0], "num_warps": cut.num_warps}
    shape["SILU"] = silu
    dots, ranks = None, 1
    if tp_group:
        dots = rstd.new_empty(num_rows)
        launch = launcher_of(row_dots_kernel, x_TW.device, case, **strides, **shape)
        launch(steps, *rows, weight_W, dots, num_rows)
        ranks = _sum_over_ranks(dots, tp_group)
    launch = launcher_of(
        norm_gate_backward_kernel, x_TW.device, case,
        size=width * ranks, GROUPS=num_groups, FIRST=gate_first, STAGES=cut.num_stages,
        **strides, **shape,
    )  # fmt: skip
    launch(programs * num_groups, *rows, weight_W, rstd, dots, dx, dgate, dweights, num_rows)
    return dx, dgate, dweights.sum(0).to(weight_W.dtype)


def _strides(**rows: Tensor | None) -> dict[str, int]:
    return {f"{name}_stride": 0 if x is None else x.stride(0) for name, x in rows.items()}


def _sum_over_ranks(x: Tensor, tp_group: str) -> int:
    """Sum ``x`` over the group in place; how many ranks that are."""
    group = _resolve_process_group(tp_group)  # type: ignore[arg-type]
    dist.all_reduce(x, group=group)
    return group.size()


def _fake_norm(
    x_TW: Tensor, gate: object, weight: object, eps: float, num_groups: int, *_: object
) -> tuple[Tensor, Tensor]:
    y = torch.empty_like(x_TW, memory_format=torch.contiguous_format)
    return y, x_TW.new_empty(x_TW.shape[0], num_groups, dtype=torch.float32)


def _fake_norm_backward(
    dy: Tensor, x: Tensor, gate: Tensor | None, weight: Tensor, *_: object
) -> tuple[Tensor, Tensor, Tensor]:
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    dgate = x.new_empty(0) if gate is None else torch.empty_like(dx)
    return dx, dgate, weight.new_empty(weight.shape)


def _save_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, _eps = inputs[:4]
    ctx.rule = inputs[4:]
    ctx.save_for_backward(*tensors, output[1])
    ctx.mark_non_differentiable(output[1])


def _norm_gradients(ctx: Any, dy: Tensor, _: object) -> tuple[Tensor | None, ...]:
    x, gate, *rest = ctx.saved_tensors  # once: a checkpoint unpacks them once
    dx, dgate, dweight = call_backward(dy, x, gate, *rest, *ctx.rule)
    return (dx, None if gate is None else dgate, dweight, *(None,) * 5)


def dense_rows(x: Tensor) -> Tensor:
    """``x``, or a copy, whose rows are in one piece and which kernels can load."""
    return aligned(x if x.stride(-1) == 1 else x.contiguous())


@cache
def num_sms(device: torch.device) -> int:
    """Multiprocessors of a device."""
    if device.type != "cuda":  # interpreted
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count


_REFERENCE = Reference("lasp.layers.norm_gate.norm_gate with impl='triton'", "impl='eager'")
_OPERATORS = Operators("lasp")
_RULE = "int num_groups, bool silu, bool gate_first, str tp_group"
_OPERATORS.define(
    f"norm_gate(Tensor x, Tensor? gate, Tensor weight, float eps, {_RULE}) -> (Tensor, Tensor)",
    norm_gate,
    _fake_norm,
)
_OPERATORS.define(
    "norm_gate_backward(Tensor dy, Tensor x, Tensor? gate, Tensor weight, Tensor rstd,"
    f" {_RULE}) -> (Tensor, Tensor, Tensor)",
    norm_gate_backward,
    _fake_norm_backward,
)
call = _OPERATORS.differentiate("norm_gate", _norm_gradients, _save_norm, _REFERENCE)
call_backward = _OPERATORS.refuse_second_derivatives("norm_gate_backward", _REFERENCE)
