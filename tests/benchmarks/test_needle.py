"""The experiments on recall and on cut experts run, and their data are what they say."""

from __future__ import annotations

from itertools import pairwise
from typing import Any
from unittest.mock import patch

import pytest
import torch

from benchmarks import moe_against_tp, needle
from benchmarks.harness import Machine
from tests.ranks import run_on_ranks


def test_questions_have_the_values_of_their_keys() -> None:
    some = needle.documents(torch.Generator().manual_seed(0), 5, 64, pairs=9, questions=4)
    for tokens, labels in zip(*(x.tolist() for x in some)):
        said = {a: b for a, b in pairwise(tokens[:56]) if a < needle.KINDS}
        assert len(said) == sum(token < needle.KINDS for token in tokens[:56]) == 9
        asked = [at for at, label in enumerate(labels) if label != needle.NO_LABEL]
        assert asked == [56, 58, 60, 62]
        assert len({tokens[at] for at in asked}) == 4
        for at in asked:
            assert labels[at] == said[tokens[at]] == tokens[at + 1]
            assert needle.KINDS <= labels[at] < 2 * needle.KINDS


def test_too_many_pairs_raise() -> None:
    with pytest.raises(ValueError, match="pairs must be at least 1 questions and at most 15"):
        needle.documents(torch.Generator(), 1, 32, pairs=16, questions=1)


def rows(**change: Any) -> list[dict[str, Any]]:
    sizes: dict[str, Any] = {"length": 32, "pairs": 4, "documents": 4, "layers": 4, "tests": 1}
    sizes |= {"hidden_size": 32, "steps": 2} | change
    options = needle.Sizes(commit="c", **sizes)
    return list(needle.rows(options, Machine("cpu", torch.float32)))


def test_models_of_one_size_are_asked() -> None:
    found = rows(seeds=(0, 1), patterns=("lightning", "3:1", "softmax"))
    assert [(r["case"]["pattern"], r["case"]["seed"], r["metric"]) for r in found] == [
        (pattern, seed, metric)
        for pattern in ("lightning", "3:1", "softmax")
        for seed, metrics in (
            (0, ("loss", "recall_accuracy", "needle_accuracy")),
            (1, ("loss", "recall_accuracy", "needle_accuracy")),
            ("all", ("recall_accuracy", "needle_accuracy")),
        )
        for metric in metrics
    ]
    sizes = [r["case"]["parameters"] for r in found if r["metric"] == "loss"]
    assert max(sizes) < 1.02 * min(sizes)


def test_a_needle_is_learned() -> None:
    """Two softmax layers find one of four values within seconds; chance is a quarter."""
    with patch.object(needle, "KINDS", 4):
        change = {"documents": 32, "layers": 2, "hidden_size": 64, "steps": 120, "tests": 4}
        found = rows(seeds=(0,), patterns=("softmax",), learning_rate=4e-3, **change)
    accuracy = {r["metric"]: r["p50"] for r in found}
    assert accuracy["needle_accuracy"] > 0.6, accuracy


def against_tp_on_rank() -> list[dict[str, Any]]:
    options = moe_against_tp.Options(
        commit="c", device="cpu", tokens=(32,), hidden=24, ffn=16, experts=8
    )
    return list(moe_against_tp.rows(options, Machine("cpu", torch.float32, 2)))


def test_experts_against_tensor_parallelism() -> None:
    found = run_on_ranks(against_tp_on_rank, 2)[0]
    assert [(r["impl"], r["metric"]) for r in found] == [
        (name, metric) for name in moe_against_tp.ways(2) for metric in ("both_ms", "x_plain")
    ]
    assert found[1]["p50"] == 1.0
    assert "EP-ETP" in moe_against_tp.ways(4)
