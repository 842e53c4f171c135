"""The tables of docs/multi-node.md about exchanges over slow wires, made of committed rows alone.

Run: python -m benchmarks.wire_tables --write docs/multi-node.md
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from benchmarks.harness import Row, markdown, read_rows
from benchmarks.lasp_wire import TOKENS
from benchmarks.marked import MarkedTables
from lasp.state_exchange import Link
from lasp.state_exchange.choice import EXACT

Case = tuple[int, float, int, int]


def cases(folder: Path) -> dict[Case, dict[str, Row]]:
    """The newest rows by ranks, rate of the wire, heads and head dim, then by implementation."""
    found: dict[Case, dict[str, Row]] = defaultdict(dict)
    rows = [row for row in read_rows(folder) if row["benchmark"] == "lasp_wire"]
    for row in sorted(rows, key=lambda row: row["date"]):
        case = row["case"]
        key = (case["ranks"], case["gbit_per_s"], case["heads"], case["head_dim"])
        found[key][row["impl"]] = row
    return dict(sorted(found.items()))


def over_best(measured: dict[str, Row]) -> float:
    """Time of ``auto``, as a multiple of that of the fastest strategy."""
    return measured["auto"]["p50"] / min(measured[name]["p50"] for name in EXACT)


def table(folder: Path) -> str:
    """Medians of every strategy, and as multiples of the model over the measured link."""
    body = []
    for (ranks, rate, heads, dim), measured in cases(folder).items():
        link = Link.parse(measured["auto"]["case"]["link"])
        state = f"{heads} x {dim} x {dim}"
        cells = [str(ranks), f"{rate:g}", f"{8 * link.gb_per_s:.2g}", state]
        for name in (*EXACT, "auto"):
            row = measured[name]
            cells.append(f"{row['p50']:.2f} ({row['p50'] / row['bound']:.2f})")
        ((taken, _),) = measured["auto"]["case"]["strategy"]
        moved = measured.get(TOKENS)
        body.append(
            [*cells, taken, f"{over_best(measured):.2f}", f"{moved['p50']:.0f}" if moved else ""]
        )
    head = ["P", "wire, Gbit/s", "measured link", "state", *EXACT, "auto", "auto takes"]
    return "\n".join(markdown([*head, "auto / best", f"{TOKENS}, ms"], body, [3, 8]))


TABLES = MarkedTables("wires", table)

if __name__ == "__main__":
    TABLES.answer(__doc__)
