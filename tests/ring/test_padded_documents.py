"""Packs whose documents are padded: every result is that of the documents alone.

Padding holds NaN in q, k, v and in the gradient of the output: none of it reaches a document.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lasp.sequence.layout import SequenceLayout
from ring import ring_attention
from tests.ranks import run_on_ranks
from tests.ring.cases import (
    HEADS,
    RULES,
    assert_all_equal,
    oracle,
    planned_by,
    random_tensors,
    unshard_all,
)
from tests.ring.test_module import check_on_ranks

# Shorter than 2P pieces, without a token, of whole pieces, over all ranks.
PACKS = ((0, 1, 2, 3, 0, 5, 1, 0), (16, 8, 24), (37, 0, 1, 40, 2), (1,))


def layouts_for(num_ranks: int) -> list[SequenceLayout]:
    layouts = [SequenceLayout(lengths, num_ranks, "document_zigzag") for lengths in PACKS]
    for lengths in PACKS:
        longer = tuple((length // (2 * num_ranks) + 2) * 2 * num_ranks for length in lengths)
        layouts.append(SequenceLayout(lengths, num_ranks, "document_zigzag", longer))
    for order in ("contiguous", "zigzag", "fold"):
        layouts.append(SequenceLayout((0, 1, 13, 20, 2), num_ranks, order, (3, 1, 20, 21, 9)))
    return layouts


def attend(tensors, layout: SequenceLayout, causal: bool, block: str) -> list[Tensor]:
    rank = dist.get_rank()
    *qkv, doutput = (layout.shard(x, rank, pad_value=float("nan")) for x in tensors)
    qkv = [x.detach().requires_grad_() for x in qkv]
    output, lse = ring_attention(
        *qkv, layout=layout, cp_group=dist.group.WORLD, causal=causal, block=block
    )
    return [x.detach() for x in (output, lse, *torch.autograd.grad(output, qkv, doutput))]


def attend_all(cases) -> list[list[Tensor]]:
    results = []
    for index, case in enumerate(cases):
        with planned_by(RULES[index % len(RULES)]):  # directly and along chains, in many stages
            results.append(attend(*case))
    return results


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_output_and_gradients_in_float64(num_ranks: int) -> None:
    cases = []
    for index, layout in enumerate(layouts_for(num_ranks)):
        heads, block = HEADS[index % len(HEADS)], ("cpu_flash", "eager")[(index // 2) % 2]
        tensors = random_tensors(layout.num_real_tokens, *heads, 4, torch.float64)
        cases += [(tensors, layout, causal, block) for causal in (True, False)]
    results = run_on_ranks(attend_all, num_ranks, cases)
    for (tensors, layout, causal, _), *of_ranks in zip(cases, *results, strict=True):
        expected = oracle(tensors, layout.document_lengths, causal)
        assert_all_equal(unshard_all(layout, of_ranks), expected)


def test_the_layer_over_ranks_rotates_by_the_place_within_the_document() -> None:
    check_on_ranks(2, "document_zigzag", causal=True)
