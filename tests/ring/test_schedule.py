from __future__ import annotations

import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lasp.layout import SequenceLayout
from ring.schedule import Interval, plan_ring
from tests.ring.cases import ORDERS, PACKS

LAYOUTS = st.builds(
    SequenceLayout,
    st.lists(st.integers(0, 12), min_size=1, max_size=8).filter(sum).map(tuple),
    st.integers(1, 5),
    st.sampled_from(ORDERS),
)


def expand(intervals) -> list[int]:
    return [position for start, stop in intervals for position in range(start, stop)]


def check_schedule(layout: SequenceLayout, causal: bool) -> None:
    """Every allowed pair once, every needed token once, and sender and receiver agree."""
    schedules = [plan_ring(layout, rank, causal) for rank in range(layout.num_ranks)]
    document = [
        n for n in range(len(layout.borders) - 1) for _ in range(*layout.borders[n : n + 2])
    ]
    moved = 0
    for rank, schedule in enumerate(schedules):
        held = expand(layout.runs(rank))  # pack position of each token of the rank
        buffer = expand(i for intervals in schedule.receives for i in intervals)
        pairs = []
        for fragment in layout.fragments(rank):
            tokens = held[fragment.offset : fragment.offset + fragment.stop - fragment.start]
            pairs += [(t, s) for t in tokens for s in tokens if s <= t or not causal]
        for rectangle in schedule.rectangles:
            keys = [held[i] for i in expand(rectangle.own_keys)]
            keys += [buffer[i] for i in expand(rectangle.received_keys)]
            rows = [held[i] for i in range(*rectangle.rows)]
            assert rows
            assert keys
            pairs += [(t, s) for t in rows for s in keys]
        real = range(layout.num_real_tokens)
        allowed = {
            (t, s)
            for t in held
            for s in real
            if t in real and document[t] == document[s] and (s <= t or not causal)
        }
        covered = [pair for pair in pairs if pair[0] in real]
        assert len(covered) == len(set(covered))
        assert set(covered) == allowed
        assert all(document[t] == document[s] and s in held for t, s in pairs if t not in real)

        needed = {s for _, s in allowed} - set(held)
        assert len(buffer) == len(needed)
        assert set(buffer) == needed
        moved += len(needed)
        for source, other in enumerate(schedules):
            sent = [expand(layout.runs(source))[i] for i in expand(other.sends[rank])]
            assert sent == expand(schedule.receives[source])
            assert other.sent_tokens[rank] == schedule.received_tokens[source] == len(sent)
        assert not schedule.sends[rank]
    assert all(schedule.moves == (moved > 0) for schedule in schedules)


@settings(max_examples=250, deadline=None)
@given(LAYOUTS, st.booleans())
def test_covers_every_allowed_pair_once_and_moves_what_is_needed(layout, causal) -> None:
    check_schedule(layout, causal)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("causal", [True, False])
def test_adversarial_packs(order, causal: bool) -> None:
    for lengths in PACKS:
        for num_ranks in (1, 2, 3, 8):
            check_schedule(SequenceLayout(lengths, num_ranks, order), causal)


def test_example_of_the_module_docstring() -> None:
    layout = SequenceLayout((8,), 2, "zigzag")
    ((rows, own_keys, received_keys),) = plan_ring(layout, 0, True).rectangles
    assert rows == Interval(2, 4)
    assert own_keys == (Interval(0, 2),)
    assert received_keys == (Interval(0, 4),)
    assert plan_ring(layout, 0, True).receives == ((), (Interval(2, 6),))
    assert plan_ring(layout, 0, True).sends == ((), (Interval(0, 2),))
    assert plan_ring(layout, 1, True).rectangles == ((Interval(0, 4), (), (Interval(0, 2),)),)


@pytest.mark.parametrize("order", ORDERS)
def test_a_causal_rank_has_at_most_one_rectangle_a_run(order) -> None:
    for lengths in PACKS:
        layout = SequenceLayout(lengths, 4, order)
        for rank in range(4):
            assert len(plan_ring(layout, rank, True).rectangles) <= len(layout.runs(rank))


def test_keys_that_two_rectangles_need_are_received_once() -> None:
    # Both runs of rank 1 (pieces 1 and 4 of 6) need piece 0, which rank 0 holds.
    layout = SequenceLayout((12,), 3, "zigzag")
    schedule = plan_ring(layout, 1, True)
    assert len(schedule.rectangles) == 2
    assert schedule.receives == ((Interval(0, 2),), (), (Interval(4, 8),))


@pytest.mark.parametrize("causal", [True, False])
def test_nothing_moves_where_no_document_is_cut_by_a_rank_border(causal: bool) -> None:
    layout = SequenceLayout((3, 5, 0, 8, 1, 7), 3)
    for rank in range(3):
        schedule = plan_ring(layout, rank, causal)
        assert sum(schedule.received_tokens) == sum(schedule.sent_tokens) == 0
        assert not schedule.rectangles
        assert not schedule.moves


@pytest.mark.parametrize("causal", [True, False])
def test_padding_cut_by_a_rank_border_does_not_move(causal: bool) -> None:
    layout = SequenceLayout((1,), 8)
    assert layout.num_padding_tokens == 7
    assert not plan_ring(layout, 5, causal).moves


def test_planning_a_million_tokens_on_256_ranks_is_fast() -> None:
    random.seed(0)
    lengths = [min(int(random.lognormvariate(6.0, 1.5)), 152_000) for _ in range(600)]
    for pack in ((*lengths, 2**20 - sum(lengths)), (2**20,)):
        for order in ORDERS:
            layout = SequenceLayout(pack, 256, order)
            layout.fragments(0)  # the layout's own share
            times_s = []
            for rank in (0, 128, 255):
                start = time.perf_counter()
                plan_ring(layout, rank, False)
                times_s.append(time.perf_counter() - start)
            assert min(times_s) < 0.1, (order, times_s)
