"""Two groups of tokens in the place of groups of experts: the baseline of ``moe_overlap``.

Every group holds half of a rank's tokens and goes to all experts: these read their weights once a
group, multiply half the rows at a time, and add up their weight gradients from two parts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lasp._core.impl import chosen_impl
from moe_parallel import ExpertParallelMoE, TokenOrder
from moe_parallel.dispatch.all_to_all import AllToAllDispatch
from moe_parallel.dispatch.permute import permute, row_order, unpermute
from moe_parallel.dispatch.plan import plan_exchange
from moe_parallel.experts.gemm import backward_product, forward_product, weight_product
from moe_parallel.experts.swiglu import swiglu, swiglu_backward
from moe_parallel.pipeline.pipeline import Pipeline
from moe_parallel.router.route import route


def token_groups(layer: ExpertParallelMoE, x_TM: Tensor) -> Tensor:
    """The output of the layer for tokens that choose all experts alike, half of them at a time."""
    config, mesh, groups = layer.config, layer.mesh, layer.groups
    order = TokenOrder.contiguous([x_TM.shape[0]] * mesh.num_token_ranks)
    impl = chosen_impl(config.impl, x_TM.device, x_TM.dtype)
    routing = route(
        x_TM,
        layer.gate.weight,
        top_k=config.top_k,
        order=order,
        token_group=groups.token,
        impl=impl,
    )
    kept_RE = routing.counts.kept.tolist()
    halves_RE = [[count // 2 for count in kept_E] for kept_E in kept_RE]
    plan = plan_exchange(halves_RE, mesh)
    second = torch.arange(x_TM.shape[0], device=x_TM.device) >= x_TM.shape[0] // 2
    place_Tk = routing.experts + config.num_experts * second.unsqueeze(1)
    rows = row_order(place_Tk, None, 2 * sum(plan.dispatch_rows), 2 * config.num_experts)
    later = plan._replace(first=sum(plan.dispatch_rows))
    everybody = range(layer.experts.num_local)
    sent = AllToAllDispatch((everybody,) * 2, (plan, later), groups.ep, groups.etp)
    experts = layer.experts
    gemm = experts.chosen_gemm(2 * sum(plan.expert_rows))
    results = _TokenGroups.apply(
        permute(x_TM, rows, impl), experts.w13, experts.w2, Pipeline(sent), gemm, impl
    )
    return unpermute(results, routing.weights, rows, impl)


class _TokenGroups(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows_AM: Tensor, w13: Tensor, w2: Tensor, pipeline: Pipeline, gemm: Any, impl: Any
    ) -> Tensor:
        kept: list[Tensor] = []

        def compute(g: int, rows: Tensor) -> Tensor:
            counts = pipeline.dispatch.expert_rows(g)
            hidden = forward_product(rows, w13.flatten(1, 2), counts, gemm)
            kept.extend((rows, hidden))
            return forward_product(swiglu(hidden, impl), w2, counts, gemm)

        results = pipeline.run(rows_AM, compute)
        ctx.save_for_backward(w13, w2, *kept)
        ctx.arguments = (pipeline, gemm, impl)
        return results

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_AM: Tensor) -> tuple[Any, ...]:
        w13, w2, *kept = ctx.saved_tensors
        pipeline, gemm, impl = ctx.arguments
        parts = [(torch.empty_like(w13), torch.empty_like(w2)) for _ in range(2)]
        made: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

        def compute(g: int, dy: Tensor) -> Tensor:
            counts = pipeline.dispatch.expert_rows(g)
            dact = backward_product(dy, w2, counts, gemm)
            dhidden, act = swiglu_backward(dact, kept[2 * g + 1], impl)
            made[g] = (dy, dhidden, act)
            return backward_product(dhidden, w13.flatten(1, 2), counts, gemm)

        def weights(g: int) -> None:
            (dy, dhidden, act), counts = made.pop(g), pipeline.dispatch.expert_rows(g)
            weight_product(dhidden, kept[2 * g], counts, gemm, parts[g][0].flatten(1, 2))
            weight_product(dy, act, counts, gemm, parts[g][1])

        drows = pipeline.run(grad_AM.contiguous(), compute, weights)
        return drows, *(first.add_(second) for first, second in zip(*parts)), None, None, None
