"""Groups of experts: the same bits, one order of collectives, communication under products."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
import torch.distributed as dist

from moe_parallel import ExpertParallelMoE, ExpertTopology, MoEConfig, Timeline
from moe_parallel.dispatch.all_to_all import LEAST_BYTES, MOST_WITH_ETP, AllToAllDispatcher
from moe_parallel.dispatch.copy_engine import COPIED_BYTES, CopyEngineDispatcher
from moe_parallel.dispatch.dispatcher import LocalDispatcher
from moe_parallel.dispatch.plan import GroupPlans
from moe_parallel.mesh import ExpertMesh
from moe_parallel.pipeline.groups import dispatch_positions, expert_groups, most_groups
from tests.moe_parallel.batch import ORDERS, groups_of
from tests.moe_parallel.layers import NUM_TOKENS, LayerResult, build, layer_on_rank, on_ranks
from tests.ranks import run_on_ranks

TOPOLOGIES = [
    ExpertTopology(1),
    ExpertTopology(2, ep=2),
    ExpertTopology(2, etp=2),
    ExpertTopology(4, ep=4),
    ExpertTopology(4, ep=2, etp=2),
    ExpertTopology(4, ep=2),
]


def config(num_groups: int | None, **changes: object) -> MoEConfig:
    sizes = {"hidden_size": 16, "ffn_size": 32, "num_experts": 16, "top_k": 2}
    return MoEConfig(**{**sizes, "overlap_groups": num_groups, **changes})


def assert_same_bits(topology: ExpertTopology, dtype: torch.dtype, skew: bool, **changes) -> None:
    num_local = 16 // topology.ep
    order = ORDERS["ragged" if skew else "shuffled"](NUM_TOKENS, topology.world_size)
    first, *others = (
        on_ranks(topology, order, config(groups, **changes), dtype, skew)
        for groups in sorted({1, 2, 3, num_local})
    )
    for other in others:
        for name, a, b in zip(LayerResult._fields, first, other):
            assert torch.equal(a, b), name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_any_number_of_groups_gives_the_same_bits(
    topology: ExpertTopology, dtype: torch.dtype
) -> None:
    assert_same_bits(topology, dtype, skew=False)


@pytest.mark.parametrize("top_k", [2, 3, 4])
@pytest.mark.parametrize("topology", TOPOLOGIES[3:5])
def test_likewise_with_drops_a_hot_expert_and_a_rank_without_tokens(
    topology: ExpertTopology, top_k: int
) -> None:
    assert_same_bits(topology, torch.float32, skew=True, top_k=top_k, capacity_factor=0.75)


def test_likewise_with_one_product_for_all_experts_of_a_group() -> None:
    assert_same_bits(TOPOLOGIES[4], torch.bfloat16, skew=False, gemm="grouped")


def logged_calls(num_groups: int, topology: ExpertTopology) -> list[tuple[str, int]]:
    """Rank function: every all-to-all of a step, as axis and size of its group."""
    groups = groups_of(topology)
    axes = {id(groups.ep): "ep", id(groups.etp): "etp"}
    calls = []
    exchange = dist.all_to_all_single

    def logging(received, sent, receive, send, *, group, async_op):
        assert async_op
        assert len(received) == sum(receive)
        assert len(sent) == sum(send)
        calls.append((axes[id(group)], group.size()))
        return exchange(received, sent, receive, send, group=group, async_op=async_op)

    with mock.patch.object(dist, "all_to_all_single", logging):
        order = ORDERS["ragged"](NUM_TOKENS, topology.world_size)
        layer_on_rank(topology, order, config(num_groups))
    return calls


@pytest.mark.parametrize("topology", TOPOLOGIES[1:])
def test_every_rank_starts_the_same_collectives_in_the_same_order(
    topology: ExpertTopology,
) -> None:
    first, *others = run_on_ranks(logged_calls, topology.world_size, 3, topology)
    assert all(calls == first for calls in others)
    axes = (topology.ep > 1) + (topology.etp > 1)
    assert len(first) == 3 * 2 * 2 * axes  # groups, there and back, forward and backward


def marks_on_rank(topology: ExpertTopology) -> tuple[list[str], str]:
    """Rank function: what a step queued, in order, and the drawing of it."""
    layer = build(config(4), torch.float64, False, groups=groups_of(topology).experts)
    timeline = Timeline()
    output, aux_loss, _ = layer(torch.randn(6, 16, dtype=torch.float64), timeline=timeline)
    (output.sum() + aux_loss).backward()
    return [f"{span.name} {span.group}" for span in timeline.spans], str(timeline)


def test_rows_of_the_next_groups_leave_before_a_group_is_computed() -> None:
    (marks, drawing), _ = run_on_ranks(marks_on_rank, 2, ExpertTopology(2, ep=2))
    assert marks == [
        *("dispatch 0", "experts 0", "dispatch 1", "dispatch 2", "combine 0"),
        *("dispatch 3", "experts 1", "combine 1"),
        *("experts 2", "combine 2"),
        *("experts 3", "combine 3"),
        # Weight gradients follow two groups behind: nobody waits for them.
        *("dispatch 0", "experts 0", "dispatch 1", "dispatch 2", "combine 0"),
        *("dispatch 3", "experts 1", "combine 1"),
        *("experts 2", "combine 2", "weights 0"),
        *("experts 3", "combine 3", "weights 1", "weights 2", "weights 3"),
    ]
    lanes = [line.split()[0] for line in drawing.splitlines()]
    assert lanes[:2] == ["ep", "compute"]
    assert all(f"{name[0].upper()} {name}" in drawing for name in ("dispatch", "weights"))


def test_etp_is_one_group_ahead_of_the_products_and_one_behind() -> None:
    (marks, _), *_ = run_on_ranks(marks_on_rank, 4, ExpertTopology(4, ep=2, etp=2))
    rounds = [
        ["dispatch 0"],
        ["dispatch 1"],
        ["dispatch 2", "all-gather 0"],
        ["dispatch 3", "all-gather 1", "experts 0", "scatter 0"],
        ["all-gather 2", "experts 1", "scatter 1", "combine 0"],
        ["all-gather 3", "experts 2", "scatter 2", "combine 1"],
        ["experts 3", "scatter 3", "combine 2"],
        ["combine 3"],
    ]
    forward = [mark for some in rounds for mark in some]
    for index, group in ((5, 0), (6, 1), (7, 2), (7, 3)):
        rounds[index].append(f"weights {group}")
    assert marks == [*forward, *(mark for some in rounds for mark in some)]


def test_nothing_is_marked_without_a_timeline() -> None:
    assert str(Timeline()) == "nothing ran"
    assert Timeline().spans == []


def test_groups_are_as_many_as_pay() -> None:
    mesh = ExpertMesh(0, 2, 0, 0, ((0, 1),))
    sent = AllToAllDispatcher(mesh, None, None).overlap_groups
    for num_bytes, groups in ((0, 1), (1, 1), (4 * LEAST_BYTES - 1, 3), (400 * LEAST_BYTES, 4)):
        assert sent(4, num_bytes) == groups
    copied = CopyEngineDispatcher(mesh, (), None).overlap_groups
    for num_bytes, groups in ((0, 1), (1, 1), (9 * COPIED_BYTES - 1, 2), (400 * COPIED_BYTES, 4)):
        assert copied(4, num_bytes) == groups
    assert LocalDispatcher().overlap_groups(4, 400 * LEAST_BYTES) == 1  # nothing travels
    etp = ExpertMesh(0, 2, 0, 0, ((0,), (1,)))
    sent = AllToAllDispatcher(etp, None, None).overlap_groups
    assert sent(4, 400 * LEAST_BYTES) == MOST_WITH_ETP
    assert sent(1, 400 * LEAST_BYTES) == 1
    assert CopyEngineDispatcher(etp, (), None).overlap_groups(4, 400 * LEAST_BYTES) == 4


@pytest.mark.parametrize("num_groups", [1, 2, 3, 4])
def test_groups_hold_every_expert_and_row_once(num_groups: int) -> None:
    mesh = ExpertMesh(0, 2, 0, 0, ((0, 1),))
    experts = expert_groups(4, num_groups)
    assert [e for group in experts for e in group] == list(range(4))
    plans = GroupPlans(lambda: [[*range(8)], [3] * 8], mesh, experts)
    assert len(plans) == num_groups
    assert sum(sum(plan.dispatch_rows) for plan in plans) == sum(range(8))


def test_the_first_and_the_last_group_are_half_as_large() -> None:
    assert [len(group) for group in expert_groups(16, 9)] == [1, *(2,) * 7, 1]
    assert [len(group) for group in expert_groups(16, 4)] == [3, 5, 5, 3]
    for num_local in range(1, 40):
        for num_groups in range(1, num_local + 1):
            groups = expert_groups(num_local, num_groups)
            assert len(groups) == num_groups
            assert all(groups)
            assert [e for group in groups for e in group] == list(range(num_local))


def test_small_products_are_cut_into_few_groups() -> None:
    assert most_groups(65536, 2048, 768) == 1  # Qwen3-30B, 8192 tokens
    assert most_groups(16384, 6144, 9216) == 5  # MiniMax-01, 8192 tokens
    assert most_groups(0, 6144, 9216) == 1


def test_experts_leave_group_by_group() -> None:
    groups = expert_groups(3, 2)
    assert groups == (range(0, 2), range(2, 3))
    # Experts 0 and 1 of the one rank, then of the other, then 2 of both.
    assert dispatch_positions(6, 2, groups) == [0, 1, 4, 2, 3, 5]
    assert dispatch_positions(6, 2, expert_groups(3, 1)) == list(range(6))


@pytest.mark.parametrize("num_groups", [0, 17, 1.5])
def test_refuses_groups_that_cannot_be(num_groups: object) -> None:
    with pytest.raises(ValueError, match="overlap_groups must be"):
        ExpertParallelMoE(config(num_groups))


def test_frozen_experts_get_no_gradient_and_rows_do() -> None:
    layer = build(config(2), torch.float64, False)
    layer.experts.requires_grad_(False)
    x = torch.randn(5, 16, dtype=torch.float64, requires_grad=True)
    layer(x).output.sum().backward()
    assert x.grad.any()
    assert layer.experts.w13.grad is None


@pytest.mark.multi_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("topology", [ExpertTopology(2, ep=2), ExpertTopology(2, etp=2)])
def test_two_gpus_give_the_same_bits_for_any_number_of_groups(
    topology: ExpertTopology, dtype: torch.dtype
) -> None:
    order = ORDERS["shuffled"](300, 2)
    first, *others = (
        on_ranks(topology, order, config(groups), dtype, backend="nccl") for groups in (1, 3, 8)
    )
    for other in others:
        for name, a, b in zip(LayerResult._fields, first, other):
            assert torch.equal(a, b), name
