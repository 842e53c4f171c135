"""Results are remembered up to a number of bytes."""

from __future__ import annotations

import torch

from lasp._core.cache import ByteCache
from lasp.lightning.triton import segments
from lasp.sequence import layout
from lasp.sequence.layout import SequenceLayout


def test_the_last_results_within_the_bytes_are_kept() -> None:
    cache: ByteCache[str] = ByteCache(6, len)
    made: list[str] = []

    def get(result: str) -> str:
        return cache.get(result, lambda: made.append(result) or result)  # type: ignore[func-returns-value]

    for result in ("aa", "bb", "cc", "aa", "dd", "aa", "cc", "bb"):
        assert get(result) == result
    assert made == ["aa", "bb", "cc", "dd", "bb"]  # bb was asked for before aa, and made way for dd
    assert cache.num_bytes == 6
    get("longer than all")
    get("longer than all")
    assert made[5:] == ["longer than all"]  # the very last stays, however long
    get("ee")
    assert cache.num_bytes == 2


def test_large_batches_leave_no_more_bytes_than_small_ones() -> None:
    tokens, cpu = 2**20, torch.device("cpu")
    for number in range(12):
        large = SequenceLayout((tokens - number, number), 1)
        large.position_ids(0)
        segments.plan_of(
            large, 0, cpu, reverse=False, with_initial=False, with_final=False, length=4096
        )
    for cache in (layout._POSITIONS, segments._PLANS):
        assert 0 < cache.num_bytes <= cache.max_bytes == 64 * 2**20
