from __future__ import annotations

import math
import time

import pytest
import torch

from lasp.layout import SequenceLayout
from ring.schedule import plan_ring
from ring.stages import RULE, StageRule, bucket, stage_tokens
from ring.traffic import Traffic, traffic_of
from tests.lasp.distributions import document_lengths as distribution
from tests.ring.cases import ORDERS

# ---- stages ----------------------------------------------------------------------------------


def test_buckets_have_three_bits() -> None:
    assert [bucket(n) for n in range(1, 18)] == [*range(1, 8), 8, 8, 10, 10, 12, 12, 14, 14, 16, 16]
    sizes = {bucket(n) for n in range(1024, 65537)}
    assert len(sizes) == 25  # four an octave
    assert all(bucket(n) <= n < 1.25 * bucket(n) for n in range(1024, 65537, 37))


def test_little_comes_in_one_stage() -> None:
    assert stage_tokens(0, 10**9, 10**4, RULE) == []
    assert stage_tokens(2048, 0, 0, RULE) == [2048]


def test_what_the_local_attention_hides_comes_in_equal_stages() -> None:
    assert stage_tokens(32768, 10**12, 10**6, RULE) == [8192] * 4


def test_stages_grow_where_the_local_attention_is_short() -> None:
    sizes = stage_tokens(400_000, 2048 * 1400, 4200, RULE._replace(min_tokens=2048))
    assert sizes == [49152, 114688, 114688, 400_000 - 49152 - 2 * 114688]
    sizes = stage_tokens(400_000, 2048 * 1400, 0, RULE)
    assert sizes == [49152, 49152, 49152, 400_000 - 3 * 49152]


@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_stages_sum_to_what_is_needed(stages: int) -> None:
    for needed in (1, 2, 5, 1000, 12345):
        for local in (0, 10**3, 10**9):
            sizes = stage_tokens(needed, local, 77, StageRule(stages, 3, 10))
            assert sum(sizes) == needed
            assert 1 <= len(sizes) <= stages
            assert min(sizes[:-1], default=3) >= 3


# ---- ways ------------------------------------------------------------------------------------


def forced(layout: SequenceLayout, way: str, causal: bool = True) -> Traffic:
    rule = RULE._replace(chain_gain=0.0 if way == "chain" else math.inf)
    traffic = traffic_of(layout, causal, rule)
    assert traffic.way == way
    return traffic


def busiest_sender(layout: SequenceLayout, way: str) -> int:
    rule = forced(layout, way).rule
    return max(plan_ring(layout, r, True, rule).sent_tokens for r in range(layout.num_ranks))


def test_a_hot_owner_starts_chains_instead_of_sending_to_all() -> None:
    layout = SequenceLayout(distribution("A", 2**20, 0), 64, "fold")
    direct, chain = (busiest_sender(layout, way) for way in ("direct", "chain"))
    assert traffic_of(layout, True, RULE).way == "chain"
    assert chain < direct / 2


@pytest.mark.parametrize("causal", [True, False])
def test_a_chain_through_one_document_is_the_ring(causal: bool) -> None:
    layout = SequenceLayout((40,), 5)
    traffic = forced(layout, "chain", causal)
    assert traffic.num_stages == 4
    for rank in range(5):
        for piece in traffic.needed_by(rank):
            (delivery,) = traffic.deliveries(piece, rank)
            assert delivery.sender == (rank - 1) % 5
            assert delivery.stage == (rank - delivery.owner) % 5 - 1


def test_a_document_over_two_ranks_goes_to_the_neighbour_directly() -> None:
    layout = SequenceLayout((6, 4, 6), 4)  # borders at 4, 8, 12
    traffic = traffic_of(layout, True, RULE)
    assert (traffic.way, traffic.num_stages) == ("direct", 1)
    edges = [
        (d.sender, d.consumer)
        for rank in range(4)
        for piece in traffic.needed_by(rank)
        for d in traffic.deliveries(piece, rank)
    ]
    assert edges == [(0, 1), (1, 2), (2, 3)]


def test_documents_over_three_ranks_make_a_truncated_ring() -> None:
    traffic = forced(SequenceLayout((30, 30), 6), "direct")
    edges = {
        (d.consumer - d.sender, d.consumer % 3)
        for rank in range(6)
        for piece in traffic.needed_by(rank)
        for d in traffic.deliveries(piece, rank)
    }
    assert edges == {(1, 1), (1, 2), (2, 2)}


def test_sources_come_in_ring_order_backwards() -> None:
    rule = StageRule(max_stages=4, min_tokens=8, pairs_per_token=10**9, chain_gain=math.inf)
    traffic = traffic_of(SequenceLayout((40,), 5), False, rule)
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
@pytest.mark.parametrize("way", ["direct", "chain"])
def test_estimated_times_are_those_of_the_schedules(order, way: str) -> None:
    layout = SequenceLayout(distribution("C", 2**16, 3), 8, order)
    rule = StageRule(3, 100, 10, chain_gain=0.0 if way == "chain" else math.inf)
    traffic = traffic_of(layout, True, rule)
    assert traffic.way == way
    schedules = [plan_ring(layout, rank, True, rule) for rank in range(8)]
    time = sum(
        max(max(sum(s.stages[n].fetch.send_tokens), s.stages[n].tokens) for s in schedules)
        for n in range(traffic.num_stages)
    )
    estimate = traffic._chain_time(3) if way == "chain" else traffic._direct_time()
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
                    traffic_of.cache_clear()
                    plan_ring.cache_clear()
                    start = time.process_time()
                    plan_ring(layout, rank, True)
                    times_ms.append(1e3 * (time.process_time() - start))
                assert min(times_ms) < bar_ms, (order, times_ms)
    finally:
        torch.set_num_threads(threads)


def test_all_layers_share_one_plan() -> None:
    traffic_of.cache_clear()
    plan_ring.cache_clear()
    for _ in range(5):  # equal, not the same object: as when each layer builds its own
        plan_ring(SequenceLayout((100, 20), 4, "fold"), 1, True)
    assert plan_ring.cache_info().misses == traffic_of.cache_info().misses == 1
    plan_ring(SequenceLayout((100, 20), 4, "fold"), 2, True)
    assert (plan_ring.cache_info().misses, traffic_of.cache_info().misses) == (2, 1)
