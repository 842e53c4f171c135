"""The gate's product: logits in float32 or wider, whatever the dtype of the tokens.

bfloat16 tokens on a GPU are multiplied by its tensor cores. A float32 number is the sum of three
bfloat16 ones, of 8 bits each, and the products of these are exact in float32::

    w = high + middle + low           logits = x low^T + x middle^T + x high^T

so that only additions round, as in a float32 product (tensor cores cut off where float32 units
round to nearest). Tokens are neither copied to float32 nor kept in it for the backward, which
splits the gradient d of the logits too::

    dgate = d^T x, a product a part            dx = sum of d_i w_j, i + j <= 4, in one product

What the sum leaves out, d_2 w_3 and smaller, is less than 2^-23 of |d| |w|, which is what a float32
product rounds; dx is then rounded to bfloat16.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lasp._core.derivatives import Reference, refuse_second_derivatives, refuse_transforms

_REFERENCE = Reference(
    "ExpertParallelMoE's gate in bfloat16 parts", "moe_parallel.router.gate.wide_product"
)


def gate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype the router computes in: float32, or float64 for float64 tokens."""
    return torch.promote_types(dtype, torch.float32)


def gate_logits(x_TM: Tensor, gate_EM: Tensor) -> Tensor:
    """``[T, E]``: ``x gate^T`` in :func:`gate_dtype`, under autocast too.

    bfloat16 tokens on CUDA by :func:`split_logits`, all else by one product in that dtype. Experts
    with the same weights have the same logits, bit for bit.
    """
    if takes_parts(x_TM):
        return split_logits(x_TM, gate_EM)
    return wide_product(x_TM, gate_EM.T)


def takes_parts(x_TM: Tensor) -> bool:
    """Whether tokens are multiplied as they are, with bfloat16 parts of the gate."""
    return x_TM.is_cuda and x_TM.dtype == torch.bfloat16


def wide_product(a: Tensor, b: Tensor) -> Tensor:
    """``a b`` in :func:`gate_dtype` of ``a``, under autocast too."""
    dtype = gate_dtype(a.dtype)
    # Autocast would round tokens and gate to bfloat16 for the product.
    with torch.autocast(a.device.type, enabled=False):
        return a.to(dtype) @ b.to(dtype)


def split_logits(x_TM: Tensor, gate_EM: Tensor) -> Tensor:
    """:func:`gate_logits` of bfloat16 tokens with bfloat16 operands.

    Gradients: to x, rounded once to bfloat16, and to the gate. Differentiating them again raises
    RuntimeError. Kept for the backward: the arguments.
    """
    refuse_transforms(_REFERENCE, x_TM, gate_EM)
    logits_TE: Tensor = _SplitGate.apply(x_TM, gate_EM)  # type: ignore[no-untyped-call]
    return logits_TE


class _SplitGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TM: Tensor, gate_EM: Tensor) -> Tensor:
        ctx.save_for_backward(x_TM, gate_EM)
        parts = bfloat16_parts(gate_EM)
        logits = parts_product(x_TM, torch.cat(parts).T, torch.float32)
        return summed(logits.chunk(len(parts), dim=1))

    @staticmethod
    @refuse_second_derivatives(_REFERENCE)
    def backward(ctx: Any, grad_TE: Tensor) -> tuple[Tensor | None, ...]:
        x_TM, gate_EM = ctx.saved_tensors
        grad_parts = bfloat16_parts(grad_TE)
        dx = dgate = None
        if ctx.needs_input_grad[0]:
            pairs = [
                (i + j, d, w)
                for i, d in enumerate(grad_parts)
                for j, w in enumerate(bfloat16_parts(gate_EM))
                if i + j <= 2
            ]
            _, ds, ws = zip(*sorted(pairs, key=lambda pair: -pair[0]))  # small terms first
            dx = parts_product(torch.cat(ds, dim=1), torch.cat(ws), x_TM.dtype)
        if ctx.needs_input_grad[1]:
            products = parts_product(torch.cat(grad_parts, dim=1).T, x_TM, torch.float32)
            dgate = summed(products.chunk(len(grad_parts))).to(gate_EM.dtype)
        return dx, dgate


def bfloat16_parts(x: Tensor) -> tuple[Tensor, ...]:
    """bfloat16 tensors whose sum is ``x`` in float32, the largest first; one if it is bfloat16.

    Exact for zero and 2^-110 <= |x| < 2^127 (2 - 2^-8). Below, the last part is denormal and the
    sum off by at most 2^-134; above, the first part is infinite and the sum NaN.
    """
    if x.dtype == torch.bfloat16:
        return (x,)
    x = x.float()
    high = x.bfloat16()
    rest = x - high  # exact, as it has no more bits than x had
    middle = rest.bfloat16()
    return high, middle, (rest - middle).bfloat16()


def parts_product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """``a b`` of bfloat16 matrices, added up in float32 and rounded to ``dtype``."""
    with torch.autocast(a.device.type, enabled=False):
        if a.numel() == 0 or b.numel() == 0:
            return a.new_zeros(a.shape[0], b.shape[1], dtype=dtype)
        if a.is_cuda:
            return torch.mm(a, b, out_dtype=dtype)
        # torch has no such product on CPUs, which only tests ask for: the same numbers, widened.
        return (a.float() @ b.float()).to(dtype)


def summed(parts: Sequence[Tensor]) -> Tensor:
    """The sum, the last part first, which is the smallest."""
    total = parts[-1]
    for part in reversed(parts[:-1]):
        total = total + part
    return total
