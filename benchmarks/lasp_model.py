"""What does the cost model of the state exchange say up to 1024 ranks, and does it hold?

Prints microseconds and megabytes of one exchange by strategy and number of ranks, for one document
over contiguous ranks in whose runs nothing decays, over NVLink and over a network; and the model
beside every measured ``exchange_ms`` of the committed rows, with the link that fits those rows
best. ``--plot`` draws the model.

Run: python -m benchmarks.lasp_model --plot docs/figures/lasp_model.svg
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.drawing import Drawn, draw
from benchmarks.harness import RESULTS, Row, pack_lengths, parse, read_rows
from lasp import SequenceLayout, decay_rates
from lasp.sequence.state_flow import flow_of
from lasp.state_exchange.choice import EXACT, ExchangeChoice, kept_over
from lasp.state_exchange.cost import (
    NETWORK,
    NVLINK,
    ExchangeTraffic,
    Link,
    StateSize,
    exchange_us,
    received_bytes,
    scan_blocks,
    traffic_of,
)

LINKS = {"NVLink": NVLINK, "network": NETWORK}
RANKS = (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
STRATEGIES = (*EXACT, "one_hop")
EPS = 2.0**-32


def one_document(num_ranks: int, one_hop: bool = False) -> ExchangeTraffic:
    """ExchangeTraffic of one document that all runs pass on, or none."""
    steps = flow_of(SequenceLayout((num_ranks,), num_ranks), 0).steps
    return traffic_of(steps, num_ranks, lambda length: not one_hop)


def predicted_us(name: str, num_ranks: int, size: StateSize, link: Link) -> float:
    """The time for one document."""
    traffic = one_document(num_ranks, name == "one_hop")
    blocks = scan_blocks(traffic, size, link) if name == "scan" else 1
    return exchange_us(name, traffic, size, link, blocks)


class Measured(NamedTuple):
    """A measured exchange."""

    impl: str
    device: str
    case: dict[str, Any]
    us: float
    parts: tuple[tuple[ExchangeChoice, ExchangeTraffic, StateSize], ...]

    def model_us(self, link: Link) -> float:
        """By the model, over this link."""
        return sum(
            exchange_us(choice.strategy, traffic, size, link, choice.num_blocks)
            for choice, traffic, size in self.parts
        )


def read(folder: Path) -> list[Measured]:
    """Rows of ``lasp_ranks`` about the exchange alone, over NCCL.

    Earlier versions had an exchange that the model does not know any more, ``serial``.
    """
    return [
        _measured(row)
        for row in read_rows(folder)
        if (row["benchmark"], row["metric"]) == ("lasp_ranks", "exchange_ms")
        and row["nccl"]
        and row["impl"] != "serial"
    ]


def _measured(row: Row) -> Measured:
    case = row["case"]
    ranks, dim = case["ranks"], case["head_dim"]
    lengths = pack_lengths(case["tokens"] * ranks, case["documents"])
    layout = SequenceLayout(lengths, ranks, case["order"])
    rates = decay_rates(case["heads"], case["layer_index"], case["num_layers"]).tolist()
    parts, left = [], list(range(case["heads"]))
    for strategy, heads, blocks in case["strategies"]:
        # The slow heads come first where heads go apart, and rates fall with the head.
        apart = len(case["strategies"]) > 1 and strategy != "one_hop"
        some = left[-heads:] if apart else left[:heads]
        left = [head for head in left if head not in some]
        slowest = min(rates[head] for head in some)
        traffic = traffic_of(
            flow_of(layout, 0).steps,
            ranks,
            lambda length, rate=slowest: kept_over(rate, length, EPS) > 0,
        )
        parts.append(
            (ExchangeChoice(strategy, tuple(some), blocks), traffic, StateSize(heads, dim, dim))
        )
    return Measured(row["impl"], row["device"], case, 1e3 * row["p50"], tuple(parts))


def fitted(rows: Sequence[Measured], start: Link) -> Link:
    """The link with the least squares of relative errors; the model is linear in its numbers.

    What the rows do not tell apart stays in the proportions of ``start``: over 2 ranks a launch
    and a latency always come together.
    """
    units = (
        Link(start.latency_us, math.inf, 0, 0),
        Link(0, start.gb_per_s, 0, 0),
        Link(0, math.inf, start.launch_us, 0),
        Link(0, math.inf, 0, start.rank_us),
    )
    shares = [[row.model_us(unit) / row.us for unit in units] for row in rows]
    terms = torch.tensor(shares, dtype=torch.float64)
    error = 1 - terms.sum(1, keepdim=True)
    change = torch.linalg.lstsq(terms, error, driver="gelsd").solution.flatten()
    latency, per_byte, launch, rank = (1 + change).tolist()
    return Link(
        latency * start.latency_us, start.gb_per_s / per_byte, launch * start.launch_us,
        rank * start.rank_us,
    )  # fmt: skip


def print_model(heads: int, head_dim: int) -> None:
    """Tables of the model."""
    size = StateSize(heads, head_dim, head_dim)
    print(f"One state: {heads} heads of {head_dim} x {head_dim} float32, {size.bytes / 1e6:.2f} MB")
    head = "".join(f"{name:>12}" for name in STRATEGIES)
    for name, link in LINKS.items():
        print(f"\n{name}: {link}\n   P, us    {head}")
        for ranks in RANKS:
            times = (predicted_us(strategy, ranks, size, link) for strategy in STRATEGIES)
            print(f"{ranks:8}    " + "".join(f"{us:12.0f}" for us in times))
    print(f"\n   P, MB    {head}")
    for ranks in RANKS:
        volumes = (
            max(received_bytes(strategy, one_document(ranks), size, r) for r in range(ranks))
            for strategy in STRATEGIES
        )
        print(f"{ranks:8}    " + "".join(f"{volume / 1e6:12.2f}" for volume in volumes))


def print_check(rows: Sequence[Measured]) -> None:
    """The model beside what was measured."""
    if not rows:
        print("\nNo measured exchange_ms in the rows.")
        return
    link = fitted(rows, NVLINK)
    print(f"\n{len(rows)} measured exchanges; fitted {link}\n{'':64}measured   model  fitted, us")
    for row in sorted(rows, key=lambda r: (r.device, r.case["ranks"], r.case["heads"], r.impl)):
        text = (
            f"{row.device} P={{ranks}} H={{heads}} {{order}} documents={{documents}}"
            f" layer={{layer_index}} {row.impl}"
        ).format(**row.case)
        print(f"{text:64}{row.us:8.0f}{row.model_us(NVLINK):8.0f}{row.model_us(link):8.0f}")


def plot(path: Path, heads: int, head_dim: int) -> None:
    """Lines of the model."""
    size, ranks = StateSize(heads, head_dim, head_dim), RANKS[:-1]
    panels = []
    for name, link in LINKS.items():
        series = {
            strategy: {p: predicted_us(strategy, p, size, link) / 1e3 for p in ranks}
            for strategy in STRATEGIES
        }
        title = f"{name}, {link.gb_per_s:.0f} GB/s: ms of an exchange"
        panels.append(Drawn(title, series, bars=False, log=True, axis="ranks"))
    caption = (
        f"The cost model, not a measurement: one document, states of {heads} heads of {head_dim}"
    )
    draw(panels, caption, path)
    print(f"\n{path}")


@dataclass
class Options:
    """Where the rows are, the state of the model, and where to draw it."""

    results: Path = RESULTS
    heads: int = 64
    head_dim: int = 128
    plot: Path | None = None


def main() -> None:
    """Print, and draw if asked for."""
    options = parse(Options, __doc__)
    rows = read(options.results)
    print_model(options.heads, options.head_dim)
    print_check(rows)
    if options.plot:
        plot(options.plot, options.heads, options.head_dim)


if __name__ == "__main__":
    main()
