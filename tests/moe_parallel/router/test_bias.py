"""Biases of experts: moved against the load of all ranks, once a micro-batch, and kept float32."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moe_parallel import (
    ExpertParallelMoE,
    ExpertTopology,
    RouterConfig,
    TokenOrder,
    update_expert_bias,
)
from tests.moe_parallel.batch import ORDERS, groups_of, local_rows, random_batch
from tests.moe_parallel.router.test_routers import (
    BIAS,
    EXPERTS,
    HIDDEN,
    NUM_TOKENS,
    config_of,
    layer_of,
)
from tests.ranks import run_on_ranks


def biases_on_rank(order: TokenOrder, how: str, rate: float) -> tuple[Tensor, Tensor]:
    """The bias before and after two micro-batches, and an evaluation, and two updates."""
    groups = groups_of(ExpertTopology(dist.get_world_size())).experts
    layer = layer_of(config_of(RouterConfig("sigmoid", expert_bias=True)), groups=groups)
    rank, x = dist.get_rank(), random_batch(NUM_TOKENS, HIDDEN).x
    rows = local_rows(x, order, rank, padding=torch.nan).requires_grad_()

    def output(rows: Tensor) -> Tensor:
        return layer(rows, token_order=order).output

    assigned = layer(rows, token_order=order).stats.assigned  # no backward: it does not count
    for _ in range(2):
        out = output(rows)
        if how != "plain":
            out = checkpoint(output, rows, use_reentrant=how == "reentrant")
        out[[segment.offset for segment in order.segments[rank]]].sum().backward()
    layer.eval()(rows, token_order=order).output.nan_to_num().sum().backward()
    before = layer.gate.expert_bias.clone()
    update_expert_bias(layer, rate)
    expected = before - rate * (2 * assigned * EXPERTS - 2 * assigned.sum()).sign()
    after = layer.gate.expert_bias.clone()
    update_expert_bias(layer, rate)  # nothing was counted since
    assert torch.equal(layer.gate.expert_bias, after)
    return after, expected


@pytest.mark.parametrize("how", ["plain", "reentrant", "not reentrant"])
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_biases_move_against_the_load_of_all_ranks(num_ranks: int, how: str) -> None:
    order = ORDERS["zigzag"](NUM_TOKENS, num_ranks)
    results = run_on_ranks(biases_on_rank, num_ranks, order, how, 0.25)
    for after, expected in results:
        assert torch.equal(after, expected)
        assert torch.equal(after, results[0][0])


def test_biases_stay_float32_and_are_saved() -> None:
    layer = layer_of(config_of(RouterConfig("sigmoid", expert_bias=True))).bfloat16()
    assert layer.gate.expert_bias.dtype == torch.float32
    assert layer.gate.local_tokens_per_expert.dtype == torch.int64
    assert torch.equal(layer.gate.expert_bias, torch.tensor(BIAS))
    assert torch.equal(layer.state_dict()["gate.expert_bias"], torch.tensor(BIAS))
    on_meta = ExpertParallelMoE(layer.config, device="meta").to_empty(device="cpu")
    assert not on_meta.gate.expert_bias.any()
    with pytest.raises(ValueError, match="must have a router with a bias"):
        update_expert_bias(ExpertParallelMoE(config_of(RouterConfig())))
