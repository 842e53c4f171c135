"""Chunk scan: launches of the kernels that give the output and the gradients.

Classes hold all that is the same in calls with tensors of the same shapes and strides; a call makes
results, tensor descriptors and launches, no more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lasp._core.cache import tensor_cache
from lasp._core.launcher import Tile, launcher_of, strides_of
from lasp.lightning.triton import tuning
from lasp.lightning.triton.chunk_scan_kernel import chunk_scan_kernel, key_value_gradients_kernel
from lasp.lightning.triton.device import arithmetic, device_limits
from lasp.lightning.triton.segments import Recurrence


class EdgeStates(NamedTuple):
    """The states that a scan reads and writes, in the order in which the kernels take them.

    In reverse they are gradients: ``initial`` of final states, ``final`` of initial states.

    Attributes:
        entering: what enters segments from those before, ``States.entering``.
        initial: state at the start of each document ``[N, H, K, V]``, or None for zero.
        incoming: states that runs receive ``[runs, H, K, V]``, or None.
        final: where to leave the state at the end of each document ``[N, H, K, V]``, or None.
    """

    entering: Tensor
    initial: Tensor | None
    incoming: Tensor | None
    final: Tensor | None = None


class ChunkScan:
    """The scan of (query, key, value): output ``[T, H, E]`` in the dtype of the query.

    The output is the scan of (q, k, v), and dq is that of (do, v, k) with transposed states.

    Args:
        query_THD: ``[T, H, D]``; this and the others only as examples.
        key_THD: ``[T, H, D]``.
        value_THE: ``[T, H, E]``.
        recurrence: rates, segments and scale.
        transposed: all states are ``[..., E, D]`` in memory.
        with_final: calls give ``EdgeStates.final``, which is filled in.
    """

    def __init__(
        self,
        query_THD: Tensor,
        key_THD: Tensor,
        value_THE: Tensor,
        recurrence: Recurrence,
        *,
        transposed: bool = False,
        with_final: bool = False,
    ) -> None:
        plan = recurrence.plan
        num_tokens, num_heads, dim_in = query_THD.shape
        dim_out = value_THE.shape[2]
        self._shape = (num_tokens, num_heads, dim_out)
        self._shared = (*recurrence.tensors, num_heads, recurrence.scale)
        blocks = _blocks(query_THD, dim_out)
        tensors = (query_THD, key_THD, value_THE, _contiguous(self._shape, query_THD.dtype))
        widths = (blocks.operand,) * 2 + (blocks.columns,) * 2
        self._tiles = _tiles(tensors, widths, blocks.chunk)
        self._programs = len(plan.segments) * num_heads * -(-dim_out // blocks.columns)
        self._launchers = [
            launcher_of(
                chunk_scan_kernel,
                query_THD.device,
                (query_THD.dtype, plan.with_initial, plan.flow.num_slots > 0, with_final),
                **strides_of("th", query=query_THD, key=key_THD, value=value_THE),
                D=dim_in,
                E=dim_out,
                STEP=-1 if plan.flow.reverse else 1,
                TRANSPOSED=transposed,
                REPAIR=repair,
                **_meta(blocks, query_THD.dtype, bool(self._tiles)),
            )
            for repair in (False, True)[: 1 + plan.shared]
        ]

    def __call__(
        self, query_THD: Tensor, key_THD: Tensor, value_THE: Tensor, states: EdgeStates
    ) -> Tensor:
        """The output; tensors like the examples."""
        out = query_THD.new_empty(self._shape)
        *operands, out_tiles = _described((query_THD, key_THD, value_THE, out), self._tiles, 1)
        for launch in self._launchers:
            launch(self._programs, *operands, out, out_tiles, *states, *self._shared)
        return out


class KeyValueGradients:
    """The gradients dk and dv.

    In reverse dk is the output of (v, do, q) and dv that of (k, q, do). With K = V one launch gives
    both and reads q and do from memory once.

    Args:
        q: ``[T, H, K]``; this and the others only as examples.
        k: ``[T, H, K]``.
        v: ``[T, H, V]``.
        do: gradient of the output ``[T, H, V]``.
        recurrence: rates, segments in reverse direction, and scale.
        with_final: calls give ``EdgeStates.final``, which is filled in.
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        do: Tensor,
        recurrence: Recurrence,
        *,
        with_final: bool,
    ) -> None:
        num_heads, dim = q.shape[1:]
        if v.shape[2] != dim:
            dk = ChunkScan(v, do, q, recurrence, transposed=True)
            self._scans = dk, ChunkScan(k, q, do, recurrence, with_final=with_final)
            self._launchers = []
            return
        plan = recurrence.plan
        self._shared = (*recurrence.tensors, num_heads, recurrence.scale)
        blocks = _blocks(q, dim)
        results = (_contiguous(tuple(q.shape), q.dtype),) * 2
        widths = (blocks.operand,) * 4 + (blocks.columns,) * 4
        self._tiles = _tiles((q, k, v, do, q, do, *results), widths, blocks.chunk)
        self._programs = len(plan.segments) * num_heads * 2 * -(-dim // blocks.columns)
        self._launchers = [
            launcher_of(
                key_value_gradients_kernel,
                q.device,
                (q.dtype, plan.with_initial, plan.flow.num_slots > 0, with_final),
                **strides_of("th", q=q, k=k, v=v, do=do),
                D=dim,
                REPAIR=repair,
                **_meta(blocks, q.dtype, bool(self._tiles)),
            )
            for repair in (False, True)[: 1 + plan.shared]
        ]

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, do: Tensor, states: EdgeStates
    ) -> tuple[Tensor, Tensor]:
        """Both; tensors like the examples."""
        if not self._launchers:
            dk, dv = self._scans
            return dk(v, do, q, states._replace(final=None)), dv(k, q, do, states)
        grads = (k.new_empty(k.shape), v.new_empty(v.shape))
        *operands, dk_tiles, dv_tiles = _described((q, k, v, do, q, do, *grads), self._tiles, 2)
        for launch in self._launchers:
            launch(self._programs, *operands, *grads, dk_tiles, dv_tiles, *states, *self._shared)
        return grads


def _blocks(query: Tensor, dim_out: int) -> tuning.Blocks:
    shared_bytes = device_limits(query.device)[1]
    return tuning.output_blocks(query.shape[2], dim_out, query.dtype, shared_bytes)


def _meta(blocks: tuning.Blocks, dtype: torch.dtype, tma: bool) -> dict[str, object]:
    """What both kernels are compiled for."""
    return {
        "BLOCK_D": blocks.operand,
        "BLOCK_E": blocks.columns,
        "CHUNK": blocks.chunk,
        "TMA": tma,
        "num_warps": blocks.num_warps,
        "num_stages": blocks.num_stages,
        **arithmetic(dtype),
    }


@tensor_cache(maxsize=1024)
def _contiguous(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An example of a result."""
    return torch.empty(shape, dtype=dtype, device="meta")


def _tiles(tensors: tuple[Tensor, ...], widths: tuple[int, ...], chunk: int) -> list[Tile]:
    """Tiles of ``[H, T, D]`` for the copy engine; empty if not all tensors can be described.

    Columns of a tile that lie past a head are zero in shared memory, and are not stored.
    """
    if not all(_describable(x, width) for x, width in zip(tensors, widths)):
        return []
    return [
        Tile(
            (x.shape[1], x.shape[0], x.shape[2]),
            (x.stride(1), x.stride(0), 1),
            (1, chunk, width),
        )
        for x, width in zip(tensors, widths)
    ]


def _describable(x: Tensor, width: int) -> bool:
    """Whether the copy engine can find the rows of a head, and take tiles of so many columns."""
    unit = 16 // x.element_size()
    return width * x.element_size() <= tuning.LONGEST_TILE_ROW and all(
        stride > 0 and stride % unit == 0 for stride in x.stride()[:2]
    )


def _described(
    tensors: tuple[Tensor, ...], tiles: list[Tile], num_results: int
) -> Sequence[object]:
    """What a kernel takes in place of the tensors; None for results that are not described."""
    if tiles:
        return tuple(zip(tensors, tiles))
    return (*tensors[:-num_results], *(None,) * num_results)
