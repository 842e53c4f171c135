"""The same bits: packed or alone, run after run, whatever other documents hold."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from lasp.sequence.layout import SequenceLayout
from ring.planner.schedule import RingSchedule, plan_ring
from tests.ranks import run_on_ranks
from tests.ring.cases import (
    NAMES,
    ORDERS,
    forward_backward,
    on_ranks,
    on_world,
    random_tensors,
    unshard_all,
)


def leaky_plan(layout: SequenceLayout, rank: int, causal: bool, **options: Any) -> RingSchedule:
    """What a lost document border would do: the first two documents are one."""
    first, second, *rest = layout.document_lengths
    merged = SequenceLayout((first + second, *rest), layout.num_ranks, layout.order)
    return plan_ring(merged, rank, causal, **options)


def planned_by(planted: bool):
    return patch("ring.torch_ops.plan_ring", leaky_plan if planted else plan_ring)


@pytest.mark.parametrize("block", ["cpu_flash", "eager"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("planted", [False, True])
def test_a_document_in_a_pack_has_the_bits_of_the_document_alone_and_a_planted_leak_shows(
    block: str, causal: bool, planted: bool
) -> None:
    lengths = (5, 1, 12, 4)
    tensors = random_tensors(22, 6, 2, 5, torch.float64)
    kwargs = {"causal": causal, "block": block}
    with planned_by(planted):
        packed = forward_backward(tensors, layout=SequenceLayout(lengths, 1), **kwargs)
    differ = set()
    start = 0
    for number, length in enumerate(lengths):
        document = slice(start, start + length)
        alone = forward_backward(
            [x[document] for x in tensors], layout=SequenceLayout((length,), 1), **kwargs
        )
        if not all(torch.equal(a[document], b) for a, b in zip(packed, alone, strict=True)):
            differ.add(number)
        start += length
    assert differ == ({0, 1} if planted else set())


def on_world_planned(tensors, layout: SequenceLayout, causal: bool, planted: bool) -> list[Tensor]:
    with planned_by(planted):
        return on_world(tensors, layout, causal=causal)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("planted", [False, True])
def test_nothing_leaks_between_documents_over_ranks_and_a_planted_leak_shows(
    order, causal: bool, planted: bool
) -> None:
    lengths, document = (9, 14, 8), slice(9, 23)
    tensors = random_tensors(31, 4, 2, 5, torch.float64)
    others = [x.clone() for x in random_tensors(31, 4, 2, 5, torch.float64)]
    for mine, other in zip(tensors, others):
        other[document] = mine[document]
    layout = SequenceLayout(lengths, 3, order)
    first, second = (
        unshard_all(layout, run_on_ranks(on_world_planned, 3, pack, layout, causal, planted))
        for pack in (tensors, others)
    )
    for name, a, b in zip(NAMES, first, second, strict=True):
        assert torch.equal(a[document], b[document]) is not planted, name
        assert not torch.equal(a, b), name


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_two_runs_are_bit_identical(dtype: torch.dtype) -> None:
    tensors = random_tensors(120, 4, 2, 8, dtype)
    layout = SequenceLayout((100, 20), 4, "fold")
    first, second = (on_ranks(tensors, layout, causal=False) for _ in range(2))
    for name, a, b in zip(NAMES, first, second, strict=True):
        assert torch.equal(a, b), name
