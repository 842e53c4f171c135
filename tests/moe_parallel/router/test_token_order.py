from __future__ import annotations

import pickle

import pytest
import torch

from moe_parallel import TokenOrder, TokenSegment
from tests.moe_parallel.batch import ORDERS, assemble, local_rows

CPU = torch.device("cpu")
EXAMPLE = TokenOrder(
    (
        (TokenSegment(6, 3, 2), TokenSegment(0, 0, 2)),
        (TokenSegment(2, 0, 4), TokenSegment(6, 4, 0)),
    ),
    (6, 4),
)


def test_sizes_leave_padding_and_empty_segments_out() -> None:
    assert EXAMPLE.segments[0] == ((0, 0, 2), (6, 3, 2))  # by position
    assert EXAMPLE.segments[1] == ((2, 0, 4),)
    assert (EXAMPLE.num_tokens, EXAMPLE.num_ranks, EXAMPLE.max_segments) == (8, 2, 2)
    assert [EXAMPLE.num_local_tokens(rank) for rank in (0, 1)] == [4, 4]


def test_take_and_put_are_inverse_on_tokens_and_zero_on_padding() -> None:
    rows = torch.arange(6.0).unsqueeze(1)
    tokens = EXAMPLE.take(rows, 0)
    assert tokens.flatten().tolist() == [0, 1, 3, 4]
    assert EXAMPLE.put(tokens, 0).flatten().tolist() == [0, 1, 0, 3, 4, 0]
    whole = torch.arange(4.0)
    assert EXAMPLE.take(whole, 1) is whole  # nothing to move
    assert EXAMPLE.put(whole, 1) is whole


def test_router_tensors_of_the_example() -> None:
    assert EXAMPLE._segment_bounds(0, CPU).tolist() == [0, 2, 4]
    assert EXAMPLE._segment_bounds(1, CPU).tolist() == [0, 4, 4]
    assert EXAMPLE._segments_by_position(CPU).tolist() == [0, 2, 1, 3]
    assert EXAMPLE._tokens_by_position(CPU).tolist() == [0, 1, 4, 5, 6, 7, 2, 3]


@pytest.mark.parametrize("name", ORDERS)
@pytest.mark.parametrize("num_ranks", [1, 2, 5])
@pytest.mark.parametrize("num_tokens", [0, 1, 23])
def test_orders_hold_every_token_once(name: str, num_ranks: int, num_tokens: int) -> None:
    order = ORDERS[name](num_tokens, num_ranks)
    assert order.num_tokens == num_tokens
    x = torch.randn(num_tokens, 3)
    taken = [
        order.take(local_rows(x, order, rank, padding=torch.nan), rank) for rank in range(num_ranks)
    ]
    for rank, tokens in enumerate(taken):
        assert len(tokens) == order.num_local_tokens(rank)
    parts = [order.put(tokens, rank) for rank, tokens in enumerate(taken)]
    assert torch.equal(assemble(parts, order), x)
    padded = [
        torch.cat([tokens, tokens.new_zeros(order.max_local_tokens - len(tokens), 3)])
        for tokens in taken
    ]
    assert torch.equal(torch.cat(padded)[order._tokens_by_position(CPU)], x)


def test_what_inference_leaves_behind_serves_training() -> None:
    order = TokenOrder(EXAMPLE.segments, EXAMPLE.rows_per_rank)
    rows = torch.arange(6.0).unsqueeze(1)
    with torch.inference_mode():
        expected = order.take(rows, 0)
    tokens = order.take(rows.requires_grad_(), 0)
    assert torch.equal(tokens, expected)
    order.put(tokens, 0).sum().backward()
    assert rows.grad is not None
    assert rows.grad.flatten().tolist() == [1, 1, 0, 1, 1, 0]


def test_pickle_leaves_tensors_behind() -> None:
    EXAMPLE._segment_bounds(0, CPU)
    copy = pickle.loads(pickle.dumps(EXAMPLE))
    assert copy == EXAMPLE
    assert not copy._tensors


@pytest.mark.parametrize(
    ("segments", "rows", "message"),
    [
        ((), (), "one entry for each rank"),
        ((((0, 0, 2),),), (2, 2), "one entry for each rank"),
        ((((0, 0, 3),),), (2,), "segments of rank 0 must lie in its 2 rows"),
        ((((0, -1, 2),),), (2,), "segments of rank 0 must lie in its 2 rows"),
        ((((0, 0, -1),),), (2,), "segments of rank 0 must lie in its 2 rows"),
        ((((0, 0, 2), (9, 1, 2)),), (4,), "overlap, got rows of rank 0"),
        ((((0, 0, 2),), ((1, 0, 2),)), (2, 2), "overlap, got global positions"),
    ],
)
def test_bad_orders(segments: tuple, rows: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TokenOrder(segments, rows)


def test_contiguous_rejects_negative_counts() -> None:
    with pytest.raises(ValueError, match="tokens_per_rank must be >= 0"):
        TokenOrder.contiguous([2, -1])


def test_what_is_remembered_is_handed_to_nobody_who_may_write_to_it() -> None:
    public = {name for name in vars(TokenOrder) if not name.startswith("_")}
    annotations = {
        name: getattr(getattr(TokenOrder, name), "__annotations__", {}) for name in public
    }
    assert {name for name, of in annotations.items() if of.get("return") == "Tensor"} == {
        "take",
        "put",
    }
    rows = torch.ones(6, 2)
    EXAMPLE.take(rows, 0).zero_()
    EXAMPLE.put(torch.ones(4, 2), 0).zero_()
    assert EXAMPLE.take(rows, 0).sum() == 8
