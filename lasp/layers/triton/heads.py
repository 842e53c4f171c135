"""Launches of :mod:`lasp.layers.triton.heads_kernel`, as operators of torch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lasp._core.derivatives import Reference
from lasp._core.launcher import aligned, launcher_of
from lasp._core.operators import Operators
from lasp.layers.triton.heads_kernel import heads_backward_kernel, heads_kernel
from lasp.layers.triton.norm_gate import dense_rows, num_sms
from lasp.lightning.triton import tuning


def heads(
    x_THW: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    silu: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v of the projection, each contiguous; what is None is left out."""
    x_THW = dense_rows(x_THW)
    tensors = [x_THW, *[x if x is None else aligned(x) for x in (q_weight, k_weight, cos, sin)]]
    outputs = _fake_heads(x_THW)
    launch, num_rows, rows = _launcher(heads_kernel, tensors, silu, eps)
    launch(-(-num_rows // rows), *tensors, *outputs, num_rows, x_THW.shape[1])
    return outputs


def heads_backward(
    x_THW: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    silu: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the projection, contiguous, and of both weights; empty without."""
    dx = torch.empty_like(x_THW, memory_format=torch.contiguous_format)
    x_THW = dense_rows(x_THW)
    tensors = [x_THW, *[x if x is None else aligned(x) for x in (q_weight, k_weight, cos, sin)]]
    grads = [aligned(grad.contiguous()) for grad in (dq, dk, dv)]
    launch, num_rows, rows = _launcher(heads_backward_kernel, tensors, silu, eps)
    programs, dweights = -(-num_rows // rows), None
    if q_weight is not None:
        programs = min(programs, tuning.HEADS_BACKWARD_PROGRAMS * num_sms(x_THW.device))
        dweights = x_THW.new_empty(programs, 2, dq.shape[-1], dtype=torch.float32)
    launch(programs, *tensors, *grads, dx, dweights, num_rows, x_THW.shape[1])
    if q_weight is None or k_weight is None or dweights is None:
        return dx, x_THW.new_empty(0), x_THW.new_empty(0)
    of_q, of_k = (part.sum(0) for part in dweights.unbind(1))  # no views of one tensor
    return dx, of_q.to(q_weight.dtype), of_k.to(k_weight.dtype)


def _launcher(kernel: Any, tensors: list[Any], silu: bool, eps: float) -> tuple[Any, int, int]:
    """The launcher, the rows, and how many of them a program takes."""
    x, cos = tensors[0], tensors[3]
    head_dim = x.shape[2] // 3
    cut = tuning.head_rows(head_dim)
    launch = launcher_of(
        kernel,
        x.device,
        tuple([None if t is None else t.dtype for t in tensors]),
        stride_t=x.stride(0),
        stride_h=x.stride(1),
        eps=eps,
        K=head_dim,
        BLOCK=cut.blocks[0],
        ROWS=cut.rows,
        SILU=silu,
        HALF=0 if cos is None else cos.shape[1],
        num_warps=cut.num_warps,
    )
    return launch, x.shape[0] * x.shape[1], cut.rows


def _fake_heads(x: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    shape = (x.shape[0], x.shape[1], x.shape[2] // 3)
    return x.new_empty(shape), x.new_empty(shape), x.new_empty(shape)


def _fake_backward(
    x: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    of_q, of_k = (
        x.new_empty(0) if w is None else torch.empty_like(w) for w in (q_weight, k_weight)
    )
    return x.new_empty(x.shape), of_q, of_k


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.rule = inputs[5:]


def _gradients(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    x, q_weight, *rest = ctx.saved_tensors  # once: a checkpoint unpacks them once
    dx, *dweights = call_backward(x, q_weight, *rest, *grads, *ctx.rule)
    if q_weight is None:
        dweights = [None, None]
    return dx, *dweights, *(None,) * 4


_REFERENCE = Reference("lasp.layers.parts.heads_of with impl='triton'", "impl='eager'")
_OPERATORS = Operators("lasp")
_TENSORS = "Tensor x, Tensor? q_weight, Tensor? k_weight, Tensor? cos, Tensor? sin"
_RULE = "bool silu, float eps"
_RESULTS = "(Tensor, Tensor, Tensor)"
_OPERATORS.define(f"heads({_TENSORS}, {_RULE}) -> {_RESULTS}", heads, _fake_heads)
_OPERATORS.define(
    f"heads_backward({_TENSORS}, Tensor dq, Tensor dk, Tensor dv, {_RULE}) -> {_RESULTS}",
    heads_backward,
    _fake_backward,
)
call = _OPERATORS.differentiate("heads", _gradients, _save, _REFERENCE)
call_backward = _OPERATORS.refuse_second_derivatives("heads_backward", _REFERENCE)
