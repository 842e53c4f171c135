"""Chunk scan: launches of the kernels that give the output and the gradients.

Classes hold all that is the same in calls with tensors of the same shapes and strides; a call makes
results, tensor descriptors and launches, no more.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from lasp._core.launcher import Launcher, Tile, launcher_of, strides_of
from lasp.lightning.triton import tuning
from lasp.lightning.triton.chunk_scan_kernel import chunk_scan_kernel, key_value_gradients_kernel
from lasp.lightning.triton.device import arithmetic, device_limits
from lasp.lightning.triton.segments import Plan, Recurrence


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


class Form(NamedTuple):
    """A tensor but for its memory."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


class Launches(NamedTuple):
    """What follows from forms of tensors, whatever the pack: found once for all packs.

    Attributes:
        tiles: of operands and results, see :func:`_tiles`.
        programs: of a segment, of all its heads.
        launchers: one, and one more where documents start inside segments.
    """

    tiles: list[Tile]
    programs: int
    launchers: list[Launcher]


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
        num_tokens, num_heads, _ = query_THD.shape
        dim_out = value_THE.shape[2]
        self._shape = (num_tokens, num_heads, dim_out)
        self._shared = (*recurrence.tensors, num_heads, recurrence.scale)
        launches = _scan_launches(
            *map(_form, (query_THD, key_THD, value_THE)),
            _blocks(query_THD, dim_out),
            _states(plan, with_final),
            plan.shared,
            plan.flow.reverse,
            transposed,
        )
        self._tiles, programs, self._launchers = launches
        self._programs = len(plan.segments) * programs

    def __call__(
        self, query_THD: Tensor, key_THD: Tensor, value_THE: Tensor, states: EdgeStates
    ) -> Tensor:
        """The output; tensors like the examples."""
        out = query_THD.new_empty(*self._shape)
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
            self._launchers: list[Launcher] = []
            return
        plan = recurrence.plan
        self._shared = (*recurrence.tensors, num_heads, recurrence.scale)
        launches = _gradient_launches(
            *map(_form, (q, k, v, do)), _blocks(q, dim), _states(plan, with_final), plan.shared
        )
        self._tiles, programs, self._launchers = launches
        self._programs = len(plan.segments) * programs

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, do: Tensor, states: EdgeStates
    ) -> tuple[Tensor, Tensor]:
        """Both; tensors like the examples."""
        if not self._launchers:
            dk, dv = self._scans
            return dk(v, do, q, states._replace(final=None)), dv(k, q, do, states)
        grads = (k.new_empty(*k.shape), v.new_empty(*v.shape))
        *operands, dk_tiles, dv_tiles = _described((q, k, v, do, q, do, *grads), self._tiles, 2)
        for launch in self._launchers:
            launch(self._programs, *operands, *grads, dk_tiles, dv_tiles, *states, *self._shared)
        return grads


def _states(plan: Plan, with_final: bool) -> tuple[bool, bool, bool]:
    """Which of ``EdgeStates`` there are: initial, incoming, final."""
    return plan.with_initial, plan.flow.num_slots > 0, with_final


@lru_cache(maxsize=1024)
def _scan_launches(
    query: Form,
    key: Form,
    value: Form,
    blocks: tuning.Blocks,
    states: tuple[bool, bool, bool],
    shared: bool,
    reverse: bool,
    transposed: bool,
) -> Launches:
    num_tokens, num_heads, dim_in = query.shape
    dim_out = value.shape[2]
    result = _contiguous((num_tokens, num_heads, dim_out), query)
    widths = (blocks.operand,) * 2 + (blocks.columns,) * 2
    tiles = _tiles((query, key, value, result), widths, blocks.chunk)
    launchers = [
        launcher_of(
            chunk_scan_kernel,
            query.device,
            (query.dtype, *states),
            **strides_of("th", query=query.strides, key=key.strides, value=value.strides),
            D=dim_in,
            E=dim_out,
            STEP=-1 if reverse else 1,
            TRANSPOSED=transposed,
            REPAIR=repair,
            **_meta(blocks, query.dtype, bool(tiles)),
        )
        for repair in (False, True)[: 1 + shared]
    ]
    return Launches(tiles, num_heads * -(-dim_out // blocks.columns), launchers)


@lru_cache(maxsize=1024)
def _gradient_launches(
    q: Form,
    k: Form,
    v: Form,
    do: Form,
    blocks: tuning.Blocks,
    states: tuple[bool, bool, bool],
    shared: bool,
) -> Launches:
    _, num_heads, dim = q.shape
    results = (_contiguous(q.shape, q),) * 2
    widths = (blocks.operand,) * 4 + (blocks.columns,) * 4
    tiles = _tiles((q, k, v, do, q, do, *results), widths, blocks.chunk)
    launchers = [
        launcher_of(
            key_value_gradients_kernel,
            q.device,
            (q.dtype, *states),
            **strides_of("th", q=q.strides, k=k.strides, v=v.strides, do=do.strides),
            D=dim,
            REPAIR=repair,
            **_meta(blocks, q.dtype, bool(tiles)),
        )
        for repair in (False, True)[: 1 + shared]
    ]
    return Launches(tiles, num_heads * 2 * -(-dim // blocks.columns), launchers)


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


def _form(x: Tensor) -> Form:
    return Form(x.shape, x.stride(), x.dtype, x.device)


def _contiguous(shape: tuple[int, ...], like: Form) -> Form:
    """Of a result."""
    _, num_heads, dim = shape
    return Form(shape, (num_heads * dim, dim, 1), like.dtype, like.device)


def _tiles(tensors: tuple[Form, ...], widths: tuple[int, ...], chunk: int) -> list[Tile]:
    """Tiles of ``[H, T, D]`` for the copy engine; empty if not all tensors can be described.

    Columns of a tile that lie past a head are zero in shared memory, and are not stored.
    """
    if not all(_describable(x, width) for x, width in zip(tensors, widths)):
        return []
    return [
        Tile(
            (x.shape[1], x.shape[0], x.shape[2]),
            (x.strides[1], x.strides[0], 1),
            (1, chunk, width),
        )
        for x, width in zip(tensors, widths)
    ]


def _describable(x: Form, width: int) -> bool:
    """Whether the copy engine can find the rows of a head, and take tiles of so many columns."""
    unit = 16 // x.dtype.itemsize
    return width * x.dtype.itemsize <= tuning.LONGEST_TILE_ROW and all(
        stride > 0 and stride % unit == 0 for stride in x.strides[:2]
    )


def _described(
    tensors: tuple[Tensor, ...], tiles: list[Tile], num_results: int
) -> Sequence[object]:
    """What a kernel takes in place of the tensors; None for results that are not described."""
    if tiles:
        return tuple(zip(tensors, tiles))
    return (*tensors[:-num_results], *(None,) * num_results)
