"""Exchanges over slow wires: the benchmark runs, and what the committed rows must show."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks import lasp_wire, wire_tables
from benchmarks.harness import RESULTS, Machine
from tests.ranks import run_on_ranks

ROOT = Path(__file__).parents[2]


def rows_on_rank() -> list[dict[str, Any]]:
    options = lasp_wire.Options(commit="0", heads=(2,), head_dims=(8,), tokens=4)
    return list(lasp_wire.rows(options, Machine("cpu", samples=1)))


def test_every_exchange_is_right_and_measured() -> None:
    rows = run_on_ranks(rows_on_rank, 2)[0]
    assert [row["impl"] for row in rows] == [
        "all_gather",
        "sliced",
        "scan",
        "auto",
        lasp_wire.TOKENS,
    ]
    assert all(row["p50"] > 0 and row["bound"] > 0 for row in rows)


def test_auto_is_within_a_tenth_of_the_best_over_every_wire() -> None:
    cases = wire_tables.cases(ROOT / RESULTS)
    assert {(ranks, rate) for ranks, rate, *_ in cases} == {
        (ranks, rate) for ranks in (2, 4) for rate in (0.1, 0.3, 1, 3, 10)
    }
    for case, measured in cases.items():
        assert wire_tables.over_best(measured) < 1.1, case


def test_the_model_is_within_a_quarter_at_a_tenth_of_a_gigabit() -> None:
    for (ranks, rate, heads, _), measured in wire_tables.cases(ROOT / RESULTS).items():
        if rate == 0.1:
            for name, row in measured.items():
                if name != lasp_wire.TOKENS:
                    assert 0.8 < row["p50"] / row["bound"] < 1.25, (ranks, heads, name)


def test_the_page_has_what_the_rows_say() -> None:
    page = (ROOT / "docs/multi-node.md").read_text()
    assert wire_tables.TABLES.rewritten(page, ROOT / RESULTS) == page, (
        "run benchmarks.wire_tables --write"
    )
