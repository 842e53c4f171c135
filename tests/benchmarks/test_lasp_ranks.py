"""The benchmarks run, at sizes that say nothing about speed."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import lasp_model, lasp_ranks, lasp_tables
from benchmarks.harness import Machine
from benchmarks.timing import Timed, samples_ms
from lasp.state_exchange.cost import NVLINK, Link
from tests.ranks import run_on_ranks

NAMES = tuple(lasp_ranks.IMPLS)


def rows_on_rank(cases: list[lasp_ranks.Case]) -> list[dict[str, Any]]:
    machine = Machine("cpu", torch.float32, 1)
    lasp_ranks.check(NAMES, machine)
    rows = []
    for case in cases:
        rows += lasp_ranks.measure(case, NAMES, machine)
        rows += lasp_ranks.measure_exchange(case, NAMES, machine)
    return rows


@pytest.mark.parametrize("num_ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_lasp_ranks(num_ranks: int, tmp_path: Path) -> None:
    """Every implementation is right, is measured, and receives what it should; rows make tables."""
    heads, tokens, dim = 2 * num_ranks, 40, 4
    cases = [
        lasp_ranks.Case(heads, tokens, 78, 1, "contiguous", dim),
        lasp_ranks.Case(heads, tokens, 0, 3, "zigzag", dim),
    ]
    rows = run_on_ranks(rows_on_rank, num_ranks, cases)[0]
    found: dict[int, dict[str, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        assert row["p20"] <= row["p50"] <= row["p80"]
        found[row["case"]["documents"]][row["impl"]][row["metric"]] = row["p50"]
    whole = found[1]
    not_exact = set() if num_ranks == 2 else {"one_hop"}  # in runs of 40 or 80 tokens
    assert set(whole) == set(NAMES) - not_exact
    times, moved = {"forward_ms", "backward_ms"}, {"forward_bytes", "backward_bytes"}
    state = heads * dim * dim * 4
    for name, metrics in whole.items():
        assert times | moved <= set(metrics), name
        assert ("exchange_ms" in metrics) == (name in lasp_ranks.EXCHANGES)
    assert whole["local"]["forward_bytes"] == 0
    assert whole["LASP"]["forward_bytes"] == whole["scan"]["backward_bytes"] == state
    assert whole["LASP-2"]["forward_bytes"] == (num_ranks - 1) * state
    # q, k, v and the output: of each all but the part that stays.
    assert whole["head parallel"]["forward_bytes"] == (
        4 * tokens * heads * dim * 4 * (num_ranks - 1) // num_ranks
    )
    assert not {"LASP", "head parallel"} & set(found[3])

    facts = {"device": "GPU", "num_devices": num_ranks, "nccl": "2", "torch": "2", "triton": "3"}
    facts |= {"driver": "1", "date": "2026-01-01", "commit": "0" * 40}
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row | facts) + "\n" for row in rows))
    text = lasp_tables.tables(lasp_tables.read(tmp_path))
    assert f"### {num_ranks} x GPU" in text
    assert f"| LASP | {state / 1e6:.2f} | {state / 1e6:.2f} |" in text
    exchanges = lasp_model.read(tmp_path)
    assert {row.impl for row in exchanges} == set(lasp_ranks.EXCHANGES) - not_exact
    assert all(row.model_us(NVLINK) > 0 for row in exchanges)


def samples_on_rank(seconds: float) -> int:
    machine = Machine("cpu", torch.float32, 20, seconds)
    return len(samples_ms({"nothing": Timed(int)}, machine)["nothing"])


def test_samples_fit_into_seconds() -> None:
    assert run_on_ranks(samples_on_rank, 2, 0.0) == [3, 3]
    assert run_on_ranks(samples_on_rank, 2, 60.0) == [20, 20]


def test_the_fit_finds_the_link_behind_the_rows() -> None:
    link = Link(latency_us=7.0, gb_per_s=200.0, launch_us=30.0, rank_us=2.0)
    sizes = [lasp_model.StateSize(heads, 128, 128) for heads in (8, 64)]
    rows = []
    for ranks in (2, 4, 8):
        for size in sizes:
            for name in ("all_gather", "sliced", "scan"):
                traffic = lasp_model.one_document(ranks)
                choice = lasp_model.ExchangeChoice(name, tuple(range(size.heads)), 2)
                part = (choice, traffic, size)
                row = lasp_model.Measured(name, "GPU", {}, 0.0, (part,))
                rows.append(row._replace(us=row.model_us(link)))
    fitted = lasp_model.fitted(rows, NVLINK)
    for name in ("latency_us", "gb_per_s", "launch_us", "rank_us"):
        assert getattr(fitted, name) == pytest.approx(getattr(link, name), rel=1e-9)
