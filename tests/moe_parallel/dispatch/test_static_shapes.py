"""Dropless calls of static shapes: the numbers of the oracle, and what is said of rows too many."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moe_parallel import (
    ExpertGroups,
    ExpertParallelMoE,
    ExpertTopology,
    MoEConfig,
    TokenOrder,
    check_max_rows,
)
from moe_parallel.dispatch.static_rows import (
    MostRows,
    check_static_mesh,
    fitting_rows,
    memory_rows,
)
from moe_parallel.experts import gemm
from moe_parallel.mesh import ExpertMesh, expert_mesh
from tests.closeness import assert_equal_to_rounding, assert_within_budget
from tests.moe_parallel.batch import ORDERS, groups_of, local_rows, random_batch
from tests.moe_parallel.dispatch.test_padding import host_reads
from tests.moe_parallel.layers import NUM_TOKENS, LayerResult, build, on_ranks, oracle
from tests.ranks import refusal, run_on_ranks

STATIC = MoEConfig(10, 12, 16, 4, aux_loss_coefficient=0.3, static_shapes=True)
EP2, TWO_BLOCKS = ExpertTopology(2, ep=2), ExpertTopology(4, ep=2)
GROUPED = MoEConfig(16, 16, 8, 2, static_shapes=True, gemm="grouped")


def test_example_of_the_module() -> None:
    kept, wanted = fitting_rows(torch.tensor([[3, 0], [2, 1]]), 2, 4)
    assert kept.tolist() == [[3, 0], [1, 1]]
    assert wanted.tolist() == [5, 1]


def test_the_most_rows_of_all_calls_are_kept() -> None:
    most = MostRows()
    for wanted in (None, torch.tensor([3, 9]), torch.tensor([5, 2]), None):
        most.note(wanted)
    assert most.value is not None
    assert most.value.tolist() == [5, 9]


@pytest.mark.parametrize("ep", [1, 2, 3, 6])
def test_kernels_count_what_fits_as_plain_torch(ep: int) -> None:
    pytest.importorskip("triton", reason="the kernels need triton, which has no wheel here")
    message = torch.randint(0, 9, (6, 20), device="cuda" if torch.cuda.is_available() else "cpu")
    assigned_RE = message[:, :18]
    for memory in (0, 1, 70, 1000):
        plain, kernels = (fitting_rows(assigned_RE, ep, memory, i) for i in ("eager", "triton"))
        assert torch.equal(plain.kept, kernels.kept)
        assert torch.equal(plain.wanted, kernels.wanted)
        assert (plain.kept == assigned_RE).all() == (memory == 1000)


@pytest.mark.parametrize("max_rows", [None, 116])  # one rank takes more than half of 29 x 4
@pytest.mark.parametrize("topology", [EP2, TWO_BLOCKS], ids=["ep 2", "2 x ep 2"])
def test_rows_that_fit_are_the_oracles(topology: ExpertTopology, max_rows: int | None) -> None:
    config = replace(STATIC, max_rows=max_rows)
    for order_name, skew in (("ragged", False), ("shuffled", True)):
        order = ORDERS[order_name](NUM_TOKENS, topology.world_size)
        actual = on_ranks(topology, order, config, torch.float64, skew)
        for name, got, expected in zip(LayerResult._fields, actual, oracle(config, skew=skew)):
            assert_equal_to_rounding(got, expected, what=name)


def test_copies_bring_the_same_bits() -> None:
    order = ORDERS["zigzag"](NUM_TOKENS, 2)
    sent, copied = (on_ranks(EP2, order, STATIC, copied=copied) for copied in (False, True))
    for one, other in zip(sent, copied):
        assert torch.equal(one, other)


@pytest.mark.parametrize("impl", ["eager", "triton"])
def test_bits_are_those_of_calls_that_count_on_the_host(impl: str) -> None:
    if impl == "triton":
        pytest.importorskip("triton", reason="the kernels need triton, which has no wheel here")
    config = replace(GROUPED, impl=impl)
    counted = replace(config, static_shapes=False, send="tokens")
    for order in (ORDERS["zigzag"](NUM_TOKENS, 2), TokenOrder.contiguous([15, 15])):
        results = [on_ranks(EP2, order, c, torch.float32) for c in (config, counted)]
        for name, one, other in zip(LayerResult._fields, *results):
            assert torch.equal(one, other), name


# ---- more rows than fit ------------------------------------------------------------------------


def fits(experts: list[list[list[int]]], num_local: int, max_rows: int) -> list[Tensor]:
    """For each rank of one block which assignments fit: the first rows of each expert's rank."""
    kept = [torch.ones(len(of_rank), STATIC.top_k, dtype=torch.bool) for of_rank in experts]
    for ep in range(len(experts)):
        taken = 0
        for expert in range(ep * num_local, (ep + 1) * num_local):
            for rank, tokens in enumerate(experts):
                for token, chosen in enumerate(tokens):
                    for slot, e in enumerate(chosen):
                        if e == expert:
                            kept[rank][token, slot] = taken < max_rows
                            taken += 1
    return kept


def weighted(layer: ExpertParallelMoE, x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
    """Every expert on every token, by weight."""
    of_experts = x.new_zeros(len(x), layer.config.num_experts).scatter(1, experts, weights)
    gate, up = torch.einsum("tm,ecfm->ctef", x, layer.experts.w13)
    act = torch.nn.functional.silu(gate) * up
    return torch.einsum("tef,emf,te->tm", act, layer.experts.w2, of_experts)


def overflowing(config: MoEConfig, topology: ExpertTopology) -> dict[str, Any]:
    """Rank function: a call that drops, and the same by hand on the tokens of this rank."""
    block = topology.ep
    layer = build(config, torch.float64, True, groups=groups_of(topology).experts)
    # All ranks' experts as on one rank.
    whole = build(replace(config, static_shapes=False, max_rows=None), torch.float64, True)
    order, batch = ORDERS["zigzag"](NUM_TOKENS, topology.world_size), random_batch(NUM_TOKENS, 10)
    rank = layer.mesh.token_rank
    x = local_rows(batch.x, order, rank, padding=torch.nan).requires_grad_()
    grad = local_rows(batch.grad, order, rank, padding=torch.nan)
    result = layer(x, token_order=order)
    result.output.backward(grad)
    tokens, grad = order.take(x.detach(), rank), order.take(grad, rank)
    routing = layer.gate(tokens, order)
    chosen: list[Any] = [None] * topology.world_size
    dist.all_gather_object(chosen, routing.experts.tolist())
    first = rank // block * block
    kept = fits(chosen[first : first + block], 16 // block, config.max_rows or 0)[rank % block]
    mine = tokens.requires_grad_()
    weights = whole.gate(mine, TokenOrder.contiguous([len(mine)])).weights
    expected = weighted(whole, mine, routing.experts, weights * kept)
    expected.backward(grad)
    gate_grad = layer.gate.weight.grad
    said = refusal(check_max_rows, layer)
    check_max_rows(layer)  # asked for those since
    return {
        "got": [*(order.take(t, rank) for t in (result.output.detach(), x.grad)), gate_grad],
        "expected": [expected.detach(), mine.grad, whole.gate.weight.grad],
        "experts": [layer.experts.w13.grad, layer.experts.w2.grad],
        "whole": [whole.experts.w13.grad, whole.experts.w2.grad],
        "dropped": (result.stats.dropped, (~kept).sum()),
        "said": said,
    }


@pytest.mark.parametrize("topology", [EP2, TWO_BLOCKS], ids=["ep 2", "2 x ep 2"])
def test_rows_that_do_not_fit_are_dropped_and_counted(topology: ExpertTopology) -> None:
    ranks = topology.world_size
    config = replace(STATIC, max_rows=60 * 2 // ranks, aux_loss_coefficient=0.0)
    parts = run_on_ranks(overflowing, ranks, config, topology)
    for part in parts:
        for got, expected in zip(part["got"], part["expected"]):
            assert_equal_to_rounding(got, expected)
    for i in range(2):
        whole = sum(part["whole"][i] for part in parts)
        halves = [sum(p["experts"][i] for p in parts[ep :: topology.ep]) for ep in range(2)]
        assert_equal_to_rounding(torch.cat(halves), whole)
    dropped = sum(int(part["dropped"][1]) for part in parts)
    assert dropped
    for part in parts:
        assert part["dropped"][0].sum() == dropped
        assert part["said"] == parts[0]["said"]
        assert "max_rows must be at least" in part["said"]
        assert f"got {config.max_rows}: assignments were dropped" in part["said"]


def test_kernels_drop_as_plain_torch() -> None:
    pytest.importorskip("triton", reason="the kernels need triton, which has no wheel here")
    config, order = replace(GROUPED, max_rows=30), ORDERS["zigzag"](NUM_TOKENS, 2)
    exact = on_ranks(EP2, order, replace(config, gemm="auto"), torch.float64, True)
    kernels, plain = (
        on_ranks(EP2, order, replace(config, impl=impl), torch.float32, True)
        for impl in ("triton", "eager")
    )
    for name, got, near, wanted in zip(LayerResult._fields, kernels, plain, exact):
        assert_within_budget(got, wanted, near, what=name)


# ---- the host ----------------------------------------------------------------------------------


@pytest.mark.parametrize("max_rows", [None, 20])
@pytest.mark.parametrize("ep", [1, 2])
def test_nothing_is_read_on_the_host(ep: int, max_rows: int | None) -> None:
    config = replace(GROUPED, hidden_size=16, ffn_size=8, max_rows=max_rows, impl="eager")
    reads = run_on_ranks(host_reads, 2, ExpertTopology(2, ep=ep), config, torch.float32)
    assert reads == [0, 0]


def test_large_experts_need_no_counts_either(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose weight gradients otherwise are one product each, for which the host must count."""
    monkeypatch.setattr(gemm, "IN_PLACE", 1)
    x = torch.randn(24, 16).requires_grad_()
    found = []
    for config in (GROUPED, replace(GROUPED, static_shapes=False)):
        layer = build(config, torch.float32, False)
        with monkeypatch.context() as patched:
            if config.static_shapes:
                patched.setattr(Tensor, "tolist", None)
            found.append(torch.autograd.grad(layer(x).output.sum(), layer.parameters()))
    for one, other in zip(*found):
        torch.testing.assert_close(one, other)


# ---- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [("capacity_factor", 1.0), ("overlap_groups", 2), ("send", "assignments"), ("gemm", "loop")],
)
def test_refuses_what_depends_on_the_routing(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name} must be one of .* with static_shapes, got"):
        replace(STATIC, **{name: value})


def test_refuses_fewer_rows_than_come_anyhow() -> None:
    layer = build(replace(STATIC, max_rows=39), torch.float64, False)
    assert layer(torch.zeros(9, 10).double()).output.shape == (9, 10)
    with pytest.raises(ValueError, match=r"max_rows must be at least 40, 4 for each of 10 tokens"):
        layer(torch.zeros(10, 10).double())


def refused_on_ranks() -> list[str]:
    """Rank function: too few rows, before anything is routed; no order; ETP."""
    groups, order = groups_of(EP2).experts, TokenOrder.contiguous([5, 5])
    few = ExpertParallelMoE(replace(STATIC, max_rows=19), groups=groups)
    few.gate.register_forward_pre_hook(lambda *_: pytest.fail("routed"))
    x = torch.zeros(5, 10)
    said = [refusal(few, x, token_order=order), refusal(few, x)]
    etp = groups_of(ExpertTopology(2, etp=2)).experts
    return [*said, refusal(ExpertParallelMoE, STATIC, groups=etp)]


def test_ranks_refuse_alike() -> None:
    for few, order, etp in run_on_ranks(refused_on_ranks, 2):
        assert few.startswith("max_rows must be at least 20, 4 for each of 10 tokens over 2 EP")
        assert order.startswith("token_order must be given with static_shapes")
        assert etp.startswith("static_shapes must be False with ETP")


def test_refuses_blocks_that_are_not_consecutive() -> None:
    """Every rank counts what the others drop, block by block."""
    check_static_mesh(ExpertMesh(2, 4, 0, 0, ((2, 3),)))
    for rank, sources in ((0, (0, 2)), (1, (1, 2))):
        with pytest.raises(ValueError, match=r"groups\.ep must be consecutive ranks"):
            check_static_mesh(ExpertMesh(rank, 4, 0, 0, (sources,)))


def test_one_rank_drops_and_notes_nothing() -> None:
    """So a StepGraph, which is of one rank, leaves none of its rows to a check when it warms up."""
    order = TokenOrder.contiguous([6])
    for max_rows in (12, 100, None):
        config = MoEConfig(16, 8, 4, 2, static_shapes=True, max_rows=max_rows)
        assert not memory_rows(config, expert_mesh(ExpertGroups()), order)[1]


@pytest.mark.parametrize("model", [None, [torch.nn.Linear(2, 2)]])
def test_what_is_no_module_has_no_rows(model: object) -> None:
    with pytest.raises(ValueError, match="model must be of type Module"):
        check_max_rows(model)
