"""The benchmark of the host's time runs, at sizes that say nothing about speed."""

from __future__ import annotations

import pytest
import torch

from benchmarks import moe_host
from benchmarks.harness import Machine
from benchmarks.trace_parts import Span

SIZES = {"tokens": 16, "busy_tokens": 32, "hidden": 64, "ffn": 16, "experts": 8, "top_k": 2}


@pytest.fixture
def few_calls(monkeypatch):
    monkeypatch.setattr(moe_host, "ROUNDS", 3)
    monkeypatch.setattr(moe_host, "host_us", lambda call, **_: (call(), [1e3, 2e3, 3e3])[1])


def test_times_of_the_host_and_of_calls_behind_each_other(few_calls, capsys) -> None:
    options = moe_host.Options(commit="c", device="cpu", **SIZES)
    rows = list(moe_host.rows(options, Machine("cpu", torch.float32)))
    assert [(row["impl"], row["metric"], row["case"]["tokens"]) for row in rows] == [
        ("lasp", "forward_host_us", 16),
        ("bare products", "forward_host_us", 16),
        ("lasp", "both_host_us", 16),
        ("bare products", "both_host_us", 16),
        ("lasp", "forward_ms", 32),
        ("lasp", "both_ms", 32),
    ]
    assert [row["bound_name"] for row in rows[:4]] == ["bare products", None] * 2
    assert rows[4]["p50"] == 2.0
    assert rows[4]["bound"] is None
    assert "left out: the time of kernels alone" in capsys.readouterr().out


def test_the_bound_of_calls_is_the_time_in_which_something_runs(monkeypatch) -> None:
    made: list[None] = []

    def kernels(call):
        call()
        return [Span("a", 0.0, 3e3), Span("b", 2e3, 4e3), Span("Memcpy", 5e3, 6e3)]

    monkeypatch.setattr(moe_host, "kernels", kernels)
    busy = moe_host.busy_ms(lambda: made.append(None))
    assert busy == 5 / len(made)
