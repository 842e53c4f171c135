"""Matrix products of rows grouped by expert, each expert's rows with its own matrix.

Three shapes, of rows ``[A, K]`` with ``counts`` rows for each of n experts, numbers on the host or,
for ``grouped``, an int32 tensor of the ends ``[n]`` of their rows, wherever they were counted:

    forward     rows, weights [n, N, K]          -> rows [A, N]
    backward    rows [A, N], weights [n, N, K]   -> rows [A, K]
    weights     rows [A, N], rows [A, K]         -> [n, N, K], zero for an expert without rows

``loop`` is one product an expert, in place of its result, and takes any dtype. It is as fast as one
launch for all experts, faster than one for two, where an expert has a thousand rows and more and
its product takes longer than its launch. ``grouped`` is torch's ``grouped_mm``: on an H100 one
launch for bfloat16; it rejects float64, and rows that are no multiples of 16 bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lasp._core.cache import tensor_cache
from lasp._core.host_constants import to_device
from moe_parallel.config import Gemm
from moe_parallel.pipeline.streams import at_other_stream

ChosenGemm = Literal["loop", "grouped"]

GROUPED_ALIGNMENT_BYTES = 16  # grouped_mm rejects rows whose stride is no multiple of this
LOOP_ROWS = 1024  # an expert; from here one product each is faster than few experts together
LOOP_FLOPS = 2**35  # of an expert's first product: 50 us on an H100, several launches
Counts = Sequence[int] | Tensor
IN_PLACE = 2**24  # elements: 512 tiles of 128 x 256, several for each multiprocessor


def chosen_gemm(
    gemm: Gemm, dtype: torch.dtype, sizes: tuple[int, int, int], num_rows: int | None
) -> ChosenGemm:
    """The product that ``gemm`` chooses for these sizes.

    Args:
        gemm: as asked for.
        dtype: of rows and weights.
        sizes: of a rank: experts, hidden size, FFN size.
        num_rows: that these experts take together, on average; None: not on a GPU.

    Raises:
        ValueError: if ``grouped`` was asked for and cannot run.
    """
    num_local, hidden_size, ffn_local = sizes
    # Both sizes have the low bits that are zero in either.
    aligned = (hidden_size | ffn_local) * dtype.itemsize % GROUPED_ALIGNMENT_BYTES == 0
    if gemm == "grouped" and (dtype == torch.float64 or not aligned):
        raise ValueError(
            f"gemm='grouped' needs a dtype other than float64 and rows of multiples of"
            f" {GROUPED_ALIGNMENT_BYTES} bytes, got {dtype} rows of {hidden_size} and"
            f" {ffn_local}: use gemm='loop'"
        )
    if gemm != "auto":
        return gemm
    if num_rows is None or dtype != torch.bfloat16 or not aligned:
        return "loop"
    flops = 4 * num_rows * hidden_size * ffn_local
    large = num_rows >= LOOP_ROWS * num_local and flops >= LOOP_FLOPS * num_local
    return "loop" if large else "grouped"


def forward_product(
    rows_AK: Tensor, weight_ENK: Tensor, counts: Counts, gemm: ChosenGemm
) -> Tensor:
    """``row weight[e]^T``."""
    return _product(rows_AK, weight_ENK.transpose(1, 2), counts, gemm)


def backward_product(
    rows_AN: Tensor, weight_ENK: Tensor, counts: Counts, gemm: ChosenGemm
) -> Tensor:
    """``row weight[e]``."""
    return _product(rows_AN, weight_ENK, counts, gemm)


def grouped_weight_product(rows_AN: Tensor, rows_AK: Tensor, ends: Tensor) -> Tensor:
    """``sum of row_N^T row_K`` over each expert's rows, by ``grouped_mm``, not copied."""
    if not rows_AN.shape[0]:
        return rows_AN.new_zeros(len(ends), rows_AN.shape[1], rows_AK.shape[1])
    return _grouped_mm(rows_AN.T, rows_AK, offs=ends)


def weights_at_once(rows_AN: Tensor, rows_AK: Tensor) -> bool:
    """Whether with ``grouped`` one product makes the weight gradients of all experts.

    Matrices of ``IN_PLACE`` elements and more fill the device alone: they are one product an
    expert, in place. So who makes them, and their bits, do not depend on how many
    groups of experts there are.
    """
    return rows_AN.shape[1] * rows_AK.shape[1] < IN_PLACE


def weight_product(
    rows_AN: Tensor, rows_AK: Tensor, counts: Sequence[int], gemm: ChosenGemm, out_ENK: Tensor
) -> None:
    """``sum of row_N^T row_K`` over each expert's rows, into ``out_ENK``.

    ``grouped_mm`` cannot write into a given tensor: its result is copied.
    """
    if gemm == "grouped" and weights_at_once(rows_AN, rows_AK):
        out_ENK.copy_(grouped_weight_product(rows_AN, rows_AK, ends_of(counts, rows_AN.device)))
        return
    for a, b, out in zip(_parts(rows_AN, counts), _parts(rows_AK, counts), out_ENK):
        torch.mm(a.T, b, out=out)


def _product(rows_AK: Tensor, weight_EKN: Tensor, counts: Counts, gemm: ChosenGemm) -> Tensor:
    if gemm == "grouped":
        # grouped_mm leaves rows beyond the last end uninitialised: nobody may read them.
        return _grouped_mm(rows_AK, weight_EKN, offs=ends_of(counts, rows_AK.device))
    assert not isinstance(counts, Tensor)
    result = rows_AK.new_empty(rows_AK.shape[0], weight_EKN.shape[2])
    for x, w, out in zip(_parts(rows_AK, counts), weight_EKN, _parts(result, counts)):
        torch.mm(x, w, out=out)
    return result


def _parts(rows_A: Tensor, counts: Sequence[int]) -> Sequence[Tensor]:
    """The rows of each expert, then those of none; of one expert all, which costs nothing."""
    return [rows_A] if len(counts) == 1 else rows_A.split_with_sizes(list(counts))


def _grouped_mm(*args: Any, **kwargs: Any) -> Tensor:
    function = getattr(F, "grouped_mm", None) or torch._grouped_mm  # public from torch 2.10
    result: Tensor = function(*args, **kwargs)
    return result


def ends_of(counts: Counts, device: torch.device) -> Tensor:
    """The ends of the experts' rows, int32 on the device; numbers on the host are copied there."""
    if isinstance(counts, Tensor):
        return counts
    # Streams whose groups take turns have their own: neither waits for what the other copies.
    return _ends(tuple(counts), device, at_other_stream(device))


@tensor_cache(maxsize=4096)
def _ends(counts: tuple[int, ...], device: torch.device, other: bool) -> Tensor:
    # Kept: all products of a call share it, and a CUDA graph must find it there.
    with torch.inference_mode(False):
        return to_device(
            torch.tensor([*accumulate(counts)], dtype=torch.int32, device="cpu"), device
        )
