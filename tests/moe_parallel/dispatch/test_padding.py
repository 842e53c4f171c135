"""Padding to capacity: the same numbers in static shapes, and nothing read on the host."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moe_parallel import (
    ExpertParallelMoE,
    ExpertTopology,
    MoEConfig,
    RouterConfig,
    TokenOrder,
)
from moe_parallel.dispatch.padding import padded_order
from moe_parallel.reference import reference_moe
from tests.closeness import assert_equal_to_rounding, assert_within_budget
from tests.moe_parallel.batch import ORDERS, assemble_expert, groups_of, local_rows, random_batch
from tests.moe_parallel.layers import NUM_TOKENS, build, layer_on_rank
from tests.ranks import run_on_ranks

PADDED = MoEConfig(
    10, 12, 8, 2, capacity_factor=0.75, aux_loss_coefficient=0.3, pad_to_capacity=True
)


def test_example_of_the_module() -> None:
    experts, number = torch.tensor([[0], [1], [0], [0]]), torch.tensor([[0], [0], [1], [2]])
    order = padded_order(experts, number, capacity=2, num_experts=2)
    assert order.row.flatten().tolist() == [0, 2, 1, -1]
    assert order.assignment.tolist() == [0, 2, 1, -1]


def one_rank(config: MoEConfig, dtype: torch.dtype, skew: bool) -> list[Tensor]:
    layer = build(config, dtype, skew)
    batch = random_batch(NUM_TOKENS, 10)
    x = batch.x.to(dtype).requires_grad_()
    result = layer(x)
    torch.autograd.backward([result.output, result.aux_loss], [batch.grad.to(dtype), None])
    grads = [x.grad, *(parameter.grad for parameter in layer.parameters())]
    return [result.output.detach(), result.aux_loss.detach(), *grads, *result.stats]


@pytest.mark.parametrize("skew", [False, True])
@pytest.mark.parametrize("groups", [1, 3])
def test_one_rank_drops_and_computes_as_without_padding(groups: int, skew: bool) -> None:
    expected = one_rank(replace(PADDED, pad_to_capacity=False), torch.float64, skew)
    assert expected[-1].any()  # some are dropped
    padded = one_rank(replace(PADDED, overlap_groups=groups), torch.float64, skew)
    for actual, wanted in zip(padded, expected, strict=True):
        assert_equal_to_rounding(actual, wanted)


def test_kernels_leave_no_row_unwritten() -> None:
    pytest.importorskip("triton", reason="the kernels need triton, which has no wheel here")
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)  # new memory is NaN
    try:
        kernels = one_rank(replace(PADDED, impl="triton"), torch.float32, True)
    finally:
        torch.use_deterministic_algorithms(False)
    honest = one_rank(PADDED, torch.float32, True)
    exact = one_rank(PADDED, torch.float64, True)
    for actual, eager, wanted in zip(kernels[:-2], honest, exact):
        assert_within_budget(actual, wanted, eager)


def by_rank(order: TokenOrder) -> list[Tensor]:
    """Output and gradients of experts: the oracle on each rank's tokens alone."""
    layer, batch = build(PADDED, torch.float64, False), random_batch(NUM_TOKENS, 10)
    weights = [w.detach().requires_grad_() for w in layer.parameters()]
    outputs = []
    capacity = -(-0.75 * order.max_local_tokens * 2 // 8)
    for rank in range(order.num_ranks):
        x = local_rows(batch.x, order, rank, padding=torch.nan)
        factor = capacity * 8 / (2 * len(x)) if len(x) else 1.0
        result = reference_moe(x, *weights, top_k=2, capacity_factor=factor * (1 - 1e-12))
        if len(x):
            result.output.backward(local_rows(batch.grad, order, rank, padding=torch.nan))
        outputs.append(result.output.detach())
    return [torch.cat(outputs), *(w.grad for w in weights[1:])]


@pytest.mark.parametrize(
    "topology", [ExpertTopology(2, ep=2), ExpertTopology(4, ep=2, etp=2), ExpertTopology(4, ep=2)]
)
def test_every_rank_drops_by_itself(topology: ExpertTopology) -> None:
    order = ORDERS["ragged"](NUM_TOKENS, topology.world_size)  # rank 0 has no token
    config = replace(PADDED, overlap_groups=3)
    parts = run_on_ranks(layer_on_rank, topology.world_size, topology, order, config)
    actual = [torch.cat([part.output for part in parts])]
    for name in ("w13", "w2"):
        actual.append(assemble_expert([getattr(part, name) for part in parts], name, topology))
    for tensor, expected in zip(actual, by_rank(order), strict=True):
        assert_equal_to_rounding(tensor, expected)


def host_reads(
    topology: ExpertTopology, config: MoEConfig, dtype: torch.dtype = torch.float64
) -> int:
    """Rank function: how often a call, forward and backward, reads a tensor on the host."""
    layer = build(config, dtype, False, groups=groups_of(topology).experts)
    order = TokenOrder.contiguous([8] * topology.world_size)
    x = random_batch(8, config.hidden_size).x.to(dtype)
    layer(x, token_order=order).output.sum().backward()  # the ranks compare the order once
    reads = []
    for name in ("tolist", "item", "__bool__", "__int__", "__float__", "__index__"):
        true = getattr(Tensor, name)
        reads.append(
            patch.object(Tensor, name, lambda self, true=true: counted.append(1) or true(self))
        )
    counted: list[int] = []
    for patched in reads:
        patched.start()
    try:
        layer(x, token_order=order).output.sum().backward()
    finally:
        for patched in reads:
            patched.stop()
    return len(counted)


def test_padding_reads_nothing_on_the_host() -> None:
    topology = ExpertTopology(2, ep=2)
    assert run_on_ranks(host_reads, 2, topology, PADDED) == [0, 0]
    assert run_on_ranks(host_reads, 2, topology, replace(PADDED, pad_to_capacity=False)) == [1, 1]


def test_capacity_is_for_training_alone() -> None:
    layer = build(PADDED, torch.float64, True)
    x = random_batch(NUM_TOKENS, 10).x
    assert layer(x).stats.dropped.any()
    assert not layer.eval()(x).stats.dropped.any()


def test_refuses_what_has_no_size() -> None:
    for changes in ({"capacity_factor": None}, {"drop_policy": "probability"}):
        with pytest.raises(ValueError, match="pad_to_capacity needs a capacity_factor"):
            replace(PADDED, **changes)


def without_order() -> None:
    layer = ExpertParallelMoE(PADDED, groups=groups_of(ExpertTopology(2, ep=2)).experts)
    with pytest.raises(ValueError, match="token_order must be given with pad_to_capacity"):
        layer(torch.zeros(3, 10))
    dist.barrier()  # no rank is left waiting


def test_padding_needs_an_order() -> None:
    run_on_ranks(without_order, 2)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "options",
    [
        {"capacity_factor": 1.0, "pad_to_capacity": True},
        {"gemm": "grouped"},  # without drops, on one rank
        {"gemm": "grouped", "router": RouterConfig("sigmoid", expert_bias=True)},
    ],
    ids=str,
)
def test_a_cuda_graph_captures_forward_and_backward(options: dict[str, Any]) -> None:
    config = MoEConfig(32, 64, 8, 2, **options)
    layer = ExpertParallelMoE(config, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(64, 32, device="cuda", dtype=torch.bfloat16)
    order = TokenOrder.contiguous([64])

    def step() -> list[Tensor]:
        output = layer(x, token_order=order).output
        return [output, *torch.autograd.grad(output.float().sum(), layer.experts.parameters())]

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    x.copy_(torch.randn_like(x))
    graph.replay()
    for replayed, expected in zip(captured, step()):
        assert torch.equal(replayed, expected)
