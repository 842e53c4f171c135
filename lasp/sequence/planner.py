"""Choose the order of a layout by a cost model, on the host, from document lengths alone.

One period of a hybrid model is ``lightning_layers`` lightning layers and one softmax layer. Every
order gives each rank the same tokens, so only three times differ: the attention work of the busiest
rank, the keys and values it must receive (hidden under that work where they fit), and the lightning
states exchanged, which grow with the number of runs that continue a document.

Keys and values are counted as ring attention moves them: each token that a rank needs and does not
hold, once. States as the cheaper of two exchanges moves them: gathered whole, ``(P - 1) s`` states
where a rank sends the states of up to s runs; or in slices, ``(n + (P - 1) m) / P`` states, where n
runs send in all and up to m of a rank receive.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from lasp._core.checks import check_part, check_positive, check_sizes, check_sizes_or_none, integers
from lasp.sequence.fold import DOCUMENT_PAIRS, WorkIndex
from lasp.sequence.layout import Order, SequenceLayout

# document_zigzag is for data that comes so: to pad every document never pays.
CHOSEN: tuple[Order, ...] = ("contiguous", "zigzag", "fold")


@dataclass(frozen=True)
class CostModel:
    """Sizes and rates behind :func:`layout_costs`; the defaults are MiniMax-Text-01's layers.

    Attributes:
        query_heads: query heads of a softmax layer on one rank.
        kv_heads: key and value heads of a softmax layer on one rank.
        lightning_heads: heads of a lightning layer on one rank.
        head_dim: dim of every head.
        lightning_layers: lightning layers for one softmax layer.
        flop_per_s: rate of the softmax attention kernel.
        link_bytes_per_s: bandwidth between ranks, each direction.
        activation_bytes: bytes of one key or value element.
        window: tokens before itself that a query of the softmax layer sees; None: all.

    Raises:
        ValueError: naming the field.
    """

    query_heads: int = 64
    kv_heads: int = 8
    lightning_heads: int = 64
    head_dim: int = 128
    lightning_layers: int = 7
    flop_per_s: float = 400e12
    link_bytes_per_s: float = 45e9
    activation_bytes: int = 2
    window: int | None = None

    def __post_init__(self) -> None:
        rates, sizes = ("flop_per_s", "link_bytes_per_s"), dict(vars(self))
        check_positive(**{name: sizes.pop(name) for name in rates})
        check_sizes_or_none(0, window=sizes.pop("window"))
        check_sizes(0, **sizes)


class LayoutCost(NamedTuple):
    """Estimated forward time of one period under one layout.

    Attributes:
        layout: what was estimated.
        balance: attention work of the busiest rank over the mean.
        most_runs: runs of the rank that has most.
        attention_ms: softmax attention of the busiest rank.
        kv_ms: receipt of keys and values by the neediest rank.
        state_ms: exchange of the lightning states, all lightning layers of the period.
        kv_bytes: what the neediest rank receives in the softmax layer.
        state_bytes: what a rank receives in one lightning layer.
        total_ms: max(attention, kv) + state.
    """

    layout: SequenceLayout
    balance: float
    most_runs: int
    attention_ms: float
    kv_ms: float
    state_ms: float
    kv_bytes: int
    state_bytes: int
    total_ms: float


def plan_layout(
    document_lengths: Sequence[int], num_ranks: int, *, cost_model: CostModel | None = None
) -> SequenceLayout:
    """The layout whose estimated time is least; see :func:`layout_costs` for why.

    Args:
        document_lengths: tokens of each document, in pack order.
        num_ranks: P.
        cost_model: sizes and rates; MiniMax-Text-01 over a 45 GB/s link if not given.

    Returns:
        A :class:`SequenceLayout`, equal on every rank that calls this with the same arguments.

    Raises:
        ValueError: as :class:`SequenceLayout`.
    """
    return layout_costs(document_lengths, num_ranks, cost_model=cost_model)[0].layout


def layout_costs(
    document_lengths: Sequence[int], num_ranks: int, *, cost_model: CostModel | None = None
) -> tuple[LayoutCost, ...]:
    """Estimates of all orders that pad no document, best first; equal ones as in ``CHOSEN``."""
    check_part("cost_model", cost_model, CostModel, optional=True)
    model = cost_model or CostModel()
    lengths = integers("document_lengths", document_lengths)
    costs = [_cost(SequenceLayout(lengths, num_ranks, order), model) for order in CHOSEN]
    return tuple(sorted(costs, key=lambda cost: cost.total_ms))


def _cost(layout: SequenceLayout, model: CostModel) -> LayoutCost:
    ranks = range(layout.num_ranks)
    index = WorkIndex(layout.borders, model.window, DOCUMENT_PAIRS)
    work = [sum(index.between(*run) for run in layout.runs(rank)) for rank in ranks]
    # A (query, key) pair costs 4 d floating-point operations a query head: q k^T and p v.
    flop = max(work) * 4 * model.query_heads * model.head_dim
    token_bytes = 2 * model.kv_heads * model.head_dim * model.activation_bytes
    kv_bytes = token_bytes * max(_tokens_received(layout, rank, model.window) for rank in ranks)
    state_bytes = int(_states_received(layout) * model.lightning_heads * model.head_dim**2 * 4)
    attention_ms = 1e3 * flop / model.flop_per_s
    kv_ms = 1e3 * kv_bytes / model.link_bytes_per_s
    state_ms = 1e3 * model.lightning_layers * state_bytes / model.link_bytes_per_s
    return LayoutCost(
        layout,
        balance=max(work) * layout.num_ranks / sum(work),
        most_runs=max(len(layout.runs(rank)) for rank in ranks),
        attention_ms=attention_ms,
        kv_ms=kv_ms,
        state_ms=state_ms,
        kv_bytes=kv_bytes,
        state_bytes=state_bytes,
        total_ms=max(attention_ms, kv_ms) + state_ms,
    )


def _states_received(layout: SequenceLayout) -> float:
    """States that a rank receives in one lightning layer, by the exchange that moves fewer."""
    links, num_ranks = layout.run_links, layout.num_ranks
    receiving = Counter(link.rank for link in links if link.continues)
    sending = Counter(link.rank for link, after in pairwise(links) if after.continues)
    if not receiving:
        return 0.0
    gathered = (num_ranks - 1) * max(sending.values())
    sliced = (sending.total() + (num_ranks - 1) * max(receiving.values())) / num_ranks
    return min(float(gathered), sliced)


def _tokens_received(layout: SequenceLayout, rank: int, window: int | None = None) -> int:
    """Tokens of other ranks that causal attention of ``rank`` reads.

    A fragment brings what lies between it and the one before it here, as far as the window reaches:
    what lies before that one is what that one needs itself.
    """
    received, stops = 0, dict[int, int]()  # of a document: where its last fragment here stops
    for fragment in layout.fragments(rank):
        if fragment.document == layout.num_documents:  # padding attends to itself alone
            continue
        gap = fragment.start - stops.get(fragment.document, 0)
        received += gap if window is None else min(gap, window)
        stops[fragment.document] = fragment.stop
    return received
