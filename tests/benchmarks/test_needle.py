"""The experiments on recall and on cut experts run, and their data are what they say."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch

from benchmarks import moe_against_tp, needle
from benchmarks.harness import Machine
from tests.ranks import run_on_ranks

KINDS = 128


def drawn(slots: list[list[int]]) -> needle.Documents:
    return needle.written(torch.Generator().manual_seed(0), torch.tensor(slots), KINDS)


def test_questions_have_the_values_of_their_keys() -> None:
    generator = torch.Generator().manual_seed(0)
    slots = needle.asked_slots(generator, 5, 64, 9)
    assert sorted(slots[0, :23].tolist()) == [needle.FILLER] * 14 + list(range(9))
    some = needle.written(generator, slots, KINDS)
    for tokens, labels in zip(*(x.tolist() for x in some)):
        said = {a: b for a, b in pairwise(tokens[:46]) if a < KINDS}
        assert len(said) == sum(token < KINDS for token in tokens[:46]) == 9
        asked = [at for at, label in enumerate(labels) if label >= KINDS]
        assert asked == list(range(46, 64, 2))
        assert {tokens[at] for at in asked} == set(said)
        for at in asked:
            assert labels[at] == said[tokens[at]] == tokens[at + 1]
            assert KINDS <= labels[at] < 2 * KINDS


def test_only_keys_seen_before_are_asked() -> None:
    for tokens, labels in zip(*(x.tolist() for x in drawn([[2, -1, 0, 2, 0, 2], [1] * 6]))):
        for at in range(0, 12, 2):
            key, value = tokens[at : at + 2]
            if key >= KINDS:
                assert labels[at : at + 2] == [needle.NO_LABEL] * 2
            else:
                asked = value if key in tokens[:at] else needle.NO_LABEL
                assert labels[at : at + 2] == [asked, key]


def test_documents_grow_from_lessons_to_the_test() -> None:
    options = needle.Sizes(commit="c", length=128, pairs=(1, 16), lesson_length=16, steps=24)
    generator = torch.Generator()
    shapes = [tuple(needle.slots_of(step, generator, options).shape) for step in range(24)]
    assert shapes[:12] == [(128, 8)] * 12
    assert shapes[12:] == [(64, 16)] * 2 + [(32, 32)] * 2 + [(16, 64)] * 8
    last = needle.slots_of(23, generator, options)
    assert (last == needle.FILLER).sum(1).tolist() == [62] * 8 + [32] * 8


@pytest.mark.parametrize("pairs", [(0, 1), (1, 9)])
def test_too_many_pairs_raise(pairs: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="pairs must be from 1 to 8, a quarter of the tokens"):
        needle.Sizes(commit="c", length=32, pairs=pairs)


def test_lessons_longer_than_the_test_raise() -> None:
    with pytest.raises(ValueError, match="lesson_length must be from 2 to the 32 tokens"):
        needle.Sizes(commit="c", length=32, pairs=(1,), lesson_length=64)


def test_every_number_of_pairs_has_as_many_documents() -> None:
    with pytest.raises(ValueError, match="documents must be a multiple of 3"):
        needle.Sizes(commit="c", pairs=(1, 2, 4))


def rows(**change: Any) -> list[dict[str, Any]]:
    sizes: dict[str, Any] = {"length": 32, "pairs": (1, 4), "documents": 4, "layers": 4, "tests": 1}
    sizes |= {"lesson_length": 16, "lesson_pairs": 4, "hidden_size": 32, "steps": 2} | change
    options = needle.Sizes(commit="c", **sizes)
    return list(needle.rows(options, Machine("cpu", torch.float32)))


def test_models_of_one_size_are_asked() -> None:
    found = rows(seeds=(0, 1), patterns=("lightning", "3:1", "softmax"))
    asked = [
        (r["case"]["pattern"], r["case"]["seed"], r["metric"], r["case"].get("pairs"))
        for r in found
    ]
    of_seed = (("loss", None), ("accuracy", 1), ("accuracy", 4))
    assert asked == [
        (pattern, seed, *metric)
        for pattern in ("lightning", "3:1", "softmax")
        for seed, metrics in ((0, of_seed), (1, of_seed), ("all", of_seed[1:]))
        for metric in metrics
    ]
    sizes = [r["case"]["parameters"] for r in found if r["metric"] == "loss"]
    assert max(sizes) < 1.02 * min(sizes)


@pytest.mark.slow
def test_recall_is_learned() -> None:
    """Four softmax layers learn to look up within a minute; chance is an eighth."""
    change = {"documents": 32, "hidden_size": 64, "steps": 240, "tests": 4, "kinds": 8}
    found = rows(seeds=(0,), patterns=("softmax",), learning_rate=3e-3, **change)
    accuracy = {r["case"].get("pairs"): r["p50"] for r in found}
    assert accuracy[1] > 0.9, accuracy
    assert accuracy[4] > 0.9, accuracy


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
