"""What a fast dense kernel gets and what another: on the CPU with eager ones that take notes."""

from __future__ import annotations

from itertools import accumulate, pairwise
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ring.blocks import tiling
from ring.blocks.interface import QKV, Block, segments_of
from ring.blocks.merge import Partial
from ring.blocks.registry import BLOCKS
from ring.blocks.tiling import TiledBlock, tile_rectangle, tile_segments, tile_side
from ring.planner.stages import bucket
from ring.planner.window import CAUSAL, Window
from tests.ring.blocks.test_blocks import rectangle, rectangle_oracle, run_dense, run_varlen
from tests.ring.cases import HEADS, assert_all_equal, oracle, random_tensors


class Noting(Block):
    """The eager block, noting the rows and keys of each call."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, int, bool]] = []

    def obstacle(self, operands) -> None:
        return None

    def forward(self, qkv: QKV, *, window: Window, scale: float) -> Partial:
        self.shapes.append((len(qkv.q), len(qkv.k), window == CAUSAL))
        return BLOCKS["eager"].forward(qkv, window=window, scale=scale)

    def backward(self, doutput, merged, qkv: QKV, *, window: Window, scale: float) -> QKV:
        self.shapes.append((len(qkv.q), len(qkv.k), window == CAUSAL))
        return BLOCKS["eager"].backward(doutput, merged, qkv, window=window, scale=scale)


@pytest.fixture(autouse=True)
def small_thresholds():
    """Everything a thousand times smaller; what was remembered of other sizes is forgotten."""
    with patch.multiple(tiling, MIN_SIDE=4, MIN_SQUARE=8):
        for cached in (tile_rectangle, tile_segments):
            cached.cache_clear()
        yield
    for cached in (tile_rectangle, tile_segments):
        cached.cache_clear()


def make_block() -> tuple[TiledBlock, Noting, Noting]:
    dense, other = Noting(), Noting()
    return TiledBlock("cut", dense, other), dense, other


@settings(deadline=None)
@given(st.integers(1, 10**6), st.sampled_from([1, 4, 1024]))
def test_sides_are_buckets_and_one_rest(length: int, smallest: int) -> None:
    sizes = tile_side(length, smallest)
    assert sum(sizes) == length
    assert all(bucket(n) == n >= smallest and n <= 65536 for n in sizes[:-1])
    assert 0 < sizes[-1] < smallest or bucket(sizes[-1]) == sizes[-1]
    assert len(sizes) <= length // 65536 + 10


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 90), st.integers(1, 90))
def test_tiles_cover_each_pair_once_and_dense_ones_are_of_few_shapes(rows: int, keys: int) -> None:
    count = torch.zeros(rows, keys, dtype=torch.int64)
    for tile in tile_rectangle(rows, keys):
        count[tile.rows, tile.keys] += 1
        sides = [side.stop - side.start for side in (tile.rows, tile.keys)]
        assert min(sides) > 0
        assert not tile.dense or all(bucket(n) == n >= tiling.MIN_SIDE for n in sides)
    assert bool((count == 1).all())


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=6), st.booleans())
def test_local_parts_cover_each_pair_once(lengths: list[int], causal: bool) -> None:
    borders = tuple(accumulate(lengths, initial=0))
    expected = torch.zeros(borders[-1], borders[-1], dtype=torch.int64)
    for a, b in pairwise(borders):
        block = torch.ones(b - a, b - a, dtype=torch.int64)
        expected[a:b, a:b] = block.tril() if causal else block
    count = torch.zeros_like(expected)
    local = tile_segments(borders, causal)
    once = torch.zeros(borders[-1], dtype=torch.int64)  # tokens of squares and stretches
    segments = [(s.start, s.stop) for s in local.squares]
    segments += [pair for stretch in local.stretches for pair in pairwise(stretch)]
    for a, b in segments:
        block = torch.ones(b - a, b - a, dtype=torch.int64)
        count[a:b, a:b] += block.tril() if causal else block
        once[a:b] += 1
    for rows, keys in local.rectangles:
        count[rows, keys] += 1
    assert torch.equal(count, expected)
    assert bool((once == 1).all())
    if causal:
        assert all(bucket(s.stop - s.start) == s.stop - s.start >= 8 for s in local.squares)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize(("rows", "keys"), [(3, 40), (4, 4), (9, 11), (23, 31), (16, 2)])
def test_a_rectangle_in_parts_is_the_rectangle(heads, rows: int, keys: int) -> None:
    tensors = rectangle(rows, keys, heads, 5, torch.float64)
    block, dense, _ = make_block()
    assert_all_equal(run_dense(block, tensors, False), rectangle_oracle(tensors))
    assert bool(dense.shapes) == (min(rows, keys) >= 4)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    "lengths", [(1, 6, 1), (3, 40, 1, 2, 8, 9), (23,), (7, 7), (47, 1, 46), (50,)]
)
def test_segments_in_parts_are_the_segments(lengths, causal: bool) -> None:
    tensors = random_tensors(sum(lengths), 4, 2, 5, torch.float64)
    block, dense, other = make_block()
    actual = run_varlen(block, tensors, lengths, causal)
    assert_all_equal(actual, oracle(tensors, lengths, causal))
    assert bool(dense.shapes) == (max(lengths) >= 8)
    assert all(min(shape[:2]) >= 4 for shape in dense.shapes)
    if causal:
        assert all(rows < 8 for rows, _, masked in other.shapes if masked)


def test_a_long_fragment_is_square_square_and_rest() -> None:
    local = tile_segments((0, 3, 50, 52), True)  # 47 = 40 + 7
    assert local.squares == (slice(3, 43),)
    assert local.stretches == ((0, 3), (43, 50, 52))
    assert local.rectangles == ((slice(43, 50), slice(3, 43)),)
    local = tile_segments((0, 59), True)  # 56 + 3
    assert local.stretches == ((56, 59),)
    local = tile_segments((0, 75), True)  # 64 + 10 + 1
    assert local.squares == (slice(0, 64), slice(64, 74))
    assert local.rectangles == (
        (slice(64, 74), slice(0, 64)),
        (slice(74, 75), slice(0, 74)),
    )


def test_one_square_is_not_copied() -> None:
    """Results of the kernel as they are, and in its dtype."""
    q, k, v, doutput = random_tensors(16, 2, 1, 4, torch.bfloat16)
    qkv, segments = (
        QKV(q, k, v),
        segments_of((0, 16), torch.device("cpu"), CAUSAL),
    )
    block, dense, _ = make_block()
    partial = BLOCKS["cpu_flash"].forward(qkv, window=CAUSAL, scale=1.0)
    with (
        patch.object(dense, "forward", lambda *args, **kwargs: partial),
        patch.object(dense, "backward", lambda *args, **kwargs: qkv),
    ):
        assert block.forward_varlen(qkv, segments, scale=1.0) is partial
        assert block.backward_varlen(doutput, partial, qkv, segments, scale=1.0) is qkv


def test_short_segments_are_one_varlen_call() -> None:
    calls = []
    block, _, other = make_block()
    with patch.object(other, "forward_varlen", lambda *args, **kwargs: calls.append(args)):
        segments = segments_of((0, 3, 10), torch.device("cpu"), CAUSAL)
        block.forward_varlen(
            QKV(*random_tensors(10, 2, 1, 4, torch.float32)[:3]), segments, scale=1
        )
    assert calls[0][1] is segments


def test_the_thresholds_of_the_module() -> None:
    with patch.multiple(tiling, MIN_SIDE=1024, MIN_SQUARE=4096):
        tile_rectangle.cache_clear()
        tile_segments.cache_clear()
        shapes = {
            (t.rows.stop - t.rows.start, t.keys.stop - t.keys.start)
            for rows in range(1024, 20000, 501)
            for keys in range(1024, 20000, 707)
            for t in tile_rectangle(rows, keys)
            if t.dense
        }
        assert len(shapes) <= 18**2  # of a thousand rectangles
        assert tile_segments((0, 4095, 8191), True).squares == (slice(4095, 8191),)
