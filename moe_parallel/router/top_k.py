"""Logits, the k best experts of every token, and their weights, without communication.

Equal logits: the lower expert first. NaN is larger than all, and makes the token's weights NaN.
Logits are float32 or wider, whatever the dtype of the tokens. Experts with the same weights have
the same logits, bit for bit.

With ``impl="triton"`` one launch splits the gate, one multiplies, one chooses, one counts. One more
makes the gradient of the logits, as the parts that its two products take
(:mod:`moe_parallel.kernels.gate_kernel`). bfloat16 tokens on a GPU are multiplied by its tensor
cores. A float32 number is the sum of three bfloat16 ones, of 8 bits each, and the products of these
are exact in float32::

    w = high + middle + low           logits = x low^T + x middle^T + x high^T

so that only additions round, as in a float32 product (tensor cores cut off where float32 units
round to nearest). Tokens are neither copied to float32 nor kept in it for the backward, which
splits the gradient d of the logits too::

    dgate = d^T x, a product a part            dx = sum of d_i w_j, i + j <= 4, in one product

What the sum leaves out, d_2 w_3 and smaller, is less than 2^-23 of |d| |w|, which is what a float32
product rounds; dx is then rounded to bfloat16. Parts are exact for zero and 2^-110 <= |w| < 2^127
(2 - 2^-8). Below, the last part is denormal and the sum off by at most 2^-134; above, the first
part is infinite and the sum NaN.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lasp._core.autocast import without_autocast
from lasp._core.derivatives import Reference, refuse_second_derivatives, refuse_transforms
from lasp._core.dtypes import wide_dtype
from lasp._core.impl import ChosenImpl
from moe_parallel.kernels.histogram import Histogram
from moe_parallel.router.scores import Scoring, choose_by_scores

_REFERENCE = Reference("ExpertParallelMoE's router with impl='triton'", "impl='eager'")


class TopK(NamedTuple):
    """Result of :func:`choose`.

    Attributes:
        logits: ``[T, E]``, gate dtype, differentiable.
        experts: ``[T, k]``, best first, int64.
        weights: ``[T, k]``, by default softmax over the chosen logits, gate dtype, differentiable.
        histogram: the rank's assignments, counted; None where plain torch chooses.
    """

    logits: Tensor
    experts: Tensor
    weights: Tensor
    histogram: Histogram | None


def choose(
    x_TM: Tensor,
    gate_EM: Tensor,
    top_k: int,
    impl: ChosenImpl = "eager",
    scoring: Scoring | None = None,
    num_ranks: int = 0,
) -> TopK:
    """The k largest logits ``x gate^T`` of every token, float32 or wider, under autocast too.

    With ``scoring`` the choice is that of :mod:`moe_parallel.router.scores`. Kernels make it too,
    but for given choices and for groups where E or their number is no power of 2: there plain torch
    chooses, on logits that are computed alike. With ``num_ranks`` kernels count the tokens of each
    rank too (:class:`moe_parallel.kernels.histogram.Histogram`).

    Gradients: of logits and weights to x and gate. With ``impl="triton"`` differentiating them
    again raises RuntimeError, and the arguments are kept for the backward beside the results.
    """
    if impl == "triton":
        refuse_transforms(_REFERENCE, x_TM, gate_EM)
        rule = () if scoring is None else kernel_rule(scoring, len(gate_EM))
        bias_E = scoring.expert_bias if scoring is not None and rule else None
        logits, experts, weights, *histogram = _Choose.apply(  # type: ignore[no-untyped-call]
            x_TM, gate_EM, top_k, rule or (), bias_E, num_ranks
        )
        if rule is not None:
            before, totals = histogram
            return TopK(logits, experts, weights, Histogram(before, totals, num_ranks))
    else:
        logits = wide_product(x_TM, gate_EM.T)
    if scoring is not None:
        return TopK(logits, *choose_by_scores(logits, top_k, scoring), None)
    # topk leaves the order of equal values open; a stable sort does not.
    values, ranking = logits.sort(dim=1, descending=True, stable=True)
    return TopK(logits, ranking[:, :top_k].contiguous(), values[:, :top_k].softmax(1), None)


class _Choose(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TM: Tensor,
        gate_EM: Tensor,
        top_k: int,
        rule: tuple[Any, ...],
        bias_E: Tensor | None,
        num_ranks: int,
    ) -> tuple[Tensor, ...]:
        from moe_parallel.kernels import router

        ctx.split, ctx.rule = takes_parts(x_TM), router.ChoiceRule(*rule)
        if not ctx.split:
            product = wide_product(x_TM, gate_EM.T)
        elif gate_EM.dtype == torch.bfloat16:
            product = parts_product(x_TM, gate_EM.T, torch.float32)
        else:
            product = parts_product(x_TM, router.split(gate_EM).T, torch.float32)
        logits, experts, weights, histogram = router.top_k(
            product, len(gate_EM), top_k, ctx.rule, bias_E, num_ranks
        )
        counts = histogram[:2]
        kept = logits if ctx.rule.score else None
        ctx.save_for_backward(x_TM, gate_EM, experts, weights, kept)
        ctx.mark_non_differentiable(experts, *counts)
        ctx.set_materialize_grads(False)
        return logits, experts, weights, *counts

    @staticmethod
    @refuse_second_derivatives(_REFERENCE)
    def backward(
        ctx: Any, dlogits: Tensor | None, _: None, dweights: Tensor | None, *__: None
    ) -> tuple[Tensor | None, ...]:
        from moe_parallel.kernels import router

        x_TM, gate_EM, experts, weights, logits = ctx.saved_tensors
        if dlogits is None and dweights is None:
            return (None,) * 6
        pairs = ctx.split and gate_EM.dtype != torch.bfloat16
        grad = router.top_k_backward(
            (dweights, dlogits),
            weights,
            experts,
            len(gate_EM),
            parts=ctx.split,
            pairs=pairs,
            rule=ctx.rule,
            logits_TE=logits,
        )
        for_x, for_gate = ctx.needs_input_grad[:2]
        if not ctx.split:
            dx = wide_product(grad, gate_EM).to(x_TM.dtype) if for_x else None
            dgate = wide_product(grad.T, x_TM).to(gate_EM.dtype) if for_gate else None
            return dx, dgate, *(None,) * 4
        dx = dgate = None
        if for_x:
            gates = router.split(gate_EM, pairs=True) if pairs else torch.cat([gate_EM] * 3)
            dx = parts_product(grad, gates, x_TM.dtype)
        if for_gate:
            high_to_low = parts_product(grad[:, : 3 * len(gate_EM)].T, x_TM, torch.float32).chunk(3)
            dgate = summed(high_to_low if pairs else high_to_low[::-1]).to(gate_EM.dtype)
        return dx, dgate, *(None,) * 4


def kernel_rule(scoring: Scoring, num_experts: int) -> tuple[Any, ...] | None:
    """Fields of :class:`moe_parallel.kernels.router.ChoiceRule`; None: plain torch chooses."""
    router, groups = scoring.router, scoring.router.num_groups or 1
    powers = all(size & (size - 1) == 0 for size in (groups, num_experts))
    if scoring.experts is not None or (groups > 1 and not powers):
        return None
    score = ("softmax_of_top_k", "sigmoid", "softmax").index(router.score_function)
    # A softmax over all that is normalised is the softmax over the chosen, of the same choice.
    return (score, router.normalize, float(router.scaling), groups, router.top_groups or 1)


def takes_parts(x_TM: Tensor) -> bool:
    """Whether tokens are multiplied as they are, with bfloat16 parts of the gate."""
    return x_TM.is_cuda and x_TM.dtype == torch.bfloat16


def wide_product(a: Tensor, b: Tensor) -> Tensor:
    """``a b`` in :func:`lasp._core.dtypes.wide_dtype` of ``a``, under autocast too."""
    dtype = wide_dtype(a.dtype)
    # Autocast would round tokens and gate to bfloat16 for the product.
    with without_autocast(a):
        return a.to(dtype) @ b.to(dtype)


def parts_product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """``a b`` of bfloat16 matrices, added up in float32 and rounded to ``dtype``."""
    with without_autocast(a):
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
