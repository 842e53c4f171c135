"""FlashAttention-4's kernels on a GPU. They compile once for each dims, mask and direction: 6 s."""

from __future__ import annotations

import pytest
import torch

from ring.blocks.registry import BLOCKS
from tests.ring.blocks.test_blocks import ends_oracle, run_ends, run_varlen, skip_unless_it_serves
from tests.ring.cases import assert_all_within_budget, cancelling_terms, oracle, random_tensors

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(
    ("heads", "dims"),
    [
        ((8, 1), (64, 64)),
        ((8, 1), (128, 128)),
        ((8, 1), (256, 256)),
        ((8, 1), (72, 40)),
        ((8, 1), (192, 128)),
        ((5, 5), (192, 128)),
    ],
)
def test_head_dims(heads, dims) -> None:
    skip_unless_it_serves("fa4", *dims)
    for lengths, causal in (((5, 700, 295), True), ((1000,), False)):
        tensors = random_tensors(sum(lengths), *heads, dims[0], torch.bfloat16, dims[1])
        honest, actual = (
            run_varlen(BLOCKS[name], tensors, lengths, causal, "cuda") for name in ("eager", "fa4")
        )
        terms = cancelling_terms(tensors, lengths, causal)
        expected = oracle(tensors, lengths, causal)
        assert_all_within_budget(actual, expected, honest, torch.bfloat16, terms=terms)


@pytest.mark.parametrize("dims", [(128, 128), (72, 40)])
@pytest.mark.parametrize(("lengths", "rows"), [((900,), (300,)), ((900, 1, 257), (513, 1, 257))])
def test_last_rows_of_documents_in_place(dims, lengths, rows) -> None:
    skip_unless_it_serves("fa4", *dims)
    tensors = random_tensors(sum(lengths), 8, 1, dims[0], torch.bfloat16, dims[1])
    honest, actual = (
        run_ends(BLOCKS[name], tensors, lengths, rows, "cuda") for name in ("eager", "fa4")
    )
    expected = ends_oracle(tensors, lengths, rows)
    assert_all_within_budget(actual, expected, honest, torch.bfloat16)


def test_two_runs_have_the_same_bits_where_asked() -> None:
    skip_unless_it_serves("fa4", 128, 128)
    tensors, lengths = random_tensors(9000, 8, 2, 128, torch.bfloat16), (5, 8000, 995)
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (
            run_varlen(BLOCKS["fa4"], tensors, lengths, True, "cuda") for _ in range(2)
        )
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
