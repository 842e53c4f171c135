"""Routing that is anything but even: right results, and a limit where memory would not do."""

from __future__ import annotations

import pytest
import torch

from moe_parallel import ExpertParallelMoE, ExpertTopology, MoEConfig, TokenOrder
from tests.closeness import assert_equal_to_rounding
from tests.moe_parallel.batch import groups_of
from tests.ranks import refusal, run_on_ranks

EXPERTS, HIDDEN = 8, 12
TOPOLOGIES = [ExpertTopology(4, ep=4), ExpertTopology(4, ep=2, etp=2), ExpertTopology(4, ep=2)]


def balanced(token: int, slot: int) -> int:
    return (2 * token + slot) % EXPERTS


# Workloads: the experts of a token by its number in the batch, and tokens of each rank.
WORKLOADS = {
    "balanced": (balanced, (8, 8, 8, 8)),
    "one hot expert": (lambda t, s: 3 if s == 0 else t % 3, (8, 8, 8, 8)),
    "hot rank": (lambda t, s: (t + s) % 2, (8, 8, 8, 8)),
    "hot experts on all ranks": (lambda t, s: 7 if s else 2 * (t % 4), (8, 8, 8, 8)),
    "ragged sources": (balanced, (1, 0, 29, 2)),
    "a rank whose experts nobody picks": (lambda t, s: (t + s) % 6, (8, 8, 8, 8)),
    "all tokens on one rank": (balanced, (0, 0, 32, 0)),
    "burst": (lambda t, s: s if 10 <= t < 26 else balanced(t, s), (8, 8, 8, 8)),
    "nothing": (balanced, (0, 0, 0, 0)),
}


def planted(name: str, config: MoEConfig) -> torch.Tensor:
    """All tokens; their first features say which experts they choose."""
    choose, tokens = WORKLOADS[name]
    x = torch.randn(sum(tokens), HIDDEN, dtype=torch.float64)
    x[:, :EXPERTS] *= 0.01
    for token in range(sum(tokens)):
        for slot in range(config.top_k):
            x[token, choose(token, slot)] = 5.0 - slot
    return x


def layer_of(config: MoEConfig, **kwargs: object) -> ExpertParallelMoE:
    layer = ExpertParallelMoE(config, seed=2, dtype=torch.float64, **kwargs)
    with torch.no_grad():
        layer.gate.weight.zero_()
        layer.gate.weight[:, :EXPERTS] = torch.eye(EXPERTS, dtype=torch.float64)
    return layer


def on_rank(name: str, config: MoEConfig, topology: ExpertTopology) -> bool:
    """Rank function: output and input gradient are those of one rank that holds all tokens."""
    torch.manual_seed(0)
    x, tokens = planted(name, config), WORKLOADS[name][1]
    layer = layer_of(config, groups=groups_of(topology).experts)
    alone = layer_of(config)
    whole = x.clone().requires_grad_()
    expected = alone(whole).output
    grad = torch.randn_like(expected)
    (expected_grad,) = torch.autograd.grad(expected, whole, grad)
    first = sum(tokens[: layer.mesh.token_rank])
    own = slice(first, first + tokens[layer.mesh.token_rank])
    mine = x[own].clone().requires_grad_()
    output = layer(mine, token_order=TokenOrder.contiguous(tokens)).output
    (actual_grad,) = torch.autograd.grad(output, mine, grad[own])
    assert_equal_to_rounding(output, expected[own])
    assert_equal_to_rounding(actual_grad, expected_grad[own])
    return True


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("name", WORKLOADS)
def test_any_workload_is_that_of_one_rank(name: str, topology: ExpertTopology, groups: int) -> None:
    config = MoEConfig(HIDDEN, 8, EXPERTS, 2, overlap_groups=groups)
    assert all(run_on_ranks(on_rank, 4, name, config, topology))


def limited_on_rank(max_rows: int, topology: ExpertTopology) -> str:
    """Rank function: what the layer says of a hot rank; then a barrier: nobody hangs."""
    torch.manual_seed(0)
    config = MoEConfig(HIDDEN, 8, EXPERTS, 2, max_rows=max_rows)
    layer = layer_of(config, groups=groups_of(topology).experts)
    mine = planted("hot rank", config).chunk(4)[layer.mesh.token_rank]
    try:
        layer(mine)
        said = ""
    except ValueError as error:
        said = str(error)
    torch.distributed.barrier()
    return said


@pytest.mark.parametrize("topology", TOPOLOGIES[:2])
def test_a_limit_raises_on_every_rank_before_rows_travel(topology: ExpertTopology) -> None:
    assert run_on_ranks(limited_on_rank, 4, 64, topology) == [""] * 4  # all of them on EP rank 0
    for said in run_on_ranks(limited_on_rank, 4, 63, topology):
        assert said.startswith("max_rows must be at least the rows that the experts of EP rank 0")
        assert "got 63 for 64" in said


def test_refuses_sizes_that_do_not_divide_or_are_none() -> None:
    for said in run_on_ranks(refusal, 3, uneven_on_rank):
        assert said.startswith("num_experts must divide over the ep group, got 8")
    with pytest.raises(ValueError, match="max_rows must be an integer >= 1, got 0"):
        MoEConfig(HIDDEN, 8, EXPERTS, 2, max_rows=0)
    with pytest.raises(ValueError, match="capacity_factor must be a finite number > 0"):
        MoEConfig(HIDDEN, 8, EXPERTS, 2, capacity_factor=0.0)


def uneven_on_rank() -> None:
    layer_of(MoEConfig(HIDDEN, 8, EXPERTS, 2), groups=groups_of(ExpertTopology(3, ep=3)).experts)


@pytest.mark.parametrize("top_k", [2, 3, 4])
def test_a_capacity_of_one_keeps_one_token_an_expert(top_k: int) -> None:
    config = MoEConfig(HIDDEN, 8, EXPERTS, top_k, capacity_factor=1e-9)
    stats = layer_of(config)(planted("balanced", config)).stats
    assert (stats.assigned - stats.dropped).max() == 1
