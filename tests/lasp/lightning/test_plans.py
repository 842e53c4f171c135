"""Plans of launches: what a new pack costs before it runs."""

from __future__ import annotations

import random
from unittest.mock import patch

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need triton, which has no wheel here")

from lasp import SequenceLayout, decay_rates, lightning_attention
from lasp._core.launcher import Launcher
from lasp.lightning.triton import chunk_scan, chunk_state

TOKENS, HEADS = 16384, 4


def random_pack(rng: random.Random) -> SequenceLayout:
    """Documents of any lengths, mostly a few thousand tokens."""
    lengths: list[int] = []
    while (left := TOKENS - sum(lengths)) > 0:
        lengths.append(min(left, int(rng.lognormvariate(7, 1.5)) + 1))
    return SequenceLayout(lengths, num_ranks=1)


def test_new_packs_compile_nothing() -> None:
    """A launcher compiles once, so no pack may need one that those before did not."""
    compiled: set[Launcher] = set()
    shape = TOKENS, HEADS, 64
    q, k, v = (torch.zeros(shape, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    rates, rng, counts = decay_rates(HEADS, 1, 2), random.Random(0), []
    many = {"device_limits": lambda _: (132, 220 * 1024)}  # as of an H200: many segments
    with (
        patch.object(Launcher, "__call__", lambda self, *_: compiled.add(self)),
        patch.multiple(chunk_scan, **many),
        patch.multiple(chunk_state, **many),
    ):
        for _ in range(50):
            output, _ = lightning_attention(
                q, k, v, rates, layout=random_pack(rng), impl="triton", output_final_state=False
            )
            torch.autograd.grad(output, (q, k, v), v)
            counts.append(len(compiled))
    assert counts[0] > 6  # states, their passing, and scans with and without a mask
    assert counts[-1] == counts[0]
