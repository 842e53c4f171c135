"""What ranks disagree about is in the table of test_bad_input."""

from __future__ import annotations

import pickle
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from moe_parallel import ExpertParallelMoE, ExpertTopology, MoEConfig, TokenOrder
from moe_parallel.router import checks as agreement
from moe_parallel.router.checks import check_order
from tests.moe_parallel.batch import ORDERS, shuffled
from tests.ranks import run_on_ranks, subgroup

EXAMPLE = TokenOrder((((0, 0, 2), (6, 3, 2)), ((2, 0, 4),)), (6, 4))
OTHERS = {
    "start": TokenOrder((((0, 0, 2), (7, 3, 2)), ((2, 0, 4),)), (6, 4)),
    "offset": TokenOrder((((0, 0, 2), (6, 4, 2)), ((2, 0, 4),)), (6, 4)),
    "length": TokenOrder((((0, 0, 2), (6, 3, 1)), ((2, 0, 4),)), (6, 4)),
    "rows": TokenOrder((((0, 0, 2), (6, 3, 2)), ((2, 0, 4),)), (6, 5)),
    "rank": TokenOrder((((0, 0, 2),), ((2, 0, 4), (6, 4, 2))), (6, 6)),
    "ranks swapped": TokenOrder((((2, 0, 4),), ((0, 0, 2), (6, 3, 2))), (4, 6)),
    "one rank more": TokenOrder((((0, 0, 2), (6, 3, 2)), ((2, 0, 4),), ()), (6, 4, 0)),
}


@pytest.mark.parametrize("change", OTHERS)
def test_fingerprints_tell_orders_apart(change: str) -> None:
    assert OTHERS[change].fingerprint != EXAMPLE.fingerprint
    assert 0 <= EXAMPLE.fingerprint < 2**63  # an int64 of its own


def test_equal_orders_have_equal_fingerprints_however_they_were_built() -> None:
    counts = torch.tensor([3, 0, 5])
    assert (
        TokenOrder.contiguous(counts.numpy()).fingerprint
        == TokenOrder.contiguous([3, 0, 5]).fingerprint
    )
    unsorted = TokenOrder((((6, 3, 2), (0, 0, 2), (9, 0, 0)), ((2, 0, 4),)), (6, 4))
    assert unsorted.fingerprint == EXAMPLE.fingerprint


def gathers_on_rank(num_tokens: int, device: str) -> list[int]:
    """How often the ranks compared: twice with one order, again with a copy, with another group."""
    rank = dist.get_rank()
    order = shuffled(num_tokens, 2)
    copy = pickle.loads(pickle.dumps(order))
    counts = []
    with patch.object(agreement, "all_gather", wraps=agreement.all_gather) as gather:
        for asked, group in (
            (order, dist.group.WORLD),
            (order, dist.group.WORLD),
            (copy, dist.group.WORLD),
            (order, subgroup(0, 1)),
            (order, subgroup(0, 1)),
        ):
            check_order(asked, asked.rows_per_rank[rank], group, torch.device(device))
            counts.append(gather.call_count)
    return counts


def test_ranks_compare_an_order_once() -> None:
    assert run_on_ranks(gathers_on_rank, 2, 23, "cpu") == [[1, 1, 2, 3, 3]] * 2


@pytest.mark.multi_gpu
def test_gpus_compare_an_order_once() -> None:
    assert run_on_ranks(gathers_on_rank, 2, 23, "cuda", backend="nccl") == [[1, 1, 2, 3, 3]] * 2


def rejected_then_asked_again(num_tokens: int) -> tuple[str, str]:
    """A disagreement is not remembered as an agreement; rows are checked on every call."""
    rank = dist.get_rank()
    order = ORDERS["zigzag"](num_tokens, 2)
    rows, cpu = order.rows_per_rank[rank], torch.device("cpu")
    with pytest.raises(ValueError) as first:
        check_order(order, rows + rank, dist.group.WORLD, cpu)
    check_order(order, rows, dist.group.WORLD, cpu)
    with pytest.raises(ValueError) as later:
        check_order(order, rows + 1, dist.group.WORLD, cpu)
    return str(first.value), str(later.value)


def test_rows_are_checked_before_and_after_the_ranks_agreed() -> None:
    (first_0, later_0), (first_1, later_1) = run_on_ranks(rejected_then_asked_again, 2, 9)
    assert first_0 == first_1
    assert first_0.startswith("token_order must name the 7 rows of hidden on rank 1")
    assert later_0.startswith("token_order must name the 8 rows of hidden on rank 0")
    assert later_1.startswith("token_order must name the 7 rows of hidden on rank 1")


DROPS: dict[str, dict[str, Any]] = {
    "position": {},
    "probability": {"drop_policy": "probability"},
    "padded": {"pad_to_capacity": True},
}


def modes_differ(ep: int, drops: dict[str, Any], given: bool) -> list[str]:
    """What a rank is told if only rank 0 trains; then both train, then none does."""
    config = MoEConfig(16, 8, 8, 2, capacity_factor=0.5, **drops)
    layer = ExpertParallelMoE(config, groups=ExpertTopology(2, ep=ep).build_groups().experts)
    order = TokenOrder((((0, 0, 6), (18, 6, 6)), ((6, 0, 12),)), (12, 12)) if given else None
    hidden = torch.randn(12, 16)
    layer.train(dist.get_rank() == 0)
    with pytest.raises(ValueError) as error:
        layer(hidden, token_order=order)
    for mode in (True, False):
        layer.train(mode)
        assert bool(layer(hidden, token_order=order).stats.dropped.sum()) == mode
    return [str(error.value)]


@pytest.mark.parametrize("ep", [1, 2])
@pytest.mark.parametrize(
    ("drops", "given"),
    [("position", True), ("position", False), ("probability", True), ("padded", True)],
)
def test_ranks_that_train_and_ranks_that_do_not_are_told(drops: str, given: bool, ep: int) -> None:
    told = run_on_ranks(modes_differ, 2, ep, DROPS[drops], given)
    assert told[0] == told[1]
    assert "train() on ranks [0] and eval() on ranks [1]" in told[0][0]


def toggled_with_one_order() -> str:
    """An order that is kept for all calls has been compared before only one rank trains."""
    config = MoEConfig(16, 8, 8, 2, capacity_factor=0.5)
    layer = ExpertParallelMoE(config, groups=ExpertTopology(2, ep=2).build_groups().experts)
    order, hidden = TokenOrder.contiguous([12, 12]), torch.randn(12, 16)
    layer(hidden, token_order=order)
    layer.train(dist.get_rank() == 0)
    with pytest.raises(ValueError) as error:
        layer(hidden, token_order=order)
    return str(error.value)


def test_likewise_after_calls_in_one_mode() -> None:
    told = run_on_ranks(toggled_with_one_order, 2)
    assert told[0] == told[1]
    assert "train() on ranks [0]" in told[0]


def test_alone_nobody_is_asked() -> None:
    check_order(TokenOrder.contiguous([3]), 3, None, torch.device("cpu"))
    with pytest.raises(ValueError, match="one entry for each of the 1 ranks"):
        check_order(EXAMPLE, 6, None, torch.device("cpu"))
    with pytest.raises(ValueError, match="must name the 4 rows of hidden on rank 0"):
        check_order(TokenOrder.contiguous([3]), 4, None, torch.device("cpu"))


@pytest.mark.parametrize(("drop_policy", "same"), [("position", True), ("probability", False)])
def test_an_order_that_ranks_compare_is_made_for_one_call(drop_policy: str, same: bool) -> None:
    """It remembers that they did: one that comes back would be compared by some ranks alone."""
    config = MoEConfig(16, 8, 4, 2, capacity_factor=1.0, drop_policy=drop_policy)
    layer, rows = ExpertParallelMoE(config), torch.zeros(6, 16)
    first, second = (layer.agreed_order(rows, None) for _ in range(2))
    assert first == second
    assert (first is second) is same
