from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from ring.reference import dense_attention
from tests.closeness import assert_equal_to_rounding
from tests.ring.cases import random_tensors


@pytest.mark.parametrize("causal", [True, False])
def test_equals_sums_written_out(causal: bool) -> None:
    q, k, v, _ = random_tensors(5, 4, 2, 3, torch.float64)
    output, lse = dense_attention(q, k, v, cu_seqlens=(0, 3, 3, 5), causal=causal, scale=0.7)
    for t, document in enumerate([(0, 3)] * 3 + [(3, 5)] * 2):
        keys = [s for s in range(*document) if s <= t or not causal]
        for h in range(4):
            weights = [math.exp(0.7 * float(q[t, h] @ k[s, h // 2])) for s in keys]
            expected = sum(w * v[s, h // 2] for w, s in zip(weights, keys)) / sum(weights)
            assert_equal_to_rounding(output[t, h], expected)
            assert math.isclose(lse[t, h], math.log(sum(weights)), rel_tol=1e-12)


@pytest.mark.parametrize("causal", [True, False])
def test_equals_torch_on_one_document(causal: bool) -> None:
    q, k, v, _ = random_tensors(11, 6, 2, 5, torch.float64)
    output, _ = dense_attention(q, k, v, cu_seqlens=(0, 11), causal=causal, scale=0.3)
    expected = scaled_dot_product_attention(
        *(x.transpose(0, 1) for x in (q, k, v)), is_causal=causal, scale=0.3, enable_gqa=True
    )
    assert_equal_to_rounding(output, expected.transpose(0, 1))


def test_gradcheck() -> None:
    tensors = [x.requires_grad_() for x in random_tensors(5, 4, 2, 3, torch.float64)[:3]]
    torch.autograd.gradcheck(
        lambda q, k, v: dense_attention(q, k, v, cu_seqlens=(0, 4, 5), causal=True, scale=0.5),
        tensors,
    )
