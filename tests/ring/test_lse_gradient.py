"""Gradients that come through the log-sum-exp: z-losses and attention sinks."""

from __future__ import annotations

from itertools import accumulate
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lasp.sequence.layout import SequenceLayout
from ring import ring_attention
from ring.blocks.registry import BLOCKS
from ring.reference import dense_attention
from tests.closeness import assert_equal_to_rounding, assert_within_budget
from tests.ranks import run_on_ranks
from tests.ring.blocks.test_blocks import skip_unless_it_serves
from tests.ring.cases import (
    ORDERS,
    WHOLE,
    cancelling_terms,
    planned_by,
    random_tensors,
    rank_device,
)

PACKS = ((16,), (5, 1, 10), (0, 4, 0, 7, 1), (37, 1, 2))
HEADS = ((4, 2), (3, 1), (2, 2))


def sunk(output: Tensor, lse: Tensor, scale: Tensor) -> Tensor:
    """The loss of a layer with attention sinks and a z-loss: both gradients depend on both."""
    with_sink = output * torch.sigmoid(lse - 0.5).unsqueeze(-1)
    return (with_sink * scale).sum() + 0.1 * lse.square().sum()


def only_lse(output: Tensor, lse: Tensor, scale: Tensor) -> Tensor:
    return (lse * scale[..., 0]).sum()


def on_even_ranks(output: Tensor, lse: Tensor, scale: Tensor) -> Tensor:
    return sunk(output, lse * (1 - dist.get_rank() % 2), scale)


def gradients(tensors, layout, loss, *, rank=0, cp_group=None, device="cpu", **kwargs):
    """dq, dk, dv of this rank's tokens; ``tensors`` are the whole pack's."""
    *qkv, scale = (layout.shard(x, rank).to(device) for x in tensors)
    qkv = [x.detach().requires_grad_() for x in qkv]
    value = loss(*ring_attention(*qkv, layout=layout, cp_group=cp_group, **kwargs), scale)
    return [x.cpu() for x in torch.autograd.grad(value, qkv)]


def oracle(tensors, lengths, loss, causal: bool) -> tuple[Tensor, ...]:
    *qkv, scale = (x.double().requires_grad_() for x in tensors)
    borders = list(accumulate(lengths, initial=0))
    head_dim = scale.shape[-1]
    outputs = dense_attention(*qkv, cu_seqlens=borders, causal=causal, scale=head_dim**-0.5)
    return torch.autograd.grad(loss(*outputs, scale), qkv, materialize_grads=True)


def assert_all_equal(actual, expected) -> None:
    for name, a, b in zip(("dq", "dk", "dv"), actual, expected, strict=True):
        assert_equal_to_rounding(a, b, what=name)


def on_world(cases) -> list[list[Tensor]]:
    where: dict[str, Any] = {"cp_group": dist.group.WORLD, "device": rank_device()}
    rank = dist.get_rank()
    with planned_by(WHOLE):
        return [gradients(*case, rank=rank, **where, **kwargs) for *case, kwargs in cases]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("loss", [sunk, only_lse])
def test_in_float64_over_ranks(loss, causal: bool) -> None:
    cases = []
    for index, lengths in enumerate(PACKS):
        tensors = random_tensors(sum(lengths), *HEADS[index % len(HEADS)], 4, torch.float64)
        layout = SequenceLayout(lengths, 2, ORDERS[index % len(ORDERS)])
        block = ("cpu_flash", "eager")[index % 2]
        cases.append((tensors, layout, loss, {"causal": causal, "block": block}))
    for (tensors, layout, *_), *parts in zip(cases, *run_on_ranks(on_world, 2, cases)):
        actual = [layout.unshard(of_ranks) for of_ranks in zip(*parts)]
        assert_all_equal(actual, oracle(tensors, layout.document_lengths, loss, causal))


def on_one_of_two(tensors, layout) -> list[Tensor]:
    return on_world([(tensors, layout, on_even_ranks, {})])[0]


def test_of_one_rank_alone() -> None:
    layout, tensors = SequenceLayout((16,), 2), random_tensors(16, 2, 1, 4, torch.float64)
    parts = run_on_ranks(on_one_of_two, 2, tensors, layout)

    def loss(output: Tensor, lse: Tensor, scale: Tensor) -> Tensor:
        return sunk(output, torch.cat([lse[:8], lse[8:] * 0]), scale)

    actual = [layout.unshard(of_ranks) for of_ranks in zip(*parts)]
    assert_all_equal(actual, oracle(tensors, (16,), loss, True))


def test_of_rows_of_a_batch() -> None:
    rows = [random_tensors(7, 4, 2, 4, torch.float64) for _ in range(3)]
    layout, batch = SequenceLayout((7,), 1), [torch.stack(tensors) for tensors in zip(*rows)]
    *qkv, scale = batch
    qkv = [x.requires_grad_() for x in qkv]
    value = sunk(*ring_attention(*qkv, layout=layout), scale)
    expected = [torch.stack(x) for x in zip(*(oracle(row, (7,), sunk, True) for row in rows))]
    assert_all_equal(torch.autograd.grad(value, qkv), expected)


@pytest.mark.parametrize("block", ["cpu_flash", "eager"])
def test_both_results_have_the_right_derivatives(block: str) -> None:
    qkv = [x.requires_grad_() for x in random_tensors(5, 4, 2, 3, torch.float64)[:3]]
    layout = SequenceLayout((2, 3), 1)
    assert torch.autograd.gradcheck(
        lambda *qkv: tuple(ring_attention(*qkv, layout=layout, block=block)), qkv
    )


def check_budget(block: str, lengths: tuple[int, ...], head_dim: int, dtype, device, loss) -> None:
    """Twice the error of the eager block, which adds both parts in float32 and rounds once."""
    torch.manual_seed(0)
    layout = SequenceLayout(lengths, 1)
    tensors = random_tensors(sum(lengths), 4, 2, head_dim, dtype)
    actual = gradients(tensors, layout, loss, block=block, device=device)
    honest = gradients(tensors, layout, loss, block="eager", device=device)
    expected = oracle(tensors, lengths, loss, True)
    terms = cancelling_terms(tensors, lengths, True)
    for name, a, b, c in zip(("dq", "dk", "dv"), actual, expected, honest, strict=True):
        assert a.dtype == dtype
        assert_within_budget(a, b, c, terms=terms.get(name), what=name)


@pytest.mark.parametrize("loss", [sunk, only_lse])
@pytest.mark.parametrize("head_dim", [1, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_within_budget(dtype: torch.dtype, head_dim: int, loss) -> None:
    check_budget("cpu_flash", (40, 1, 24), head_dim, dtype, "cpu", loss)


@pytest.mark.gpu
@pytest.mark.parametrize("loss", [sunk, only_lse])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("block", "head_dim"), [("flash", 128), ("flash", 256), ("cudnn", 128), ("fa4", 128)]
)
def test_within_budget_on_gpus(block: str, head_dim: int, dtype: torch.dtype, loss) -> None:
    skip_unless_it_serves(block, head_dim, head_dim)
    check_budget(block, (700, 1, 4200), head_dim, dtype, "cuda", loss)


@pytest.mark.parametrize(("uses_lse", "calls"), [(False, 1), (True, 2)])
def test_it_costs_nothing_unless_it_is_used(uses_lse: bool, calls: int) -> None:
    block, called = BLOCKS["cpu_flash"], []

    def counted(*args: Any, **kwargs: Any) -> Any:
        called.append(1)
        return type(block).backward_varlen(block, *args, **kwargs)

    qkv = [x.requires_grad_() for x in random_tensors(6, 2, 1, 4, torch.float32)[:3]]
    output, lse = ring_attention(*qkv)
    with patch.object(block, "backward_varlen", counted):
        (output.sum() + lse.sum() if uses_lse else output.sum()).backward()
    assert len(called) == calls
