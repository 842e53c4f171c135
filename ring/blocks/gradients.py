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
from ring.planner.ranges import RowRange
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

    def write(self, rows: slice, segments: Segments, part: QKV, out: QKV) -> None:
        """Leave gradients of some rows, over all keys that they see or their own, in ``out``.

        Args:
            rows: of the rank's tokens.
            segments: of these rows, and their keys.
            part: these rows, and their keys.
            out: contiguous memory of the block's result dtype.
        """
        doutput, merged = self._through_output
        if self._through_lse is not None:
            for memory, found in zip(out, self.over(rows, part, segments)):
                memory.copy_(found)
            return
        of_rows = Partial(*(x[rows] for x in merged))
        self._block_of(rows).backward_to(
            out, doutput[rows], of_rows, part, segments, scale=self._scale
        )

    def result_memory(self, qkv: QKV) -> QKV:
        """Memory for gradients to these tensors."""
        dtype, like = self._block.result_dtype(qkv.q.dtype), torch.contiguous_format
        return QKV(*(torch.empty_like(x, dtype=dtype, memory_format=like) for x in qkv))

    @property
    def in_place(self) -> bool:
        """Whether the block writes its results where it is told to."""
        return self._block.in_place

    def _block_of(self, rows: slice) -> Block:
        """The kernel, with the dlse of these rows where it takes one."""
        block = None if self._dlse is None else self._block.with_dlse(self._dlse[rows])
        return block or self._block


class LocalGradients:
    """Gradients of own rows: in one call after the stages, or part by part, some before them.

    In parts the first transfer of keys is hidden too. That takes a block that writes in place: to
    put results together moves as many bytes as the transfer.

    Args:
        qkv: of the rank's tokens.
        rows: the backward of these.
        schedule: of the rank.
    """

    def __init__(self, qkv: QKV, rows: RowGradients, schedule: RingSchedule) -> None:
        self.qkv, self.rows, self._schedule = qkv, rows, schedule
        self._memory: QKV | None = None

    @property
    def memory(self) -> QKV:
        """Gradients of all rows, as calls of parts and of whole fragments leave them."""
        if self._memory is None:
            self._memory = self.rows.result_memory(self.qkv)
        return self._memory

    def before_stages(self) -> None:
        """Compute the first parts, if the block can."""
        if self.rows.in_place:
            self._write(self._schedule.before)

    def after_stages(self) -> QKV:
        """Compute the rest; the gradients of all rows."""
        schedule = self._schedule
        if self.rows.in_place and schedule.after != ((0, len(self.qkv.q)),):
            self._write(schedule.after)
            return self.memory
        segments = segments_of(schedule.fragment_borders, self.qkv.q.device, schedule.window)
        return self.rows.within(segments, self.qkv)

    def _write(self, parts: tuple[RowRange, ...]) -> None:
        for part in parts:
            borders, rows = self._schedule.borders_within[part], slice(*part)
            segments = segments_of(borders, self.qkv.q.device, self._schedule.window)
            qkv, out = (QKV(*(x[rows] for x in some)) for some in (self.qkv, self.memory))
            self.rows.write(rows, segments, qkv, out)


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
