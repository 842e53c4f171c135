from __future__ import annotations

from dataclasses import replace
from unittest.mock import Mock, patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lasp.layout import SequenceLayout
from ring.block import BLOCKS, Block
from ring.exchange import fetch_kv
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


class LargestAllocation(TorchDispatchMode):
    """Elements of the largest result that is not a view of an argument."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            for x in tree_leaves(result):
                self.elements = max(self.elements, x.numel())
        return result


def test_only_sent_tokens_are_copied() -> None:
    k, v = torch.randn(2, 1000, 2, 4)
    schedule = plan_ring(SequenceLayout((999, 5, 995), 2), 0, True)  # rank 1 needs one token
    with LargestAllocation() as largest:
        transfer = fetch_kv(k, v, replace(schedule, moves=False), None)
    assert torch.equal(transfer.sent, torch.stack((k[999:], v[999:]), dim=1))
    assert largest.elements == transfer.sent.numel()


class RecordingBlock(Block):
    """The eager block, noting when it starts."""

    def __init__(self, events: list[str]) -> None:
        self.events, self.block = events, BLOCKS["eager"]

    def obstacle(self, device, dtype, head_dim) -> None:
        return None

    def forward(self, *args, **kwargs):
        self.events.append("rectangle")
        return self.block.forward(*args, **kwargs)

    def backward(self, *args, **kwargs):
        self.events.append("rectangle")
        return self.block.backward(*args, **kwargs)

    def forward_varlen(self, *args, **kwargs):
        self.events.append("local")
        return self.block.forward_varlen(*args, **kwargs)

    def backward_varlen(self, *args, **kwargs):
        self.events.append("local")
        return self.block.backward_varlen(*args, **kwargs)


def events_on_world(tensors, layout: SequenceLayout) -> list[str]:
    """What starts when, forward then backward; a synchronous collective leaves no wait behind."""
    events, original = [], dist.all_to_all_single

    def recorded(*args, **kwargs):
        events.append("start")
        work = original(*args, **kwargs)
        return work and Mock(wait=lambda: (events.append("wait"), work.wait()))

    with (
        patch.object(dist, "all_to_all_single", recorded),
        patch.dict(BLOCKS, recording=RecordingBlock(events)),
    ):
        on_world(tensors, layout, block="recording")
    return events


def test_keys_travel_under_the_local_attention() -> None:
    tensors = random_tensors(16, 2, 1, 4, torch.float64)
    forward = ["start", "local", "wait", "rectangle"]
    backward = ["start", "local", "wait", "rectangle", "start", "wait"]
    for events in run_on_ranks(events_on_world, 2, tensors, SequenceLayout((16,), 2, "zigzag")):
        assert events == forward + backward


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
