"""Chunk scan: launches of the kernels that give the output and the gradients.

Classes hold all that is the same in calls with tensors of the same shapes and strides; a call makes
results, tensor descriptors and launches, no more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from lasp._core.launcher import Tile
from lasp.lightning.triton import tuning
from lasp.lightning.triton.device import device_limits
from lasp.lightning.triton.scan_launches import (
    Form,
    Launch,
    ScanBlocks,
    gradient_launches,
    scan_launches,
)
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
        blocks = _blocks(query_THD, dim_out)
        if tuning.waits_for_memory(query_THD.shape[2], dim_out, plan.shared):
            blocks = blocks._replace(hopper=None)
        self._launches = scan_launches(
            *map(_form, (query_THD, key_THD, value_THE)),
            blocks,
            _states(plan, with_final),
            plan.shared,
            plan.flow.reverse,
            transposed,
        )
        self._segments = len(plan.segments)

    def __call__(
        self, query_THD: Tensor, key_THD: Tensor, value_THE: Tensor, states: EdgeStates
    ) -> Tensor:
        """The output; tensors like the examples."""
        out = query_THD.new_empty(*self._shape)
        for launch, programs, tiles in self._launches:
            *operands, out_tiles = _described((query_THD, key_THD, value_THE, out), tiles, 1)
            launch(self._segments * programs, *operands, out, out_tiles, *states, *self._shared)
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
            self._launches: tuple[Launch, ...] = ()
            return
        plan = recurrence.plan
        self._shared = (*recurrence.tensors, num_heads, recurrence.scale)
        self._launches = gradient_launches(
            *map(_form, (q, k, v, do)), _blocks(q, dim), _states(plan, with_final), plan.shared
        )
        self._segments = len(plan.segments)

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, do: Tensor, states: EdgeStates
    ) -> tuple[Tensor, Tensor]:
        """Both; tensors like the examples."""
        if not self._launches:
            dk, dv = self._scans
            return dk(v, do, q, states._replace(final=None)), dv(k, q, do, states)
        grads = (k.new_empty(*k.shape), v.new_empty(*v.shape))
        for launch, programs, tiles in self._launches:
            tensors = (q, k, v, do, q, do, *grads)
            *operands, dk_tiles, dv_tiles = _described(tensors, tiles, 2)
            programs *= self._segments
            launch(programs, *operands, *grads, dk_tiles, dv_tiles, *states, *self._shared)
        return grads


def _states(plan: Plan, with_final: bool) -> tuple[bool, bool, bool]:
    """Which of ``EdgeStates`` there are: initial, incoming, final."""
    return plan.with_initial, plan.flow.num_slots > 0, with_final


def _blocks(query: Tensor, dim_out: int) -> ScanBlocks:
    sizes = query.shape[2], dim_out, query.dtype
    shared_bytes = device_limits(query.device)[1]
    return ScanBlocks(tuning.output_blocks(*sizes, shared_bytes), tuning.hopper_blocks(*sizes))


def _form(x: Tensor) -> Form:
    return Form(x.shape, x.stride(), x.dtype, x.device)


def _described(
    tensors: tuple[Tensor, ...], tiles: list[Tile], num_results: int
) -> Sequence[object]:
    """What a kernel takes in place of the tensors; None for results that are not described."""
    if tiles:
        return tuple(zip(tensors, tiles))
    return (*tensors[:-num_results], *(None,) * num_results)
