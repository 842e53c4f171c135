"""Gradients of some rows over some keys, through the output and through the lse.

With p the probabilities of the keys s of a row, the gradient of its scores is::

    p_s (do . v_s - do . o + dlse)

Most library kernels compute ``do . o`` themselves and take no dlse. Its term is a second call of
the same backward: with values of ones, an output of zeros, and a gradient of the output whose
columns sum up to dlse. Then ``do . v_s - do . o`` is dlse for every key.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lasp._core.dtypes import wide_dtype
from ring.blocks.interface import QKV, Block, Segments, segments_of
from ring.blocks.merge import Partial
from ring.planner.schedule import RingSchedule
from ring.planner.window import Window


class RowGradients:
    """The backward of a block for the rows of a rank.

    Args:
        block: the kernel.
        doutput: ``[T, Hq, D]``, contiguous.
        dlse: ``[T, Hq]``, dtype of the lse; None if nothing depends on the lse: then each method
            is one call of the kernel, else two, or one of a kernel that takes dlse.
        merged: output and lse of the rows over all their keys.
        scale: factor of the scores.
    """

    def __init__(
        self, block: Block, doutput: Tensor, dlse: Tensor | None, merged: Partial, scale: float
    ) -> None:
        self._block, self._scale = block, scale
        self._through_output = (doutput, merged)
        self._through_lse: tuple[Tensor, Partial] | None = None
        self._dlse = dlse
        if dlse is not None and block.with_dlse(dlse) is None:
            self._dlse = None
            nothing = Partial(torch.zeros_like(merged.output), merged.lse)
            self._through_lse = (_columns(dlse, doutput), nothing)

    def over(self, rows: slice, part: QKV, seen: Window | Segments) -> QKV:
        """Gradients of some rows over keys outside their fragments, those that they see."""
        block, scale = self._block_of(rows), self._scale

        def backward(doutput: Tensor, merged: Partial, part: QKV) -> QKV:
            of_rows = Partial(*(x[rows] for x in merged))
            if isinstance(seen, Segments):
                return block.backward_varlen(doutput[rows], of_rows, part, seen, scale=scale)
            return block.backward(doutput[rows], of_rows, part, window=seen, scale=scale)

        grads = backward(*self._through_output, part)
        if self._through_lse is not None:
            grads = _sum(grads, backward(*self._through_lse, _of_ones(part)))
        return grads

    def within(self, segments: Segments, qkv: QKV) -> QKV:
        """Gradients of all rows, each segment over itself."""
        backward, scale = self._block_of(slice(None)).backward_varlen, self._scale
        grads = backward(*self._through_output, qkv, segments, scale=scale)
        if self._through_lse is not None:
            grads = _sum(grads, backward(*self._through_lse, _of_ones(qkv), segments, scale=scale))
        return grads

    def writes_in_place(self, like: QKV) -> bool:
        """Whether one call of the block leaves gradients in given memory, like these tensors."""
        return self._through_lse is None and self._block.writing_to(like) is not None

    def within_part(self, rows: slice, segments: Segments, qkv: QKV, out: QKV) -> None:
        """Leave those of some rows in ``out``, of a block that :meth:`writes_in_place`.

        Args:
            rows: of the rank's tokens, whole segments.
            segments: of these rows.
            qkv: of these rows.
            out: memory for them, in the dtype of q.
        """
        block = self._block_of(rows).writing_to(out)
        assert block is not None
        doutput, merged = self._through_output
        of_rows = Partial(*(x[rows] for x in merged))
        block.backward_varlen(doutput[rows], of_rows, qkv, segments, scale=self._scale)

    def _block_of(self, rows: slice) -> Block:
        """The kernel, with the dlse of these rows where it takes one."""
        block = None if self._dlse is None else self._block.with_dlse(self._dlse[rows])
        return block or self._block


class LocalGradients:
    """Gradients of the local attention: in one call after the stages, or in two around them.

    In two the first transfer of keys is hidden too. That takes a block that writes where it is told
    to: to put two results together moves as many bytes as the transfer.

    Args:
        qkv: of the rank's tokens.
        rows: the backward of these.
        schedule: of the rank.
    """

    def __init__(self, qkv: QKV, rows: RowGradients, schedule: RingSchedule) -> None:
        self.qkv, self.rows, self._schedule = qkv, rows, schedule
        self._early: QKV | None = None

    def before_stages(self) -> None:
        """Compute the early rows, if the block can."""
        if self.rows.writes_in_place(self.qkv):
            like = torch.contiguous_format
            self._early = QKV(*(torch.empty_like(x, memory_format=like) for x in self.qkv))
            self._part(0, self._early)

    def after_stages(self) -> QKV:
        """Compute the rest; the gradients of all rows."""
        if self._early is not None:
            self._part(1, self._early)
            return self._early
        schedule = self._schedule
        borders, device = schedule.fragment_borders, self.qkv.q.device
        return self.rows.within(segments_of(borders, device, schedule.window), self.qkv)

    def _part(self, number: int, out: QKV) -> None:
        schedule, q = self._schedule, self.qkv.q
        rows = (slice(0, schedule.early), slice(schedule.early, len(q)))[number]
        borders = schedule.borders_around_stages[number]
        segments = segments_of(borders, q.device, schedule.window)
        qkv, of_rows = (QKV(*(x[rows] for x in some)) for some in (self.qkv, out))
        self.rows.within_part(rows, segments, qkv, of_rows)


def _columns(dlse_TH: Tensor, like_THD: Tensor) -> Tensor:
    """``[T, Hq, D]``, zero but for a column of dlse; in 16 bits a second one holds its rest."""
    columns_THD = torch.zeros_like(like_THD)
    columns_THD[..., 0] = dlse_TH
    if like_THD.element_size() == 2 and like_THD.shape[-1] > 1:
        columns_THD[..., 1] = dlse_TH - columns_THD[..., 0]
    return columns_THD


def _of_ones(qkv: QKV) -> QKV:
    return qkv._replace(v=torch.ones_like(qkv.v))


def _sum(through_output: QKV, through_lse: QKV) -> QKV:
    """Add in float32 or wider; the lse does not depend on the values."""
    dtype = wide_dtype(through_output.q.dtype)
    dq, dk = (a.to(dtype) + b for a, b in zip(through_output[:2], through_lse[:2]))
    return QKV(dq, dk, through_output.v)
