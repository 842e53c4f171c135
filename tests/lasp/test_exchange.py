from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lasp.exchange import STRATEGIES, _all_gather, resolve_exchange, start_exchange
from lasp.flow import Flow, flow_of
from lasp.layout import Order, SequenceLayout
from tests.closeness import assert_equal_to_rounding
from tests.lasp.cases import ORDERS, PACKS
from tests.ranks import run_on_ranks, subgroup

HEADS, KEY, VALUE = 3, 2, 5


def inputs_of(flow: Flow, num_ranks: int) -> tuple[Tensor, list[Tensor | None]]:
    """U for every rank and slot, and a transition of its own for every hop that passes."""
    generator = torch.Generator().manual_seed(7)
    shape = (num_ranks, flow.num_slots, HEADS, KEY, VALUE)
    states = torch.randn(shape, generator=generator, dtype=torch.float64)
    decays = torch.rand((len(flow.hops), HEADS, 1, 1), generator=generator, dtype=torch.float64)
    return states, [decays[j] if hop.passes else None for j, hop in enumerate(flow.hops)]


def expected_of(flow: Flow, num_ranks: int, rank: int) -> Tensor:
    states, transitions = inputs_of(flow, num_ranks)
    incoming = torch.zeros(flow.num_runs, HEADS, KEY, VALUE, dtype=torch.float64)
    for j, hop in enumerate(flow.hops):
        if hop.rank != rank or not hop.receives:
            continue
        # S_in = U_{j-1} + M_{j-1} U_{j-2} + M_{j-1} M_{j-2} U_{j-3} + ..., as far as states pass.
        weight: Tensor = torch.ones(HEADS, 1, 1, dtype=torch.float64)
        for before in range(j - 1, -1, -1):
            source = flow.hops[before]
            incoming[hop.run] += weight * states[source.rank, source.slot]
            transition = transitions[before]
            if transition is None:
                break
            weight = weight * transition
    return incoming


def exchange_on_rank(layouts: list[SequenceLayout], *group_ranks: int) -> list[dict[str, Tensor]]:
    group = subgroup(*group_ranks) if group_ranks else dist.group.WORLD
    rank = dist.get_rank(group)
    results = []
    for layout in layouts:
        for reverse in (False, True):
            flow = flow_of(layout, rank, reverse=reverse)
            states, transitions = inputs_of(flow, layout.num_ranks)
            results.append(
                {
                    name: start_exchange(name, states[rank], flow, transitions, group)()
                    for name in STRATEGIES
                    if name != "one_hop" or flow.shortest_pass is None
                }
            )
    return results


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, pytest.param(8, marks=pytest.mark.slow)])
def test_strategies_give_the_prefix_in_the_same_bits(num_ranks: int) -> None:
    layouts = [
        SequenceLayout(lengths, num_ranks, order) for lengths in PACKS.values() for order in ORDERS
    ]
    for rank, results in enumerate(run_on_ranks(exchange_on_rank, num_ranks, layouts)):
        for index, result in enumerate(results):
            layout, reverse = layouts[index // 2], bool(index % 2)
            expected = expected_of(flow_of(layout, rank, reverse=reverse), num_ranks, rank)
            for name, incoming in result.items():
                assert_equal_to_rounding(incoming, expected, what=f"{name} {layout} {reverse}")
                assert torch.equal(incoming, result["all_gather"]), name


def exchange_in_halves(layout: SequenceLayout) -> list[dict[str, Tensor]]:
    """Ranks 0, 2 and ranks 1, 3 exchange at the same time, in groups of their own."""
    groups = [subgroup(0, 2), subgroup(1, 3)]
    assert all(group is not None for group in groups)
    return exchange_on_rank([layout], *((0, 2) if dist.get_rank() % 2 == 0 else (1, 3)))


@pytest.mark.parametrize("order", ORDERS)
def test_ranks_are_ranks_of_the_group(order: Order) -> None:
    layout = SequenceLayout((203,), 2, order)
    for world_rank, results in enumerate(run_on_ranks(exchange_in_halves, 4, layout)):
        for reverse, result in enumerate(results):
            flow = flow_of(layout, world_rank // 2, reverse=bool(reverse))
            expected = expected_of(flow, 2, world_rank // 2)
            for incoming in result.values():
                assert_equal_to_rounding(incoming, expected)
            assert expected.any() or not any(h.receives for h in flow.hops if h.rank == flow.rank)


def count_elements(layout: SequenceLayout, name: str) -> int:
    """Elements that this rank receives from others in both directions of one exchange."""
    rank, received = dist.get_rank(), 0

    def gather(output: Tensor, own: Tensor, **kwargs: Any) -> object:
        nonlocal received
        received += output.numel() - own.numel()
        return _all_gather(output, own, **kwargs)

    def all_to_all(output: Tensor, own: Tensor, sizes: list[int], *rest: Any, **kw: Any) -> object:
        nonlocal received
        others = sum(size for source, size in enumerate(sizes) if source != rank)
        received += others * output[0:1].numel() if sum(sizes) else 0
        return single(output, own, sizes, *rest, **kw)

    single = dist.all_to_all_single
    with (
        patch("lasp.exchange._all_gather", gather),
        patch.object(dist, "all_to_all_single", all_to_all),
    ):
        for reverse in (False, True):
            flow = flow_of(layout, rank, reverse=reverse)
            states, transitions = inputs_of(flow, layout.num_ranks)
            start_exchange(name, states[rank], flow, transitions, dist.group.WORLD)()
    return received


STATE = HEADS * KEY * VALUE


@pytest.mark.parametrize(
    ("lengths", "num_ranks", "order", "name", "expected"),
    [
        ((24, 24), 2, "contiguous", "all_gather", [0, 0]),
        ((24, 24), 2, "contiguous", "one_hop", [0, 0]),
        ((25, 23), 2, "contiguous", "all_gather", [2 * STATE] * 2),
        ((25, 23), 2, "contiguous", "one_hop", [STATE] * 2),  # each in one direction
        ((48,), 3, "zigzag", "all_gather", [2 * 2 * 2 * STATE] * 3),
        # 4 links a direction: rank 1 sends and receives 2 states, the others 1. A rank receives its
        # third of what the others send, and two thirds of its own: (3 + 2) / 3 and (2 + 4) / 3.
        ((48,), 3, "zigzag", "sliced", [n * STATE // 3 for n in (10, 12, 10)]),
    ],
)  # fmt: skip
def test_bytes_are_those_of_the_formula(
    lengths: tuple[int, ...], num_ranks: int, order: Order, name: str, expected: list[int]
) -> None:
    layout = SequenceLayout(lengths, num_ranks, order)
    assert run_on_ranks(count_elements, num_ranks, layout, name) == expected


def test_auto_takes_one_hop_where_it_is_exact() -> None:
    def resolve(name: str, lengths: tuple[int, ...], ranks: int, *rates: float) -> str:
        flow = flow_of(SequenceLayout(lengths, ranks), 0)
        return resolve_exchange(name, flow, ranks, rates, 2.0**-32)

    assert resolve("auto", (40, 40, 40, 40), 4, 0.0) == "one_hop"  # nothing passes
    assert resolve("auto", (160,), 4, 0.5, 0.0) == "all_gather"  # one head keeps all
    assert resolve("auto", (160,), 4, 0.5) == "all_gather"  # exp(-0.5 * 40) = 2e-9
    assert resolve("auto", (160,), 4, 0.6, 8.0) == "one_hop"  # 4e-11
    assert resolve("auto", (360,), 9, 0.5) == "sliced"
    assert resolve("sliced", (160,), 4, 8.0) == "sliced"
    with pytest.raises(ValueError, match="exchange must be another"):
        resolve("one_hop", (160,), 4, 0.5)
