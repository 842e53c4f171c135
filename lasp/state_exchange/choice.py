"""Which strategy for which heads: a decision of the host, the same on every rank.

A head of rate r keeps ``exp(-r n)`` of a state over n tokens. Below ``eps`` it is taken to keep
nothing, whatever the strategy. So heads fall into three groups:

- *gone*: nothing is left after one token, before anybody can use it. They are never sent.
- *fast*: nothing is left after the shortest run that a state passes through; what a run receives is
  the sum of its neighbour alone. One hop is exact.
- *slow*: the others.

``auto`` compares one strategy for fast and slow heads together with one hop for the fast and
another for the slow, and takes what costs least by the model of ``lasp.state_exchange.cost``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal, NamedTuple, NewType, get_args

from lasp._core.checks import check_part
from lasp.sequence.layout import SequenceLayout
from lasp.sequence.state_flow import RunStep, flow_of
from lasp.state_exchange.cost import (
    ExchangeTraffic,
    Link,
    StateSize,
    exchange_us,
    link_of,
    scan_blocks,
    traffic_of,
)

ExchangeName = Literal["auto", "all_gather", "sliced", "scan", "one_hop"]
LinkedExchange = NewType("LinkedExchange", str)
Exchange = ExchangeName | LinkedExchange
NAMES = get_args(ExchangeName)
EXACT = ("all_gather", "sliced", "scan")  # in the order in which auto prefers equals


class ExchangeChoice(NamedTuple):
    """How some heads are exchanged.

    Attributes:
        strategy: a key of ``STRATEGIES``.
        heads: which, ascending.
        num_blocks: into how many parts ``scan`` cuts a state.
    """

    strategy: str
    heads: tuple[int, ...]
    num_blocks: int = 1


def exchange_over(link: Link, name: ExchangeName = "auto") -> LinkedExchange:
    """An exchange that is chosen, or cut into blocks, for this link instead of the assumed one.

    Every rank must name the same link: :func:`lasp.state_exchange.measure_link` sees to it.

    Raises:
        ValueError: for an unknown name, and for what is no link.
    """
    check_part("link", link, Link)
    parse_exchange(name)
    return LinkedExchange(f"{name} over {link}")


def parse_exchange(exchange: str) -> tuple[str, Link | None]:
    """The name of an exchange, and its link if it names one; ValueError for what is neither."""
    name, over, link = (
        exchange.partition(" over ") if isinstance(exchange, str) else (exchange,) * 3
    )
    if name not in NAMES:
        raise ValueError(
            f"exchange must be one of {NAMES}, or one over a link, got"
            f" {exchange!r}: see lasp.state_exchange"
        )
    return name, Link.parse(link) if over else None


def kept_over(rate: float, length: int, eps: float) -> float:
    """Share of a state that a head keeps over so many tokens, 0 where it is below ``eps``."""
    kept = math.exp(-rate * length)
    return kept if kept >= eps else 0.0


def resolve_exchange(
    exchange: str,
    layout: SequenceLayout,
    rates: tuple[float, ...],
    eps: float,
    key_dim: int,
    value_dim: int,
) -> tuple[ExchangeChoice, ...]:
    """The strategies of a call, each head in one at most.

    Args:
        exchange: a strategy for all heads that matter, or ``auto``.
        layout: of the batch.
        rates: decay rates of the heads.
        eps: what has decayed below this need not be sent on.
        key_dim: K.
        value_dim: V.

    Raises:
        ValueError: for an unknown name, an eps that is no share of a state, and for ``one_hop``
            where more would have to pass.
    """
    if exchange not in NAMES:
        parse_exchange(exchange)
    try:
        valid = 0 <= eps < 1
    except TypeError:
        valid = False
    if not valid:
        raise ValueError(f"state_eps must be in [0, 1), got {eps!r}: 0 keeps all")
    if layout.num_ranks == 1:
        return ()
    return _resolved(
        exchange, layout.num_ranks, flow_of(layout, 0).steps, rates, eps, key_dim, value_dim
    )


@lru_cache(maxsize=1024)  # one entry a layer and batch; a layout would keep tensors alive
def _resolved(
    exchange: str,
    num_ranks: int,
    steps: tuple[RunStep, ...],
    rates: tuple[float, ...],
    eps: float,
    key_dim: int,
    value_dim: int,
) -> tuple[ExchangeChoice, ...]:
    name, link = parse_exchange(exchange)
    link = link or link_of(num_ranks)
    heads = [head for head, rate in enumerate(rates) if kept_over(rate, 1, eps) > 0]
    if not heads or not any(step.sends for step in steps):
        return ()
    shortest = min((step.length for step in steps if step.passes), default=None)
    slow = [
        head for head in heads if shortest is not None and kept_over(rates[head], shortest, eps) > 0
    ]

    if name == "one_hop" and slow:
        kept = math.exp(-min(rates) * (shortest or 0))
        raise ValueError(
            "exchange must be another than 'one_hop' where states pass through runs: a run of"
            f" {shortest} tokens keeps {kept:.1e} of a state, more than state_eps {eps:.1e}: use"
            " 'auto'"
        )

    def choose(names: Sequence[str], some: Sequence[int]) -> tuple[float, ExchangeChoice]:
        slowest = min(rates[head] for head in some)
        traffic = traffic_of(steps, num_ranks, lambda n: kept_over(slowest, n, eps) > 0)
        return _cheapest(names, some, traffic, StateSize(len(some), key_dim, value_dim), link)

    if name != "auto":
        return (choose((name,), heads)[1],)
    if not slow:
        return (choose(("one_hop",), heads)[1],)
    together, apart = choose(EXACT, heads), choose(EXACT, slow)
    fast = [head for head in heads if head not in slow]
    if not fast:
        return (together[1],)
    hop = choose(("one_hop",), fast)
    return (together[1],) if together[0] <= apart[0] + hop[0] else (apart[1], hop[1])


def _cheapest(
    names: Sequence[str],
    heads: Sequence[int],
    traffic: ExchangeTraffic,
    size: StateSize,
    link: Link,
) -> tuple[float, ExchangeChoice]:
    """The cost in us and the choice of the cheapest of these strategies for these heads."""
    options = []
    for name in names:
        blocks = scan_blocks(traffic, size, link) if name == "scan" else 1
        cost = exchange_us(name, traffic, size, link, blocks)
        options.append((cost, ExchangeChoice(name, tuple(heads), blocks)))
    return min(options, key=lambda option: option[0])
