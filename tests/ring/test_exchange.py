from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lasp.layout import SequenceLayout
from ring.schedule import plan_ring
from tests.ranks import run_on_ranks, subgroup
from tests.ring.cases import (
    ORDERS,
    assert_all_equal,
    forward_backward,
    on_world,
    oracle,
    random_tensors,
    unshard_all,
)


def alone_on_rank_0(tensors, layout: SequenceLayout, causal: bool) -> list[Tensor] | None:
    """Any collective would wait for the other ranks, which stay away, until it times out."""
    return on_world(tensors, layout, causal=causal) if dist.get_rank() == 0 else None


@pytest.mark.parametrize("causal", [True, False])
def test_no_collective_where_no_document_is_cut(causal: bool) -> None:
    tensors = random_tensors(16, 2, 1, 4, torch.float64)
    layout = SequenceLayout((3, 5, 8), 2)
    first, second = run_on_ranks(alone_on_rank_0, 2, tensors, layout, causal)
    assert second is None
    expected = oracle(tensors, (3, 5, 8), causal)
    assert_all_equal(first, [x[:8] for x in expected])


def counted_on_world(tensors, layout: SequenceLayout) -> list[tuple[int, torch.dtype]]:
    """Elements that each all-to-all brought, and their dtype."""
    calls, original = [], dist.all_to_all_single

    def counting(received, *args, **kwargs):
        calls.append((received.numel(), received.dtype))
        return original(received, *args, **kwargs)

    dist.all_to_all_single = counting
    try:
        on_world(tensors, layout)
    finally:
        dist.all_to_all_single = original
    return calls


@pytest.mark.parametrize("order", ORDERS)
def test_only_needed_keys_move_and_their_gradients_return_in_float32(order) -> None:
    lengths, kv_heads, head_dim = (7, 2, 20, 1), 2, 4
    tensors = random_tensors(30, 6, kv_heads, head_dim, torch.bfloat16)
    layout = SequenceLayout(lengths, 3, order)
    for rank, calls in enumerate(run_on_ranks(counted_on_world, 3, tensors, layout)):
        schedule = plan_ring(layout, rank, True)
        needed, lent = (
            2 * kv_heads * head_dim * sum(tokens)
            for tokens in (schedule.received_tokens, schedule.sent_tokens)
        )
        fetch = (needed, torch.bfloat16)
        assert calls == [fetch, fetch, (lent, torch.float32)]


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
