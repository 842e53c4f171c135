"""Between tokens and rows: one row for each kept (token, slot) assignment, grouped by expert.

Each assignment knows its row, in the forward and in the backward. So sums run in slot order, and
results are bit-identical from run to run (a scatter on a GPU adds with atomics). With
``impl="triton"`` a token is read once and written to its rows, and a sum reads each row once
(:mod:`moe_parallel.kernels.slots_kernel`).

Example: 3 tokens, k = 2, the assignment of token 1 to expert 0 dropped::

    experts_Tk      (1, 0) (0, 2) (2, 1)
    by expert       expert 0: token 0    expert 1: tokens 0, 2    expert 2: tokens 1, 2
    assignment      1, 0, 5, 3, 4        index into [T * k]
    row             (1, 0) (-1, 3) (4, 2)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor

from lasp._core.derivatives import Reference, refuse_second_derivatives, refuse_transforms
from lasp._core.dtypes import wide_dtype
from lasp._core.impl import ChosenImpl
from moe_parallel.dispatch.dispatcher import Place
from moe_parallel.kernels.histogram import Histogram
from moe_parallel.router.counts import at_assignments, rows_before

_REFERENCE = Reference("ExpertParallelMoE's rows of tokens", "moe_parallel.reference.reference_moe")

BLOCK_COLUMNS = 2048  # of a token that a program takes at a time; divides MiniMax-01's 6144
NUM_WARPS = 4


@dataclass(frozen=True)
class RowOrder:
    """The rows a rank sends out and where each assignment went.

    Attributes:
        row: ``[T, k]``, for each assignment its row, -1 if it was dropped.
        num_rows: A.
        padded: some rows have no assignment: they are zero.
        place: makes the tensor that rows are written into; None: any memory will do.
        ends: where the rows of each expert end, int32; None: nobody has counted.
    """

    row: Tensor
    num_rows: int
    padded: bool = False
    place: Place | None = None
    ends: Tensor | None = None

    def new_rows(self, like: Tensor) -> Tensor:
        """``[A, M]`` to write rows into, with the columns and the dtype of ``like``."""
        if self.place is not None:
            return self.place(self.num_rows, like)
        return like.new_empty(self.num_rows, like.shape[1])

    @cached_property
    def assignment(self) -> Tensor:
        """``[A]``, for each row its assignment, token * k + slot, or -1; by expert, then token."""
        # Dropped assignments are written beyond the end, and cut off.
        target_A = self.row.masked_fill(self.row < 0, self.num_rows).flatten()
        numbers_A = torch.arange(target_A.shape[0], device=target_A.device)
        assignment_A = target_A.new_full((self.num_rows + 1,), -1)
        return assignment_A.scatter_(0, target_A, numbers_A)[: self.num_rows]


def row_order(
    experts_Tk: Tensor,
    kept_Tk: Tensor | None,
    num_rows: int,
    num_experts: int,
    *,
    histogram: Histogram | None = None,
    positions_E: Tensor | None = None,
    with_ends: bool = False,
) -> RowOrder:
    """Group the kept assignments by expert; within an expert tokens keep their order.

    Args:
        experts_Tk: chosen experts, int64, each at most once a token; of dropped assignments any
            number.
        kept_Tk: which assignments are kept; None for all.
        num_rows: A, how many; known on the host, so that nothing here waits for the device.
        num_experts: E.
        histogram: counts of the same assignments, none of them dropped; the kernels then do this.
        positions_E: the position of each expert in the order of the rows, int64; None: its number.
        with_ends: where kernels do this and experts have no positions, they count ``ends`` too.
    """
    if histogram is not None:
        if kept_Tk is not None:
            raise ValueError("kept_Tk must be None with a histogram, which counts all assignments")
        from moe_parallel.kernels import router

        row_Tk, _, ends = router.rows(experts_Tk, histogram, positions_E, with_ends=with_ends)
        return RowOrder(row_Tk, num_rows, ends=ends)
    if positions_E is not None:
        experts_Tk = positions_E[experts_Tk]
    if kept_Tk is None:
        return RowOrder(at_assignments(rows_before(experts_Tk, num_experts), experts_Tk), num_rows)
    # Dropped assignments queue behind those of the experts.
    experts_Tk = experts_Tk.masked_fill(~kept_Tk, num_experts)
    row_Tk = at_assignments(rows_before(experts_Tk, num_experts + 1), experts_Tk)
    return RowOrder(row_Tk.masked_fill(~kept_Tk, -1), num_rows)


def permute(x_TM: Tensor, order: RowOrder, impl: ChosenImpl = "eager") -> Tensor:
    """Rows ``[A, hidden]``: a copy of its token for every kept assignment.

    No backward may keep them if they lie in ``order.place``: the next call overwrites it.

    Gradients: a token's is the sum of its rows' in slot order, in float32 or wider.
    """
    refuse_transforms(_REFERENCE, x_TM)
    rows: Tensor = _Permute.apply(x_TM, order, impl)  # type: ignore[no-untyped-call]
    return rows


def unpermute(
    rows_AM: Tensor, weights_Tk: Tensor, order: RowOrder, impl: ChosenImpl = "eager"
) -> Tensor:
    """Tokens ``[T, hidden]``: the weighted sum of each token's rows, zero if it has none.

    Sums in slot order in float32 or wider, rounded once to the dtype of the rows.

    Gradients: to rows, with ``impl="triton"`` in ``order.place``, and to weights; the weight of a
    dropped assignment gets zero.
    """
    refuse_transforms(_REFERENCE, rows_AM, weights_Tk)
    tokens: Tensor = _Unpermute.apply(rows_AM, weights_Tk, order, impl)  # type: ignore[no-untyped-call]
    return tokens


def copy_to_rows(x_TM: Tensor, order: RowOrder, rows_AM: Tensor, impl: ChosenImpl) -> Tensor:
    """Each token into its rows; rows without a token are zero if ``order.padded``.

    Numbers of a row lie side by side, rows may have gaps between them.
    """
    if impl == "triton":
        return _copy_slots(x_TM, order, rows_AM)
    return _token_rows(x_TM, order, order.row.shape[1], rows_AM)


def sum_of_rows(
    rows_AM: Tensor,
    weights_Tk: Tensor | None,
    row_Tk: Tensor,
    impl: ChosenImpl,
    out_TM: Tensor | None = None,
) -> Tensor:
    """``[T, M]``: the sum of each token's rows in slot order, in float32 or wider, rounded once.

    Args:
        rows_AM: as in :func:`copy_to_rows`.
        weights_Tk: of the rows; None for ones.
        row_Tk: the row of each slot, -1 for none.
        impl: ``triton`` takes float32 weights.
        out_TM: to write into.
    """
    shape = (row_Tk.shape[0], rows_AM.shape[1])
    if impl == "triton":
        out_TM = rows_AM.new_empty(shape) if out_TM is None else out_TM
        return _sum_slots(rows_AM, weights_Tk, row_Tk, out_TM)
    dtype = wide_dtype(rows_AM.dtype)
    if weights_Tk is not None:
        dtype = torch.promote_types(dtype, weights_Tk.dtype)
    total_TM = rows_AM.new_zeros(shape, dtype=dtype)
    for slot, row_T in enumerate(row_Tk.unbind(1)):
        rows_TM = _slot_rows(rows_AM, row_T)
        total_TM += rows_TM if weights_Tk is None else weights_Tk[:, slot, None] * rows_TM
    return total_TM.to(rows_AM.dtype) if out_TM is None else out_TM.copy_(total_TM)


def _token_rows(x_TM: Tensor, order: RowOrder, top_k: int, out_AM: Tensor | None = None) -> Tensor:
    """``[A, hidden]``: the token of each row, zero for a row without one."""
    token_A = order.assignment.div(top_k, rounding_mode="floor")
    if out_AM is None:
        out_AM = x_TM.new_empty(order.num_rows, x_TM.shape[1])
    if x_TM.shape[0] == 0:
        return out_AM.zero_()
    index_A = token_A.clamp(min=0) if order.padded else token_A
    torch.ops.aten.index.Tensor_out(x_TM, [index_A], out=out_AM)
    return out_AM.masked_fill_(token_A.unsqueeze(1) < 0, 0) if order.padded else out_AM


def _slot_rows(rows_AM: Tensor, row_T: Tensor) -> Tensor:
    """``[T, hidden]``: the row of one slot of every token, zero where there is none."""
    if rows_AM.shape[0] == 0:
        return rows_AM.new_zeros(row_T.shape[0], rows_AM.shape[1])
    return rows_AM[row_T.clamp(min=0)].masked_fill(row_T.unsqueeze(1) < 0, 0)


# ---- by kernels: nothing here waits for the device ---------------------------------------------


def _copy_slots(x_TM: Tensor, order: RowOrder, rows_AM: Tensor) -> Tensor:
    row_Tk, x_TM = order.row.contiguous(), _side_by_side(x_TM)
    if order.padded:
        rows_AM.zero_()
    strides = {"X_STRIDE": x_TM.stride(0), "ROWS_STRIDE": rows_AM.stride(0)}
    _launch("copy_slots_kernel", (x_TM, row_Tk, rows_AM), row_Tk, x_TM.shape[1], strides)
    return rows_AM


def _sum_slots(
    rows_AM: Tensor, weights_Tk: Tensor | None, row_Tk: Tensor, out_TM: Tensor
) -> Tensor:
    rows_AM, row_Tk = _side_by_side(rows_AM), row_Tk.contiguous()
    strides = {"ROWS_STRIDE": rows_AM.stride(0), "OUT_STRIDE": out_TM.stride(0)}
    tensors = (rows_AM, weights_Tk, row_Tk, out_TM)
    _launch("sum_slots_kernel", tensors, row_Tk, rows_AM.shape[1], strides)
    return out_TM


def _side_by_side(rows_AM: Tensor) -> Tensor:
    """The rows, copied if the numbers of one do not follow each other."""
    return rows_AM if rows_AM.stride(1) == 1 else rows_AM.contiguous()


def _sum_slots_backward(
    grad_TM: Tensor, rows_AM: Tensor, weights_Tk: Tensor, order: RowOrder
) -> tuple[Tensor, Tensor]:
    """Gradients of rows and weights: a row belongs to one slot, if it is padding to none."""
    row_Tk, drows_AM = order.row.contiguous(), order.new_rows(rows_AM)
    if order.padded:
        drows_AM.zero_()
    dweights_Tk = torch.empty_like(weights_Tk)
    tensors = (grad_TM.contiguous(), rows_AM.contiguous(), weights_Tk, row_Tk)
    kernel, width = "sum_slots_backward_kernel", rows_AM.shape[1]
    _launch(kernel, (*tensors, drows_AM, dweights_Tk), row_Tk, width, None)
    return drows_AM, dweights_Tk


def _launch(
    kernel: str, tensors: Sequence[Any], row_Tk: Tensor, width: int, strides: dict[str, int] | None
) -> None:
    """A program for each token and block of its columns; without strides for each whole token."""
    (kernels, launch), (tokens, top_k) = _triton(), row_Tk.shape
    columns = min(BLOCK_COLUMNS, 1 << (width - 1).bit_length())
    blocks = 1 if strides is None else -(-width // columns)
    launch(
        getattr(kernels, kernel), row_Tk.device, tokens * blocks, *tensors,
        M=width, K=top_k, COLUMNS=columns, **strides or {}, num_warps=NUM_WARPS,
    )  # fmt: skip


@cache
def _triton() -> tuple[Any, Any]:
    """The kernels, and what launches them: an import takes half a microsecond in every call."""
    from lasp._core.launcher import launch
    from moe_parallel.kernels import slots_kernel

    return slots_kernel, launch


# ---- autograd ----------------------------------------------------------------------------------


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TM: Tensor, order: RowOrder, impl: ChosenImpl) -> Tensor:
        ctx.save_for_backward(order.row)
        ctx.impl = impl
        return copy_to_rows(x_TM, order, order.new_rows(x_TM), impl)

    @staticmethod
    @refuse_second_derivatives(_REFERENCE)
    def backward(ctx: Any, grad_AM: Tensor) -> tuple[Tensor | None, ...]:
        (row_Tk,) = ctx.saved_tensors
        return sum_of_rows(grad_AM, None, row_Tk, ctx.impl), None, None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows_AM: Tensor, weights_Tk: Tensor, order: RowOrder, impl: ChosenImpl
    ) -> Tensor:
        weights_Tk = weights_Tk.contiguous()
        ctx.save_for_backward(rows_AM, weights_Tk)
        ctx.order, ctx.impl = order, impl
        return sum_of_rows(rows_AM, weights_Tk, order.row, impl)

    @staticmethod
    @refuse_second_derivatives(_REFERENCE)
    def backward(ctx: Any, grad_TM: Tensor) -> tuple[Tensor | None, ...]:
        rows_AM, weights_Tk = ctx.saved_tensors
        order, row_Tk = ctx.order, ctx.order.row
        if ctx.impl == "triton":
            return *_sum_slots_backward(grad_TM, rows_AM, weights_Tk, order), None, None
        grad_rows = _token_rows(grad_TM, order, row_Tk.shape[1])
        grad_rows = grad_rows * _token_rows(weights_Tk.view(-1, 1), order, 1)
        wide_TM = grad_TM.to(torch.promote_types(wide_dtype(rows_AM.dtype), weights_Tk.dtype))
        grad_weights = [(wide_TM * _slot_rows(rows_AM, row)).sum(1) for row in row_Tk.unbind(1)]
        grad_weights_Tk = torch.stack(grad_weights, 1).to(weights_Tk.dtype)
        return grad_rows.to(rows_AM.dtype), grad_weights_Tk, None, None
