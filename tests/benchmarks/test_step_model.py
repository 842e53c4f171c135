"""The simulation of a step: what it is made of, and that it holds on two GPUs."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import step_model
from benchmarks.harness import RESULTS
from benchmarks.step_model import Job, Rates

ROOT = Path(__file__).parents[2]
RATES = Rates(products=5e11, softmax=6e11)


def test_the_fit_finds_the_rates_behind_the_rows() -> None:
    rows = []
    for model, pattern in step_model.PATTERNS.items():
        for tokens in (32768, 65536):
            parts = step_model.simulated(Job(pattern, tokens, 1), RATES)
            assert parts.kv == parts.experts == parts.states == parts.gradients == 0
            rows.append({"p50": parts.total, "case": {"model": model, "tokens": tokens}})
    assert step_model.fitted(rows) == pytest.approx(RATES, rel=1e-9)


def test_parts_over_ranks() -> None:
    two, many = (step_model.simulated(Job("7:1", 1 << 17, cp), RATES) for cp in (2, 16))
    assert many.products == pytest.approx(two.products / 8)
    assert many.softmax == pytest.approx(two.softmax / 8, rel=1e-3)  # zigzag is balanced
    assert many.states > two.states
    again = step_model.simulated(Job("7:1", 1 << 17, 2, recompute=True), RATES)
    assert again.products == pytest.approx(two.products * 4 / 3)
    assert again.softmax == two.softmax
    replicas = step_model.simulated(Job("7:1", 1 << 17, 2, dp=8), RATES)
    assert replicas[:3] == two[:3]
    assert replicas.gradients > two.gradients


def test_two_gpus_are_simulated_within_a_tenth() -> None:
    rates = step_model.fitted(step_model.measured(ROOT / RESULTS, 1))
    rows = step_model.measured(ROOT / RESULTS, 2)
    assert len(rows) >= 5
    for row in rows:
        case = row["case"]
        recompute = case["activations"] == "softmax_outputs"
        job = Job(step_model.PATTERNS[case["model"]], case["tokens"], 2, recompute=recompute)
        parts = step_model.simulated(job, rates)._replace(gradients=0.0)
        assert parts.total == pytest.approx(row["p50"], rel=0.1), case


def test_the_page_has_what_the_simulation_says() -> None:
    page = (ROOT / "docs/multi-node.md").read_text()
    assert step_model.TABLES.rewritten(page, ROOT / RESULTS) == page, (
        "run benchmarks.step_model --write"
    )
