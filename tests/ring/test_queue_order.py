"""What a rank queues when: transfers, local attention and tiles, forward and backward."""

from __future__ import annotations

import math
from unittest.mock import Mock, patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lasp.sequence.layout import SequenceLayout
from ring.blocks.gradients import LocalGradients, RowGradients
from ring.blocks.interface import QKV, Block, segments_of
from ring.blocks.merge import Accumulator, Partial
from ring.blocks.registry import BLOCKS, resolve_block
from ring.passes import RingContext, forward
from ring.planner.ranges import RowRange, union
from ring.planner.schedule import plan_ring
from ring.planner.stages import StageRule
from ring.planner.window import CAUSAL
from tests.ranks import run_on_ranks
from tests.ring.cases import (
    NOTHING_HIDES,
    ORDERS,
    PACKS,
    RULES,
    WHOLE,
    assert_all_equal,
    on_world,
    oracle,
    planned_by,
    random_tensors,
    unshard_all,
)


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
    """One that leaves its results where it is told to."""

    in_place = True

    def result_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return self.block.result_dtype(dtype)

    def forward_to(self, out, qkv, segments, **kwargs):
        super().forward_to(out, qkv, segments, **kwargs)
        self._name(qkv)

    def backward_to(self, out, doutput, merged, qkv, segments, **kwargs):
        super().backward_to(out, doutput, merged, qkv, segments, **kwargs)
        self._name(qkv)

    def _name(self, qkv: QKV) -> None:
        self.events[-1] = f"{'whole' if len(qkv.k) > len(qkv.q) else 'local'} {len(qkv.q)}"


def in_place_on_world(cases, rule: StageRule) -> list[tuple[list[Tensor], list[str]]]:
    results = []
    with planned_by(rule):
        for tensors, layout in cases:
            events: list[str] = []
            resolve_block.cache_clear()
            with patch.dict(BLOCKS, in_place=InPlaceBlock(events)):
                results.append((on_world(tensors, layout, block="in_place"), events))
    return results


def lengths_of(parts) -> list[str]:
    return [f"local {rows.length}" for rows in parts]


@pytest.mark.parametrize("rule", [RULES[0], RULES[3], RULES[5], WHOLE])
def test_parts_in_place_around_the_stages(rule: StageRule) -> None:
    """First what hides the keys that come, last what hides the gradients that go back.

    A fragment that is whole in a tile is in no other call. Results are those of one call.
    """
    layouts = [
        SequenceLayout(lengths, 3, order)
        for lengths, order in zip(PACKS, ORDERS * len(PACKS))
        if len(lengths) > 2
    ]
    layouts.append(SequenceLayout((9, 30, 5, 60), 3, "fold"))
    cases = [(random_tensors(sum(x.document_lengths), 4, 2, 4, torch.float64), x) for x in layouts]
    rule = rule._replace(call_pairs=1, call_rows=1)
    results = run_on_ranks(in_place_on_world, 3, cases, rule)
    before, found = 0, set()
    for (tensors, layout), *of_ranks in zip(cases, *results):
        expected = oracle(tensors, layout.document_lengths, True)
        assert_all_equal(unshard_all(layout, [found for found, _ in of_ranks]), expected)
        for rank, (_, events) in enumerate(of_ranks):
            schedule = plan_ring(layout, rank, True, rule)
            first, last = lengths_of(schedule.before), lengths_of(schedule.after)
            if first:
                backward = events[events.index(first[0]) :]
                assert backward[: len(first)] == first
                assert backward[-len(last) :] == last
                before += 1
            whole = {
                tile.rows
                for stage in schedule.stages
                for g in stage.groups
                for tile in g
                if tile.whole
            }
            assert union((*schedule.alone, *whole)) == (RowRange(0, layout.num_local_tokens),)
            found |= {event.split()[0] for event in events}
    assert before > 2
    assert found >= ({"local", "whole"} if rule.pairs_per_token == 1 else {"local", "tile"})


def test_a_gradient_of_the_lse_that_takes_a_second_call_is_written_too() -> None:
    q, k, v, doutput = random_tensors(8, 2, 1, 4, torch.float64)
    block, segments = InPlaceBlock([]), segments_of((0, 8), q.device, CAUSAL)
    merged = block.forward_varlen(QKV(q, k, v), segments, scale=1.0)
    rows = RowGradients(block, doutput, torch.ones_like(merged.lse), Partial(*merged), 1.0)
    out = rows.result_memory(QKV(q, k, v))
    rows.write(slice(0, 8), segments, QKV(q, k, v), out)
    for written, found in zip(out, rows.within(segments, QKV(q, k, v))):
        assert torch.equal(written, found)


def test_rows_that_are_written_have_their_gradients_of_the_lse() -> None:
    """A block that takes them is given those of its rows."""
    q, k, v, doutput = random_tensors(8, 2, 1, 4, torch.float64)
    dlse, some, block = torch.randn(8, 2, dtype=torch.float64), slice(2, 6), Mock()
    part, segments = QKV(q[some], k[some], v[some]), segments_of((0, 4), q.device, CAUSAL)
    rows = RowGradients(block, doutput, dlse, Partial(q, q[..., 0]), 1.0)
    rows.write(some, segments, part, QKV(*map(torch.empty_like, part)))
    assert torch.equal(block.with_dlse.call_args.args[0], dlse[some])
    block.with_dlse.return_value.backward_to.assert_called_once()
    block.backward_to.assert_not_called()


def test_a_block_that_does_not_write_in_place_gets_no_memory() -> None:
    q, k, v, doutput = random_tensors(8, 2, 1, 4, torch.float64)
    rows = RowGradients(RecordingBlock([]), doutput, None, Partial(q, q[..., 0]), 1.0)
    local = LocalGradients(QKV(q, k, v), rows, plan_ring(SequenceLayout((8,), 1), 0, True))
    with patch("torch.empty_like") as allocated:
        local.before_stages()
    assert not allocated.called


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
