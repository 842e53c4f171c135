from __future__ import annotations

import pytest

from lasp.sequence.fold import WorkIndex
from lasp.sequence.layout import SequenceLayout
from lasp.sequence.planner import (
    CostModel,
    _states_received,
    _tokens_received,
    layout_costs,
    plan_layout,
)
from ring.planner.schedule import plan_ring
from tests.lasp.distributions import document_lengths as distribution


@pytest.mark.parametrize("order", ["contiguous", "zigzag", "fold"])
@pytest.mark.parametrize("lengths", [(40,), (3, 30, 0, 7, 1), (1,) * 50, (9, 11, 13, 8)])
def test_tokens_received_counts_the_keys_that_other_ranks_hold(order, lengths) -> None:
    layout = SequenceLayout(lengths, 4, order)
    owner = {t: r for r in range(4) for run in layout.runs(r) for t in range(*run)}
    document = [n for n, length in enumerate(lengths) for _ in range(length)]
    for rank in range(4):
        mine = [t for t, r in owner.items() if r == rank and t < sum(lengths)]
        needed = {k for t in mine for k in range(t) if document[k] == document[t]}
        assert _tokens_received(layout, rank) == sum(owner[k] != rank for k in needed)


@pytest.mark.parametrize("name", ["A", "B", "C"])
@pytest.mark.parametrize("order", ["contiguous", "zigzag", "fold"])
def test_tokens_received_are_those_of_ring_attention(name: str, order) -> None:
    layout = SequenceLayout(distribution(name, 2**17, 2), 8, order)
    for rank in range(8):
        assert _tokens_received(layout, rank) == plan_ring(layout, rank, True).received_tokens
        for window in (1, 500, 9000):
            schedule = plan_ring(layout, rank, True, window=(window, 0))
            assert _tokens_received(layout, rank, window) == schedule.received_tokens


@pytest.mark.parametrize("window", [None, 0, 1, 4, 100])
def test_work_counts_the_keys_in_the_window(window: int | None) -> None:
    index = WorkIndex((0, 9, 9, 12, 30), window)
    first = [n for n, stop in ((0, 9), (9, 12), (12, 30)) for _ in range(n, stop)]
    seen = [t + 1 - max(first[t], 0 if window is None else t - window) for t in range(30)]
    for start, stop in ((0, 30), (3, 11), (12, 13), (14, 29), (5, 5)):
        assert index.between(start, stop) == sum(seen[start:stop])


def test_states_received_are_the_fewer_of_gathered_and_sliced() -> None:
    assert _states_received(SequenceLayout((8,), 4)) == (3 + 3 * 1) / 4  # gathered: 3
    assert _states_received(SequenceLayout((8,), 2)) == 1  # sliced: (1 + 1) / 2; one either way
    assert _states_received(SequenceLayout((8, 8), 2)) == 0
    assert _states_received(SequenceLayout((16,), 4, "zigzag")) == (6 + 3 * 2) / 4  # gathered: 6


def test_costs_say_why() -> None:
    first, *others = layout_costs(distribution("A", 2**18, 0), 8)
    assert first.balance < 1.03
    assert all(other.balance > 1.5 for other in others)
    assert {cost.layout.order: cost.most_runs for cost in others} == {"contiguous": 1, "zigzag": 2}


def test_one_long_document_goes_zigzag() -> None:
    assert plan_layout((2**20,), 16).order == "zigzag"


def test_one_long_document_under_a_window_stays_contiguous() -> None:
    model = CostModel(window=4096)
    first, *_ = layout_costs((2**20,), 16, cost_model=model)
    assert first.layout.order == "contiguous"
    assert first.balance < 1.01
    assert first.kv_bytes == 4096 * 2 * 8 * 128 * 2


def test_many_short_documents_stay_contiguous() -> None:
    assert plan_layout((1024,) * 1024, 64).order == "contiguous"


def test_a_mixture_is_folded() -> None:
    assert plan_layout(distribution("A", 2**20, 0), 8).order == "fold"


def test_one_rank_is_contiguous_and_free_of_communication() -> None:
    best = layout_costs((100, 50), 1)[0]
    assert best.layout.order == "contiguous"
    assert best.kv_bytes == best.state_bytes == 0


def test_costs_are_ordered_and_add_up() -> None:
    costs = layout_costs(distribution("C", 2**18, 1), 8)
    assert [c.total_ms for c in costs] == sorted(c.total_ms for c in costs)
    for cost in costs:
        assert cost.total_ms == max(cost.attention_ms, cost.kv_ms) + cost.state_ms


def test_expensive_states_turn_the_choice_to_fewer_runs() -> None:
    lengths = distribution("A", 2**18, 0)
    slow_link = CostModel(link_bytes_per_s=1e9, kv_heads=1)
    assert plan_layout(lengths, 8).order == "fold"
    assert plan_layout(lengths, 8, cost_model=slow_link).order == "contiguous"
