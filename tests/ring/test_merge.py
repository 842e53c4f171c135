from __future__ import annotations

import pytest
import torch

from ring.merge import Partial, merge
from ring.reference import dense_attention
from tests.closeness import assert_equal_to_rounding
from tests.ring.cases import random_tensors

INFINITY = float("inf")


def over_keys(q, k, v) -> Partial:
    """Attention of one row to these keys: none of them is in the future of the last row."""
    rows = torch.cat((q.expand(len(k), -1, -1)[:-1], q))
    output, lse = dense_attention(rows, k, v, cu_seqlens=(0, len(k)), causal=True, scale=1.0)
    return Partial(output[-1:], lse[-1:])


@pytest.mark.parametrize("cut", [1, 4, 8])
@pytest.mark.parametrize("shift", [0.0, 1e4, -1e4])
def test_merging_two_parts_is_attention_to_all_keys(cut: int, shift: float) -> None:
    _, k, v, _ = random_tensors(9, 4, 2, 3, torch.float64)
    q = torch.randn(1, 4, 3, dtype=torch.float64)
    first, second = over_keys(q, k[:cut], v[:cut]), over_keys(q, k[cut:], v[cut:])
    moved = (Partial(part.output, part.lse + shift) for part in (first, second))
    merged, expected = merge(*moved), over_keys(q, k, v)
    assert_equal_to_rounding(merged.output, expected.output)
    assert_equal_to_rounding(merged.lse - shift, expected.lse)


def test_a_side_without_keys_changes_nothing() -> None:
    some = Partial(torch.randn(3, 2, 4), torch.tensor([[0.0, 500.0], [-500.0, 3.0], [1.0, 2.0]]))
    none = Partial(torch.zeros(3, 2, 4), torch.full((3, 2), -INFINITY))
    for merged in (merge(some, none), merge(none, some)):
        assert torch.equal(merged.output, some.output)
        assert torch.equal(merged.lse, some.lse)


def test_two_sides_without_keys_are_zero_and_minus_infinity() -> None:
    none = Partial(torch.zeros(3, 2, 4), torch.full((3, 2), -INFINITY))
    merged = merge(none, none)
    assert torch.equal(merged.output, none.output)
    assert torch.equal(merged.lse, none.lse)


def test_lopsided_parts_neither_overflow_nor_vanish() -> None:
    small = Partial(torch.ones(1, 1, 2), torch.tensor([[-3e4]]))
    large = Partial(torch.full((1, 1, 2), 2.0), torch.tensor([[3e4]]))
    for merged in (merge(small, large), merge(large, small)):
        assert torch.equal(merged.output, large.output)
        assert torch.equal(merged.lse, large.lse)


def test_16_bit_outputs_are_merged_in_the_precision_of_the_lse() -> None:
    a = Partial(torch.randn(5, 2, 8).bfloat16(), torch.randn(5, 2))
    b = Partial(torch.randn(5, 2, 8).bfloat16(), torch.randn(5, 2))
    merged = merge(a, b)
    assert merged.output.dtype == merged.lse.dtype == torch.float32
    wide = [Partial(part.output.double(), part.lse.double()) for part in (a, b)]
    assert_equal_to_rounding(merged.output, merge(*wide).output, tolerance=1e-6)
