"""A token that is not finite spoils its own output: no other token's, nor gradients to others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moe_parallel import ExpertParallelMoE, ExpertTopology, MoEConfig
from tests.ranks import run_on_ranks

BAD = 3  # of rank 0


def outputs_and_gradients(ep: int, drops: dict[str, Any]) -> list[list[Tensor]]:
    """Results for this rank's tokens: all finite, then with one NaN, then with one infinite."""
    config = MoEConfig(16, 8, 4, 2, aux_loss_coefficient=0.0, **drops)
    groups = ExpertTopology(2, ep=ep).build_groups().experts
    layer = ExpertParallelMoE(config, groups=groups)
    others = torch.ones(12, dtype=torch.bool)
    others[BAD] = dist.get_rank() != 0
    results = []
    for value in (0.0, float("nan"), float("inf")):
        hidden = torch.randn(12, 16, generator=torch.Generator().manual_seed(dist.get_rank()))
        if dist.get_rank() == 0:
            hidden[BAD, 2] = value
        hidden.requires_grad_()
        output = layer(hidden).output
        (gradient,) = torch.autograd.grad(output[others].square().sum(), hidden)
        results.append([output[others].detach(), gradient[others]])
        if dist.get_rank() == 0:
            assert bool(output[BAD].isfinite().all()) == (value == 0.0)
    return results


# Nothing is dropped: who takes the bad token's place is not the question.
@pytest.mark.parametrize(
    "drops",
    [
        {},
        {"capacity_factor": 2.0},
        {"capacity_factor": 2.0, "drop_policy": "probability"},
    ],
    ids=["dropless", "position", "probability"],
)
def test_other_tokens_do_not_notice(drops: dict[str, Any]) -> None:
    for clean, *bad in run_on_ranks(outputs_and_gradients, 2, 2, drops):
        for spoiled in bad:
            for expected, actual in zip(clean, spoiled, strict=True):
                assert torch.equal(actual, expected)
