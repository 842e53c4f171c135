"""Rows of the MoE layer in Megatron through symmetric memory."""

from __future__ import annotations

import math

import pytest
import torch

from tests.megatron.test_moe_parallel import NAMES, layer_on_rank
from tests.ranks import run_on_ranks

pytestmark = pytest.mark.megatron


def copied_on_rank(sizes: dict[str, int]) -> None:
    """Rank function: through symmetric memory, the bits of an all-to-all."""
    sent, copied = (layer_on_rank(sizes, "shuffled", {}, copied=copied) for copied in (False, True))
    for name, a, b in zip(NAMES, sent, copied):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("sizes", [{"ep": 2}, {"etp": 2}, {"ep": 2, "etp": 2}])
def test_rows_travel_through_symmetric_memory(sizes: dict[str, int]) -> None:
    run_on_ranks(copied_on_rank, math.prod(sizes.values()), sizes)
