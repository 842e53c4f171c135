from __future__ import annotations

import math
from contextlib import nullcontext
from unittest.mock import Mock, patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lasp.sequence.layout import SequenceLayout
from ring import exchange
from ring.blocks.interface import QKV, Block
from ring.blocks.merge import Accumulator
from ring.blocks.registry import BLOCKS, resolve_block
from ring.exchange import (
    GradientSums,
    pack_messages,
    receive_memory,
    send_kv_grads,
    unpack_messages,
)
from ring.passes import RingContext, forward
from ring.planner.ranges import RowRange, TokenIndex
from ring.planner.schedule import KVSlice, plan_ring
from ring.planner.stages import StageRule
from tests.ranks import run_on_ranks
from tests.ring.cases import (
    NOTHING_HIDES,
    ORDERS,
    PACKS,
    RULES,
    assert_all_equal,
    on_world,
    oracle,
    planned_by,
    random_tensors,
    unshard_all,
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


def test_a_transfer_starts_before_the_last_merge_of_a_stage() -> None:
    """Its kernel finds multiprocessors under a merge, but not under the next attention."""
    events: list[str] = []
    q, k, v, _ = random_tensors(8, 2, 1, 4, torch.float32)
    rule = StageRule(3, 1, NOTHING_HIDES, chain_gain=math.inf)
    schedule = plan_ring(SequenceLayout((16,), 2), 1, True, rule)
    context = RingContext(schedule, None, RecordingBlock(events), 1.0)

    def started(received: Tensor, *args, **kwargs):
        received.zero_()
        events.append("start")
        return Mock()

    with (
        patch.object(dist, "all_to_all_single", started),
        patch.object(Accumulator, "add", lambda *_: events.append("merge")),
    ):
        forward(q, (k, v), context)
    assert events == ["start", "start", "local", "tile", "start", "merge", *["tile", "merge"] * 2]


class RecordingBlock(Block):
    """The eager block, noting when it starts."""

    def __init__(self, events: list[str]) -> None:
        self.events, self.block = events, BLOCKS["eager"]

    def obstacle(self, operands) -> None:
        return None

    def forward(self, *args, **kwargs):
        self.events.append("tile")
        return self.block.forward(*args, **kwargs)

    def backward(self, *args, **kwargs):
        self.events.append("tile")
        return self.block.backward(*args, **kwargs)

    def forward_varlen(self, qkv, segments, **kwargs):
        self.events.append("local" if segments.borders is segments.key_borders else "tiles")
        return self.block.forward_varlen(qkv, segments, **kwargs)

    def backward_varlen(self, doutput, merged, qkv, segments, **kwargs):
        self.events.append("local" if segments.borders is segments.key_borders else "tiles")
        return self.block.backward_varlen(doutput, merged, qkv, segments, **kwargs)


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


def test_transfers_start_as_soon_as_a_buffer_is_free() -> None:
    tensors = random_tensors(16, 2, 1, 4, torch.bfloat16)
    rule = StageRule(3, 1, NOTHING_HIDES, chain_gain=math.inf)
    forward = [
        *("start kv", "start kv", "local", "wait kv", "tile", "start kv"),
        *("wait kv", "tile", "wait kv", "tile"),
    ]
    # The last gradients go back under the local attention.
    backward = [
        *("start kv", "start kv", "wait kv", "tile", "start kv", "start dkv"),
        *("wait kv", "tile", "wait dkv", "start dkv", "wait kv", "tile", "wait dkv", "start dkv"),
        *("local", "wait dkv"),
    ]
    layout = SequenceLayout((16,), 2)
    for rank, events in enumerate(run_on_ranks(events_on_world, 2, tensors, layout, rule)):
        expected = forward + backward
        if rank == 0:  # has nothing to attend to, but takes part
            expected = [event for event in expected if event != "tile"]
        assert events == expected


class InPlaceBlock(RecordingBlock):
    """One that leaves its gradients where it is told to."""

    def __init__(self, events: list[str], gradients: QKV | None = None) -> None:
        super().__init__(events)
        self.gradients = gradients

    def writing_to(self, gradients: QKV) -> InPlaceBlock:
        return InPlaceBlock(self.events, gradients)

    def backward_varlen(self, *args, **kwargs):
        found = super().backward_varlen(*args, **kwargs)
        if self.gradients is None or self.events[-1] == "tiles":
            return found
        self.events[-1] = f"local of {len(found.q)} rows"
        for x, gradient in zip(self.gradients, found):
            x.copy_(gradient)
        return self.gradients


def in_place_on_world(cases, rule: StageRule) -> list[tuple[list[Tensor], list[str]]]:
    results = []
    with planned_by(rule):
        for tensors, layout in cases:
            events: list[str] = []
            resolve_block.cache_clear()
            with patch.dict(BLOCKS, in_place=InPlaceBlock(events)):
                results.append((on_world(tensors, layout, block="in_place"), events))
    return results


@pytest.mark.parametrize("rule", [RULES[0], RULES[3], RULES[5]])
def test_early_rows_go_before_the_stages(rule: StageRule) -> None:
    """Where a block can; the first transfer of keys is under them, the last one of gradients not.

    Results are those of one call.
    """
    layouts = [
        SequenceLayout(lengths, 3, order)
        for lengths, order in zip(PACKS, ORDERS * len(PACKS))
        if len(lengths) > 2
    ]
    cases = [(random_tensors(sum(x.document_lengths), 4, 2, 4, torch.float64), x) for x in layouts]
    results = run_on_ranks(in_place_on_world, 3, cases, rule)
    early, side_by_side = 0, False
    for (tensors, layout), *of_ranks in zip(cases, *results):
        expected = oracle(tensors, layout.document_lengths, True)
        assert_all_equal(unshard_all(layout, [found for found, _ in of_ranks]), expected)
        for rank, (_, events) in enumerate(of_ranks):
            rows = plan_ring(layout, rank, True, rule).early
            parts = [event for event in events if event.startswith("local of")]
            counts = (rows, layout.num_local_tokens - rows)
            assert parts == [f"local of {n} rows" for n in counts if rows]
            if rows:
                first, last = (events.index(part) for part in parts)
                assert set(events[first + 1 : last]) <= {"tile", "tiles"}
                early += 1
            side_by_side |= "tiles" in events
    assert early > 2
    assert side_by_side


def test_a_link_of_a_chain_starts_when_the_one_before_is_there() -> None:
    tensors = random_tensors(24, 2, 1, 4, torch.bfloat16)
    rule = StageRule(3, 1, NOTHING_HIDES, chain_gain=0.0)
    stage = ("wait kv", "start kv", "tile")
    expected = ["start kv", "local", *stage, *stage, "wait kv", "tile"]
    results = run_on_ranks(events_on_world, 4, tensors, SequenceLayout((24,), 4), rule)
    assert results[3][: len(expected)] == expected  # the last rank has tiles in all stages
    transfers = [event for event in expected if event != "tile"]
    for events in results[:3]:
        assert [event for event in events if event != "tile"][: len(transfers)] == transfers
