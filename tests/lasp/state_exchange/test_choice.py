from __future__ import annotations

import pytest

from lasp.doctor.rules import exchange_rule
from lasp.lightning.decay import decay_rates
from lasp.sequence.layout import SequenceLayout
from lasp.sequence.state_flow import flow_of
from lasp.state_exchange import ExchangeChoice, resolve_exchange
from lasp.state_exchange.cost import NETWORK, Link, StateSize, exchange_us, scan_blocks, traffic_of

EPS = 2.0**-32  # gone after 23 e-foldings


def resolve(
    name: str, lengths: tuple[int, ...], ranks: int, *rates: float, dim: int = 128
) -> dict[str, tuple[int, ...]]:
    choices = resolve_exchange(name, SequenceLayout(lengths, ranks), rates, EPS, dim, dim)
    return {choice.strategy: choice.heads for choice in choices}


def test_auto_takes_one_hop_where_it_is_exact() -> None:
    assert resolve("auto", (35, 45, 40, 40), 4, 0.0) == {"one_hop": (0,)}  # nothing passes
    assert resolve("auto", (160,), 4, 0.5) == {"all_gather": (0,)}  # exp(-0.5 * 40) = 2e-9
    assert resolve("auto", (160,), 4, 0.6, 8.0) == {"one_hop": (0, 1)}  # 4e-11
    assert resolve("sliced", (160,), 4, 8.0) == {"sliced": (0,)}
    with pytest.raises(ValueError, match="exchange must be another"):
        resolve("one_hop", (160,), 4, 0.5)


def test_what_cannot_matter_is_not_sent() -> None:
    assert resolve("auto", (40, 40, 40, 40), 4, 0.0) == {}  # no document is cut
    assert resolve("all_gather", (160,), 4, 30.0, 0.0, 23.0) == {"all_gather": (1,)}
    assert resolve("auto", (160,), 4, 30.0) == {}


def test_auto_takes_heads_apart_where_that_is_cheaper() -> None:
    fast, slow = (1.0,) * 60, (0.0,) * 4
    far = resolve("auto", (64 * 1024,), 64, *fast, *slow)
    assert set(far) == {"one_hop", "sliced"}
    assert far["one_hop"] == tuple(range(60))
    assert far["sliced"] == tuple(range(60, 64))
    # Two states of 64 bytes: a second collective costs more than it saves.
    assert resolve("auto", (160,), 4, 1.0, 0.0, dim=4) == {"all_gather": (0, 1)}


def test_cost_of_a_chain() -> None:
    """By hand: one document over 8 ranks, 7 borders, each state received whole."""
    flow = flow_of(SequenceLayout((800,), 8), 0)
    size = StateSize(64, 128, 128)
    traffic = traffic_of(flow.steps, 8, lambda length: True)
    assert traffic.depth == 7
    link = Link(latency_us=5.0, gb_per_s=300.0, launch_us=20.0, rank_us=4.0)
    step, state_us = 20.0 + 5.0, size.bytes / 300e3
    assert exchange_us("scan", traffic, size, link) == pytest.approx(7 * (step + state_us))
    assert exchange_us("scan", traffic, size, link, 4) == pytest.approx(10 * (step + state_us / 4))
    assert exchange_us("all_gather", traffic, size, link) == pytest.approx(
        20.0 + 7 * (5.0 + 4.0) + 7 * state_us
    )
    blocks = scan_blocks(traffic, size, NETWORK)
    best = exchange_us("scan", traffic, size, NETWORK, blocks)
    assert all(best <= exchange_us("scan", traffic, size, NETWORK, b) for b in (1, 2, 4, 8, 16))
    # A document border, or decay, cuts the chain.
    cut = traffic_of(flow_of(SequenceLayout((401, 399), 8), 0).steps, 8, lambda length: True)
    assert cut.depth == 4
    assert traffic_of(flow.steps, 8, lambda length: False).depth == 1


def test_blocks_are_of_the_choice() -> None:
    layout = SequenceLayout((640,), 64)
    (choice,) = resolve_exchange("scan", layout, (0.0,) * 64, EPS, 128, 128)
    assert choice == ExchangeChoice("scan", tuple(range(64)), choice.num_blocks)
    assert choice.num_blocks > 1
    (choice,) = resolve_exchange("scan", layout, (0.0,), EPS, 128, 1)
    assert choice.num_blocks == 1


def test_the_printed_rule_is_what_is_taken() -> None:
    rule = exchange_rule()
    assert rule["P=64 layer 0"] == "one_hop (64 heads)"
    apart = rule["P=64 layer 78"]
    rates = tuple(decay_rates(64, 78, 80).tolist())
    choices = resolve("auto", (64 * 32768,), 64, *rates)
    assert apart == ", ".join(f"{name} ({len(heads)} heads)" for name, heads in choices.items())
    assert len(choices) == 2
