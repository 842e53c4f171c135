from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lasp.sequence.layout import SequenceLayout
from ring.planner.ranges import RowRange
from ring.planner.schedule import RingSchedule, plan_ring
from ring.planner.stages import RULE, StageRule
from ring.planner.tiles import KVTile, side_by_side
from ring.planner.window import EVERYTHING, Window
from tests.lasp.distributions import document_lengths as distribution
from tests.ring.cases import ORDERS, PACKS, RULES

LAYOUTS = st.builds(
    SequenceLayout,
    st.lists(st.integers(0, 12), min_size=1, max_size=8).filter(sum).map(tuple),
    st.integers(1, 5),
    st.sampled_from((*ORDERS, "document_zigzag")),
)


def expand(ranges) -> list[int]:
    return [position for start, stop in ranges for position in range(start, stop)]


def check_tokens(exchange, num_ranks: int) -> None:
    for parts, tokens in (
        (exchange.sends, exchange.send_tokens),
        (exchange.receives, exchange.receive_tokens),
    ):
        assert len(tokens) == num_ranks
        assert tokens == tuple(sum(part.rows.length for part in some) for some in parts)


def by_peer(parts, held, kv_buffer) -> list[list[int]]:
    """Pack positions sent to, or received from, each rank."""
    return [
        [(kv_buffer if in_buffer else held)[i] for in_buffer, where in some for i in range(*where)]
        for some in parts
    ]


def check_exchanges(layout: SequenceLayout, schedules: list[RingSchedule]) -> None:
    """Sender and receiver agree, only what is held is sent, and all gradients come home, once."""
    ranks = range(layout.num_ranks)
    held = [expand(layout.runs(rank)) for rank in ranks]
    stages = [schedule.stages for schedule in schedules]
    assert len({len(some) for some in stages}) == 1
    kv_buffers = [[expand(stage.keys) for stage in some] + [[]] for some in stages]
    home = [Counter() for _ in ranks]  # how many ranks' gradients came back, by own token
    carried = [Counter() for _ in ranks]  # likewise, by token of the next kv buffer
    for s in range(len(stages[0])):
        fetch = [some[s].kv_exchange for some in stages]
        back = [some[s].grad_exchange for some in stages]
        for exchange in (*fetch, *back):
            check_tokens(exchange, layout.num_ranks)
        assert not any(
            part.in_buffer for r in ranks if s == 0 for some in fetch[r].sends for part in some
        )
        sent, got, returned, came = (
            [by_peer(parts, held[r], kv_buffers[r][of]) for r, parts, of in some]
            for some in (
                [(r, fetch[r].sends, s - 1) for r in ranks],
                [(r, fetch[r].receives, s) for r in ranks],
                [(r, back[r].sends, s) for r in ranks],
                [(r, back[r].receives, s + 1) for r in ranks],
            )
        )
        # Own gradients, and those before.
        now = [Counter(kv_buffers[r][s]) + carried[r] for r in ranks]
        carried = [Counter() for _ in ranks]
        for r in ranks:
            assert [x for some in got[r] for x in some] == kv_buffers[r][s]
            assert Counter(x for some in returned[r] for x in some) == Counter(kv_buffers[r][s])
            for peer in ranks:
                assert sent[r][peer] == got[peer][r]
                assert returned[r][peer] == came[peer][r]
                for x in returned[r][peer]:
                    into = home if x in held[peer] else carried
                    into[peer][x] += now[r][x]
    users = Counter(x for some in kv_buffers for kv_buffer in some for x in kv_buffer)
    assert sum(home, Counter()) == users


def pairs_of(tile: KVTile, schedule: RingSchedule, held: list[int], buffer: list[int]):
    """(query, key) positions of a tile; ``held`` and ``buffer`` are those of the rank's tokens."""
    of_rectangle = range(*schedule.rows[tile.rectangle])
    rows, seen = range(*tile.rows), tile.window
    assert set(rows) <= set(of_rectangle)
    assert len(rows)
    assert schedule.slides or rows == of_rectangle
    assert tile.keys
    assert len((*tile.own, *tile.keys)) == 1 or not seen.slides
    columns = [held[s] for s in expand(tile.own)] + [buffer[s] for s in expand(tile.keys)]
    if tile.whole:
        columns += [held[s] for s in rows]
        seen = schedule.window
    assert len(columns) == tile.num_keys
    ahead = len(columns) - len(rows)
    for i, t in enumerate(rows):
        low = i + ahead - seen.left if seen.left >= 0 else 0
        high = i + ahead + seen.right if seen.right >= 0 else len(columns)
        found = [s for j, s in enumerate(columns) if low <= j <= high]
        assert found  # kernels fault on rows without keys
        yield from ((held[t], s) for s in found)


def check_schedule(
    layout: SequenceLayout, causal: bool, rule: StageRule = RULE, window: Window = EVERYTHING
) -> None:
    """Every allowed pair once, and every needed token once."""
    ranks = range(layout.num_ranks)
    schedules = [plan_ring(layout, rank, causal, rule, window) for rank in ranks]
    left, right = (side if side >= 0 else layout.num_tokens for side in window)

    def sees(t: int, s: int) -> bool:
        return (s <= t or not causal) and t - left <= s <= t + right

    def within(fragments: list[RowRange], held: list[int]) -> list[tuple[int, int]]:
        tokens = ([held[i] for i in range(*some)] for some in fragments)
        return [(t, s) for some in tokens for t in some for s in some if sees(t, s)]

    document = [
        n for n in range(len(layout.borders) - 1) for _ in range(*layout.borders[n : n + 2])
    ]
    for rank, schedule in enumerate(schedules):
        held = expand(layout.runs(rank))  # pack position of each token of the rank
        fragments = [
            RowRange(fragment.offset, fragment.offset + fragment.stop - fragment.start)
            for fragment in layout.fragments(rank)
        ]
        kv_buffers = [expand(stage.keys) for stage in schedule.stages]

        tiles = [(tile, held) for tile in schedule.own_tiles]
        grouped = list(tiles)
        for stage, kv_buffer in zip(schedule.stages, kv_buffers):
            tiles += [(tile, kv_buffer) for tile in stage.tiles]
            grouped += [(tile, kv_buffer) for group in stage.groups for tile in group]
        with_tiles = {t.rectangle for stage in schedule.stages for t in stage.tiles}
        if not schedule.slides and rule.most_joined >= layout.num_tokens:
            assert all(tile.rectangle not in with_tiles for tile in schedule.own_tiles)
        pairs = within(fragments, held)
        pairs += [pair for tile, buffer in tiles for pair in pairs_of(tile, schedule, held, buffer)]
        borders = schedule.borders_within
        alone = [
            RowRange(rows.start + start, rows.start + stop)
            for rows in schedule.alone
            for start, stop in pairwise(borders[rows])
        ]
        assert set(alone) <= set(fragments)
        by_groups = within(alone, held)
        for tile, buffer in grouped:
            by_groups += pairs_of(tile, schedule, held, buffer)
        assert sorted(by_groups) == sorted(pairs)
        real = {
            start + i
            for start, length in zip(layout.document_starts, layout.document_lengths)
            for i in range(length)
        }
        allowed = {
            (t, s)
            for t in held
            for s in real
            if t in real and document[t] == document[s] and sees(t, s)
        }
        covered = [pair for pair in pairs if pair[0] in real]
        assert len(covered) == len(set(covered))
        assert set(covered) == allowed
        assert all(document[t] == document[s] and s in held for t, s in pairs if t not in real)

        needed = {s for _, s in allowed} - set(held)
        assert sorted(x for kv_buffer in kv_buffers for x in kv_buffer) == sorted(needed)
        assert schedule.received_tokens == len(needed)
    assert len({schedule.route for schedule in schedules}) == 1
    moved = sum(schedule.received_tokens for schedule in schedules)
    assert moved == sum(schedule.sent_tokens for schedule in schedules)
    assert bool(schedules[0].stages) == (moved > 0) == (schedules[0].route != "none")
    check_exchanges(layout, schedules)


SIDES = st.sampled_from((-1, -1, 0, 1, 2, 3, 5, 9, 40))


@settings(max_examples=250, deadline=None)
@given(LAYOUTS, st.booleans(), st.sampled_from(RULES), st.builds(Window, SIDES, SIDES))
def test_covers_every_allowed_pair_once_and_moves_what_is_needed(
    layout, causal, rule, window
) -> None:
    check_schedule(layout, causal, rule, window)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("causal", [True, False])
def test_adversarial_packs(order, causal: bool) -> None:
    for index, lengths in enumerate(PACKS):
        for num_ranks in (1, 2, 3, 8):
            rule = RULES[(index + num_ranks) % len(RULES)]
            check_schedule(SequenceLayout(lengths, num_ranks, order), causal, rule)


def test_example_of_the_module_docstring() -> None:
    layout = SequenceLayout((8,), 2, "zigzag")
    first, second = (plan_ring(layout, rank, True) for rank in (0, 1))
    assert first.rows == (RowRange(2, 4),)
    assert not first.own_tiles
    (stage,) = first.stages
    assert stage.keys == (RowRange(2, 6),)
    own = (RowRange(0, 2),)
    assert stage.tiles == (KVTile(0, RowRange(2, 4), (RowRange(0, 4),), own=own),)
    assert second.rows == (RowRange(0, 4),)
    assert not second.own_tiles
    assert second.stages[0].keys == (RowRange(0, 2),)

    two = StageRule(max_stages=2, min_tokens=2, pairs_per_token=10**9)
    first, second = (plan_ring(layout, rank, True, two) for rank in (0, 1))
    assert [stage.keys for stage in first.stages] == [(RowRange(2, 4),), (RowRange(4, 6),)]
    assert [stage.keys for stage in second.stages] == [(RowRange(0, 2),), ()]


@pytest.mark.parametrize("order", ORDERS)
def test_a_causal_rank_has_at_most_one_rectangle_a_run(order) -> None:
    for lengths in PACKS:
        layout = SequenceLayout(lengths, 4, order)
        for rank in range(4):
            assert len(plan_ring(layout, rank, True).rows) <= len(layout.runs(rank))


def test_keys_that_two_rectangles_need_are_received_once() -> None:
    # Both runs of rank 1 (pieces 1 and 4 of 6) need piece 0, which rank 0 holds.
    schedule = plan_ring(SequenceLayout((12,), 3, "zigzag"), 1, True)
    assert len(schedule.rows) == 2
    assert [stage.keys for stage in schedule.stages] == [(RowRange(0, 2), RowRange(4, 8))]
    assert schedule.stages[0].tiles == (
        KVTile(0, RowRange(0, 2), (RowRange(0, 2),)),
        KVTile(1, RowRange(2, 4), (RowRange(0, 6),), own=(RowRange(0, 2),)),
    )


@pytest.mark.parametrize("causal", [True, False])
def test_nothing_moves_where_no_document_is_cut_by_a_rank_border(causal: bool) -> None:
    layout = SequenceLayout((3, 5, 0, 8, 1, 7), 3)
    for rank in range(3):
        schedule = plan_ring(layout, rank, causal)
        assert not schedule.rows
        assert not schedule.stages
        assert schedule.route == "none"


@pytest.mark.parametrize("causal", [True, False])
def test_padding_cut_by_a_rank_border_does_not_move(causal: bool) -> None:
    layout = SequenceLayout((1,), 8)
    assert layout.num_padding_tokens == 7
    assert not plan_ring(layout, 5, causal).stages


def test_tiles_whose_rows_follow_each_other_are_a_group() -> None:
    first, second, third = (
        KVTile(number, RowRange(*rows), (RowRange(*keys),))
        for number, (rows, keys) in enumerate(
            (((0, 4), (0, 9)), ((4, 6), (9, 10)), ((7, 9), (2, 3)))
        )
    )
    tiles = (first, second, third)
    assert side_by_side(tiles, 10) == ((first, second), (third,))
    assert side_by_side(tiles, 9) == ((first,), (second,), (third,))
    slides = second._replace(window=Window(3))
    assert side_by_side((first, slides), 10) == ((first,), (slides,))
    own = second._replace(own=(RowRange(0, 1),))
    assert side_by_side((first, own), 10) == ((first,), (own,))


def test_keys_of_every_query_head_are_not_copied() -> None:
    """Many heads of keys cost more to copy than a second pass over as many heads of queries."""
    layout = SequenceLayout((8,), 2, "zigzag")
    schedule = plan_ring(layout, 0, True, grouped=False)
    assert [tile.num_keys for tile in schedule.own_tiles] == [2]
    (stage,) = schedule.stages
    assert [tile.num_keys for tile in stage.tiles] == [4]
    packed = SequenceLayout(distribution("A", 2**16, 0), 2, "fold")
    (stage,) = plan_ring(packed, 1, True, grouped=False).stages
    assert stage.groups == tuple((tile,) for tile in stage.tiles)


def test_groups_of_a_stage_hold_its_tiles() -> None:
    """Fold: a run inside a document that began before it, and the next one's first rows."""
    layout = SequenceLayout(distribution("A", 2**16, 0), 2, "fold")
    (stage,) = plan_ring(layout, 1, True).stages
    assert len(stage.tiles) == 2
    assert stage.groups == (tuple(tile._replace(whole=True) for tile in stage.tiles),)
