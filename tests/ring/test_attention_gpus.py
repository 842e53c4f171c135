"""Ring attention on GPUs, with the kernels that run nowhere else."""

from __future__ import annotations

import pytest
import torch

from lasp.sequence.layout import SequenceLayout
from ring.planner.schedule import plan_ring
from tests.lasp.distributions import document_lengths
from tests.ring.blocks.test_blocks import skip_unless_it_serves
from tests.ring.cases import (
    ORDERS,
    assert_all_equal,
    assert_all_within_budget,
    forward_backward,
    on_ranks,
    oracle,
    random_tensors,
)


@pytest.mark.gpu
@pytest.mark.parametrize("block", ["flash", "cudnn", "fa4", "auto"])
@pytest.mark.parametrize("causal", [True, False])
def test_on_one_gpu(block: str, causal: bool) -> None:
    if block != "auto":
        skip_unless_it_serves(block, 64, 64)
    lengths = (300, 1, 77, 130)
    tensors = random_tensors(sum(lengths), 6, 2, 64, torch.bfloat16)
    layout = SequenceLayout(lengths, 1)
    honest, actual = (
        forward_backward(tensors, layout=layout, device="cuda", causal=causal, block=name)
        for name in ("eager", block)
    )
    expected = oracle(tensors, lengths, causal)
    assert_all_within_budget(actual, expected, honest, torch.bfloat16)


@pytest.mark.multi_gpu
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("causal", [True, False])
def test_float64_over_gpus(order, causal: bool) -> None:
    lengths = (40, 1, 0, 70, 12)
    tensors = random_tensors(sum(lengths), 6, 2, 5, torch.float64)
    layout = SequenceLayout(lengths, 2, order)
    actual = on_ranks(tensors, layout, backend="nccl", causal=causal)
    assert_all_equal(actual, oracle(tensors, lengths, causal))


@pytest.mark.multi_gpu
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("block", ["flash", "cudnn", "fa4"])
@pytest.mark.parametrize("causal", [True, False])
def test_bfloat16_over_gpus(order, block: str, causal: bool) -> None:
    skip_unless_it_serves(block, 64, 64)
    lengths = (200, 1, 500, 37)
    tensors = random_tensors(sum(lengths), 6, 2, 64, torch.bfloat16)
    honest = forward_backward(
        tensors, layout=SequenceLayout(lengths, 1), device="cuda", causal=causal, block="eager"
    )
    layout = SequenceLayout(lengths, 2, order)
    actual = on_ranks(tensors, layout, backend="nccl", causal=causal, block=block)
    expected = oracle(tensors, lengths, causal)
    assert_all_within_budget(actual, expected, honest, torch.bfloat16)


@pytest.mark.multi_gpu
@pytest.mark.parametrize("block", ["flash", "fa4"])
def test_parts_around_stages_whole_fragments_and_tiles_side_by_side(block: str) -> None:
    skip_unless_it_serves(block, 64, 64)
    lengths = document_lengths("C", 12288, 0)
    layout = SequenceLayout(lengths, 2, "fold")
    first, second = (plan_ring(layout, rank, True) for rank in (0, 1))
    assert second.before
    assert [tile.whole for group in first.stages[0].groups for tile in group] == [True]
    (stage,) = second.stages
    assert stage.groups == (stage.tiles,)
    assert [bool(tile.own) for tile in stage.tiles] == [False, True]
    tensors = random_tensors(12288, 2, 1, 64, torch.bfloat16)
    honest = forward_backward(
        tensors, layout=SequenceLayout(lengths, 1), device="cuda", block="eager"
    )
    actual = on_ranks(tensors, layout, backend="nccl", block=block)
    assert_all_within_budget(actual, oracle(tensors, lengths, True), honest, torch.bfloat16)
