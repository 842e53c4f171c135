from __future__ import annotations

from itertools import accumulate

import pytest
import torch
from torch import Tensor

from ring.blocks.interface import QKV, Block, Operands, Segments, segments_of
from ring.blocks.merge import Partial, merge
from ring.blocks.registry import BLOCKS, resolve_block
from ring.planner.window import CAUSAL, EVERYTHING
from tests.ring.cases import (
    HEADS,
    assert_all_equal,
    assert_all_within_budget,
    mask,
    oracle,
    random_tensors,
)

CPU = torch.device("cpu")
CPU_BLOCKS = ("eager", "cpu_flash")
CUDA_BLOCKS = ("flash", "cudnn")
GPU_BLOCKS = (*CUDA_BLOCKS, "fa4")


def skip_unless_it_serves(name: str, *head_dims: int, slides: bool = False) -> None:
    operands = Operands(torch.device("cuda"), torch.bfloat16, *head_dims, slides)
    if (obstacle := BLOCKS[name].obstacle(operands)) is not None:
        pytest.skip(f"{name} {obstacle}")


def split(tensors: tuple[Tensor, ...], device: str = "cpu") -> tuple[QKV, Tensor]:
    *qkv, doutput = (x.to(device) for x in tensors)
    return QKV(*qkv), doutput


def run_dense(block: Block, tensors, causal: bool, device: str = "cpu") -> list[Tensor]:
    qkv, doutput = split(tensors, device)
    scale = qkv.q.shape[-1] ** -0.5
    output, lse = block.forward(qkv, window=mask(causal), scale=scale)
    merged = Partial(output.to(qkv.q.dtype), lse)
    gradients = block.backward(doutput, merged, qkv, window=mask(causal), scale=scale)
    return [lse.cpu() if x is lse else x.to(qkv.q.dtype).cpu() for x in (output, lse, *gradients)]


def run_varlen(
    block: Block, tensors, lengths: tuple[int, ...], causal: bool, device: str = "cpu"
) -> list[Tensor]:
    qkv, doutput = split(tensors, device)
    scale = qkv.q.shape[-1] ** -0.5
    borders = tuple(accumulate(lengths, initial=0))
    segments = segments_of(borders, torch.device(device), mask(causal))
    output, lse = block.forward_varlen(qkv, segments, scale=scale)
    merged = Partial(output.to(qkv.q.dtype), lse)
    gradients = block.backward_varlen(doutput, merged, qkv, segments, scale=scale)
    return [lse.cpu() if x is lse else x.to(qkv.q.dtype).cpu() for x in (output, lse, *gradients)]


def rectangle(
    rows: int,
    keys: int,
    heads: tuple[int, int],
    head_dim: int,
    dtype: torch.dtype,
    value_dim: int | None = None,
):
    q, _, _, doutput = random_tensors(rows, *heads, head_dim, dtype, value_dim)
    _, k, v, _ = random_tensors(keys, *heads, head_dim, dtype, value_dim)
    return q, k, v, doutput


def rectangle_oracle(tensors: tuple[Tensor, ...]) -> list[Tensor]:
    """Every row to every key, in float64, by autograd."""
    q, k, v, doutput = (x.double() for x in tensors)
    qkv = [x.requires_grad_() for x in (q, k, v)]
    groups = q.shape[1] // k.shape[1]
    k_SHD, v_SHD = (x.repeat_interleave(groups, 1) for x in (k, v))
    scores_HTS = torch.einsum("thd,shd->hts", q, k_SHD) * q.shape[-1] ** -0.5
    output = torch.einsum("hts,shd->thd", scores_HTS.softmax(-1), v_SHD)
    gradients = torch.autograd.grad(output, qkv, doutput)
    return [output.detach(), scores_HTS.logsumexp(-1).T.detach(), *gradients]


RECTANGLES = ((3, 11), (8, 2), (1, 5))  # rows and keys
GPU_RECTANGLES = ((130, 513), (1, 300), (700, 64), (333, 1100))


def run_side_by_side(block: Block, parts, device: str = "cpu") -> list[list[Tensor]]:
    """Results of each of several rectangles, by one varlen call."""
    qkv, doutput = split(tuple(torch.cat(some) for some in zip(*parts)), device)
    scale = qkv.q.shape[-1] ** -0.5
    lengths = [[len(x) for x in part[:2]] for part in parts]
    rows, keys = (tuple(accumulate(some, initial=0)) for some in zip(*lengths))
    segments = segments_of(rows, torch.device(device), EVERYTHING, keys)
    output, lse = block.forward_varlen(qkv, segments, scale=scale)
    merged = Partial(output.to(qkv.q.dtype), lse)
    dq, dk, dv = block.backward_varlen(doutput, merged, qkv, segments, scale=scale)
    results = [output.to(qkv.q.dtype), lse, *(x.to(qkv.q.dtype) for x in (dq, dk, dv))]
    sides = [[n for n, _ in lengths]] * 3 + [[n for _, n in lengths]] * 2
    return [list(some) for some in zip(*(x.cpu().split(n) for x, n in zip(results, sides)))]


def ends_of(tensors, lengths: tuple[int, ...], rows: tuple[int, ...]) -> tuple[Tensor, ...]:
    """The tensors with the last rows only of each document in q and the output's gradient."""
    q, k, v, doutput = tensors
    some = zip(accumulate(lengths), rows)
    last = torch.cat([torch.arange(stop - count, stop) for stop, count in some])
    return q[last], k, v, doutput[last]


def ends_oracle(tensors, lengths: tuple[int, ...], rows: tuple[int, ...]) -> list[Tensor]:
    """output, lse, dq, dk, dv of the last rows of each document, over all its keys, causal."""
    *qkv, doutput = tensors
    before = torch.ones(len(doutput), dtype=torch.bool)
    for stop, count in zip(accumulate(lengths), rows):
        before[stop - count : stop] = False
    no_gradient = (*qkv, doutput.masked_fill(before[:, None, None], 0))
    output, lse, dq, dk, dv = oracle(no_gradient, lengths, True)
    return [output[~before], lse[~before], dq[~before], dk, dv]


def run_ends(block: Block, tensors, lengths, rows, device: str = "cpu") -> list[Tensor]:
    """What the block leaves in memory for rows that have more keys, masks aligned at the last."""
    qkv, doutput = split(ends_of(tensors, lengths, rows), device)
    borders = (tuple(accumulate(some, initial=0)) for some in (rows, lengths))
    segments = segments_of(next(borders), torch.device(device), CAUSAL, next(borders))
    dtype, scale = block.result_dtype(qkv.q.dtype), qkv.q.shape[-1] ** -0.5
    wide = torch.promote_types(dtype, torch.float32)
    lse = torch.empty(*qkv.q.shape[1::-1], dtype=wide, device=device).T
    out = Partial(torch.empty_like(doutput, dtype=dtype), lse)
    block.forward_to(out, qkv, segments, scale=scale)
    gradients = QKV(*(torch.empty_like(x, dtype=dtype) for x in qkv))
    merged = Partial(out.output.to(qkv.q.dtype), lse)
    block.backward_to(gradients, doutput, merged, qkv, segments, scale=scale)
    return [x.cpu() if x is lse else x.to(qkv.q.dtype).cpu() for x in (*out, *gradients)]


@pytest.mark.parametrize(
    ("lengths", "rows"), [((9,), (4,)), ((9, 1, 6), (1, 1, 6)), ((3, 8), (2, 8))]
)
def test_last_rows_of_documents_in_place(lengths, rows) -> None:
    tensors = random_tensors(sum(lengths), 4, 2, 5, torch.float64, 3)
    actual = run_ends(BLOCKS["eager"], tensors, lengths, rows)
    assert_all_equal(actual, ends_oracle(tensors, lengths, rows))


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("name", CPU_BLOCKS)
class TestInFloat64:
    @pytest.mark.parametrize("causal", [True, False])
    def test_square(self, name, heads, causal) -> None:
        tensors = random_tensors(13, *heads, 5, torch.float64)
        expected = oracle(tensors, (13,), causal)
        assert_all_equal(run_dense(BLOCKS[name], tensors, causal), expected)

    @pytest.mark.parametrize(("rows", "keys"), [(1, 1), (1, 9), (7, 1), (3, 11), (11, 3)])
    def test_rectangle(self, name, heads, rows, keys) -> None:
        tensors = rectangle(rows, keys, heads, 5, torch.float64)
        assert_all_equal(run_dense(BLOCKS[name], tensors, False), rectangle_oracle(tensors))

    @pytest.mark.parametrize("causal", [True, False])
    def test_varlen(self, name, heads, causal) -> None:
        lengths = (1, 6, 1, 1, 9)
        tensors = random_tensors(sum(lengths), *heads, 5, torch.float64)
        expected = oracle(tensors, lengths, causal)
        assert_all_equal(run_varlen(BLOCKS[name], tensors, lengths, causal), expected)

    def test_rectangles_side_by_side(self, name, heads) -> None:
        parts = [rectangle(*some, heads, 5, torch.float64) for some in RECTANGLES]
        for actual, part in zip(run_side_by_side(BLOCKS[name], parts), parts, strict=True):
            assert_all_equal(actual, rectangle_oracle(part))

    def test_merged_output_and_lse_make_gradients_of_parts_add_up(self, name, heads) -> None:
        tensors = rectangle(6, 10, heads, 4, torch.float64)
        (q, k, v), doutput = split(tensors)
        parts = [QKV(q, k[:3], v[:3]), QKV(q, k[3:], v[3:])]
        block = BLOCKS[name]
        merged = merge(*(block.forward(part, window=EVERYTHING, scale=0.5) for part in parts))
        first, second = (
            block.backward(doutput, merged, part, window=EVERYTHING, scale=0.5) for part in parts
        )
        gradients = (
            first.q + second.q,
            torch.cat((first.k, second.k)),
            torch.cat((first.v, second.v)),
        )
        assert_all_equal((*merged, *gradients), rectangle_oracle(tensors))


@pytest.mark.parametrize(("head_dim", "value_dim"), [(5, 3), (3, 7), (1, 4)])
def test_values_of_another_width(head_dim: int, value_dim: int) -> None:
    eager, lengths = BLOCKS["eager"], (1, 6, 5)
    tensors = rectangle(7, 4, (4, 2), head_dim, torch.float64, value_dim)
    assert_all_equal(run_dense(eager, tensors, False), rectangle_oracle(tensors))
    tensors = random_tensors(12, 4, 2, head_dim, torch.float64, value_dim)
    assert_all_equal(run_varlen(eager, tensors, lengths, True), oracle(tensors, lengths, True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("causal", [True, False])
def test_cpu_flash_is_as_close_as_eager(dtype: torch.dtype, causal: bool) -> None:
    lengths = (100, 1, 27)
    tensors = random_tensors(128, 4, 2, 16, dtype)
    results = [run_varlen(BLOCKS[name], tensors, lengths, causal) for name in CPU_BLOCKS]
    eager, flash = results
    assert_all_within_budget(flash, oracle(tensors, lengths, causal), eager, dtype)


@pytest.mark.parametrize("name", CPU_BLOCKS)
def test_strided_inputs(name: str) -> None:
    fused = torch.randn(9, 3, 2, 4, dtype=torch.float64)
    tensors = (*fused.unbind(1), torch.randn(9, 2, 4, dtype=torch.float64))
    assert not tensors[0].is_contiguous()
    expected = oracle(tensors, (9,), True)
    assert_all_equal(run_dense(BLOCKS[name], tensors, True), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_auto_on_a_cpu(dtype: torch.dtype) -> None:
    assert resolve_block("auto", CPU, dtype, 6).name == "cpu_flash"
    assert resolve_block("auto", CPU, dtype, 6, 4).name == "eager"


def test_auto_on_devices_without_a_kernel_of_their_own() -> None:
    assert resolve_block("auto", torch.device("meta"), torch.float32, 6).name == "eager"


@pytest.mark.parametrize("name", [*GPU_BLOCKS, "Eager", "", "flash3"])
def test_what_cannot_run_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="block"):
        resolve_block(name, CPU, torch.bfloat16, 64)


def test_cpu_flash_needs_a_cpu() -> None:
    with pytest.raises(ValueError, match=r"block 'cpu_flash' needs CPU tensors, got .* on meta"):
        resolve_block("cpu_flash", torch.device("meta"), torch.float32, 64)


@pytest.mark.parametrize("name", CUDA_BLOCKS)
@pytest.mark.parametrize("dims", [(64, 64), (192, 128)])
@pytest.mark.parametrize(
    ("rows", "keys"), [(1, 300), (130, 1), (257, 257), (1024, 1536), (2500, 9999), (9000, 9000)]
)
def test_cuda_kernels_take_these_arguments(name: str, dims, rows: int, keys: int) -> None:
    """Their signatures, and the shapes they return, on tensors without data."""
    pack = rectangle(rows, keys, (6, 2), dims[0], torch.bfloat16, dims[1])
    tensors = [x.to("meta") for x in pack]
    qkv, doutput = split(tensors, "meta")
    block = BLOCKS[name]
    results = []
    partial = block.forward(qkv, window=EVERYTHING, scale=0.1)
    results.append((partial, block.backward(doutput, partial, qkv, window=EVERYTHING, scale=0.1)))
    if rows == keys:
        cu_seqlens = torch.empty(3, dtype=torch.int32, device="meta")
        for causal in (True, False):
            lengths = ((0, 5, rows), cu_seqlens, max(5, rows - 5))
            segments = Segments(*lengths, mask(causal), *lengths)
            partial = block.forward_varlen(qkv, segments, scale=0.1)
            gradients = block.backward_varlen(doutput, partial, qkv, segments, scale=0.1)
            results.append((partial, gradients))
    for partial, gradients in results:
        assert partial.output.shape == (*qkv.q.shape[:2], dims[1])
        assert partial.lse.shape == qkv.q.shape[:2]
        assert partial.lse.dtype == torch.float32
        assert [x.shape for x in gradients] == [x.shape for x in qkv]
