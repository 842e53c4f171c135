from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moe_parallel.dispatch.permute import RowOrder, permute, row_order, unpermute
from tests.closeness import assert_equal_to_rounding

EXPERTS = torch.tensor([[1, 0], [0, 2], [2, 1]])
KEPT = torch.tensor([[True, True], [False, True], [True, True]])


def test_example_of_the_module() -> None:
    order = row_order(EXPERTS, KEPT, 5, 3)
    assert order.assignment.tolist() == [1, 0, 5, 3, 4]
    assert order.row.tolist() == [[1, 0], [-1, 3], [4, 2]]


def random_order(num_tokens: int, top_k: int) -> RowOrder:
    experts = torch.stack([torch.randperm(7)[:top_k] for _ in range(num_tokens)])
    kept = torch.rand(num_tokens, top_k) < 0.7
    return row_order(experts, kept, int(kept.sum()), 7)


def dense(order: RowOrder, weights: Tensor | None = None) -> Tensor:
    """The linear map from tokens to rows (transposed and weighted: from rows to tokens)."""
    top_k = order.row.shape[1]
    matrix = torch.zeros(len(order.assignment), len(order.row), dtype=torch.float64)
    for row, assignment in enumerate(order.assignment.tolist()):
        token, slot = divmod(assignment, top_k)
        matrix[row, token] = 1 if weights is None else weights[token, slot]
    return matrix


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_permute_and_unpermute_are_the_linear_maps(top_k: int) -> None:
    order = random_order(11, top_k)
    x = torch.randn(11, 4, dtype=torch.float64)
    rows = torch.randn(len(order.assignment), 4, dtype=torch.float64)
    weights = torch.rand(11, top_k, dtype=torch.float64)
    assert_equal_to_rounding(permute(x, order), dense(order) @ x)
    assert_equal_to_rounding(unpermute(rows, weights, order), dense(order, weights).T @ rows)


@pytest.mark.parametrize("kept_none", [False, True])
def test_gradcheck(kept_none: bool) -> None:
    order = row_order(EXPERTS, KEPT & (not kept_none), 0 if kept_none else 5, 3)
    x = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    rows = torch.randn(len(order.assignment), 2, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: permute(x, order), x)
    assert torch.autograd.gradcheck(
        lambda rows, weights: unpermute(rows, weights, order), (rows, weights)
    )


def test_a_dropped_row_with_nan_elsewhere_stays_out() -> None:
    order = row_order(EXPERTS, KEPT, 5, 3)
    rows = torch.ones(5, 2)
    rows[0] = torch.nan  # token 0, slot 1: the row a dropped assignment's -1 is clamped to
    out = unpermute(rows, torch.ones(3, 2), order)
    assert out[0].isnan().all()
    assert out[1].tolist() == [1, 1]


def test_sums_of_bfloat16_rows_round_once() -> None:
    order = row_order(torch.tensor([[0, 1, 2]]), None, 3, 3)
    rows = torch.tensor([[256.0], [1.0], [1.0]], dtype=torch.bfloat16)  # 256 + 1 rounds to 256
    assert unpermute(rows, torch.ones(1, 3), order).item() == 258
    x = torch.zeros(1, 1, dtype=torch.bfloat16, requires_grad=True)
    permute(x, order).backward(rows)
    assert x.grad.item() == 258
