"""Logits, the k best experts of every token, and their weights: what no other rank is asked for.

Equal logits: the lower expert first. NaN is larger than all, and makes the token's weights NaN.
With ``impl="triton"`` a launch splits the gate, one multiplies, one chooses, one counts; the
gradient of the logits is made in one too, as the parts that its two products take
(:mod:`moe_parallel.kernels.gate_kernel`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lasp._core.derivatives import Reference, refuse_second_derivatives, refuse_transforms
from moe_parallel.impl import ChosenImpl
from moe_parallel.kernels.histogram import Histogram
from moe_parallel.router.gate import gate_logits, parts_product, summed, takes_parts, wide_product

_REFERENCE = Reference("ExpertParallelMoE's router with impl='triton'", "impl='eager'")


class Choice(NamedTuple):
    """Result of :func:`choose`.

    Attributes:
        logits: ``[T, E]``, gate dtype, differentiable.
        experts: ``[T, k]``, best first, int64.
        weights: ``[T, k]``, softmax over the chosen logits, gate dtype, differentiable.
        histogram: the rank's assignments, counted; None by plain torch.
    """

    logits: Tensor
    experts: Tensor
    weights: Tensor
    histogram: Histogram | None


def choose(x_TM: Tensor, gate_EM: Tensor, top_k: int, impl: ChosenImpl = "eager") -> Choice:
    """The k largest logits of every token.

    Gradients: of logits and weights to x and gate. With ``impl="triton"`` differentiating them
    again raises RuntimeError, and the arguments are kept for the backward beside the results.
    """
    if impl == "triton":
        refuse_transforms(_REFERENCE, x_TM, gate_EM)
        logits, experts, weights, *histogram = _Choose.apply(x_TM, gate_EM, top_k)  # type: ignore[no-untyped-call]
        return Choice(logits, experts, weights, Histogram(*histogram))
    logits = gate_logits(x_TM, gate_EM)
    # topk leaves the order of equal values open; a stable sort does not.
    values, ranking = logits.sort(dim=1, descending=True, stable=True)
    return Choice(logits, ranking[:, :top_k].contiguous(), values[:, :top_k].softmax(1), None)


class _Choose(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TM: Tensor, gate_EM: Tensor, top_k: int) -> tuple[Tensor, ...]:
        from moe_parallel.kernels import launch_router

        ctx.split = takes_parts(x_TM)
        if not ctx.split:
            product = wide_product(x_TM, gate_EM.T)
        elif gate_EM.dtype == torch.bfloat16:
            product = parts_product(x_TM, gate_EM.T, torch.float32)
        else:
            product = parts_product(x_TM, launch_router.split(gate_EM).T, torch.float32)
        logits, experts, weights, histogram = launch_router.top_k(product, gate_EM.shape[0], top_k)
        ctx.save_for_backward(x_TM, gate_EM, experts, weights)
        ctx.mark_non_differentiable(experts, *histogram)
        ctx.set_materialize_grads(False)
        return logits, experts, weights, *histogram

    @staticmethod
    @refuse_second_derivatives(_REFERENCE)
    def backward(
        ctx: Any, dlogits: Tensor | None, _: None, dweights: Tensor | None, *__: None
    ) -> tuple[Tensor | None, ...]:
        from moe_parallel.kernels import launch_router

        x_TM, gate_EM, experts, weights = ctx.saved_tensors
        if dlogits is None and dweights is None:
            return None, None, None
        pairs = ctx.split and gate_EM.dtype != torch.bfloat16
        grad = launch_router.top_k_backward(
            (dweights, dlogits), weights, experts, len(gate_EM), parts=ctx.split, pairs=pairs
        )
        for_x, for_gate = ctx.needs_input_grad[:2]
        if not ctx.split:
            dx = wide_product(grad, gate_EM).to(x_TM.dtype) if for_x else None
            dgate = wide_product(grad.T, x_TM).to(gate_EM.dtype) if for_gate else None
            return dx, dgate, None
        dx = dgate = None
        if for_x:
            gates = launch_router.split(gate_EM, pairs=True) if pairs else torch.cat([gate_EM] * 3)
            dx = parts_product(grad, gates, x_TM.dtype)
        if for_gate:
            high_to_low = parts_product(grad[:, : 3 * len(gate_EM)].T, x_TM, torch.float32).chunk(3)
            dgate = summed(high_to_low if pairs else high_to_low[::-1]).to(gate_EM.dtype)
        return dx, dgate, None
