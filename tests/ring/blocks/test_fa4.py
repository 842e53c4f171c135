"""FlashAttention-4: what its kernels get, with stand-ins on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError
from itertools import accumulate, pairwise
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from lasp.sequence.layout import SequenceLayout
from ring import ring_attention
from ring.blocks import fa4
from ring.blocks.eager import EagerBlock
from ring.blocks.gradients import RowGradients
from ring.blocks.interface import QKV, Operands, segments_of
from ring.blocks.merge import Partial
from ring.blocks.registry import BLOCKS, resolve_block
from ring.planner.window import CAUSAL, Window
from ring.reference import dense_attention
from tests.closeness import assert_equal_to_rounding
from tests.ring.blocks.test_blocks import (
    RECTANGLES,
    ends_oracle,
    rectangle,
    rectangle_oracle,
    run_dense,
    run_ends,
    run_side_by_side,
    run_varlen,
)
from tests.ring.cases import (
    assert_all_equal,
    oracle,
    random_tensors,
)

EAGER = EagerBlock()


class StandIns:
    """The two functions of flash_attn.cute.interface that we call, with their conventions."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []  # the function, and how many segments
        self.in_place: list[str] = []  # the calls that were given memory

    def _parts(self, q: Tensor, lengths: dict[str, Any], side: str) -> Iterator[tuple[slice, ...]]:
        borders = lengths.get("cu_seqlens_q")
        self.calls.append((side, 1 if borders is None else len(borders) - 1))
        assert q.shape[-1] in fa4.HEAD_DIMS
        if borders is None:
            assert q.dim() == 4
            assert len(q) == 1
            yield slice(None), slice(None)
            return
        assert q.dim() == 3
        sides = []
        for rows_or_keys in ("q", "k"):
            cu_seqlens = lengths[f"cu_seqlens_{rows_or_keys}"]
            assert cu_seqlens.dtype == torch.int32
            ranges = [slice(*some) for some in pairwise(cu_seqlens.tolist())]
            longest = max(some.stop - some.start for some in ranges)
            assert lengths[f"max_seqlen_{rows_or_keys}"] == longest
            sides.append(ranges)
        yield from zip(*sides, strict=True)

    @staticmethod
    def _window(left: int | None, right: int | None) -> Window:
        assert all(side is None or side >= 0 for side in (left, right))
        return Window(*(-1 if side is None else side for side in (left, right)))

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        softmax_scale: float,
        window_size_left: int | None,
        window_size_right: int | None,
        return_lse: bool,
        out: Tensor | None = None,
        **lengths: Any,
    ) -> tuple[Tensor | None, ...]:
        assert return_lse
        dense = q.dim() == 4
        window, results = self._window(window_size_left, window_size_right), []
        for rows, keys in self._parts(q, lengths, "forward"):
            part = QKV(*(x[0] if dense else x[s] for x, s in ((q, rows), (k, keys), (v, keys))))
            results.append(EAGER.forward(part, window=window, scale=softmax_scale))
        output, lse = (torch.cat(x) for x in zip(*results))
        output, lse = output.to(q.dtype), lse.T.contiguous()  # lse [H, T]
        if out is not None:
            assert out.is_contiguous()
            self.in_place.append("forward")
            output = out.view(output.shape).copy_(output)
        return (
            (output[None], lse[None], None, None, None)
            if dense
            else (output, lse, None, None, None)
        )

    def backward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        dout: Tensor,
        lse: Tensor,
        *,
        deterministic: bool,
        dlse: Tensor | None,
        softmax_scale: float,
        window_size_left: int | None,
        window_size_right: int | None,
        dq: Tensor | None = None,
        dk: Tensor | None = None,
        dv: Tensor | None = None,
        **lengths: Any,
    ) -> tuple[Tensor, ...]:
        grouped = q.shape[-2] != k.shape[-2]
        assert not grouped or q.shape[-1] == v.shape[-1], "GQA backward requires one head dim"
        assert lse.is_contiguous()
        dense = q.dim() == 4
        if dense:
            q, k, v, out, dout, lse = (x[0] for x in (q, k, v, out, dout, lse))
        window, results = self._window(window_size_left, window_size_right), []
        for rows, keys in self._parts(q[None] if dense else q, lengths, "backward"):
            merged = Partial(out[rows], lse.T[rows])
            part = QKV(q[rows], k[keys], v[keys])
            of_rows = None if dlse is None else (dlse[0] if dense else dlse).T[rows]
            gradients = RowGradients(EAGER, dout[rows], of_rows, merged, softmax_scale)
            results.append(gradients.over(slice(None), part, window))
        sums = [torch.cat(x).to(q.dtype) for x in zip(*results)]
        if dense:
            sums = [x[None] for x in sums]
        if dq is None:
            return tuple(sums)
        self.in_place.append("backward")
        for out, x in zip((dq, dk, dv), sums):
            assert (out.dtype, out.shape) == (x.dtype, x.shape)
            assert out.is_contiguous()
            out.copy_(x)
        return dq, dk, dv


@pytest.fixture
def stand_ins() -> Iterator[StandIns]:
    kernels = StandIns()
    with patch.object(fa4, "_kernels", lambda: (kernels.forward, kernels.backward)):
        yield kernels
    resolve_block.cache_clear()  # tests make it take what it refuses


@pytest.mark.parametrize("heads", [(4, 2), (3, 3)])
@pytest.mark.parametrize("dims", [(8, 8), (192, 128), (16, 8), (8, 16)])
class TestWithStandIns:
    def test_rectangle(self, stand_ins: StandIns, dims, heads) -> None:
        tensors = rectangle(7, 11, heads, dims[0], torch.float64, dims[1])
        assert_all_equal(run_dense(BLOCKS["fa4"], tensors, False), rectangle_oracle(tensors))
        assert stand_ins.calls == [("forward", 1), ("backward", 1)]

    @pytest.mark.parametrize("lengths", [(5, 1, 9), (15,)])
    def test_all_segments_in_one_call(self, stand_ins: StandIns, dims, heads, lengths) -> None:
        tensors = random_tensors(15, *heads, dims[0], torch.float64, dims[1])
        actual = run_varlen(BLOCKS["fa4"], tensors, lengths, True)
        assert_all_equal(actual, oracle(tensors, lengths, True))
        assert stand_ins.calls == [("forward", len(lengths)), ("backward", len(lengths))]

    def test_rectangles_side_by_side(self, stand_ins: StandIns, dims, heads) -> None:
        parts = [rectangle(*some, heads, dims[0], torch.float64, dims[1]) for some in RECTANGLES]
        for actual, part in zip(run_side_by_side(BLOCKS["fa4"], parts), parts, strict=True):
            assert_all_equal(actual, rectangle_oracle(part))
        assert stand_ins.calls == [("forward", 3), ("backward", 3)]


@pytest.mark.parametrize("lengths", [(20,), (5, 15)])
def test_a_gradient_of_the_lse_is_the_same_call(stand_ins: StandIns, lengths) -> None:
    tensors, layout = random_tensors(20, 4, 2, 8, torch.float64), SequenceLayout(lengths, 1)
    leaves = [x.requires_grad_() for x in tensors[:3]]

    def loss(output: Tensor, lse: Tensor) -> Tensor:
        return (output * tensors[3]).sum() + lse.square().sum()

    with patch.object(fa4.Fa4Block, "obstacle", lambda *_: None):
        results = ring_attention(*leaves, layout=layout, block="fa4")
        actual = torch.autograd.grad(loss(*results), leaves)
    assert stand_ins.calls == [("forward", len(lengths)), ("backward", len(lengths))]
    exact = dense_attention(*leaves, cu_seqlens=layout.borders, causal=True, scale=8**-0.5)
    for dx, expected in zip(actual, torch.autograd.grad(loss(*exact), leaves), strict=True):
        assert_equal_to_rounding(dx, expected)


def test_windows_and_both_results(stand_ins: StandIns) -> None:
    tensors = random_tensors(20, 4, 2, 8, torch.float64)
    leaves = [x.requires_grad_() for x in tensors[:3]]
    with patch.object(fa4.Fa4Block, "obstacle", lambda *_: None):
        output, lse = ring_attention(*leaves, window=(5, 0), block="fa4")
        gradients = torch.autograd.grad(output, leaves, tensors[3])
    actual = (output.detach(), lse.detach(), *gradients)
    assert_all_equal(actual, oracle(tensors, (20,), True, window=(5, 0)))


@pytest.mark.parametrize("lengths", [(15,), (5, 1, 9)])
@pytest.mark.parametrize(
    ("heads", "dims", "fit"),
    [
        ((4, 2), (64, 64), True),
        ((3, 3), (192, 128), True),
        ((4, 2), (192, 128), False),  # padded, and copied
        ((2, 2), (72, 72), False),
    ],
)
def test_results_go_where_they_are_told_to(
    stand_ins: StandIns, lengths, heads, dims, fit: bool
) -> None:
    *qkv, doutput = random_tensors(15, *heads, dims[0], torch.float64, dims[1])
    qkv, block = QKV(*qkv), BLOCKS["fa4"]
    borders = tuple(accumulate(lengths, initial=0))
    segments = segments_of(borders, torch.device("cpu"), CAUSAL)
    merged = block.forward_varlen(qkv, segments, scale=0.125)
    expected = block.backward_varlen(doutput, merged, qkv, segments, scale=0.125)
    shapes = [x.shape[1:] for x in (merged.output, merged.lse, *qkv)]
    memory = [torch.full((17, *shape), 7.0, dtype=doutput.dtype) for shape in shapes]
    output, lse, *gradients = (x[1:16] for x in memory)
    block.forward_to(Partial(output, lse), qkv, segments, scale=0.125)
    block.backward_to(QKV(*gradients), doutput, merged, qkv, segments, scale=0.125)
    for x, written in zip((*merged, *expected), memory, strict=True):
        assert torch.equal(x, written[1:16])
        assert (written[0] == 7).all()
        assert (written[16] == 7).all()
    assert stand_ins.in_place == (["forward", "backward"] if fit else [])


@pytest.mark.parametrize(("lengths", "rows"), [((9,), (4,)), ((9, 1, 6), (1, 1, 6))])
@pytest.mark.parametrize("dims", [(64, 64), (64, 40)])
def test_last_rows_of_documents(stand_ins: StandIns, dims, lengths, rows) -> None:
    tensors = random_tensors(sum(lengths), 4, 2, dims[0], torch.float64, dims[1])
    actual = run_ends(BLOCKS["fa4"], tensors, lengths, rows)
    assert_all_equal(actual, ends_oracle(tensors, lengths, rows))
    count = len(lengths)
    assert stand_ins.calls == [("forward", count), ("backward", count)]


GPU = Operands(torch.device("cuda"), torch.bfloat16, 64, 64)


@pytest.mark.parametrize(
    ("found", "capability", "message"),
    [
        (PackageNotFoundError(), (9, 0), "needs flash-attn-4 4.0.0b36: pip install"),
        (["4.0.0b40"], (9, 0), "needs flash-attn-4 4.0.0b36, and 4.0.0b40 is installed"),
        (["4.0.0b36"], (9, 0), "needs what flash-attn-4 imports"),
        (["4.0.0b36"], (10, 0), "needs compute capability 9.0"),
    ],
)
def test_the_obstacle_says_what_is_missing(found, capability, message: str) -> None:
    fa4._missing.cache_clear()
    with (
        patch.object(torch.version, "cuda", "13.0"),
        patch.object(torch.cuda, "get_device_capability", lambda *_: capability),
        patch.object(fa4, "version", side_effect=found),
        patch.object(fa4, "import_module", side_effect=ImportError("No module named 'quack'")),
    ):
        assert message in (BLOCKS["fa4"].obstacle(GPU) or "")
    fa4._missing.cache_clear()
