"""What ranks disagree about is in the table of test_bad_input."""

from __future__ import annotations

import pickle
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from moe_parallel import TokenOrder, agreement
from moe_parallel.agreement import check_order
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


def test_alone_nobody_is_asked() -> None:
    check_order(TokenOrder.contiguous([3]), 3, None, torch.device("cpu"))
    with pytest.raises(ValueError, match="one entry for each of the 1 ranks"):
        check_order(EXAMPLE, 6, None, torch.device("cpu"))
    with pytest.raises(ValueError, match="must name the 4 rows of hidden on rank 0"):
        check_order(TokenOrder.contiguous([3]), 4, None, torch.device("cpu"))
