from __future__ import annotations

from contextlib import nullcontext
from unittest.mock import Mock, patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lasp.sequence.layout import SequenceLayout
from ring import exchange
from ring.exchange import (
    GradientSums,
    pack_messages,
    receive_memory,
    send_kv_grads,
    unpack_messages,
)
from ring.planner.ranges import RowRange, TokenIndex
from ring.planner.schedule import KVSlice, plan_ring
from ring.planner.stages import StageRule
from tests.ranks import run_on_ranks
from tests.ring.cases import (
    ORDERS,
    RULES,
    assert_all_equal,
    on_world,
    oracle,
    planned_by,
    random_tensors,
)


def alone_on_rank_0(tensors, layout: SequenceLayout, causal: bool) -> list[Tensor] | None:
    """Any collective would wait for the other ranks, which stay away, until it times out.

    But for the first call on a group, in which ranks compare how they call.
    """
    on_world(tensors, layout, causal=causal)
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
def test_ranks_start_the_same_exchanges_and_move_what_is_needed(order, rule) -> None:
    """Every rank starts all of them, even with nothing to send: else the others would hang."""
    lengths, kv_heads, head_dim, value_dim, ranks = (7, 2, 20, 1), 2, 4, 3, 3
    tensors = random_tensors(30, 6, kv_heads, head_dim, torch.bfloat16, value_dim)
    layout = SequenceLayout(lengths, ranks, order)
    schedules = [plan_ring(layout, rank, True, rule) for rank in range(ranks)]
    size = kv_heads * (head_dim + value_dim)  # k and v of a token
    logs = run_on_ranks(logged_on_world, ranks, tensors, layout, rule)
    for schedule, calls in zip(schedules, logs):
        fetches = [
            (size * stage.tokens, size * sum(stage.kv_exchange.send_tokens), torch.bfloat16)
            for stage in schedule.stages
        ]
        returns = [
            (size * sum(stage.grad_exchange.receive_tokens), size * stage.tokens, torch.float32)
            for stage in schedule.stages
        ]
        ahead = 1 if schedule.route == "chain" else 2  # of the gradients
        backward = fetches[:ahead]
        for fetch, back in zip((*fetches[ahead:], *[None] * ahead), returns):
            backward += [back] if fetch is None else [fetch, back]
        assert calls == [*fetches, *backward]  # one for each stage and direction
        received = sum(call[0] for call in calls[: len(fetches)])
        assert received == size * schedule.received_tokens


def test_a_message_is_all_k_then_all_v_of_a_rank() -> None:
    k, v = torch.arange(6.0)[:, None, None], 10 + torch.arange(12.0).view(6, 1, 2) / 2
    kv_buffer = (100 + k, 100 + v)
    sends = (
        (KVSlice(False, RowRange(4, 6)), KVSlice(True, RowRange(0, 1))),
        (),
        (KVSlice(False, RowRange(0, 1)),),
    )
    messages = pack_messages(sends, (k, v), kv_buffer)
    first = [4, 5, 100, 14, 14.5, 15, 15.5, 110, 110.5]
    assert messages.flatten().tolist() == [*first, 0, 10, 10.5]
    keys, values = unpack_messages(messages, (3, 0, 1), (k, v))
    assert keys.flatten().tolist() == [4, 5, 100, 0]
    assert values.tolist() == [[[14, 14.5]], [[15, 15.5]], [[110, 110.5]], [[10, 10.5]]]
    assert pack_messages(((), ()), (k, v), kv_buffer).shape == (0, 3)


def test_what_comes_from_one_rank_is_used_where_it_lies() -> None:
    messages, like = torch.randn(4, 14), (torch.empty(9, 2, 4), torch.empty(9, 2, 3))
    for tokens in ((0, 4), (4, 0, 0)):
        k, v = unpack_messages(messages, tokens, like)
        assert torch.equal(torch.cat((k.flatten(), v.flatten())), messages.flatten())
        assert k.data_ptr() == messages.data_ptr()
        assert v.data_ptr() == messages.flatten()[32:].data_ptr()
    assert [x.shape for x in unpack_messages(messages[:0], (0, 0), like)] == [(0, 2, 4), (0, 2, 3)]


def test_gradients_for_one_rank_are_sent_from_where_they_lie() -> None:
    sent: list[Tensor] = []
    like = torch.empty(9, 2, 4), torch.empty(9, 2, 3)
    with patch.object(
        dist, "all_to_all_single", lambda _, message, *args, **kwargs: sent.append(message)
    ):
        for lengths, ranks, views in (((999, 5, 996), 2, True), ((40,), 5, False)):
            for stage in plan_ring(SequenceLayout(lengths, ranks), ranks - 1, True).stages:
                tokens = TokenIndex([(0, stage.tokens)])
                sums = GradientSums(tokens, like, torch.float32, once=False)
                send_kv_grads(stage, sums.memory, sums.kv, None)
                assert sent[-1].shape == (stage.tokens, 14)
                assert (sent[-1].data_ptr() == sums.memory.data_ptr()) is views
    assert len(sent) == 2


@pytest.mark.parametrize("rule", RULES)
def test_stages_take_turns_in_two_buffers(rule: StageRule) -> None:
    k = torch.randn(60, 2, 4)
    schedule = plan_ring(SequenceLayout((300,), 5), 4, True, rule)
    buffers = receive_memory((k, k), schedule)
    rows = [stage.tokens for stage in schedule.stages]
    assert [buffer.shape for buffer in buffers] == [(n, 16) for n in rows]
    assert all(buffer.is_contiguous() for buffer in buffers)
    assert len({buffer.data_ptr() for buffer in buffers}) == min(2, len(buffers))


def test_transfers_get_multiprocessors_before_the_attention() -> None:
    """What a stream would do; nothing where nothing is sent or received."""
    asleep: list[int] = []
    moving, still = (
        Mock(exchange=Mock(send_tokens=(0, n), receive_tokens=(0, 0)), received=Mock(is_cuda=True))
        for n in (1, 0)
    )
    with (
        patch.object(torch.cuda, "_sleep", asleep.append),
        patch.object(torch.cuda, "device_of", nullcontext),
    ):
        exchange.yield_sms()
        exchange.yield_sms(still)
        assert not asleep
        exchange.yield_sms(still, moving)
        assert asleep == [exchange.HEAD_START_CYCLES]
        moving.received.is_cuda = still.received.is_cuda = False
        exchange.yield_sms(moving, still)
    assert len(asleep) == 1


def test_a_chain_yields_sms_to_each_transfer() -> None:
    schedule = plan_ring(SequenceLayout((64,), 4), 1, True, StageRule(3, 1, chain_gain=0.0))
    assert schedule.route == "chain"
    assert len(schedule.stages) > 1
    k, v, _, _ = random_tensors(16, 1, 1, 4, torch.float32)
    yields: list[int] = []
    with (
        patch.object(dist, "all_to_all_single", lambda received, *_, **__: Mock()),
        patch.object(exchange, "yield_sms", lambda *transfers: yields.append(len(transfers))),
    ):
        for _ in exchange.KVPrefetcher((k, v), schedule, None):
            pass
    assert yields == [1] * len(schedule.stages) + [0]
