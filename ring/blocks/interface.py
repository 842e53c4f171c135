"""Block kernels: softmax attention of some rows over some keys, forward and backward.

Kernels stand behind one interface (:class:`Block`), each with a dense form, for the rectangles
of the schedule, and a varlen form, for the fragments of a rank. Masks are aligned at the last row
and the last key, and every row sees at least one key. Only blocks that work in place get a causal
mask over more keys than rows.

A backward gets the *merged* output and lse of its rows, so exp(score - lse) is a probability over
all keys: the dq of tiles add up, and dk and dv are final contributions of the rows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from lasp._core.cache import tensor_cache
from lasp._core.dtypes import wide_dtype
from lasp._core.host_constants import to_device
from ring.blocks.merge import Partial
from ring.planner.window import Window


class QKV(NamedTuple):
    """Queries ``[Tq, Hq, D]``, keys ``[Tk, Hkv, D]``, values ``[Tk, Hkv, V]``; or gradients."""

    q: Tensor
    k: Tensor
    v: Tensor


class Operands(NamedTuple):
    """What decides whether a kernel can run.

    Attributes:
        device: of q, k and v.
        dtype: of q, k and v.
        head_dim: D.
        value_dim: V.
        slides: whether rows see the keys of a sliding window only.
    """

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    value_dim: int
    slides: bool = False


class Segments(NamedTuple):
    """Ranges of rows, each attending to its own range of keys only; none is empty.

    Attributes:
        borders: cumulative numbers of rows on the host, 0 first.
        cu_seqlens: the same on the device of the queries, int32.
        longest: rows of the longest segment.
        window: which keys of its segment a row sees, last row and last key aligned.
        key_borders: cumulative numbers of keys; ``borders`` where both are the same tokens.
        key_cu_seqlens: the same on the device of the queries, int32.
        longest_keys: keys of the longest segment.
    """

    borders: tuple[int, ...]
    cu_seqlens: Tensor
    longest: int
    window: Window
    key_borders: tuple[int, ...]
    key_cu_seqlens: Tensor
    longest_keys: int

    @property
    def lengths(self) -> tuple[Tensor, Tensor, int, int]:
        """Arguments of varlen kernels: cu_seqlens and longest segment, for rows and for keys."""
        return self.cu_seqlens, self.key_cu_seqlens, self.longest, self.longest_keys

    @property
    def ranges(self) -> Iterator[tuple[slice, slice]]:
        """Rows and keys of each segment."""
        sides = (pairwise(some) for some in (self.borders, self.key_borders))
        return ((slice(*rows), slice(*keys)) for rows, keys in zip(*sides))


class Block(ABC):
    """An attention kernel: dense and varlen, forward and backward.

    Query head h reads key head h // (Hq / Hkv). The lse is a natural log in float32 (float64 for
    float64). Outputs and gradients come in the dtype of q or wider, in memory of their own, to
    which callers add. Never call it with zero rows or zero keys: some kernels fault on them.
    """

    name: str
    in_place = False  # whether it takes groups of tiles, and writes what its rows get where told to

    @abstractmethod
    def obstacle(self, operands: Operands) -> str | None:
        """Why this kernel cannot take these operands; None if it can."""

    @abstractmethod
    def forward(self, qkv: QKV, *, window: Window, scale: float) -> Partial:
        """Attention of all rows over the keys in their windows; a causal one only with Tq = Tk."""

    @abstractmethod
    def backward(
        self, doutput: Tensor, merged: Partial, qkv: QKV, *, window: Window, scale: float
    ) -> QKV:
        """Contributions of these keys to dq, and of these rows to dk and dv."""

    def with_dlse(self, dlse: Tensor) -> Block | None:
        """This kernel, whose backward goes through ``dlse [Tq, Hq]`` too; None if it cannot."""
        return None

    def result_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype of outputs and gradients, for tensors of ``dtype``."""
        return dtype

    def row_tiles(self, rows: int, keys: int) -> tuple[slice, ...]:
        """Rows of each partial that :meth:`forward_parts` yields."""
        return (slice(0, rows),)

    def forward_parts(self, qkv: QKV, *, window: Window, scale: float) -> Iterator[Partial]:
        """Attention of all rows over the keys in their windows, for an ``Accumulator``."""
        yield self.forward(qkv, window=window, scale=scale)

    def forward_varlen(self, qkv: QKV, segments: Segments, *, scale: float) -> Partial:
        """Attention of the rows of each segment to its keys."""
        q, k, v = qkv
        parts = [
            self.forward(QKV(q[rows], k[keys], v[keys]), window=segments.window, scale=scale)
            for rows, keys in segments.ranges
        ]
        return Partial(*(torch.cat(tensors) for tensors in zip(*parts)))

    def backward_varlen(
        self, doutput: Tensor, merged: Partial, qkv: QKV, segments: Segments, *, scale: float
    ) -> QKV:
        """Contributions of each segment to its own dq, dk and dv."""
        q, k, v = qkv
        parts = [
            self.backward(
                doutput[rows],
                Partial(*(x[rows] for x in merged)),
                QKV(q[rows], k[keys], v[keys]),
                window=segments.window,
                scale=scale,
            )
            for rows, keys in segments.ranges
        ]
        return QKV(*(torch.cat(tensors) for tensors in zip(*parts)))

    def forward_to(self, out: Partial, qkv: QKV, segments: Segments, *, scale: float) -> None:
        """:meth:`forward_varlen`, to given memory of :meth:`result_dtype`."""
        for memory, found in zip(out, self.forward_varlen(qkv, segments, scale=scale)):
            memory.copy_(found)

    def backward_to(
        self,
        out: QKV,
        doutput: Tensor,
        merged: Partial,
        qkv: QKV,
        segments: Segments,
        *,
        scale: float,
    ) -> None:
        """:meth:`backward_varlen`, to given memory of :meth:`result_dtype`."""
        gradients = self.backward_varlen(doutput, merged, qkv, segments, scale=scale)
        for memory, found in zip(out, gradients):
            memory.copy_(found)


def bhtd(x_THD: Tensor) -> Tensor:
    """The view ``[1, H, T, D]`` that dense kernels take."""
    return x_THD.transpose(0, 1)[None]


def thd(x_BHTD: Tensor) -> Tensor:
    """:func:`bhtd` back."""
    return x_BHTD[0].transpose(0, 1)


def wide_like(x: Tensor) -> Tensor:
    """Uninitialised memory in the shape of ``x`` for sums: contiguous, float32 or float64."""
    return torch.empty_like(x, dtype=wide_dtype(x.dtype), memory_format=torch.contiguous_format)


@tensor_cache(maxsize=256)  # a few batches in flight
def segments_of(
    borders: tuple[int, ...],
    device: torch.device,
    window: Window,
    key_borders: tuple[int, ...] | None = None,
) -> Segments:
    """Segments with these borders, for queries on a device; the last ones are kept."""
    if key_borders is None:
        lengths = _lengths(borders, device)
        return Segments(*lengths, window, *lengths)
    return Segments(*_lengths(borders, device), window, *_lengths(key_borders, device))


def _lengths(borders: tuple[int, ...], device: torch.device) -> tuple[tuple[int, ...], Tensor, int]:
    """The borders, the same on a device, and the longest segment."""
    with torch.inference_mode(False):  # kept, and used in training too
        cu_seqlens = to_device(torch.tensor(borders, dtype=torch.int32, device="cpu"), device)
    return borders, cu_seqlens, max(stop - start for start, stop in pairwise(borders))
