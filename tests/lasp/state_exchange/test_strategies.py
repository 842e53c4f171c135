from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.wire import counted
from lasp.sequence.layout import Order, SequenceLayout
from lasp.sequence.state_flow import StateFlow, flow_of
from lasp.state_exchange import STRATEGIES, ExchangeChoice, start_exchange
from lasp.state_exchange.cost import StateSize, received_bytes, traffic_of
from tests.closeness import assert_equal_to_rounding
from tests.lasp.cases import ORDERS, PACKS
from tests.ranks import run_on_ranks, subgroup

HEADS, KEY, VALUE = 3, 2, 5


def inputs_of(flow: StateFlow, num_ranks: int) -> tuple[Tensor, list[Tensor | None]]:
    """U for every rank and slot, and a transition of its own for every run step that passes."""
    generator = torch.Generator().manual_seed(7)
    shape = (num_ranks, flow.num_slots, HEADS, KEY, VALUE)
    states = torch.randn(shape, generator=generator, dtype=torch.float64)
    decays = torch.rand((len(flow.steps), HEADS, 1, 1), generator=generator, dtype=torch.float64)
    return states, [decays[j] if step.passes else None for j, step in enumerate(flow.steps)]


def expected_of(flow: StateFlow, num_ranks: int, rank: int) -> Tensor:
    states, transitions = inputs_of(flow, num_ranks)
    incoming = torch.zeros(flow.num_runs, HEADS, KEY, VALUE, dtype=torch.float64)
    for j, step in enumerate(flow.steps):
        if step.rank != rank or not step.receives:
            continue
        # S_in = U_{j-1} + M_{j-1} U_{j-2} + M_{j-1} M_{j-2} U_{j-3} + ..., as far as states pass.
        weight: Tensor = torch.ones(HEADS, 1, 1, dtype=torch.float64)
        for before in range(j - 1, -1, -1):
            source = flow.steps[before]
            incoming[step.run] += weight * states[source.rank, source.slot]
            transition = transitions[before]
            if transition is None:
                break
            weight = weight * transition
    return incoming


ALL = tuple(range(HEADS))
# Every strategy for all heads; unequal blocks; heads apart, in a row or not.
CHOICES: dict[str, tuple[ExchangeChoice, ...]] = {
    name: (ExchangeChoice(name, ALL),) for name in STRATEGIES
} | {
    "scan 3": (ExchangeChoice("scan", ALL, 3),),
    "apart": (ExchangeChoice("scan", (0, 2), 3), ExchangeChoice("all_gather", (1,))),
    "in a row": (ExchangeChoice("sliced", (1, 2)), ExchangeChoice("scan", (0,))),
}


def exchange(
    choices: tuple[ExchangeChoice, ...],
    flow: StateFlow,
    num_ranks: int,
    group: dist.ProcessGroup,
    device: str = "cpu",
) -> Tensor:
    states, transitions = inputs_of(flow, num_ranks)
    states = states.to(device)
    transitions = [None if t is None else t.to(device) for t in transitions]
    passed = [
        [None if t is None else t[list(choice.heads)] for t in transitions] for choice in choices
    ]
    return start_exchange(choices, states[flow.rank], flow, passed, group)().cpu()


def exchange_on_rank(
    layouts: list[SequenceLayout], *group_ranks: int, device: str = "cpu"
) -> list[dict[str, Tensor]]:
    group = subgroup(*group_ranks) if group_ranks else dist.group.WORLD
    rank = dist.get_rank(group)
    results = []
    for layout in layouts:
        for reverse in (False, True):
            flow = flow_of(layout, rank, reverse=reverse)
            results.append(
                {
                    name: exchange(choices, flow, layout.num_ranks, group, device)
                    for name, choices in CHOICES.items()
                }
            )
    return results


def check_prefixes(num_ranks: int, **options: str) -> None:
    layouts = [
        SequenceLayout(lengths, num_ranks, order) for lengths in PACKS.values() for order in ORDERS
    ]
    for rank, results in enumerate(run_on_ranks(exchange_on_rank, num_ranks, layouts, **options)):
        for index, result in enumerate(results):
            layout, reverse = layouts[index // 2], bool(index % 2)
            expected = expected_of(flow_of(layout, rank, reverse=reverse), num_ranks, rank)
            for name, incoming in result.items():
                assert_equal_to_rounding(incoming, expected, what=f"{name} {layout} {reverse}")
                assert torch.equal(incoming, result["all_gather"]), name


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, pytest.param(8, marks=pytest.mark.slow)])
def test_strategies_give_the_prefix_in_the_same_bits(num_ranks: int) -> None:
    check_prefixes(num_ranks)


@pytest.mark.multi_gpu
def test_two_gpus_give_the_prefix_in_the_same_bits() -> None:
    check_prefixes(2, device="cuda", backend="nccl")


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
            assert expected.any() or not any(h.receives for h in flow.steps if h.rank == flow.rank)


def count_bytes(layout: SequenceLayout, choice: ExchangeChoice) -> list[int]:
    """Bytes that this rank receives from others, forward and reverse."""
    counts = []
    for reverse in (False, True):
        flow = flow_of(layout, dist.get_rank(), reverse=reverse)
        with counted() as received:
            exchange((choice,), flow, layout.num_ranks, dist.group.WORLD)
        counts.append(received.bytes)
    return counts


STATE = StateSize(HEADS, KEY, VALUE, itemsize=8)


@pytest.mark.parametrize(
    ("lengths", "num_ranks", "order", "name", "expected"),
    [
        ((24, 24), 2, "contiguous", "all_gather", [0, 0]),
        ((24, 24), 2, "contiguous", "one_hop", [0, 0]),
        ((25, 23), 2, "contiguous", "all_gather", [1, 1]),
        ((25, 23), 2, "contiguous", "one_hop", [0, 1]),
        ((25, 23), 2, "contiguous", "scan", [0, 1]),
        ((48,), 3, "zigzag", "all_gather", [4, 4, 4]),
        ((48,), 3, "zigzag", "scan", [1, 2, 1]),
        # 4 links: rank 1 sends and receives 2 states, the others 1. A rank receives its third of
        # what the others send, and two thirds of its own.
        ((48,), 3, "zigzag", "sliced", [(3 + 2) / 3, (2 + 4) / 3, (3 + 2) / 3]),
    ],
)
def test_bytes_are_those_of_the_formula(
    lengths: tuple[int, ...], num_ranks: int, order: Order, name: str, expected: list[float]
) -> None:
    layout = SequenceLayout(lengths, num_ranks, order)
    counted = run_on_ranks(
        count_bytes, num_ranks, layout, ExchangeChoice(name, ALL, 1 + (name == "scan"))
    )
    for rank, (forward, backward) in enumerate(counted):
        flows = [flow_of(layout, rank, reverse=reverse) for reverse in (False, True)]
        traffic = [traffic_of(flow.steps, num_ranks, lambda length: True) for flow in flows]
        assert forward == received_bytes(name, traffic[0], STATE, rank)
        assert backward == received_bytes(name, traffic[1], STATE, rank)
        assert forward == expected[rank] * STATE.bytes
