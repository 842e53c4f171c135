"""Checkpoints of full size by their headers, and memory that is measured."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.checkpoint_conversion import (
    NARROW,
    measured,
    same_files,
    write_headers,
    write_random,
)
from lasp.checkpoints import Options, Target, open_source, plan
from lasp.hybrid import NAMED_CONFIGS

pytestmark = pytest.mark.slow

GB = 10**9
# Tensors of files; GB of weights; GB of memory at most, to a checkpoint and to files of 4 GB.
FULL = {
    "minimax-text-01": (8_243, 912, 1.7, 4.7),
    "ling-2.5-1t": (59_413, 2_024, 2.5, 4.9),
}


@pytest.mark.parametrize("model", FULL)
def test_a_conversion_of_full_size_is_planned(model: str, tmp_path: Path) -> None:
    count, weights, checkpoint, files = FULL[model]
    write_headers(NAMED_CONFIGS[model], tmp_path / "in")
    source = open_source(tmp_path / "in")
    assert len(source.storage.tensors) == count
    most: dict[Target, float] = {"plain": checkpoint, "megatron": checkpoint, "hf": files}
    for to, bound in most.items():
        conversion = plan(source, Options(to))
        assert conversion.num_bytes // GB == weights
        assert conversion.largest_bytes < bound * GB


def test_memory_is_what_the_plan_says(tmp_path: Path) -> None:
    """1.2 GB of weights, experts of 38 MB, shards of 100 MB."""
    moe = replace(NARROW.moe, ffn_size=3072, num_experts=4)
    write_random(replace(NARROW, moe=moe, vocab_size=20_032), tmp_path / "in")
    for source, out, to in (
        ("in", "plain", "plain"),
        ("plain", "out", "hf"),
        ("in", "m", "megatron"),
    ):
        of = measured(tmp_path / source, tmp_path / out, to, shard_bytes=GB // 10)
        assert of.used_bytes < of.bound_bytes + 50 * 2**20  # of the allocator
        assert of.bound_bytes < of.num_bytes / 3
    assert same_files(tmp_path / "in", tmp_path / "out")
