"""A key, value, query or gradient that is not finite spoils its own document, no other."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lasp.sequence.layout import SequenceLayout
from ring import ring_attention
from tests.ranks import run_on_ranks
from tests.ring.cases import assert_all_equal, on_ranks, oracle, random_tensors

LENGTHS, BAD = (20, 7, 30, 9), 30  # in the third document, whose first and last tokens are
THIRD = slice(27, 57)


def spoiled(block: str, num_ranks: int) -> list[list[Tensor]]:
    """Output and gradients of this rank's tokens: of finite tensors, then with one NaN in each."""
    rank = dist.get_rank() if num_ranks > 1 else 0
    layout = SequenceLayout(LENGTHS, num_ranks, "zigzag")
    results = []
    for bad in (None, 0, 1, 2, 3):
        generator = torch.Generator().manual_seed(0)
        tensors = [torch.randn(sum(LENGTHS), 2, 8, generator=generator) for _ in "qkvd"]
        if bad is not None:
            tensors[bad][BAD, 0, 1] = float("nan")
        *leaves, doutput = (layout.shard(x, rank).clone() for x in tensors)
        for x in leaves:
            x.requires_grad_()
        output = ring_attention(
            *leaves, layout=layout, cp_group=dist.group.WORLD if num_ranks > 1 else None,
            block=block,
        ).output  # fmt: skip
        results.append([output.detach(), *torch.autograd.grad(output, leaves, doutput)])
    return results


@pytest.mark.parametrize("block", ["eager", "cpu_flash"])
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_other_documents_do_not_notice(num_ranks: int, block: str) -> None:
    parts = run_on_ranks(spoiled, 2, block, 2) if num_ranks == 2 else [spoiled(block, 1)]
    layout = SequenceLayout(LENGTHS, num_ranks, "zigzag")
    clean, *bad = (
        [layout.unshard(list(tensors)) for tensors in zip(*of_ranks)] for of_ranks in zip(*parts)
    )
    others = torch.ones(sum(LENGTHS), dtype=torch.bool)
    others[THIRD] = False
    for results in bad:
        assert not all(x.isfinite().all() for x in results)
        for expected, actual in zip(clean, results, strict=True):
            assert torch.equal(actual[others], expected[others])


@pytest.mark.parametrize("scale", [-0.5, 0.0])
@pytest.mark.parametrize("block", ["auto", "eager"])
def test_scales_that_are_not_positive(block: str, scale: float) -> None:
    """Kernels scale their mask too, which such a factor turns into NaN."""
    lengths = (11, 3, 9)
    tensors = random_tensors(23, 4, 2, 8, torch.float64)
    layout = SequenceLayout(lengths, 2, "zigzag")
    actual = on_ranks(tensors, layout, causal=True, scale=scale, block=block)
    assert_all_equal(actual, oracle(tensors, lengths, True, scale=scale))
