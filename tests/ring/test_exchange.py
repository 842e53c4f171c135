from __future__ import annotations

import math
from unittest.mock import Mock, patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lasp.layout import SequenceLayout
from ring.block import BLOCKS, Block
from ring.exchange import _packed, make_slabs
from ring.schedule import plan_ring
from ring.stages import StageRule
from tests.ranks import run_on_ranks, subgroup
from tests.ring.cases import (
    ORDERS,
    RULES,
    assert_all_equal,
    forward_backward,
    on_world,
    oracle,
    planned_by,
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


def logged_on_world(tensors, layout: SequenceLayout, rule: StageRule, **kwargs) -> list[tuple]:
    """What each all-to-all brought and sent on this rank: elements and dtype, in order."""
    calls, original = [], dist.all_to_all_single

    def logged(received, sent, *args, **kwargs):
        calls.append((received.numel(), sent.numel(), received.dtype))
        return original(received, sent, *args, **kwargs)

    with patch.object(dist, "all_to_all_single", logged), planned_by(rule):
        on_world(tensors, layout, **kwargs)
    return calls


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("keep_kv", [False, True])
def test_ranks_start_the_same_exchanges_and_move_what_is_needed(order, rule, keep_kv) -> None:
    """Every rank starts all of them, even with nothing to send: else the others would hang."""
    lengths, kv_heads, head_dim, ranks = (7, 2, 20, 1), 2, 4, 3
    tensors = random_tensors(30, 6, kv_heads, head_dim, torch.bfloat16)
    layout = SequenceLayout(lengths, ranks, order)
    schedules = [plan_ring(layout, rank, True, rule) for rank in range(ranks)]
    size, count = kv_heads * head_dim, len(schedules[0].stages)
    logs = run_on_ranks(logged_on_world, ranks, tensors, layout, rule, keep_kv=keep_kv)
    for schedule, calls in zip(schedules, logs):
        fetches = [
            (size * stage.tokens, size * sum(stage.fetch.send_tokens), torch.bfloat16)
            for stage in schedule.stages
        ]
        returns = [
            (size * sum(stage.give_back.receive_tokens), size * stage.tokens, torch.float32)
            for stage in schedule.stages
        ]
        backward = [*returns]
        if not keep_kv:  # the next fetch starts before the gradients of a stage are there
            backward = [fetches[0]]
            for fetch, back in zip((*fetches[1:], None), returns):
                backward += [back] if fetch is None else [fetch, back]
        assert calls == [call for call in (*fetches, *backward) for _ in "kv"]
        received = sum(call[0] for call in calls[: 2 * count])
        assert received == 2 * size * schedule.received_tokens


def test_what_lies_in_one_piece_is_sent_from_where_it_lies() -> None:
    k = torch.randn(1000, 2, 4)
    layout = SequenceLayout((999, 5, 996), 2)  # rank 1 needs one token, the last of rank 0
    (stage,) = plan_ring(layout, 0, True).stages
    sent = _packed(stage.fetch.sends, k, k)
    assert torch.equal(sent, k[999:])
    assert sent.data_ptr() == k[999:].data_ptr()
    dslab = torch.randn(2, stage.tokens, 2, 4)
    for some in plan_ring(SequenceLayout((40,), 5), 3, False).stages:  # of four owners
        returned = _packed(some.give_back.sends, dslab[0], torch.randn(some.tokens, 2, 4))
        assert len(returned) == some.tokens
        assert len(some.give_back.sends) == 1


@pytest.mark.parametrize("rule", RULES)
def test_stages_take_turns_in_two_buffers(rule: StageRule) -> None:
    k = torch.randn(60, 2, 4)
    schedule = plan_ring(SequenceLayout((300,), 5), 4, True, rule)
    kept, slabs = make_slabs(k, schedule, keep=False)
    lengths = [stage.tokens for stage in schedule.stages]
    assert [slab.shape for slab in slabs] == [(2, n, 2, 4) for n in lengths]
    assert all(x.is_contiguous() for slab in slabs for x in slab)
    assert kept.numel() == 0
    assert len({slab.data_ptr() for slab in slabs}) == min(2, len(slabs))
    kept, slabs = make_slabs(k, schedule, keep=True)
    assert kept.shape == (2, 240, 2, 4)
    assert len({slab.data_ptr() for slab in slabs}) == len(slabs)


class RecordingBlock(Block):
    """The eager block, noting when it starts."""

    def __init__(self, events: list[str]) -> None:
        self.events, self.block = events, BLOCKS["eager"]

    def obstacle(self, device, dtype, head_dim) -> None:
        return None

    def forward(self, *args, **kwargs):
        self.events.append("tile")
        return self.block.forward(*args, **kwargs)

    def backward(self, *args, **kwargs):
        self.events.append("tile")
        return self.block.backward(*args, **kwargs)

    def forward_varlen(self, *args, **kwargs):
        self.events.append("local")
        return self.block.forward_varlen(*args, **kwargs)

    def backward_varlen(self, *args, **kwargs):
        self.events.append("local")
        return self.block.backward_varlen(*args, **kwargs)


def events_on_world(tensors, layout: SequenceLayout, rule: StageRule, **kwargs) -> list[str]:
    """What starts when, forward then backward; a synchronous collective leaves no wait behind."""
    events, original = [], dist.all_to_all_single

    def recorded(received, *args, **kwargs):
        what = "kv" if received.dtype == torch.bfloat16 else "dkv"
        events.append(f"start {what}")
        work = original(received, *args, **kwargs)
        return work and Mock(wait=lambda: (events.append(f"wait {what}"), work.wait()))

    with (
        patch.object(dist, "all_to_all_single", recorded),
        patch.dict(BLOCKS, recording=RecordingBlock(events)),
        planned_by(rule),
    ):
        on_world(tensors, layout, block="recording", **kwargs)
    return events


def twice(*events: str) -> list[str]:
    """An exchange is one collective for k and one for v."""
    return [e for event in events for e in ([event] if event in COMPUTED else [event] * 2)]


COMPUTED = ("local", "tile")


@pytest.mark.parametrize("keep_kv", [False, True])
def test_a_stage_travels_under_the_attention_to_the_one_before(keep_kv: bool) -> None:
    tensors = random_tensors(16, 2, 1, 4, torch.bfloat16)
    rule = StageRule(max_stages=2, min_tokens=1, pairs_per_token=10**9, chain_gain=math.inf)
    forward = twice(
        *("start kv", "local", "wait kv", "start kv", "tile", "wait kv", "tile"),
    )
    fetched = twice(
        *("start kv", "local", "wait kv", "start kv", "tile", "start dkv"),
        *("wait kv", "tile", "wait dkv", "start dkv", "wait dkv"),
    )
    kept = twice("local", "tile", "start dkv", "tile", "wait dkv", "start dkv", "wait dkv")
    layout = SequenceLayout((16,), 2)
    for rank, events in enumerate(
        run_on_ranks(events_on_world, 2, tensors, layout, rule, keep_kv=keep_kv)
    ):
        expected = forward + (kept if keep_kv else fetched)
        if rank == 0:  # has nothing to attend to, but takes part
            expected = [event for event in expected if event != "tile"]
        assert events == expected


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
