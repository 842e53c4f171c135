from __future__ import annotations

import math
import time
from itertools import combinations_with_replacement

import pytest
import torch

from lasp.sequence.layout import SequenceLayout
from ring.planner.schedule import RingStage, plan_ring
from ring.planner.stages import RULE, StageRule, bucket, stage_tokens, stages_asked, stages_filled
from ring.planner.traffic import KVTraffic, plan_traffic
from ring.planner.window import CAUSAL, EVERYTHING
from tests.lasp.distributions import document_lengths as distribution
from tests.ring.cases import NOTHING_HIDES, ORDERS, mask

# ---- stages ----------------------------------------------------------------------------------


def test_buckets_have_three_bits() -> None:
    assert [bucket(n) for n in range(1, 18)] == [*range(1, 8), 8, 8, 10, 10, 12, 12, 14, 14, 16, 16]
    sizes = {bucket(n) for n in range(1024, 65537)}
    assert len(sizes) == 25  # four an octave
    assert all(bucket(n) <= n < 1.25 * bucket(n) for n in range(1024, 65537, 37))


def test_one_stage_where_it_hides_and_is_no_more_than_own_tokens() -> None:
    hidden = 10**12
    assert stages_asked(32768, hidden, 32768, RULE) == 1
    assert stages_asked(32769, hidden, 32768, RULE) == 2
    assert stages_asked(3 * 32768, hidden, 32768, RULE) == 3
    assert stages_asked(63 * 32768, hidden, 32768, RULE) == RULE.max_stages
    assert stages_asked(32768, 32768 * RULE.pairs_per_token, 32768, RULE) == 1
    assert stages_asked(32768, 32768 * RULE.pairs_per_token - 1, 32768, RULE) == 2
    assert stages_asked(32768, 0, 32768, RULE) == RULE.max_stages


def test_no_stage_of_less_than_the_least() -> None:
    assert stages_asked(8191, 0, 10, RULE) == 1
    assert [stages_filled(n, 4, RULE) for n in (0, 1, 8191, 8192, 12288, 10**6)] == [
        1,
        1,
        1,
        2,
        3,
        4,
    ]
    assert stage_tokens(0, [], 10, RULE) == []
    assert stage_tokens(3, [], 10, RULE) == [3]
    assert stage_tokens(8192, [1], 8192, RULE) == [4096, 4096]
    assert stage_tokens(8192, [8000], 8192, RULE) == [4096, 4096]


def test_borders_move_and_are_not_rounded_to_keep_kv_buffers_small() -> None:
    assert stage_tokens(3 * 9000, [9000, 18000], 9000, RULE) == [9000] * 3
    assert stage_tokens(3 * 9000, [9000, 18000], 9500, RULE) == [8192, 9500, 9308]
    assert stage_tokens(3 * 9000, [5000, 7000], 10240, RULE) == [6520, 10240, 10240]
    assert stage_tokens(3 * 9000, [9000, 18000], 20000, RULE) == [8192, 8192, 10616]


@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_stages_sum_to_what_is_needed_within_their_bounds(stages: int) -> None:
    rule = StageRule(stages, 3, 10)
    for needed in (1, 2, 5, 1000, 12345):
        for kv_buffer in (1, 400, 10**5):
            count = stages_filled(needed, stages, rule)
            for cuts in combinations_with_replacement((0, 1, needed // 2, needed), count - 1):
                sizes = stage_tokens(needed, cuts, kv_buffer, rule)
                assert sum(sizes) == needed
                assert len(sizes) == count
                assert min(sizes) >= min(3, needed)
                assert max(sizes) <= max(kv_buffer, -(-needed // count))


def pairs_by_stage(layout: SequenceLayout, causal: bool) -> list[list[int]]:
    """Pairs of a query and a received key, of each rank in each stage."""

    def pairs(stage: RingStage) -> int:
        return sum(t.rows.length * some.length for t in stage.tiles for some in t.keys)

    ranks = range(layout.num_ranks)
    return [[pairs(stage) for stage in plan_ring(layout, r, causal).stages] for r in ranks]


@pytest.mark.parametrize(("ranks", "stages"), [(2, 1), (3, 2), (4, 3), (8, 4), (16, 4)])
@pytest.mark.parametrize("causal", [True, False])
def test_stages_of_one_document_keep_ranks_in_step(ranks: int, stages: int, causal: bool) -> None:
    tokens = 32768
    layout = SequenceLayout((ranks * tokens,), ranks, "zigzag")
    assert forced(layout, "direct", causal).num_stages == stages
    pairs = pairs_by_stage(layout, causal)
    share = (ranks - 1) * tokens**2 // (2 if causal else 1) / stages
    assert all(len(some) == stages for some in pairs)
    # In three stages of 2.5 chunks and the like, as near as shapes that recur come to it.
    assert all(0.75 * share <= x <= 1.25 * share for some in pairs for x in some)


@pytest.mark.parametrize("pack", ["A", "B", "C", "one"])
@pytest.mark.parametrize("order", ORDERS)
def test_kv_buffers_are_no_larger_than_own_tokens_where_the_stages_allow_it(pack, order) -> None:
    lengths = (2**20,) if pack == "one" else distribution(pack, 2**20, 0)
    for ranks in (2, 4, 5, 16):
        layout = SequenceLayout(lengths, ranks, order)
        traffic = forced(layout, "direct")
        schedules = [plan_ring(layout, r, True, traffic.rule) for r in range(ranks)]
        assert {len(s.stages) for s in schedules} == {traffic.num_stages}
        largest = max(stage.tokens for s in schedules for stage in s.stages)
        share = -(-max(traffic.received) // traffic.num_stages)
        assert largest <= max(layout.num_local_tokens, share)
        assert share <= layout.num_local_tokens or traffic.num_stages == RULE.max_stages


def test_the_attention_to_own_keys_hides_the_first_stage() -> None:
    layout = SequenceLayout((2 * 8192,), 2, "zigzag")
    traffic = plan_traffic(layout, CAUSAL, RULE)
    # Rank 0: two fragments of 4096 and one over the other; rank 1: one fragment of 8192.
    assert traffic._local_pairs() == [2 * (4096 * 4097 // 2), 8192 * 8193 // 2]
    for pairs_per_token, stages in ((2048, 1), (2049, 2), (8192, 2)):
        rule = RULE._replace(pairs_per_token=pairs_per_token)
        assert plan_traffic(layout, CAUSAL, rule).num_stages == stages


# ---- routes ----------------------------------------------------------------------------------


def forced(layout: SequenceLayout, route: str, causal: bool = True) -> KVTraffic:
    rule = RULE._replace(chain_gain=0.0 if route == "chain" else math.inf)
    traffic = plan_traffic(layout, mask(causal), rule)
    assert traffic.route == route
    return traffic


def busiest_sender(layout: SequenceLayout, route: str) -> int:
    rule = forced(layout, route).rule
    return max(plan_ring(layout, r, True, rule).sent_tokens for r in range(layout.num_ranks))


def test_a_hot_owner_starts_chains_instead_of_sending_to_all() -> None:
    layout = SequenceLayout(distribution("A", 2**20, 0), 64, "fold")
    direct, chain = (busiest_sender(layout, route) for route in ("direct", "chain"))
    assert plan_traffic(layout, CAUSAL, RULE).route == "chain"
    assert chain < direct / 2


@pytest.mark.parametrize("causal", [True, False])
def test_a_chain_through_one_document_is_the_ring(causal: bool) -> None:
    layout = SequenceLayout((40,), 5)
    traffic = forced(layout, "chain", causal)
    assert traffic.num_stages == 4
    for rank in range(5):
        for fragment in traffic.needed_by(rank):
            (delivery,) = traffic.deliveries(fragment, rank)
            assert delivery.sender == (rank - 1) % 5
            assert delivery.stage == (rank - delivery.owner) % 5 - 1


def test_a_document_over_two_ranks_goes_to_the_neighbour_directly() -> None:
    layout = SequenceLayout((6, 4, 6), 4)  # borders at 4, 8, 12
    traffic = plan_traffic(layout, CAUSAL, RULE)
    assert (traffic.route, traffic.num_stages) == ("direct", 1)
    edges = [
        (d.sender, d.consumer)
        for rank in range(4)
        for fragment in traffic.needed_by(rank)
        for d in traffic.deliveries(fragment, rank)
    ]
    assert edges == [(0, 1), (1, 2), (2, 3)]


def test_documents_over_three_ranks_make_a_truncated_ring() -> None:
    traffic = forced(SequenceLayout((30, 30), 6), "direct")
    edges = {
        (d.consumer - d.sender, d.consumer % 3)
        for rank in range(6)
        for fragment in traffic.needed_by(rank)
        for d in traffic.deliveries(fragment, rank)
    }
    assert edges == {(1, 1), (1, 2), (2, 2)}


def test_sources_come_in_ring_order_backwards() -> None:
    rule = StageRule(max_stages=4, min_tokens=8, pairs_per_token=10**9, chain_gain=math.inf)
    traffic = plan_traffic(SequenceLayout((40,), 5), EVERYTHING, rule)
    owners = {
        rank: [
            [
                d.owner
                for p in traffic.needed_by(rank)
                for d in traffic.deliveries(p, rank)
                if d.stage == s
            ]
            for s in range(4)
        ]
        for rank in (0, 3)
    }
    assert owners == {0: [[4], [3], [2], [1]], 3: [[2], [1], [0], [4]]}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("route", ["direct", "chain"])
def test_estimated_times_are_those_of_the_schedules(order, route: str) -> None:
    layout = SequenceLayout(distribution("C", 2**16, 3), 8, order)
    rule = StageRule(3, 100, NOTHING_HIDES, chain_gain=0.0 if route == "chain" else math.inf)
    traffic = plan_traffic(layout, CAUSAL, rule)
    assert traffic.route == route
    schedules = [plan_ring(layout, rank, True, rule) for rank in range(8)]
    time = sum(
        max(max(sum(s.stages[n].kv_exchange.send_tokens), s.stages[n].tokens) for s in schedules)
        for n in range(traffic.num_stages)
    )
    estimate = traffic._chain_time(3) if route == "chain" else traffic._direct_time()
    assert estimate == time


# ---- planning is cheap and done once ---------------------------------------------------------


@pytest.mark.parametrize(("num_ranks", "bar_ms"), [(8, 10), (256, 100)])
def test_planning_a_million_tokens_is_fast(num_ranks: int, bar_ms: float) -> None:
    """Best of three; on one thread, as torchrun starts ranks, and so that all of it counts."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for pack in (distribution("A", 2**20, 0), (2**20,)):
            for order in ORDERS:
                layout = SequenceLayout(pack, num_ranks, order)
                layout.fragments(0)  # the layout's own share
                times_ms = []
                for rank in (0, num_ranks // 2, num_ranks - 1):
                    plan_traffic.cache_clear()
                    plan_ring.cache_clear()
                    start = time.process_time()
                    plan_ring(layout, rank, True)
                    times_ms.append(1e3 * (time.process_time() - start))
                assert min(times_ms) < bar_ms, (order, times_ms)
    finally:
        torch.set_num_threads(threads)


def test_all_layers_share_one_plan() -> None:
    plan_traffic.cache_clear()
    plan_ring.cache_clear()
    for _ in range(5):  # equal, not the same object: as when each layer builds its own
        plan_ring(SequenceLayout((100, 20), 4, "fold"), 1, True)
    assert plan_ring.cache_info().misses == plan_traffic.cache_info().misses == 1
    plan_ring(SequenceLayout((100, 20), 4, "fold"), 2, True)
    assert (plan_ring.cache_info().misses, plan_traffic.cache_info().misses) == (2, 1)
