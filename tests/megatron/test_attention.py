"""Attention in Megatron is lasp.LightningAttention and ring.RingAttention, over any ranks."""

from __future__ import annotations

from typing import Any

import pytest

from tests.megatron.attention import LENGTHS, LIGHTNING, RING, Case

pytestmark = pytest.mark.megatron

SPLITS = [
    (1, {}, "contiguous"),
    (2, {"tp": 2}, "contiguous"),
    pytest.param(2, {"cp": 2}, "zigzag", marks=pytest.mark.slow),
    (4, {"tp": 2, "cp": 2}, "fold"),
    pytest.param(4, {"cp": 4}, "zigzag", marks=pytest.mark.slow),
]
BOTH = pytest.mark.parametrize("case", [LIGHTNING, RING], ids=["lightning", "ring"])


@BOTH
@pytest.mark.parametrize(("num_ranks", "sizes", "order"), SPLITS)
def test_packs_equal_the_plain_module(case: Case, num_ranks: int, sizes: Any, order: str) -> None:
    case.check(num_ranks, sizes, LENGTHS, order)


@BOTH
@pytest.mark.parametrize(("num_ranks", "sizes", "order"), SPLITS)
def test_rows_in_megatrons_order_equal_the_plain_module(
    case: Case, num_ranks: int, sizes: Any, order: str
) -> None:
    case.check(num_ranks, sizes, None, "zigzag")


@BOTH
def test_rows_in_contiguous_order_equal_the_plain_module(case: Case) -> None:
    """As ``linear_cp_layout`` and ``attention_cp_layout`` of the config say."""
    case.check(2, {"cp": 2}, None, "contiguous")


@pytest.mark.slow
@pytest.mark.parametrize("lengths", [LENGTHS, None], ids=["pack", "rows"])
def test_more_tensor_parallel_ranks_than_key_heads(lengths: tuple[int, ...] | None) -> None:
    """Lightning attention has a key head a head; ring self-attention refuses it."""
    LIGHTNING.check(4, {"tp": 4}, lengths, "zigzag")


@BOTH
def test_tensor_parallel_without_sequence_parallel(case: Case) -> None:
    case.check(2, {"tp": 2}, LENGTHS, sequence_parallel=False)


@BOTH
def test_float32_over_ranks_within_budget(case: Case) -> None:
    case.check_float32(4, {"tp": 2, "cp": 2}, "zigzag")
