"""Sliding windows: exact over ranks, orders and blocks, and only what a window sees moves."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from lasp.sequence.layout import SequenceLayout
from ring import ring_attention
from ring.blocks import flash
from ring.blocks.interface import QKV
from ring.blocks.merge import Partial
from ring.blocks.registry import BLOCKS
from ring.planner.schedule import plan_ring
from ring.planner.window import CAUSAL, EVERYTHING, Window
from tests.closeness import assert_equal_to_rounding
from tests.ranks import run_on_ranks
from tests.ring.blocks.test_blocks import skip_unless_it_serves
from tests.ring.cases import (
    HEADS,
    ORDERS,
    RULES,
    assert_all_equal,
    assert_all_within_budget,
    forward_backward,
    on_ranks,
    on_world,
    oracle,
    planned_by,
    random_tensors,
    unshard_all,
)

PACKS = ((40,), (5, 1, 30), (0, 4, 0, 0, 27, 1, 0), (2, 1, 40, 3), (1, 2, 1) * 9 + (23,))
CAUSAL_WINDOWS = ((3, 0), (0, -1), (11, 0), (1, 0), (100, 0))
WINDOWS = ((3, 2), (-1, 4), (0, 9), (7, -1), (20, 20))


def cases_on_world(cases):
    results = []
    for tensors, layout, rule, kwargs in cases:
        with planned_by(rule):
            results.append(on_world(tensors, layout, **kwargs))
    return results


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
@pytest.mark.parametrize("causal", [True, False])
def test_output_and_gradients_in_float64(num_ranks: int, causal: bool) -> None:
    cases = []
    for index, lengths in enumerate(PACKS):
        for number, order in enumerate((*ORDERS, "document_zigzag")):
            tensors = random_tensors(sum(lengths), *HEADS[index % 4], 3, torch.float64, 2)
            window = (CAUSAL_WINDOWS if causal else WINDOWS)[(index + number) % 5]
            layout = SequenceLayout(lengths, num_ranks, order)
            rule = RULES[(index + number) % len(RULES)]
            cases.append((tensors, layout, rule, {"causal": causal, "window": window}))
    results = run_on_ranks(cases_on_world, num_ranks, cases)
    for (tensors, layout, _, kwargs), *of_ranks in zip(cases, *results):
        expected = oracle(tensors, layout.document_lengths, **kwargs)
        assert_all_equal(unshard_all(layout, of_ranks), expected)


def test_bfloat16_within_the_error_of_one_eager_rank() -> None:
    lengths, kwargs = (90, 1, 37), {"window": (20, 0)}
    tensors = random_tensors(128, 4, 2, 16, torch.bfloat16)
    honest = forward_backward(tensors, layout=SequenceLayout(lengths, 1), **kwargs)
    actual = on_ranks(tensors, SequenceLayout(lengths, 3, "fold"), **kwargs)
    assert_all_within_budget(
        actual, oracle(tensors, lengths, True, **kwargs), honest, torch.bfloat16
    )


def test_keys_beyond_the_window_do_not_move() -> None:
    """What moves grows with the window, and not with the document."""
    for tokens in (2**17, 2**20):
        layout = SequenceLayout((tokens,), 8)
        for rank in range(8):
            schedule = plan_ring(layout, rank, True, window=(4096, 0))
            assert schedule.received_tokens == (4096 if rank else 0)
            assert len(schedule.rows) == (1 if rank else 0)
            assert all(rows.length == 4096 for rows in schedule.rows)
    both = plan_ring(SequenceLayout((2**17,), 8), 3, False, window=(4096, 512))
    assert both.received_tokens == 4096 + 512
    assert [rows.length for rows in both.rows] == [4096, 512]
    assert plan_ring(layout, 3, True, window=(2**20 - 1, 0)) == plan_ring(layout, 3, True)


def test_a_tile_that_a_window_sees_whole_has_no_mask() -> None:
    layout = SequenceLayout((64,), 4, "zigzag")  # rank 3 holds 24:40, rank 2 has 16:24 and 40:48
    (stage,) = plan_ring(layout, 2, True, window=(40, 0)).stages
    assert {tile.window for tile in stage.tiles if tile.rows.start == 8} == {Window(8), EVERYTHING}


@pytest.mark.parametrize(
    ("window", "causal", "message"),
    [
        (3, True, "window must be None or"),
        ((3,), True, "window must be None or"),
        ((3, -2), False, "window must be None or"),
        ((3, 0.0), False, "window must be None or"),
        ((True, 0), True, "window must be None or"),
        ((3, 1), True, "window must end at the query with causal=True, got right = 1"),
    ],
)
def test_bad_windows(window, causal: bool, message: str) -> None:
    x = torch.ones(6, 2, 4)
    with pytest.raises(ValueError, match="window must") as error:
        ring_attention(x, x, x, window=window, causal=causal)
    assert message in str(error.value)


def test_blocks_without_windows_refuse_them_and_auto_takes_another() -> None:
    x = torch.ones(6, 2, 4)
    with pytest.raises(ValueError, match="block 'cpu_flash' takes no sliding window"):
        ring_attention(x, x, x, window=(2, 0), block="cpu_flash")
    # A window that hides nothing is none.
    ring_attention(x, x, x, window=(5, 0), block="cpu_flash")
    assert_equal_to_rounding(
        ring_attention(x, x, x, window=(2, 0)).output,
        ring_attention(x, x, x, window=(2, 0), block="eager").output,
    )


GPU_WINDOWS = ((300, 0), (17, 40), (-1, 64), (128, -1))


@pytest.mark.gpu
@pytest.mark.parametrize("window", GPU_WINDOWS)
@pytest.mark.parametrize("block", ["flash", "fa4"])
class TestOnGpu:
    def test_on_one_gpu(self, block: str, window: tuple[int, int]) -> None:
        skip_unless_it_serves(block, 64, 64, slides=True)
        lengths, causal = (700, 1, 77, 1300), window[1] == 0
        tensors = random_tensors(sum(lengths), 6, 2, 64, torch.bfloat16)
        kwargs = {"layout": SequenceLayout(lengths, 1), "device": "cuda", "window": window}
        honest, actual = (
            forward_backward(tensors, causal=causal, block=name, **kwargs)
            for name in ("eager", block)
        )
        expected = oracle(tensors, lengths, causal, window=window)
        assert_all_within_budget(actual, expected, honest, torch.bfloat16)

    @pytest.mark.parametrize(("rows", "keys"), [(300, 1100), (1100, 300), (130, 130)])
    def test_rectangles(self, block: str, window: tuple[int, int], rows: int, keys: int) -> None:
        """The last row stands at the last key; every row sees some."""
        skip_unless_it_serves(block, 64, 64, slides=True)
        # One side of a tile is limited, the limit hides some key, and no row is without keys.
        left, right = min(window[0], keys - 2), window[1]
        seen = Window(left) if left >= 0 else Window(right=max(right, rows - keys))
        torch.manual_seed(0)
        q, k, v = (torch.randn(n, 4, 64, device="cuda") for n in (rows, keys, keys))
        do, results = torch.randn_like(q).bfloat16(), []
        qkv = QKV(*(x.bfloat16() for x in (q, k, v)))
        for name, dtype in (("eager", torch.float64), ("eager", torch.bfloat16), (block, None)):
            some = QKV(*(x.to(dtype or x.dtype) for x in qkv))
            output, lse = BLOCKS[name].forward(some, window=seen, scale=0.125)
            merged = Partial(output.to(some.q.dtype), lse)
            gradients = BLOCKS[name].backward(
                do.to(some.q.dtype), merged, some, window=seen, scale=0.125
            )
            results.append([x.cpu() for x in (output, lse, *gradients)])
        expected, honest, actual = results
        actual = [x if x.dim() == 2 else x.bfloat16() for x in actual]
        assert_all_within_budget(actual, expected, honest, torch.bfloat16)


@pytest.mark.multi_gpu
@pytest.mark.parametrize("order", ["contiguous", "zigzag"])
def test_over_gpus(order) -> None:
    lengths, window = (700, 1, 77, 1300), (300, 0)
    tensors = random_tensors(sum(lengths), 6, 2, 64, torch.bfloat16)
    one = {"layout": SequenceLayout(lengths, 1), "device": "cuda", "window": window}
    honest = forward_backward(tensors, block="eager", **one)
    actual = on_ranks(tensors, SequenceLayout(lengths, 2, order), backend="nccl", window=window)
    expected = oracle(tensors, lengths, True, window=window)
    assert_all_within_budget(actual, expected, honest, torch.bfloat16)


class TwoSides:
    """Torch's flash kernels as they are: a limit beside none, or none, is as many keys as are."""

    @staticmethod
    def window(keys: Tensor, is_causal: bool, options: dict[str, Any]) -> Window:
        sides = [options.get(f"window_size_{side}", -1) for side in ("left", "right")]
        left, right = (-1 if side >= keys.shape[1] else side for side in sides)
        if is_causal:
            return CAUSAL
        if left < 0 and right < 0:
            return EVERYTHING
        return Window(*(side if side >= 0 else keys.shape[1] for side in (left, right)))

    def _flash_attention_forward(self, q, k, v, *args, scale: float, **options: Any):
        qkv, window = QKV(q[0], k[0], v[0]), self.window(k, args[5], options)
        part = BLOCKS["eager"].forward(qkv, window=window, scale=scale)
        return part.output[None], part.lse.T[None]

    def _flash_attention_backward(self, do, q, k, v, output, lse, *args, scale, **options: Any):
        gradients = BLOCKS["eager"].backward(
            do[0], Partial(output[0], lse[0].T), QKV(q[0], k[0], v[0]),
            window=self.window(k, args[5], options), scale=scale,
        )  # fmt: skip
        return [x[None] for x in gradients]


@pytest.mark.parametrize(
    ("rows", "keys", "window"),
    [
        (11, 4, Window(2)),
        (11, 4, Window(0)),
        (5, 4, Window(1)),
        (4, 4, Window(1)),
        (11, 4, Window(right=7)),
        (11, 4, Window(right=9)),
        (5, 4, Window(right=2)),
        (5, 4, Window(right=4)),
    ],
)
def test_flash_takes_more_rows_than_keys(rows: int, keys: int, window: Window) -> None:
    q, k, v = (torch.randn(n, 2, 8, dtype=torch.float64) for n in (rows, keys, keys))
    do, how, qkv = torch.randn_like(q), {"window": window, "scale": 0.3}, QKV(q, k, v)
    expected = BLOCKS["eager"].forward(qkv, **how)
    gradients = BLOCKS["eager"].backward(do, expected, qkv, **how)
    with patch.object(flash, "aten", TwoSides()):
        actual = BLOCKS["flash"].forward(qkv, **how)
        results = (*actual, *BLOCKS["flash"].backward(do, actual, qkv, **how))
    assert_all_equal(results, (*expected, *gradients))
