"""Results are remembered up to a number of bytes."""

from __future__ import annotations

import gc
import tracemalloc
import weakref
from contextlib import ExitStack
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from lasp import SequenceLayout, lightning_attention
from lasp._core.cache import ByteCache, holding_results, remembered, tensor_cache
from lasp.lightning.triton import segments
from lasp.sequence import layout, state_flow


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


def test_what_results_share_counts_once() -> None:
    shared: ByteCache[tuple[str, ...]] = ByteCache(
        9, lambda result: 1, lambda result: [(part, len(part)) for part in result]
    )
    long, short = "six...", "abc"
    for number in range(3):
        shared.get(number, lambda: (long,))
    assert shared.num_bytes == 6 + 3
    shared.get(3, lambda: (short,))  # the others make way one by one, the last of them with `long`
    assert shared.num_bytes == 3 + 1
    shared.get(4, lambda: (short, short))
    assert shared.num_bytes == 3 + 2


def test_all_layers_of_a_long_sequence_keep_their_launch_plans() -> None:
    pytest.importorskip("triton", reason="the kernels need triton, which has no wheel here")
    from lasp._core.launcher import Launcher
    from lasp.lightning.triton import schedule

    q = torch.ones(2**17, 1, 1, requires_grad=True)

    def step() -> None:
        for layer in range(1, 81):
            output = lightning_attention(q, q, q, torch.tensor([layer / 80]), impl="triton").output
            torch.autograd.grad(output, q, output.detach())

    with patch.object(Launcher, "__call__"):
        step()
        with patch.object(schedule, "_context", wraps=schedule._context) as planned:
            step()
    planned.assert_not_called()


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


def test_batches_of_many_documents_hold_the_bytes_that_are_counted() -> None:
    pytest.importorskip("triton", reason="the kernels need triton, which has no wheel here")
    from lasp._core.launcher import Launcher
    from lasp.lightning.triton import schedule

    caches = (
        layout._POSITIONS, layout._LAYOUTS, state_flow._FLOWS, segments._PLANS,
        schedule._FORWARD, schedule._BACKWARD,
    )  # fmt: skip

    def counted() -> int:
        return sum(cache.num_bytes for cache in caches)

    def step(number: int) -> None:
        batch = SequenceLayout((20 + number, *(20 + i % 41 for i in range(1000))), 1)
        q = torch.ones(batch.num_local_tokens, 1, 1, requires_grad=True)
        output = lightning_attention(q, q, q, torch.ones(1), layout=batch, impl="triton").output
        torch.autograd.grad(output, q, output.detach())

    with ExitStack() as within:
        within.enter_context(patch.object(Launcher, "__call__"))
        for cache in caches:  # others' tests may have filled them: nothing is let go here
            within.enter_context(patch.object(cache, "max_bytes", 2**40))
        step(0)
        tracemalloc.start()
        before = counted(), tracemalloc.get_traced_memory()[0]
        for number in range(1, 5):
            step(number)
        gc.collect()
        after = counted(), tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
    assert 0 < after[1] - before[1] <= after[0] - before[0]


def test_what_is_handed_out_lives_as_long_as_its_holder() -> None:
    """Whichever cache remembers it: a CUDA graph reads its memory after the cache let it go."""
    made: list[weakref.ref[Tensor]] = []

    def make(_: int = 0) -> Tensor:
        x = torch.zeros(1)
        made.append(weakref.ref(x))
        return x

    by_bytes, by_number = ByteCache[Tensor](0, lambda _: 1), tensor_cache(1)(make)
    by_dict: dict[int, Tensor] = {}

    def ask(key: int) -> None:
        by_bytes.get(key, make), by_number(key), remembered(by_dict, key, make)

    ask(0)
    with holding_results() as held:
        ask(0)
    ask(1)
    by_dict.clear()
    assert [x() is not None for x in made[:3]] == [True] * 3
    del held
    assert [x() is not None for x in made[:3]] == [False] * 3
