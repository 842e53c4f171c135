from __future__ import annotations

import json
import sys

import pytest
import torch

from benchmarks import lightning_length
from benchmarks.harness import answer, parse
from benchmarks.lightning_kernels import Case
from benchmarks.lightning_length import Impl, Limits


def test_sweep_ends_with_the_first_length_over_the_limit() -> None:
    """The limit is for one call, forward or backward, and a length is measured to its end."""

    def measure_at(tokens):
        yield {"tokens": tokens, "metric": "forward_ms", "unit": "ms", "p50": tokens / 2}
        yield {"tokens": tokens, "metric": "backward_ms", "unit": "ms", "p50": tokens}
        yield {"tokens": tokens, "metric": "extra_mib", "unit": "MiB", "p50": 1e9}

    rows = list(lightning_length.sweep([400, 100, 200, 800], measure_at, limit_ms=200))
    assert [row["tokens"] for row in rows] == [100] * 3 + [200] * 3 + [400] * 3


def test_a_row_comes_before_the_next_is_measured() -> None:
    def measure_at(tokens):
        yield {"metric": "forward_ms", "unit": "ms", "p50": 1.0}
        raise KeyboardInterrupt

    rows = lightning_length.sweep([1], measure_at, limit_ms=1)
    assert next(rows)["metric"] == "forward_ms"
    with pytest.raises(KeyboardInterrupt):
        next(rows)


@pytest.mark.parametrize(("first", "calls"), [(60.0, 3), (600.0, 2), (1500.0, 1)])
def test_long_calls_are_repeated_within_a_second(first, calls) -> None:
    assert lightning_length.repeat(first, lambda: first) == [first] * calls


def test_bounds_are_bytes_where_linear_and_products_where_not() -> None:
    case = Case(heads=2, tokens=1000, head_dim=64)
    limits = Limits(bytes_per_s=1e9, flops_per_s=1e12)
    tensor_ms = 1000 * 2 * 64 * 2 / 1e9 * 1e3
    forward, backward = lightning_length.bounds(Impl(lambda case: None), case, limits)
    assert forward["bound"] == pytest.approx(4 * tensor_ms)
    assert backward["bound"] == pytest.approx(7 * tensor_ms)
    # A product: for each pair of a token and one not after it, a multiplication and an addition.
    product_ms = sum(range(1, 1001)) * 2 * 64 * 2 / 1e12 * 1e3
    quadratic = Impl(lambda case: None, quadratic=True)
    forward, backward = lightning_length.bounds(quadratic, case, limits)
    assert forward["bound"] == pytest.approx(2 * product_ms)
    assert backward["bound"] == pytest.approx(5 * product_ms)


def test_softmax_baseline_is_causal_softmax() -> None:
    q, k, v = (torch.randn(9, 2, 8, dtype=torch.float64) for _ in range(3))
    scores = torch.einsum("thd,shd->hts", q, k) / 8**0.5
    scores.masked_fill_(torch.ones(9, 9).triu(1).bool(), float("-inf"))
    expected = torch.einsum("hts,shd->thd", scores.softmax(-1), v)
    torch.testing.assert_close(lightning_length.softmax(q, k, v), expected)


def test_default_lengths_go_from_1k_to_1m() -> None:
    options = parse(lightning_length.Sweep, "", ["--commit", "x"])
    assert options.lengths[0] == 1024
    assert options.lengths[-1] == 1048576


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["lasp triton", "lightning attention 1", "flash 2", "cudnn"])
def test_a_run_leaves_rows(name, tmp_path, monkeypatch) -> None:
    arguments = ["--commit", "test", "--lengths", "256", "512", "--heads", "3", "--only", name]
    monkeypatch.setattr(sys, "argv", ["lightning_length", *arguments, "--out", str(tmp_path)])
    answer(lightning_length.QUESTION, "")
    (path,) = tmp_path.iterdir()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(r["case"]["tokens"], r["metric"]) for r in rows] == [
        (tokens, metric)
        for tokens in (256, 512)
        for metric in ("forward_ms", "backward_ms", "extra_mib")
    ]
    assert all(row["p50"] > 0 and row["bound"] > 0 for row in rows if row["unit"] == "ms")
