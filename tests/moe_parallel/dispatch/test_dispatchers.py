"""Dispatchers bring rows to their experts and back."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from itertools import accumulate
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from moe_parallel import ExpertTopology, MoEConfig
from moe_parallel.dispatch import make_dispatcher, planned
from moe_parallel.dispatch.dispatcher import Dispatch
from moe_parallel.dispatch.plan import plan_exchange
from moe_parallel.mesh import ExpertMesh, expert_mesh
from moe_parallel.pipeline.pipeline import Pipeline
from tests.closeness import assert_equal_to_rounding
from tests.moe_parallel.batch import ORDERS, Replicated, Summed, groups_of
from tests.moe_parallel.host_memory import memory_of
from tests.moe_parallel.layers import LayerResult, on_ranks, oracle
from tests.ranks import run_on_ranks

Counts = list[list[int]]

# rows of (rank, expert): four experts on up to four ranks
CASES: dict[str, Counts] = {
    "uneven": [[3, 0, 1, 2], [0, 4, 1, 0], [2, 2, 0, 5], [1, 0, 3, 1]],
    "rank without rows": [[0, 0, 0, 0], [1, 2, 0, 3], [0, 1, 0, 0], [0, 0, 0, 2]],
    "expert without rows": [[2, 0, 1, 0], [1, 0, 4, 0], [3, 0, 0, 0], [1, 0, 2, 0]],
    "one hot expert": [[9, 0, 0, 0], [7, 0, 0, 0], [0, 0, 0, 0], [5, 0, 0, 0]],
    "nothing": [[0, 0, 0, 0]] * 4,
}
MESHES = [
    ExpertTopology(2),
    ExpertTopology(2, ep=2),
    ExpertTopology(2, etp=2),
    ExpertTopology(4, ep=2, etp=2),
    ExpertTopology(4, ep=4),
    ExpertTopology(4, ep=2),
    ExpertTopology(4, pp=2, ep=2),
]


def labelled(counts: Counts, rank: int) -> Tensor:
    """A rank's rows grouped by expert, each (rank, expert, number)."""
    rows = [(rank, e, i) for e, count in enumerate(counts[rank]) for i in range(count)]
    return torch.tensor(rows, dtype=torch.float64).reshape(-1, 3)


def start(
    topology: ExpertTopology, counts: Counts, copied: bool = False, on_device: bool = False
) -> Dispatch:
    """A call with all experts in one group, which sends these rows."""
    groups = groups_of(topology).experts
    mesh = expert_mesh(groups)
    dispatcher = make_dispatcher(mesh, groups, memory_of(groups) if copied else None)
    everybody, rows = (range(len(counts[0]) // mesh.ep_size),), max(map(sum, counts))
    like = torch.empty(0, 3, dtype=torch.float64)
    kept = torch.tensor(counts) if on_device else None
    return dispatcher.start_call(lambda: counts, everybody, most_rows=rows, like=like, kept=kept)


def there_and_back(
    topology: ExpertTopology, counts: Counts, copied: bool, on_device: bool = False
) -> dict[str, object]:
    mesh = expert_mesh(groups_of(topology).experts)
    stage = counts[: mesh.num_token_ranks]
    dispatch, found = start(topology, stage, copied, on_device), []
    sent = labelled(stage, mesh.token_rank)

    def compute(g: int, rows: Tensor) -> Tensor:
        found.append((rows.clone(), dispatch.expert_rows(g)))
        return rows

    assert torch.equal(Pipeline(dispatch).run(sent, compute), sent * mesh.etp_size)
    ((by_expert, expert_rows),) = found
    ends = dispatch.expert_ends(0)
    assert ends is not None or not on_device
    assert ends is None or ends.tolist() == [*accumulate(expert_rows)]
    again = dispatch.by_expert(0, dispatch.by_arrival(0, by_expert))
    assert torch.equal(again, by_expert)
    return {"rows": by_expert, "expert_rows": expert_rows, "mesh": mesh}


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("topology", MESHES)
def test_rows_reach_their_experts_in_order_and_come_back(
    topology: ExpertTopology, case: str, copied: bool
) -> None:
    check_order(there_and_back, topology, CASES[case], copied)


def many_chunks_there_and_back(*args: Any) -> dict[str, object]:
    """As if every group had many: one gather brings rows into order."""
    with mock.patch.object(planned, "MANY_CHUNKS", 2):
        return there_and_back(*args)


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("case", ["uneven", "one hot expert"])
@pytest.mark.parametrize("topology", [MESHES[2], MESHES[3], MESHES[5]])
def test_many_chunks_are_ordered_on_the_device(
    topology: ExpertTopology, case: str, copied: bool, on_device: bool
) -> None:
    check_order(many_chunks_there_and_back, topology, CASES[case], copied, on_device)


def check_order(
    function: Callable[..., Any], topology: ExpertTopology, counts: Counts, *how: bool
) -> None:
    for part in run_on_ranks(function, topology.world_size, topology, counts, *how):
        mesh: ExpertMesh = part["mesh"]
        local = range(4 // mesh.ep_size * mesh.ep_rank, 4 // mesh.ep_size * (mesh.ep_rank + 1))
        expected = [
            (rank, expert, number)
            for expert in local
            for ranks in mesh.token_ranks
            for rank in ranks
            for number in range(counts[rank][expert])
        ]
        assert part["rows"].tolist() == [list(row) for row in expected]
        assert part["expert_rows"] == tuple(
            sum(counts[rank][expert] for ranks in mesh.token_ranks for rank in ranks)
            for expert in local
        )


class Scaled(torch.autograd.Function):
    """What the experts do, in small: another factor for every expert and ETP part."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, dispatch: Dispatch, etp_rank: int) -> Tensor:
        ctx.dispatch, ctx.etp_rank = dispatch, etp_rank

        def compute(g: int, rows: Tensor) -> Tensor:
            counts = torch.tensor(dispatch.expert_rows(g))
            factors = torch.arange(len(counts)) + 1.0 + 10 * etp_rank
            return rows * factors.repeat_interleave(counts).unsqueeze(1)

        return Pipeline(dispatch).run(rows, compute)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return Scaled.apply(grad.contiguous(), ctx.dispatch, ctx.etp_rank), None, None


def stages_gradcheck(topology: ExpertTopology, counts: Counts) -> bool:
    """Every rank perturbs the same element: a function of all ranks' rows, held by all ranks."""
    mesh = expert_mesh(groups_of(topology).experts)
    sizes = [sum(row) for row in counts]

    def function(rows: Tensor) -> Tensor:
        mine = Replicated.apply(rows).split(sizes)[mesh.token_rank]
        back = Scaled.apply(mine, start(topology, counts), mesh.etp_rank)
        parts = [back.new_zeros(size, back.shape[1]) for size in sizes]
        parts[mesh.token_rank] = back
        return Summed.apply(torch.cat(parts))

    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(sum(sizes), 2, dtype=torch.float64, generator=generator)
    return torch.autograd.gradcheck(function, rows.requires_grad_())


@pytest.mark.parametrize(
    "topology", [ExpertTopology(2, ep=2), ExpertTopology(2, etp=2), ExpertTopology(2)]
)
def test_gradcheck_in_lockstep(topology: ExpertTopology) -> None:
    counts = [[2, 0, 1, 1], [0, 0, 3, 1]]
    assert all(run_on_ranks(stages_gradcheck, 2, topology, counts))


def etp_sum(dtype: torch.dtype) -> Tensor:
    topology = ExpertTopology(4, etp=4)
    mesh = expert_mesh(groups_of(topology).experts)
    etp = start(topology, [[1]] * 4).etp
    term = [256.0, 1.0, 1.0, 1.0][mesh.etp_rank]
    transfer = etp.scatter(0, torch.full((4, 1), term, dtype=dtype))
    transfer.wait(None)
    return etp.add_up(0, transfer.rows)


def test_partial_sums_in_bfloat16_are_rounded_once() -> None:
    # In bfloat16 256 + 1 rounds to 256, so adding one by one gives 256; 259 rounds to 260.
    assert [part.item() for part in run_on_ranks(etp_sum, 4, torch.bfloat16)] == [260.0] * 4


def test_plan_conserves_rows() -> None:
    dice = random.Random(0)
    counts = [[dice.randrange(5) for _ in range(12)] for _ in range(6)]
    ranks = ((4, 0, 3), (1, 5, 2))  # any numbering of the block
    plans = {
        (etp, ep): plan_exchange(counts, ExpertMesh(ranks[etp][ep], 6, ep, etp, ranks))
        for etp in range(2)
        for ep in range(3)
    }
    for (etp, ep), plan in plans.items():
        assert sum(plan.dispatch_rows) == sum(counts[ranks[etp][ep]])
        for other in range(3):
            assert plan.dispatch_rows[other] == plans[etp, other].receive_rows[ep]
        assert plan.etp_rows == tuple(sum(plans[i, ep].receive_rows) for i in range(2))
        assert sum(plan.expert_rows) == sum(plan.etp_rows)


def test_rows_keep_their_bits() -> None:
    assert_equal_to_rounding(
        plan_exchange([[1, 2], [2, 1]], ExpertMesh(0, 2, 0, 0, ((0,), (1,))))
        .group_by_expert(torch.arange(6.0).unsqueeze(1))
        .flatten(),
        torch.tensor([0.0, 3, 4, 1, 2, 5]),
        tolerance=0.0,
    )


def copied_with_its_model(copied: bool) -> bool:
    groups = groups_of(ExpertTopology(2, ep=2)).experts
    memory = memory_of(groups) if copied else None
    dispatcher = make_dispatcher(expert_mesh(groups), groups, memory)
    return copy.deepcopy(dispatcher) is dispatcher


@pytest.mark.parametrize("copied", [False, True])
def test_copies_of_a_model_share_its_dispatcher(copied: bool) -> None:
    assert run_on_ranks(copied_with_its_model, 2, copied) == [True, True]


FINE = MoEConfig(10, 12, 32, 4, aux_loss_coefficient=0.3, overlap_groups=1)


def check_fine(copied: bool, backend: str) -> None:
    order = ORDERS["zigzag"](29, 2)
    how = {"backend": backend, "copied": copied}
    actual = on_ranks(ExpertTopology(2, ep=2), order, FINE, torch.float64, **how)
    for name, got, expected in zip(LayerResult._fields, actual, oracle(FINE)):
        assert_equal_to_rounding(got, expected, what=name)


@pytest.mark.parametrize("copied", [False, True])
def test_fine_experts_are_the_oracles(copied: bool) -> None:
    check_fine(copied, "gloo")


@pytest.mark.multi_gpu
@pytest.mark.parametrize("copied", [False, True])
def test_fine_experts_on_two_gpus(copied: bool) -> None:
    check_fine(copied, "nccl")
