"""Matrix products of rows grouped by expert, each expert's rows with its own matrix.

Three shapes, of rows ``[A, K]`` with ``counts`` rows for each of n experts:

    forward     rows, weights [n, N, K]          -> rows [A, N]
    backward    rows [A, N], weights [n, N, K]   -> rows [A, K]
    weights     rows [A, N], rows [A, K]         -> [n, N, K], zero for an expert without rows

``loop`` is one product an expert, in place of its result: at a thousand rows and more it is as fast
as one launch for all, and takes any dtype. ``grouped`` is torch's ``grouped_mm``: on an H100 one
launch for bfloat16; it rejects float64, and rows that are no multiples of 16 bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Gemm = Literal["auto", "loop", "grouped"]
ChosenGemm = Literal["loop", "grouped"]

GROUPED_ALIGNMENT_BYTES = 16  # grouped_mm rejects rows whose stride is no multiple of this


def forward_product(
    rows_AK: Tensor, weight_ENK: Tensor, counts: Sequence[int], gemm: ChosenGemm
) -> Tensor:
    """``row weight[e]^T``."""
    if gemm == "grouped":
        return _grouped(rows_AK, weight_ENK.transpose(1, 2), counts)
    return _loop(rows_AK, weight_ENK.transpose(1, 2), counts)


def backward_product(
    rows_AN: Tensor, weight_ENK: Tensor, counts: Sequence[int], gemm: ChosenGemm
) -> Tensor:
    """``row weight[e]``."""
    if gemm == "grouped":
        return _grouped(rows_AN, weight_ENK, counts)
    return _loop(rows_AN, weight_ENK, counts)


def weight_product(
    rows_AN: Tensor, rows_AK: Tensor, counts: Sequence[int], gemm: ChosenGemm, out_ENK: Tensor
) -> None:
    """``sum of row_N^T row_K`` over each expert's rows, into ``out_ENK``."""
    if gemm == "grouped" and rows_AN.shape[0]:
        out_ENK.copy_(_grouped_mm(rows_AN.T, rows_AK, offs=_ends(counts, rows_AN)))
        return
    for a, b, out in zip(rows_AN.split(list(counts)), rows_AK.split(list(counts)), out_ENK):
        torch.mm(a.T, b, out=out)


def _loop(rows_AK: Tensor, weight_EKN: Tensor, counts: Sequence[int]) -> Tensor:
    result = rows_AK.new_empty(rows_AK.shape[0], weight_EKN.shape[2])
    for x, w, out in zip(rows_AK.split(list(counts)), weight_EKN, result.split(list(counts))):
        torch.mm(x, w, out=out)
    return result


def _grouped(rows_AK: Tensor, weight_EKN: Tensor, counts: Sequence[int]) -> Tensor:
    # grouped_mm leaves rows beyond the last end uninitialised: A must be exactly the sum.
    result: Tensor = _grouped_mm(rows_AK, weight_EKN, offs=_ends(counts, rows_AK))
    return result


def _grouped_mm(*args: Any, **kwargs: Any) -> Tensor:
    function = getattr(F, "grouped_mm", None) or torch._grouped_mm  # public from torch 2.10
    result: Tensor = function(*args, **kwargs)
    return result


def _ends(counts: Sequence[int], like: Tensor) -> Tensor:
    # Pinned, so that the copy is queued behind the kernels before it: the host does not wait.
    ends = torch.tensor(list(accumulate(counts)), dtype=torch.int32, pin_memory=like.is_cuda)
    return ends.to(like.device, non_blocking=True)
