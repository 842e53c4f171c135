from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moe_parallel.router.counts import at_assignments, rows_before


def test_example_of_the_module() -> None:
    experts = torch.tensor([[0], [1], [0], [0]])
    before = rows_before(experts, 2)
    assert before.tolist() == [[0, 1, 1, 2, 3], [3, 3, 4, 4, 4]]
    assert at_assignments(before, experts).flatten().tolist() == [0, 3, 1, 2]


@pytest.mark.parametrize("tokens", [0, 1, 40])
@pytest.mark.parametrize("top_k", [1, 3, 6])
def test_rows_are_those_of_a_stable_sort(tokens: int, top_k: int) -> None:
    check_rows(torch.rand(tokens, 6).argsort(1)[:, :top_k], 6)


@pytest.mark.gpu
@pytest.mark.parametrize(("tokens", "num_experts"), [(0, 4), (1, 4), (32768, 32), (9999, 257)])
def test_rows_on_a_gpu(tokens: int, num_experts: int) -> None:
    check_rows(torch.rand(tokens, num_experts, device="cuda").argsort(1)[:, :2], num_experts)


def check_rows(experts: Tensor, num_experts: int) -> None:
    row = at_assignments(rows_before(experts, num_experts), experts)
    assert row.dtype == torch.int64
    assert row.is_contiguous()
    order = experts.flatten().argsort(stable=True)
    assert torch.equal(row.flatten()[order], torch.arange(experts.numel(), device=row.device))
