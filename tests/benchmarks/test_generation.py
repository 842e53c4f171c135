"""The benchmark of generation runs, at sizes that say nothing about speed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks import generation
from benchmarks.figures import FIGURES
from benchmarks.harness import Machine
from lasp.hybrid import AttentionConfig
from moe_parallel import MoEConfig
from tests.ranks import run_on_ranks

SMALL = replace(
    generation.GROUP,
    attention=AttentionConfig(4, 2, 16, rotary_dim=8),
    moe=MoEConfig(32, 32, num_experts=4, top_k=2),
)


def rows_on_rank() -> list[dict[str, Any]]:
    options = generation.Options(
        commit="", parts=(*generation.PARTS,), batches=(1, 2), contexts=(64, 128), prompts=(96,)
    )
    options.chunk_tokens = 64
    return [*generation.rows(options, Machine("cpu", torch.float32, 1), SMALL)]


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_generation(num_ranks: int) -> None:
    rows = run_on_ranks(rows_on_rank, num_ranks)[0]
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(row["impl"], []).append(row)
        assert row["p50"] >= 0
        assert row["case"]["ranks"] == num_ranks
    for name in ("lightning layer", "softmax layer", "keys of a softmax layer", "model.step"):
        assert found[name], name
    assert ("DecodeGraph" in found) == (num_ranks == 1)
    assert {row["case"]["ratio"] for row in found["sum of layers"]} == {*generation.RATIOS}
    shares = [of[0]["p50"] for of in found.values() if of[0]["metric"] == "share"]
    assert sum(shares) == pytest.approx(1)
    key_bytes = [row["bound"] for row in found["keys of a softmax layer"]]
    assert key_bytes == pytest.approx([2 * 2 * 16 * 4 * n / num_ranks / 1e6 for n in (64, 128)])
    for panel in FIGURES["generation"][:2]:
        assert panel.series(rows), panel.title
