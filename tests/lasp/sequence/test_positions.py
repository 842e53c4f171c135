"""The operator that gives tokens their positions."""

from __future__ import annotations

import torch

import lasp.sequence.positions  # noqa: F401  (defines the operator)


def test_positions_are_well_registered() -> None:
    documents = torch.tensor([5, 7]), 1, "contiguous", ""
    for x, token_dim in ((torch.zeros(2, 12, 3), -2), (torch.zeros(12, 3, 1), -3)):
        arguments = (x, "x", token_dim, *documents)
        torch.library.opcheck(torch.ops.lasp.positions.default, arguments)
        assert torch.ops.lasp.positions(*arguments).tolist() == [*range(5), *range(7)]
