"""``global_aux_loss`` over the micro-batches of a step, as Megatron's own router means it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from megatron.core.distributed.finalize_model_grads import reset_model_temporary_tensors
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.spec_utils import build_module
from torch import Tensor

from moe_parallel.megatron import expert_parallel_moe_spec
from tests.closeness import assert_equal_to_rounding
from tests.megatron.attention import config, parallel_config
from tests.megatron.cpu import initialize, summed
from tests.megatron.test_moe_parallel import MOE_RECOMPUTE, OPTIONS
from tests.ranks import run_on_ranks

pytestmark = pytest.mark.megatron

DROPLESS = OPTIONS | {"moe_expert_capacity_factor": None, "moe_router_dtype": "fp64"}
EQUAL, RAGGED = (16, 16, 16), (16, 6, 12)  # tokens of the micro-batches of a step


def steps(sizes: tuple[int, ...]) -> list[list[Tensor]]:
    """Hidden states of all ranks, by step and micro-batch, each about a mean of its own."""
    generator = torch.Generator().manual_seed(3)

    def drawn(tokens: int) -> Tensor:
        return torch.randn(tokens, 10, generator=generator, dtype=torch.float64)

    return [[drawn(tokens) + 2 * drawn(1) for tokens in sizes] for _ in range(2)]


def of_our_layer(
    parallel: dict[str, int], options: dict[str, Any], sizes: tuple[int, ...]
) -> tuple[Tensor, list[Tensor]]:
    """The gate, and after each step its gradient from the auxiliary losses alone."""
    groups = initialize(**parallel)
    settings = parallel_config(parallel, **DROPLESS, **options)
    layer = build_module(
        expert_parallel_moe_spec(), config=settings, layer_number=1, pg_collection=groups
    )
    gate, gradients = layer.moe.gate.weight, []
    rank, ranks = groups.tp_dp_cp.rank(), groups.tp_dp_cp.size()
    MoEAuxLossAutoScaler.set_loss_scale(torch.ones(1))
    for micro_batches in steps(sizes):
        gate.grad = None
        for hidden in micro_batches:
            local = hidden.chunk(ranks)[rank].unsqueeze(1).requires_grad_()
            (layer(local)[0] * 0).sum().backward()
            layer.eval()(local)  # neither an evaluation between them counts
            with torch.no_grad():
                layer.train()(local)  # nor a forward without gradients
        reset_model_temporary_tensors(settings, [layer])
        gradients.append(summed(gate.grad, groups.tp_dp_cp) / groups.dp.size())
    return gate.detach(), gradients


def of_megatrons_router(weight: Tensor, sizes: tuple[int, ...]) -> list[Tensor]:
    """The same by Megatron's router on one rank."""
    moe_utils.te_general_gemm = None  # 0.16 has no such name without TransformerEngine
    groups = initialize()
    settings, gradients = config(**DROPLESS), []
    router = TopKRouter(config=settings, pg_collection=groups)
    router.set_layer_number(1)
    router.weight.data.copy_(weight)
    MoEAuxLossAutoScaler.set_loss_scale(torch.ones(1))
    for micro_batches in steps(sizes):
        router.weight.grad = None
        for hidden in micro_batches:
            probs, _ = router(hidden.unsqueeze(1))
            (probs * 0).sum().backward()
        reset_model_temporary_tensors(settings, [router])
        gradients.append(router.weight.grad)
    return gradients


def by_hand(weight: Tensor, sizes: tuple[int, ...]) -> list[Tensor]:
    """The same: f_i of the assignments so far, m_i of the micro-batch."""
    gate, gradients = weight.clone().requires_grad_(), []
    num_experts, top_k = len(weight), OPTIONS["moe_router_topk"]
    for micro_batches in steps(sizes):
        loss, assigned = 0.0, torch.zeros(num_experts, dtype=torch.float64)
        for hidden in micro_batches:
            logits = hidden @ gate.T
            assigned = assigned + logits.topk(top_k).indices.flatten().bincount(
                minlength=num_experts
            )
            mean = logits.softmax(1).mean(0)
            loss = loss + num_experts * (assigned / assigned.sum() * mean).sum()
        gradients += torch.autograd.grad(OPTIONS["moe_aux_loss_coeff"] * loss, gate)
    return gradients


@pytest.mark.parametrize("options", [{}, MOE_RECOMPUTE], ids=["plain", "recomputed"])
@pytest.mark.parametrize(
    ("parallel", "sizes"), [({}, EQUAL), ({"ep": 2}, EQUAL), ({"ep": 2}, RAGGED)]
)
def test_the_loss_counts_the_micro_batches_of_a_step(
    parallel: dict[str, int], sizes: tuple[int, ...], options: dict[str, Any]
) -> None:
    ranks = parallel.get("ep", 1)
    for gate, gradients in run_on_ranks(of_our_layer, ranks, parallel, options, sizes):
        for actual, expected in zip(gradients, by_hand(gate, sizes), strict=True):
            assert_equal_to_rounding(actual, expected)


def test_megatrons_router_means_the_same() -> None:
    ((gate, _),) = run_on_ranks(of_our_layer, 1, {}, {}, EQUAL)
    (theirs,) = run_on_ranks(of_megatrons_router, 1, gate, EQUAL)
    for actual, expected in zip(theirs, by_hand(gate, EQUAL), strict=True):
        # Its scores are float32.
        assert_equal_to_rounding(actual, expected, tolerance=16 * torch.finfo(torch.float32).eps)


def not_saved() -> list[str]:
    layer = build_module(
        expert_parallel_moe_spec(), config=config(**DROPLESS), pg_collection=initialize()
    )
    layer.bfloat16()
    assert layer.step_balance.assigned.dtype == torch.int64
    return [name for name in layer.state_dict() if "balance" in name]


def test_counts_are_not_saved_and_not_rounded() -> None:
    assert run_on_ranks(not_saved, 1) == [[]]
