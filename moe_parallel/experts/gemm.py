"""Matrix products of rows grouped by expert, each expert's rows with its own matrix.

Three shapes, of rows ``[A, K]`` with ``counts`` rows for each of n experts:

    forward     rows, weights [n, N, K]          -> rows [A, N]
    backward    rows [A, N], weights [n, N, K]   -> rows [A, K]
    weights     rows [A, N], rows [A, K]         -> [n, N, K], zero for an expert without rows

``loop`` is one product an expert, in place of its result: at a thousand rows and more it is as fast
as one launch for all experts, faster than one for two, and takes any dtype. ``grouped`` is torch's
``grouped_mm``: on an H100 one launch for bfloat16; it rejects float64, and rows that are no
multiples of 16 bytes.
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
from moe_parallel.pipeline.streams import at_other_stream

ChosenGemm = Literal["loop", "grouped"]

GROUPED_ALIGNMENT_BYTES = 16  # grouped_mm rejects rows whose stride is no multiple of this
LOOP_ROWS = 1024  # an expert; from here one product each is faster than few experts together
IN_PLACE = 2**22  # 16 MiB of bfloat16 to read and write: 6 us at 2.6 TB/s


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
    """``sum of row_N^T row_K`` over each expert's rows, into ``out_ENK``.

    ``grouped_mm`` cannot write into a given tensor: its result is copied. Matrices of ``IN_PLACE``
    elements and more, whose copy takes longer than a launch, are written directly, one product an
    expert.
    """
    small = out_ENK[0].numel() < IN_PLACE
    if gemm == "grouped" and small and rows_AN.shape[0]:
        out_ENK.copy_(_grouped_mm(rows_AN.T, rows_AK, offs=_ends_of(counts, rows_AN.device)))
        return
    for a, b, out in zip(_parts(rows_AN, counts), _parts(rows_AK, counts), out_ENK):
        torch.mm(a.T, b, out=out)


def _loop(rows_AK: Tensor, weight_EKN: Tensor, counts: Sequence[int]) -> Tensor:
    result = rows_AK.new_empty(rows_AK.shape[0], weight_EKN.shape[2])
    for x, w, out in zip(_parts(rows_AK, counts), weight_EKN, _parts(result, counts)):
        torch.mm(x, w, out=out)
    return result


def _parts(rows_A: Tensor, counts: Sequence[int]) -> Sequence[Tensor]:
    """The rows of each expert; of one expert all, which costs the host nothing."""
    return [rows_A] if len(counts) == 1 else rows_A.split_with_sizes(list(counts))


def _grouped(rows_AK: Tensor, weight_EKN: Tensor, counts: Sequence[int]) -> Tensor:
    # grouped_mm leaves rows beyond the last end uninitialised: A must be exactly the sum.
    result: Tensor = _grouped_mm(rows_AK, weight_EKN, offs=_ends_of(counts, rows_AK.device))
    return result


def _grouped_mm(*args: Any, **kwargs: Any) -> Tensor:
    function = getattr(F, "grouped_mm", None) or torch._grouped_mm  # public from torch 2.10
    result: Tensor = function(*args, **kwargs)
    return result


def _ends_of(counts: Sequence[int], device: torch.device) -> Tensor:
    # Streams whose groups take turns have their own: neither waits for what the other copies.
    return _ends(tuple(counts), device, at_other_stream(device))


@tensor_cache(maxsize=4096)
def _ends(counts: tuple[int, ...], device: torch.device, other: bool) -> Tensor:
    # Kept: all products of a call share it, and a CUDA graph must find it there.
    with torch.inference_mode(False):
        return to_device(
            torch.tensor([*accumulate(counts)], dtype=torch.int32, device="cpu"), device
        )
