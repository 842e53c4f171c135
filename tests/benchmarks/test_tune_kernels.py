"""The tuner without a GPU: what it tries and how it ranks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the kernels need triton, which has no wheel here")

from triton.runtime.errors import OutOfResources

from benchmarks.tune_kernels import candidates, time_all
from lasp.lightning.triton import tuning
from lasp.lightning.triton.tuning import Blocks


def test_candidates_hold_the_cut_in_use() -> None:
    for dim in (64, 128, 256):
        current = tuning.output_blocks(dim, dim, torch.bfloat16)
        assert current[:4] in {blocks[:4] for blocks in candidates(dim)}
    assert all(blocks.columns == 64 for blocks in candidates(48))


def test_ranks_what_is_right_and_fits() -> None:
    fast, slow, wrong, large = (Blocks(64, 64, 4, stages) for stages in (1, 2, 3, 4))

    def run() -> Tensor:
        blocks = tuning.output_blocks(128, 128, torch.bfloat16)
        if blocks == large:
            raise OutOfResources(300_000, 230_000, "shared memory")
        return torch.ones(4) * (2 if blocks == wrong else 1)

    def time_ms(_: object) -> float:
        return float(tuning.output_blocks(128, 128, torch.bfloat16).num_stages)

    assert time_all(run, iter([slow, wrong, large, fast]), time_ms) == [(1.0, fast), (2.0, slow)]
