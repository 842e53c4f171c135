"""Plans of launches: what a new pack costs before it runs."""

from __future__ import annotations

import random
from unittest.mock import patch

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need triton, which has no wheel here")

from lasp import SequenceLayout, decay_rates, lightning_attention
from lasp._core.launcher import Launcher
from lasp.lightning.triton import chunk_scan, chunk_state, scan_launches, tuning

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


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("hopper_blocks", lambda *_: tuning.HopperBlocks(64, 1, False, 168)),
        ("waits_for_memory", lambda *_: False),
        ("output_blocks", lambda *_: tuning.Blocks(32, 64, 64, 4, 1)),
        ("state_blocks", lambda *_: tuning.Blocks(32, 64, 64, 4, 1)),
        ("combine_blocks", lambda _: (4, 512)),
        ("segment_length", lambda *_: 1024),
        ("part_length", lambda *_: 512),
    ],
)
def test_a_tuner_that_replaces_a_choice_gets_its_launches(name: str, other: object) -> None:
    launched: list[tuple[object, ...]] = []
    q, k, v = (torch.zeros(TOKENS, HEADS, 128, dtype=torch.bfloat16) for _ in range(3))
    rates = decay_rates(HEADS, 1, 2)
    # Segments of one document, and some that two share.
    layouts = [SequenceLayout(lengths, num_ranks=1) for lengths in ((TOKENS,), (5, TOKENS - 5))]

    def note(launcher: Launcher, programs: int, *_: object) -> None:
        launched.append((launcher, programs))

    many = {"device_limits": lambda _: (132, 220 * 1024)}
    with (
        patch.object(Launcher, "__call__", note),
        patch.multiple(chunk_scan, **many),
        patch.multiple(chunk_state, **many),
        patch.object(scan_launches, "is_hopper", lambda _: True),
    ):
        scan_launches.scan_launches.cache_clear()  # another test may have met these forms
        seen = []
        for patched in (False, True):
            with patch.object(tuning, name, other if patched else getattr(tuning, name)):
                for layout in layouts:
                    lightning_attention(
                        q, k, v, rates, layout=layout, impl="triton", output_final_state=False
                    )
            seen.append(tuple(launched))
            launched.clear()
    scan_launches.scan_launches.cache_clear()
    assert seen[0] != seen[1]
