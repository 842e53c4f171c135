from __future__ import annotations

from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lasp.sequence.layout import SequenceLayout
from ring import passes, ring_attention
from ring.blocks.interface import QKV, segments_of
from ring.blocks.merge import Partial, merge
from ring.blocks.registry import BLOCKS
from ring.planner.ranges import RowRange
from ring.planner.schedule import RingSchedule, plan_ring
from ring.planner.tiles import KVTile
from ring.planner.window import CAUSAL, EVERYTHING
from tests.closeness import assert_equal_to_rounding
from tests.ranks import run_on_ranks, subgroup
from tests.ring.cases import (
    HEADS,
    NAMES,
    ORDERS,
    PACKS,
    assert_all_equal,
    assert_all_within_budget,
    forward_backward,
    on_ranks,
    on_world,
    oracle,
    random_tensors,
    unshard_all,
)

# ---- against the oracle --------------------------------------------------------------------------


def cases_on_world(cases) -> list[list[Tensor]]:
    return [on_world(tensors, layout, **kwargs) for tensors, layout, kwargs in cases]


def check_all_packs(num_ranks: int, order, causal: bool) -> None:
    cases = []
    for index, lengths in enumerate(PACKS):
        heads, eager = HEADS[index % len(HEADS)], (index // 2) % 2
        value_dim = (3, 6)[index % 2] if eager else 4
        tensors = random_tensors(sum(lengths), *heads, 4, torch.float64, value_dim)
        layout = SequenceLayout(lengths, num_ranks, order)
        block = ("cpu_flash", "eager")[eager]
        cases.append((tensors, layout, {"causal": causal, "block": block}))
    results = run_on_ranks(cases_on_world, num_ranks, cases)
    for (tensors, layout, _), *of_ranks in zip(cases, *results):
        actual = unshard_all(layout, of_ranks)
        assert_all_equal(actual, oracle(tensors, layout.document_lengths, causal))


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, pytest.param(8, marks=pytest.mark.slow)])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("causal", [True, False])
def test_output_and_gradients_in_float64(num_ranks: int, order, causal: bool) -> None:
    check_all_packs(num_ranks, order, causal)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("causal", [True, False])
def test_grouped_heads(heads: tuple[int, int], causal: bool) -> None:
    lengths = (11, 3, 9)
    tensors = random_tensors(23, *heads, 5, torch.float64)
    actual = on_ranks(tensors, SequenceLayout(lengths, 3, "zigzag"), causal=causal, scale=0.37)
    assert_all_equal(actual, oracle(tensors, lengths, causal, scale=0.37))


def on_even_ranks(tensors, layout: SequenceLayout) -> list[Tensor] | None:
    group, odd = subgroup(0, 2), subgroup(1, 3)
    cp_group = odd if dist.get_rank() % 2 else group
    return forward_backward(tensors, layout=layout, cp_group=cp_group, rank=dist.get_rank(cp_group))


def test_strided_subgroups() -> None:
    tensors = random_tensors(13, 4, 2, 5, torch.float64)
    layout = SequenceLayout((4, 9), 2, "zigzag")
    results = run_on_ranks(on_even_ranks, 4, tensors, layout)
    expected = oracle(tensors, (4, 9), causal=True)
    assert_all_equal(unshard_all(layout, results[::2]), expected)
    assert_all_equal(unshard_all(layout, results[1::2]), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("block", ["cpu_flash", "eager"])
@pytest.mark.parametrize("causal", [True, False])
def test_lower_precision_within_the_error_of_one_eager_rank(dtype, block, causal) -> None:
    lengths = (90, 1, 37)
    tensors = random_tensors(128, 4, 2, 16, dtype)
    honest = forward_backward(
        tensors, layout=SequenceLayout(lengths, 1), causal=causal, block="eager"
    )
    actual = on_ranks(tensors, SequenceLayout(lengths, 3, "fold"), causal=causal, block=block)
    assert_all_within_budget(actual, oracle(tensors, lengths, causal), honest, dtype)


@pytest.mark.parametrize("block", ["cpu_flash", "eager"])
@pytest.mark.parametrize("causal", [True, False])
def test_gradcheck_on_one_rank(block: str, causal: bool) -> None:
    q, k, v = (x.requires_grad_() for x in random_tensors(5, 4, 2, 2, torch.float64)[:3])
    layout = SequenceLayout((4, 1), 1)

    def output(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ring_attention(q, k, v, layout=layout, causal=causal, block=block).output

    torch.autograd.gradcheck(output, (q, k, v))


class Shard(torch.autograd.Function):
    """This rank's part of a replicated pack; the gradient is gathered back."""

    @staticmethod
    def forward(ctx, x, layout):
        ctx.layout = layout
        return layout.shard(x, dist.get_rank()).clone()

    @staticmethod
    def backward(ctx, dx):
        return gather(dx, ctx.layout), None


class Unshard(torch.autograd.Function):
    """The replicated pack out of every rank's part."""

    @staticmethod
    def forward(ctx, x, layout):
        ctx.layout = layout
        return gather(x, layout)

    @staticmethod
    def backward(ctx, dx):
        return ctx.layout.shard(dx, dist.get_rank()).clone(), None


def gather(x: Tensor, layout: SequenceLayout) -> Tensor:
    parts = [torch.empty_like(x) for _ in range(layout.num_ranks)]
    dist.all_gather(parts, x.contiguous())
    return layout.unshard(parts)


def gradcheck_on_world(tensors, layout: SequenceLayout, causal: bool) -> bool:
    def output(*qkv: Tensor) -> Tensor:
        parts = (Shard.apply(x, layout) for x in qkv)
        kwargs = {"layout": layout, "cp_group": dist.group.WORLD, "causal": causal}
        return Unshard.apply(ring_attention(*parts, **kwargs).output, layout)

    return torch.autograd.gradcheck(output, [x.requires_grad_() for x in tensors])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("num_ranks", "lengths", "order"), [(2, (4, 1), "contiguous"), (3, (1, 6), "zigzag")]
)
def test_gradcheck_over_ranks(num_ranks, lengths, order, causal) -> None:
    tensors = random_tensors(sum(lengths), 2, 1, 2, torch.float64)[:3]
    layout = SequenceLayout(lengths, num_ranks, order)
    assert all(run_on_ranks(gradcheck_on_world, num_ranks, tensors, layout, causal))


# ---- properties ----------------------------------------------------------------------------------


@pytest.mark.parametrize("block", ["cpu_flash", "eager"])
def test_autocast_casts_the_inputs_and_nothing_else(block: str) -> None:
    q, k, v = (x.requires_grad_() for x in random_tensors(30, 4, 2, 8, torch.float32)[:3])
    v = v.detach().bfloat16().requires_grad_()  # as from a linear layer under autocast
    plain = ring_attention(q.bfloat16(), k.bfloat16(), v, block=block)
    plain_grads = torch.autograd.grad(plain.output.sum(), (q, k, v))
    with torch.autocast("cpu", torch.bfloat16):
        cast = ring_attention(q, k, v, block=block)
        cast_grads = torch.autograd.grad(cast.output.sum(), (q, k, v))
    assert (cast.output.dtype, cast.lse.dtype) == (torch.bfloat16, torch.float32)
    for name, a, b in zip(NAMES, (*plain, *plain_grads), (*cast, *cast_grads), strict=True):
        assert torch.equal(a, b), name


def tile_a_key() -> RingSchedule:
    """Schedule of one rank alone, with two runs: the second sees the first key by key."""
    schedule = plan_ring(SequenceLayout((64,), 2, "zigzag"), 0, True)
    tiles = tuple(KVTile(0, RowRange(16, 32), (RowRange(s, s + 1),)) for s in range(16))
    return replace(schedule, own_tiles=tiles, stages=())


def test_rows_are_merged_over_tiles_in_float32() -> None:
    *qkv, _ = random_tensors(32, 4, 2, 8, torch.bfloat16)
    q, k, v = qkv = QKV(*qkv)
    schedule, block = tile_a_key(), BLOCKS["cpu_flash"]
    output, lse = passes.forward(q, (k, v), passes.RingContext(schedule, None, block, 1.0))
    local = block.forward_varlen(
        qkv, segments_of(schedule.fragment_borders, q.device, CAUSAL), scale=1.0
    )
    assert local.output.dtype == torch.bfloat16
    merged = Partial(local.output[16:].float(), local.lse[16:])
    for s in range(16):
        key = QKV(q[16:], k[s : s + 1], v[s : s + 1])
        merged = merge(merged, block.forward(key, window=EVERYTHING, scale=1.0))
    assert torch.equal(output[16:], merged.output.bfloat16())
    assert torch.equal(lse[16:], merged.lse)
    assert torch.equal(output[:16], local.output[:16])


def test_dq_is_summed_over_tiles_in_float32() -> None:
    *qkv, doutput = random_tensors(32, 4, 2, 8, torch.bfloat16)
    block = BLOCKS["cpu_flash"]
    parts = []

    def recorded(*args, **kwargs) -> QKV:
        parts.append(type(block).backward(block, *args, **kwargs))
        return QKV(*(x.clone() for x in parts[-1]))

    context = passes.RingContext(tile_a_key(), None, block, 1.0)
    q, *kv = qkv
    merged = passes.forward(q, kv, context)
    with patch.object(block, "backward", recorded):  # the varlen form calls it for each fragment
        dq, _, _ = passes.backward(doutput, None, merged, q, kv, context)
    assert {part.q.dtype for part in parts} == {torch.bfloat16}
    tiles, local = parts[:16], parts[16:]
    assert len(local) == 2
    total = torch.zeros(16, 4, 8)
    for part in tiles:
        total += part.q
    assert torch.equal(dq[16:], (total + local[1].q).bfloat16())
    assert torch.equal(dq[:16], local[0].q)


@pytest.mark.parametrize("causal", [True, False])
def test_rows_of_a_batch_are_documents_of_one_length(causal: bool) -> None:
    rows, tokens = 3, 13
    tensors = random_tensors(rows * tokens, 4, 2, 5, torch.float64)
    batch = [x.unflatten(0, (rows, tokens)) for x in tensors]
    expected = oracle(tensors, (tokens,) * rows, causal)
    layout = SequenceLayout((tokens,), 2, "zigzag")
    results = run_on_ranks(batch_on_world, 2, batch, layout, causal)
    for name, parts, b in zip(NAMES, zip(*results), expected):
        actual = layout.unshard(parts, dim=1).flatten(0, 1)
        assert_equal_to_rounding(actual, b, what=name)


def batch_on_world(batch, layout: SequenceLayout, causal: bool) -> list[Tensor]:
    *qkv, doutput = (layout.shard(x, dist.get_rank(), dim=1) for x in batch)
    qkv = [x.detach().requires_grad_() for x in qkv]
    output, lse = ring_attention(*qkv, layout=layout, cp_group=dist.group.WORLD, causal=causal)
    output.backward(doutput)
    return [x.detach() for x in (output, lse, *(x.grad for x in qkv))]


def test_without_a_layout_the_tokens_are_one_document() -> None:
    tensors = random_tensors(9, 4, 2, 5, torch.float64)
    output, lse = ring_attention(*tensors[:3])
    expected = oracle(tensors, (9,), causal=True)
    assert_equal_to_rounding(output, expected[0])
    assert_equal_to_rounding(lse, expected[1])


def test_inputs_may_be_views_of_one_projection() -> None:
    fused = torch.randn(9, 4, 5, 3, dtype=torch.float64)  # head dim last but one, strided
    q, k, v = (fused[:, :, :, i] for i in range(3))
    expected = oracle((q, k, v, torch.ones_like(q)), (9,), causal=True)
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    output, lse = ring_attention(q, k, v)
    output.sum().backward()
    assert_all_equal((output.detach(), lse, q.grad, k.grad, v.grad), expected)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("causal", [True, False])
def test_padding_rows_are_finite(order, causal: bool) -> None:
    layout = SequenceLayout((2, 3), 4, order)
    assert layout.num_padding_tokens == 3
    tensors = random_tensors(layout.num_tokens, 2, 1, 4, torch.float64)
    real = [x[: layout.num_real_tokens] for x in tensors]
    results = run_on_ranks(on_world, 4, tensors, layout, causal=causal)
    assert all(x.isfinite().all() for result in results for x in result)
    assert_all_equal(unshard_all(layout, results), oracle(real, (2, 3), causal))
